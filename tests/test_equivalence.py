# SPDX-License-Identifier: BSD-3-Clause
"""Bit equality with stock TorchRec: losses, weights and optimizer states, with evictions."""

from pathlib import Path

import pytest
import torch
from core_helpers import MostRecentlyUsed, RandomVictims
from helpers import (
    CPU,
    Setting,
    ShortSetting,
    Trainer,
    assert_same_bits,
    assert_same_outputs,
    check_equal,
    drain,
    make_batches,
    max_abs_diff,
    with_optimizer,
)
from torchrec import PoolingType
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_scratchpipe.core import stages
from torchrec_scratchpipe.core.torch_ops import TorchOps
from torchrec_scratchpipe.sharding import kernel
from torchrec_scratchpipe.sharding.options import ScratchpadOptions

OPTIMIZERS = [torch.optim.SGD, torch.optim.Adagrad, RowWiseAdagrad]
SHARDINGS = [
    ("table_wise", None),
    ("row_wise", None),
    ("column_wise", 4),
    ("table_column_wise", 4),
    ("table_row_wise", None),
    ("grid_shard", 4),
]


@pytest.mark.parametrize("overlap", [False, True], ids=["sequential", "overlapped"])
@pytest.mark.parametrize("lookahead", [1, 2, 4, 8, 16])
def test_lookahead(lookahead: int, overlap: bool) -> None:
    assert check_equal(ShortSetting(), lookahead, overlap=overlap).num_victims > 100


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("sharding_type", "min_partition", "pooling"),
    [
        (sharding_type, min_partition, pooling)
        for sharding_type, min_partition in SHARDINGS
        for pooling in (PoolingType.SUM, PoolingType.MEAN)
        if (sharding_type, pooling) != ("grid_shard", PoolingType.MEAN)  # refused, see test_sharder.py
    ],
)
def test_sharding_pooling_optimizer(
    sharding_type: str, min_partition: int | None, pooling: PoolingType, optimizer: type[torch.optim.Optimizer]
) -> None:
    setting = ShortSetting(pooling=pooling, sharding_type=sharding_type, min_partition=min_partition)
    assert check_equal(with_optimizer(setting, optimizer)).num_victims > 100


@pytest.mark.parametrize(
    "setting",
    [
        ShortSetting(max_ids_per_bag=1, num_batches=80),
        ShortSetting(max_ids_per_bag=12, batch_size=3),
        ShortSetting(dims=(4, 16, 8)),
        ShortSetting(is_weighted=True),
        ShortSetting(is_weighted=True, pooling=PoolingType.MEAN),
        ShortSetting(features_per_table={0: ("a", "b"), 1: ("c",), 2: ("d",)}),
        ShortSetting(fused_tables=("t1",)),
        ShortSetting(fused_tables=("t0", "t2"), dims=(4, 8, 8)),
        ShortSetting(load_factor=1.0),
        ShortSetting(num_rows=(500,), dims=(64,), load_factor=0.1),
    ],
    ids=lambda setting: "",
)
def test_features_and_tables(setting: Setting) -> None:
    ours = check_equal(setting)
    assert (ours.num_victims > 50) == (setting.load_factor < 1.0)


@pytest.mark.parametrize("ops", [RandomVictims, MostRecentlyUsed])
def test_the_choice_of_victims_decides_no_bits(ops: type[TorchOps], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScratchpadOptions, "make_slot_ops", lambda _self, _device: ops())
    assert check_equal(ShortSetting(), lookahead=3).num_victims > 100


@pytest.mark.parametrize("ram_budget_gb", [0.5, 2e-6], ids=["all in RAM", "most on the disk"])
def test_memory_mapped_tables(ram_budget_gb: float, tmp_path: Path) -> None:
    ours = check_equal(ShortSetting(), table_dir=str(tmp_path), ram_budget_gb=ram_budget_gb)
    assert ours.num_victims > 100
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_mapped", [False, True])
@pytest.mark.parametrize("num_together", [7, 1 << 24])
def test_initial_weights_are_stocks_and_are_written_once(
    is_mapped: bool, num_together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that is drawn later differs either."""
    monkeypatch.setattr(kernel, "NUM_DRAWN_TOGETHER", num_together)
    stock = Trainer(ShortSetting())
    drawn = torch.rand(3, dtype=torch.float32)
    ours = Trainer.scratchpipe(ShortSetting(), table_dir=str(tmp_path) if is_mapped else None)
    assert torch.equal(torch.rand(3, dtype=torch.float32), drawn)
    assert_same_bits(stock, ours)
    # torch counts what is written to a tensor: a file, once per table.
    for pool in ours.model.module.ebc.pools if is_mapped else ():
        assert pool.host_table.parts[0]._version == len(pool.host_table.tables)


def test_optimizer_by_fused_params() -> None:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType

    fused_params = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.1, "eps": 1e-8}
    assert check_equal(ShortSetting(optimizer=None, fused_params=fused_params)).num_victims > 100


def test_weights_start_as_stock_weights_do_from_one_seed() -> None:
    assert max_abs_diff(Trainer(ShortSetting()), Trainer.scratchpipe(ShortSetting())) == 0.0


def test_learning_rate_that_changes_every_step() -> None:
    setting = ShortSetting()
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
    setting = ShortSetting()
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


@pytest.mark.host_path
@pytest.mark.parametrize("num_parts_kept", [1, 2])
def test_control_state_that_stays_behind_is_noticed(num_parts_kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without optimizer state on the way, the comparison must fail; with it, it must not."""
    write_rows = stages.write_rows
    monkeypatch.setattr(
        stages,
        "write_rows",
        lambda parts, index, rows: write_rows(parts[:num_parts_kept], index, rows[:num_parts_kept]),
    )
    setting = ShortSetting()
    batches = make_batches(setting)
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting)
    stock.train_plain(batches)
    drain(ours.pipeline(), batches)
    assert (max_abs_diff(stock, ours) == 0.0) == (num_parts_kept == 2)
