# SPDX-License-Identifier: BSD-3-Clause
"""Swaps stock EmbeddingBagCollection sharding for one whose `fused_uvm_caching` tables use the scratchpad."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding_types import KJTList, ShardingType
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionContext,
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.types import (
    Awaitable,
    CacheParams,
    EnumerableShardingSpec,
    LazyAwaitable,
    ParameterSharding,
    QuantizedCommCodecs,
    ShardingEnv,
)
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_scratchpipe.errors import ConfigError
from torchrec_scratchpipe.lookup import (
    SCRATCHPAD_KERNEL,
    SUPPORTED_SHARDING_TYPES,
    ScratchPipePooledLookup,
    create_pooled_lookup,
)
from torchrec_scratchpipe.options import ScratchpadOptions
from torchrec_scratchpipe.planned_batch import PlannedBatch, check_ids
from torchrec_scratchpipe.pool import Pool
from torchrec_scratchpipe.runner import OverlappedStageRunner, StageRunner
from torchrec_scratchpipe.slot_map import EvictionOrder, LeastRecentlyUsed
from torchrec_scratchpipe.stats import PoolStats
from torchrec_scratchpipe.types import StageSpan

__all__ = [
    "ScratchPipeEmbeddingBagCollectionContext",
    "ScratchPipeEmbeddingBagCollectionSharder",
    "ShardedScratchPipeEmbeddingBagCollection",
    "scratchpad_stats",
    "stage_spans",
]

logger: logging.Logger = logging.getLogger(__name__)


@dataclass
class ScratchPipeEmbeddingBagCollectionContext(EmbeddingBagCollectionContext):
    """TorchRec's context of one batch, and the batch's way through the stages, by lookup, until it is dropped."""

    planned_batches: dict[int, list[PlannedBatch]] = field(default_factory=dict)

    def release(self) -> None:
        """Let go of the batch's slots; it will not be looked up."""
        for batches in self.planned_batches.values():
            for batch in batches:
                batch.hold.release()
        self.planned_batches.clear()


