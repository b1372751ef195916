# SPDX-License-Identifier: BSD-3-Clause
"""Holds what belongs together: tables of one row layout, their scratchpad, and the map between them."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.profiler import record_function

from torchrec_scratchpipe.core.changes import Changes, Repeats, Watcher
from torchrec_scratchpipe.core.host_table import HostTable
from torchrec_scratchpipe.core.late import LateUpdates
from torchrec_scratchpipe.core.rows import RowLayout, read_rows, write_rows
from torchrec_scratchpipe.core.scratchpad import Scratchpad
from torchrec_scratchpipe.core.slot_map import CachePlan, SlotMap, SlotsHeldError
from torchrec_scratchpipe.core.snapshot import SnapshotStorage, TableSnapshot
from torchrec_scratchpipe.core.stats import PoolCounters, PoolStats
from torchrec_scratchpipe.core.streams import StageStreams
from torchrec_scratchpipe.errors import ScratchpadFullError, StageFailedError, TableOverwrittenError

__all__ = ["STAGING_HEADROOM", "Pool", "Staging"]

logger: logging.Logger = logging.getLogger(__name__)

STAGING_HEADROOM = 1.25  # Staging is this much larger than the first batch needs, so that later batches fit too.
GROWTH_HEADROOM = 1.25  # a scratchpad that must grow grows by a quarter more than the batch needs
FLUSH_CHUNK_ROWS = 65536  # bounds what a flush needs beyond the tables: 16 MiB for rows of 64 floats


class Pool:
    """All scratchpad tables of one kernel group that share a row layout, and their scratchpad."""

    def __init__(
        self,
        host_table: HostTable,
        scratchpad: Scratchpad,
        slot_map: SlotMap,
        enlarge: Callable[[int], str] | None = None,
    ) -> None:
        self.host_table = host_table
        self.scratchpad = scratchpad
        self.slot_map = slot_map
        self.counters = PoolCounters(host_table, slot_map.table_counts)
        self._enlarge = enlarge
        self.failure: str | None = None
        self.load_failure: str | None = None  # why tables are loaded in part
        self.changes: Changes | None = None  # if somebody logs deltas
        self.watchers: list[Watcher] = []  # who else wants to know of rows before they change
        self.late: LateUpdates | None = None  # if rows get updates of steps in which nobody looks them up
        self._repeats = Repeats(slot_map.device)
        self._may_be_written_unseen = False  # until resident rows are read anew
        self.staging = Staging(host_table.layout, pin_memory=slot_map.device.type == "cuda")
        self._num_updates = 0
        self._num_updates_flushed = 0
        self._flushed_below = 0
        self._num_early_frees_at_flush = 0

    @property
    def name(self) -> str:
        """The pool, as error messages call it."""
        tables = self.host_table.tables
        what = f"table {tables[0].name}" if len(tables) == 1 else f"{len(tables)} tables"
        return f"pool of {what} (dim {self.host_table.layout.dim})"

    def note_update(self) -> None:
        """A batch has trained: its rows are newer in the scratchpad than in the table."""
        self._num_updates += 1

    @property
    def is_any_late(self) -> bool:
        """Whether a row may be still to get updates."""
        return self.late is not None and self.late.is_any_due

    def catch_up(self, plan: CachePlan) -> None:
        """Give a batch's rows the updates that they are to get late, in their slots, before a lookup (hazard 10)."""
        if self.late is None or not self.late.is_any_due:
            return
        rows, slots = plan.buffers.rows[: plan.num_ids], plan.slots[: plan.num_ids]
        is_own = rows >= 0
        rows, slots = self._repeats.leave_out(rows[is_own], slots[is_own], self.scratchpad.num_slots)
        due = self.late.take(rows)
        if due is not None:
            self.scratchpad.parts[0].data.index_add_(0, slots, due)
            self.note_update()

    def catch_up_all(self) -> None:
        """Give all rows the updates that they are to get late, before somebody sees them (hazard 10).

        Reads and writes whole tables. Only between the stages of two batches.

        Raises TableStorageError.
        """
        if self.late is None or not self.late.is_any_due:
            return
        with record_function("## scratchpipe catch up ##"):
            for first in range(0, self.host_table.num_rows, FLUSH_CHUNK_ROWS):
                rows = torch.arange(first, min(self.host_table.num_rows, first + FLUSH_CHUNK_ROWS), dtype=torch.int64)
                due = self.late.take(rows.to(self.slot_map.device))
                if due is not None:
                    values = self.read_some(rows)
                    values[0] += due.cpu()
                    self.write_some(rows, values)
            self.late.note_all_taken()

    def will_update(self, plan: CachePlan) -> None:
        """Train of a batch is about to update its rows (hazards 9 and 10)."""
        if self.late is not None:
            self.late.check_may_train()
        for watcher in self._all_watchers:
            rows, slots = plan.buffers.rows[: plan.num_ids], plan.slots[: plan.num_ids]
            watcher.will_train(rows, slots, self.scratchpad.parts)

    @property
    def _all_watchers(self) -> list[Watcher]:
        return self.watchers if self.changes is None else [self.changes, *self.watchers]

    def watch_changes(self, streams: StageStreams) -> None:
        """Note which rows change from now on; only between the stages of two batches, when tables are not overwritten.

        See :class:`Changes`.
        """
        if self.changes is None:
            self.changes = Changes(
                self.host_table.num_rows, self.host_table.layout, self.slot_map.device, streams, self.read_some
            )
        self.changes.forget()

    @property
    def can_grow(self) -> bool:
        """Whether :meth:`grow` may give more slots, as far as is known."""
        return self._enlarge is not None

    def grow(self, held: SlotsHeldError) -> None:
        """Get slots for a batch that Train waits for, and that no other batch will let go of.

        Only between the stages of two batches.

        Raises ScratchpadFullError.
        """
        if self._enlarge is None:
            raise self._full_error(held, "")
        num_rows, before = self.host_table.num_rows, self.scratchpad.num_slots
        num_held = before - held.num_available
        # Enough for this batch beside all that is held, and some more, so that the next one need not grow again.
        num_slots = min(num_rows, max(math.ceil(GROWTH_HEADROOM * held.num_needed), held.num_needed + num_held))
        with record_function("## scratchpipe grow ##"):
            reason = self._enlarge(num_slots)
        if reason:
            raise self._full_error(held, f", and {reason}")
        self.slot_map.grow(num_slots)
        self.counters.num_growths += 1
        logger.warning(
            "%s: one batch needs %s slots, the scratchpad had %s, of which %s were held, and has now %s. Set "
            "load_factor to at least %.4f to have so many from the beginning, and to more for batches that are "
            "planned ahead.",
            self.name,
            f"{held.num_needed:,}",
            f"{before:,}",
            f"{num_held:,}",
            f"{num_slots:,}",
            min(1.0, num_slots / num_rows + 5e-5),
        )

    def _full_error(self, held: SlotsHeldError, why_not_more: str) -> ScratchpadFullError:
        num_slots, num_rows = self.scratchpad.num_slots, self.host_table.num_rows
        if held.num_needed > num_slots:
            return ScratchpadFullError(
                f"{self.name}: one batch needs {held.num_needed:,} slots, the scratchpad has "
                f"{num_slots:,}{why_not_more}. Raise load_factor to at least "
                f"{min(1.0, held.num_needed / num_rows + 5e-5):.4f}, or lower the batch size."
            )
        return ScratchpadFullError(
            f"{self.name}: a batch needs {held.num_needed:,} slots, the scratchpad has {num_slots:,}, and all but "
            f"{held.num_available:,} are held by batches since the oldest one in flight{why_not_more}. Let those train "
            "first, lower lookahead, raise load_factor, or drop results whose backward will never run: they keep "
            "their batch in flight."
        )

    @property
    def is_flushed(self) -> bool:
        """Whether every row of the tables is up to date."""
        return self._num_updates == self._num_updates_flushed and self.host_table.is_drained

    def flush(self) -> None:
        """Copy every row that may be newer in the scratchpad back to its table; rows stay resident.

        Waits for the device. Does nothing when no batch has trained since the last flush.

        Raises StageFailedError.
        """
        self.check_usable()
        # Read first: a batch that finishes its Train meanwhile must count as not flushed.
        num_updates = self._num_updates
        self.slot_map.take_in_releases()
        first_held = self.slot_map.first_held
        if num_updates == self._num_updates_flushed:
            self.host_table.drain()
            return
        num_early_frees = self.slot_map.num_early_frees
        with record_function("## scratchpipe flush ##"):
            # A slot that was freed early may hold a row that is newer than its table, and looks as if it was used long
            # ago.
            is_any_freed_early = num_early_frees != self._num_early_frees_at_flush
            slots, rows = self.slot_map.resident_since(0 if is_any_freed_early else self._flushed_below)
            for some_slots, some_rows in zip(
                slots.split(FLUSH_CHUNK_ROWS), rows.cpu().split(FLUSH_CHUNK_ROWS), strict=True
            ):
                values = [part.index_select(0, some_slots).cpu() for part in self.scratchpad.parts]
                self.host_table.write(some_rows, values)
            self.host_table.drain()
        # Slots that no batch has used since `first_held` need not be looked at next time.
        self._num_updates_flushed = num_updates
        self._flushed_below = first_held
        self._num_early_frees_at_flush = num_early_frees

    def snapshot(self, storage: SnapshotStorage) -> TableSnapshot:
        """Flush, and keep all rows readable as they are now; see :meth:`HostTable.snapshot`."""
        self.flush()
        return self.host_table.snapshot(storage)

    def purge(self) -> None:
        """Flush, and have resident rows read anew before anybody uses them (hazard 6): tables are about to be written.

        Empties the scratchpad, unless batches in flight rely on its rows. Waits for snapshots to be read. Does nothing
        if it has been done, and no stage has run since.
        """
        self._may_be_written_unseen = True
        for watcher in self._all_watchers:
            watcher.all_will_change()
        if self.is_flushed and self.host_table.is_marked_overwritten and not self.host_table.has_snapshots:
            return
        self.flush()
        # Rows of batches in flight must keep their slots. They are read anew instead.
        if self.slot_map.num_batches_in_flight == 0:
            self.slot_map.purge()
        self.host_table.wait_for_snapshots()
        self.host_table.mark_overwritten()

    @property
    def is_overwritten(self) -> bool:
        """Whether tables were, or may have been, written by others since resident rows were last read."""
        return self.host_table.is_overwritten

    @property
    def may_be_written(self) -> bool:
        """Whether others have written tables, or were told that they may, since resident rows were last read."""
        table = self.host_table
        return self._may_be_written_unseen or table.is_seen_overwritten or table.lent.is_any_lent

    def reread(self) -> None:
        """As :meth:`refresh`; others may go on to write before the next batch. Raises TableOverwrittenError."""
        self.refresh()
        self._may_be_written_unseen = True

    def refresh(self) -> None:
        """Read every resident row anew from its table. Raises TableOverwrittenError or StageFailedError."""
        self.check_usable()
        if self.may_be_written:
            for watcher in self._all_watchers:
                watcher.all_will_change()
        self._may_be_written_unseen = False
        if self._num_updates != self._num_updates_flushed and not self.host_table.is_seen_overwritten:
            # Somebody was given the table in the middle of a step, by another thread or a hook: the step's rows are
            # newer.
            self.flush()
        if self._num_updates != self._num_updates_flushed:
            raise TableOverwrittenError(
                f"{self.name}: a table was written, behind the back of PyTorch's operations or by another thread, "
                "while the scratchpad held newer rows of it. Take a state_dict() right before you write, or load one "
                "with load_state_dict()."
            )
        slots, rows = self.slot_map.resident_since(0)
        for some_slots, some_rows in zip(
            slots.split(FLUSH_CHUNK_ROWS), rows.cpu().split(FLUSH_CHUNK_ROWS), strict=True
        ):
            values = self.host_table.layout.empty(some_rows.numel())
            self.host_table.read(some_rows, values)
            write_rows(self.scratchpad.parts, some_slots, [value.to(self.slot_map.device) for value in values])

    def read_some(self, rows: Tensor, out: list[Tensor] | None = None) -> list[Tensor]:
        """Some rows as they are now, wherever they are; only between the stages of two batches.

        Shapes: `rows` [N] int64 on the host, `out` and returns [N, D] or [N] on the host. Raises TableStorageError.
        """
        if out is None:
            out = self.host_table.layout.empty(rows.numel())
        slots = self._find_slots(rows)
        is_absent = (slots < 0).cpu()
        # All of them from slots, in one pass: most are there. What that gives an absent row is overwritten.
        read_rows(self.scratchpad.parts, slots.clamp(min=0), out)
        if is_absent.any():
            absent_rows = rows[is_absent]
            absent = self.host_table.layout.empty(absent_rows.numel())
            self.host_table.read(absent_rows, absent)
            write_rows(out, is_absent.nonzero().view(-1), absent)
        return out

    def write_some(self, rows: Tensor, values: Sequence[Tensor]) -> None:
        """Write some rows wherever they are (hazard 8); only between the stages of two batches.

        The Train that comes next has them, and so has every later one, whether its batch is planned already or not.

        Shapes: `rows` [N] int64 on the host, each once, `values` [N, D] or [N] on the host. Raises TableStorageError.
        """
        for watcher in self._all_watchers:
            watcher.will_write(rows)
        # The table first: its disk may fail, and then nothing has changed. It keeps what snapshots are to show.
        self.host_table.write(rows, values)
        slots = self._find_slots(rows)
        is_resident = slots >= 0
        is_resident_host = is_resident.cpu()
        resident = [value[is_resident_host].to(self.slot_map.device) for value in values]
        write_rows(self.scratchpad.parts, slots[is_resident], resident)

    def _find_slots(self, rows: Tensor) -> Tensor:
        """Where rows sit, [N] int64 on the device; -1: in no slot."""
        return self.slot_map.maps.row_to_slot.index_select(0, rows.to(self.slot_map.device)).long()

    def check_usable(self) -> None:
        """Raise if an earlier stage or load failed half-way, or if this process must not touch the tables.

        Raises StageFailedError or TableStorageError.
        """
        self.host_table.check_process()
        if self.failure is not None:
            raise self.failure_error()
        if self.load_failure is not None:
            raise StageFailedError(
                f"{self.name}: a load failed half-way ({self.load_failure}). Some rows are of the checkpoint, others "
                "are not; whole tables are needed. Load another step into this model, or the same one when its "
                "files are whole."
            )

    @contextmanager
    def failing_for_good(self, what: str) -> Iterator[None]:
        """While entered, an exception leaves rows incomplete, so that the pool is not usable any more.

        Raises StageFailedError.
        """
        try:
            yield
        except BaseException as error:
            self.failure = f"{what} ({error!r})"
            raise self.failure_error() from error

    def failure_error(self) -> StageFailedError:
        """The first failure, and what to do about it."""
        return StageFailedError(
            f"{self.name}: {self.failure}. Its rows are incomplete; build the model anew and load a checkpoint."
        )

    def stats(self) -> PoolStats:
        """All counts of this pool; waits for the device."""
        return self.counters.stats(self.scratchpad.num_slots, self.slot_map.count_resident_rows())


class Staging:
    """Host memory that rows pass through, as much in either direction, grown to the largest batch and reused by all."""

    def __init__(self, layout: RowLayout, pin_memory: bool) -> None:
        self._layout = layout
        self._pin_memory = pin_memory
        self._buffers: dict[str, list[Tensor]] = {}
        self._capacity = 256

    def take(self, purpose: str, num_rows: int) -> list[Tensor]:
        """Room for `num_rows` rows, valid until the next call with the same purpose."""
        buffer = self._buffers.get(purpose)
        if buffer is None or buffer[0].shape[0] < num_rows:
            if num_rows > self._capacity:
                self._capacity = math.ceil(STAGING_HEADROOM * num_rows)
            buffer = self._layout.empty(self._capacity, pin_memory=self._pin_memory)
            self._buffers[purpose] = buffer
        return [part[:num_rows] for part in buffer]
