# SPDX-License-Identifier: BSD-3-Clause
"""Decides which row sits in which slot: integers only, no row data is touched here.

Shapes: ``I`` ids, ``U`` unique rows, ``M`` misses, ``V`` victims, ``S`` slots, ``R`` rows.
"""

from collections import deque
from typing import Protocol

import torch
from torch import Tensor

from torchrec_scratchpipe.types import CachePlan

__all__ = ["EvictionOrder", "LeastRecentlyUsed", "SlotMap", "SlotsHeldError"]


class SlotsHeldError(Exception):
    """Internal signal of :meth:`SlotMap.plan`: too few slots are free, and the maps are as before."""

    def __init__(self, num_needed: int, num_available: int) -> None:
        super().__init__(f"needs {num_needed} slots, {num_available} are free or may be evicted")
        self.num_needed = num_needed
        self.num_available = num_available


class EvictionOrder(Protocol):
    """In which order slots that are not held become victims; it decides traffic, never correctness."""

    def used(self, slots: Tensor, batch_index: int, last_use: Tensor) -> None:
        """Note that a batch uses these slots.

        Args:
            slots: [U] int64, unique.
            batch_index: The batch that `last_use` now shows for them.
            last_use: [S] int32, as for :meth:`choose`.
        """

    def choose(self, num_victims: int, last_use: Tensor, first_held: int) -> Tensor:
        """Choose victims; the maps do not change, records of uses that no longer count may go.

        Args:
            num_victims: How many are wanted.
            last_use: [S] int32, newest batch known to use each slot, -1 for a free slot.
            first_held: Slots with `last_use >= first_held` must not be chosen.

        Returns:
            [<= num_victims] int64, unique occupied slots that are not held; fewer if there are no more.
        """

    def purge(self) -> None:
        """Forget every use."""


