# SPDX-License-Identifier: BSD-3-Clause
"""TorchRec's managed collision over scratchpad tables: rows, states, remapped ids and evictions are stock's.

Shapes: ``N`` ids.
"""

import contextlib
import copy
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import collisions
import pytest
import torch
import torch.distributed as dist
from collisions import CollisionModel, CollisionSetting, LatestTakesRow, make_collision_batches
from helpers import (
    CPU,
    Setting,
    Trainer,
    assert_same_bits,
    assert_same_outputs,
    drain,
    make_bags,
    make_batches,
    note_planned,
    run_ranks,
    scratchpad_constraints,
    with_optimizer,
)
from test_features import index_dedup_on_cpu  # noqa: F401
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.itep_embeddingbag import ITEPEmbeddingBagCollectionSharder
from torchrec.distributed.mc_embedding_modules import BaseShardedManagedCollisionEmbeddingCollection
from torchrec.distributed.planner import Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.hash_mc_modules import HashZchManagedCollisionModule
from torchrec.modules.itep_embedding_modules import ITEPEmbeddingBagCollection
from torchrec.modules.itep_modules import GenericITEPModule
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import ManagedCollisionCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_scratchpipe import (
    CheckpointManager,
    ConfigError,
    MeasurementError,
    ScratchPipeEmbeddingBagCollectionSharder,
    ScratchPipeShardingPlanner,
    measure_working_set,
    scratchpad_stats,
    to_stock,
)
from torchrec_scratchpipe.core import stages
from torchrec_scratchpipe.core.host_table import HostTable
from torchrec_scratchpipe.core.pool import Pool
from torchrec_scratchpipe.core.runner import OverlappedStageRunner
from torchrec_scratchpipe.core.stages import exchange
from torchrec_scratchpipe.core.storage import RamStorage
from torchrec_scratchpipe.sharding.forecast import Forecast
from torchrec_scratchpipe.sharding.model import refuse_pruning


def _stock_and_ours(setting: CollisionSetting, **sharder_kwargs: Any) -> tuple[Trainer, Trainer]:
    stock = Trainer(setting, make_model=CollisionModel)
    ours = Trainer.scratchpipe(setting, make_model=CollisionModel, **sharder_kwargs)
    ours.copy_from(stock)
    return stock, ours


def _stock_pipeline(trainer: Trainer) -> TrainPipelineSparseDist[Any, Any]:
    return TrainPipelineSparseDist(trainer.model, trainer.optimizer, CPU)


def _train(trainer: Trainer, pipeline: Any, batches: Sequence[Batch]) -> list[Tensor]:
    torch.manual_seed(17)  # of dropout, and of rows that are given to other ids
    return drain(pipeline, batches)


def check_collisions(
    setting: CollisionSetting,
    lookahead: int = 2,
    pipeline_kwargs: dict[str, Any] | None = None,
    batches: Sequence[Batch] | None = None,
    **sharder_kwargs: Any,
) -> Trainer:
    batches = batches if batches is not None else make_collision_batches(setting, dist.get_rank())
    stock, ours = _stock_and_ours(setting, **sharder_kwargs)
    expected = _train(stock, _stock_pipeline(stock), batches)
    actual = _train(ours, ours.pipeline(lookahead, **(pipeline_kwargs or {})), batches)
    assert_same_outputs(expected, actual)
    assert_same_bits(stock, ours)
    stats = scratchpad_stats(ours.model)
    assert all(pool.num_misses_at_train == 0 for pool in stats)
    assert sum(pool.num_rows_reset for pool in stats) > 0
    assert ours.num_victims > 0
    return ours


@pytest.mark.parametrize("lookahead", [1, 2, 5, 8])
@pytest.mark.parametrize("policy", ["lfu", "lru", "distance", "hash"])
@pytest.mark.parametrize("is_pooled", [True, False])
def test_same_bits_as_stock(is_pooled: bool, policy: str, lookahead: int, was_planned: list[bool]) -> None:
    setting = CollisionSetting(is_pooled=is_pooled, policy=policy)
    check_collisions(setting, lookahead)
    assert all(was_planned[: 2 * setting.num_batches])
    assert len(was_planned) == 2 * setting.num_batches


