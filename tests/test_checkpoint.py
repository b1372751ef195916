# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints bring the same bits back, from and to stock, under other shardings, in mid-run; damage is named."""

import itertools
import json
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import (
    Setting,
    Trainer,
    assert_refuses_half_loaded,
    assert_same_bits,
    drain,
    make_batches,
    max_abs_diff,
    run_ranks,
    scratchpad_constraints,
    with_optimizer,
)
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import DataType
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

from torchrec_scratchpipe import (
    CheckpointManager,
    CheckpointMismatchError,
    CheckpointSaveError,
    ConfigError,
    load_checkpoint,
)
from torchrec_scratchpipe.checkpoint import files as checkpoint_files
from torchrec_scratchpipe.checkpoint import reads
from torchrec_scratchpipe.core.snapshot import TableSnapshot
from torchrec_scratchpipe.sharding.model import scratchpad_collections
from torchrec_scratchpipe.sharding.table_view import shown

SETTING = Setting(num_batches=60, load_factor=0.25)
OPTIMIZERS = [torch.optim.SGD, torch.optim.Adagrad, RowWiseAdagrad]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tables of these tests are cut, too."""
    monkeypatch.setattr(checkpoint_files, "BLOCK_BYTES", 1000)


def state_of(trainer: Trainer) -> dict[str, Any]:
    return {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}


def trained(setting: Setting = SETTING, num_batches: int = 30, **kwargs: Any) -> Trainer:
    trainer = Trainer.scratchpipe(setting, **kwargs)
    drain(trainer.pipeline(), make_batches(setting)[:num_batches])
    assert trainer.num_victims > 0
    return trainer


def saved(directory: Path, trainer: Trainer | None = None, **kwargs: Any) -> CheckpointManager:
    manager = CheckpointManager(directory)
    trainer = trainer or trained()
    manager.save(30, trainer.model, trainer.optimizer, **kwargs)
    return manager


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("is_mapped", [False, True])
def test_resumed_training_gives_the_same_bits(
    optimizer: type[torch.optim.Optimizer], is_mapped: bool, tmp_path: Path
) -> None:
    setting = with_optimizer(SETTING, optimizer)
    whole = trained(setting, 60)
    part = trained(setting, 30, table_dir=str(tmp_path) if is_mapped else None)
    saved(tmp_path / "checkpoints", part, extra={"position": 30})
    resumed = Trainer.scratchpipe(replace(setting, seed=5, load_factor=0.6))
    found = CheckpointManager(tmp_path / "checkpoints").load(resumed.model, resumed.optimizer)
    assert found is not None
    assert found.extra == {"position": 30}
    drain(resumed.pipeline(lookahead=4), make_batches(setting)[found.step :])
    assert_same_bits(whole, resumed)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_both_ways_with_stock(optimizer: type[torch.optim.Optimizer], tmp_path: Path) -> None:
    setting = with_optimizer(SETTING, optimizer)
    ours, stock = trained(setting), Trainer(replace(setting, seed=5))
    manager = saved(tmp_path, ours)
    state = state_of(stock)
    dcp.load(state, checkpoint_id=manager.path(30))
    assert_same_bits(stock, ours)
    stock.train_plain(make_batches(setting)[30:])
    dcp.save(state_of(stock), checkpoint_id=tmp_path / "by_stock")
    for load in (lambda state: dcp.load(state, checkpoint_id=tmp_path / "by_stock"), by_name(tmp_path / "by_stock")):
        back = trained(replace(setting, seed=6))
        load(state_of(back))
        assert_same_bits(stock, back)


STAGE = WarmupStage(WarmupPolicy.LINEAR, max_iters=50, value=0.1)


def with_dense(dense: type[torch.optim.Optimizer]) -> tuple[Trainer, KeyedOptimizerWrapper]:
    """A trainer, and an optimizer of its dense parameters that has not stepped."""
    trainer = Trainer.scratchpipe(SETTING)
    parameters = {name: p for name, p in trainer.model.named_parameters() if "over" in name}
    kwargs = {} if dense is torch.optim.Adam else {"momentum": 0.9}
    return trainer, KeyedOptimizerWrapper(parameters, lambda p: dense(p, lr=0.05, **kwargs))


@pytest.mark.parametrize("warmed_up", ["no", "outside", "inside", "each"])
@pytest.mark.parametrize("dense", [torch.optim.Adam, torch.optim.SGD])
def test_states_that_are_made_at_the_first_step_are_resumed(
    dense: type[torch.optim.Optimizer], warmed_up: str, tmp_path: Path
) -> None:
    """Adam's moments, and how far a warm-up is, which the state_dict of TorchRec's wrapper does not say."""

    def make() -> Trainer:
        trainer, keyed = with_dense(dense)
        if warmed_up == "inside":
            keyed = WarmupOptimizer(keyed, [STAGE], lr=0.05)
        trainer.optimizer = CombinedOptimizer([trainer.model.fused_optimizer, keyed])
        if warmed_up == "outside":
            trainer.optimizer = WarmupOptimizer(trainer.optimizer, [STAGE], lr=0.1)
        if warmed_up == "each":
            fused = WarmupOptimizer(trainer.model.fused_optimizer, [STAGE], lr=0.1, param_name="__warmup_of_tables")
            trainer.optimizer = CombinedOptimizer([fused, WarmupOptimizer(keyed, [STAGE], lr=0.05)])
        return trainer

    whole, part, resumed = make(), make(), make()
    drain(whole.pipeline(), make_batches(SETTING))
    drain(part.pipeline(), make_batches(SETTING)[:30])
    manager = saved(tmp_path, part)
    manager.load(resumed.model, resumed.optimizer)
    assert_same_bits(part, resumed)
    rates = [group["lr"] for trainer in (part, resumed) for group in trainer.optimizer.param_groups]
    assert rates[: len(rates) // 2] == rates[len(rates) // 2 :]
    drain(resumed.pipeline(), make_batches(SETTING)[30:])
    assert_same_bits(whole, resumed)


def by_name(path: Path) -> Callable[[dict[str, Any]], None]:
    return lambda state: load_checkpoint(path, state)


@pytest.mark.parametrize("is_read_first", ["model", "optimizer"])
def test_stock_save_of_our_state_in_either_order(is_read_first: str, tmp_path: Path) -> None:
    ours = trained()
    state: dict[str, Any] = {}
    for name in sorted(["model", "optimizer"], key=lambda name: name != is_read_first):
        state[name] = getattr(ours, name).state_dict()
    dcp.save(state, checkpoint_id=tmp_path)
    stock = Trainer(replace(SETTING, seed=5))
    dcp.load(state_of(stock), checkpoint_id=tmp_path)
    assert_same_bits(stock, ours)


def combined(trainer: Trainer, dense: torch.optim.Optimizer) -> CombinedOptimizer:
    return CombinedOptimizer([trainer.model.fused_optimizer, dense])


def test_states_that_were_not_there_when_it_was_saved_are_dropped(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    fresh, dense = with_dense(torch.optim.Adam)
    manager.save(0, fresh.model, combined(fresh, dense))
    trained_on, other = with_dense(torch.optim.Adam)
    trained_on.optimizer = combined(trained_on, other)
    drain(trained_on.pipeline(), make_batches(SETTING)[:10])
    assert other._optimizer.state
    manager.load(trained_on.model, trained_on.optimizer)
    assert not other._optimizer.state


def test_states_are_made_beside_gradients_and_for_some_parameters_alone(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    trainers = [with_dense(torch.optim.Adam) for _ in range(2)]
    for _, dense in trainers:
        weight, bias = dense.params.values()
        weight.grad, bias.grad = torch.full_like(weight, 0.5), None
    (first, dense), (second, other) = trainers
    dense.step()  # the bias has no gradient, so no state
    manager.save(1, first.model, combined(first, dense))
    weight, bias = other.params.values()
    manager.load(second.model, combined(second, other))
    assert float(weight.grad.mean()) == 0.5
    assert bias.grad is None
    assert len(other._optimizer.state) == 1
    expected = dense._optimizer.state[next(iter(dense.params.values()))]
    assert all(torch.equal(value, expected[name]) for name, value in other._optimizer.state[weight].items())


def test_an_optimizer_of_torch_alone_is_resumed(tmp_path: Path) -> None:
    ours, loaded = Trainer.scratchpipe(SETTING), Trainer.scratchpipe(SETTING)
    optimizers = [torch.optim.Adam(trainer.model.module.over.parameters()) for trainer in (ours, loaded)]
    for parameter in ours.model.module.over.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers[0].step()
    manager = CheckpointManager(tmp_path)
    manager.save(1, ours.model, optimizers[0])
    manager.load(loaded.model, optimizers[1])
    left, right = (optimizer.state_dict()["state"][0] for optimizer in optimizers)
    assert all(torch.equal(value, right[name]) for name, value in left.items())


def _check_sgd(rank: int, directory: str) -> None:
    for optimizer, num_rows in ((torch.optim.SGD, (90, 80, 70)), (torch.optim.Adagrad, (200,))):
        setting = replace(with_optimizer(SETTING, optimizer), num_rows=num_rows, dims=(8,) * len(num_rows))
        ours = Trainer.scratchpipe(setting)
        drain(ours.pipeline(), make_batches(setting, rank=rank)[:20])
        manager = CheckpointManager(Path(directory) / optimizer.__name__)
        manager.save(1, ours.model, ours.optimizer)
        loaded = Trainer.scratchpipe(replace(setting, seed=5))
        manager.load(loaded.model, loaded.optimizer)
        assert_same_bits(ours, loaded)
        load_checkpoint(manager.path(1), state_of(loaded))


@pytest.mark.dist
def test_ranks_without_optimizer_states_of_their_own(tmp_path: Path) -> None:
    run_ranks(2, _check_sgd, str(tmp_path))


class WithExtraState(torch.nn.Linear):
    """A dense part whose state_dict holds more than tensors."""

    extra: Any = 1

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_state_that_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    ours = trained()
    ours.model.module.over = WithExtraState(27, 1)
    manager = CheckpointManager(tmp_path)
    for extra in (lambda: None, RunsCode(tmp_path / "x")):
        ours.model.module.over.extra = extra
        for save in (manager.save, manager.async_save):
            with pytest.raises(CheckpointSaveError, match=r"step 1 cannot be saved"):
                save(1, ours.model, ours.optimizer)
        assert all(not pool.host_table._snapshots for pool in ours.model.module.ebc.pools)
    ours.model.module.over.extra = {"plain": [1, "two"]}
    manager.async_save(1, ours.model, ours.optimizer).result()
    ours.model.module.over.extra = {"plain": [0, "none"]}
    manager.load(ours.model, ours.optimizer)
    assert ours.model.module.over.extra == {"plain": [1, "two"]}


def test_async_save_cannot_be_cancelled(tmp_path: Path) -> None:
    ours = trained()
    manager = CheckpointManager(tmp_path)
    start = hold_back_writer(manager)
    pending = manager.async_save(1, ours.model, ours.optimizer)
    assert not pending.cancel()
    start.set_result(None)
    pending.result()
    assert manager.steps() == [1]


def test_stock_async_save_of_our_state_is_of_one_moment(tmp_path: Path) -> None:
    ours = trained()
    expected = Trainer(replace(SETTING, seed=5))
    expected.copy_from(ours)
    weights = dict(expected.model.state_dict())
    # The default stager of torch 2.13 cannot copy a ShardedTensor, stock's neither.
    writer = dcp.FileSystemWriter(tmp_path)
    pending = dcp.async_save({"model": ours.model.state_dict()}, storage_writer=writer, async_stager=writer)
    drain(ours.pipeline(), make_batches(SETTING)[30:])
    assert ours.model.state_dict()
    pending.result()
    found = Trainer(replace(SETTING, seed=6))
    dcp.load({"model": found.model.state_dict()}, checkpoint_id=tmp_path)
    for name, value in found.model.state_dict().items():
        left, right = (local(tensor) for tensor in (weights[name], value))
        assert torch.equal(left, right), name


def local(value: Any) -> torch.Tensor:
    return value.local_shards()[0].tensor if isinstance(value, ShardedTensor) else value


def test_async_save_is_of_one_moment_and_training_goes_on(tmp_path: Path) -> None:
    before = trained()
    for is_mapped in (False, True):
        directory = tmp_path / str(is_mapped)
        directory.mkdir()
        ours = trained(table_dir=str(directory) if is_mapped else None)
        manager = CheckpointManager(directory / "checkpoints")
        start = hold_back_writer(manager)
        pending = manager.async_save(30, ours.model, ours.optimizer, extra=[30])
        drain(ours.pipeline(), make_batches(SETTING)[30:])
        assert max_abs_diff(before, ours) > 0  # flushes, too
        start.set_result(None)
        pending.result()
        found = Trainer.scratchpipe(replace(SETTING, seed=5))
        assert manager.load(found.model, found.optimizer)
        assert_same_bits(before, found)
        assert_same_bits(trained(num_batches=60), ours)


def hold_back_writer(manager: CheckpointManager) -> "torch.futures.Future[None]":
    """Let the thread that writes begin only when the future is set."""
    start: torch.futures.Future[None] = torch.futures.Future()
    manager._executor.submit(start.wait)
    return start


def test_async_save_without_keeping_rows_would_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TableSnapshot, "keep", lambda self, rows: None)
    before, ours = trained(), trained()
    manager = CheckpointManager(tmp_path)
    start = hold_back_writer(manager)
    pending = manager.async_save(30, ours.model, ours.optimizer)
    drain(ours.pipeline(), make_batches(SETTING)[30:])
    assert ours.model.state_dict()
    start.set_result(None)
    pending.result()
    found = Trainer.scratchpipe(replace(SETTING, seed=5))
    manager.load(found.model, found.optimizer)
    assert max_abs_diff(before, found) > 0


def has_snapshots(trainer: Trainer) -> bool:
    """Whether a save still reads rows."""
    pools = [pool for collection in scratchpad_collections(trainer.model) for pool in collection.pools]
    return any(pool.host_table.has_snapshots for pool in pools)


def test_loading_waits_for_the_async_save(tmp_path: Path) -> None:
    before, ours, other = trained(), trained(), trained(num_batches=10)
    manager = CheckpointManager(tmp_path)
    pending = manager.async_save(30, ours.model, ours.optimizer)
    ours.copy_from(other)
    assert not has_snapshots(ours)
    pending.result()
    found = Trainer.scratchpipe(replace(SETTING, seed=5))
    manager.load(found.model, found.optimizer)
    assert_same_bits(before, found)


def test_writing_in_place_waits_for_the_async_save(tmp_path: Path) -> None:
    before, ours = trained(), trained()
    manager = CheckpointManager(tmp_path)
    kept = local(ours.model.state_dict()["ebc.embedding_bags.t1.weight"])
    for write in (lambda: kept.add_(1.0), lambda: kept.data.mul_(0.5), lambda: kept.numpy().__imul__(0.5)):
        pending = manager.async_save(30, ours.model, ours.optimizer)
        write()
        assert not has_snapshots(ours)
        pending.result()
        found = Trainer.scratchpipe(replace(SETTING, seed=5))
        manager.load(found.model, found.optimizer)
        assert_same_bits(before, found)
        ours.copy_from(before)
        shutil.rmtree(manager.path(30))


def test_async_save_waits_while_memory_is_lent(tmp_path: Path) -> None:
    """What is written there nobody sees."""
    before, ours = trained(), trained()
    array = local(ours.model.state_dict()["ebc.embedding_bags.t1.weight"]).numpy()
    manager = CheckpointManager(tmp_path)
    pending = manager.async_save(30, ours.model, ours.optimizer)
    assert pending.done()
    array *= 0.5
    found = Trainer.scratchpipe(replace(SETTING, seed=5))
    manager.load(found.model, found.optimizer)
    assert_same_bits(before, found)


@pytest.mark.fault("a table written in place while it is being saved")
def test_writing_in_place_during_async_save_loses_that_save_alone(tmp_path: Path) -> None:
    """By what goes round the views that everybody has: a C extension, say."""
    ours = trained()
    manager = saved(tmp_path, ours)
    start = hold_back_writer(manager)
    pending = manager.async_save(31, ours.model, ours.optimizer)
    shown(local(ours.model.state_dict()["ebc.embedding_bags.t1.weight"])).add_(1.0)
    start.set_result(None)
    with pytest.raises(CheckpointSaveError, match=r"step 31 cannot be saved .* written in place while they were being"):
        pending.result()
    assert manager.steps() == [30]


def _save_sharded(rank: int, directory: str, setting: Setting) -> None:
    checkpoint_files.BLOCK_BYTES = 1000
    ours = Trainer.scratchpipe(setting)
    drain(ours.pipeline(), make_batches(setting, rank=rank))
    manager = CheckpointManager(directory)
    manager.async_save(1, ours.model, ours.optimizer, extra=rank).result()
    manager.save(2, ours.model, ours.optimizer, extra=rank)
    dcp.save(state_of(ours), checkpoint_id=Path(directory) / "by_stock")


def _load_sharded(rank: int, directory: str, setting: Setting, num_saving: int) -> None:
    ours = Trainer.scratchpipe(replace(setting, seed=5))
    stock = Trainer(replace(setting, seed=6))
    manager = CheckpointManager(directory)
    dcp.load(state_of(stock), checkpoint_id=Path(directory) / "by_stock")
    for step in (1, 2):
        found = manager.load(ours.model, ours.optimizer, step=step, check_first=step == 1)
        assert found is not None
        assert found.world_size == num_saving
        assert found.extra == (rank if num_saving == dist.get_world_size() else 0)
        assert_same_bits(stock, ours)
    dcp.save(state_of(stock), checkpoint_id=Path(directory) / "back_by_stock")
    back = Trainer.scratchpipe(replace(setting, seed=7))
    dcp.load(state_of(back), checkpoint_id=Path(directory) / "back_by_stock")
    assert_same_bits(stock, back)


SHARDED = replace(SETTING, num_rows=(200, 150, 40), num_batches=12)
COLUMNS = replace(SHARDED, sharding_type="column_wise", min_partition=4)
ROWS = replace(SHARDED, sharding_type="row_wise")
TABLES = replace(SHARDED, sharding_type="table_wise")
HOSTS = replace(SHARDED, sharding_type="table_row_wise", local_size=2)
GRID = replace(SHARDED, sharding_type="grid_shard", local_size=2, min_partition=4)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("saving", "num_saving", "loading", "num_loading"),
    [
        (TABLES, 2, ROWS, 4),
        (ROWS, 4, TABLES, 2),
        (ROWS, 2, ROWS, 2),
        (COLUMNS, 2, replace(TABLES, load_factor=0.6), 1),
        (TABLES, 1, with_optimizer(COLUMNS, torch.optim.Adagrad), 2),
        (HOSTS, 4, TABLES, 2),
        (TABLES, 2, GRID, 4),
        (with_optimizer(ROWS, RowWiseAdagrad), 4, with_optimizer(TABLES, RowWiseAdagrad), 2),
        (with_optimizer(TABLES, torch.optim.SGD), 2, with_optimizer(ROWS, torch.optim.SGD), 4),
    ],
    ids=[
        "tables 2 to rows 4",
        "rows 4 to tables 2",
        "rows 2 to rows 2",
        "columns 2 to tables 1",
        "tables 1 to columns 2",
        "hosts of 2 to tables 2",
        "tables 2 to grid 4",
        "rows 4 to tables 2, row-wise Adagrad",
        "tables 2 to rows 4, SGD",
    ],
)
def test_resharding(saving: Setting, num_saving: int, loading: Setting, num_loading: int, tmp_path: Path) -> None:
    run_ranks(num_saving, _save_sharded, str(tmp_path), saving, local_size=saving.local_size)
    run_ranks(num_loading, _load_sharded, str(tmp_path), loading, num_saving, local_size=loading.local_size)


def test_keep_last(tmp_path: Path) -> None:
    ours = trained()
    manager = CheckpointManager(tmp_path, keep_last=2)
    for step in (1, 5, 10):
        manager.save(step, ours.model, ours.optimizer)
    assert manager.steps() == [5, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000000005", "step_000000000010"]
    with pytest.raises(CheckpointSaveError, match="there is step 10 already"):
        manager.save(10, ours.model, ours.optimizer)
    assert manager.steps() == [5, 10]
    with pytest.raises(ConfigError, match="keep_last is 0"):
        CheckpointManager(tmp_path, keep_last=0)


def test_steps_that_go_back_are_refused(tmp_path: Path) -> None:
    ours = trained()
    manager = saved(tmp_path, ours)
    with pytest.raises(CheckpointSaveError, match="there is step 30 already, of a run that went as far or further"):
        manager.save(21, ours.model, ours.optimizer)
    with pytest.raises(ConfigError, match="step is -1, it must not be negative"):
        manager.save(-1, ours.model, ours.optimizer)


def test_renamed_and_odd_directories(tmp_path: Path) -> None:
    ours = trained()
    manager = saved(tmp_path, ours)
    for name in ("step_1", "step_\u00b2", "step_x", "step_000000000040"):
        shutil.copytree(manager.path(30), tmp_path / name)
    assert manager.steps() == [30, 40]
    check_refused(manager, r"step_000000000040 holds step 30. It was renamed")
    shutil.rmtree(manager.path(40))
    manager.path(30).rename(tmp_path / "elsewhere")
    manager.path(30).symlink_to(tmp_path / "elsewhere")
    last = CheckpointManager(tmp_path, keep_last=1)
    last.save(50, ours.model, ours.optimizer)
    last.save(60, ours.model, ours.optimizer)
    assert last.steps() == [60]
    assert (tmp_path / "elsewhere").is_dir()


def test_nothing_to_load(tmp_path: Path) -> None:
    ours = Trainer.scratchpipe(SETTING)
    manager = CheckpointManager(tmp_path)
    assert manager.load(ours.model, ours.optimizer) is None
    with pytest.raises(CheckpointMismatchError, match=r"does not exist. Steps that were saved: none"):
        manager.load(ours.model, ours.optimizer, step=7)


@pytest.mark.fault("a half-written checkpoint")
def test_half_written_checkpoints_are_not_loaded_and_removed(tmp_path: Path) -> None:
    ours = trained()
    manager = saved(tmp_path, ours)
    shutil.copytree(manager.path(30), tmp_path / ".step_000000000040.unfinished")
    shutil.copytree(manager.path(30), manager.path(50))
    (manager.path(50) / "scratchpipe.json").unlink()
    assert manager.steps() == [30]
    manager.save(60, ours.model, ours.optimizer)
    assert not (tmp_path / ".step_000000000040.unfinished").exists()


def test_save_that_fails_leaves_earlier_ones_and_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = trained()
    manager = saved(tmp_path, ours)

    def write(self: Any, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files._ChecksummedFile, "write", write)
        for save in (manager.save, lambda *args: manager.async_save(*args).result()):
            with pytest.raises(CheckpointSaveError, match=r"step 31 cannot be saved .*No space left.*free space"):
                save(31, ours.model, ours.optimizer)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000000030"]
    drain(ours.pipeline(), make_batches(SETTING)[30:])
    assert_same_bits(trained(num_batches=60), ours)
    manager.save(60, ours.model, ours.optimizer)


def damage_nothing(path: Path) -> None:
    pass


def flip(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("at", [0.05, 0.5, 0.95])
@pytest.mark.fault("a bit-flipped checkpoint file")
def test_flipped_bit_names_file_and_table(at: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchrec_scratchpipe.checkpoint.files.CHECKSUM_BYTES", 512)
    monkeypatch.setattr("torchrec_scratchpipe.checkpoint.loading.CHECKSUM_BYTES", 512)
    manager = saved(tmp_path)
    flip(manager.path(30) / "__0_0.distcp", at)
    check_refused(manager, r"__0_0.distcp: is not what was written. The damage lies in .*(weight|momentum|over)")


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "extra_0.pt", "scratchpipe.json"])
@pytest.mark.fault("a truncated, a missing, a changed checkpoint file")
def test_every_file_is_checked(name: str, tmp_path: Path) -> None:
    manager = saved(tmp_path, extra={"position": 30})
    path = manager.path(30) / name
    ours = Trainer.scratchpipe(replace(SETTING, seed=3))
    whole = path.read_bytes()
    for damage in (lambda: flip(path, 0.6), lambda: path.write_bytes(whole[:-100]), path.unlink):
        damage()
        if name == "scratchpipe.json" and not path.exists():
            assert manager.steps() == []
        check_refused(manager, name, step=30)
        with pytest.raises(CheckpointMismatchError, match=name):
            manager.load(ours.model, ours.optimizer, step=30)
        if name.startswith("__"):
            assert_refuses_half_loaded(ours, make_batches(SETTING)[:4])
        path.write_bytes(whole)
    assert manager.load(ours.model, ours.optimizer)
    assert_same_bits(trained(), ours)


def check_refused(manager: CheckpointManager, message: str, step: int | None = None, **changes: Any) -> None:
    """Loading raises, and changes no bit."""
    changed = replace(SETTING, **changes)
    untouched, ours = Trainer.scratchpipe(changed), Trainer.scratchpipe(changed)
    with pytest.raises(CheckpointMismatchError, match=message):
        manager.load(ours.model, ours.optimizer, step=step, check_first=True)
    assert_same_bits(untouched, ours)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_rows": (200, 150, 4)}, r"t2.weight has shape \(3, 8\) there and \(4, 8\) here"),
        ({"dims": (8, 8, 4)}, r"t2.weight has shape \(3, 8\) there and \(3, 4\) here"),
        ({"data_type": DataType.FP16}, r"t0.weight is torch.float32 there and torch.float16 here"),
        ({"num_rows": (200, 150), "dims": (8, 8)}, r"has .*t2.*, which is not there here|has shape"),
        ({"num_rows": (200, 150, 3, 9), "dims": (8, 8, 8, 8)}, r"has no model.ebc.embedding_bags.t3.weight|has shape"),
        ({"optimizer": torch.optim.SGD, "optimizer_kwargs": (("lr", 0.1),)},
         r"momentum1, which is not there here. It was saved w"),
        ({"optimizer": RowWiseAdagrad}, r"momentum1 has shape .*It was saved with another optimizer"),
    ],
)  # fmt: skip
@pytest.mark.fault("a checkpoint of another cardinality, width, dtype, number of tables or optimizer")
def test_another_model_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    check_refused(saved(tmp_path), message, **changes)


@pytest.mark.fault("a checkpoint of another cardinality, width, dtype, number of tables or optimizer")
def test_saved_with_sgd_and_loaded_with_adagrad_is_refused(tmp_path: Path) -> None:
    manager = saved(tmp_path, trained(with_optimizer(SETTING, torch.optim.SGD)))
    check_refused(manager, r"has no optimizer.state.*momentum1. It was saved with another optimizer")


def test_refused_checkpoint_leaves_an_optimizer_that_has_not_stepped_as_it_was(tmp_path: Path) -> None:
    manager = saved(tmp_path)
    other = Trainer.scratchpipe(replace(SETTING, num_rows=(200, 150, 4)))
    parameters = {name: p for name, p in other.model.named_parameters() if "over" in name}
    dense = KeyedOptimizerWrapper(parameters, lambda p: torch.optim.Adam(p))
    with pytest.raises(CheckpointMismatchError):
        manager.load(other.model, CombinedOptimizer([other.model.fused_optimizer, dense]))
    assert not dense._optimizer.state


class RunsCode:
    """What a hostile pickle holds."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@pytest.mark.fault("a checkpoint file that would run code")
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "code_was_run"
    manager = saved(tmp_path)
    directory = manager.path(30)
    whole = {path.name: path.read_bytes() for path in directory.iterdir()}
    hostile = {
        ".metadata": lambda path: path.write_bytes(pickle.dumps(RunsCode(proof))),
        "extra_0.pt": lambda path: torch.save(RunsCode(proof), path),
    }
    for name, write in hostile.items():
        write(directory / name)
        body = json.loads(whole["scratchpipe.json"])["checkpoint"]
        body["files"][name] = checkpoint_files.checksums_of(directory / name)._asdict()
        manifest = {"crc32": checkpoint_files._crc32_of_json(body), "checkpoint": body}
        (directory / "scratchpipe.json").write_text(json.dumps(manifest))
        check_refused(manager, rf"{name}: .*(it names|might run code)")
        assert not proof.exists()
        (directory / name).write_bytes(whole[name])
    pickle.loads(pickle.dumps(RunsCode(proof)))
    assert proof.exists()


