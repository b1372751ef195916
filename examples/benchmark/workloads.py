# SPDX-License-Identifier: BSD-3-Clause
"""What the benchmark trains: models of two shapes, and batches whose ids follow a power law.

Shapes: ``T`` tables, ``B`` samples, ``L`` ids per bag, ``R`` rows of a table, ``D`` row width.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection
from torchrec.datasets.utils import Batch
from torchrec.modules.mlp import MLP
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

NUM_DENSE = 13


@dataclass(frozen=True)
class Workload:
    """A model's shape, and its batches'."""

    name: str
    num_tables: int
    num_embeddings: int
    embedding_dim: int
    ids_per_bag: int
    batch_size: int
    num_device_tables: int = 0  # small ones, which every contender keeps in device memory

    @property
    def ids_per_batch(self) -> int:
        """Lookups in tables that are not kept in device memory."""
        return self.num_tables * self.ids_per_bag * self.batch_size

    @property
    def num_rows(self) -> int:
        """Of all tables."""
        return self.num_tables * self.num_embeddings


DEVICE_TABLE_ROWS, DEVICE_TABLE_DIM = 20_000, 256

# The paper's default model; Criteo's 26 features at the batch size of MLPerf; upstream's own offloading benchmark
# (torchrec #4099), whose ids are random (--zipf 0) and whose small tables have other sizes. Large tables are alike.
WORKLOADS = {
    "paper": Workload("paper", 8, 10_000_000, 128, 20, 2048),
    "criteo": Workload("criteo", 26, 2_000_000, 128, 1, 65_536),
    "offload": Workload("offload", 1, 10_000_000, 512, 30, 32_768, num_device_tables=71),
}


class Ranker(nn.Module):
    """A DLRM; the pooled embeddings of a table may come in several pieces, which are added.

    Args:
        ebc: Looks up `num_pieces` tables for each feature, next to each other.
        workload: Shapes.
        num_pieces: 2 where a table is kept in two places.
        device_ebc: Looks up the tables that are kept in device memory, if there are any.
    """

    def __init__(
        self,
        ebc: EmbeddingBagCollection,
        workload: Workload,
        num_pieces: int = 1,
        device_ebc: EmbeddingBagCollection | None = None,
    ) -> None:
        super().__init__()
        dim, num_vectors = workload.embedding_dim, workload.num_tables + 1
        self.ebc = ebc
        self.device_ebc = device_ebc
        num_wide = workload.num_device_tables * DEVICE_TABLE_DIM
        self.dense_arch = MLP(NUM_DENSE, [512, 256, dim])
        self.over_arch = nn.Sequential(
            MLP(dim + num_vectors * (num_vectors - 1) // 2 + num_wide, [512, 512, 256]), nn.Linear(256, 1)
        )
        self._piece_shape = (workload.num_tables, num_pieces, dim)
        self.register_buffer("_pairs", torch.triu_indices(num_vectors, num_vectors, offset=1), persistent=False)

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Loss, and what a training loop would report."""
        dense = self.dense_arch(batch.dense_features)
        sparse = self.ebc(batch.sparse_features).values().view(-1, *self._piece_shape).sum(dim=2)
        vectors = torch.cat([dense.unsqueeze(1), sparse], dim=1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))[:, self._pairs[0], self._pairs[1]]
        wide = [] if self.device_ebc is None else [self.device_ebc(batch.sparse_features).values()]
        logits = self.over_arch(torch.cat([dense, products, *wide], dim=1)).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels.float())
        return loss, (loss.detach(), logits.detach())


