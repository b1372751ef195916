# SPDX-License-Identifier: BSD-3-Clause
"""Swaps stock sharding of collections for one whose `fused_uvm_caching` tables use the scratchpad."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
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
    EnumerableShardingSpec,
    LazyAwaitable,
    ParameterSharding,
    QuantizedCommCodecs,
    ShardingEnv,
    ShardingEnv2D,
)
from torchrec.distributed.utils import add_params_from_parameter_sharding
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
    EmbeddingCollection,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_scratchpipe.core.slot_ops import HALF_LIFE
from torchrec_scratchpipe.errors import BatchesInFlightError, ConfigError
from torchrec_scratchpipe.sharding.collection import PlannedBatches, ScratchpadCollection
from torchrec_scratchpipe.sharding.lookup import SCRATCHPAD_KERNEL, create_pooled_lookup, create_sequence_lookup
from torchrec_scratchpipe.sharding.options import (
    DEFAULT_LOAD_FACTOR,
    PlannedCacheParams,
    ScratchpadBudget,
    ScratchpadOptions,
    check_load_factor,
    warn_of_cache_settings,
)

__all__ = [
    "ScratchPipeEmbeddingBagCollectionSharder",
    "ScratchPipeEmbeddingCollectionSharder",
    "ShardedScratchPipeEmbeddingBagCollection",
    "ShardedScratchPipeEmbeddingCollection",
    "serves_scratchpads",
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

    Input and output distribution, parameters and state_dict are stock. :meth:`prefetch` sends a batch through Plan,
    Collect, Exchange and Insert ahead of time; a batch that nobody sent is fetched on the spot. The sharder makes it.

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
        served, options = _serve(
            name,
            module.embedding_bag_configs(),
            plan,
            env,
            device,
            EMBEDDING_BAG_SHARDING_TYPES,
            options or ScratchpadOptions(),
            fused_params or {},
        )
        self._set_up_stages(options, device)
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
        """As stock; on a CPU, ids that Plan does not see, or not in time, are checked before they are distributed.

        Args:
            ctx: The batch's context.
            features: The batch's features on this rank.

        Returns:
            As stock.
        """
        with self._peers.told():
            features = self._check_ids(ctx, features)
            return self._peers.watch(super().input_dist(ctx, features))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # threads, locks and holds are not for Dynamo
    def compute_and_output_dist(self, ctx: EmbeddingBagCollectionContext, input: KJTList) -> LazyAwaitable[KeyedTensor]:
        """As stock, over planned batches where there are any.

        Args:
            ctx: The batch's context.
            input: The batch after input distribution, with ids.

        Returns:
            As stock.

        Raises:
            IdOutOfRangeError: Names the table, the id and the range.
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
        self.wait_until_idle()  # the worker may not have planned all of them yet
        num_batches = max((pool.slot_map.num_batches_in_flight for pool in self.pools), default=0)
        if num_batches > 0:
            raise BatchesInFlightError(
                f"update_shards(): {num_batches} batches in flight were planned for the present sharding. Let the "
                "pipeline train them, or call its reset(), first."
            )
        configs = [config for config in self._embedding_bag_configs if config.name in changed_sharding_params]
        served, load_factors = _serve_tables(configs, changed_sharding_params, EMBEDDING_BAG_SHARDING_TYPES, {})
        kept = {
            name: value for name, value in self._options.load_factors.items() if name not in changed_sharding_params
        }
        self._options = dataclasses.replace(self._options, load_factors=kept | load_factors)
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
        served, options = _serve(
            name,
            module.embedding_configs(),
            plan,
            env,
            device,
            EMBEDDING_SHARDING_TYPES,
            options or ScratchpadOptions(),
            fused_params or {},
        )
        self._set_up_stages(options, device)
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
        """As stock; on a CPU, ids that Plan does not see, or not in time, are checked before they are distributed.

        Args:
            ctx: The batch's context.
            features: The batch's features on this rank, KeyedJaggedTensor or TensorDict.

        Returns:
            As stock.
        """
        with self._peers.told():
            features = self._check_ids(ctx, features)
            return self._peers.watch(super().input_dist(ctx, features))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # threads, locks and holds are not for Dynamo
    def compute_and_output_dist(
        self, ctx: EmbeddingCollectionContext, input: KJTList
    ) -> LazyAwaitable[dict[str, JaggedTensor]]:
        """As stock, over planned batches where there are any.

        Args:
            ctx: The batch's context.
            input: The batch after input distribution, with ids.

        Returns:
            As stock.

        Raises:
            IdOutOfRangeError: Names the table, the id and the range.
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
        host_access: How a CUDA device reaches tables in RAM. ``"direct"``: its kernels read and write page-locked
            tables in place. ``"staged"``: rows are gathered on the host and copied, as they always are for
            memory-mapped tables.
        on_full: What happens if one batch alone needs more slots than there are, or than others will ever let go of.
            ``"grow"``: its pool gets a quarter more than the batch needs, with a warning, counted as `num_growths`.
            ``"error"``: :class:`ScratchpadFullError`.
        max_scratchpad_bytes: What all scratchpads of this sharder may take on a rank when they grow; None for as much
            as there is. (Beyond the budget of the sharding plan, if it has one, a warning says by how much.)
        half_life: After so many batches a use counts half, when victims are chosen.
        out_of_range_ids: ``"error"``: an id that is not in its table is an :class:`IdOutOfRangeError`, in a table that
            is kept whole too (on a CUDA device, only in scratchpad tables). ``"fbgemm"``: what FBGEMM does by its
            `bounds_check_mode`; by default it warns and takes row 0.
    """

    def __init__(
        self,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        sharded_module_order_overwrite: list[str] | None = None,
        *,
        table_dir: str | None = None,
        overlap: bool = True,
        host_access: Literal["direct", "staged"] = "direct",
        on_full: Literal["grow", "error"] = "grow",
        max_scratchpad_bytes: int | None = None,
        half_life: float = HALF_LIFE,
        out_of_range_ids: Literal["error", "fbgemm"] = "error",
    ) -> None:
        super().__init__(fused_params, qcomm_codecs_registry, sharded_module_order_overwrite)
        budget = ScratchpadBudget(max_scratchpad_bytes)
        self._options = ScratchpadOptions(table_dir, overlap, host_access, on_full, budget, half_life, out_of_range_ids)

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
        host_access: How a CUDA device reaches tables in RAM. ``"direct"``: its kernels read and write page-locked
            tables in place. ``"staged"``: rows are gathered on the host and copied, as they always are for
            memory-mapped tables.
        on_full: What happens if one batch alone needs more slots than there are, or than others will ever let go of.
            ``"grow"``: its pool gets a quarter more than the batch needs, with a warning, counted as `num_growths`.
            ``"error"``: :class:`ScratchpadFullError`.
        max_scratchpad_bytes: What all scratchpads of this sharder may take on a rank when they grow; None for as much
            as there is. (Beyond the budget of the sharding plan, if it has one, a warning says by how much.)
        half_life: After so many batches a use counts half, when victims are chosen.
        out_of_range_ids: ``"error"``: an id that is not in its table is an :class:`IdOutOfRangeError`, in a table that
            is kept whole too (on a CUDA device, only in scratchpad tables). ``"fbgemm"``: what FBGEMM does by its
            `bounds_check_mode`; by default it warns and takes row 0.
    """

    def __init__(
        self,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        use_index_dedup: bool = False,
        *,
        table_dir: str | None = None,
        overlap: bool = True,
        host_access: Literal["direct", "staged"] = "direct",
        on_full: Literal["grow", "error"] = "grow",
        max_scratchpad_bytes: int | None = None,
        half_life: float = HALF_LIFE,
        out_of_range_ids: Literal["error", "fbgemm"] = "error",
    ) -> None:
        super().__init__(fused_params, qcomm_codecs_registry, use_index_dedup)
        budget = ScratchpadBudget(max_scratchpad_bytes)
        self._options = ScratchpadOptions(table_dir, overlap, host_access, on_full, budget, half_life, out_of_range_ids)

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


def serves_scratchpads(sharder: object) -> bool:
    """Whether tables that are planned as `fused_uvm_caching` get a scratchpad from this sharder."""
    sharder = getattr(sharder, "_ebc_sharder", sharder)
    return isinstance(sharder, ScratchPipeEmbeddingBagCollectionSharder | ScratchPipeEmbeddingCollectionSharder)


def _serve(
    module_name: str,
    configs: Iterable[BaseEmbeddingConfig],
    params: dict[str, ParameterSharding],
    env: ShardingEnv,
    device: torch.device | None,
    sharding_types: tuple[ShardingType, ...],
    options: ScratchpadOptions,
    fused_params: Mapping[str, Any],
) -> tuple[dict[str, ParameterSharding], ScratchpadOptions]:
    """A collection's plan as stock needs to see it, once it is known that it can be served, and its scratchpads."""
    tables = [config for config in configs if config.name in params and _is_scratchpad_table(params[config.name])]
    if not tables:
        logger.warning(
            "%s: no table is planned as %s, so all %d tables use stock kernels. Give ScratchPipeShardingPlanner "
            "ParameterConstraints(compute_kernels=[%r]) for the tables that should live on the host.",
            module_name,
            SCRATCHPAD_KERNEL.value,
            len(params),
            SCRATCHPAD_KERNEL.value,
        )
        return params, options
    if isinstance(env, ShardingEnv2D):
        raise ConfigError(
            f"{module_name}: DMPCollection (2D parallelism) averages tables between replicas without telling them, "
            "which a scratchpad would not notice. Use DistributedModelParallel, or compute kernel fused."
        )
    served, load_factors = _serve_tables(tables, params, sharding_types, fused_params)
    if device is not None and device.type == "meta":
        logger.warning("%s: on the meta device there is nothing to cache, so its tables use stock kernels", module_name)
        return {name: _as_stock_table(sharding) for name, sharding in params.items()}, options
    planned = [params[config.name].cache_params for config in tables]
    planned = [given for given in planned if isinstance(given, PlannedCacheParams)]
    for given in planned:
        if given.growth_bytes is not None:
            options.budget.note_plan(given.growth_bytes)
    lookahead = min((given.lookahead for given in planned if given.lookahead is not None), default=None)
    return served, dataclasses.replace(options, load_factors=load_factors, lookahead=lookahead)