@pytest.mark.fault("a checkpoint file that would run code")
def test_code_in_a_value_is_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "code_was_run"
    dcp.save({"value": RunsCode(proof)}, checkpoint_id=tmp_path / "c")
    proof.unlink(missing_ok=True)
    with pytest.raises(BaseException, match="value: is not plain data"):
        load_checkpoint(tmp_path / "c", {"value": 0})
    assert not proof.exists()
    dcp.load({"value": 0}, checkpoint_id=tmp_path / "c")
    assert proof.exists()


def test_metadata_write_no_attribute_of_a_class_and_name_no_file_elsewhere(tmp_path: Path) -> None:
    manager = saved(tmp_path)
    (manager.path(30) / "scratchpipe.json").unlink()
    path = manager.path(30) / ".metadata"
    whole = path.read_bytes()
    state = {"model": Trainer.scratchpipe(SETTING).model.state_dict()}
    for class_name in (b"torch.distributed.checkpoint.metadata\nMetadata\n", b"pathlib\nPath\n"):
        hostile = b"\x80\x02c" + class_name + b"(N}X\x07\x00\x00\x00is_fileccollections\nOrderedDict\nstb0"
        path.write_bytes(hostile + pickle.dumps(dcp.metadata.Metadata({}), 2)[2:])
        with pytest.raises(CheckpointMismatchError, match="it writes attributes of"):
            load_checkpoint(manager.path(30), state)
    path.write_bytes(whole.replace(b"__0_0.distcp", b"../_0.distcp"))
    with pytest.raises(CheckpointMismatchError, match=r"names the file '../_0.distcp', outside"):
        load_checkpoint(manager.path(30), state)


