# SPDX-License-Identifier: BSD-3-Clause
"""What the planner and sharder accept, refuse, and leave to stock TorchRec."""

import logging
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device_path import device_path
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from helpers import (
    CPU,
    Setting,
    TinyModel,
    Trainer,
    assert_same_bits,
    assert_same_outputs,
    drain,
    is_embedding,
    make_bags,
    make_batches,
    make_embeddings,
    make_sharders,
    scratchpad_constraints,
)
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.fp_embeddingbag import FeatureProcessedEmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import CacheParams, ShardingEnv, ShardingEnv2D
from torchrec.modules.embedding_configs import DataType, PoolingType, data_type_to_sparse_type
from torchrec.optim.clipping import GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe import (
    BackwardTwiceError,
    BatchesInFlightError,
    ConfigError,
    IdOutOfRangeError,
    ScratchPipeEmbeddingBagCollectionSharder,
    ScratchPipeShardingPlanner,
    ScratchPipeTrainPipeline,
    ShardedScratchPipeEmbeddingBagCollection,
    ShardedScratchPipeEmbeddingCollection,
    TableStorageError,
    scratchpad_stats,
    stage_spans,
)
from torchrec_scratchpipe.sharding.compat import BoundsCheckMode, ComputeDevice, EmbeddingLocation, WeightDecayMode
from torchrec_scratchpipe.sharding.model import scratchpad_collections
from torchrec_scratchpipe.sharding.options import CPU_OPTIMIZERS, optimizer_states
from torchrec_scratchpipe.sharding.sharder import serves_scratchpads
from torchrec_scratchpipe.sharding.table_view import shown

SETTING = Setting(num_batches=10)


def plan_of(
    setting: Setting, constraints: dict[str, ParameterConstraints] | None, planner_class: type[Any], sharder: Any
) -> dict[str, tuple[str, str]]:
    planner = planner_class(
        topology=Topology(world_size=1, compute_device="cpu"), batch_size=4, constraints=constraints, debug=False
    )
    plan = planner.plan(TinyModel(setting), [sharder]).plan["ebc"]
    return {name: (table.sharding_type, table.compute_kernel) for name, table in plan.items()}


def cached(load_factor: float | None = 0.3, **kwargs: Any) -> ParameterConstraints:
    return ParameterConstraints(
        compute_kernels=["fused_uvm_caching"], cache_params=CacheParams(load_factor=load_factor), **kwargs
    )


@pytest.mark.parametrize("load_factor", [0.0, -0.1, 1.5, float("nan"), float("inf")])
def test_load_factor_outside_its_range_names_the_table(load_factor: float) -> None:
    with pytest.raises(ConfigError, match=rf"table t1: load_factor is {load_factor}, it must lie in \(0, 1\]"):
        Trainer.scratchpipe(SETTING, {"t1": cached(load_factor)})


def test_load_factor_by_fused_params_is_checked_too() -> None:
    setting = replace(SETTING, fused_params={"cache_load_factor": 2.0})
    constraints = {name: cached(None) for name in setting.table_names}
    with pytest.raises(ConfigError, match=r"table t0: load_factor is 2.0"):
        Trainer.scratchpipe(setting, constraints)


def test_load_factor_one_is_planned_as_fused() -> None:
    plan = plan_of(SETTING, {"t0": cached(1.0)}, ScratchPipeShardingPlanner, ScratchPipeEmbeddingBagCollectionSharder())
    assert plan["t0"][1] == "fused"


def test_sharding_type_that_is_not_supported() -> None:
    trainer = Trainer.scratchpipe(SETTING)
    plan = trainer.model.plan.plan["ebc"]
    plan["t1"] = replace(plan["t1"], sharding_type="data_parallel")
    sharder = ScratchPipeEmbeddingBagCollectionSharder()
    with pytest.raises(ConfigError, match=r"table t1: sharding type data_parallel is not supported.*table_wise"):
        sharder.shard(TinyModel(SETTING).ebc, plan, trainer.model._env, CPU)


