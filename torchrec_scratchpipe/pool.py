# SPDX-License-Identifier: BSD-3-Clause
"""Holds what belongs together: tables of one row layout, their scratchpad, and the map between them."""

import logging
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.profiler import record_function

from torchrec_scratchpipe.device_slot_map import DeviceSlotMap
from torchrec_scratchpipe.errors import StageFailedError, TableOverwrittenError
from torchrec_scratchpipe.host_table import HostTable
from torchrec_scratchpipe.memory import STAGING_HEADROOM
from torchrec_scratchpipe.row_parts import write_rows
from torchrec_scratchpipe.scratchpad import Scratchpad
from torchrec_scratchpipe.slot_map import SlotMap
from torchrec_scratchpipe.snapshot import SnapshotStorage, TableSnapshot
from torchrec_scratchpipe.stats import DevicePoolCounters, HostPoolCounters, PoolStats
from torchrec_scratchpipe.types import RowLayout

__all__ = ["Pool", "Staging"]

logger: logging.Logger = logging.getLogger(__name__)

GROWTH_HEADROOM = 1.25  # a scratchpad that must grow grows by a quarter more than the batch needs
FLUSH_CHUNK_ROWS = 65536  # bounds what a flush needs beyond the tables: 16 MiB for rows of 64 floats