def test_load_checkpoint_checks_files_and_shapes(tmp_path: Path) -> None:
    manager = saved(tmp_path)
    ours = Trainer.scratchpipe(replace(SETTING, num_rows=(200, 150, 4)))
    with pytest.raises(CheckpointMismatchError, match=r"t2.weight has shape"):
        load_checkpoint(manager.path(30), {"model": ours.model.state_dict()})
    with pytest.raises(CheckpointMismatchError, match="cannot be read as metadata"):
        load_checkpoint(tmp_path / "missing", {"model": ours.model.state_dict()})
    flip(manager.path(30) / "__0_0.distcp", 0.5)
    with pytest.raises(CheckpointMismatchError, match="is not what was written"):
        load_checkpoint(manager.path(30), {"model": Trainer.scratchpipe(SETTING).model.state_dict()})


def test_extra_must_be_plain_data(tmp_path: Path) -> None:
    ours = Trainer.scratchpipe(SETTING)
    with pytest.raises(ConfigError, match="extra: cannot be saved as plain data"):
        CheckpointManager(tmp_path).save(1, ours.model, ours.optimizer, extra=RunsCode(tmp_path / "x"))
    assert list(tmp_path.iterdir()) == []


def test_kept_whole_and_dense_tables_are_saved(tmp_path: Path) -> None:
    setting = replace(SETTING, fused_tables=("t1",))
    constraints = scratchpad_constraints(setting)
    ours = trained(setting, constraints=constraints)
    manager = CheckpointManager(tmp_path)
    start = hold_back_writer(manager)
    pending = manager.async_save(1, ours.model, ours.optimizer)
    drain(ours.pipeline(), make_batches(SETTING)[30:])
    start.set_result(None)
    pending.result()
    found = Trainer.scratchpipe(replace(setting, seed=5))
    manager.load(found.model, found.optimizer)
    assert_same_bits(trained(setting, constraints=constraints), found)