def test_grid_with_mean_names_the_upstream_fault() -> None:
    setting = replace(SETTING, sharding_type="grid_shard", min_partition=4, pooling=PoolingType.MEAN)
    with pytest.raises(ConfigError, match=r"table t0: TorchRec computes SUM where grid_shard is asked for MEAN"):
        Trainer.scratchpipe(setting)


ON_A_CPU = "EXACT_ADAGRAD, EXACT_ROWWISE_ADAGRAD, EXACT_SGD"


def test_optimizer_that_has_no_kernel_on_a_cpu() -> None:
    setting = replace(SETTING, optimizer=torch.optim.Adam, optimizer_kwargs=(("lr", 0.1),))
    with pytest.raises(
        ConfigError,
        match=rf"tables t0, t1, t2: optimizer .*adam has no kernel on a CPU.* Use one of {ON_A_CPU}, or a GPU\.",
    ):
        Trainer.scratchpipe(setting)


def train_in_fbgemm(data_type: DataType = DataType.FP32, optimizer: EmbOptimType = EmbOptimType.EXACT_SGD) -> None:
    """One step of FBGEMM's own kernel, which `fused` is."""
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(10, 8, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        weights_precision=data_type_to_sparse_type(data_type),
        optimizer=optimizer,
    )
    kernel(torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3])).sum().backward()


def refusal(data_type: DataType = DataType.FP32, optimizer: EmbOptimType = EmbOptimType.EXACT_SGD) -> str:
    group = SimpleNamespace(embedding_tables=[SimpleNamespace(name="t0")], data_type=data_type)
    with pytest.raises(ConfigError, match="tables t0: ") as error:
        optimizer_states(group, {"optimizer": optimizer}, "cpu")
    return str(error.value)


REFUSED = {
    **{kind.name: {"optimizer": kind} for kind in EmbOptimType if kind not in CPU_OPTIMIZERS},
    **{kind.name: {"data_type": kind} for kind in (DataType.BF16, DataType.INT8)},
}


@pytest.mark.parametrize("settings", REFUSED.values(), ids=REFUSED)
def test_compute_kernel_fused_is_advised_only_where_it_can_train(settings: dict[str, Any]) -> None:
    try:
        train_in_fbgemm(**settings)
    except (AssertionError, NotImplementedError):
        assert "fused" not in refusal(**settings)
    else:
        assert refusal(**settings).endswith(", or compute kernel fused.")


@pytest.mark.parametrize(
    ("fused_params", "message"),
    [
        ({"optimizer": EmbOptimType.EMAINPLACE_ROWWISE_ADAGRAD}, "keeps state that cannot travel"),
        ({"weight_decay_mode": WeightDecayMode.COUNTER}, "weight_decay_mode .* changes rows that a batch does not use"),
        ({"use_rowwise_bias_correction": True}, "use_rowwise_bias_correction keeps a counter per row"),
    ],
    ids=["optimizer", "weight_decay_mode", "bias_correction"],
)
def test_optimizer_whose_state_cannot_travel(fused_params: dict[str, Any], message: str) -> None:
    setting = replace(SETTING, optimizer=None, fused_params=fused_params)
    with pytest.raises(ConfigError, match=rf"tables t0, t1, t2: .*{message}"):
        Trainer.scratchpipe(setting)


def test_data_type_that_is_not_supported() -> None:
    setting = replace(SETTING, data_type=DataType.BF16)
    with pytest.raises(ConfigError, match=r"tables t0, t1, t2: data_type BF16 is not supported.*DataType.FP16"):
        Trainer.scratchpipe(setting)


