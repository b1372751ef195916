# SPDX-License-Identifier: BSD-3-Clause
"""Models, batches and comparisons that the tests share."""

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import device_path  # noqa: F401  acts when imported, in processes that tests start too
import processes  # noqa: F401  what the fork server is to import
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, PoolingType
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fp_embeddingbag import FeatureProcessedEmbeddingBagCollectionSharder
from torchrec.distributed.mc_embedding import ManagedCollisionEmbeddingCollectionSharder
from torchrec.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.types import CacheParams, ModuleSharder, QuantizedCommCodecs
from torchrec.modules.embedding_configs import DataType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe import (
    ScratchPipeEmbeddingBagCollectionSharder,
    ScratchPipeEmbeddingCollectionSharder,
    ScratchPipeShardingPlanner,
    ScratchPipeTrainPipeline,
    StageFailedError,
    scratchpad_stats,
)
from torchrec_scratchpipe.sharding.kernel import ScratchpadKernel

CPU = torch.device("cpu")
DEVICE = CPU  # where models train; test_gpu.py changes it
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
    is_vbe: bool = False
    is_pooled: bool = True
    use_index_dedup: bool = False
    data_type: DataType = DataType.FP32
    index_dtype: torch.dtype = torch.int64
    qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None
    local_size: int | None = None
    seed: int = 0
    features_per_table: dict[int, tuple[str, ...]] = field(default_factory=dict)

    @property
    def table_names(self) -> list[str]:
        return [f"t{i}" for i in range(len(self.num_rows))]

    def feature_names(self, table_index: int) -> tuple[str, ...]:
        return self.features_per_table.get(table_index, (f"f{table_index}",))


@dataclass(frozen=True)
class ShortSetting(Setting):
    """As many batches as evict some hundreds of rows."""

    num_batches: int = 40


