# SPDX-License-Identifier: BSD-3-Clause
"""Rows of a table on a disk that have left the scratchpad: the newer ones in RAM, the older ones in a log.

Shapes: ``N`` rows, ``R`` rows of the table, ``P`` places in RAM, ``W`` words of a record.
"""

import errno
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchrec_scratchpipe.core.disk import LogFile
from torchrec_scratchpipe.core.disk_reads import DiskReader, Pieces
from torchrec_scratchpipe.core.row_log import Records, RowLog
from torchrec_scratchpipe.core.rows import RowLayout, write_rows

__all__ = ["RowTier"]

logger: logging.Logger = logging.getLogger(__name__)

HOME = -1  # where a row is: its place in RAM, or HOME, its table, or LOG minus its position in the log
LOG = -2
FREE = 0  # a place in RAM; else how often the hand will come by before the row leaves
NUM_PASSES = 2  # so rows leave nearly in the order in which they came
PLACE_BYTES = 6  # beside its record: when it leaves, whether it is a copy, and its number while it is free
MIN_SWEEP = 1024  # places that the hand looks at together
DRAIN_BYTES = 256 * 1024 * 1024  # of rows that are put into the order of the table together
SCAN_ROWS = 1 << 18  # of the table that are looked at together
PAGED_ROWS = 1 << 14  # whose pages are in RAM together: 64 MiB, if each has its own