class ShardedScratchPipeEmbeddingBagCollection(ShardedEmbeddingBagCollection):
    """Stock sharded collection whose `fused_uvm_caching` tables live on the host behind a scratchpad.

    Input and output distribution, parameters and state_dict are stock. :meth:`prefetch` sends a batch through
    Plan, Collect, Exchange and Insert ahead of time; a batch that nobody sent is fetched on the spot.
    """

    def __init__(
        self,
        *args: Any,
        options: ScratchpadOptions,
        device: torch.device | None = None,
        **kwargs: Any,
    ) -> None:
        # The base constructor makes the lookups, so what they need must be there before it.
        self._options = options
        make_runner = OverlappedStageRunner if options.overlap else StageRunner
        self._runner: StageRunner = make_runner(device or torch.device("cpu"))
        super().__init__(*args, device=device, **kwargs)
        self._row_wise_features: dict[str, list[EmbeddingBagConfig]] = {}
        for config in self._embedding_bag_configs:
            sharding = self.module_sharding_plan[config.name]
            is_row_wise = sharding.sharding_type == ShardingType.ROW_WISE.value
            if is_row_wise and sharding.compute_kernel == SCRATCHPAD_KERNEL.value:
                for feature in config.feature_names:
                    self._row_wise_features.setdefault(feature, []).append(config)
        # Gigabytes of initial weights would otherwise be written out during the first minutes of training.
        for pool in self.pools:
            pool.host_table.persist()

    @property
    def pools(self) -> list[Pool]:
        """All pools of this rank."""
        return [pool for _, lookup in self._scratchpad_lookups() for pool in lookup.pools]

    def create_context(self) -> ScratchPipeEmbeddingBagCollectionContext:
        """A context that can carry planned batches."""
        return ScratchPipeEmbeddingBagCollectionContext()

    def input_dist(
        self, ctx: EmbeddingBagCollectionContext, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KJTList]]:
        """As stock; on a CPU, ids of row-wise scratchpad tables are checked before they are distributed.

        Stock's distribution wraps ids beyond the last rank's block onto rows of other ids, where nobody can tell any
        more. Ids of other shardings are checked at Plan.

        Args:
            ctx: The batch's context.
            features: The batch's features on this rank.

        Returns:
            As stock.

        Raises:
            IdOutOfRangeError: Names the table, the id and the range.
        """
        if self._row_wise_features and isinstance(features, KeyedJaggedTensor) and features.device().type == "cpu":
            bounds = features.offset_per_key()
            for key, first, last in zip(features.keys(), bounds[:-1], bounds[1:], strict=True):
                if key in self._row_wise_features:
                    for config in self._row_wise_features[key]:
                        check_ids(config.name, key, features.values()[first:last], config.num_embeddings)
        return super().input_dist(ctx, features)

    def prefetch(
        self,
        dist_input: KJTList,
        forward_stream: Any = None,
        ctx: EmbeddingBagCollectionContext | None = None,
    ) -> None:
        """Send a distributed batch through the stages; any number of batches may be ahead.

        Args:
            dist_input: The batch after input distribution.
            forward_stream: Not used: events order the streams.
            ctx: The batch's own context, which will be passed to :meth:`compute_and_output_dist`; without one
                nothing is sent, and the batch is fetched on the spot.
        """
        if not isinstance(ctx, ScratchPipeEmbeddingBagCollectionContext):
            return
        for index, lookup in self._scratchpad_lookups():
            ctx.planned_batches[index] = lookup.submit(dist_input[index])

    def settle(self) -> None:
        """Wait until no stage runs, nor will before the next batch is sent or looked up."""
        self._runner.settle()

    def compute_and_output_dist(self, ctx: EmbeddingBagCollectionContext, input: KJTList) -> LazyAwaitable[KeyedTensor]:
        """As stock, over planned batches where there are any.

        Args:
            ctx: The batch's context.
            input: The batch after input distribution, with ids.

        Returns:
            As stock.
        """
        if isinstance(ctx, ScratchPipeEmbeddingBagCollectionContext):
            for index, lookup in self._scratchpad_lookups():
                if index in ctx.planned_batches:
                    lookup.expect(ctx.planned_batches[index])
        try:
            return super().compute_and_output_dist(ctx, input)
        finally:
            # If one lookup raises, those after it have not taken their batch, and must not take it next time.
            for _, lookup in self._scratchpad_lookups():
                lookup.forget()

    def _create_lookups(self) -> None:
        for sharding in self._embedding_shardings:
            self._lookups.append(create_pooled_lookup(sharding, self._options, self._runner))

    def _scratchpad_lookups(self) -> list[tuple[int, ScratchPipePooledLookup]]:
        return [
            (index, lookup) for index, lookup in enumerate(self._lookups) if isinstance(lookup, ScratchPipePooledLookup)
        ]


