# SPDX-License-Identifier: BSD-3-Clause
"""Swaps stock sharding of collections for one whose `fused_uvm_caching` tables use the scratchpad."""

import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torchrec.distributed.embedding import (
    EmbeddingCollectionContext,
    EmbeddingCollectionSharder,
    ShardedEmbeddingCollection,
)
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, KJTList, ShardingType
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
    ShardingEnv2D,
)
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
    EmbeddingCollection,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_scratchpipe.collection import PlannedBatches, ScratchpadCollection
from torchrec_scratchpipe.errors import BatchesInFlightError, ConfigError
from torchrec_scratchpipe.eviction import EvictionOrder, LeastFrequentlyUsed
from torchrec_scratchpipe.lookup import SCRATCHPAD_KERNEL, create_pooled_lookup, create_sequence_lookup
from torchrec_scratchpipe.options import ScratchpadOptions

__all__ = [
    "ScratchPipeEmbeddingBagCollectionSharder",
    "ScratchPipeEmbeddingCollectionSharder",
    "ShardedScratchPipeEmbeddingBagCollection",
    "ShardedScratchPipeEmbeddingCollection",
]

logger: logging.Logger = logging.getLogger(__name__)

EMBEDDING_SHARDING_TYPES = (ShardingType.TABLE_WISE, ShardingType.ROW_WISE, ShardingType.COLUMN_WISE)
EMBEDDING_BAG_SHARDING_TYPES = (
    *EMBEDDING_SHARDING_TYPES,
    ShardingType.TABLE_COLUMN_WISE,
    ShardingType.TABLE_ROW_WISE,
    ShardingType.GRID_SHARD,
)


class ScratchPipeEmbeddingBagCollectionContext(PlannedBatches, EmbeddingBagCollectionContext):
    """TorchRec's context of one batch, and the batch's way through the stages."""


class ScratchPipeEmbeddingCollectionContext(PlannedBatches, EmbeddingCollectionContext):
    """TorchRec's context of one batch, and the batch's way through the stages."""


class ShardedScratchPipeEmbeddingBagCollection(ScratchpadCollection, ShardedEmbeddingBagCollection):
    """Stock sharded collection whose `fused_uvm_caching` tables live on the host behind a scratchpad.

    Input and output distribution, parameters and state_dict are stock. :meth:`prefetch` sends a batch through
    Plan, Collect, Exchange and Insert ahead of time; a batch that nobody sent is fetched on the spot. The sharder makes it.

    Args:
        module: As stock.
        table_name_to_parameter_sharding: As stock.
        env: As stock.
        fused_params: As stock.
        device: Where features arrive and scratchpads live.
        qcomm_codecs_registry: As stock.
        module_fqn: As stock.
        sharded_module_order_overwrite: As stock.
        options: What all scratchpad tables share; None is all defaults.

    Raises:
        ConfigError: A scratchpad table's sharding type, data type, optimizer or load factor cannot be served.
        TableStorageError: A table cannot be placed where it should be.
    """

    def __init__(
        self,
        module: EmbeddingBagCollectionInterface,
        table_name_to_parameter_sharding: dict[str, ParameterSharding],
        env: ShardingEnv,
        fused_params: dict[str, Any] | None = None,
        device: torch.device | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        module_fqn: str | None = None,
        sharded_module_order_overwrite: list[str] | None = None,
        *,
        options: ScratchpadOptions | None = None,
    ) -> None:
        name = module_fqn or "EmbeddingBagCollection"
        plan = table_name_to_parameter_sharding
        served = _serve(name, module.embedding_bag_configs(), plan, env, device, EMBEDDING_BAG_SHARDING_TYPES)
        self._set_up_stages(options or ScratchpadOptions(), device)
        super().__init__(
            module,
            served,
            env,
            fused_params,
            device,
            qcomm_codecs_registry,
            module_fqn,
            sharded_module_order_overwrite,
        )
        self._set_up_checks(self._embedding_bag_configs)

    def create_context(self) -> ScratchPipeEmbeddingBagCollectionContext:
        """A context that can carry planned batches."""
        return ScratchPipeEmbeddingBagCollectionContext()

    def input_dist(
        self, ctx: EmbeddingBagCollectionContext, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KJTList]]:
        """As stock; on a CPU, ids of row-wise scratchpad tables are checked before they are distributed.

        Args:
            ctx: The batch's context.
            features: The batch's features on this rank.

        Returns:
            As stock.

        Raises:
            IdOutOfRangeError: Names the table, the id and the range.
        """
        with self._peers.told():
            self._check_row_wise_ids(features)
            return self._peers.watch(super().input_dist(ctx, features))

    def compute_and_output_dist(self, ctx: EmbeddingBagCollectionContext, input: KJTList) -> LazyAwaitable[KeyedTensor]:
        """As stock, over planned batches where there are any.

        Args:
            ctx: The batch's context.
            input: The batch after input distribution, with ids.

        Returns:
            As stock.
        """
        with self._looking_up(ctx):
            return self._peers.watch(super().compute_and_output_dist(ctx, input))

    def update_shards(
        self,
        changed_sharding_params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None,
    ) -> None:
        """As stock: move tables to other ranks, with their optimizer state; call it between batches.

        Args:
            changed_sharding_params: As stock.
            env: As stock.
            device: As stock.

        Raises:
            BatchesInFlightError: Batches in flight have been planned for the scratchpads as they are.
            ConfigError: A scratchpad table's new sharding cannot be served.
        """
        self.settle()  # the worker may not have planned all of them yet
        num_batches = max((pool.slot_map.num_batches_in_flight for pool in self.pools), default=0)
        if num_batches > 0:
            raise BatchesInFlightError(
                f"update_shards(): {num_batches} batches in flight were planned for the present sharding. Let the pipeline "
                "train them, or call its reset(), first."
            )
        served = dict(changed_sharding_params)
        for config in self._embedding_bag_configs:
            sharding = served.get(config.name)
            if sharding is not None and sharding.compute_kernel == SCRATCHPAD_KERNEL.value:
                _check_table(config, sharding, EMBEDDING_BAG_SHARDING_TYPES)
                served[config.name] = _as_scratchpad_table(sharding)
        super().update_shards(served, env, device)
        self._set_up_checks(self._embedding_bag_configs)

    def _create_lookups(self) -> None:
        for sharding in self._embedding_shardings:
            self._lookups.append(create_pooled_lookup(sharding, self._options, self._runner))


