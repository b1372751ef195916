# SPDX-License-Identifier: BSD-3-Clause
"""Ways to hold tables that are larger than device memory, each set up as well as it can be.

All caches get the same bytes of device memory, those of our slots with their maps; what others need beside it is
charged in their favour: FBGEMM's caching keeps row-wise optimizer state on the device, which is not counted.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist
from torchrec.distributed.types import CacheParams
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from workloads import (
    DEVICE_TABLE_DIM,
    DEVICE_TABLE_ROWS,
    PowerLawBatches,
    Ranker,
    Workload,
    device_feature_names,
    feature_names,
)

from torchrec_scratchpipe import (
    ScratchPipeEmbeddingBagCollectionSharder,
    ScratchPipeShardingPlanner,
    ScratchPipeTrainPipeline,
    scratchpad_stats,
)
from torchrec_scratchpipe.core.memory import (
    ID_BYTES_OF_ORDER,
    ID_BYTES_OF_PLAN,
    ID_BYTES_OF_SCRATCH,
    ROW_BYTES_OF_MAPS,
    SLOT_BYTES_OF_MAPS,
)
from torchrec_scratchpipe.core.slot_map import BUFFER_HEADROOM

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
}
CPU_OPTIMIZERS = ("sgd", "rowwise_adagrad", "adagrad")
STATES_PER_WEIGHT = {"sgd": 0, "rowwise_adagrad": 0, "adagrad": 1, "adam": 2}  # 4 bytes each
FBGEMM_CACHE_BYTES_PER_SLOT = 8 + 8  # lxu_cache_state, lru_state; the prefetching one's lock counter is not charged
FBGEMM_MAP_BYTES_PER_ROW = 4  # cache_index_table_map


@dataclass(frozen=True)
class Rival:
    """One way to hold the tables."""

    title: str
    is_scratchpad: bool = False
    is_cuda_only: bool = False
    kernel: str = "fused_uvm_caching"
    make_pipeline: Callable[..., TrainPipelineSparseDist[Any, Any]] = TrainPipelineSparseDist
    sharder_kwargs: dict[str, Any] = field(default_factory=dict)
    pipeline_kwargs: dict[str, Any] = field(default_factory=dict)
    prefetches: bool = False
    is_static: bool = False


RIVALS = {
    "fused": Rival("all tables in device memory (the ceiling)", kernel="fused"),
    "fused_uvm": Rival("tables in host memory, no cache", is_cuda_only=True, kernel="fused_uvm"),
    "uvm_caching": Rival("FBGEMM's UVM caching", is_cuda_only=True),
    "uvm_caching_prefetch": Rival(
        "FBGEMM's UVM caching, with prefetch",
        is_cuda_only=True,
        make_pipeline=PrefetchTrainPipelineSparseDist,
        prefetches=True,
    ),
    "static": Rival("static cache: the hottest rows of each table in device memory", is_static=True),
    "sequential": Rival("scratchpad without overlap", is_scratchpad=True, sharder_kwargs={"overlap": False}),
    "staged": Rival(
        "scratchpad, rows staged by the host", is_scratchpad=True, is_cuda_only=True,
        sharder_kwargs={"host_access": "staged"},
    ),
    "scratchpipe": Rival("scratchpad", is_scratchpad=True),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What tables and caches are built for."""

    workload: Workload
    optimizer: str
    load_factor: float
    lookahead: int  # the largest that will be run

    @property
    def row_bytes(self) -> int:
        """A row with its optimizer state."""
        state = 4 if self.optimizer == "rowwise_adagrad" else 0
        return self.workload.embedding_dim * 4 * (1 + STATES_PER_WEIGHT[self.optimizer]) + state

    @property
    def cache_bytes(self) -> float:
        """Device memory of our slots, with their maps and the buffers of batches in flight: what every cache gets."""
        slots = self.load_factor * self.workload.num_rows
        of_plans = (self.lookahead + 1) * ID_BYTES_OF_PLAN + ID_BYTES_OF_SCRATCH + ID_BYTES_OF_ORDER
        return (
            slots * (self.row_bytes + SLOT_BYTES_OF_MAPS)
            + ROW_BYTES_OF_MAPS * self.workload.num_rows
            + BUFFER_HEADROOM * of_plans * self.workload.ids_per_batch
        )

    def host_bytes(self, rival: Rival) -> int:
        """Host memory of one rival's tables."""
        if rival.kernel == "fused" and not rival.is_static:
            return 0
        return self.workload.num_rows * self.row_bytes

    @property
    def fbgemm_load_factor(self) -> float:
        """Slots per row that FBGEMM's cache of weights gets for the same bytes."""
        budget = self.cache_bytes - FBGEMM_MAP_BYTES_PER_ROW * self.workload.num_rows
        per_slot = self.workload.embedding_dim * 4 + FBGEMM_CACHE_BYTES_PER_SLOT
        return min(1.0, budget / per_slot / self.workload.num_rows)

    @property
    def num_hot(self) -> int:
        """Rows of each table that a static cache holds for the same bytes."""
        rows = int(self.cache_bytes / self.row_bytes / self.workload.num_tables)
        return min(max(1, rows), self.workload.num_embeddings - 1)