def test_batches_seen_ahead(was_planned: list[bool]) -> None:
    check_collisions(CollisionSetting(), 2, {"num_batches_seen_ahead": 6})
    assert all(was_planned)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("eviction_interval", [1, 7])
def test_optimizers_and_intervals(optimizer: type[torch.optim.Optimizer], eviction_interval: int) -> None:
    kwargs = (("lr", 0.1),) if optimizer is torch.optim.SGD else (("lr", 0.1), ("eps", 1e-8))
    setting = CollisionSetting(
        optimizer=optimizer, optimizer_kwargs=kwargs, eviction_interval=eviction_interval, policy="distance"
    )
    check_collisions(setting)


def test_two_forwards_then_their_backwards() -> None:
    """Rows change hands between a forward and its backward: the update goes on top of the new rows, as in stock."""
    setting = CollisionSetting(is_in_place=True, eviction_interval=1)
    stock, ours = _stock_and_ours(setting)
    batches = make_collision_batches(setting)
    outputs: list[list[Tensor]] = [[], []]
    for trainer, found in zip((stock, ours), outputs, strict=True):
        torch.manual_seed(3)
        for first, second in zip(batches[::2], batches[1::2], strict=True):
            trainer.optimizer.zero_grad()
            results = [trainer.model(batch) for batch in (first, second)]
            found += [logits for _, logits in results]
            (results[0][0] + results[1][0]).backward()
            trainer.optimizer.step()
    assert_same_outputs(*outputs)
    assert_same_bits(stock, ours)
    assert ours.num_victims > 0


def test_ids_are_hashed_first_and_remapped_ids_are_not_returned() -> None:
    check_collisions(CollisionSetting(is_hashed=True, returns_remapped=False))


def test_index_dedup_of_remapped_ids(index_dedup_on_cpu: None) -> None:  # noqa: F811
    check_collisions(CollisionSetting(is_pooled=False, use_index_dedup=True, returns_remapped=False))


def test_tables_in_files(tmp_path: Path) -> None:
    check_collisions(CollisionSetting(), table_dir=str(tmp_path), ram_budget_gb=1e-6)


def test_stages_on_the_training_thread() -> None:
    check_collisions(CollisionSetting(), overlap=False)