class ShardedScratchPipeEmbeddingCollection(ScratchpadCollection, ShardedEmbeddingCollection):
    """Stock sharded collection of unpooled embeddings whose `fused_uvm_caching` tables live behind a scratchpad.

    As :class:`ShardedScratchPipeEmbeddingBagCollection`, in the same pipeline.

    Args:
        module: As stock.
        table_name_to_parameter_sharding: As stock.
        env: As stock.
        fused_params: As stock.
        device: Where features arrive and scratchpads live.
        qcomm_codecs_registry: As stock.
        use_index_dedup: As stock.
        module_fqn: As stock.
        options: What all scratchpad tables share; None is all defaults.

    Raises:
        ConfigError: A scratchpad table's sharding type, data type, optimizer or load factor cannot be served.
        TableStorageError: A table cannot be placed where it should be.
    """

    def __init__(
        self,
        module: EmbeddingCollection,
        table_name_to_parameter_sharding: dict[str, ParameterSharding],
        env: ShardingEnv,
        fused_params: dict[str, Any] | None = None,
        device: torch.device | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        use_index_dedup: bool = False,
        module_fqn: str | None = None,
        *,
        options: ScratchpadOptions | None = None,
    ) -> None:
        name = module_fqn or "EmbeddingCollection"
        plan = table_name_to_parameter_sharding
        served = _serve(name, module.embedding_configs(), plan, env, device, EMBEDDING_SHARDING_TYPES)
        self._set_up_stages(options or ScratchpadOptions(), device)
        super().__init__(
            module,
            served,
            env,
            fused_params,
            device,
            qcomm_codecs_registry,
            use_index_dedup,
            module_fqn,
        )
        self._set_up_checks(self._embedding_configs)

    def create_context(self) -> ScratchPipeEmbeddingCollectionContext:
        """A context that can carry planned batches."""
        return ScratchPipeEmbeddingCollectionContext(sharding_contexts=[])

    def input_dist(self, ctx: EmbeddingCollectionContext, features: Any) -> Awaitable[Awaitable[KJTList]]:
        """As stock; on a CPU, ids of row-wise scratchpad tables are checked before they are distributed.

        Args:
            ctx: The batch's context.
            features: The batch's features on this rank, KeyedJaggedTensor or TensorDict.

        Returns:
            As stock.

        Raises:
            IdOutOfRangeError: Names the table, the id and the range.
        """
        with self._peers.told():
            self._check_row_wise_ids(features)
            return self._peers.watch(super().input_dist(ctx, features))

    def compute_and_output_dist(
        self, ctx: EmbeddingCollectionContext, input: KJTList
    ) -> LazyAwaitable[dict[str, JaggedTensor]]:
        """As stock, over planned batches where there are any.

        Args:
            ctx: The batch's context.
            input: The batch after input distribution, with ids.

        Returns:
            As stock.
        """
        with self._looking_up(ctx):
            return self._peers.watch(super().compute_and_output_dist(ctx, input))

    def _create_lookups(self) -> None:
        for sharding in self._sharding_type_to_sharding.values():
            self._lookups.append(create_sequence_lookup(sharding, self._options, self._runner))