class Contender:
    """One rival, built for one shape, ready to train.

    Args:
        name: In :data:`RIVALS`.
        shape: What it is built for.
        device: Where it trains.
        table_dir: For memory-mapped tables of scratchpads.
        seed: Of the weights.
        overlap: Whether a scratchpad that can run its stages beside training does.
    """

    def __init__(
        self,
        name: str,
        shape: Shape,
        device: torch.device,
        table_dir: str | None = None,
        seed: int = 0,
        overlap: bool = True,
    ) -> None:
        self.name = name
        self.rival = RIVALS[name]
        if self.rival.is_scratchpad and not overlap:
            self.rival = replace(self.rival, sharder_kwargs={**self.rival.sharder_kwargs, "overlap": False})
        self.shape = shape
        self.device = device
        self.num_hot = shape.num_hot if self.rival.is_static else None
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        self.model, self.optimizer = _make_model(self.rival, self.num_hot, shape, device, table_dir, seed)
        self.built_bytes = torch.cuda.memory_allocated() - before if device.type == "cuda" else 0
        self.pipeline: TrainPipelineSparseDist[Any, Any] | None = None
        self.batches: PowerLawBatches | None = None
        self.last_loss = torch.zeros((), dtype=torch.float32)

    def start(self, exponent: float, lookahead: int, seed: int, num_batches: int) -> None:
        """Begin with new batches; what is left of the others is trained first.

        Args:
            exponent: Of the ids.
            lookahead: For pipelines that have one.
            seed: Of the batches; the same for all contenders.
            num_batches: How many there are.
        """
        self.finish()
        kwargs = {"lookahead": lookahead} if self.rival.is_scratchpad else {}
        kwargs.update(self.rival.pipeline_kwargs)
        make = ScratchPipeTrainPipeline if self.rival.is_scratchpad else self.rival.make_pipeline
        self.pipeline = make(self.model, self.optimizer, self.device, **kwargs)
        self.batches = PowerLawBatches(self.shape.workload, exponent, seed, self.device, num_batches, self.num_hot)

    def finish(self) -> None:
        """Train what batches are left, and give the model its own forward back."""
        if self.pipeline is None or self.batches is None:
            return
        try:
            while True:
                self.pipeline.progress(self.batches)
        except StopIteration:
            pass
        self.pipeline.detach()
        self.pipeline = self.batches = None

    def fill(self, exponent: float, seed: int) -> None:
        """Look up other batches without training, until all slots are taken; FBGEMM's caches see about as many.

        The one that prefetches trains them: it lets go of cache lines in backward only.

        Args:
            exponent: Of the ids.
            seed: Of the batches.
        """
        slots = self.shape.load_factor * self.shape.workload.num_rows
        # Every batch brings fewer new rows than the one before; twice what a new one of unique ids would take.
        num_batches = max(4, int(2 * slots / self.shape.workload.ids_per_batch))
        if self.rival.prefetches:
            self.start(exponent, 0, seed, num_batches)
            self.finish()
            return
        batches = PowerLawBatches(self.shape.workload, exponent, seed, self.device, num_batches, self.num_hot)
        with torch.no_grad():
            for batch in batches:
                self.model.module.ebc(batch.sparse_features).wait()
                stats = scratchpad_stats(self.model)
                if stats and all(pool.num_resident_rows == pool.num_slots for pool in stats):
                    break

    def run(self, num_steps: int) -> None:
        """Train until it is done, and so are the stages of coming batches as far as there are slots for them."""
        assert self.pipeline is not None
        for _ in range(num_steps):
            self.last_loss = self.pipeline.progress(self.batches)[0]
        if self.rival.is_scratchpad:
            self.model.module.ebc.wait_until_idle()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _make_model(
    rival: Rival,
    num_hot: int | None,
    shape: Shape,
    device: torch.device,
    table_dir: str | None,
    seed: int,
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    torch.manual_seed(seed)
    workload = shape.workload
    names = feature_names(workload, num_hot)
    sizes = [workload.num_embeddings] if num_hot is None else [num_hot, workload.num_embeddings - num_hot]
    configs = [
        EmbeddingBagConfig(
            name=name.replace("f", "t", 1),
            embedding_dim=workload.embedding_dim,
            num_embeddings=sizes[index % len(sizes)],
            feature_names=[name],
        )
        for index, name in enumerate(names)
    ]
    ebc = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
    constraints = {config.name: _constraint(rival, config.name, shape, device) for config in configs}
    on_device = [
        EmbeddingBagConfig(
            name=f"t_{name}",
            embedding_dim=DEVICE_TABLE_DIM,
            num_embeddings=DEVICE_TABLE_ROWS,
            feature_names=[name],
        )
        for name in device_feature_names(workload)
    ]
    device_ebc = EmbeddingBagCollection(tables=on_device, device=torch.device("meta")) if on_device else None
    for config in on_device:
        constraints[config.name] = ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"])
    model = Ranker(ebc, workload, len(sizes), device_ebc)
    for collection in (ebc, device_ebc) if device_ebc is not None else (ebc,):
        apply_optimizer_in_backward(OPTIMIZERS[shape.optimizer], collection.parameters(), {"lr": 0.01})
    sharder = (
        ScratchPipeEmbeddingBagCollectionSharder(table_dir=table_dir, **rival.sharder_kwargs)
        if rival.is_scratchpad
        else EmbeddingBagCollectionSharder(fused_params={"uvm_host_mapped": True} if device.type == "cuda" else None)
    )
    planner = ScratchPipeShardingPlanner(
        topology=Topology(world_size=1, compute_device=device.type, hbm_cap=1 << 50, ddr_cap=1 << 50),
        batch_size=workload.batch_size,
        constraints=constraints,
        debug=False,
    )
    plan = planner.collective_plan(model, [sharder], dist.group.WORLD)
    model = DistributedModelParallel(model, device=device, plan=plan, sharders=[sharder])
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())), lambda params: torch.optim.SGD(params, lr=0.01)
    )
    return model, CombinedOptimizer([model.fused_optimizer, dense])


def _constraint(rival: Rival, table_name: str, shape: Shape, device: torch.device) -> ParameterConstraints:
    kernel = rival.kernel
    if rival.is_static:
        kernel = "fused_uvm" if table_name.endswith("_cold") and device.type == "cuda" else "fused"
    cache_params = None
    if kernel == "fused_uvm_caching":
        load_factor = shape.load_factor if rival.is_scratchpad else shape.fbgemm_load_factor
        cache_params = CacheParams(load_factor=load_factor, prefetch_pipeline=rival.prefetches or None)
    return ParameterConstraints(sharding_types=["table_wise"], compute_kernels=[kernel], cache_params=cache_params)
