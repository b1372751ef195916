# SPDX-License-Identifier: BSD-3-Clause
"""Rows of tables in files: read ahead of need, kept in RAM while they are used, and written in order.

Shapes: ``N`` rows, ``R`` rows of the tables, ``D`` row width.

A row is in one of three places: in RAM, in a log, or at home in its table (:mod:`.row_tier` knows which). Rows that a
coming batch will need are read ahead by another thread, while the worker moves rows about. So a value that was read
ahead may be old when it is needed (hazard 7). It is used only if its row is where it was, and that place has not been
written since; else the row is read again. Two stamps say so: one of the log's segments, one of all tables.
"""

import logging
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchrec_scratchpipe.core.disk import MappedStorage, page_ranges
from torchrec_scratchpipe.core.disk_reads import DiskReader, Pieces
from torchrec_scratchpipe.core.row_tier import HOME, RowTier
from torchrec_scratchpipe.core.rows import RowLayout, write_rows

__all__ = ["DiskCounts", "DiskRows", "RowsAhead"]

logger: logging.Logger = logging.getLogger(__name__)

MAX_ASKED_BYTES = 256 * 1024 * 1024  # of a piece of a table that somebody reads or writes in order


@dataclass
class DiskCounts:
    """What a table's disk did since construction."""

    num_rows_read: int = 0  # that were neither in the scratchpad nor in RAM
    num_pages_read: int = 0  # reads of the disk, of a page at most, but for neighbours; not those of the page cache
    num_pages_waited_for: int = 0  # of these, those that had not ended when their rows were needed
    num_bytes_written: int = 0  # to tables; those of the log are its own


@dataclass(eq=False)
class RowsAhead:
    """Rows that were read before they are needed."""

    rows: Tensor  # [N] int64, ascending
    where: Tensor  # [N] int64, where they were
    stamps: tuple[int, int]  # of tables and log, from before they were looked up
    values: list[Tensor]  # [N, D] or [N]
    num_reads: int
    is_late: bool = False  # somebody waited for them
    is_taken: bool = False


