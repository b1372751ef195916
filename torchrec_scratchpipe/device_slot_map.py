# SPDX-License-Identifier: BSD-3-Clause
"""Decides which row sits in which slot, on the device: the host learns how many rows came and went when it cares to ask.

Shapes: ``I`` ids, ``U`` unique rows, ``M`` misses, ``V`` victims, ``S`` slots, ``R`` rows.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_scratchpipe.device_ops import (
    Aging,
    Count,
    DeviceOps,
    FeatureIds,
    FeatureRows,
    PlanBuffers,
    ScratchBuffers,
    State,
    TableCounts,
    make_maps,
)
from torchrec_scratchpipe.eviction import HALF_LIFE, MAX_HALF_LIVES, NOTES_PER_OCTAVE, NUM_NOTES, WINDOW_BITS
from torchrec_scratchpipe.memory import BUFFER_HEADROOM
from torchrec_scratchpipe.slot_map_base import BaseSlotMap, SlotsHeldError, all_but
from torchrec_scratchpipe.streams import StageStreams
from torchrec_scratchpipe.types import CachePlan

__all__ = ["DevicePlan", "DeviceSlotMap", "PoolIds"]

SMALLEST_CAPACITY = 1024


class PoolIds(NamedTuple):
    """What a batch looks up in one pool, among the ids of its kernel group."""

    ids: FeatureIds
    features: FeatureRows


@dataclass
class DevicePlan:
    """What was planned for one batch; how many rows it concerns is on the device, and on the host after :meth:`wait`."""

    batch_index: int
    num_ids: int
    buffers: PlanBuffers
    slots: Tensor  # [C] int64, of all pools of the kernel group
    seen: int | None
    planned: torch.Event | None
    moved: torch.Event | None = None  # when its rows are in their slots; None if none has moved
    is_counted: bool = False  # whether the slot map has taken in how many slots it holds

    @property
    def is_known(self) -> bool:
        """Whether :meth:`wait` would return at once."""
        return self.planned is None or self.planned.query()

    def wait(self) -> list[int]:
        """Wait until the counts have come to the host.

        Returns:
            One number per :class:`Count`.
        """
        if self.planned is not None:
            self.planned.synchronize()
        counts: list[int] = self.buffers.host_counts.tolist()
        return counts


class DeviceSlotMap(BaseSlotMap[PoolIds]):
    """Places rows by operations whose sizes stay on the device, so that Plan waits for nothing.

    The eviction order is that of :class:`~torchrec_scratchpipe.eviction.LeastFrequentlyUsed`, by bins of an eighth of an octave. The slots
    are scanned when the list of coming victims is spent, which only the device knows.

    A plan is certain to find its slots if what batches in flight use, together with this one's ids, is no more than there are. Where
    it is not certain, :meth:`confirm` waits to see, because whoever asks must try again after the next Train.

    All methods but :meth:`release`, :meth:`forget` and :meth:`forget_failed` enqueue on the current stream, and must be called between the stages of
    two batches.

    Args:
        num_rows: R. Costs 4 bytes each.
        num_slots: S, at least 1. Costs 24.5 bytes each.
        row_offsets: Where each table begins, and R.
        ops: The device's operations.
        device: Where the maps live.
        streams: For events, and for the streams that use the buffers beside the one that allocates them.
        half_life: In batches.
    """

    def __init__(
        self,
        num_rows: int,
        num_slots: int,
        row_offsets: Sequence[int],
        ops: DeviceOps,
        device: torch.device,
        streams: StageStreams | None = None,
        half_life: float = HALF_LIFE,
    ) -> None:
        super().__init__(num_rows, num_slots, device)
        self.ops = ops
        self._streams = streams or StageStreams(device, is_overlapped=False)
        num_tables = len(row_offsets) - 1
        num_ids, num_unique, num_misses, num_victims = torch.zeros(4, num_tables, dtype=torch.int64, device=device)
        num_misses_at_train = torch.zeros(1, dtype=torch.int64, device=device)
        self.table_counts = TableCounts(
            torch.tensor(row_offsets, dtype=torch.int64, device=device),
            num_ids,
            num_unique,
            num_misses,
            num_victims,
            num_misses_at_train,
        )
        self._num_listed = max(1, num_slots // 16)
        self._capacity = 0
        self.maps = make_maps(self._row_to_slot, self._slot_to_row, self._last_use, self._uses_ahead, self._num_listed)
        self._scratch = _make_scratch(0, device)
        for tensor in (*vars(self.maps).values(), *vars(self.table_counts).values()):
            self._streams.record_use(tensor)
        self._free_buffers: list[PlanBuffers] = []
        self._moved_of_released: list[torch.Event] = []  # of batches that may have been dropped while their rows moved
        self._in_flight: dict[int, DevicePlan] = {}
        self._slots_held_by: dict[int, int] = {}  # at most, for each batch since the first held
        self._half_life = half_life
        self._origin = 0
        self._newest: DevicePlan | None = None
        self._newly_failed: deque[tuple[int, PoolIds]] = deque()
        self.num_waits = 0  # how often Plan had to wait to see whether there were slots

    def note_releases(self) -> None:
        """Take in what was released; the caller then orders the current stream after the Trains of those batches."""
        first_held = self.first_held
        for batch_index in [index for index in self._slots_held_by if index < first_held]:
            del self._slots_held_by[batch_index]

    def plan(
        self, batch: PoolIds, seen: int | None = None, slots: Tensor | None = None, *, has_whole_tables: bool = False
    ) -> DevicePlan:
        """Enqueue what gives every row of the next batch a slot, as of the last :meth:`note_releases`.

        Moves may be enqueued at once: if there are too few slots they move nothing. The plan stands after :meth:`confirm`.

        Args:
            batch: Its ids.
            seen: What :meth:`see` returned for this batch.
            slots: [>= I] int64, to be written, if the batch has them from another pool.
            has_whole_tables: Whether ids of other features than the pools' are their slots; written if `slots` are not given.

        Returns:
            Where its rows will be. If :meth:`DevicePlan.wait` says that it was refused, and :meth:`confirm` did not, an id is bad.
        """
        self._forget()
        self._forget_failed()
        self._make_room(batch.ids.ids.numel())
        return self._enqueue(batch, seen, slots, has_whole_tables)

    def confirm(self, plan: DevicePlan) -> bool:
        """Let a plan stand; waits for it where it is not certain to have found its slots.

        Args:
            plan: From the last :meth:`plan`.

        Returns:
            False if it found too few slots, and some have been let go since: plan again, at once.

        Raises:
            SlotsHeldError: It found too few slots; the maps are unchanged, and planning may be repeated after a Train.
        """
        if not self._is_certain(plan.num_ids):
            self.num_waits += 1
            counts = plan.wait()
            if counts[Count.IS_REFUSED] and not counts[Count.BAD_POSITION]:
                has_let_go = self._let_go_of_released(plan)
                self._recycle(plan)
                if has_let_go:
                    return False
                raise SlotsHeldError(
                    counts[Count.HITS] + counts[Count.MISSES],
                    self.num_slots - self._num_held(self._first_held),
                )
        if plan.seen is not None and plan.seen in self._seen:
            self._seen.remove(plan.seen)
        self._in_flight[plan.batch_index] = self._newest = plan
        self._slots_held_by[plan.batch_index] = min(plan.num_ids, self.num_rows)
        self._next_batch += 1
        return True

    def forget_failed(self, seen: int, batch: PoolIds) -> None:
        """Take back :meth:`see` of a batch whose plan was refused for a bad id; from any thread.

        Args:
            seen: What :meth:`see` returned.
            batch: As given to it.
        """
        self._newly_failed.append((seen, batch))

    def cache_plan(self, plan: DevicePlan) -> CachePlan:
        """A plan with tensors of the right sizes; waits for it.

        Args:
            plan: From :meth:`plan`.

        Returns:
            The same; its `unique_slots` are those of misses alone.
        """
        counts = plan.wait()
        num_fills, num_writebacks = counts[Count.FILLS], counts[Count.WRITEBACKS]
        miss_slots = plan.buffers.miss_slots[:num_fills].long()
        return CachePlan(
            batch_index=plan.batch_index,
            rows=plan.buffers.rows[: plan.num_ids],
            slots=plan.slots[: plan.num_ids],
            unique_slots=miss_slots,
            miss_rows=plan.buffers.miss_rows[:num_fills],
            miss_slots=miss_slots,
            victim_rows=plan.buffers.victim_rows[:num_writebacks],
            victim_slots=miss_slots[:num_writebacks],
        )

    def undo(self, plan: DevicePlan) -> None:
        """Take back the newest plan, none of whose rows has moved; its batch counts as released. Waits for it.

        Args:
            plan: What the last :meth:`plan` returned.
        """
        assert plan is self._newest, f"{plan.batch_index=} is not the newest, {self._next_batch=}"
        counts = plan.wait()
        if not counts[Count.IS_REFUSED]:
            self._undo(plan, counts)
        self.release(plan.batch_index)

    @property
    def metadata_bytes(self) -> int:
        """Device memory of maps and buffers of all kinds, without rows."""
        tensors = [*vars(self.maps).values(), *vars(self._scratch).values(), *vars(self.table_counts).values()]
        in_flight = [plan.buffers for plan in self._in_flight.values()]
        for buffers in [*in_flight, *self._free_buffers]:
            tensors += vars(buffers).values()
        return sum(tensor.nbytes for tensor in tensors)

    def _enqueue(self, batch: PoolIds, seen: int | None, slots: Tensor | None, has_whole_tables: bool) -> DevicePlan:
        buffers = self._take_buffers()
        # Their slots may be given away now, and their buffers are used again.
        for moved in self._moved_of_released:
            self._streams.wait(self._streams.plan, moved)
        self._moved_of_released.clear()
        if slots is None:
            slots = buffers.slots
            if has_whole_tables:
                slots[: batch.ids.ids.numel()].copy_(batch.ids.ids)
        ops, maps, scratch = self.ops, self.maps, self._scratch
        batch_index, first_held, num_ids = self._next_batch, self._first_held, batch.ids.ids.numel()
        aging = self._age(batch_index)
        ops.find(batch.ids, batch.features, maps, buffers, scratch, batch_index)
        ops.take(maps, buffers, scratch, batch_index, first_held, True)
        next_bit = self._seen[0] % WINDOW_BITS if self._seen else 0
        ops.scan(maps, buffers, first_held, next_bit, self._num_listed)
        ops.take(maps, buffers, scratch, batch_index, first_held, False)
        keep_bits = all_but(seen) if seen is not None and seen in self._seen else -1
        ops.commit(maps, buffers, scratch, self.table_counts, batch_index, keep_bits, aging)
        ops.translate(maps, buffers, self.table_counts, slots, num_ids)
        ops.report(buffers)
        return DevicePlan(batch_index, num_ids, buffers, slots, seen, self._streams.record(self._streams.plan))

    def _age(self, batch_index: int) -> Aging:
        half_lives = (batch_index - self._origin) / self._half_life
        if half_lives > MAX_HALF_LIVES:
            self.ops.age(self.maps, 2.0**-half_lives)
            self._origin, half_lives = batch_index, 0.0
        return Aging(2.0**half_lives, math.fmod(self._origin / self._half_life * NOTES_PER_OCTAVE, NUM_NOTES))

    def _is_certain(self, num_ids: int) -> bool:
        for batch_index, plan in self._in_flight.items():
            if plan.is_known and not plan.is_counted:
                plan.is_counted = True
                counts = plan.wait()
                self._slots_held_by[batch_index] = counts[Count.HITS] + counts[Count.MISSES]
        return sum(self._slots_held_by.values()) + min(num_ids, self.num_rows) <= self.num_slots

    def _make_room(self, num_ids: int) -> None:
        if num_ids <= self._capacity:
            return
        self._capacity = max(SMALLEST_CAPACITY, math.ceil(BUFFER_HEADROOM * num_ids))
        self._free_buffers.clear()
        self._scratch = _make_scratch(self._capacity, self.device)
        for tensor in vars(self._scratch).values():
            self._streams.record_use(tensor)
        num_listed = self._num_listed + self._capacity  # a whole batch may be missing
        listed = torch.zeros(num_listed, dtype=torch.int32, device=self.device)
        self.ops.unlist(self.maps)
        self.maps = replace(self.maps, listed=listed, listed_last_use=torch.zeros_like(listed))

    def _take_buffers(self) -> PlanBuffers:
        if self._free_buffers:
            return self._free_buffers.pop()
        buffers = _make_buffers(self._capacity, self.device)
        for tensor in vars(buffers).values():
            self._streams.record_use(tensor)
        return buffers

    def _recycle(self, plan: DevicePlan) -> None:
        if plan.moved is not None:
            self._moved_of_released.append(plan.moved)
        if plan.buffers.rows.numel() == self._capacity:
            self._free_buffers.append(plan.buffers)

    def _forget_failed(self) -> None:
        while self._newly_failed:
            seen, batch = self._newly_failed.popleft()
            self._mark_uses_ahead(batch, seen, is_used=False)

    def _free(self) -> Tensor:
        return self.maps.free_slots[: int(self.maps.state[State.NUM_FREE])].long()

    def _add_free(self, num_new: int) -> None:
        old = self.maps
        self._num_listed = max(1, self.num_slots // 16)
        self.maps = make_maps(
            self._row_to_slot, self._slot_to_row, self._last_use, self._uses_ahead, self._num_listed + self._capacity
        )
        num_old, num_free = self.num_slots - num_new, int(old.state[State.NUM_FREE])
        self.maps.frequency[:num_old] = old.frequency
        new = torch.arange(num_old, self.num_slots, dtype=torch.int32, device=self.device).flip(0)
        self.maps.free_slots[: num_free + num_new] = torch.cat([new, old.free_slots[:num_free]])
        self.maps.state[State.NUM_FREE] = num_free + num_new
        for tensor in vars(self.maps).values():
            self._streams.record_use(tensor)

    def _free_all(self) -> None:
        self.maps.frequency.zero_()
        self.maps.free_slots.copy_(torch.arange(self.num_slots - 1, -1, -1, dtype=torch.int32))
        self.maps.state[State.NUM_FREE] = self.num_slots
        self.ops.unlist(self.maps)

    def _let_go(self, batch_index: int) -> None:
        plan = self._in_flight.pop(batch_index, None)
        if plan is not None:
            self._recycle(plan)

    def _mark_uses_ahead(self, ids: PoolIds, seen: int, *, is_used: bool) -> None:
        self.ops.mark(ids.ids, ids.features, self.maps, 1 << (seen % WINDOW_BITS), is_used)

    def _let_go_of_released(self, refused: DevicePlan) -> bool:
        """Free what is held for batches that were released after one that is still in flight; see the base class."""
        first_held = self._first_held
        is_held = torch.zeros(self.num_slots, dtype=torch.bool, device=self.device)
        for plan in [*self._in_flight.values(), refused]:
            rows = plan.buffers.rows[: plan.num_ids]
            slots = self._row_to_slot[rows[rows >= 0]]
            is_held[slots[slots >= 0].long()] = True
        if not self._lower_all_but(is_held, first_held):
            return False
        self.ops.unlist(self.maps)
        return True

    def _undo(self, plan: DevicePlan, counts: list[int]) -> None:
        num_misses, num_victims = counts[Count.FILLS], counts[Count.WRITEBACKS]
        slots = plan.buffers.miss_slots[:num_misses].long()
        victims, freed = slots[:num_victims], slots[num_victims:]
        victim_rows = plan.buffers.victim_rows[:num_victims]
        self._take_back(plan.buffers.miss_rows[:num_misses], slots, freed, victim_rows, victims)
        num_free = int(self.maps.state[State.NUM_FREE])
        self.maps.free_slots[num_free : num_free + freed.numel()] = freed.flip(0).int()
        self.maps.state[State.NUM_FREE] = num_free + freed.numel()
        self._last_use[victims] = self._scratch.victim_last_use[:num_victims]
        hits = self._scratch.hit_slots[: counts[Count.HITS]].long()
        self._last_use[hits] = self._scratch.hit_last_use[: hits.numel()]
        self.ops.unlist(self.maps)


def _make_scratch(capacity: int, device: torch.device) -> ScratchBuffers:
    return ScratchBuffers(*(torch.empty(capacity, dtype=torch.int32, device=device) for _ in range(4)))


def _make_buffers(capacity: int, device: torch.device) -> PlanBuffers:
    rows, slots, miss_rows, victim_rows = (torch.empty(capacity, dtype=torch.int64, device=device) for _ in range(4))
    return PlanBuffers(
        rows=rows,
        slots=slots,
        miss_rows=miss_rows,
        miss_slots=torch.empty(capacity, dtype=torch.int32, device=device),
        victim_rows=victim_rows,
        counts=torch.zeros(len(Count), dtype=torch.int64, device=device),
        host_counts=torch.zeros(len(Count), dtype=torch.int64, pin_memory=device.type == "cuda"),
    )
