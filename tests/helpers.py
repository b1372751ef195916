# SPDX-License-Identifier: BSD-3-Clause
"""Models, batches and comparisons that the tests share."""

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, PoolingType
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.types import CacheParams, ModuleSharder
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe import (
    ScratchPipeEmbeddingBagCollectionSharder,
    ScratchPipeShardingPlanner,
    ScratchPipeTrainPipeline,
    scratchpad_stats,
)

CPU = torch.device("cpu")
NUM_DENSE = 3


@dataclass(frozen=True)
class Setting:
    """One training set-up, for stock and for scratchpad alike."""

    num_rows: tuple[int, ...] = (200, 150, 3)
    dims: tuple[int, ...] = (8, 8, 8)
    pooling: PoolingType = PoolingType.SUM
    optimizer: type[torch.optim.Optimizer] | None = torch.optim.Adagrad
    optimizer_kwargs: tuple[tuple[str, Any], ...] = (("lr", 0.1), ("eps", 1e-8))
    sharding_type: str = "table_wise"
    min_partition: int | None = None
    load_factor: float = 0.3
    fused_tables: tuple[str, ...] = ()
    fused_params: dict[str, Any] | None = None
    batch_size: int = 6
    max_ids_per_bag: int = 3
    num_batches: int = 100
    is_weighted: bool = False
    seed: int = 0
    features_per_table: dict[int, tuple[str, ...]] = field(default_factory=dict)

    @property
    def table_names(self) -> list[str]:
        return [f"t{i}" for i in range(len(self.num_rows))]

    def feature_names(self, table_index: int) -> tuple[str, ...]:
        return self.features_per_table.get(table_index, (f"f{table_index}",))