def test_two_dimensional_parallelism_is_refused() -> None:
    trainer = Trainer.scratchpipe(SETTING)
    env = ShardingEnv2D.__new__(ShardingEnv2D)
    sharder = ScratchPipeEmbeddingBagCollectionSharder()
    with pytest.raises(ConfigError, match=r"DMPCollection \(2D parallelism\) .*Use DistributedModelParallel"):
        sharder.shard(TinyModel(SETTING).ebc, trainer.model.plan.plan["ebc"], env, CPU)


def test_resharding_with_batches_in_flight_is_refused() -> None:
    trainer = Trainer.scratchpipe(SETTING)
    pipeline = trainer.pipeline()
    pipeline.progress(iter(make_batches(SETTING)))
    with pytest.raises(BatchesInFlightError, match=r"2 batches in flight were planned for the present sharding"):
        trainer.model.module.ebc.update_shards(trainer.model.plan.plan["ebc"], trainer.model._env, CPU)


def test_virtual_table_is_refused() -> None:
    trainer = Trainer.scratchpipe(SETTING)
    model = TinyModel(SETTING)
    model.ebc.embedding_bag_configs()[1].use_virtual_table = True
    with pytest.raises(ConfigError, match="table t1: virtual tables and enable_embedding_update need"):
        ScratchPipeEmbeddingBagCollectionSharder().shard(
            model.ebc, trainer.model.plan.plan["ebc"], trainer.model._env, CPU
        )


def test_meta_device_has_stock_names_and_shapes() -> None:
    def shapes_on_meta(sharder: Any) -> dict[str, Any]:
        trainer = Trainer.scratchpipe(SETTING)
        model = DistributedModelParallel(
            TinyModel(SETTING),
            device=torch.device("meta"),
            plan=trainer.model.plan if sharder else Trainer(SETTING).model.plan,
            sharders=[sharder or EmbeddingBagCollectionSharder()],
            init_data_parallel=False,
            init_parameters=False,
        )
        return {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}

    assert shapes_on_meta(None) == shapes_on_meta(ScratchPipeEmbeddingBagCollectionSharder())


def test_columns_that_fbgemm_cannot_take() -> None:
    with pytest.raises(ConfigError, match=r"table t0: a shard has 6 columns, FBGEMM needs a multiple of 4"):
        Trainer.scratchpipe(replace(SETTING, dims=(6, 8, 8)))


def test_table_dir_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(TableStorageError, match="is not an existing directory"):
        Trainer.scratchpipe(SETTING, table_dir=str(tmp_path / "missing"))


def test_relative_table_dir_stays_where_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tables").mkdir()
    monkeypatch.chdir(tmp_path)
    sharders = make_sharders(SETTING, is_stock=False, table_dir="tables")
    (tmp_path / "tables").joinpath("elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "tables" / "elsewhere")
    ours = Trainer(SETTING, sharders)
    ours.train_plain(make_batches(SETTING, num_batches=60))
    assert ours.num_victims > 0


def test_unconstrained_tables_get_the_sharding_that_stock_gives_them() -> None:
    stock = plan_of(SETTING, None, EmbeddingShardingPlanner, EmbeddingBagCollectionSharder())
    ours = plan_of(SETTING, None, ScratchPipeShardingPlanner, ScratchPipeEmbeddingBagCollectionSharder())
    assert stock == ours
    fused = {"t0": ParameterConstraints(compute_kernels=["fused"])}
    stock = plan_of(SETTING, fused, EmbeddingShardingPlanner, EmbeddingBagCollectionSharder())
    ours = plan_of(SETTING, {"t0": cached()}, ScratchPipeShardingPlanner, ScratchPipeEmbeddingBagCollectionSharder())
    assert {name: sharding for name, (sharding, _) in stock.items()} == {
        name: sharding for name, (sharding, _) in ours.items()
    }
    assert ours["t0"][1] == "fused_uvm_caching"


def test_row_wise_on_a_cpu_where_it_is_asked_for() -> None:
    constraints = {"t0": cached(sharding_types=["row_wise"])}
    plan = plan_of(SETTING, constraints, ScratchPipeShardingPlanner, ScratchPipeEmbeddingBagCollectionSharder())
    assert plan["t0"] == ("row_wise", "fused_uvm_caching")
    assert "row_wise" not in {sharding for name, (sharding, _) in plan.items() if name != "t0"}


def test_model_parallel_without_a_plan_uses_stock_kernels_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="torchrec_scratchpipe"):
        model = DistributedModelParallel(
            TinyModel(SETTING), device=CPU, sharders=[ScratchPipeEmbeddingBagCollectionSharder()]
        )
    (record,) = [record for record in caplog.records if record.name.startswith("torchrec_scratchpipe")]
    assert "all 3 tables use stock kernels" in record.getMessage()
    assert isinstance(model.module.ebc, ShardedScratchPipeEmbeddingBagCollection)
    assert scratchpad_stats(model) == []
    model(make_batches(SETTING)[0])