class TinyModel(nn.Module):
    """Embeddings, one dense layer, a logistic loss; small enough to compare every bit."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        if setting.is_pooled:
            self.ebc = make_bags(setting)
        else:
            self.ec = make_embeddings(setting)
        self.is_pooled = setting.is_pooled
        self.names = [name for i in range(len(setting.num_rows)) for name in setting.feature_names(i)]
        width = sum(dim * len(setting.feature_names(i)) for i, dim in enumerate(setting.dims))
        self.over = nn.Linear(width + NUM_DENSE, 1)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_pooled:
            bags = self.ebc(batch.sparse_features)
            columns = [bags[name] for name in self.names]
        else:
            sequences = self.ec(batch.sparse_features)
            columns = [
                torch.segment_reduce(sequences[name].values(), "sum", lengths=sequences[name].lengths())
                for name in self.names
            ]
        logits = self.over(torch.cat([*columns, batch.dense_features], dim=1)).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        return loss, logits.detach()


def make_bags(setting: Setting) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name,
                num_embeddings=rows,
                embedding_dim=dim,
                feature_names=list(setting.feature_names(i)),
                pooling=setting.pooling,
                data_type=setting.data_type,
            )
            for i, (name, rows, dim) in enumerate(zip(setting.table_names, setting.num_rows, setting.dims, strict=True))
        ],
        device=torch.device("meta"),
        is_weighted=setting.is_weighted,
    )


def make_embeddings(setting: Setting) -> EmbeddingCollection:
    return EmbeddingCollection(
        tables=[
            EmbeddingConfig(
                name=name,
                num_embeddings=rows,
                embedding_dim=dim,
                feature_names=list(setting.feature_names(i)),
                data_type=setting.data_type,
            )
            for i, (name, rows, dim) in enumerate(zip(setting.table_names, setting.num_rows, setting.dims, strict=True))
        ],
        device=torch.device("meta"),
    )


def make_batches(setting: Setting, rank: int = 0, num_batches: int | None = None) -> list[Batch]:
    """Batches with a hot head and a long tail, empty bags among them."""
    generator = torch.Generator().manual_seed(1000 * setting.seed + rank)
    # Bags per feature are the same on all ranks: gloo's allgather, which stock's row-wise VBE uses, wants equal sizes.
    common = torch.Generator().manual_seed(setting.seed)
    return [_make_batch(setting, generator, common) for _ in range(num_batches or setting.num_batches)]


def _make_batch(setting: Setting, generator: torch.Generator, common: torch.Generator) -> Batch:
    keys, lengths, values = [], [], []
    for i, rows in enumerate(setting.num_rows):
        for name in setting.feature_names(i):
            keys.append(name)
            # With VBE, a feature brings fewer bags than the batch has samples, and samples share bags.
            num_bags = setting.batch_size
            if setting.is_vbe:
                num_bags = int(torch.randint(1, setting.batch_size + 1, (1,), generator=common))
            bag_lengths = torch.randint(0, setting.max_ids_per_bag + 1, (num_bags,), generator=generator)
            skewed = torch.rand(int(bag_lengths.sum()), generator=generator) ** 3
            lengths.append(bag_lengths)
            values.append((skewed * rows).long().clamp_(max=rows - 1))
    all_values = torch.cat(values).to(setting.index_dtype)
    weights = torch.rand(all_values.numel(), generator=generator) if setting.is_weighted else None
    vbe: dict[str, Any] = {}
    if setting.is_vbe:
        strides = [bag_lengths.numel() for bag_lengths in lengths]
        shape = (setting.batch_size,)
        inverse = [torch.randint(0, stride, shape, generator=generator) for stride in strides]
        vbe = {
            "stride_per_key_per_rank": [[stride] for stride in strides],
            "inverse_indices": (keys, torch.stack(inverse)),
        }
    features = KeyedJaggedTensor(
        keys, all_values, weights, lengths=torch.cat(lengths).to(setting.index_dtype), **vbe
    ).sync()
    return Batch(
        dense_features=torch.rand(setting.batch_size, NUM_DENSE, generator=generator),
        sparse_features=features,
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


def make_sharders(setting: Setting, is_stock: bool, **kwargs: Any) -> list[ModuleSharder[Any]]:
    """One sharder per kind of collection; `kwargs` are for ours."""
    bags_class = EmbeddingBagCollectionSharder if is_stock else ScratchPipeEmbeddingBagCollectionSharder
    sequences_class = EmbeddingCollectionSharder if is_stock else ScratchPipeEmbeddingCollectionSharder
    given = (setting.fused_params, setting.qcomm_codecs_registry)
    bags = bags_class(*given, **kwargs)
    sequences = sequences_class(*given, setting.use_index_dedup, **kwargs)
    return [
        bags,
        sequences,
        FeatureProcessedEmbeddingBagCollectionSharder(ebc_sharder=bags),
        ManagedCollisionEmbeddingBagCollectionSharder(ebc_sharder=bags),
        ManagedCollisionEmbeddingCollectionSharder(ec_sharder=sequences),
    ]


def is_embedding(parameter_name: str) -> bool:
    return "embedding_bags." in parameter_name or "embeddings." in parameter_name


class Trainer:
    """A sharded model with its optimizers; stock unless given our sharders."""

    def __init__(
        self,
        setting: Setting,
        sharders: list[ModuleSharder[Any]] | None = None,
        constraints: dict[str, ParameterConstraints] | None = None,
        make_model: Callable[[Setting], nn.Module] = TinyModel,
    ) -> None:
        self.setting = setting
        torch.manual_seed(setting.seed)
        model = make_model(setting)
        if setting.optimizer is not None:
            tables = [parameter for name, parameter in model.named_parameters() if is_embedding(name)]
            apply_optimizer_in_backward(setting.optimizer, tables, dict(setting.optimizer_kwargs))
        planner = ScratchPipeShardingPlanner(
            topology=Topology(
                world_size=dist.get_world_size(), local_world_size=setting.local_size, compute_device=DEVICE.type
            ),
            batch_size=setting.batch_size,
            constraints=constraints if constraints is not None else scratchpad_constraints(setting),
            debug=False,
        )
        # Both are planned by our planner and sharders, so that both get the same sharding; then stock is told `fused`.
        plan = planner.collective_plan(model, make_sharders(setting, is_stock=False), dist.group.WORLD)
        if sharders is None:
            for table in (table for module_plan in plan.plan.values() for table in module_plan.values()):
                if table.compute_kernel == "fused_uvm_caching":
                    table.compute_kernel, table.cache_params = "fused", None
        self.model = DistributedModelParallel(
            model, device=DEVICE, plan=plan, sharders=sharders or make_sharders(setting, is_stock=True)
        )
        dense = KeyedOptimizerWrapper(
            {name: p for name, p in self.model.named_parameters() if not is_embedding(name)},
            lambda params: torch.optim.SGD(params, lr=0.05),
        )
        self.optimizer = CombinedOptimizer([self.model.fused_optimizer, dense])

    @classmethod
    def scratchpipe(
        cls,
        setting: Setting,
        constraints: dict[str, ParameterConstraints] | None = None,
        make_model: Callable[[Setting], nn.Module] = TinyModel,
        **sharder_kwargs: Any,
    ) -> "Trainer":
        return cls(setting, make_sharders(setting, is_stock=False, **sharder_kwargs), constraints, make_model)

    def pipeline(self, lookahead: int = 2, **kwargs: Any) -> ScratchPipeTrainPipeline[Any, Any]:
        return ScratchPipeTrainPipeline(self.model, self.optimizer, DEVICE, lookahead=lookahead, **kwargs)

    def step(self, batch: Batch) -> torch.Tensor:
        """One plain step, no pipeline; returns the logits."""
        self.optimizer.zero_grad()
        loss, logits = self.model(batch.to(DEVICE))
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


def assert_refuses_half_loaded(trainer: Trainer, batches: Sequence[Batch]) -> None:
    """Tables that were loaded in part are neither trained nor read."""
    for use in (trainer.model.state_dict, lambda: drain(trainer.pipeline(), batches)):
        with pytest.raises(StageFailedError, match=r"a load failed half-way .* Load another step into this model"):
            use()


def full_state(trainer: Trainer) -> dict[str, list[torch.Tensor]]:
    """Every local weight and optimizer state by name; the optimizer is read first, which must flush too."""
    state: dict[str, list[torch.Tensor]] = {}
    for parameter, states in trainer.optimizer.state_dict()["state"].items():
        for name, value in states.items():
            state[f"{parameter}/{name}"] = [tensor.to(CPU, copy=True) for tensor in local_tensors(value)]
    for name, value in trainer.model.state_dict().items():
        state[name] = [tensor.to(CPU, copy=True) for tensor in local_tensors(value)]
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


def check_equal(
    setting: Setting,
    lookahead: int = 2,
    constraints: dict[str, ParameterConstraints] | None = None,
    batches: Sequence[Batch] | None = None,
    make_model: Callable[[Setting], nn.Module] = TinyModel,
    pipeline_kwargs: dict[str, Any] | None = None,
    **sharder_kwargs: Any,
) -> Trainer:
    """Train stock and ours on this rank's batches and compare everything; returns ours."""
    batches = batches if batches is not None else make_batches(setting, rank=dist.get_rank())
    stock = Trainer(setting, None, constraints, make_model)
    ours = Trainer.scratchpipe(setting, constraints, make_model, **sharder_kwargs)
    ours.copy_from(stock)
    expected = stock.train_plain(batches)
    assert_same_outputs(expected, drain(ours.pipeline(lookahead, **(pipeline_kwargs or {})), batches))
    assert_same_bits(stock, ours)
    assert all(pool.num_misses_at_train == 0 for pool in scratchpad_stats(ours.model))
    return ours


