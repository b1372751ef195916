# SPDX-License-Identifier: BSD-3-Clause
"""Raw values in place of hashed ones: TorchRec's managed collision gives them rows while training."""

import argparse
from typing import Any

import torch
import torch.distributed as dist
from data import RAW_VALUE_BITS
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

POLICIES = {"lfu": LFU_EvictionPolicy, "lru": LRU_EvictionPolicy, "distance_lfu": DistanceLFU_EvictionPolicy}


class RemappedBags(nn.Module):
    """Managed collision behind the face of an EmbeddingBagCollection, which is what TorchRec's DLRM takes.

    Args:
        collection: The tables.
        args: The example's arguments.
    """

    def __init__(self, collection: EmbeddingBagCollection, args: argparse.Namespace) -> None:
        super().__init__()
        configs = collection.embedding_bag_configs()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        modules: dict[str, Any] = {
            config.name: MCHManagedCollisionModule(
                zch_size=config.num_embeddings,
                device=device,
                eviction_policy=POLICIES[args.zch_policy](),
                eviction_interval=args.zch_eviction_interval,
                input_hash_size=1 << RAW_VALUE_BITS,
                buckets=dist.get_world_size() if dist.is_initialized() else 1,
            )
            for config in configs
        }
        self._configs = configs
        self.remapped = ManagedCollisionEmbeddingBagCollection(collection, ManagedCollisionCollection(modules, configs))

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """As of the collection."""
        return list(self._configs)

    def is_weighted(self) -> bool:
        """As of the collection."""
        return False

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up raw values."""
        pooled, _ = self.remapped(features)
        return pooled