def test_state_dict_has_stock_names_shapes_and_metadata() -> None:
    stock, ours = Trainer(SETTING), Trainer.scratchpipe(SETTING)
    expected, actual = stock.model.state_dict(), ours.model.state_dict()
    assert list(expected) == list(actual)
    for name, value in expected.items():
        if hasattr(value, "metadata"):
            assert value.metadata() == actual[name].metadata(), name
    assert stock.optimizer.state_dict()["state"].keys() == ours.optimizer.state_dict()["state"].keys()


def test_optimizer_state_is_fresh_even_when_read_first() -> None:
    stock, ours = Trainer(SETTING), Trainer.scratchpipe(SETTING)
    for batch in make_batches(SETTING):
        stock.step(batch)
        ours.step(batch)
    key = "ebc.embedding_bags.t0.weight"
    state = [trainer.optimizer.state_dict()["state"][key]["t0.momentum1"] for trainer in (stock, ours)]
    expected, actual = (value.local_shards()[0].tensor for value in state)
    assert float(expected.sum()) > 0
    assert torch.equal(expected, actual)


def test_loading_replaces_resident_rows_and_keeps_optimizer_state() -> None:
    batches = make_batches(SETTING)
    stock, ours, other = Trainer(SETTING), Trainer.scratchpipe(SETTING), Trainer(replace(SETTING, seed=9))
    for trainer in (stock, ours):
        trainer.train_plain(batches[:5])
        trainer.copy_from(other)
        trainer.train_plain(batches[5:])
    assert_same_bits(stock, ours)


@pytest.mark.parametrize("overlap", [False, True], ids=["sequential", "overlapped"])
@pytest.mark.parametrize("lookahead", [1, 8])
def test_loading_while_batches_are_in_flight_is_as_in_stock(overlap: bool, lookahead: int) -> None:
    setting = replace(SETTING, num_batches=40, load_factor=0.2)
    batches = make_batches(setting)
    other = Trainer(replace(setting, seed=9))
    other.train_plain(make_batches(replace(setting, seed=9)))
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting, overlap=overlap)
    pipeline, iterator = ours.pipeline(lookahead), iter(batches)
    for index, batch in enumerate(batches):
        if index in (7, 23):
            stock.copy_from(other)
            ours.copy_from(other)
        if index in (15, 23):
            stock.optimizer.load_state_dict(other.optimizer.state_dict())
            ours.optimizer.load_state_dict(other.optimizer.state_dict())
        assert torch.equal(stock.step(batch), pipeline.progress(iterator)), f"batch {index}"
    assert_same_bits(stock, ours)
    assert ours.num_victims > 50


def test_states_read_between_a_forward_and_its_backward_lose_nothing() -> None:
    setting = replace(SETTING, num_batches=30)
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting)
    for index, batch in enumerate(make_batches(setting)):
        for trainer in (stock, ours):
            trainer.optimizer.zero_grad()
            loss, _ = trainer.model(batch)
            if index % 3 == 1:
                assert trainer.optimizer.state_dict()
            loss.backward()
            trainer.optimizer.step()
    assert_same_bits(stock, ours)
    assert ours.num_victims > 30


