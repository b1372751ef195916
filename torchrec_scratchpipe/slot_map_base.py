# SPDX-License-Identifier: BSD-3-Clause
"""What both slot maps share: the two maps, and on the host the holds of batches in flight.

Shapes: ``S`` slots, ``R`` rows, ``I`` ids, ``M`` misses, ``V`` victims, ``N`` any number.
"""

from collections import deque
from typing import Generic, TypeVar

import torch
from torch import Tensor

from torchrec_scratchpipe.eviction import WINDOW_BITS

__all__ = ["WINDOW_MASK", "BaseSlotMap", "SlotsHeldError", "all_but"]

WINDOW_MASK = (1 << WINDOW_BITS) - 1

Ids = TypeVar("Ids")  # what a batch looks up, in the form that the slot map takes


class SlotsHeldError(Exception):
    """Internal signal of a slot map's ``plan``: too few slots are free, and the maps are as before."""

    def __init__(self, num_needed: int, num_available: int) -> None:
        super().__init__(f"needs {num_needed} slots, {num_available} are free or may be evicted")
        self.num_needed = num_needed
        self.num_available = num_available


class BaseSlotMap(Generic[Ids]):
    """The two maps between rows and slots of one pool, and the holds of batches in flight.

    A slot is held while ``last_use >= first_held``, where `first_held` is the oldest batch
    that was planned and not yet released; held slots never become victims (hazards 1 and 3).

    A batch may be seen before it is planned: then the eviction order knows that it will use its rows. Each row carries
    one bit per batch that was seen, in its slot's entry of `uses_ahead`. While it has no slot, `row_to_slot` says
    ``-1 - (uses_ahead + (note << WINDOW_BITS))``, where the note is what the eviction order remembers of the row.

    Not thread-safe, except :meth:`release` and :meth:`forget`.

    Args:
        num_rows: R. Costs 4 bytes each.
        num_slots: S, at least 1. Costs 16 bytes each.
        device: Where the maps live.

    Source:
        ScratchPipe (ISCA 2022): Hit-Map and Hold mask.
    """

    def __init__(self, num_rows: int, num_slots: int, device: torch.device | None = None) -> None:
        assert 1 <= num_slots <= max(1, num_rows), f"{num_slots=} must lie in [1, {num_rows=}]"
        self.num_rows = num_rows
        self.num_slots = num_slots
        self.device = device or torch.device("cpu")
        self._row_to_slot = torch.full((num_rows,), -1, dtype=torch.int32, device=self.device)
        self._slot_to_row = torch.full((num_slots,), -1, dtype=torch.int64, device=self.device)
        self._last_use = torch.full((num_slots,), -1, dtype=torch.int32, device=self.device)
        self._uses_ahead = torch.zeros(num_slots + 1, dtype=torch.int32, device=self.device)
        self._next_batch = 1  # so that slots which nobody holds can have been used by an earlier batch, 0
        self._first_held = 1
        self.num_lowered = 0  # how often slots were made to look as if used earlier than they were
        self._newly_released: deque[int] = deque()
        self._released_early: set[int] = set()
        self._seen: deque[int] = deque()  # batches seen and not yet planned, in the order they were seen
        self._num_seen = 0
        self._newly_forgotten: deque[tuple[int, Ids]] = deque()

    def count_resident_rows(self) -> int:
        """Rows that sit in a slot now; waits for the device, if that is where they are counted."""
        return self.num_slots - self._free().numel()

    @property
    def next_batch(self) -> int:
        """The number that the next batch gets when it is planned."""
        return self._next_batch

    @property
    def first_held(self) -> int:
        """The oldest batch in flight; equal to the next batch to be planned when none is. Takes in releases."""
        while self._newly_released:
            batch_index = self._newly_released.popleft()
            if batch_index >= self._first_held:
                self._released_early.add(batch_index)
                self._let_go(batch_index)
        while self._first_held in self._released_early:
            self._released_early.remove(self._first_held)
            self._first_held += 1
        return self._first_held

    @property
    def num_batches_in_flight(self) -> int:
        """Batches planned and not yet released, counted from the oldest one that still holds."""
        return self._next_batch - self.first_held

    def see(self, ids: Ids) -> int | None:
        """Take note of what a batch will use, before it is planned; places and moves nothing.

        Args:
            ids: As for ``plan``.

        Returns:
            What ``plan`` or :meth:`forget` take for this batch; None if too many batches are seen already.
        """
        self._forget()
        if self._seen and self._num_seen - self._seen[0] >= WINDOW_BITS:
            return None
        seen = self._num_seen
        self._num_seen += 1
        self._seen.append(seen)
        self._mark_uses_ahead(ids, seen, is_used=True)
        return seen

    def forget(self, seen: int, ids: Ids) -> None:
        """Take back :meth:`see` of a batch that will not be planned; from any thread; nothing if it has been planned.

        Args:
            seen: What :meth:`see` returned.
            ids: As given to it.
        """
        self._newly_forgotten.append((seen, ids))

    def release(self, batch_index: int) -> None:
        """Let go of a batch's slots; may be called from any thread, in any order; a second call does nothing.

        Args:
            batch_index: As given by ``plan``.
        """
        self._newly_released.append(batch_index)

    def purge(self) -> None:
        """Empty every slot without writing anything back; no batch may be in flight."""
        assert self.num_batches_in_flight == 0, f"{self.num_batches_in_flight} batches in flight"
        occupied = (self._slot_to_row >= 0).nonzero().view(-1)
        self._row_to_slot.index_copy_(0, self.rows_in(occupied), self._absent_values(occupied))
        self._uses_ahead.zero_()
        self._slot_to_row.fill_(-1)
        self._last_use.fill_(-1)
        self._free_all()

    def grow(self, num_slots: int) -> None:
        """Add free slots behind those there are; only between the stages of two batches.

        Args:
            num_slots: S from now on, more than before.
        """
        assert self.num_slots < num_slots <= self.num_rows, (
            f"{num_slots=} must lie in ({self.num_slots}, {self.num_rows}]"
        )
        num_new = num_slots - self.num_slots
        self._slot_to_row = torch.cat([self._slot_to_row, self._slot_to_row.new_full((num_new,), -1)])
        self._last_use = torch.cat([self._last_use, self._last_use.new_full((num_new,), -1)])
        self._uses_ahead = torch.cat([self._uses_ahead[:-1], self._uses_ahead.new_zeros(num_new + 1)])
        self.num_slots = num_slots
        self._add_free(num_new)

    def resident_since(self, batch_index: int) -> tuple[Tensor, Tensor]:
        """Rows in slots that this batch or a later one uses; scans all slots.

        Nothing is said of slots that were used since, but lowered: where :attr:`num_lowered` has changed, ask for all.

        Args:
            batch_index: First batch of interest; 0 asks for all.

        Returns:
            [N] int64 slots and [N] int64 rows.
        """
        slots = (self._last_use >= batch_index).nonzero().view(-1)
        return slots, self.rows_in(slots)

    def rows_in(self, slots: Tensor) -> Tensor:
        """The rows that sit in these slots now.

        Args:
            slots: [N] int64.

        Returns:
            [N] int64, -1 for a free slot.
        """
        return self._slot_to_row.index_select(0, slots)

    def check_integrity(self) -> None:
        """Assert the laws of the maps; scans them, for tests.

        Raises:
            AssertionError: Naming the law and its numbers.
        """
        occupied = (self._slot_to_row >= 0).nonzero().view(-1)
        rows = self._slot_to_row[occupied]
        num_mapped = int((self._row_to_slot >= 0).sum())
        free_slots = self._free()
        num_free = free_slots.numel()
        assert num_free + occupied.numel() == self.num_slots, f"{num_free=} + {occupied.numel()=} != {self.num_slots=}"
        assert num_mapped == occupied.numel(), f"{num_mapped=} rows mapped, {occupied.numel()=} slots occupied"
        assert torch.equal(self._row_to_slot[rows].long(), occupied), "row_to_slot is not the inverse of slot_to_row"
        assert int((self._slot_to_row[free_slots] >= 0).sum()) == 0, "a free slot holds a row"
        assert free_slots.unique().numel() == num_free, "a slot is free twice"
        assert int((self._last_use[occupied] < 0).sum()) == 0, "an occupied slot was never used"
        outstanding = sum(1 << (seen % WINDOW_BITS) for seen in self._seen)
        absent = -1 - self._row_to_slot[self._row_to_slot < 0]
        uses_ahead = torch.cat([self._uses_ahead[: self.num_slots], absent & WINDOW_MASK])
        stray = int((uses_ahead & ~outstanding != 0).sum())
        assert stray == 0, f"{stray} slots or rows wait for a batch that is not ahead"

    def _free(self) -> Tensor:
        """[N] int64: slots without a row."""
        raise NotImplementedError

    def _add_free(self, num_new: int) -> None:
        """The last slots are new, and free."""
        raise NotImplementedError

    def _free_all(self) -> None:
        """All slots are without a row; forget what was known about them."""
        raise NotImplementedError

    def _absent_values(self, slots: Tensor) -> Tensor:
        """[N] int32: what `row_to_slot` says of the rows in these slots once they have left."""
        return -1 - self._uses_ahead.index_select(0, slots)

    def _take_back(
        self, miss_rows: Tensor, miss_slots: Tensor, freed: Tensor, victim_rows: Tensor, victim_slots: Tensor
    ) -> None:
        """Put both maps back as they were before a batch was placed; times of last use and free slots are the caller's.

        Args:
            miss_rows: [M] int64.
            miss_slots: [M] int64.
            freed: [M - V] int64, those of them that were free.
            victim_rows: [V] int64.
            victim_slots: [V] int64, the others.
        """
        known_of_victims = -1 - self._row_to_slot.index_select(0, victim_rows)
        self._row_to_slot.index_copy_(0, miss_rows, self._absent_values(miss_slots))
        self._slot_to_row.index_fill_(0, freed, -1)
        self._last_use.index_fill_(0, freed, -1)
        self._uses_ahead.index_fill_(0, freed, 0)
        self._uses_ahead.index_copy_(0, victim_slots, known_of_victims & WINDOW_MASK)
        self._row_to_slot.index_copy_(0, victim_rows, victim_slots.int())
        self._slot_to_row.index_copy_(0, victim_slots, victim_rows)

    def _let_go(self, batch_index: int) -> None:
        """A batch was released."""
        raise NotImplementedError

    def _mark_uses_ahead(self, ids: Ids, seen: int, *, is_used: bool) -> None:
        """Set, or clear, the bit of a batch that was seen, for all its rows."""
        raise NotImplementedError

    def _forget(self) -> None:
        while self._newly_forgotten:
            seen, ids = self._newly_forgotten.popleft()
            if seen in self._seen:
                self._seen.remove(seen)
                self._mark_uses_ahead(ids, seen, is_used=False)

    def _lower_all_but(self, is_held: Tensor, first_held: int) -> bool:
        """Free what is held for batches that were released after one that is still in flight.

        `first_held` stands at the oldest batch in flight, and holds the slots of every later one with it. This costs
        nothing while batches are released in order; where one stays behind (a loss that is kept and never
        sees a backward), its own slots must be told from the others.

        Args:
            is_held: [S] bool, slots that must stay.
            first_held: As it was when `is_held` was made.

        Returns:
            Whether there were any.
        """
        may_leave = (self._last_use >= first_held) & ~is_held
        if not bool(may_leave.any()):
            return False
        self._last_use[may_leave] = first_held - 1
        self.num_lowered += 1
        return True

    def _num_held(self, first_held: int) -> int:
        return int((self._last_use >= first_held).sum())


def all_but(seen: int) -> int:
    """A mask of all bits but that of a batch that was seen.

    Args:
        seen: What :meth:`BaseSlotMap.see` returned.

    Returns:
        The mask.
    """
    return ~(1 << (seen % WINDOW_BITS))