class RowTier:
    """The newest values of rows that a table on a disk does not have yet.

    The scratchpad gives rows back at random places of the table. To write a row there is to read and to write a page of
    a disk, for 1/16 of its bytes. So rows stay in RAM first, where most are found again. Those that are not go to the
    end of a log, many as one piece. They go to their table only when somebody wants to see it (:meth:`drain`).

    Rows leave RAM in the order in which they came, or nearly: a hand goes round the places, and takes a row when it has
    come by for the last time. A row that goes up to the scratchpad again is not kept here (:meth:`forget`), so that
    together they have room for as many rows as both. A row that was brought to its table stays in RAM, as a copy.

    Costs 4 bytes per row of the table, and `ram_bytes`, which is asked when the first row comes.

    Raises OSError, or what `write_home` raises; then nothing is lost, and all may be tried again.
    """

    def __init__(
        self,
        write_home: Callable[[Tensor, Sequence[Tensor]], None],
        reader: DiskReader,
        layout: RowLayout,
        num_rows: int,
        ram_bytes: Callable[[], int],
        open_log: Callable[[int], LogFile],
    ) -> None:
        self._write_home = write_home
        self._reader = reader
        self._layout = layout
        self._num_rows = num_rows
        self._ram_bytes = ram_bytes
        self._open_log = open_log
        self._format = Records(layout)
        self._where = torch.full((num_rows,), HOME, dtype=torch.int32)
        self._records = self._format.empty(0)  # [P, W] int64
        self._states = torch.empty(0, dtype=torch.uint8)  # [P]
        self._is_copy = torch.empty(0, dtype=torch.bool)  # [P], whether the table has the same value
        self._num_newer = 0  # rows in RAM that the table does not have
        self._free_places = torch.empty(0, dtype=torch.int32)  # [P], of which the first so many are free
        self._num_free = 0
        self._hand = 0
        self._log: RowLog | None = None
        self._is_log_full = False
        self.num_passed_on = 0  # rows that left RAM, and were not there as copies

    def where(self, rows: Tensor) -> Tensor:
        """The place of each row in RAM, or `HOME`, or, below it, its place in the log; any thread may ask.

        Shapes: `rows` [N] int64, returns [N] int64.
        """
        return self._where.index_select(0, rows).long()

    def read_ram(self, where: Tensor) -> list[Tensor]:
        """Rows that are in RAM. Shapes: `where` [N] int64, returns [N, D] or [N]."""
        return self._format.unpack(self._records.index_select(0, where))

    @property
    def log_stamp(self) -> int:
        """Now; see :meth:`is_older_in_log`."""
        return 0 if self._log is None else self._log.num_opened

    def is_older_in_log(self, where: Tensor, stamp: int) -> Tensor:
        """Whether places in the log cannot have been given to other rows since a stamp; others are not.

        Shapes: `where` [N] int64, returns [N] bool.
        """
        if self._log is None:
            return torch.zeros_like(where, dtype=torch.bool)
        return (where <= LOG) & self._log.is_older((LOG - where).clamp(min=0), stamp)

    def pieces_of_log(self, where: Tensor) -> Pieces:
        """What to read of the log for rows that are there. Shapes: `where` [N] int64."""
        assert self._log is not None, "a row is in a log that does not exist"
        return self._log.pieces(LOG - where)

    def unpack(self, pieces: Tensor) -> list[Tensor]:
        """Rows that were read from the log. Shapes: `pieces` [N, bytes] uint8, returns [N, D] or [N]."""
        return self._format.unpack(pieces.view(torch.int64))

    @property
    def num_log_bytes_written(self) -> int:
        """All that was ever written to the log."""
        return 0 if self._log is None else self._log.num_bytes_written

    def make_room(self, num_rows: int) -> None:
        """Let so many rows be written without the disk, as far as there is RAM. Raises OSError."""
        if len(self._records) == 0:
            self._allocate()
        num_missing = min(num_rows, len(self._records)) - self._num_free
        if num_missing <= 0:
            return
        # 1. The hand goes on where it stopped.
        found: list[Tensor] = []
        while (num_wanted := num_missing - sum(map(len, found))) > 0:
            first, last = self._hand, min(self._hand + max(MIN_SWEEP, num_wanted), len(self._records))
            states = self._states[first:last]
            found.append((states == 1).nonzero().view(-1) + first)
            states -= (states > FREE).to(torch.uint8)
            self._hand = last % len(self._records)
        leaving = torch.cat(found)
        # 2. Whom it found leaves RAM.
        try:
            is_copy = self._is_copy.index_select(0, leaving)
            newer = leaving[~is_copy]
            self._pass_on(self._records.index_select(0, newer))
        except BaseException:
            self._states.index_fill_(0, leaving, 1)
            raise
        self._where.index_fill_(0, self._records[leaving[is_copy], 0], HOME)
        self._free(leaving)
        self._num_newer -= newer.numel()
        self.num_passed_on += newer.numel()
        # 3. Last, because all is in order whether the log can be read or not.
        self._clean_log()

    def write(self, rows: Tensor, values: Sequence[Tensor]) -> None:
        """Take rows in. Shapes: `rows` [N] int64, `values` [N, D] or [N]. Raises OSError."""
        first = 0
        while first < rows.numel():
            self.make_room(rows.numel() - first)
            last = first + len(self._records)
            self._write_some(rows[first:last], [value[first:last] for value in values])
            first = last

    @property
    def is_empty(self) -> bool:
        """Whether the table has everything."""
        return self._num_newer == 0 and (self._log is None or self._log.num_live == 0)

    def drain(self) -> None:
        """Bring everything to the table, in the order of its rows. Raises OSError."""
        if self.is_empty:
            return
        # No more beside the rows in RAM than they take themselves.
        num_together = max(1, min(DRAIN_BYTES // self._format.num_bytes, len(self._records)))
        waiting = torch.empty(0, dtype=torch.int64)
        for first in range(0, self._num_rows, SCAN_ROWS):
            where = self._where[first : first + SCAN_ROWS].long()
            is_newer = where <= LOG
            in_ram = (where >= 0).nonzero().view(-1)
            is_newer[in_ram] = ~self._is_copy.index_select(0, where.index_select(0, in_ram))
            found = is_newer.nonzero().view(-1) + first
            waiting = torch.cat([waiting, found])
            is_last = first + SCAN_ROWS >= self._num_rows
            while waiting.numel() >= num_together or (is_last and waiting.numel()):
                self._bring_home(waiting[:num_together])
                waiting = waiting[num_together:]

    def _bring_home(self, rows: Tensor) -> None:
        # 1. The log is read in its own order.
        values = self._layout.empty(rows.numel())
        for index in self.where(rows).argsort(descending=True).split(PAGED_ROWS):
            where = self.where(rows.index_select(0, index))
            in_ram = where >= 0
            write_rows(values, index[in_ram], self.read_ram(where[in_ram]))
            if not bool(in_ram.all()):
                (pieces,), _ = self._reader.read([self.pieces_of_log(where[~in_ram])])
                write_rows(values, index[~in_ram], self.unpack(pieces))
        # 2. The table is written in its own.
        for first in range(0, rows.numel(), PAGED_ROWS):
            last = first + PAGED_ROWS
            some = rows[first:last]
            self._write_home(some, [value[first:last] for value in values])
            where = self.where(some)
            self._num_newer -= int((where >= 0).sum())
            self._is_copy.index_fill_(0, where[where >= 0], True)
            self._forget_in_log(where)
            self._where.index_fill_(0, some[where <= LOG], HOME)

    def forget(self, rows: Tensor) -> None:
        """Rows are in the scratchpad now, which will write them, whatever becomes of them; touches no disk.

        Shapes: `rows` [N] int64.
        """
        where = self.where(rows)
        places = where[where >= 0]
        self._num_newer -= int((~self._is_copy.index_select(0, places)).sum())
        self._free(places)
        self._forget_in_log(where)
        self._where.index_fill_(0, rows, HOME)

    def forget_copies(self) -> None:
        """Somebody else may have written the table: what RAM has of it may be old."""
        places = (self._is_copy & (self._states != FREE)).nonzero().view(-1)
        self._where.index_fill_(0, self._records[places, 0], HOME)
        self._free(places)

    def _free(self, places: Tensor) -> None:
        self._states.index_fill_(0, places, FREE)
        self._free_places[self._num_free : self._num_free + len(places)] = places
        self._num_free += len(places)

    def _forget_in_log(self, where: Tensor) -> None:
        if self._log is not None:
            self._log.forget(LOG - where[where <= LOG])

    def _allocate(self) -> None:
        num_places = min(self._num_rows, max(1, self._ram_bytes() // (self._format.num_bytes + PLACE_BYTES)))
        self._records = self._format.empty(num_places)
        self._states = torch.full((num_places,), FREE, dtype=torch.uint8)
        self._is_copy = torch.zeros(num_places, dtype=torch.bool)
        self._free_places, self._num_free = torch.arange(num_places, dtype=torch.int32), num_places

    def _write_some(self, rows: Tensor, values: Sequence[Tensor]) -> None:
        # 1. A row that has a place keeps it; the others take free ones.
        where = self.where(rows)
        self._forget_in_log(where)
        new = (where < 0).nonzero().view(-1)
        self._num_newer += new.numel() + int(self._is_copy.index_select(0, where[where >= 0]).sum())
        where[new] = self._free_places[self._num_free - new.numel() : self._num_free].long()
        self._num_free -= new.numel()
        self._states.index_fill_(0, where, NUM_PASSES)
        # 2. Values go to their places.
        self._is_copy.index_fill_(0, where, False)
        self._records.index_copy_(0, where, self._format.pack(rows, values))
        self._where.index_copy_(0, rows, where.int())

    def _pass_on(self, records: Tensor) -> None:
        """Records that have no place in RAM any more go to the end of the log, or, where there is no space, home."""
        if not self._write_log(records):
            rows, order = records[:, 0].sort()
            values = self._format.unpack(records.index_select(0, order))
            for first in range(0, rows.numel(), PAGED_ROWS):
                last = first + PAGED_ROWS
                self._write_home(rows[first:last], [value[first:last] for value in values])
            self._where.index_fill_(0, rows, HOME)

    def _clean_log(self) -> None:
        """Write the live records of one segment anew, if too few of the log are live."""
        if self._log is not None and (found := self._log.emptiest()) is not None:
            positions, records = found
            is_live = self.where(records[:, 0]) == LOG - positions
            if self._write_log(records[is_live]):
                self._log.forget(positions[is_live])
                self._log.give_back_dead()

    def _write_log(self, records: Tensor) -> bool:
        """Whether there was space for it."""
        try:
            if self._log is None:
                self._log = RowLog(self._format, self._num_rows, self._open_log)
            positions = self._log.append(records)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            if not self._is_log_full:
                logger.warning(
                    "no space for a log of rows (%s): they are written to their places in the tables, which is slower. "
                    "Free space, or raise ram_budget_gb.",
                    error.strerror,
                )
            self._is_log_full = True
            return False
        self._where.index_copy_(0, records[:, 0].contiguous(), (LOG - positions).int())
        return True
