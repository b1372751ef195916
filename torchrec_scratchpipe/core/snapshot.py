# SPDX-License-Identifier: BSD-3-Clause
"""Keeps a host table's rows readable as they were at one moment, while the table goes on being written.

Shapes: ``N`` rows, ``R`` rows of the table.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from torchrec_scratchpipe.core.rows import RowLayout, read_rows
from torchrec_scratchpipe.errors import TableStorageError

__all__ = ["SnapshotStorage", "TableSnapshot"]

SEGMENT_ROWS = 65536  # files of kept rows grow by so many at a time


class SnapshotStorage(Protocol):
    """Where kept rows go; memory-mapped files, so that they take no RAM that the system cannot have back."""

    def allocate(self, num_values: int, dtype: torch.dtype, label: str) -> Tensor:
        """[num_values] zeros."""


class TableSnapshot:
    """All rows of a host table as they were when this was made.

    Copies nothing then. The first time a row is about to be overwritten, its old values are kept; rows that have been
    read already need not be. Not thread-safe: its table holds a lock around every call.

    Raises TableStorageError.
    """

    def __init__(self, parts: Sequence[Tensor], layout: RowLayout, storage: SnapshotStorage) -> None:
        self._parts = parts
        self._layout = layout
        self._storage = storage
        self._place_of_row = storage.allocate(parts[0].shape[0], torch.int32, "places of rows of a snapshot")
        self._segments: list[list[Tensor]] = []
        self._num_kept = 0
        self._num_read = [0] * len(parts)  # rows that were read from the beginning, per part
        self.failure: TableStorageError | None = None

    def fail(self, failure: TableStorageError) -> None:
        """Give up: reading raises from now on."""
        self.failure = self.failure or failure

    def keep(self, rows: Tensor) -> None:
        """Keep rows that are about to be overwritten, unless they are kept or will not be read any more.

        Where there is no room left, the snapshot is lost and the table is not: :meth:`read` will raise.

        Shapes: `rows` [N] int64.
        """
        if self.failure is not None:
            return
        # 1. Only rows that somebody will still read, and only once.
        rows = rows[rows >= min(self._num_read)]
        rows = rows[self._place_of_row.index_select(0, rows) == 0]
        try:
            self._make_room(rows.numel())
        except TableStorageError as error:
            self.fail(error)
            return
        # 2. They go behind those that are kept, segment by segment. Place 0 means that a row is not kept.
        while rows.numel():
            segment, first = divmod(self._num_kept, SEGMENT_ROWS)
            some, rows = rows[: SEGMENT_ROWS - first], rows[SEGMENT_ROWS - first :]
            last = first + some.numel()
            read_rows(self._parts, some, [kept[first:last] for kept in self._segments[segment]])
            places = torch.arange(self._num_kept + 1, self._num_kept + 1 + some.numel(), dtype=torch.int32)
            self._place_of_row.index_copy_(0, some, places)
            self._num_kept += some.numel()

    def read(self, part_index: int, first_row: int, out: Tensor) -> None:
        """Copy rows of one part as they were; each may be read once, in ascending order to keep few of them.

        Shapes: `out` [N, D] or [N]. Raises TableStorageError.
        """
        if self.failure is not None:
            raise self.failure
        assert first_row >= self._num_read[part_index], "these rows were read before, and may not have been kept since"
        # 1. Rows as they are in the table now.
        last_row = first_row + out.shape[0]
        out.copy_(self._parts[part_index][first_row:last_row])
        if first_row == self._num_read[part_index]:
            self._num_read[part_index] = last_row
        # 2. Rows that were overwritten since come from where they were kept.
        places = self._place_of_row[first_row:last_row]
        kept = places.nonzero().view(-1)
        places = places[kept].long() - 1
        segments = places // SEGMENT_ROWS
        for segment in segments.unique().tolist():
            is_here = segments == segment
            values = self._segments[segment][part_index].index_select(0, places[is_here] % SEGMENT_ROWS)
            out.index_copy_(0, kept[is_here], values)

    def _make_room(self, num_rows: int) -> None:
        while self._num_kept + num_rows > SEGMENT_ROWS * len(self._segments):
            shapes = self._layout.part_shapes(SEGMENT_ROWS)
            self._segments.append(
                [
                    self._storage.allocate(torch.Size(shape).numel(), dtype, f"{name} kept for a snapshot").view(shape)
                    for shape, dtype, name in shapes
                ]
            )
