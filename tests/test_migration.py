# SPDX-License-Identifier: BSD-3-Clause
"""A stock job, and the same job moved over by the steps of README, measuring included: the same bits."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import CPU, drain, is_embedding, local_tensors
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_scratchpipe import (
    ScratchPipeEmbeddingBagCollectionSharder,
    ScratchPipeShardingPlanner,
    ScratchPipeTrainPipeline,
    measure_working_set,
    scratchpad_stats,
)

ROWS = {"user": 4000, "item": 3000, "shop": 40}
DIMS = {"user": 8, "item": 16, "shop": 8}
BATCH_SIZE = 16


class Clicks(Dataset[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]):
    """Dense features, three ids and a label per sample."""

    def __len__(self) -> int:
        return 60 * BATCH_SIZE

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.stack([(torch.rand((), generator=generator) ** 3 * rows).long() for rows in ROWS.values()])
        return torch.rand(4, generator=generator), ids, torch.randint(0, 2, (), generator=generator).float()


def collate(samples: list[Any]) -> Batch:
    dense, ids, labels = (torch.stack(column) for column in zip(*samples, strict=True))
    lengths = torch.ones(len(ROWS) * len(samples), dtype=torch.int32)
    return Batch(dense, KeyedJaggedTensor(list(ROWS), ids.t().reshape(-1), lengths=lengths), labels)


class Model(nn.Module):
    """Reads its columns by position, as many models do."""

    def __init__(self) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(name=f"t_{name}", embedding_dim=DIMS[name], num_embeddings=rows, feature_names=[name])
            for name, rows in ROWS.items()
        ]
        self.ebc = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
        self.over = nn.Sequential(nn.Linear(4 + sum(DIMS.values()), 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = self.ebc(batch.sparse_features).values()
        logits = self.over(torch.cat([batch.dense_features, pooled], dim=1)).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels), logits.detach()


def run_job(*, is_moved: bool, num_workers: int) -> tuple[list[torch.Tensor], DistributedModelParallel, Any]:
    torch.manual_seed(0)
    loader = DataLoader(Clicks(), BATCH_SIZE, shuffle=True, collate_fn=collate, num_workers=num_workers)
    model = Model()
    apply_optimizer_in_backward(torch.optim.Adagrad, model.ebc.parameters(), {"lr": 0.05})
    topology = Topology(world_size=1, compute_device="cpu")
    planner: Any
    sharders: list[Any]
    if is_moved:
        working_sets = measure_working_set(loader, model)
        planner = ScratchPipeShardingPlanner(
            topology=topology, batch_size=BATCH_SIZE, working_sets=working_sets, scratchpad_bytes=100_000
        )
        sharders = [ScratchPipeEmbeddingBagCollectionSharder()]
    else:
        planner = EmbeddingShardingPlanner(topology=topology, batch_size=BATCH_SIZE)
        sharders = [EmbeddingBagCollectionSharder()]
    plan = planner.collective_plan(model, sharders, dist.group.WORLD)
    sharded = DistributedModelParallel(model, device=CPU, plan=plan, sharders=sharders)
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(sharded.named_parameters())), lambda params: torch.optim.Adagrad(params, 0.05)
    )
    optimizer = CombinedOptimizer([sharded.fused_optimizer, dense])
    pipeline: Any = (
        ScratchPipeTrainPipeline(sharded, optimizer, CPU, lookahead=planner.lookahead)
        if is_moved
        else TrainPipelineSparseDist(sharded, optimizer, CPU)
    )
    outputs = [output for _ in range(2) for output in drain(pipeline, iter(loader))]
    return outputs, sharded, optimizer


def tensors(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in model.state_dict().items():
        for tensor in local_tensors(value):
            yield name, tensor
    for parameter, states in optimizer.state_dict()["state"].items():
        for name, value in states.items():
            if is_embedding(parameter) or parameter.startswith("over"):
                yield from ((f"{parameter}/{name}", tensor) for tensor in local_tensors(value))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_job_that_is_moved_over_has_the_same_bits(num_workers: int, caplog: pytest.LogCaptureFixture) -> None:
    expected, stock, stock_optimizer = run_job(is_moved=False, num_workers=num_workers)
    with caplog.at_level(logging.WARNING, logger="torchrec_scratchpipe"):
        actual, moved, moved_optimizer = run_job(is_moved=True, num_workers=num_workers)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("torchrec_scratchpipe")] == []
    assert len(expected) == len(actual) == 120
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    left, right = list(tensors(stock, stock_optimizer)), list(tensors(moved, moved_optimizer))
    assert [name for name, _ in left] == [name for name, _ in right]
    assert len(left) > 8
    for (name, a), (_, b) in zip(left, right, strict=True):
        assert torch.equal(a, b), name
    assert sum(pool.num_victims for pool in scratchpad_stats(moved)) > 0
    assert any("t_shop" not in pool.table_names for pool in scratchpad_stats(moved))  # one table fits whole


def test_control_a_measurement_that_draws_random_numbers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = measure_working_set

    def measure_and_draw(*args: Any, **kwargs: Any) -> Any:
        working_sets = measure(*args, **kwargs)
        torch.rand(1)
        return working_sets

    monkeypatch.setattr("test_migration.measure_working_set", measure_and_draw)
    expected, _, _ = run_job(is_moved=False, num_workers=0)
    actual, _, _ = run_job(is_moved=True, num_workers=0)
    assert not all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_what_the_plan_was_made_for_is_known_where_it_is_used(caplog: pytest.LogCaptureFixture) -> None:
    """A pipeline that looks further ahead is told; one that grows says by how much it is beyond the budget."""
    _, moved, optimizer = run_job(is_moved=True, num_workers=0)
    planned = moved.module.ebc._options.lookahead
    for lookahead in (planned, planned + 1):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="torchrec_scratchpipe"):
            ScratchPipeTrainPipeline(moved, optimizer, CPU, lookahead=lookahead)
        told = [
            record.getMessage() for record in caplog.records if "the sharding plan was made for" in record.getMessage()
        ]
        assert len(told) == int(lookahead > planned)
    ids = torch.cat([torch.arange(rows).repeat(4000 // rows) for rows in ROWS.values()])
    lengths = torch.tensor([rows * (4000 // rows) for rows in ROWS.values()], dtype=torch.int32)
    whole_tables = Batch(torch.rand(1, 4), KeyedJaggedTensor(list(ROWS), ids, lengths=lengths), torch.ones(1))
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="torchrec_scratchpipe"):
        moved(whole_tables)
    assert any("beyond the budget of the sharding plan" in record.getMessage() for record in caplog.records)
    assert sum(pool.num_growths for pool in scratchpad_stats(moved)) > 0
