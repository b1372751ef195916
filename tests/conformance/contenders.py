# SPDX-License-Identifier: BSD-3-Clause
"""Swaps sharder, planner and pipeline in the suite's modules, for the scratchpad's or for none."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from torch import nn
from torchrec.distributed import model_parallel
from torchrec.distributed.fbgemm_qcomm_codec import get_qcomm_codecs_registry
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.test_utils import test_model_parallel_base, test_sharding
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import CacheParams, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_scratchpipe import (
    ScratchPipeEmbeddingBagCollectionSharder,
    ScratchPipeShardingPlanner,
    ScratchPipeTrainPipeline,
    scratchpad_stats,
)
from torchrec_scratchpipe.core import stages
from torchrec_scratchpipe.core.pool import Pool
from torchrec_scratchpipe.core.rows import StagedRows, write_rows
from torchrec_scratchpipe.core.slot_map import RowMoves
from torchrec_scratchpipe.core.stages import insert
from torchrec_scratchpipe.sharding import options

from .case import Case, Contender
from .suite import ROW_FACTOR, MoreBatches, kernel_of_test, qcomms_config

__all__ = ["Swap"]

SCRATCHPAD_KERNEL = "fused_uvm_caching"
IDS_PER_RANK = 4 * 10  # the suite's batch size, and its ids per bag
IDS_PER_RANK_VBE = 4 * 2
IDS_OF_ONE_RANK_TESTS = 20 * 10
SPARE_SLOTS = 1.3  # of the ids of one batch; two batches do not fit
SPARE_SLOTS_VBE = 2.2  # the suite draws batch sizes, which scatter more, and most with few ranks


def _insert_without_writeback(pool: Pool, moves: RowMoves, staged: StagedRows) -> None:
    write_rows(pool.scratchpad.parts, moves.miss_slots, staged.fill)


def _insert_without_states(pool: Pool, moves: RowMoves, staged: StagedRows) -> None:
    for part in staged.fill[1:]:
        part.zero_()
    insert(pool, moves, staged)


BROKEN_INSERTS = {Contender.NO_WRITEBACK: _insert_without_writeback, Contender.NO_STATE: _insert_without_states}


class _SuiteSharder(ScratchPipeEmbeddingBagCollectionSharder):
    """Offers one sharding type and kernel, as the suite's own sharders do, and keeps what it sharded."""

    def __init__(self, sharding_type: str, fused_params: dict[str, Any], registry: Any) -> None:
        super().__init__(fused_params, registry)
        self._sharding_type = sharding_type
        self._kernel_type = SCRATCHPAD_KERNEL
        self.sharded: list[nn.Module] = []

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [self._sharding_type]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return [SCRATCHPAD_KERNEL, "fused"]

    def shard(self, *args: Any, **kwargs: Any) -> Any:
        module = super().shard(*args, **kwargs)
        self.sharded.append(module)
        return module


class _SuitePlanner:
    """Plans every table of a module as a scratchpad table, unless its constraints name another kernel."""

    def __init__(self, case: Case, topology: Topology, constraints: dict[str, ParameterConstraints] | None) -> None:
        self._case = case
        self._topology = topology
        self._constraints = constraints or {}

    def plan(self, module: nn.Module, sharders: list[Any]) -> ShardingPlan:
        return self._planner(module, sharders).plan(module, sharders)

    def collective_plan(self, module: nn.Module, sharders: list[Any], pg: Any = None) -> ShardingPlan:
        return self._planner(module, sharders).collective_plan(module, sharders, pg)

    def _planner(self, module: nn.Module, sharders: list[Any]) -> EmbeddingShardingPlanner:
        if not any(isinstance(sharder, ScratchPipeEmbeddingBagCollectionSharder) for sharder in sharders):
            return EmbeddingShardingPlanner(topology=self._topology, constraints=self._constraints)
        kinds = [sharder._sharding_type for sharder in sharders if isinstance(sharder, _SuiteSharder)]
        constraints = {
            table.name: self._constraint(table, kinds)
            for part in module.modules()
            if isinstance(part, EmbeddingBagCollection)
            for table in part.embedding_bag_configs()
        }
        return ScratchPipeShardingPlanner(topology=self._topology, constraints=constraints)

    def _constraint(self, table: Any, kinds: list[str]) -> ParameterConstraints:
        # The suite passes a defaultdict in one test, a dict in others.
        given = self._constraints[table.name] if table.name in self._constraints else ParameterConstraints()
        if given.compute_kernels:
            return ParameterConstraints(
                sharding_types=kinds or None, compute_kernels=given.compute_kernels, min_partition=given.min_partition
            )
        return ParameterConstraints(
            sharding_types=kinds or None,
            compute_kernels=[SCRATCHPAD_KERNEL],
            min_partition=given.min_partition,
            cache_params=CacheParams(load_factor=load_factor(self._case, table.num_embeddings)),
        )


