# SPDX-License-Identifier: BSD-3-Clause
"""Bit equality with stock TorchRec: losses, weights and optimizer states, with evictions."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from core_helpers import MostRecentlyUsed, RandomOrder
from helpers import (
    CPU,
    Setting,
    Trainer,
    assert_same_bits,
    assert_same_outputs,
    drain,
    make_batches,
    max_abs_diff,
    run_ranks,
)
from torchrec import PoolingType
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.distributed.types import DataType
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_scratchpipe import IdOutOfRangeError, scratchpad_stats, stages
from torchrec_scratchpipe.slot_map import EvictionOrder

OPTIMIZERS = [torch.optim.SGD, torch.optim.Adagrad, RowWiseAdagrad]
SHARDINGS = [("table_wise", None), ("row_wise", None), ("column_wise", 4), ("table_column_wise", 4)]


def with_optimizer(setting: Setting, optimizer: type[torch.optim.Optimizer]) -> Setting:
    kwargs: tuple[tuple[str, float], ...] = (("lr", 0.1),)
    if optimizer is not torch.optim.SGD:
        kwargs += (("eps", 1e-8),)
    return replace(setting, optimizer=optimizer, optimizer_kwargs=kwargs)


def check_equal(setting: Setting, lookahead: int = 2, **sharder_kwargs: object) -> Trainer:
    """Train stock and ours on this rank's batches and compare everything; returns ours."""
    batches = make_batches(setting, rank=dist.get_rank())
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting, **sharder_kwargs)
    ours.copy_from(stock)
    expected = stock.train_plain(batches)
    assert_same_outputs(expected, drain(ours.pipeline(lookahead), batches))
    assert_same_bits(stock, ours)
    stats = scratchpad_stats(ours.model)
    assert all(pool.num_misses_at_train == 0 for pool in stats)
    return ours


@pytest.mark.parametrize("overlap", [False, True], ids=["sequential", "overlapped"])
@pytest.mark.parametrize("lookahead", [1, 2, 4, 8])
def test_lookahead(lookahead: int, overlap: bool) -> None:
    assert check_equal(Setting(), lookahead, overlap=overlap).num_victims > 100


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
@pytest.mark.parametrize(("sharding_type", "min_partition"), SHARDINGS)
def test_sharding_pooling_optimizer(
    sharding_type: str, min_partition: int | None, pooling: PoolingType, optimizer: type[torch.optim.Optimizer]
) -> None:
    setting = Setting(pooling=pooling, sharding_type=sharding_type, min_partition=min_partition)
    assert check_equal(with_optimizer(setting, optimizer)).num_victims > 100


@pytest.mark.parametrize(
    "setting",
    [
        Setting(max_ids_per_bag=1),
        Setting(max_ids_per_bag=12, batch_size=3),
        Setting(dims=(4, 16, 8)),
        Setting(is_weighted=True),
        Setting(is_weighted=True, pooling=PoolingType.MEAN),
        Setting(features_per_table={0: ("a", "b"), 1: ("c",), 2: ("d",)}),
        Setting(fused_tables=("t1",)),
        Setting(fused_tables=("t0", "t2"), dims=(4, 8, 8)),
        Setting(load_factor=1.0),
        Setting(num_rows=(500,), dims=(64,), load_factor=0.1),
    ],
    ids=lambda setting: "",
)
def test_features_and_tables(setting: Setting) -> None:
    ours = check_equal(setting)
    assert (ours.num_victims > 50) == (setting.load_factor < 1.0)


@pytest.mark.parametrize("order", [RandomOrder, MostRecentlyUsed])
def test_eviction_order_decides_no_bits(order: type[EvictionOrder]) -> None:
    assert check_equal(Setting(), lookahead=3, make_eviction_order=order).num_victims > 100


def test_memory_mapped_tables(tmp_path: Path) -> None:
    assert check_equal(Setting(), table_dir=str(tmp_path)).num_victims > 100
    assert list(tmp_path.iterdir()) == []


def test_optimizer_by_fused_params() -> None:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType

    fused_params = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.1, "eps": 1e-8}
    assert check_equal(Setting(optimizer=None, fused_params=fused_params)).num_victims > 100


def test_weights_start_as_stock_weights_do_from_one_seed() -> None:
    assert max_abs_diff(Trainer(Setting()), Trainer.scratchpipe(Setting())) == 0.0