class TinyModel(nn.Module):
    """Embeddings, one dense layer, a logistic loss; small enough to compare every bit."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.ebc = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=name,
                    num_embeddings=rows,
                    embedding_dim=dim,
                    feature_names=list(setting.feature_names(i)),
                    pooling=setting.pooling,
                )
                for i, (name, rows, dim) in enumerate(
                    zip(setting.table_names, setting.num_rows, setting.dims, strict=True)
                )
            ],
            device=torch.device("meta"),
            is_weighted=setting.is_weighted,
        )
        self.names = [name for i in range(len(setting.num_rows)) for name in setting.feature_names(i)]
        width = sum(dim * len(setting.feature_names(i)) for i, dim in enumerate(setting.dims))
        self.over = nn.Linear(width + NUM_DENSE, 1)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings = self.ebc(batch.sparse_features)
        columns = [embeddings[name] for name in self.names]
        logits = self.over(torch.cat([*columns, batch.dense_features], dim=1)).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        return loss, logits.detach()


def make_batches(setting: Setting, rank: int = 0, num_batches: int | None = None) -> list[Batch]:
    """Batches with a hot head and a long tail, empty bags among them."""
    generator = torch.Generator().manual_seed(1000 * setting.seed + rank)
    return [_make_batch(setting, generator) for _ in range(num_batches or setting.num_batches)]


def _make_batch(setting: Setting, generator: torch.Generator) -> Batch:
    keys, lengths, values = [], [], []
    for i, rows in enumerate(setting.num_rows):
        for name in setting.feature_names(i):
            keys.append(name)
            bag_lengths = torch.randint(0, setting.max_ids_per_bag + 1, (setting.batch_size,), generator=generator)
            skewed = torch.rand(int(bag_lengths.sum()), generator=generator) ** 3
            lengths.append(bag_lengths)
            values.append((skewed * rows).long().clamp_(max=rows - 1))
    all_values = torch.cat(values)
    weights = torch.rand(all_values.numel(), generator=generator) if setting.is_weighted else None
    return Batch(
        dense_features=torch.rand(setting.batch_size, NUM_DENSE, generator=generator),
        sparse_features=KeyedJaggedTensor.from_lengths_sync(keys, all_values, torch.cat(lengths), weights),
        labels=torch.randint(0, 2, (setting.batch_size,), generator=generator).float(),
    )


def scratchpad_constraints(setting: Setting) -> dict[str, ParameterConstraints]:
    return {
        name: ParameterConstraints(
            sharding_types=[setting.sharding_type],
            compute_kernels=["fused" if name in setting.fused_tables else "fused_uvm_caching"],
            cache_params=CacheParams(load_factor=setting.load_factor),
            min_partition=setting.min_partition,
        )
        for name in setting.table_names
    }


class Trainer:
    """A sharded model with its optimizers; stock unless given our sharder."""

    def __init__(
        self,
        setting: Setting,
        sharder: ModuleSharder[Any] | None = None,
        constraints: dict[str, ParameterConstraints] | None = None,
    ) -> None:
        self.setting = setting
        torch.manual_seed(setting.seed)
        model = TinyModel(setting)
        if setting.optimizer is not None:
            apply_optimizer_in_backward(setting.optimizer, model.ebc.parameters(), dict(setting.optimizer_kwargs))
        planner = ScratchPipeShardingPlanner(
            topology=Topology(world_size=dist.get_world_size(), compute_device="cpu"),
            batch_size=setting.batch_size,
            constraints=constraints if constraints is not None else scratchpad_constraints(setting),
            debug=False,
        )
        sharders = [sharder or EmbeddingBagCollectionSharder(setting.fused_params)]
        # Both are planned by our planner and sharder, so that both get the same sharding; then stock is told `fused`.
        plan = planner.collective_plan(model, [ScratchPipeEmbeddingBagCollectionSharder()], dist.group.WORLD)
        if sharder is None:
            for table in plan.plan["ebc"].values():
                if table.compute_kernel == "fused_uvm_caching":
                    table.compute_kernel, table.cache_params = "fused", None
        self.model = DistributedModelParallel(model, device=CPU, plan=plan, sharders=sharders)
        dense = KeyedOptimizerWrapper(
            {name: p for name, p in self.model.named_parameters() if "ebc" not in name},
            lambda params: torch.optim.SGD(params, lr=0.05),
        )
        self.optimizer = CombinedOptimizer([self.model.fused_optimizer, dense])

    @classmethod
    def scratchpipe(cls, setting: Setting, **sharder_kwargs: Any) -> "Trainer":
        return cls(setting, ScratchPipeEmbeddingBagCollectionSharder(setting.fused_params, **sharder_kwargs))

    def pipeline(self, lookahead: int = 2, **kwargs: Any) -> ScratchPipeTrainPipeline[Any, Any]:
        return ScratchPipeTrainPipeline(self.model, self.optimizer, CPU, lookahead=lookahead, **kwargs)

    def step(self, batch: Batch) -> torch.Tensor:
        """One plain step, no pipeline; returns the logits."""
        self.optimizer.zero_grad()
        loss, logits = self.model(batch)
        loss.backward()
        self.optimizer.step()
        return logits

    def train_plain(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        return [self.step(batch) for batch in batches]

    def copy_from(self, other: "Trainer") -> None:
        self.model.load_state_dict(other.model.state_dict())

    @property
    def num_victims(self) -> int:
        return sum(stats.num_victims for stats in scratchpad_stats(self.model))


def drain(pipeline: Any, batches: Sequence[Batch] | Iterator[Batch]) -> list[torch.Tensor]:
    """Run a pipeline until its data ends; returns what progress returned."""
    iterator = iter(batches)
    outputs = []
    while True:
        try:
            outputs.append(pipeline.progress(iterator))
        except StopIteration:
            return outputs


def local_tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, ShardedTensor):
        return [shard.tensor for shard in value.local_shards()]
    return [value] if isinstance(value, torch.Tensor) else []


def full_state(trainer: Trainer) -> dict[str, list[torch.Tensor]]:
    """Every local weight and optimizer state by name; the optimizer is read first, which must flush too."""
    state: dict[str, list[torch.Tensor]] = {}
    for parameter, states in trainer.optimizer.state_dict()["state"].items():
        for name, value in states.items():
            state[f"{parameter}/{name}"] = [tensor.clone() for tensor in local_tensors(value)]
    for name, value in trainer.model.state_dict().items():
        state[name] = [tensor.clone() for tensor in local_tensors(value)]
    return state


def max_abs_diff(expected: Trainer, actual: Trainer) -> float:
    """Largest difference over every weight and optimizer state; the names must agree."""
    left, right = full_state(expected), full_state(actual)
    assert sorted(left) == sorted(right)
    largest = 0.0
    for name, tensors in left.items():
        assert [t.shape for t in tensors] == [t.shape for t in right[name]], name
        for a, b in zip(tensors, right[name], strict=True):
            if a.numel():
                largest = max(largest, float((a - b).abs().max()))
    return largest


def assert_same_bits(expected: Trainer, actual: Trainer) -> None:
    left, right = full_state(expected), full_state(actual)
    assert sorted(left) == sorted(right)
    for name, tensors in left.items():
        for a, b in zip(tensors, right[name], strict=True):
            assert torch.equal(a, b), f"{name}: max diff {(a - b).abs().max()}"


def assert_same_outputs(expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor]) -> None:
    assert len(expected) == len(actual)
    for index, (a, b) in enumerate(zip(expected, actual, strict=True)):
        assert torch.equal(a, b), f"batch {index}: max diff {(a - b).abs().max()}"


def _run_rank(rank: int, world_size: int, store: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


def run_ranks(world_size: int, function: Callable[..., None], *args: Any) -> None:
    """Run `function(rank, *args)` in that many processes joined by gloo; a failing rank fails the test."""
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_run_rank, (world_size, os.path.join(directory, "store"), function, args), nprocs=world_size)