def load_factor(case: Case, num_rows: int) -> float:
    """So many slots that one batch fits and two do not."""
    if case.test not in ("sharding", "dynamic_sharding"):
        num_slots = SPARE_SLOTS * IDS_OF_ONE_RANK_TESTS
    elif case.variable_batch_per_feature:
        num_slots = SPARE_SLOTS_VBE * IDS_PER_RANK_VBE * (case.world_size + 1)
    else:
        num_slots = SPARE_SLOTS * IDS_PER_RANK * case.world_size
    return min(num_slots / num_rows, 0.9)


class Swap:
    """What the suite finds under its names while one case runs in one process."""

    def __init__(self, case: Case, contender: Contender, rank: int) -> None:
        self._case = case
        self._contender = contender
        self._rank = rank
        self._sharders: list[_SuiteSharder] = []
        self._stock_twin: tuple[Any, ...] = ()
        self._make_stock_sharder = test_sharding.create_test_sharder

    def patches(self) -> list[Any]:
        """Everything that is swapped; enter them all."""
        more = MoreBatches(self._case, self._rank, self._pipeline_type())
        swapped: list[Any] = [
            patch.object(test_sharding, "gen_model_and_input", more.gen_model_and_input),
            patch.object(test_sharding, "alter_global_ebc_dtype", more.alter_global_ebc_dtype),
            patch.object(test_model_parallel_base, "create_test_sharder", self.create_test_sharder),
        ]
        if self._case.test == "sharding":
            step = more.gen_full_pred_after_one_step
            swapped.append(patch.object(test_sharding, "gen_full_pred_after_one_step", step))
        if self._contender is Contender.STOCK:
            return swapped
        swapped += [
            patch.object(module, "EmbeddingShardingPlanner", self._make_planner)
            for module in (test_sharding, test_model_parallel_base, model_parallel)
        ]
        swapped += [
            patch.object(module, "get_default_sharders", self._default_sharders)
            for module in (test_model_parallel_base, model_parallel)
        ]
        swapped.append(patch.object(options, "MIN_SLOTS_PER_TABLE", 1))
        if self._contender in BROKEN_INSERTS:
            swapped.append(patch.object(stages, "insert", BROKEN_INSERTS[self._contender]))
        return swapped

    def make_sharder(self, sharding_type: str) -> Any:
        return self.create_test_sharder("embedding_bag_collection", sharding_type, kernel_of_test(self._case))

    def create_test_sharder(
        self,
        sharder_type: str,
        sharding_type: str,
        kernel_type: str,
        fused_params: dict[str, Any] | None = None,
        **_: Any,
    ) -> Any:
        """As the suite's function of this name."""
        qcomms = qcomms_config(self._case)
        self._stock_twin = (sharder_type, sharding_type, kernel_type, dict(fused_params or {}))
        if self._contender is Contender.STOCK:
            kernel = "fused" if kernel_type == SCRATCHPAD_KERNEL else kernel_type
            return self._make_stock_sharder(sharder_type, sharding_type, kernel, fused_params, qcomms)
        if kernel_type != kernel_of_test(self._case) or kernel_type == "dense":
            return self._make_stock_sharder(sharder_type, sharding_type, kernel_type, fused_params, qcomms)
        registry = get_qcomm_codecs_registry(qcomms) if qcomms is not None else {}
        # The suite makes some plans by itself, without cache_params; its shortest table has 10 rows.
        defaults = {"learning_rate": 0.1, "cache_load_factor": load_factor(self._case, 10 * ROW_FACTOR)}
        sharder = _SuiteSharder(sharding_type, {**defaults, **(fused_params or {})}, registry)
        self._sharders.append(sharder)
        return sharder

    def make_stock_twin(self) -> Any:
        """The stock sharder of the arguments of the last :meth:`create_test_sharder`."""
        return self._make_stock_sharder(*self._stock_twin)

    def count(self) -> tuple[int, int]:
        """Victims and misses at Train of all scratchpads of this process."""
        stats = [pool for sharder in self._sharders for module in sharder.sharded for pool in scratchpad_stats(module)]
        return sum(pool.num_victims for pool in stats), sum(pool.num_misses_at_train for pool in stats)

    def _pipeline_type(self) -> Callable[..., Any]:
        return TrainPipelineSparseDist if self._contender is Contender.STOCK else ScratchPipeTrainPipeline

    def _make_planner(self, topology: Topology, constraints: Any = None) -> _SuitePlanner:
        return _SuitePlanner(self._case, topology, constraints)

    def _default_sharders(self) -> list[Any]:
        ours = _SuiteSharder("table_wise", {}, {})
        self._sharders.append(ours)
        others = [sharder for sharder in get_default_sharders() if sharder.module_type is not EmbeddingBagCollection]
        return [ours, *others]