def test_a_wrong_forecast_is_fetched_on_the_spot(was_planned: list[bool]) -> None:
    """Ids that are let in at random cannot be foretold; those of other batches can."""
    setting = CollisionSetting(policy="random", load_factor=0.9)
    batches = make_collision_batches(setting, drift=1)
    stock, ours = _stock_and_ours(setting)
    expected = _train(stock, _stock_pipeline(stock), batches)
    assert_same_outputs(expected, _train(ours, ours.pipeline(3), batches))
    assert_same_bits(stock, ours)
    assert not all(was_planned)
    assert any(was_planned[len(was_planned) // 2 :])


@pytest.mark.parametrize("broken", ["never compared", "draws numbers of its own batch", "never evicted"])
def test_controls_of_forecasts(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken == "never compared":
        monkeypatch.setattr(Forecast, "confirm", lambda _self, _features: True)
    elif broken == "draws numbers of its own batch":
        monkeypatch.setattr(torch.random, "fork_rng", lambda **_kwargs: contextlib.nullcontext())
    else:
        monkeypatch.setattr(BaseShardedManagedCollisionEmbeddingCollection, "_evict", lambda _self, _evictions: None)
    setting = CollisionSetting(policy="random", load_factor=0.9)
    batches = make_collision_batches(setting, drift=1)
    stock, ours = _stock_and_ours(setting)
    actual = _train(ours, ours.pipeline(3), batches)
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        assert_same_outputs(_train(stock, _stock_pipeline(stock), batches), actual)


def _check_ranks(rank: int, is_pooled: bool) -> None:
    for policy in ("distance", "hash"):
        setting = CollisionSetting(
            is_pooled=is_pooled, policy=policy, num_rows=(320, 240, 160), load_factor=0.35, num_batches=20
        )
        with pytest.MonkeyPatch.context() as monkeypatch:
            was_planned = note_planned(monkeypatch)
            check_collisions(setting, 3)
            assert all(was_planned)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("is_pooled", [True, False])
def test_ranks(world_size: int, is_pooled: bool) -> None:
    run_ranks(world_size, _check_ranks, is_pooled)


# Rows that are written one by one while batches are in flight, of plain collections; hazard 8.


def _tables(trainer: Trainer) -> list[list[Tensor]]:
    """Each table's weights, then its optimizer states, as FBGEMM's module shows them."""
    (lookup,) = trainer.model.module.ebc._lookups
    shown = []
    for kernel in lookup._emb_modules:
        tbe = kernel.emb_module
        states = tbe.split_optimizer_states() or [() for _ in tbe.split_embedding_weights()]
        shown += [[weights, *some] for weights, some in zip(tbe.split_embedding_weights(), states, strict=True)]
    return shown


@torch.no_grad()
def _write_rows(trainer: Trainer, generator: torch.Generator) -> None:
    """Random rows of random tables get new values, weights and states; other rows are read."""
    for parts in _tables(trainer):
        num_rows = parts[0].shape[0]
        rows = torch.randint(0, num_rows, (max(1, num_rows // 8),), generator=generator)
        some = torch.randint(0, num_rows, (4,), generator=generator)
        scale = float(parts[0][some].double().abs().sum())  # what is read goes into what is written
        for part in parts:
            # One value for all, because the order of rows that are named twice is not said.
            part[rows] = (torch.rand(part[:1].shape[1:], generator=generator) + scale % 1).to(part.dtype)


def check_written_rows(lookahead: int, every: int = 1, **sharder_kwargs: Any) -> Trainer:
    setting = Setting(num_rows=(120, 90, 40), load_factor=0.45, num_batches=40)
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting, **sharder_kwargs)
    ours.copy_from(stock)
    batches = make_batches(setting)
    theirs, mine = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    pipeline, iterator = ours.pipeline(lookahead), iter(batches)
    for index, batch in enumerate(batches):
        assert torch.equal(stock.step(batch), pipeline.progress(iterator)), index
        if index % every == 0:
            _write_rows(stock, theirs)
            _write_rows(ours, mine)
    assert_same_bits(stock, ours)
    assert ours.num_victims > 0
    return ours


@pytest.mark.parametrize("lookahead", [1, 3, 8])
@pytest.mark.parametrize("every", [1, 5])
def test_rows_written_while_batches_are_in_flight(lookahead: int, every: int) -> None:
    check_written_rows(lookahead, every)


def test_rows_written_in_files(tmp_path: Path) -> None:
    check_written_rows(3, table_dir=str(tmp_path), ram_budget_gb=1e-6)


def test_rows_written_without_overlap() -> None:
    check_written_rows(3, overlap=False)


@pytest.mark.parametrize("lost", ["slots", "table"])
def test_control_a_row_that_is_written_in_one_place_only_is_old_in_the_other(
    lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lost == "slots":
        monkeypatch.setattr(Pool, "write_some", lambda self, rows, values: self.host_table.write(rows, values))
    else:
        write = Pool.write_some

        def write_slots(self: Pool, rows: Tensor, values: Sequence[Tensor]) -> None:
            with monkeypatch.context() as patch:
                patch.setattr(self.host_table, "write", lambda *_args: None)
                write(self, rows, values)

        monkeypatch.setattr(Pool, "write_some", write_slots)
    with pytest.raises(AssertionError):
        check_written_rows(3)


@pytest.mark.parametrize("is_guarded", [True, False])
def test_hazard_8_no_stage_runs_while_rows_are_written(is_guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is read from its table, then it is written, and then what was read goes to its slot."""
    setting = Setting(num_rows=(120, 90, 40), load_factor=0.45)
    # In place, rows are not outside of both places for a while.
    monkeypatch.setattr(HostTable, "is_device_accessible", False)
    ours = Trainer.scratchpipe(setting)
    weights = _tables(ours)[0][0]
    batch = make_batches(setting)[0]
    row = int(batch.sparse_features["f0"].values()[0])
    has_read, may_go_on = threading.Event(), threading.Event()

    def late_exchange(*args: Any) -> Any:
        has_read.set()
        assert may_go_on.wait(timeout=30)
        return exchange(*args)

    monkeypatch.setattr(stages, "exchange", late_exchange)
    if not is_guarded:
        monkeypatch.setattr(OverlappedStageRunner, "between_batches", lambda _self: contextlib.nullcontext())
    pipeline = ours.pipeline(lookahead=1)
    pipeline.fill_pipeline(iter([batch]))
    assert has_read.wait(timeout=30)

    def write() -> None:
        with torch.no_grad():
            weights[torch.tensor([row])] = 7.0

    writer = threading.Thread(target=write)
    writer.start()
    writer.join(timeout=1)
    assert writer.is_alive() == is_guarded  # it waits for the stages
    may_go_on.set()
    writer.join(timeout=30)
    ours.model.module.ebc.wait_until_idle()
    monkeypatch.undo()
    assert bool((weights[torch.tensor([row])] == 7.0).all()) == is_guarded


def test_a_snapshot_keeps_rows_that_are_written_later() -> None:
    setting = Setting(num_rows=(120, 90, 40), load_factor=0.45)
    ours = Trainer.scratchpipe(setting)
    ours.train_plain(make_batches(setting)[:20])
    weights = _tables(ours)[0][0]
    before = weights.clone()
    (pool,) = ours.model.module.ebc.pools
    ((_, snapshot),) = ours.model.module.ebc.snapshot(RamStorage())
    with torch.no_grad():
        weights[torch.arange(0, 60, 3)] = 9.0
    kept = torch.empty_like(before)
    pool.host_table.read_snapshot(snapshot, 0, 0, kept)
    pool.host_table.close_snapshot(snapshot)
    assert torch.equal(kept, before)
    assert bool((weights[torch.arange(0, 60, 3)] == 9.0).all())


def test_reset_embedding_weight_momentum_is_fbgemms_over_rows() -> None:
    """Weights and row-wise sums of these rows of these tables become zero, and no others; with Adagrad nothing does."""
    for optimizer, is_reset in ((RowWiseAdagrad, True), (torch.optim.Adagrad, False)):
        setting = with_optimizer(Setting(num_rows=(120, 90, 40), load_factor=0.45), optimizer)
        ours = Trainer.scratchpipe(setting)
        ours.train_plain(make_batches(setting)[:20])
        before = [[part.clone() for part in parts] for parts in _tables(ours)]
        (lookup,) = ours.model.module.ebc._lookups
        lookup._emb_modules[0].emb_module.reset_embedding_weight_momentum(
            torch.tensor([3, 50, 7, 0, 1]), torch.tensor([0, 2, 3, 5]), torch.tensor([2, 0]), torch.tensor([1, 2])
        )
        for table, rows in ((2, [7]), (0, [0, 1]), (1, [])):
            for part, expected in zip(_tables(ours)[table], before[table], strict=True):
                if is_reset:
                    expected[torch.tensor(rows, dtype=torch.int64)] = 0.0
                assert torch.equal(part.clone(), expected)
        assert sum(pool.num_rows_reset for pool in scratchpad_stats(ours.model)) == 3


# State of collision modules: of the batch that has trained last, whatever was foretold since.


def test_state_is_of_one_moment_and_goes_both_ways(tmp_path: Path) -> None:
    setting = CollisionSetting(policy="distance")
    batches = make_collision_batches(setting)
    stock, ours = _stock_and_ours(setting)
    pipeline, iterator = ours.pipeline(5), iter(batches)
    torch.manual_seed(3)
    expected = [stock.step(batch) for batch in batches[:20]]
    torch.manual_seed(3)
    assert_same_outputs(expected, [pipeline.progress(iterator) for _ in range(20)])
    assert_same_bits(stock, ours)  # five batches have been foretold
    manager = CheckpointManager(tmp_path)
    manager.save(20, ours.model, ours.optimizer)
    resumed = Trainer.scratchpipe(setting, make_model=CollisionModel)
    manager.load(resumed.model, resumed.optimizer)
    assert_same_bits(stock, resumed)
    back = Trainer(setting, make_model=CollisionModel)
    back.copy_from(resumed)
    back.optimizer.load_state_dict(resumed.optimizer.state_dict())
    assert_same_bits(stock, back)
    expected = _train(back, _stock_pipeline(back), batches[20:])
    assert_same_outputs(expected, _train(resumed, resumed.pipeline(4), batches[20:]))
    assert_same_bits(back, resumed)


def test_loading_a_state_in_mid_run_corrects_what_was_foretold(was_planned: list[bool]) -> None:
    setting = CollisionSetting(policy="distance")
    batches = make_collision_batches(setting)
    stock, ours = _stock_and_ours(setting)
    pipeline, iterator = ours.pipeline(4), iter(batches)
    saved = {}
    for name, trainer in (("stock", stock), ("ours", ours)):
        torch.manual_seed(3)
        for index, batch in enumerate(batches):
            if trainer is stock:
                trainer.step(batch)
            else:
                pipeline.progress(iterator)
            if index == 6:
                saved[name] = copy.deepcopy(trainer.model.state_dict())
            if index == 18:
                trainer.model.load_state_dict(saved[name])
    assert_same_bits(stock, ours)
    assert not all(was_planned)
    assert all(was_planned[-20:])


def _save(rank: int, directory: str) -> None:
    setting = CollisionSetting(policy="distance", num_rows=(320, 240, 160), load_factor=0.35, num_buckets=4)
    ours = Trainer.scratchpipe(setting, make_model=CollisionModel)
    _train(ours, ours.pipeline(3), make_collision_batches(setting, rank)[:20])
    CheckpointManager(directory).save(20, ours.model, ours.optimizer)
    again = Trainer.scratchpipe(setting, make_model=CollisionModel)
    CheckpointManager(directory).load(again.model, again.optimizer)
    assert_same_bits(ours, again)


def _resume(rank: int, directory: str, is_possible: bool) -> None:
    setting = CollisionSetting(policy="distance", num_rows=(320, 240, 160), load_factor=0.35, num_buckets=4)
    stock = Trainer(setting, make_model=CollisionModel)
    ours = Trainer.scratchpipe(setting, make_model=CollisionModel)
    for trainer in (stock, ours):
        with contextlib.nullcontext() if is_possible else pytest.raises(AssertionError, match="cannot be built out of"):
            CheckpointManager(directory).load(trainer.model, trainer.optimizer)
    if not is_possible:
        return
    assert_same_bits(stock, ours)
    batches = make_collision_batches(setting, rank)[20:32]
    expected = _train(stock, _stock_pipeline(stock), batches)
    assert_same_outputs(expected, _train(ours, ours.pipeline(3), batches))
    assert_same_bits(stock, ours)


@pytest.mark.parametrize(("num_before", "num_after"), [(2, 1), (4, 2), (2, 4)])
def test_a_checkpoint_on_other_numbers_of_ranks(num_before: int, num_after: int, tmp_path: Path) -> None:
    """TorchRec puts the shards of collision modules together, and refuses to cut them."""
    run_ranks(num_before, _save, str(tmp_path))
    run_ranks(num_after, _resume, str(tmp_path), num_after <= num_before)


def test_evaluation_in_between_and_a_pipeline_that_is_reset() -> None:
    setting = CollisionSetting(policy="hash", num_batches=45)
    batches = make_collision_batches(setting)
    stock, ours = _stock_and_ours(setting)
    theirs, mine = _stock_pipeline(stock), ours.pipeline(3)
    for first in (0, 15, 30):
        for trainer in (stock, ours):
            trainer.model.train()
        assert_same_outputs(
            _train(stock, theirs, batches[first : first + 10]), _train(ours, mine, batches[first : first + 10])
        )
        for trainer in (stock, ours):
            trainer.model.eval()
        some = batches[first + 5 : first + 15]
        assert_same_outputs(_train(stock, theirs, some), _train(ours, mine, some))
        ours.model.train()
        mine.fill_pipeline(iter(some))  # foretold, planned, and dropped
        mine.reset()
    assert_same_bits(stock, ours)


def test_collision_modules_that_cannot_be_copied_are_fetched_on_the_spot(
    was_planned: list[bool], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def copied(_self: LatestTakesRow, memo: Any) -> Any:
        return copy.deepcopy(threading.Lock(), memo)

    monkeypatch.setattr(LatestTakesRow, "__deepcopy__", copied, raising=False)
    setting = CollisionSetting(policy="hash")
    check_collisions(setting)
    assert was_planned == [False, True] * setting.num_batches  # the plain collection is planned all the same
    (record,) = [record for record in caplog.records if record.name.endswith(".forecast")]
    assert "tables t0, t1 cannot be planned ahead, because its modules cannot be copied (TypeError" in record.message


def test_planned_without_a_sharding_type_and_exported() -> None:
    setting = CollisionSetting()
    constraints = {
        name: replace(constraint, sharding_types=None) for name, constraint in scratchpad_constraints(setting).items()
    }
    ours = Trainer.scratchpipe(setting, constraints, CollisionModel)
    batches = make_collision_batches(setting)
    _train(ours, ours.pipeline(), batches)
    plain = to_stock(ours.model).eval()
    ours.model.eval()
    assert torch.equal(plain(batches[7])[1], ours.model(batches[7])[1])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_working_sets_are_of_remapped_ids(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = CollisionSetting()
    ours = Trainer.scratchpipe(setting, make_model=CollisionModel)
    _train(ours, ours.pipeline(), make_collision_batches(setting))
    monkeypatch.setattr(collisions, "CPU", torch.device(device))
    sets = measure_working_set(make_collision_batches(setting), CollisionModel(setting))
    counted = {table.table_name: table for pool in scratchpad_stats(ours.model) for table in pool.tables}
    for name in setting.table_names:
        assert sets[name].expected_lookups * setting.num_batches == pytest.approx(counted[name].num_unique_ids)


def test_collision_modules_that_cannot_run_here_cannot_be_measured() -> None:
    """FBGEMM's hash kernel changes its state on CUDA alone."""
    tables = make_bags(CollisionSetting()).embedding_bag_configs()[:1]
    module = HashZchManagedCollisionModule(tables[0].num_embeddings, CPU, total_num_buckets=4)
    model = ManagedCollisionEmbeddingBagCollection(
        EmbeddingBagCollection(tables=tables, device=torch.device("meta")),
        ManagedCollisionCollection({tables[0].name: module}, tables),
    )
    with pytest.raises(MeasurementError, match=r"features f0, f0b: their managed collision cannot run on cpu"):
        measure_working_set(make_collision_batches(CollisionSetting(num_batches=2)), model)


def test_in_training_pruning_is_refused() -> None:
    """When it is planned; and by the pipeline, if a plan came from elsewhere."""
    setting = Setting()
    pruned = ITEPEmbeddingBagCollection(make_bags(setting), GenericITEPModule({}, enable_pruning=False))
    model = nn.Sequential(pruned)
    bags = ScratchPipeEmbeddingBagCollectionSharder()
    planner = ScratchPipeShardingPlanner(
        topology=Topology(world_size=1, compute_device="cpu"),
        batch_size=4,
        constraints=scratchpad_constraints(setting),
    )
    sharder = ITEPEmbeddingBagCollectionSharder(bags)
    with pytest.raises(ConfigError, match=r"collection 0: tables t0, t1, t2 .* in-training pruning"):
        planner.plan(model, [sharder])
    with pytest.raises(ConfigError, match="collection here: tables t0"):
        refuse_pruning(pruned, ["t0"], "collection here")