def test_learning_rate_that_changes_every_step() -> None:
    setting = Setting()
    batches = make_batches(setting)
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting)
    pipeline, iterator = ours.pipeline(), iter(batches)
    for index, batch in enumerate(batches):
        for trainer in (stock, ours):
            for group in trainer.optimizer.param_groups:
                group["lr"] = 0.2 / (1 + index)
        assert torch.equal(stock.step(batch), pipeline.progress(iterator))
    assert_same_bits(stock, ours)
    assert ours.num_victims > 100


@pytest.mark.parametrize("pipeline_class", [TrainPipelineBase, TrainPipelineSparseDist, None])
@pytest.mark.parametrize("overlap", [False, True], ids=["sequential", "overlapped"])
def test_sharder_alone_is_correct(pipeline_class: type | None, overlap: bool) -> None:
    setting = Setting()
    batches = make_batches(setting)
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting, overlap=overlap)
    expected = stock.train_plain(batches)
    if pipeline_class is None:
        actual = ours.train_plain(batches)
    else:
        actual = drain(pipeline_class(ours.model, ours.optimizer, CPU), batches)
    assert_same_outputs(expected, actual)
    assert_same_bits(stock, ours)
    assert ours.num_victims > 100


@pytest.mark.parametrize("num_parts_kept", [1, 2])
def test_control_state_that_stays_behind_is_noticed(num_parts_kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without optimizer state on the way, the comparison must fail; with it, it must not."""
    write_rows = stages.write_rows
    monkeypatch.setattr(
        stages,
        "write_rows",
        lambda parts, index, rows: write_rows(parts[:num_parts_kept], index, rows[:num_parts_kept]),
    )
    setting = Setting()
    batches = make_batches(setting)
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting)
    stock.train_plain(batches)
    drain(ours.pipeline(), batches)
    assert (max_abs_diff(stock, ours) == 0.0) == (num_parts_kept == 2)


def _check_on_two_ranks(rank: int) -> None:
    for sharding_type, min_partition in SHARDINGS:
        for optimizer, pooling in zip(OPTIMIZERS, [PoolingType.MEAN, PoolingType.SUM, PoolingType.MEAN], strict=True):
            setting = with_optimizer(
                Setting(
                    pooling=pooling, sharding_type=sharding_type, min_partition=min_partition, num_batches=100,
                    # A small rank-local scratchpad, or row-wise tables would never evict.
                    load_factor=0.25,
                ),
                optimizer,
            )  # fmt: skip
            ours = check_equal(setting)
            num_victims = torch.tensor(ours.num_victims)
            dist.all_reduce(num_victims)
            assert num_victims > 50, f"{setting}: {num_victims} victims"
    # A table with fewer rows than ranks leaves a rank with an empty pool.
    check_equal(Setting(num_rows=(200, 1), dims=(8, 16), sharding_type="row_wise", num_batches=10))
    mixed = check_equal(Setting(fused_tables=("t1",), dims=(8, 4, 8), load_factor=0.25))
    assert mixed.model is not None


def _check_row_wise_ids_on_two_ranks(rank: int) -> None:
    setting = Setting(sharding_type="row_wise", num_batches=8)
    batches = make_batches(setting, rank=rank)
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting)
    ours.copy_from(stock)
    batches[5].sparse_features.values()[0] = 1000  # beyond both ranks' blocks: stock would wrap it onto another row
    pipeline, iterator = ours.pipeline(), iter(batches)
    actual = [pipeline.progress(iterator)]
    with pytest.raises(IdOutOfRangeError, match=r"table t0: feature f0 has id 1000, there are rows \[0, 200\)"):
        pipeline.progress(iterator)
    pipeline.reset()
    actual += drain(pipeline, batches[6:])
    assert_same_outputs(stock.train_plain(batches[:1] + batches[6:]), actual)
    assert_same_bits(stock, ours)


@pytest.mark.dist
def test_row_wise_ids_are_checked_before_they_are_distributed() -> None:
    run_ranks(2, _check_row_wise_ids_on_two_ranks)


@pytest.mark.dist
def test_two_ranks() -> None:
    run_ranks(2, _check_on_two_ranks)


def test_data_type_of_the_setting_is_what_is_compared() -> None:
    assert all(
        config.data_type is DataType.FP32 for config in Trainer(Setting()).model.module.ebc._embedding_bag_configs
    )
