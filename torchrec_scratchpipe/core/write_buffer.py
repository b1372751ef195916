# SPDX-License-Identifier: BSD-3-Clause
"""Gathers rows on their way into a memory-mapped table, so that scattered writes become ordered ones.

Shapes: ``N`` rows, ``D`` row width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchrec_scratchpipe.core.rows import RowLayout, write_rows

__all__ = ["WriteBuffer"]

WRITE_BUFFER_BYTES = 512 * 1024 * 1024


SWEEP_ROWS = 16384  # how far the write buffer's hand moves at a time: 4 MiB of rows of 64 floats


class WriteBuffer:
    """Rows on their way to a memory-mapped table, kept in RAM until many of them can be written side by side.

    Writing a row makes its whole page dirty, and the system writes dirty pages out. Victims are spread over
    the whole table, so writing each at once costs a page, and its write to the disk, per row. Here they
    gather first; a hand then sweeps through the table in row order and takes along all that lie in its way, so that
    neighbouring rows share a page and neighbouring pages one write. Costs 4 bytes per row of the table, and at most
    :data:`WRITE_BUFFER_BYTES` of rows.
    """

    def __init__(
        self,
        write_table: Callable[[Tensor, Sequence[Tensor]], None],
        ask_for: Callable[[Tensor], None],
        num_rows: int,
        layout: RowLayout,
    ) -> None:
        self._write_table = write_table
        self._ask_for = ask_for
        self._num_rows = num_rows
        self._capacity = max(1, min(self._num_rows, WRITE_BUFFER_BYTES // layout.row_bytes))
        self._buffer = layout.empty(self._capacity)
        self._row_to_place = torch.full((self._num_rows,), -1, dtype=torch.int32)
        self._free_places = torch.arange(self._capacity, dtype=torch.int64)
        self._hand = 0

    def read_over(self, rows: Tensor, out: Sequence[Tensor]) -> None:
        """Replace what was read from the table by what is newer here. Shapes: `rows` [N] int64, `out` [N, D] or [N]."""
        places = self._row_to_place.index_select(0, rows).long()
        positions = (places >= 0).nonzero().view(-1)
        if positions.numel() == 0:
            return
        newer = [buffer.index_select(0, places.index_select(0, positions)) for buffer in self._buffer]
        write_rows(out, positions, newer)

    def write(self, rows: Tensor, values: Sequence[Tensor]) -> None:
        """Take rows in, and pass others on to the table where there is no room.

        Shapes: `rows` [N] int64, `values` [N, D] or [N].
        """
        for first in range(0, rows.numel(), self._capacity):
            last = first + self._capacity
            self._write_some(rows[first:last], [value[first:last] for value in values])

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits here."""
        return self._free_places.numel() == self._capacity

    def drain(self) -> None:
        """Pass everything on to the table."""
        self._make_room(self._capacity)

    def _write_some(self, rows: Tensor, values: Sequence[Tensor]) -> None:
        # 1. A row that waits here already keeps its place; the others take free ones.
        self._make_room(rows.numel())
        places = self._row_to_place.index_select(0, rows).long()
        new = (places < 0).nonzero().view(-1)
        places[new] = self._free_places[: new.numel()]
        self._free_places = self._free_places[new.numel() :]
        # 2. Values go to their places.
        self._row_to_place.index_copy_(0, rows, places.int())
        write_rows(self._buffer, places, values)

    def _make_room(self, num_places: int) -> None:
        freed = [self._free_places]
        num_free, num_swept = self._free_places.numel(), 0
        # The hand goes on where it stopped, takes all rows in its way to the table, and begins again at the end.
        while num_free < num_places:
            first = self._hand
            self._hand = last = min(first + SWEEP_ROWS, self._num_rows)
            waiting = (self._row_to_place[first:last] >= 0).nonzero().view(-1) + first
            places = self._row_to_place.index_select(0, waiting).long()
            self._write_table(waiting, [buffer.index_select(0, places) for buffer in self._buffer])
            self._row_to_place.index_fill_(0, waiting, -1)
            num_swept += last - first
            freed.append(places)
            num_free += places.numel()
            if self._hand == self._num_rows:
                self._hand = 0
        self._free_places = torch.cat(freed)
        if num_swept:
            # A page is read before some of its bytes are written. Next time, the hand is to find it there.
            coming = self._row_to_place[self._hand : self._hand + num_swept]
            self._ask_for((coming >= 0).nonzero().view(-1) + self._hand)