class DiskRows:
    """All rows of host tables whose parts lie in files, or some of whose parts do.

    Reading ahead is for one thread, all else for another. Raises OSError, and nothing is lost then.
    """

    def __init__(
        self,
        parts: Sequence[Tensor],
        layout: RowLayout,
        storage: MappedStorage,
        keep_old: Callable[[Tensor], None],
    ) -> None:
        self._parts = parts
        self._layout = layout
        self._storage = storage
        self._keep_old = keep_old
        self._files = [storage.file_of(part) for part in parts]
        self._reader = DiskReader()
        num_rows = parts[0].shape[0]
        storage.ram_budget.register(self, num_rows * layout.row_bytes)
        self.tier = RowTier(
            self._write_home,
            self._reader,
            layout,
            num_rows,
            lambda: storage.ram_budget.share_of(self),
            storage.open_log,
        )
        self.counts = DiskCounts()
        self._num_home_writes = 0
        self._is_settled = False  # whether all that was written home is on the disk, or on its way
        self._aheads: list[weakref.ref[RowsAhead]] = []  # a batch that is dropped takes its rows with it

    def read_ahead(self, rows: Tensor) -> RowsAhead:
        """Read rows that will be needed, unless they were read for an earlier batch, which will bring them.

        Shapes: `rows` [N] int64.
        """
        rows = rows.unique()
        aheads = [ahead for ref in self._aheads if (ahead := ref()) is not None and not ahead.is_taken]
        for ahead in aheads:
            rows = _without(rows, _find(ahead.rows, rows)[0])
        # In this order: a change between the first two makes these values count as old, and one after them, too.
        stamps = self._num_home_writes, self.tier.log_stamp
        where = self.tier.where(rows)
        on_disk = where < 0
        rows, where = rows[on_disk], where[on_disk]
        ahead = RowsAhead(rows, where, stamps, *self._read_disk(rows, where))
        self._aheads = [weakref.ref(other) for other in [*aheads, ahead]]
        return ahead

    def wait_for_rows(self, asked: "Future[RowsAhead]") -> RowsAhead | None:
        """Rows that were asked for, once they are there; none if they could not be read: :meth:`read` will say why."""
        is_late = not asked.done()
        try:
            ahead = asked.result()
        except Exception as error:  # whatever stops advice
            logger.debug("rows were not read ahead (%r)", error)
            return None
        ahead.is_late |= is_late
        return ahead

    def read(self, rows: Tensor, out: Sequence[Tensor], ahead: RowsAhead | None = None) -> None:
        """Copy rows out, of which some may have been read ahead.

        Shapes: `rows` [N] int64, `out` [N, D] or [N].
        """
        where = self.tier.where(rows)
        in_ram = (where >= 0).nonzero().view(-1)
        write_rows(out, in_ram, self.tier.read_ram(where.index_select(0, in_ram)))
        # 1. What was read ahead, and is as it was (hazard 7).
        missing = (where < 0).nonzero().view(-1)
        self.counts.num_rows_read += missing.numel()
        if ahead is not None:
            ahead.is_taken = True
            self.counts.num_pages_read += ahead.num_reads
            self.counts.num_pages_waited_for += ahead.num_reads if ahead.is_late else 0
            index, places = _find(ahead.rows, rows.index_select(0, missing))
            is_same = self._is_as_it_was(ahead, places, where.index_select(0, missing.index_select(0, index)))
            index, places = index[is_same], places[is_same]
            values = [value.index_select(0, places) for value in ahead.values]
            write_rows(out, missing.index_select(0, index), values)
            missing = _without(missing, index)
        # 2. The rest, now.
        if missing.numel():
            values, num_reads = self._read_disk(rows.index_select(0, missing), where.index_select(0, missing))
            self.counts.num_pages_read += num_reads
            self.counts.num_pages_waited_for += num_reads
            write_rows(out, missing, values)

    def ask_for(self, part_index: int, shown: Tensor) -> None:
        """Have a piece of a part brought into the page cache: to touch it page by page takes ten times as long.

        Not a piece that would push itself out again.
        """
        num_values = 1 + sum((size - 1) * stride for size, stride in zip(shown.shape, shown.stride(), strict=True))
        num_bytes = num_values * shown.dtype.itemsize
        if self._files[part_index] is not None and num_bytes <= MAX_ASKED_BYTES:
            self._storage.ask_for(shown.data_ptr(), num_bytes)

    def note_overwritten(self) -> None:
        """Take in that others may have written tables: what was read of them is old."""
        self.tier.forget_copies()
        self._note_home_write()

    def _note_home_write(self) -> None:
        self._num_home_writes += 1
        self._is_settled = False

    def _is_as_it_was(self, ahead: RowsAhead, places: Tensor, where: Tensor) -> Tensor:
        """Whether rows that were read ahead have the values they had. Shapes: `where` [N] int64, returns [N] bool."""
        num_home_writes, log_stamp = ahead.stamps
        is_same_place = ahead.where.index_select(0, places) == where
        is_home_same = num_home_writes == self._num_home_writes
        return is_same_place & torch.where(where == HOME, is_home_same, self.tier.is_older_in_log(where, log_stamp))

    def _read_disk(self, rows: Tensor, where: Tensor) -> tuple[list[Tensor], int]:
        """Read rows that are not in RAM; returns them and how many reads the disk had to do.

        Shapes: `rows`, `where` [N] int64, returns [N, D] or [N].
        """
        if not self._is_settled:  # else each read of a page that was written would have it written, and wait
            self._is_settled = True
            for file in self._files:
                if file is not None:
                    file.start_writing()
        at_home, in_log = ((where == HOME).nonzero().view(-1), (where < HOME).nonzero().view(-1))
        home_rows = rows.index_select(0, at_home)
        wanted = [
            Pieces(file, home_rows * part[:1].nbytes, part[:1].nbytes)
            for part, file in zip(self._parts, self._files, strict=True)
            if file is not None
        ]
        if in_log.numel():
            wanted.append(self.tier.pieces_of_log(where.index_select(0, in_log)))
        found, num_reads = self._reader.read(wanted)
        values = self._layout.empty(rows.numel())
        pieces = iter(found)
        for value, part, file in zip(values, self._parts, self._files, strict=True):
            if file is None:
                here = part.index_select(0, home_rows)
            else:
                here = next(pieces).view(part.dtype).view(-1, *part.shape[1:])
            write_rows([value], at_home, [here])
        if in_log.numel():
            write_rows(values, in_log, self.tier.unpack(next(pieces)))
        return values, num_reads

    def _write_home(self, rows: Tensor, values: Sequence[Tensor]) -> None:
        # Before a page is touched: one that cannot be read would end the process.
        mapped = [part for part, file in zip(self._parts, self._files, strict=True) if file is not None]
        ranges = np.concatenate([page_ranges(part, rows) for part in mapped])
        self._storage.bring_in(ranges)
        self._note_home_write()
        self.counts.num_bytes_written += rows.numel() * self._layout.row_bytes
        self._keep_old(rows)
        write_rows(self._parts, rows, values)


def _without(rows: Tensor, index: Tensor) -> Tensor:
    """All but some. Shapes: `rows` [N], `index` [K] int64, returns [N - K]."""
    is_left = torch.ones(len(rows), dtype=torch.bool)
    is_left[index] = False
    return rows[is_left]


def _find(ascending: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows are among others, and where they are there.

    Shapes: `ascending` [M] int64, `rows` [N] int64, returns [K] int64, [K] int64.
    """
    places = torch.searchsorted(ascending, rows)
    index = (places < len(ascending)).nonzero().view(-1)
    places = places.index_select(0, index)
    is_same = ascending.index_select(0, places) == rows.index_select(0, index)
    return index[is_same], places[is_same]