def note_planned(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every lookup of a scratchpad from now on, whether its batch had been planned ahead."""
    lookups: list[bool] = []
    look_up = ScratchpadKernel._look_up

    def noted_look_up(self: Any, *args: Any) -> Any:
        lookups.append(bool(self._expected))
        return look_up(self, *args)

    monkeypatch.setattr(ScratchpadKernel, "_look_up", noted_look_up)
    return lookups


def with_optimizer(setting: Setting, optimizer: type[torch.optim.Optimizer]) -> Setting:
    kwargs: tuple[tuple[str, float], ...] = (("lr", 0.1),)
    if optimizer is not torch.optim.SGD:
        kwargs += (("eps", 1e-8),)
    return replace(setting, optimizer=optimizer, optimizer_kwargs=kwargs)


def run_rank(
    rank: int, world_size: int, local_size: int, store: str, function: Callable[..., None], args: tuple[Any, ...]
) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = str(local_size)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


def run_ranks(world_size: int, function: Callable[..., None], *args: Any, local_size: int | None = None) -> None:
    """Run `function(rank, *args)` in that many processes joined by gloo; a failing rank fails the test.

    With `local_size`, that many of them take themselves for the ranks of one host.
    """
    with tempfile.TemporaryDirectory() as directory:
        store = os.path.join(directory, "store")
        args_of_ranks = (world_size, local_size or world_size, store, function, args)
        mp.start_processes(run_rank, args_of_ranks, nprocs=world_size, start_method="forkserver")