def _check_dtensors(rank: int, directory: str) -> None:
    checkpoint_files.BLOCK_BYTES = 1000
    for setting in (TABLES, ROWS, COLUMNS):
        manager = CheckpointManager(Path(directory) / setting.sharding_type)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(helpers, "DistributedModelParallel", with_dtensors)
            ours, loaded = Trainer.scratchpipe(setting), Trainer.scratchpipe(replace(setting, seed=5))
            kinds = {type(value) for name, value in ours.model.state_dict().items() if "embedding_bags" in name}
            assert kinds == {DTensor}
        drain(ours.pipeline(), make_batches(setting, rank=rank))
        manager.save(1, ours.model, ours.optimizer)
        manager.async_save(2, ours.model, ours.optimizer).result()
        sharded = Trainer.scratchpipe(replace(setting, seed=6))
        for step in (1, 2):
            manager.load(loaded.model, loaded.optimizer, step=step)
            manager.load(sharded.model, sharded.optimizer, step=step)
            expected = ours.model.state_dict()
            for found in (loaded.model.state_dict(), sharded.model.state_dict()):
                for name, value in expected.items():
                    left, right = local_shards(value), local_shards(found[name])
                    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True)), name


def with_dtensors(model: Any, **kwargs: Any) -> DistributedModelParallel:
    env = ShardingEnv(dist.get_world_size(), dist.get_rank(), dist.group.WORLD, output_dtensor=True)
    env.device_mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return DistributedModelParallel(model, env=env, **kwargs)