def _serve_tables(
    configs: Iterable[BaseEmbeddingConfig],
    params: dict[str, ParameterSharding],
    sharding_types: tuple[ShardingType, ...],
    fused_params: Mapping[str, Any],
) -> tuple[dict[str, ParameterSharding], dict[str, float]]:
    """A plan in which scratchpad tables look like stock's `fused` ones on the host; and their load factors.

    TorchRec groups tables by kernel and cache settings, and orders columns and optimizers by group. So it must see no
    difference.
    """
    served, load_factors = dict(params), {}
    for config in configs:
        sharding = params[config.name]
        if not _is_scratchpad_table(sharding):
            continue
        _check_table(config, sharding, sharding_types)
        cache_settings = add_params_from_parameter_sharding({}, sharding)
        warn_of_cache_settings(config.name, cache_settings)
        load_factor = (dict(fused_params) | cache_settings).get("cache_load_factor", DEFAULT_LOAD_FACTOR)
        load_factors[config.name] = check_load_factor(config.name, load_factor)
        served[config.name] = dataclasses.replace(
            _as_stock_table(sharding), sharding_spec=_on_host(sharding.sharding_spec)
        )
    return served, load_factors


def _is_scratchpad_table(sharding: ParameterSharding) -> bool:
    return bool(sharding.compute_kernel == SCRATCHPAD_KERNEL.value)