class ScratchPipeEmbeddingBagCollectionSharder(EmbeddingBagCollectionSharder):
    """Shards an EmbeddingBagCollection; tables planned as `fused_uvm_caching` get the scratchpad.

    All other tables, and all sharding types and kernels offered to a planner, are stock.

    Args:
        fused_params: As stock; also the place for `cache_load_factor` where a plan gives none.
        qcomm_codecs_registry: As stock.
        sharded_module_order_overwrite: As stock.
        table_dir: Existing directory for memory-mapped tables; None keeps them in RAM.
        overlap: Run the stages beside Train. False runs them on the training thread: slower, same bits.
        make_eviction_order: Makes a pool's eviction order, given its number of slots.
    """

    def __init__(
        self,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        sharded_module_order_overwrite: list[str] | None = None,
        *,
        table_dir: str | None = None,
        overlap: bool = True,
        make_eviction_order: Callable[[int], EvictionOrder] = LeastRecentlyUsed,
    ) -> None:
        super().__init__(fused_params, qcomm_codecs_registry, sharded_module_order_overwrite)
        self._options = ScratchpadOptions(table_dir, overlap, make_eviction_order)

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedScratchPipeEmbeddingBagCollection:
        """Shard a collection as planned.

        Args:
            module: The unsharded collection, on meta or with weights.
            params: The sharding plan of its tables.
            env: The process group.
            device: Where features arrive and scratchpads live.
            module_fqn: As stock.

        Returns:
            The sharded collection.

        Raises:
            ConfigError: A scratchpad table's sharding type, data type, optimizer or load factor cannot be served.
            TableStorageError: A table cannot be placed where it should be.
        """
        served = {name: _as_scratchpad_table(name, sharding) for name, sharding in params.items()}
        names = [name for name, sharding in served.items() if sharding.compute_kernel == SCRATCHPAD_KERNEL.value]
        if not names:
            logger.warning(
                "%s: no table is planned as %s, so all %d tables use stock kernels. Give ScratchPipeShardingPlanner "
                "ParameterConstraints(compute_kernels=[%r]) for the tables that should live on the host.",
                module_fqn or "EmbeddingBagCollection",
                SCRATCHPAD_KERNEL.value,
                len(params),
                SCRATCHPAD_KERNEL.value,
            )
        return ShardedScratchPipeEmbeddingBagCollection(
            module=module,
            table_name_to_parameter_sharding=served,
            env=env,
            fused_params=self.fused_params,
            device=device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
            sharded_module_order_overwrite=self._sharded_module_order_overwrite,
            options=self._options,
        )

    @property
    def sharded_module_type(self) -> type[ShardedScratchPipeEmbeddingBagCollection]:
        """What :meth:`shard` makes."""
        return ShardedScratchPipeEmbeddingBagCollection


def scratchpad_stats(module: nn.Module) -> list[PoolStats]:
    """Count what the scratchpads of a model did on this rank; waits for the device.

    Args:
        module: A sharded model, or any part of one.

    Returns:
        One per pool; empty where no table uses a scratchpad.
    """
    stats: list[PoolStats] = []
    for collection in _scratchpad_collections(module):
        with collection._runner.between_batches():
            stats.extend(pool.stats() for pool in collection.pools)
    return stats


def stage_spans(module: nn.Module) -> list[list[StageSpan]]:
    """When the latest stages ran on this rank, for plots; a bounded number is kept.

    Args:
        module: A sharded model, or any part of one.

    Returns:
        Per pool, in the order of :func:`scratchpad_stats`.
    """
    return [list(pool.counters.spans) for collection in _scratchpad_collections(module) for pool in collection.pools]


def _scratchpad_collections(module: nn.Module) -> list[ShardedScratchPipeEmbeddingBagCollection]:
    return [part for part in module.modules() if isinstance(part, ShardedScratchPipeEmbeddingBagCollection)]


def _as_scratchpad_table(name: str, sharding: ParameterSharding) -> ParameterSharding:
    """A table's ParameterSharding as the stock code needs to see it; other tables' come back as they are."""
    if sharding.compute_kernel != SCRATCHPAD_KERNEL.value:
        return sharding
    supported = [kind.value for kind in SUPPORTED_SHARDING_TYPES]
    if sharding.sharding_type not in supported:
        raise ConfigError(
            f"table {name}: sharding type {sharding.sharding_type} is not supported with a scratchpad. Constrain the "
            f"table to one of {supported}, or to compute kernel fused."
        )
    # prefetch_pipeline makes group_tables keep scratchpad tables out of groups of plain fused tables.
    cache_params = dataclasses.replace(sharding.cache_params or CacheParams(), prefetch_pipeline=True)
    return dataclasses.replace(sharding, cache_params=cache_params, sharding_spec=_on_host(sharding.sharding_spec))


def _on_host(spec: Any) -> Any:
    """Shard placements where the table is, `rank:r/cpu`: ShardedTensor insists that they agree."""
    if not isinstance(spec, EnumerableShardingSpec):
        return spec
    shards = [dataclasses.replace(shard, placement=f"rank:{shard.placement.rank()}/cpu") for shard in spec.shards]
    return EnumerableShardingSpec(shards)
