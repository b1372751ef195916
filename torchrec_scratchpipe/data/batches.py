# SPDX-License-Identifier: BSD-3-Clause
"""Rows, cut and joined into batches.

Shapes: ``B`` samples of a batch, ``D`` dense features.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe.data.columns import Bags
from torchrec_scratchpipe.data.row_groups import Rows


def cut(pieces: Iterable[Rows], sizes: Iterable[int]) -> Iterator[list[Rows]]:
    """Cut a stream of rows into batches.

    Args:
        pieces: In order; together as many rows as all sizes.
        sizes: Rows of each batch.

    Yields:
        What a batch consists of: views of the pieces, or copies where a piece ends inside the batch.
    """
    source = iter(pieces)
    piece = None
    for size in sizes:
        parts: list[Rows] = []
        while size > 0:
            if piece is None:
                piece = _Cutter(next(source))
            parts.append(piece.take(size))
            size -= parts[-1].num_rows
            if piece.num_left == 0:
                piece = None  # a copy of its end is all that is held while the next one is awaited
        yield parts


class _Cutter:
    """Takes rows off the front of a piece."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._first = 0
        self._first_ids = [0] * len(rows.bags)
        self.num_left = rows.num_rows

    def take(self, num_rows: int) -> Rows:
        """The next rows, as many as there are; copies if these are the last."""
        first = self._first
        last = self._first = min(self._rows.num_rows, first + num_rows)
        self.num_left = self._rows.num_rows - last
        labels = None if self._rows.labels is None else self._rows.labels[first:last]
        bags = [self._take_bags(index, first, last) for index in range(len(self._rows.bags))]
        taken = Rows(last - first, bags, self._rows.dense[first:last], labels)
        return taken if self.num_left else _copy(taken)

    def _take_bags(self, index: int, first: int, last: int) -> Bags:
        values, lengths = self._rows.bags[index]
        if lengths is None:
            return Bags(values[first:last], None)
        lengths = lengths[first:last]
        first_id = self._first_ids[index]
        num_ids = np.count_nonzero(lengths) if lengths.dtype == np.bool_ else lengths.sum(dtype=np.int64)
        last_id = self._first_ids[index] = first_id + int(num_ids)
        return Bags(values[first_id:last_id], lengths)


def _copy(rows: Rows) -> Rows:
    bags = [Bags(values.copy(), None if lengths is None else lengths.copy()) for values, lengths in rows.bags]
    return Rows(rows.num_rows, bags, rows.dense.copy(), None if rows.labels is None else rows.labels.copy())


def to_features(keys: Sequence[str], parts: Sequence[Rows]) -> KeyedJaggedTensor:
    """The ids of one batch.

    Args:
        keys: Features.
        parts: What the batch consists of.

    Returns:
        Its features, values int64 and lengths int32.
    """
    values = np.concatenate([part.bags[index].values for index in range(len(keys)) for part in parts])
    return KeyedJaggedTensor(keys=list(keys), values=torch.from_numpy(values), lengths=_lengths(len(keys), parts))


def _lengths(num_features: int, parts: Sequence[Rows]) -> Tensor:
    if all(bags.lengths is None for part in parts for bags in part.bags):
        return torch.ones(num_features * sum(part.num_rows for part in parts), dtype=torch.int32)
    each = [_lengths_of(part.bags[index], part.num_rows) for index in range(num_features) for part in parts]
    return torch.from_numpy(np.concatenate(each, dtype=np.int32))


def _lengths_of(bags: Bags, num_rows: int) -> npt.NDArray[Any]:
    return np.ones(num_rows, dtype=np.bool_) if bags.lengths is None else bags.lengths


def to_batch(keys: Sequence[str], parts: Sequence[Rows]) -> Batch:
    """One batch.

    Args:
        keys: Features.
        parts: What the batch consists of.

    Returns:
        Dense features [B, D] float32, ids, and labels [B] int32 or float32, [0] where they were not read.
    """
    labels: list[Any] = [part.labels for part in parts if part.labels is not None]
    return Batch(
        dense_features=torch.from_numpy(np.concatenate([part.dense for part in parts])),
        sparse_features=to_features(keys, parts),
        labels=torch.from_numpy(np.concatenate(labels)) if labels else torch.empty(0, dtype=torch.float32),
    )
