# SPDX-License-Identifier: BSD-3-Clause
"""Says which rows of a pool have changed from one moment to the next, and what they were at the later one.

Shapes: ``N`` rows, ``I`` ids, ``R`` rows of all tables of the pool, ``S`` slots.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from torchrec_scratchpipe.core.rows import RowLayout
from torchrec_scratchpipe.core.streams import StageStreams

__all__ = ["ChangedRows", "Changes", "Repeats", "TrainedRows", "Watcher"]

ROWS_READ_TOGETHER = 16384  # Train waits meanwhile, if it is about to change one of them: 4 MB of 64 floats, 2 ms


class ChangedRows(NamedTuple):
    """Some rows, each once, as they were when the latest interval ended."""

    rows: Tensor  # [N] int64, ascending, on the host
    values: list[Tensor]  # [N, D] or [N], on the host; in memory that the next rows are read into


class _Kept(NamedTuple):
    rows: Tensor  # [N] int64
    values: list[Tensor]  # [N, D] or [N]
    is_there: torch.Event | None


class Watcher(Protocol):
    """Who is told of rows of a pool before they change."""

    def will_train(self, rows: Tensor, slots: Tensor, parts: Sequence[Tensor]) -> None:
        """Rows in slots are about to change; on the current stream.

        Shapes: `rows` [I] int64 with repeats, -1 for ids of other pools, `slots` [I] int64, `parts` [S, D] or [S].
        """

    def will_write(self, rows: Tensor) -> None:
        """Rows are about to change, wherever they are; only between the stages of two batches.

        Shapes: `rows` [N] int64 on the host, each once.
        """

    def all_will_change(self) -> None:
        """All rows may be about to change; only between the stages of two batches."""


class Repeats:
    """Leaves out repeats of rows that sit in slots, without sorting; 4 bytes per slot."""

    def __init__(self, device: torch.device) -> None:
        self._order = torch.empty(0, dtype=torch.int32, device=device)

    def leave_out(self, rows: Tensor, slots: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
        """Shapes: `rows` and `slots` [N] int64."""
        if self._order.numel() < num_slots:
            self._order = torch.empty(num_slots, dtype=torch.int32, device=self._order.device)
        # Of all that write their number to one slot, one is the last.
        numbers = torch.arange(rows.numel(), dtype=torch.int32, device=self._order.device)
        self._order[slots] = numbers
        is_last = self._order[slots] == numbers
        return rows[is_last], slots[is_last]


class Changes:
    """Which rows of a pool change, in successive intervals.

    :meth:`cut` ends an interval; the rows that changed in it are read afterwards (:meth:`read`), some at a time, while
    the next interval goes on. Hazard 9: a row must be read as it was when its interval ended. So a row that is about to
    change and is still to be read is kept first. Nobody waits for more than ``ROWS_READ_TOGETHER`` rows to be read, and
    no table is scanned.

    Where a row is does not matter: it moves between scratchpad and table without changing.

    Costs 2 bytes per row and 4 bytes per slot, on the device of the slot map; and, on the host, what is kept until it
    is read.
    """

    def __init__(
        self,
        num_rows: int,
        layout: RowLayout,
        device: torch.device,
        streams: StageStreams,
        read_rows: Callable[[Tensor, list[Tensor] | None], list[Tensor]],
    ) -> None:
        # One more than there are rows: id -1, of another pool, is the last.
        self._changed, self._to_read = (torch.zeros(num_rows + 1, dtype=torch.bool, device=device) for _ in range(2))
        self._device = device
        self._streams = streams
        self._read_rows = read_rows  # wherever they are; only between the stages of two batches
        self._buffer = layout.empty(ROWS_READ_TOGETHER)  # fresh memory for each would cost as much as the reading
        self._repeats = Repeats(device)
        self._kept: deque[_Kept] = deque()
        self._lock = threading.Lock()  # whoever looks at `_to_read`, until what it says has been done
        self._is_reading = False
        self._have_all_changed = False
        self._rows_of_interval: list[Tensor] = []  # what is, or was, to be read
        self._latest_keep: torch.Event | None = None

    def will_train(self, rows: Tensor, slots: Tensor, parts: Sequence[Tensor]) -> None:
        """See :class:`Watcher`."""
        with self._lock:
            if self._is_reading:
                is_due = self._to_read[rows]
                rows_due, slots_due = self._repeats.leave_out(rows[is_due], slots[is_due], parts[0].shape[0])
                if rows_due.numel():
                    self._keep(rows_due, [part.index_select(0, slots_due) for part in parts])
            if not self._have_all_changed:
                self._changed.index_fill_(0, rows, True)

    def will_write(self, rows: Tensor) -> None:
        """See :class:`Watcher`."""
        with self._lock:
            if self._is_reading:
                rows_due = rows[self._to_read[rows.to(self._device)].cpu()]
                if rows_due.numel():
                    self._keep(rows_due, self._read_rows(rows_due, None))
            self._changed.index_fill_(0, rows.to(self._device), True)

    def all_will_change(self) -> None:
        """See :class:`Watcher`."""
        with self._lock:
            if self._is_reading:
                self._streams.wait(None, self._latest_keep)
                for rows in self._rows_to_read().cpu().split(ROWS_READ_TOGETHER):
                    self._keep(rows, self._read_rows(rows, None))
            if not self._have_all_changed:
                self._changed.fill_(True)
                self._have_all_changed = True

    def forget(self) -> None:
        """Begin anew: no row has changed."""
        with self._lock:
            assert not self._is_reading, "the rows of an interval are being read"
            self._changed.zero_()
            self._have_all_changed = False

    def cut(self) -> None:
        """End an interval; only between two Trains, and when that before it has been read."""
        with self._lock:
            assert not self._is_reading, "the rows of the interval before have not been read"
            self._changed, self._to_read = self._to_read, self._changed
            self._to_read[-1] = False
            self._is_reading = True
            self._have_all_changed = False
            self._rows_of_interval = []

    def take_back(self) -> None:
        """Have the rows of the latest :meth:`cut` among those of the next, because they were not read to the end.

        Only between the stages of two batches.
        """
        with self._lock:
            self._is_reading = False
            self._kept.clear()
            self._rows_of_interval.append(self._rows_to_read())
            self._to_read.zero_()
        self.take_in(self._rows_of_interval)

    def take_in(self, rows_of_interval: list[Tensor]) -> None:
        """Have the rows of an earlier interval among those of the present one. Shapes: `rows_of_interval` [N] int64."""
        with self._lock:
            for rows in rows_of_interval:
                self._changed.index_fill_(0, rows, True)

    @property
    def rows_of_interval(self) -> list[Tensor]:
        """What the latest :meth:`cut` has ended, for :meth:`take_in`; once it is read."""
        return self._rows_of_interval

    def read(self, between_batches: Callable[[], AbstractContextManager[None]]) -> Iterator[ChangedRows]:
        """Read the rows of the interval that :meth:`cut` has ended, each once; on any thread.

        Raises TableStorageError.
        """
        with self._looking(between_batches):
            all_rows = self._rows_to_read()
            self._rows_of_interval.append(all_rows)
        for some_rows in all_rows.split(ROWS_READ_TOGETHER):
            yield from self._take_kept()
            with self._looking(between_batches):
                rows = some_rows[self._to_read.index_select(0, some_rows)]  # some were kept since
                host_rows = rows.cpu()
                values = self._read_rows(host_rows, [part[: host_rows.numel()] for part in self._buffer])
                self._to_read.index_fill_(0, rows, False)
            if host_rows.numel():
                yield ChangedRows(host_rows, values)
        with self._lock:
            self._is_reading = False
        yield from self._take_kept()

    @contextmanager
    def _looking(self, between_batches: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        with between_batches(), self._lock:
            self._streams.wait(None, self._latest_keep)
            yield

    def _take_kept(self) -> Iterator[ChangedRows]:
        while self._kept:
            kept = self._kept.popleft()
            self._streams.wait(None, kept.is_there)
            rows, order = kept.rows.cpu().sort()
            yield ChangedRows(rows, [value.cpu().index_select(0, order) for value in kept.values])

    def _rows_to_read(self) -> Tensor:
        """[N] int64, ascending."""
        marks = self._to_read[:-1]
        if marks.device.type == "cpu":  # three times as fast as torch's, where few are set
            return torch.from_numpy(np.flatnonzero(marks.numpy()))
        return marks.nonzero().view(-1)

    def _keep(self, rows: Tensor, values: list[Tensor]) -> None:
        rows = rows.to(self._device)
        self._to_read.index_fill_(0, rows, False)
        self._rows_of_interval.append(rows)
        self._latest_keep = self._streams.record(None)
        self._kept.append(_Kept(rows, values, self._latest_keep))


class TrainedRows:
    """Which rows trained since they were last taken; and what a part of them was before their first, or last, Train.

    Costs 1 byte per row on the device of the slot map, and there what is remembered; of the last Train, a number per
    row.

    Args:
        num_rows: R.
        device: Of the slot map.
        remember: Makes of a part of some rows what is to be remembered; None: nothing is.
        is_first: Whether that is of the first Train, or of the last.
    """

    def __init__(
        self,
        num_rows: int,
        device: torch.device,
        remember: Callable[[Sequence[Tensor], Tensor], Tensor] | None,
        *,
        is_first: bool,
    ) -> None:
        self._has_trained = torch.zeros(num_rows + 1, dtype=torch.bool, device=device)  # see Changes
        self._remember = remember
        self._is_first = is_first
        self._repeats = Repeats(device)
        self._first: list[tuple[Tensor, Tensor]] = []
        self._last = torch.zeros(0 if is_first else num_rows, dtype=torch.float32, device=device)
        self._lock = threading.Lock()

    def will_train(self, rows: Tensor, slots: Tensor, parts: Sequence[Tensor]) -> None:
        """See :class:`Watcher`."""
        with self._lock:
            if self._remember is not None:
                is_due = rows >= 0
                if self._is_first:
                    is_due &= ~self._has_trained[rows]
                due, slots_due = self._repeats.leave_out(rows[is_due], slots[is_due], parts[0].shape[0])
                values = self._remember(parts, slots_due)
                if self._is_first:
                    self._first.append((due, values))
                else:
                    self._last.index_copy_(0, due, values)
            self._has_trained.index_fill_(0, rows, True)

    def will_write(self, rows: Tensor) -> None:
        """See :class:`Watcher`: rows that are written are not trained."""

    def all_will_change(self) -> None:
        """See :class:`Watcher`: rows that are written are not trained."""

    def take(self) -> tuple[Tensor, Tensor | None]:
        """The rows, [N] int64, ascending, and what was remembered, [N, ...]; begins anew. Waits for the device."""
        with self._lock:
            rows = self._has_trained[:-1].nonzero().view(-1)
            self._has_trained.zero_()
            first, self._first = self._first, []
            if self._remember is None:
                return rows, None
            if not self._is_first:
                return rows, self._last.index_select(0, rows)
        if not first:
            return rows, None
        order = torch.cat([some for some, _ in first]).argsort()
        return rows, torch.cat([values for _, values in first]).index_select(0, order)