def test_states_read_by_another_thread_lose_nothing() -> None:
    setting = replace(SETTING, num_batches=40)
    batches = make_batches(setting)
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting)
    is_done, num_reads = threading.Event(), 0

    def read() -> None:
        nonlocal num_reads
        while not is_done.is_set():
            assert ours.optimizer.state_dict()
            num_reads += 1

    reader = threading.Thread(target=read)
    reader.start()
    actual = drain(ours.pipeline(lookahead=3), batches)
    is_done.set()
    reader.join()
    assert_same_outputs(stock.train_plain(batches), actual)
    assert_same_bits(stock, ours)
    assert num_reads > 5


def test_fresh_state_dict_may_be_written_in_place() -> None:
    """As torch.distributed.checkpoint.load does."""
    setting = replace(SETTING, num_batches=30)
    batches = make_batches(setting)
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting)
    pipeline, iterator = ours.pipeline(lookahead=4), iter(batches)
    for index, batch in enumerate(batches):
        if index == 12:
            with torch.no_grad():
                for trainer in (stock, ours):
                    trainer.model.state_dict()["ebc.embedding_bags.t1.weight"].local_shards()[0].tensor.add_(0.25)
        assert torch.equal(stock.step(batch), pipeline.progress(iterator))
    assert_same_bits(stock, ours)


@pytest.mark.parametrize(
    "wrap",
    [
        GradientClippingOptimizer,
        lambda fused: WarmupOptimizer(fused, [WarmupStage(policy=WarmupPolicy.LINEAR, max_iters=5, value=0.1)], lr=0.1),
    ],
    ids=["clipping", "warmup"],
)
def test_state_of_a_wrapped_optimizer_is_saved_and_loaded(wrap: Any) -> None:
    setting = replace(SETTING, num_batches=40)
    batches = make_batches(setting)
    stock, ours, other = Trainer(setting), Trainer.scratchpipe(setting), Trainer(replace(setting, seed=9))
    for trainer in (stock, ours, other):
        dense = trainer.optimizer.optimizers[1][1]
        trainer.optimizer = CombinedOptimizer([wrap(trainer.model.fused_optimizer), dense])
        trainer.train_plain(batches[:20])
    assert_same_bits(stock, ours)
    for trainer in (stock, ours):
        trainer.optimizer.load_state_dict(other.optimizer.state_dict())
        trainer.train_plain(batches[20:])
    assert_same_bits(stock, ours)


def test_settings_of_fbgemms_cache_are_named_as_ignored(caplog: pytest.LogCaptureFixture) -> None:
    setting = replace(SETTING, fused_params={"cache_reserved_memory": 1.0})
    with caplog.at_level(logging.WARNING, logger="torchrec_scratchpipe"):
        Trainer.scratchpipe(setting)
    assert "tables t0, t1, t2: cache_reserved_memory set FBGEMM's cache and have no effect" in caplog.text


def test_backward_twice_is_refused() -> None:
    ours = Trainer.scratchpipe(SETTING)
    loss, _ = ours.model(make_batches(SETTING)[0])
    loss.backward(retain_graph=True)
    with pytest.raises(BackwardTwiceError, match="Call backward once per forward"):
        loss.backward()


def test_forward_without_backward_lets_go_when_its_result_is_dropped() -> None:
    ours = Trainer.scratchpipe(SETTING)
    (pool,) = ours.model.module.ebc.pools
    result = ours.model(make_batches(SETTING)[0])
    assert pool.slot_map.num_batches_in_flight == 1
    del result
    assert pool.slot_map.num_batches_in_flight == 0