class Pool:
    """All scratchpad tables of one kernel group that share a row layout, and their scratchpad.

    Args:
        host_table: Every row.
        scratchpad: The rows that sit in a slot.
        slot_map: Which row sits in which slot.
        enlarge: Gives the scratchpad so many slots, or says why it cannot; None if it never can.
    """

    slot_map: Any  # SlotMap or DeviceSlotMap: whoever plans knows which
    counters: Any  # HostPoolCounters or DevicePoolCounters, accordingly

    def __init__(
        self,
        host_table: HostTable,
        scratchpad: Scratchpad,
        slot_map: SlotMap | DeviceSlotMap,
        enlarge: Callable[[int], str] | None = None,
    ) -> None:
        self.host_table = host_table
        self.scratchpad = scratchpad
        self.slot_map = slot_map
        if isinstance(slot_map, DeviceSlotMap):
            self.counters = DevicePoolCounters(host_table, slot_map.table_counts)
        else:
            self.counters = HostPoolCounters(host_table, scratchpad.num_slots, slot_map.device)
        self._enlarge = enlarge
        self.failure: str | None = None
        self.staging = Staging(host_table.layout, pin_memory=slot_map.device.type == "cuda")
        self._num_updates = 0
        self._num_updates_flushed = 0
        self._flushed_below = 0
        self._num_lowered_at_flush = 0

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
    def can_grow(self) -> bool:
        """Whether :meth:`grow` may give more slots, as far as is known."""
        return self._enlarge is not None

    def grow(self, num_needed: int, num_held: int) -> str:
        """Get slots for a batch that Train waits for, and that no other batch will let go of; only between the stages of two batches.

        Args:
            num_needed: Slots that the batch needs.
            num_held: Slots that other batches hold.

        Returns:
            Why there are not more; nothing if there are.
        """
        assert self._enlarge is not None, f"{self.name} cannot grow"
        num_rows = self.host_table.num_rows
        num_slots = min(num_rows, max(math.ceil(GROWTH_HEADROOM * num_needed), num_needed + num_held))
        before = self.scratchpad.num_slots
        with record_function("## scratchpipe grow ##"):
            reason = self._enlarge(num_slots)
        if reason:
            return reason
        self.slot_map.grow(num_slots)
        self.counters.add_growth(num_slots)
        logger.warning(
            "%s: one batch needs %s slots, the scratchpad had %s, of which %s were held, and has now %s. Set load_factor to at least %.4f "
            "to have so many from the beginning, and to more for batches that are planned ahead.",
            self.name,
            f"{num_needed:,}",
            f"{before:,}",
            f"{num_held:,}",
            f"{num_slots:,}",
            min(1.0, num_slots / num_rows + 5e-5),
        )
        return ""

    @property
    def is_flushed(self) -> bool:
        """Whether every row of the tables is up to date."""
        return self._num_updates == self._num_updates_flushed and self.host_table.is_drained

    def flush(self) -> None:
        """Copy every row that may be newer in the scratchpad back to its table; rows stay resident.

        Waits for the device. Does nothing when no batch has trained since the last flush.

        Raises:
            StageFailedError: An earlier stage failed half-way.
        """
        self.check_usable()
        # Read first: a batch that finishes its Train meanwhile must count as not flushed.
        num_updates, first_held = self._num_updates, self.slot_map.first_held
        if num_updates == self._num_updates_flushed:
            self.host_table.drain()
            return
        num_lowered = self.slot_map.num_lowered
        with record_function("## scratchpipe flush ##"):
            is_lowered = num_lowered != self._num_lowered_at_flush
            slots, rows = self.slot_map.resident_since(0 if is_lowered else self._flushed_below)
            for some_slots, some_rows in zip(
                slots.split(FLUSH_CHUNK_ROWS), rows.cpu().split(FLUSH_CHUNK_ROWS), strict=True
            ):
                values = [part.index_select(0, some_slots).cpu() for part in self.scratchpad.parts]
                self.host_table.write(some_rows, values)
            self.host_table.drain()
        self._num_updates_flushed = num_updates
        self._flushed_below = first_held
        self._num_lowered_at_flush = num_lowered

    def snapshot(self, storage: SnapshotStorage) -> TableSnapshot:
        """Flush, and keep all rows readable as they are now; see :meth:`HostTable.snapshot`.

        Args:
            storage: Where old values of rows that are written meanwhile go.

        Returns:
            To be read by the host table.
        """
        self.flush()
        return self.host_table.snapshot(storage)

    def purge(self) -> None:
        """Flush, and have resident rows read anew before anybody uses them (hazard 6): tables are about to be written.

        Empties the scratchpad, unless batches in flight rely on its rows. Waits for snapshots to be read. Does nothing if it has been
        done, and no stage has run since.
        """
        if self.is_flushed and self.host_table.is_marked_overwritten and not self.host_table.has_snapshots:
            return
        self.flush()
        if self.slot_map.num_batches_in_flight == 0:
            self.slot_map.purge()
        self.host_table.wait_for_snapshots()
        self.host_table.mark_overwritten()

    @property
    def is_overwritten(self) -> bool:
        """Whether tables were, or may have been, written by others since resident rows were last read."""
        return self.host_table.is_overwritten

    def refresh(self) -> None:
        """Read every resident row anew from its table.

        Raises:
            TableOverwrittenError: Some of them are newer in the scratchpad, and would be lost.
        """
        if self._num_updates != self._num_updates_flushed and not self.host_table.is_seen_overwritten:
            # Somebody was given the table in the middle of a step, by another thread or a hook: the step's rows are newer.
            self.flush()
        if self._num_updates != self._num_updates_flushed:
            raise TableOverwrittenError(
                f"{self.name}: a table was written, behind the back of PyTorch's operations or by another thread, while the scratchpad held newer "
                "rows of it. Take a state_dict() right before you write, or load one with load_state_dict()."
            )
        slots, rows = self.slot_map.resident_since(0)
        for some_slots, some_rows in zip(
            slots.split(FLUSH_CHUNK_ROWS), rows.cpu().split(FLUSH_CHUNK_ROWS), strict=True
        ):
            values = self.host_table.layout.empty(some_rows.numel())
            self.host_table.read(some_rows, values)
            write_rows(self.scratchpad.parts, some_slots, [value.to(self.slot_map.device) for value in values])

    def check_usable(self) -> None:
        """Raise if an earlier stage failed half-way, or if this process must not touch the tables.

        Raises:
            StageFailedError: With the first failure.
            TableStorageError: See :meth:`HostTable.check_process`.
        """
        self.host_table.check_process()
        if self.failure is not None:
            raise self.failure_error()

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