def local_shards(value: Any) -> list[torch.Tensor]:
    if isinstance(value, DTensor):
        return list(value.to_local().local_shards())
    return [shard.tensor for shard in value.local_shards()] if isinstance(value, ShardedTensor) else [value]


@pytest.mark.dist
def test_state_as_dtensors(tmp_path: Path) -> None:
    run_ranks(2, _check_dtensors, str(tmp_path))


def test_a_relative_directory_stays_where_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    ours = trained()
    checkpoints = CheckpointManager("checkpoints")
    checkpoints.save(1, ours.model, ours.optimizer)
    monkeypatch.chdir("elsewhere")
    checkpoints.async_save(2, ours.model, ours.optimizer)
    checkpoints.wait()
    found = checkpoints.load(ours.model, ours.optimizer)
    assert found is not None
    assert found.step == 2
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert checkpoints.path(1) == tmp_path / "checkpoints" / "step_000000000001"


def test_pieces_of_a_file_are_compared_in_whatever_pieces_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (checkpoint_files, reads):
        monkeypatch.setattr(module, "CHECKSUM_BYTES", 64)
    rng = random.Random(5)
    path = tmp_path / "file"
    for _ in range(200):
        content = rng.randbytes(rng.randrange(1, 700))
        path.write_bytes(content)
        checksums = checkpoint_files.checksums_of(path)
        bounds = sorted(rng.sample(range(len(content) + 1), min(len(content), rng.choice([2, 4, 6]))))
        wanted = [(first, last) for first, last in itertools.pairwise(bounds) if rng.random() < 0.6]
        assert read_pieces(path, checksums, wanted) == [content[first:last] for first, last in wanted]
        if wanted:
            # A bit of what was read, or of what has one checksum with it, is noticed; others are not looked at.
            at = rng.randrange(len(content))
            damaged = bytearray(content)
            damaged[at] ^= 1
            path.write_bytes(damaged)
            is_looked_at = any(first // 64 * 64 <= at < -(-last // 64) * 64 for first, last in wanted if first < last)
            if is_looked_at:
                with pytest.raises(CheckpointMismatchError, match="is not what was written"):
                    read_pieces(path, checksums, wanted)
            path.write_bytes(content[:-1])
            with pytest.raises(CheckpointMismatchError, match="is not what was written"):
                read_pieces(path, checksums, wanted)


def read_pieces(path: Path, checksums: Any, wanted: list[tuple[int, int]]) -> list[bytes]:
    with reads._File(path, checksums) as file:
        found = []
        for first, last in wanted:
            buffer = bytearray(last - first)
            file.compare(file.read(first, memoryview(buffer)))
            found.append(bytes(buffer))
        file.compare(file.finish())
    return found


def test_managers_of_a_job_of_one_rank_share_a_group(tmp_path: Path) -> None:
    """Each group has threads, which nobody would end."""
    CheckpointManager(tmp_path)
    num_groups = len(dist.distributed_c10d._world.pg_map)
    for _ in range(3):
        CheckpointManager(tmp_path, delta_every=1)
    assert len(dist.distributed_c10d._world.pg_map) == num_groups