class ScratchPipeEmbeddingBagCollectionSharder(EmbeddingBagCollectionSharder):
    """Shards an EmbeddingBagCollection; tables planned as `fused_uvm_caching` get the scratchpad.

    All other tables, and all sharding types and kernels offered to a planner, are stock.

    Args:
        fused_params: As stock; also the place for `cache_load_factor` where a plan gives none.
        qcomm_codecs_registry: As stock.
        sharded_module_order_overwrite: As stock.
        table_dir: Existing directory for memory-mapped tables; None keeps them in RAM.
        overlap: Run the stages beside Train. False runs them on the training thread: slower, same bits.
        make_eviction_order: Makes a pool's eviction order, given its number of slots. CUDA devices know the default only;
            with another, Plan waits for the device, and rows are staged.
        host_access: How a CUDA device reaches tables in RAM. ``"direct"``: its kernels read and write page-locked tables in
            place. ``"staged"``: rows are gathered on the host and copied, as they always are for memory-mapped tables.
    """

    def __init__(
        self,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        sharded_module_order_overwrite: list[str] | None = None,
        *,
        table_dir: str | None = None,
        overlap: bool = True,
        make_eviction_order: Callable[[int], EvictionOrder] = LeastFrequentlyUsed,
        host_access: Literal["direct", "staged"] = "direct",
    ) -> None:
        super().__init__(fused_params, qcomm_codecs_registry, sharded_module_order_overwrite)
        self._options = ScratchpadOptions(table_dir, overlap, make_eviction_order, host_access)

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
        return ShardedScratchPipeEmbeddingBagCollection(
            module=module,
            table_name_to_parameter_sharding=params,
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


class ScratchPipeEmbeddingCollectionSharder(EmbeddingCollectionSharder):
    """Shards an EmbeddingCollection; tables planned as `fused_uvm_caching` get the scratchpad.

    All other tables, and all sharding types and kernels offered to a planner, are stock.

    Args:
        fused_params: As stock; also the place for `cache_load_factor` where a plan gives none.
        qcomm_codecs_registry: As stock.
        use_index_dedup: As stock.
        table_dir: Existing directory for memory-mapped tables; None keeps them in RAM.
        overlap: Run the stages beside Train. False runs them on the training thread: slower, same bits.
        make_eviction_order: Makes a pool's eviction order, given its number of slots. CUDA devices know the default only;
            with another, Plan waits for the device, and rows are staged.
        host_access: How a CUDA device reaches tables in RAM. ``"direct"``: its kernels read and write page-locked tables in
            place. ``"staged"``: rows are gathered on the host and copied, as they always are for memory-mapped tables.
    """

    def __init__(
        self,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        use_index_dedup: bool = False,
        *,
        table_dir: str | None = None,
        overlap: bool = True,
        make_eviction_order: Callable[[int], EvictionOrder] = LeastFrequentlyUsed,
        host_access: Literal["direct", "staged"] = "direct",
    ) -> None:
        super().__init__(fused_params, qcomm_codecs_registry, use_index_dedup)
        self._options = ScratchpadOptions(table_dir, overlap, make_eviction_order, host_access)

    def shard(
        self,
        module: EmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedScratchPipeEmbeddingCollection:
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
        return ShardedScratchPipeEmbeddingCollection(
            module=module,
            table_name_to_parameter_sharding=params,
            env=env,
            fused_params=self.fused_params,
            device=device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            use_index_dedup=self._use_index_dedup,
            module_fqn=module_fqn,
            options=self._options,
        )

    @property
    def sharded_module_type(self) -> type[ShardedScratchPipeEmbeddingCollection]:
        """What :meth:`shard` makes."""
        return ShardedScratchPipeEmbeddingCollection


def _serve(
    module_name: str,
    configs: Iterable[BaseEmbeddingConfig],
    params: dict[str, ParameterSharding],
    env: ShardingEnv,
    device: torch.device | None,
    sharding_types: tuple[ShardingType, ...],
) -> dict[str, ParameterSharding]:
    """A collection's plan as the stock code needs to see it, once it is known that it can be served."""
    scratchpad_tables = {
        config.name: config
        for config in configs
        if config.name in params and params[config.name].compute_kernel == SCRATCHPAD_KERNEL.value
    }
    if not scratchpad_tables:
        logger.warning(
            "%s: no table is planned as %s, so all %d tables use stock kernels. Give ScratchPipeShardingPlanner "
            "ParameterConstraints(compute_kernels=[%r]) for the tables that should live on the host.",
            module_name,
            SCRATCHPAD_KERNEL.value,
            len(params),
            SCRATCHPAD_KERNEL.value,
        )
        return params
    if isinstance(env, ShardingEnv2D):
        raise ConfigError(
            f"{module_name}: DMPCollection (2D parallelism) averages tables between replicas without telling them, which "
            "a scratchpad would not notice. Use DistributedModelParallel, or compute kernel fused."
        )
    for name, config in scratchpad_tables.items():
        _check_table(config, params[name], sharding_types)
    if device is not None and device.type == "meta":
        logger.warning("%s: on the meta device there is nothing to cache, so its tables use stock kernels", module_name)
        return {
            name: dataclasses.replace(sharding, compute_kernel=EmbeddingComputeKernel.FUSED.value, cache_params=None)
            if name in scratchpad_tables
            else sharding
            for name, sharding in params.items()
        }
    return {
        name: _as_scratchpad_table(sharding) if name in scratchpad_tables else sharding
        for name, sharding in params.items()
    }


def _check_table(
    config: BaseEmbeddingConfig, sharding: ParameterSharding, sharding_types: tuple[ShardingType, ...]
) -> None:
    supported = [kind.value for kind in sharding_types]
    if sharding.sharding_type not in supported:
        raise ConfigError(
            f"table {config.name}: sharding type {sharding.sharding_type} is not supported with a scratchpad. Constrain "
            f"the table to one of {supported}, or to compute kernel fused."
        )
    is_mean = isinstance(config, EmbeddingBagConfig) and config.pooling is PoolingType.MEAN
    if is_mean and sharding.sharding_type == ShardingType.GRID_SHARD.value:
        raise ConfigError(
            f"table {config.name}: TorchRec computes SUM where grid_shard is asked for MEAN pooling (its grid sharding "
            "never divides by the length of the bag, up to 1.9.2 at least). Use table_row_wise or another sharding type."
        )
    if getattr(config, "enable_embedding_update", False) or getattr(config, "use_virtual_table", False):
        raise ConfigError(
            f"table {config.name}: virtual tables and enable_embedding_update need TorchRec's key-value kernels. Leave "
            "them out, or choose another compute kernel than fused_uvm_caching."
        )


def _as_scratchpad_table(sharding: ParameterSharding) -> ParameterSharding:
    # prefetch_pipeline makes group_tables keep scratchpad tables out of groups of plain fused tables.
    cache_params = dataclasses.replace(sharding.cache_params or CacheParams(), prefetch_pipeline=True)
    return dataclasses.replace(sharding, cache_params=cache_params, sharding_spec=_on_host(sharding.sharding_spec))


def _on_host(spec: Any) -> Any:
    """Shard placements where the table is, `rank:r/cpu`: ShardedTensor insists that they agree."""
    if not isinstance(spec, EnumerableShardingSpec):
        return spec
    shards = [dataclasses.replace(shard, placement=f"rank:{shard.placement.rank()}/cpu") for shard in spec.shards]
    return EnumerableShardingSpec(shards)