def test_a_result_that_is_kept_holds_its_own_rows_and_no_others() -> None:
    setting = replace(SETTING, num_batches=40)
    batches = make_batches(setting)
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting)
    kept = [trainer.model(batches[0])[0] for trainer in (stock, ours)]
    stock.train_plain(batches)
    ours.train_plain(batches)
    assert_same_bits(stock, ours)
    assert ours.num_victims > 50
    del kept


@pytest.mark.host_path
def test_statistics_per_pool_and_table() -> None:
    setting = replace(SETTING, dims=(8, 16, 8))
    ours = Trainer.scratchpipe(setting)
    batches = make_batches(setting)
    ours.train_plain(batches)
    pools = {pool.table_names: pool for pool in scratchpad_stats(ours.model)}
    assert set(pools) == {("t0", "t2"), ("t1",)}
    for i in (0, 1, 2):
        (table,) = [table for pool in pools.values() for table in pool.tables if table.table_name == f"t{i}"]
        ids = [batch.sparse_features[f"f{i}"].values() for batch in batches]
        assert table.num_ids == sum(values.numel() for values in ids)
        assert table.num_unique_ids == sum(values.unique().numel() for values in ids)
    for pool in pools.values():
        row_bytes = pool.table_bytes // pool.num_rows
        assert pool.num_batches == len(batches)
        assert pool.fill_bytes == pool.num_unique_misses * row_bytes
        assert pool.writeback_bytes == pool.num_victims * row_bytes
        assert pool.num_unique_misses == pool.num_victims + pool.num_resident_rows
        assert pool.num_misses_at_train == 0
        assert pool.num_ids == sum(table.num_ids for table in pool.tables)
    # Pools of one kernel group wait together. A quick worker may leave nothing to wait for.
    assert sum(pool.num_stalls for pool in pools.values()) <= len(batches)
    spans = stage_spans(ours.model)
    stages_of_batch = [span.stage.value for span in spans[0] if span.batch_index == 3]
    assert stages_of_batch == ["plan", "collect", "exchange", "insert", "train"]


def test_module_context_is_the_stock_one_for_stock_modules() -> None:
    assert dist.get_world_size() == 1
    assert type(Trainer(SETTING).model.module.ebc) is ShardedEmbeddingBagCollection
    assert scratchpad_constraints(SETTING)["t0"].compute_kernels == ["fused_uvm_caching"]


@pytest.mark.parametrize("is_pooled", [True, False])
def test_tables_stay_where_they_are_when_the_model_is_moved(is_pooled: bool) -> None:
    """As DistributedModelParallel moves it to a GPU: every parameter that is copied would be another than the table."""
    setting = Setting(is_pooled=is_pooled, fused_tables=("t2",))
    batches = make_batches(setting)
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting)
    ours.copy_from(stock)
    ours.model.module._apply(torch.clone)
    collection = ours.model.module.ebc if is_pooled else ours.model.module.ec
    host = [part for pool in collection.pools for part in pool.host_table.parts]
    storages = {part.untyped_storage().data_ptr() for part in host}
    tables = [parameter for name, parameter in ours.model.named_parameters() if is_embedding(name) and "t2" not in name]
    assert len(tables) == 2
    assert all(shown(parameter).untyped_storage().data_ptr() in storages for parameter in tables)
    ours.model.load_state_dict(stock.model.state_dict())
    stock.train_plain(batches)
    drain(ours.pipeline(), batches)
    assert_same_bits(stock, ours)


@pytest.mark.parametrize("is_pooled", [True, False])
def test_collection_is_made_by_stock_arguments_in_stock_order(is_pooled: bool) -> None:
    setting = replace(SETTING, is_pooled=is_pooled)
    planned = Trainer.scratchpipe(setting)
    plan = next(iter(planned.model.plan.plan.values()))
    kind = ShardedScratchPipeEmbeddingBagCollection if is_pooled else ShardedScratchPipeEmbeddingCollection
    module = make_bags(setting) if is_pooled else make_embeddings(setting)
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    made = kind(module, plan, env, {"learning_rate": 0.25}, CPU)
    expected = [pool.scratchpad.num_slots for each in scratchpad_collections(planned.model) for pool in each.pools]
    assert expected == [pool.scratchpad.num_slots for pool in made.pools]
    assert [group["lr"] for group in made.fused_optimizer.param_groups] == [0.25] * len(
        made.fused_optimizer.param_groups
    )
    with pytest.raises(TypeError, match="positional argument"):
        kind(module, plan, env, None, CPU, None, None, None, None)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("torchrec_scratchpipe")]


