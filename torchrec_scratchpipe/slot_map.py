# SPDX-License-Identifier: BSD-3-Clause
"""Decides which row sits in which slot: integers only, no row data is touched here.

Shapes: ``I`` ids, ``U`` unique rows, ``M`` misses, ``V`` victims, ``S`` slots, ``R`` rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from torchrec_scratchpipe.eviction import WINDOW_BITS, EvictionOrder, LeastFrequentlyUsed, SlotUses
from torchrec_scratchpipe.slot_map_base import WINDOW_MASK, BaseSlotMap, SlotsHeldError, all_but
from torchrec_scratchpipe.types import CachePlan

__all__ = ["SlotMap", "SlotsHeldError"]


class SlotMap(BaseSlotMap[Tensor]):
    """Places rows with torch operations, whose results' sizes the host knows; made for a CPU, right on any device.

    Args:
        num_rows: R. Costs 4 bytes each.
        num_slots: S, at least 1. Costs 28 bytes each, plus the eviction order's own.
        eviction_order: Order among slots that are not held.
        device: Where the maps live and :meth:`plan` runs.
    """

    def __init__(
        self,
        num_rows: int,
        num_slots: int,
        eviction_order: EvictionOrder | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(num_rows, num_slots, device)
        self._eviction_order = eviction_order or LeastFrequentlyUsed(num_slots)
        self._first_seen_at = torch.empty(num_slots, dtype=torch.int32, device=self.device)
        self._free_slots = torch.arange(num_slots, dtype=torch.int64, device=self.device)
        self._slots_in_flight: dict[int, Tensor] = {}
        self._last_use_before_newest: tuple[Tensor, Tensor] | None = None

    def plan(self, rows: Tensor, seen: int | None = None) -> CachePlan:
        """Give every row of the next batch a slot.

        Hits keep their slot; misses take free slots, then victims. All slots of the batch are
        held until :meth:`release`. Moves no row data.

        Args:
            rows: [I] int64 row ids on this map's device, repeats allowed, each in ``[0, num_rows)``.
            seen: What :meth:`see` returned for this batch.

        Returns:
            Where each id will be found, and which rows come and go.

        Raises:
            SlotsHeldError: Too few slots are free; the maps are unchanged and the call may be repeated.

        Source:
            ScratchPipe (ISCA 2022), Plan stage.
        """
        self._forget()
        batch_index = self._next_batch
        slots = self._row_to_slot.index_select(0, rows).long()
        is_miss = slots < 0
        miss_positions = is_miss.nonzero().view(-1)
        hit_slots = slots if miss_positions.numel() == 0 else slots[~is_miss]
        unique_hit_slots = self._unique_slots(hit_slots)
        last_use_of_hits = self._last_use.index_select(0, unique_hit_slots)
        self._last_use.index_fill_(0, unique_hit_slots, batch_index)
        miss_ids = rows.index_select(0, miss_positions)
        first_misses = self._first_of_each(miss_ids)
        miss_rows = miss_ids.index_select(0, first_misses)
        absent_values = slots.index_select(0, miss_positions.index_select(0, first_misses)).int()

        num_free = min(self._free_slots.numel(), miss_rows.numel())
        num_victims = miss_rows.numel() - num_free
        victim_slots = self._choose(num_victims)
        has_let_go = victim_slots.numel() < num_victims and self._let_go_of_released(unique_hit_slots)
        if has_let_go:
            victim_slots = self._choose(num_victims)
        if victim_slots.numel() < num_victims:
            self._row_to_slot.index_copy_(0, miss_rows, absent_values)
            self._last_use.index_copy_(0, unique_hit_slots, last_use_of_hits)
            if has_let_go:
                self._eviction_order.rebuild(self._last_use, batch_index)
            raise SlotsHeldError(
                unique_hit_slots.numel() + miss_rows.numel(), self.num_slots - self._num_held(self.first_held)
            )

        victim_rows = self._slot_to_row.index_select(0, victim_slots)
        miss_slots = torch.cat([self._free_slots[:num_free], victim_slots])
        self._free_slots = self._free_slots[num_free:]
        self._last_use_before_newest = (
            torch.cat([unique_hit_slots, victim_slots]),
            torch.cat([last_use_of_hits, self._last_use.index_select(0, victim_slots)]),
        )
        self._row_to_slot.index_copy_(0, victim_rows, self._absent_values(victim_slots))
        self._place(miss_rows, miss_slots, batch_index)
        unique_slots = torch.cat([unique_hit_slots, miss_slots])
        known_of_misses = -1 - absent_values
        self._uses_ahead.index_copy_(0, miss_slots, known_of_misses & WINDOW_MASK)
        if seen is not None and seen in self._seen:
            self._seen.remove(seen)
            uses = self._uses_ahead.index_select(0, unique_slots)
            self._uses_ahead.index_copy_(0, unique_slots, uses.bitwise_and_(all_but(seen)))
        self._eviction_order.used(unique_slots, known_of_misses >> WINDOW_BITS, batch_index, self._last_use)
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
        self._take_back(plan.miss_rows, plan.miss_slots, freed, plan.victim_rows, plan.victim_slots)
        self._free_slots = torch.cat([freed, self._free_slots])
        assert self._last_use_before_newest is not None
        self._last_use.index_copy_(0, *self._last_use_before_newest)
        self._eviction_order.rebuild(self._last_use, self._next_batch)
        self.release(plan.batch_index)

    def count_mismatches(self, rows: Tensor, slots: Tensor) -> Tensor:
        """How many ids would not find their row in their slot now: misses at Train.

        Args:
            rows: [I] int64.
            slots: [I] int64.

        Returns:
            [] int64 on this map's device.
        """
        return (self._slot_to_row.index_select(0, slots) != rows).sum()

    def _free(self) -> Tensor:
        return self._free_slots

    def _add_free(self, num_new: int) -> None:
        new = torch.arange(self.num_slots - num_new, self.num_slots, dtype=torch.int64, device=self.device)
        self._free_slots = torch.cat([self._free_slots, new])
        self._first_seen_at = torch.empty(self.num_slots, dtype=torch.int32, device=self.device)
        self._eviction_order.grow(self.num_slots)

    def _free_all(self) -> None:
        self._free_slots = torch.arange(self.num_slots, dtype=torch.int64, device=self.device)
        self._eviction_order.purge()

    def _let_go(self, batch_index: int) -> None:
        self._slots_in_flight.pop(batch_index, None)

    def _mark_uses_ahead(self, ids: Tensor, seen: int, *, is_used: bool) -> None:
        if is_used:
            self._change_uses_ahead(ids, lambda uses: uses.bitwise_or_(1 << (seen % WINDOW_BITS)))
        else:
            self._change_uses_ahead(ids, lambda uses: uses.bitwise_and_(all_but(seen)))

    def _unique_slots(self, slots: Tensor) -> Tensor:
        # Every id writes its position; the one that is read back represents its slot. No sort.
        positions = torch.arange(slots.numel(), dtype=torch.int32, device=self.device)
        self._first_seen_at.scatter_(0, slots, positions)
        return slots[self._first_seen_at.index_select(0, slots) == positions]

    def _first_of_each(self, miss_ids: Tensor) -> Tensor:
        # As _unique_slots; rows without a slot lend their place in row_to_slot, all values below -1.
        marks = torch.arange(-2, -2 - miss_ids.numel(), -1, dtype=torch.int32, device=self.device)
        self._row_to_slot.scatter_(0, miss_ids, marks)
        return (self._row_to_slot.index_select(0, miss_ids) == marks).nonzero().view(-1)

    def _place(self, miss_rows: Tensor, miss_slots: Tensor, batch_index: int) -> None:
        self._row_to_slot.index_copy_(0, miss_rows, miss_slots.int())
        self._slot_to_row.index_copy_(0, miss_slots, miss_rows)
        self._last_use.index_fill_(0, miss_slots, batch_index)

    def _absent_values(self, slots: Tensor) -> Tensor:
        """What `row_to_slot` says of the rows in these slots once they have left."""
        known = self._uses_ahead.index_select(0, slots)
        notes = self._eviction_order.note(slots)
        return -1 - (known if notes is None else known.bitwise_or_(notes.bitwise_left_shift_(WINDOW_BITS)))

    def _change_uses_ahead(self, rows: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        # Repeated rows are written more than once, with the same value. Absent rows stand for a slot beyond the last one.
        values = self._row_to_slot.index_select(0, rows)
        is_absent = values < 0
        positions = is_absent.nonzero().view(-1)
        uses_of_absent = -1 - values.index_select(0, positions)
        self._row_to_slot.scatter_(0, rows.index_select(0, positions), -1 - change(uses_of_absent))
        slots = values.long().masked_fill_(is_absent, self.num_slots)
        self._uses_ahead.scatter_(0, slots, change(self._uses_ahead.index_select(0, slots)))

    def _choose(self, num_victims: int) -> Tensor:
        next_bit = self._seen[0] % WINDOW_BITS if self._seen else 0
        uses = SlotUses(self._last_use, self._uses_ahead[: self.num_slots], next_bit, bool(self._seen))
        return self._eviction_order.choose(num_victims, uses, self.first_held)

    def _let_go_of_released(self, slots_to_keep: Tensor) -> bool:
        """Free what is held for batches that were released after one that is still in flight; see the base class."""
        first_held = self.first_held  # takes in releases, which take batches out of `_slots_in_flight`
        is_held = torch.zeros(self.num_slots, dtype=torch.bool, device=self.device)
        is_held[slots_to_keep] = True
        for slots in self._slots_in_flight.values():
            is_held[slots] = True
        if not self._lower_all_but(is_held, first_held):
            return False
        self._eviction_order.rebuild(self._last_use, self._next_batch)
        return True