class LeastRecentlyUsed:
    """Smallest `last_use` first, exactly, without scanning the slots for each batch.

    Each batch leaves the list of slots that it used. A use is live while no later batch used the slot, so the live uses
    of the oldest list are the least recently used slots. Dead uses are dropped when met, and all at once when they
    outnumber the slots, which costs O(1) per use.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._uses: deque[tuple[int, Tensor]] = deque()
        self._num_uses = 0
        self._compact_above = 2 * num_slots

    def used(self, slots: Tensor, batch_index: int, last_use: Tensor) -> None:
        """See :class:`EvictionOrder`."""
        if slots.numel() == 0:
            return
        self._uses.append((batch_index, slots))
        self._num_uses += slots.numel()
        if self._num_uses > self._compact_above:
            self._compact(last_use)

    def choose(self, num_victims: int, last_use: Tensor, first_held: int) -> Tensor:
        """See :class:`EvictionOrder`."""
        chosen: list[Tensor] = []
        seen: list[tuple[int, Tensor]] = []
        num_missing = num_victims
        for batch_index, slots in self._uses:
            if num_missing == 0 or batch_index >= first_held:
                break
            live = slots[last_use.index_select(0, slots) == batch_index]
            seen.append((batch_index, live))
            chosen.append(live[:num_missing])
            num_missing -= chosen[-1].numel()
        if num_missing == 0:  # else the plan is taken back, and slots that look used now are as old as before
            self._replace_oldest(seen)
        return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64, device=last_use.device)

    def purge(self) -> None:
        """See :class:`EvictionOrder`."""
        self._uses.clear()
        self._num_uses = 0

    def _replace_oldest(self, live_uses: list[tuple[int, Tensor]]) -> None:
        for _ in live_uses:
            self._num_uses -= self._uses.popleft()[1].numel()
        for batch_index, live in reversed(live_uses):
            if live.numel() > 0:
                self._uses.appendleft((batch_index, live))
                self._num_uses += live.numel()

    def _compact(self, last_use: Tensor) -> None:
        live_uses = (
            (batch_index, slots[last_use.index_select(0, slots) == batch_index]) for batch_index, slots in self._uses
        )
        self._uses = deque((batch_index, slots) for batch_index, slots in live_uses if slots.numel() > 0)
        self._num_uses = sum(slots.numel() for _, slots in self._uses)


class SlotMap:
    """The two maps between rows and slots of one pool, and the holds of batches in flight.

    A slot is held while ``last_use >= first_held``, where `first_held` is the oldest batch
    that was planned and not yet released; held slots never become victims (hazards 1 and 3).

    Not thread-safe, except :meth:`release`.

    Args:
        num_rows: R. Costs 4 bytes each.
        num_slots: S, at least 1. Costs 24 bytes each, plus the eviction order's own.
        eviction_order: Order among slots that are not held.
        device: Where the maps live and :meth:`plan` runs.

    Source:
        ScratchPipe (ISCA 2022): Hit-Map and Hold mask.
    """

    def __init__(
        self,
        num_rows: int,
        num_slots: int,
        eviction_order: EvictionOrder | None = None,
        device: torch.device | None = None,
    ) -> None:
        assert 1 <= num_slots <= max(1, num_rows), f"{num_slots=} must lie in [1, {num_rows=}]"
        self.num_rows = num_rows
        self.num_slots = num_slots
        self.device = device or torch.device("cpu")
        self._eviction_order = eviction_order or LeastRecentlyUsed(num_slots)
        self._row_to_slot = torch.full((num_rows,), -1, dtype=torch.int32, device=self.device)
        self._slot_to_row = torch.full((num_slots,), -1, dtype=torch.int64, device=self.device)
        self._last_use = torch.full((num_slots,), -1, dtype=torch.int32, device=self.device)
        self._first_seen_at = torch.empty(num_slots, dtype=torch.int32, device=self.device)
        self._free_slots = torch.arange(num_slots, device=self.device)
        self._next_batch = 1  # so that slots which nobody holds can have been used by an earlier batch, 0
        self._first_held = 1
        self._newly_released: deque[int] = deque()
        self._released_early: set[int] = set()
        self._slots_in_flight: dict[int, Tensor] = {}
        self._last_use_before_newest: tuple[Tensor, Tensor] | None = None

    @property
    def num_resident_rows(self) -> int:
        """Rows that sit in a slot now."""
        return self.num_slots - self._free_slots.numel()

    @property
    def first_held(self) -> int:
        """The oldest batch in flight; equal to the next batch to be planned when none is."""
        while self._newly_released:
            batch_index = self._newly_released.popleft()
            if batch_index >= self._first_held:
                self._released_early.add(batch_index)
                self._slots_in_flight.pop(batch_index, None)
        while self._first_held in self._released_early:
            self._released_early.remove(self._first_held)
            self._first_held += 1
        return self._first_held

    @property
    def num_batches_in_flight(self) -> int:
        """Batches planned and not yet released, counted from the oldest one that still holds."""
        return self._next_batch - self.first_held

    def plan(self, rows: Tensor) -> CachePlan:
        """Give every row of the next batch a slot.

        Hits keep their slot; misses take free slots, then victims. All slots of the batch are
        held until :meth:`release`. Moves no row data.

        Args:
            rows: [I] int64 row ids on this map's device, repeats allowed, each in ``[0, num_rows)``.

        Returns:
            Where each id will be found, and which rows come and go.

        Raises:
            SlotsHeldError: Too few slots are free; the maps are unchanged and the call may be repeated.

        Source:
            ScratchPipe (ISCA 2022), Plan stage.
        """
        batch_index = self._next_batch
        slots = self._row_to_slot.index_select(0, rows).long()
        is_miss = slots < 0
        miss_positions = is_miss.nonzero().view(-1)
        hit_slots = slots if miss_positions.numel() == 0 else slots[~is_miss]
        unique_hit_slots = self._unique_slots(hit_slots)
        last_use_of_hits = self._last_use.index_select(0, unique_hit_slots)
        self._last_use.index_fill_(0, unique_hit_slots, batch_index)
        miss_ids = rows.index_select(0, miss_positions)
        miss_rows = self._unique_misses(miss_ids)

        num_free = min(self._free_slots.numel(), miss_rows.numel())
        num_victims = miss_rows.numel() - num_free
        victim_slots = self._eviction_order.choose(num_victims, self._last_use, self.first_held)
        has_let_go = victim_slots.numel() < num_victims and self._let_go_of_released(unique_hit_slots)
        if has_let_go:
            victim_slots = self._eviction_order.choose(num_victims, self._last_use, self.first_held)
        if victim_slots.numel() < num_victims:
            self._row_to_slot.index_fill_(0, miss_rows, -1)
            self._last_use.index_copy_(0, unique_hit_slots, last_use_of_hits)
            if has_let_go:
                self._rebuild_eviction_order()
            raise SlotsHeldError(unique_hit_slots.numel() + miss_rows.numel(), self.num_slots - self._num_held())

        victim_rows = self._slot_to_row.index_select(0, victim_slots)
        miss_slots = torch.cat([self._free_slots[:num_free], victim_slots])
        self._free_slots = self._free_slots[num_free:]
        self._last_use_before_newest = (
            torch.cat([unique_hit_slots, victim_slots]),
            torch.cat([last_use_of_hits, self._last_use.index_select(0, victim_slots)]),
        )
        self._place(victim_rows, miss_rows, miss_slots, batch_index)
        unique_slots = torch.cat([unique_hit_slots, miss_slots])
        self._eviction_order.used(unique_slots, batch_index, self._last_use)
        slots.index_copy_(0, miss_positions, self._row_to_slot.index_select(0, miss_ids).long())
        self._slots_in_flight[batch_index] = unique_slots
        self._next_batch += 1
        return CachePlan(batch_index, rows, slots, unique_slots, miss_rows, miss_slots, victim_rows, victim_slots)

    def undo(self, plan: CachePlan) -> None:
        """Take back the newest plan, none of whose rows has moved; its batch counts as released.

        Args:
            plan: What the last :meth:`plan` returned.
        """
        assert plan.batch_index == self._next_batch - 1, f"{plan.batch_index=} is not the newest, {self._next_batch=}"
        num_from_free = plan.miss_slots.numel() - plan.victim_slots.numel()
        freed = plan.miss_slots[:num_from_free]
        self._row_to_slot.index_fill_(0, plan.miss_rows, -1)
        self._slot_to_row.index_fill_(0, freed, -1)
        self._last_use.index_fill_(0, freed, -1)
        self._free_slots = torch.cat([freed, self._free_slots])
        self._row_to_slot.index_copy_(0, plan.victim_rows, plan.victim_slots.int())
        self._slot_to_row.index_copy_(0, plan.victim_slots, plan.victim_rows)
        assert self._last_use_before_newest is not None
        self._last_use.index_copy_(0, *self._last_use_before_newest)
        self._rebuild_eviction_order()
        self.release(plan.batch_index)

    def release(self, batch_index: int) -> None:
        """Let go of a batch's slots; may be called from any thread, in any order; a second call does nothing.

        Args:
            batch_index: As given by :meth:`plan`.
        """
        self._newly_released.append(batch_index)

    def purge(self) -> None:
        """Empty every slot without writing anything back; no batch may be in flight."""
        assert self.num_batches_in_flight == 0, f"{self.num_batches_in_flight} batches in flight"
        resident = self._slot_to_row[self._slot_to_row >= 0]
        self._row_to_slot.index_fill_(0, resident, -1)
        self._slot_to_row.fill_(-1)
        self._last_use.fill_(-1)
        self._free_slots = torch.arange(self.num_slots, device=self.device)
        self._eviction_order.purge()

    def resident_since(self, batch_index: int) -> tuple[Tensor, Tensor]:
        """Rows in slots that this batch or a later one uses; scans all slots.

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

    def count_mismatches(self, rows: Tensor, slots: Tensor) -> Tensor:
        """How many ids would not find their row in their slot now: misses at Train.

        Args:
            rows: [I] int64.
            slots: [I] int64.

        Returns:
            [] int64 on this map's device.
        """
        return (self._slot_to_row.index_select(0, slots) != rows).sum()

    def check_integrity(self) -> None:
        """Assert the laws of the maps; scans them, for tests.

        Raises:
            AssertionError: Naming the law and its numbers.
        """
        occupied = (self._slot_to_row >= 0).nonzero().view(-1)
        rows = self._slot_to_row[occupied]
        num_mapped = int((self._row_to_slot >= 0).sum())
        num_free = self._free_slots.numel()
        assert num_free + occupied.numel() == self.num_slots, f"{num_free=} + {occupied.numel()=} != {self.num_slots=}"
        assert num_mapped == occupied.numel(), f"{num_mapped=} rows mapped, {occupied.numel()=} slots occupied"
        assert torch.equal(self._row_to_slot[rows].long(), occupied), "row_to_slot is not the inverse of slot_to_row"
        assert int((self._slot_to_row[self._free_slots] >= 0).sum()) == 0, "a free slot holds a row"
        assert self._free_slots.unique().numel() == num_free, "a slot is free twice"
        assert int((self._last_use[occupied] < 0).sum()) == 0, "an occupied slot was never used"

    def _unique_slots(self, slots: Tensor) -> Tensor:
        # Every id writes its position; the one that is read back represents its slot. No sort.
        positions = torch.arange(slots.numel(), dtype=torch.int32, device=self.device)
        self._first_seen_at.scatter_(0, slots, positions)
        return slots[self._first_seen_at.index_select(0, slots) == positions]

    def _unique_misses(self, miss_ids: Tensor) -> Tensor:
        # As _unique_slots; rows without a slot lend their place in row_to_slot, all values below -1.
        marks = torch.arange(-2, -2 - miss_ids.numel(), -1, dtype=torch.int32, device=self.device)
        self._row_to_slot.scatter_(0, miss_ids, marks)
        return miss_ids[self._row_to_slot.index_select(0, miss_ids) == marks]

    def _place(self, victim_rows: Tensor, miss_rows: Tensor, miss_slots: Tensor, batch_index: int) -> None:
        self._row_to_slot.index_fill_(0, victim_rows, -1)
        self._row_to_slot.index_copy_(0, miss_rows, miss_slots.int())
        self._slot_to_row.index_copy_(0, miss_slots, miss_rows)
        self._last_use.index_fill_(0, miss_slots, batch_index)

    def _let_go_of_released(self, slots_to_keep: Tensor) -> bool:
        """Free what is held for batches that were released after one that is still in flight.

        `first_held` stands at the oldest batch in flight, and holds the slots of every later one with it. This costs
        nothing while batches are released in order; where one stays behind (a loss that is kept and never
        sees a backward), its own slots must be told from the others.
        """
        first_held = self.first_held
        is_held = torch.zeros(self.num_slots, dtype=torch.bool, device=self.device)
        is_held[slots_to_keep] = True
        for slots in self._slots_in_flight.values():
            is_held[slots] = True
        may_leave = (self._last_use >= first_held) & ~is_held
        if not bool(may_leave.any()):
            return False
        self._last_use[may_leave] = first_held - 1
        self._rebuild_eviction_order()
        return True

    def _rebuild_eviction_order(self) -> None:
        # Hits of a batch that is being planned bear its number already; they are noted once, when its plan stands.
        occupied = ((self._last_use >= 0) & (self._last_use < self._next_batch)).nonzero().view(-1)
        batches = self._last_use.index_select(0, occupied)
        self._eviction_order.purge()
        for batch_index in batches.unique().tolist():
            self._eviction_order.used(occupied[batches == batch_index], batch_index, self._last_use)

    def _num_held(self) -> int:
        return int((self._last_use >= self.first_held).sum())