def sharded_by(make: Any, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Plan and shard with these sharders, make a pipeline; what this package says."""
    torch.manual_seed(0)
    model = TinyModel(SETTING)
    sharders = make()
    planner = ScratchPipeShardingPlanner(
        topology=Topology(world_size=1, compute_device="cpu"),
        batch_size=6,
        constraints=scratchpad_constraints(SETTING),
        debug=False,
    )
    with caplog.at_level(logging.WARNING, logger="torchrec_scratchpipe"):
        plan = planner.collective_plan(model, sharders, dist.group.WORLD)
        said_by_plan = said(caplog)
        caplog.clear()
        sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
        ScratchPipeTrainPipeline(sharded, sharded.fused_optimizer, torch.device("cpu"))
    said_by_pipeline = said(caplog)
    assert bool(scratchpad_stats(sharded)) == (not any("no scratchpad serves" in text for text in said_by_plan))
    return said_by_plan + said_by_pipeline


def test_a_stock_sharder_that_takes_scratchpad_tables_is_named(caplog: pytest.LogCaptureFixture) -> None:
    ours = ScratchPipeEmbeddingBagCollectionSharder
    for make in (
        lambda: [ours(), *get_default_sharders()],
        lambda: get_default_sharders(),
        lambda: [EmbeddingBagCollectionSharder()],
    ):
        texts = sharded_by(make, caplog)
        for text in (texts[0], texts[-1]):
            assert "tables t0, t1, t2 are planned as fused_uvm_caching, and no scratchpad serves them" in text
        caplog.clear()
    for make in (lambda: [*get_default_sharders(), ours()], lambda: [ours()]):
        assert not any("no scratchpad serves" in text for text in sharded_by(make, caplog))
        caplog.clear()


def test_feature_processed_bags_whose_inner_sharder_is_ours_have_a_scratchpad() -> None:
    ours = ScratchPipeEmbeddingBagCollectionSharder()
    assert serves_scratchpads(ours)
    assert serves_scratchpads(FeatureProcessedEmbeddingBagCollectionSharder(ebc_sharder=ours))
    assert not serves_scratchpads(FeatureProcessedEmbeddingBagCollectionSharder())
    assert not serves_scratchpads(EmbeddingBagCollectionSharder())


def with_bad_id(setting: Setting, table: int, position: int, bad: int) -> list[Any]:
    """Batches of which one has a bad id in a table's feature."""
    batches = make_batches(setting)[:6]
    features = batches[3].sparse_features
    values = features.values().clone()
    first = features.offset_per_key()[table]
    assert features.offset_per_key()[table + 1] > first + position
    values[first + position] = bad
    batches[3] = replace(
        batches[3], sparse_features=KeyedJaggedTensor(features.keys(), values, lengths=features.lengths())
    )
    return batches


OUT_OF_RANGE = replace(SETTING, num_rows=(200, 150, 90), batch_size=20)


@pytest.mark.parametrize("fused_tables", [(), ("t1",), ("t0", "t1")], ids=str)
@pytest.mark.parametrize("bad", [150, 10_000, -7])
def test_an_id_out_of_range_is_an_error_whether_its_table_is_whole_or_not(
    fused_tables: tuple[str, ...], bad: int
) -> None:
    setting = replace(OUT_OF_RANGE, fused_tables=fused_tables)
    batches = with_bad_id(setting, 1, 2, bad)
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting)
    ours.copy_from(stock)
    pipeline, iterator = ours.pipeline(lookahead=1), iter(batches)
    assert_same_outputs(stock.train_plain(batches[:3]), [pipeline.progress(iterator) for _ in range(3)])
    with pytest.raises(IdOutOfRangeError, match=rf"table t1: feature f1 has id {bad}, there are rows \[0, 150\)"):
        pipeline.progress(iterator)
    pipeline.reset()
    assert_same_outputs(stock.train_plain(batches[4:]), drain(pipeline, batches[4:]))
    assert_same_bits(stock, ours)