def draw_ranks(
    shape: tuple[int, ...], num_rows: int, exponent: float, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Rows by popularity: rank r is drawn in proportion to ``(r + 1) ** -exponent``, rounded from the continuous law.

    Args:
        shape: Of the result.
        num_rows: Ranks lie in ``[0, num_rows)``.
        exponent: 0 for all alike.
        generator: On `device`.
        device: Where to draw.

    Returns:
        int64.
    """
    uniform = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
    if abs(exponent - 1.0) < 1e-9:
        ranks = torch.exp(uniform * math.log(num_rows + 1.0))
    else:
        power = 1.0 - exponent
        ranks = (uniform * ((num_rows + 1.0) ** power - 1.0) + 1.0) ** (1.0 / power)
    return ranks.long().sub_(1).clamp_(0, num_rows - 1)


class PowerLawBatches(Iterator[Batch]):
    """Batches that are made when asked for, or ahead of time; every instance with the same seed gives the same samples.

    Args:
        workload: Shapes.
        exponent: As for :func:`draw_ranks`.
        seed: Of the ids, and of what else is in a batch.
        device: Where batches are made.
        num_batches: How many there are.
        num_hot: If not None, each table is in two pieces, of which the first has so many of the hottest rows.
    """

    def __init__(
        self,
        workload: Workload,
        exponent: float,
        seed: int,
        device: torch.device,
        num_batches: int,
        num_hot: int | None = None,
    ) -> None:
        self._workload = workload
        self._exponent = exponent
        self._device = device
        self._num_hot = num_hot
        self._generator = torch.Generator(device).manual_seed(seed)
        self._ready: deque[Batch] = deque()
        self._num_left = num_batches
        # Popular rows are spread over the table: by a step that has no divisor in common with its length.
        step = int(workload.num_embeddings * 0.618)
        while math.gcd(step, workload.num_embeddings) != 1:
            step += 1
        self._step = step

    def prepare(self, num_batches: int) -> None:
        """Make batches ahead of time, so that making them is not timed.

        Args:
            num_batches: How many are to be ready.
        """
        while len(self._ready) < min(num_batches, self._num_left):
            self._ready.append(self._make())

    def __next__(self) -> Batch:
        if self._num_left == 0:
            raise StopIteration
        self._num_left -= 1
        return self._ready.popleft() if self._ready else self._make()

    def _make(self) -> Batch:
        workload, device = self._workload, self._device
        shape = (workload.num_tables, workload.batch_size, workload.ids_per_bag)
        ranks = draw_ranks(shape, workload.num_embeddings, self._exponent, self._generator, device)
        dense = torch.rand(
            workload.batch_size, NUM_DENSE, generator=self._generator, dtype=torch.float32, device=device
        )
        labels = torch.randint(
            0, 2, (workload.batch_size,), generator=self._generator, dtype=torch.int64, device=device
        )
        if self._num_hot is None:
            values = ranks.mul_(self._step).remainder_(workload.num_embeddings).view(-1)
            lengths = torch.full((shape[0] * shape[1],), shape[2], dtype=torch.int32, device=device)
        else:
            values, lengths = self._in_two_pieces(ranks, self._num_hot)
        keys = feature_names(workload, self._num_hot)
        if workload.num_device_tables:
            num_bags = workload.num_device_tables * workload.batch_size
            more = (DEVICE_TABLE_ROWS, (num_bags * workload.ids_per_bag,))
            values = torch.cat(
                [values, torch.randint(*more, generator=self._generator, dtype=torch.int64, device=device)]
            )
            lengths = torch.cat([lengths, lengths.new_full((num_bags,), workload.ids_per_bag)])
            keys += device_feature_names(workload)
        sparse = KeyedJaggedTensor(keys=keys, values=values, lengths=lengths)
        return Batch(dense_features=dense, sparse_features=sparse, labels=labels)

    def _in_two_pieces(self, ranks: Tensor, num_hot: int) -> tuple[Tensor, Tensor]:
        is_hot = ranks < num_hot
        values = torch.where(is_hot, ranks, ranks - num_hot)
        lengths = torch.stack([is_hot.sum(-1), (~is_hot).sum(-1)], dim=1).int()  # [T, 2, B]
        # Hot ids of a table first, then the others, each in the order of the samples.
        order = torch.stack([is_hot, ~is_hot], dim=1).view(ranks.shape[0], 2, -1)
        both = values.view(ranks.shape[0], 1, -1).expand(-1, 2, -1)
        return both[order], lengths.view(-1)


def feature_names(workload: Workload, num_hot: int | None) -> list[str]:
    """Of a table's pieces, next to each other.

    Args:
        workload: Shapes.
        num_hot: As for :class:`PowerLawBatches`.

    Returns:
        In the order of a batch's features.
    """
    pieces = [""] if num_hot is None else ["_hot", "_cold"]
    return [f"f{index}{piece}" for index in range(workload.num_tables) for piece in pieces]


def device_feature_names(workload: Workload) -> list[str]:
    """Of the tables that are kept in device memory.

    Args:
        workload: Shapes.

    Returns:
        In the order of a batch's features, of which they are the last.
    """
    return [f"d{index}" for index in range(workload.num_device_tables)]


def describe(workload: Workload) -> dict[str, Any]:
    """For the report."""
    return {**vars(workload), "ids_per_batch": workload.ids_per_batch}
