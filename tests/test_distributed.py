# SPDX-License-Identifier: BSD-3-Clause
"""Bit equality with stock TorchRec on two and on four ranks, one host and two."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import (
    Setting,
    Trainer,
    assert_same_bits,
    assert_same_outputs,
    check_equal,
    drain,
    make_batches,
    run_ranks,
    scratchpad_constraints,
    with_optimizer,
)
from torchrec import PoolingType
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.planner import ParameterConstraints
from torchrec.modules.embedding_configs import DataType
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_scratchpipe import IdOutOfRangeError, scratchpad_stats

pytestmark = pytest.mark.dist

# A small scratchpad per rank, or tables that are spread over ranks would never evict.
SETTING = Setting(load_factor=0.25, num_batches=20)
OPTIMIZERS = [torch.optim.SGD, torch.optim.Adagrad, RowWiseAdagrad]
POOLINGS = [PoolingType.MEAN, PoolingType.SUM, PoolingType.MEAN]
SHARDINGS: list[dict[str, Any]] = [
    {"sharding_type": "table_wise"},
    {"sharding_type": "row_wise"},
    {"sharding_type": "column_wise", "min_partition": 4},
    {"sharding_type": "table_column_wise", "min_partition": 4},
    {"sharding_type": "table_row_wise"},
    {"sharding_type": "grid_shard", "min_partition": 4},
]


def check_equal_and_evicting(setting: Setting, **kwargs: Any) -> None:
    """Every rank compares its own share; together they must have evicted."""
    ours = check_equal(setting, **kwargs)
    num_victims = torch.tensor(ours.num_victims)
    dist.all_reduce(num_victims)
    assert num_victims > 50, f"{setting}: {num_victims} victims"


def _check_shardings(rank: int, base: Setting) -> None:
    for sharding in SHARDINGS:
        for optimizer, pooling in zip(OPTIMIZERS, POOLINGS, strict=True):
            setting = with_optimizer(replace(base, pooling=pooling, **sharding), optimizer)
            if sharding["sharding_type"] == "grid_shard":
                setting = replace(setting, pooling=PoolingType.SUM)  # MEAN is refused, see test_sharder.py
            check_equal_and_evicting(setting)


def test_shardings_on_two_ranks() -> None:
    run_ranks(2, _check_shardings, SETTING)


def test_shardings_on_four_ranks_of_two_hosts() -> None:
    # Twice the rows per table, and fewer slots: each rank holds a quarter of a table, and every rank sees four batches.
    wide = replace(SETTING, num_rows=(800, 600, 8), dims=(16, 16, 8), load_factor=0.15, num_batches=10, local_size=2)
    run_ranks(4, _check_shardings, wide, local_size=2)


def _check_features(rank: int) -> None:
    vbe = with_optimizer(replace(SETTING, is_vbe=True, batch_size=10), RowWiseAdagrad)
    for setting in [
        vbe,
        replace(vbe, sharding_type="row_wise"),
        replace(SETTING, data_type=DataType.FP16, sharding_type="row_wise"),
        replace(SETTING, is_weighted=True, sharding_type="row_wise", pooling=PoolingType.MEAN),
        replace(SETTING, fused_tables=("t1",), dims=(8, 4, 8)),
        replace(SETTING, is_pooled=False),
        replace(SETTING, is_pooled=False, sharding_type="row_wise"),
        replace(SETTING, is_pooled=False, sharding_type="column_wise", min_partition=4),
    ]:
        check_equal_and_evicting(setting)


def _check_empty_shard(rank: int) -> None:
    """FBGEMM reads past the end of a table without rows, so stock cannot be the oracle: now and then it fails."""
    setting = Setting(num_rows=(200, 1), dims=(8, 16), sharding_type="row_wise", num_batches=20)
    overlapped, sequential = (Trainer.scratchpipe(setting, overlap=overlap) for overlap in (True, False))
    overlapped.copy_from(sequential)
    batches = make_batches(setting, rank=rank)
    assert_same_outputs(sequential.train_plain(batches), drain(overlapped.pipeline(), batches))
    assert_same_bits(sequential, overlapped)
    nums_rows = sorted(pool.num_rows for pool in scratchpad_stats(overlapped.model))
    assert nums_rows == [1 - rank, 100]


def test_table_with_fewer_rows_than_ranks_leaves_a_rank_with_an_empty_pool() -> None:
    run_ranks(2, _check_empty_shard)


def test_features_on_two_ranks() -> None:
    run_ranks(2, _check_features)


def _check_quantised_communication(rank: int) -> None:
    config = QCommsConfig(forward_precision=CommType.FP16, backward_precision=CommType.FP16)
    registry = get_qcomm_codecs_registry(config, device=torch.device("cpu"))
    for sharding_type in ("table_wise", "row_wise"):
        plain = replace(SETTING, sharding_type=sharding_type)
        check_equal_and_evicting(replace(plain, qcomm_codecs_registry=registry))
        batch = make_batches(plain, rank=rank)[0]
        quantised = Trainer(replace(plain, qcomm_codecs_registry=registry))
        assert not torch.equal(Trainer(plain).step(batch), quantised.step(batch))  # else nothing was quantised


def test_quantised_communication() -> None:
    run_ranks(2, _check_quantised_communication)


def _check_mixed_tables(rank: int) -> None:
    setting = Setting(
        num_rows=(300, 260, 240, 220, 60, 40), dims=(8, 8, 16, 8, 8, 4), load_factor=0.2, num_batches=16, local_size=2
    )
    constraints = scratchpad_constraints(replace(setting, fused_tables=("t4",)))
    for table, sharding_type in [("t1", "row_wise"), ("t2", "column_wise"), ("t3", "table_row_wise")]:
        constraints[table].sharding_types = [sharding_type]
    constraints["t5"] = ParameterConstraints(sharding_types=["data_parallel"], compute_kernels=["dense"])
    check_equal_and_evicting(setting, constraints=constraints)


def test_tables_of_one_collection_mix_shardings_and_kernels() -> None:
    run_ranks(4, _check_mixed_tables, local_size=2)


def _check_batches_of_different_size(rank: int) -> None:
    sizes = [(3, 5), (1, 6), (6, 1)]
    batches = [
        make_batches(replace(SETTING, batch_size=sizes[i % 3][rank], seed=i), rank, num_batches=1)[0] for i in range(24)
    ]
    check_equal_and_evicting(SETTING, batches=batches)


def test_variable_batch_per_rank() -> None:
    run_ranks(2, _check_batches_of_different_size)


def _check_row_wise_ids(rank: int, sharding_type: str) -> None:
    setting = Setting(sharding_type=sharding_type, num_batches=8)
    batches = make_batches(setting, rank=rank)
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting)
    ours.copy_from(stock)
    batches[5].sparse_features.values()[0] = 1000  # beyond both ranks' blocks: stock would wrap it onto another row
    pipeline, iterator = ours.pipeline(), iter(batches)
    actual = [pipeline.progress(iterator) for _ in range(5)]
    with pytest.raises(IdOutOfRangeError, match=r"table t0: feature f0 has id 1000, there are rows \[0, 200\)"):
        pipeline.progress(iterator)
    pipeline.reset()
    actual += drain(pipeline, batches[6:])
    assert_same_outputs(stock.train_plain(batches[:5] + batches[6:]), actual)
    assert_same_bits(stock, ours)


@pytest.mark.parametrize("sharding_type", ["row_wise", "table_row_wise"])
def test_row_wise_ids_are_checked_before_they_are_distributed(sharding_type: str) -> None:
    run_ranks(2, _check_row_wise_ids, sharding_type)


def _check_evaluation_holds_nothing(rank: int) -> None:
    setting = replace(SETTING, load_factor=0.9)
    ours = Trainer.scratchpipe(setting)
    ours.model.eval()
    pipeline = ours.pipeline(lookahead=2)
    iterator = iter(make_batches(setting, rank=rank, num_batches=12))
    gc.disable()  # on several ranks a graph is part of a cycle, and lives until this runs
    for _ in range(9):
        pipeline.progress(iterator)
        ours.model.module.ebc.wait_until_idle()
        assert all(pool.slot_map.num_batches_in_flight <= 2 for pool in ours.model.module.ebc.pools)


def test_evaluation_with_gradients_enabled_holds_nothing() -> None:
    run_ranks(2, _check_evaluation_holds_nothing)