@pytest.mark.parametrize("mode", [None, BoundsCheckMode.IGNORE, BoundsCheckMode.WARNING], ids=str)
@pytest.mark.parametrize("sharding_type", ["table_wise", "row_wise"])
@pytest.mark.parametrize("fused_tables", [(), ("t1",)], ids=str)
def test_an_id_out_of_range_may_be_what_fbgemm_makes_of_it(
    fused_tables: tuple[str, ...], sharding_type: str, mode: BoundsCheckMode | None
) -> None:
    if sharding_type == "row_wise" and fused_tables:
        pytest.skip("on a CPU stock offers row-wise sharding to no whole table")
    fused_params = None if mode is None else {"bounds_check_mode": mode}
    setting = replace(OUT_OF_RANGE, fused_tables=fused_tables, sharding_type=sharding_type, fused_params=fused_params)
    for bad in (150, 10_000, -7):
        batches = with_bad_id(setting, 1, 2, bad)
        stock, ours = Trainer(setting), Trainer.scratchpipe(setting, out_of_range_ids="fbgemm")
        ours.copy_from(stock)
        assert_same_outputs(stock.train_plain(batches), drain(ours.pipeline(), batches))
        assert_same_bits(stock, ours)


def test_half_life_is_for_every_device() -> None:
    for path in (nullcontext(), device_path("triton")):
        with path:
            ours = Trainer.scratchpipe(SETTING, half_life=7)
        assert [pool.slot_map.half_life for pool in ours.model.module.ebc.pools] == [7]
    with pytest.raises(ConfigError, match="half_life is 0"):
        Trainer.scratchpipe(SETTING, half_life=0)


def test_columns_and_optimizers_are_in_stock_order_whatever_has_a_scratchpad() -> None:
    """Which tables stay whole depends on the memory budget; what a model reads by position must not."""
    for dims in ((8, 16, 8), (16, 8, 16), (8, 16, 32), (8, 8, 16)):
        for fused in ((), ("t0",), ("t1",), ("t2",), ("t0", "t2")):
            setting = replace(SETTING, num_rows=(200, 150, 90), dims=dims, fused_tables=fused, num_batches=6)
            stock, ours = Trainer(setting), Trainer.scratchpipe(setting)
            ours.copy_from(stock)
            features = make_batches(setting)[0].sparse_features
            expected, actual = stock.model.module.ebc(features), ours.model.module.ebc(features)
            assert expected.keys() == actual.keys()
            assert torch.equal(expected.values(), actual.values())
            groups = [trainer.model.fused_optimizer.param_groups for trainer in (stock, ours)]
            assert [len(group["params"]) for group in groups[0]] == [len(group["params"]) for group in groups[1]]
            for trainer in (stock, ours):
                trainer.model.fused_optimizer.param_groups[0]["lr"] = 0.01
            assert_same_outputs(stock.train_plain(make_batches(setting)), drain(ours.pipeline(), make_batches(setting)))
            assert_same_bits(stock, ours)


def test_freezing_after_sharding_is_stock_error() -> None:
    messages = []
    for trainer in (Trainer(SETTING), Trainer.scratchpipe(SETTING)):
        parameter = next(trainer.model.module.ebc.parameters())
        with pytest.raises(RuntimeError) as caught:
            parameter.requires_grad_(False)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
