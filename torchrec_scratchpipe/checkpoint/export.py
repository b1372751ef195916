# SPDX-License-Identifier: BSD-3-Clause
"""A sharded model's tables as plain collections, for inference, quantization and export."""

import copy
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.fp_embeddingbag import ShardedFeatureProcessedEmbeddingBagCollection
from torchrec.distributed.mc_embedding_modules import BaseShardedManagedCollisionEmbeddingCollection
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.modules.mc_embedding_modules import (
    ManagedCollisionEmbeddingBagCollection,
    ManagedCollisionEmbeddingCollection,
)
from torchrec.modules.mc_modules import ManagedCollisionCollection

from torchrec_scratchpipe.errors import ConfigError

__all__ = ["to_stock"]

M = TypeVar("M", bound=nn.Module)


def to_stock(module: nn.Module) -> Any:
    """Make a plain model of a sharded one: every sharded collection becomes an unsharded one, all else is shared.

    In a job of one process no table is copied, unless it is sharded by columns: weights are views of the sharded
    model's tables, and lie on the host, while all else stays where it is. Rows that train later show there too, and
    what is written there is trained on. With several processes, all call it, and rank 0 gets copies of whole tables,
    one after another.

    Args:
        module: A model of DistributedModelParallel, or a sharded collection, planned by any sharder.

    Returns:
        The model without its wrapper, or an EmbeddingBagCollection or EmbeddingCollection; None on ranks other than 0.

    Raises:
        ConfigError: A table's state is neither a plain tensor nor a ShardedTensor.
    """
    converted = _convert(get_unwrapped_module(module), {})
    return converted if _rank() == 0 else None


def _convert(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """A module that is used in several places stays one."""
    if id(module) not in done:
        done[id(module)] = _convert_one(module, done)
    return done[id(module)]


def _convert_one(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    if isinstance(module, ShardedFeatureProcessedEmbeddingBagCollection):
        bags = _convert(module._embedding_bag_collection, done)
        return FeatureProcessedEmbeddingBagCollection(bags, get_unwrapped_module(module._feature_processors))
    if isinstance(module, BaseShardedManagedCollisionEmbeddingCollection):
        return _without_sharding(module, _convert(module._embedding_module, done))
    if isinstance(module, ShardedEmbeddingBagCollection):
        collection = EmbeddingBagCollection(
            tables=module._embedding_bag_configs, is_weighted=module._is_weighted, device=torch.device("meta")
        )
        _fill(collection.embedding_bags, module, "embedding_bags")
        return collection
    if isinstance(module, ShardedEmbeddingCollection):
        sequences = EmbeddingCollection(
            tables=module._embedding_configs, need_indices=module._need_indices, device=torch.device("meta")
        )
        _fill(sequences.embeddings, module, "embeddings")
        return sequences
    children = {name: child if child is None else _convert(child, done) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    return _with_children(module, children)


def _without_sharding(
    module: BaseShardedManagedCollisionEmbeddingCollection[Any],
    tables: Any,
) -> ManagedCollisionEmbeddingBagCollection | ManagedCollisionEmbeddingCollection:
    """A collection with managed collision; its state is shared."""
    if _num_ranks() > 1:
        raise ConfigError(
            f"tables {', '.join(module._managed_collision_collection._table_name_to_config)}: state of managed "
            f"collision on {_num_ranks()} ranks cannot be put together, because each rank has remapped ids of its own. "
            "Save a checkpoint, and load it in a job of one process."
        )
    collisions = module._managed_collision_collection
    configs = list(collisions._table_name_to_config.values())
    modules = {config.name: collisions._managed_collision_modules[config.name] for config in configs}
    plain = ManagedCollisionCollection(modules, configs, collisions.need_preprocess)
    kind = ManagedCollisionEmbeddingBagCollection if module.bagged else ManagedCollisionEmbeddingCollection
    return kind(tables, plain, module._return_remapped_features, module._allow_in_place_embed_weight_update)


def _with_children(module: M, children: dict[str, nn.Module | None]) -> M:
    changed = copy.copy(module)
    changed._modules = children
    changed._parameters = dict(module._parameters)
    changed._buffers = dict(module._buffers)
    return changed


def _fill(tables: nn.ModuleDict, sharded: nn.Module, prefix: str) -> None:
    state = sharded.state_dict()
    for name, table in tables.items():
        weights = _whole(name, state[f"{prefix}.{name}.weight"])
        if weights is not None:
            table.weight = nn.Parameter(weights, requires_grad=weights.is_floating_point())


def _whole(name: str, value: object) -> Tensor | None:
    """A table's weights, shared if they lie in one piece here; None on ranks other than 0."""
    if isinstance(value, ShardedTensor):
        shards = value.local_shards()
        size = value.metadata().size
        if _num_ranks() == 1 and len(shards) == 1:
            return shards[0].tensor.detach()
        whole = torch.empty(size, dtype=value.metadata().tensor_properties.dtype) if _rank() == 0 else None
        value.gather(dst=0, out=whole)
        return whole
    if isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter):
        return value.detach()
    raise ConfigError(
        f"table {name}: its state is a {type(value).__name__}, which cannot be gathered. Save a checkpoint, and load "
        "it into an unsharded model with load_checkpoint()."
    )


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