def _as_stock_table(sharding: ParameterSharding) -> ParameterSharding:
    if not _is_scratchpad_table(sharding):
        return sharding
    return dataclasses.replace(sharding, compute_kernel=EmbeddingComputeKernel.FUSED.value, cache_params=None)


def _check_table(
    config: BaseEmbeddingConfig, sharding: ParameterSharding, sharding_types: tuple[ShardingType, ...]
) -> None:
    supported = [kind.value for kind in sharding_types]
    if sharding.sharding_type not in supported:
        raise ConfigError(
            f"table {config.name}: sharding type {sharding.sharding_type} is not supported with a scratchpad. "
            f"Constrain the table to one of {supported}, or to compute kernel fused."
        )
    is_mean = isinstance(config, EmbeddingBagConfig) and config.pooling is PoolingType.MEAN
    if is_mean and sharding.sharding_type == ShardingType.GRID_SHARD.value:
        raise ConfigError(
            f"table {config.name}: TorchRec computes SUM where grid_shard is asked for MEAN pooling (its grid sharding "
            "never divides by the length of the bag, up to 1.9.2 at least). Use table_row_wise or another "
            "sharding type."
        )
    if getattr(config, "enable_embedding_update", False) or getattr(config, "use_virtual_table", False):
        raise ConfigError(
            f"table {config.name}: virtual tables and enable_embedding_update need TorchRec's key-value kernels. Leave "
            "them out, or choose another compute kernel than fused_uvm_caching."
        )


def _on_host(spec: Any) -> Any:
    """Shard placements where the table is, `rank:r/cpu`: ShardedTensor insists that they agree."""
    if not isinstance(spec, EnumerableShardingSpec):
        return spec
    shards = [dataclasses.replace(shard, placement=f"rank:{shard.placement.rank()}/cpu") for shard in spec.shards]
    return EnumerableShardingSpec(shards)
