# SPDX-License-Identifier: BSD-3-Clause
"""Models and batches with managed collision that tests and the soak share."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from helpers import CPU, NUM_DENSE, Setting, make_bags, make_embeddings
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.mc_embedding_modules import (
    ManagedCollisionEmbeddingBagCollection,
    ManagedCollisionEmbeddingCollection,
)
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    ManagedCollisionCollection,
    ManagedCollisionModule,
    MCHManagedCollisionModule,
    probabilistic_threshold_filter,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

ID_RANGE = 1 << 40


@dataclass(frozen=True)
class CollisionSetting(Setting):
    """Tables t0 and t1 have their ids remapped, t2 has not."""

    sharding_type: str = "row_wise"
    num_rows: tuple[int, ...] = (64, 48, 40)
    features_per_table: Any = None
    policy: str = "lfu"
    eviction_interval: int = 3
    load_factor: float = 0.7
    num_batches: int = 36
    num_ids: int = 90  # that are in use at a time
    num_buckets: int | None = None  # default: as many as ranks
    is_in_place: bool = False
    is_hashed: bool = False
    returns_remapped: bool = True

    def feature_names(self, table_index: int) -> tuple[str, ...]:
        return ("f0", "f0b") if table_index == 0 else (f"f{table_index}",)


class LatestTakesRow(ManagedCollisionModule):
    """An id has one row, by its hash; the latest id to come takes it. Rows change hands in every batch.

    So they do with TorchRec's HashZchManagedCollisionModule, whose kernel trains on CUDA alone.
    """

    def __init__(self, size: int, num_buckets: int, first_row: int = 0, segments: list[int] | None = None) -> None:
        self._size, self._num_buckets, self._first_row = size, num_buckets, first_row
        super().__init__(CPU, segments or [size * bucket // num_buckets for bucket in range(num_buckets + 1)])
        self.register_buffer("owners", torch.full((size,), -1))
        self._evicted: Tensor | None = None

    def preprocess(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        return features

    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        return features

    @torch.no_grad()
    def remap(self, features: dict[str, JaggedTensor], *_args: Any, **_kwargs: Any) -> dict[str, JaggedTensor]:
        remapped = {}
        for name, feature in features.items():
            rows = (feature.values() * 2_654_435_761 >> 7) % self._size
            if self.training:
                owners = self.owners.clone()
                owners[rows] = feature.values()
                self._evicted = (owners != self.owners).nonzero().view(-1) + self._first_row
                self.owners.copy_(owners)
            remapped[name] = JaggedTensor(rows + self._first_row, lengths=feature.lengths())
        return remapped

    def forward(self, features: dict[str, JaggedTensor], *_args: Any) -> dict[str, JaggedTensor]:
        return self.remap(features)

    def evict(self) -> Tensor | None:
        evicted, self._evicted = self._evicted, None
        return evicted

    def output_size(self) -> int:
        return self._size

    def input_size(self) -> int:
        return ID_RANGE

    def buckets(self) -> int:
        return self._num_buckets

    def open_slots(self) -> Tensor:
        return (self.owners < 0).sum().view(1)

    def validate_state(self) -> None:
        pass

    def rebuild_with_output_id_range(
        self, output_id_range: tuple[int, int], output_segments: list[int], device: torch.device | None = None
    ) -> "LatestTakesRow":
        first, last = output_id_range
        return type(self)(last - first, self._num_buckets, first, output_segments)


def _hash(ids: Tensor, size: int) -> Tensor:
    return ids * 1_000_003 % size


def _collision_module(setting: CollisionSetting, table_index: int) -> ManagedCollisionModule:
    size, interval = setting.num_rows[table_index], setting.eviction_interval
    if setting.policy == "hash":
        return LatestTakesRow(size, dist.get_world_size())
    policy = {
        "lfu": LFU_EvictionPolicy,
        "lru": LRU_EvictionPolicy,
        "distance": DistanceLFU_EvictionPolicy,
        "random": lambda: LFU_EvictionPolicy(probabilistic_threshold_filter),
    }[setting.policy]()
    return MCHManagedCollisionModule(
        zch_size=size,
        device=CPU,
        eviction_policy=policy,
        eviction_interval=interval,
        input_hash_size=ID_RANGE,
        input_hash_func=_hash if setting.is_hashed else None,
        buckets=setting.num_buckets or dist.get_world_size(),
    )


class CollisionModel(nn.Module):
    """Remapped embeddings, plain ones, and one dense layer with dropout, which draws random numbers between steps."""

    def __init__(self, setting: CollisionSetting) -> None:
        super().__init__()
        remapped = replace(setting, num_rows=setting.num_rows[:2], dims=setting.dims[:2])
        tables: Any = make_bags(remapped) if setting.is_pooled else make_embeddings(remapped)
        configs = tables.embedding_bag_configs() if setting.is_pooled else tables.embedding_configs()
        collisions = ManagedCollisionCollection(
            {config.name: _collision_module(setting, index) for index, config in enumerate(configs)}, configs
        )
        kind = ManagedCollisionEmbeddingBagCollection if setting.is_pooled else ManagedCollisionEmbeddingCollection
        self.remapped = kind(
            tables,
            collisions,
            return_remapped_features=setting.returns_remapped,
            allow_in_place_embed_weight_update=setting.is_in_place,
        )
        plain = make_bags(setting).embedding_bag_configs()[2:]
        self.plain = EmbeddingBagCollection(tables=plain, device=torch.device("meta"))
        self.is_pooled = setting.is_pooled
        self.returns_remapped = setting.returns_remapped
        self.names = [name for index in range(2) for name in setting.feature_names(index)]
        self.dropout = nn.Dropout(0.2)
        self.over = nn.Linear(setting.dims[0] * (len(self.names) + 1) + NUM_DENSE, 1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        embeddings, remapped = self.remapped(batch.sparse_features)
        others = self.plain(batch.sparse_features)
        if self.is_pooled:
            columns = [embeddings[name] for name in self.names]
        else:
            columns = [
                torch.segment_reduce(embeddings[name].values(), "sum", lengths=embeddings[name].lengths())
                for name in self.names
            ]
        columns.append(others["f2"])
        logits = self.over(self.dropout(torch.cat([*columns, batch.dense_features], dim=1))).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        found = [logits.detach().double()]
        if self.returns_remapped:
            found.append(remapped.values().double())
        return loss, torch.cat(found)


def make_collision_batches(
    setting: CollisionSetting, rank: int = 0, drift: int = 6, first_batch: int = 0
) -> list[Batch]:
    """Raw ids whose favourites change all the time, `drift` new ones in every batch."""
    generator = torch.Generator().manual_seed(1000 * setting.seed + rank + 7 * first_batch)
    batches = []
    for index in range(first_batch, first_batch + setting.num_batches):
        values = []
        for _ in range(3):
            skewed = (torch.rand(3 * setting.batch_size, generator=generator) ** 3 * setting.num_ids).long()
            values.append((drift * index + skewed) * 982_451_653_019 % ID_RANGE)
        values.append((torch.rand(3 * setting.batch_size, generator=generator) ** 3 * setting.num_rows[2]).long())
        features = KeyedJaggedTensor(
            ["f0", "f0b", "f1", "f2"],
            torch.cat(values),
            lengths=torch.full((4 * setting.batch_size,), 3),
        ).sync()
        batches.append(
            Batch(
                torch.rand(setting.batch_size, NUM_DENSE, generator=generator),
                features,
                torch.randint(0, 2, (setting.batch_size,), generator=generator).float(),
            )
        )
    return batches
