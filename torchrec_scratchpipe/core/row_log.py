# SPDX-License-Identifier: BSD-3-Clause
"""Rows on a disk in the order in which they were written, so that scattered rows are written as one piece.

Shapes: ``N`` rows, ``W`` words of 8 bytes of a record, ``G`` segments.
"""

import errno
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from torchrec_scratchpipe.core.disk import LogFile
from torchrec_scratchpipe.core.disk_reads import Pieces
from torchrec_scratchpipe.core.rows import RowLayout

__all__ = ["SEGMENT_BYTES", "Records", "RowLog"]

SEGMENT_BYTES = 8 * 1024 * 1024
NUM_SPARE_SEGMENTS = 4  # that are not looked at when the log is said to be too empty


class Records:
    """Whole rows as they lie in a log: the row's number, then its parts, each beginning at a multiple of 8 bytes.

    Shapes: a record is [W] int64.
    """

    def __init__(self, layout: RowLayout) -> None:
        self._spans: list[tuple[int, int, torch.dtype]] = []
        end = 8
        for shape, dtype, _ in layout.part_shapes(1):
            num_bytes = torch.Size(shape).numel() * dtype.itemsize
            self._spans.append((end, num_bytes, dtype))
            end += -(-num_bytes // 8) * 8
        self.num_bytes = end

    def empty(self, num_rows: int) -> Tensor:
        """Uninitialised. Shapes: returns [num_rows, W] int64."""
        return torch.empty(num_rows, self.num_bytes // 8, dtype=torch.int64)

    def pack(self, rows: Tensor, values: Sequence[Tensor]) -> Tensor:
        """Make records. Shapes: `rows` [N] int64, `values` [N, D] or [N], returns [N, W] int64."""
        records = self.empty(rows.numel())
        records[:, 0] = rows
        for part, value in zip(self.unpack(records), values, strict=True):
            part.copy_(value)
        return records

    def unpack(self, records: Tensor) -> list[Tensor]:
        """The parts of records, as views. Shapes: `records` [N, W] int64, returns [N, D] or [N]."""
        values = records.view(torch.uint8)
        return [values[:, first : first + num_bytes].view(dtype).squeeze(1) for first, num_bytes, dtype in self._spans]


class RowLog:
    """A file of records in segments that are filled one after another; one that is nearly dead is filled again.

    A record is dead when its row was written anew, here or elsewhere; whoever knows says :meth:`forget`. At most about
    half of the records are dead: then :meth:`emptiest` names a segment to be written on.

    Raises OSError.
    """

    def __init__(self, records: Records, num_rows: int, open_file: Callable[[int], LogFile]) -> None:
        self._segment = max(1, min(SEGMENT_BYTES // records.num_bytes, num_rows))  # records of one
        self._record_bytes = records.num_bytes
        # Twice the rows, because half of the records are dead; positions are 31 bits.
        num_segments = min(2 * num_rows // self._segment + 2 * NUM_SPARE_SEGMENTS, (2**31 - 2) // self._segment)
        self._file = open_file(num_segments * self._segment * self._record_bytes)
        self._num_live = torch.zeros(num_segments, dtype=torch.int64)
        self._num_taken = 0  # segments that have space on the disk
        self._free: list[int] = []  # of them, those that have no records
        self._closed: list[int] = []  # and those that are full
        self._open: int | None = None
        self._num_in_open = 0
        self.num_opened = 0  # how often a segment began to be filled
        self._opened_at = torch.zeros(num_segments, dtype=torch.int64)  # of each segment, the last time
        self.num_bytes_written = 0

    @property
    def num_live(self) -> int:
        """Records that are not dead."""
        return int(self._num_live.sum())

    def append(self, records: Tensor) -> Tensor:
        """Write records, all or none. Shapes: `records` [N, W] int64, returns [N] int64, their positions.

        Raises OSError.
        """
        # 1. Space first, so that a full disk is noticed before anything has changed.
        num_left = 0 if self._open is None else self._segment - self._num_in_open
        while (len(records) - num_left) > self._segment * len(self._free):
            self._free.append(self._take())
        # 2. Segment by segment. What was written before an error is written again.
        was = self._open, self._num_in_open, list(self._free), list(self._closed)
        positions = []
        try:
            for some in self._pieces(records):
                assert self._open is not None
                first = self._open * self._segment + self._num_in_open
                self._file.write(first * self._record_bytes, some)
                self.num_bytes_written += some.nbytes
                self._num_in_open += len(some)
                positions.append(torch.arange(first, first + len(some)))
        except OSError:
            self._open, self._num_in_open, self._free, self._closed = was
            raise
        written = torch.cat(positions) if positions else torch.empty(0, dtype=torch.int64)
        self._count(written, 1)
        return written

    def forget(self, positions: Tensor) -> None:
        """Say that records are dead. Shapes: `positions` [N] int64."""
        self._count(positions, -1)

    def pieces(self, positions: Tensor) -> Pieces:
        """What to read for records. Shapes: `positions` [N] int64."""
        return Pieces(self._file.pieces, positions * self._record_bytes, self._record_bytes)

    def is_older(self, positions: Tensor, stamp: int) -> Tensor:
        """Whether the segment of a record has not begun to be filled since `num_opened` was `stamp`.

        Shapes: `positions` [N] int64, returns [N] bool.
        """
        return self._opened_at.index_select(0, positions // self._segment) <= stamp

    def emptiest(self) -> tuple[Tensor, Tensor] | None:
        """The segment with the fewest live records, if too few of the log are live: all its positions and records.

        Shapes: returns [N] int64, [N, W] int64. Raises OSError.
        """
        num_records = self._segment * (len(self._closed) - NUM_SPARE_SEGMENTS)
        if num_records <= 2 * self.num_live:
            return None
        segment = min(self._closed, key=self._num_live.tolist().__getitem__)
        first = segment * self._segment
        values = self._file.read(first * self._record_bytes, self._segment * self._record_bytes)
        return torch.arange(first, first + self._segment), values.view(torch.int64).view(self._segment, -1)

    def give_back_dead(self) -> None:
        """Fill segments again that have no live record."""
        num_live = self._num_live.tolist()
        self._free += [segment for segment in self._closed if num_live[segment] == 0]
        self._closed = [segment for segment in self._closed if num_live[segment] > 0]

    def _pieces(self, records: Tensor) -> Iterator[Tensor]:
        while len(records):
            if self._open is None or self._num_in_open == self._segment:
                self._closed += [] if self._open is None else [self._open]
                self._open, self._num_in_open = self._free.pop(0), 0
                self.num_opened += 1
                self._opened_at[self._open] = self.num_opened
            num_here = self._segment - self._num_in_open
            yield records[:num_here]
            records = records[num_here:]

    def _take(self) -> int:
        if self._num_taken == self._num_live.numel():
            raise OSError(errno.ENOSPC, "the log is full")
        num_bytes = self._segment * self._record_bytes
        self._file.reserve(self._num_taken * num_bytes, num_bytes)
        self._num_taken += 1
        return self._num_taken - 1

    def _count(self, positions: Tensor, change: int) -> None:
        self._num_live += change * torch.bincount(positions // self._segment, minlength=self._num_live.numel())
