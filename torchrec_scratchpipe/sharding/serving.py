# SPDX-License-Identifier: BSD-3-Clause
"""Which tables of a sharding plan get a scratchpad, whether they can have one, and what stock is shown instead."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.types import EnumerableShardingSpec, ParameterSharding, ShardingEnv, ShardingEnv2D
from torchrec.distributed.utils import add_params_from_parameter_sharding
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, PoolingType

from torchrec_scratchpipe.errors import ConfigError
from torchrec_scratchpipe.sharding.lookup import SCRATCHPAD_KERNEL
from torchrec_scratchpipe.sharding.options import (
    DEFAULT_LOAD_FACTOR,
    PlannedCacheParams,
    ScratchpadOptions,
    check_load_factor,
    warn_of_cache_settings,
)

__all__ = ["EMBEDDING_BAG_SHARDING_TYPES", "EMBEDDING_SHARDING_TYPES", "serve", "serve_tables"]

logger: logging.Logger = logging.getLogger(__name__)

EMBEDDING_SHARDING_TYPES = (ShardingType.TABLE_WISE, ShardingType.ROW_WISE, ShardingType.COLUMN_WISE)
EMBEDDING_BAG_SHARDING_TYPES = (
    *EMBEDDING_SHARDING_TYPES,
    ShardingType.TABLE_COLUMN_WISE,
    ShardingType.TABLE_ROW_WISE,
    ShardingType.GRID_SHARD,
)


def serve(
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
    served, load_factors = serve_tables(tables, params, sharding_types, fused_params)
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


def serve_tables(
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
