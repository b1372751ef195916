# SPDX-License-Identifier: BSD-3-Clause
"""Decides which row sits in which slot: integers only, no row data is touched here.

Shapes: ``I`` ids, ``M`` misses, ``V`` victims, ``S`` slots, ``R`` rows, ``C`` capacity in ids, ``N`` any number.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from torchrec_scratchpipe.core.rows import Stage, TimedStage
from torchrec_scratchpipe.core.slot_ops import (
    HALF_LIFE,
    MAX_HALF_LIVES,
    MAX_SEEN,
    NOT_SEEN,
    NOTES_PER_OCTAVE,
    NUM_NOTES,
    NUM_ORDER_BINS,
    SEEN,
    Aging,
    Count,
    FeatureIds,
    FeatureRows,
    Number,
    OrderBuffers,
    PlanBuffers,
    PlanRequest,
    ScratchBuffers,
    Sighting,
    SlotOps,
    State,
    TableCounts,
    make_maps,
    use_of,
)
from torchrec_scratchpipe.core.streams import StageStreams
from torchrec_scratchpipe.core.torch_ops import notes_of

__all__ = ["BUFFER_HEADROOM", "SIGHTINGS_AT_A_TIME", "CachePlan", "PoolIds", "RowMoves", "SlotMap", "SlotsHeldError"]

SMALLEST_CAPACITY = 1024
SIGHTINGS_AT_A_TIME = 16  # batches for which room is made together
ROWS_AT_A_TIME = 1 << 22  # looked at together, where all rows must be
BUFFER_HEADROOM = 1.25  # Buffers are this much larger than the first batch needs, so that later batches fit too.


class SlotsHeldError(Exception):
    """Internal signal of :meth:`SlotMap.confirm`: too few slots are free, and the maps are as before."""

    def __init__(self, num_needed: int, num_available: int) -> None:
        super().__init__(f"needs {num_needed} slots, {num_available} are free or may be evicted")
        self.num_needed = num_needed
        self.num_available = num_available


class PoolIds(NamedTuple):
    """What a batch looks up in one pool, among the ids of its kernel group."""

    ids: FeatureIds
    features: FeatureRows


class RowMoves(NamedTuple):
    """The rows that one batch moves in one pool, in tensors of the right sizes."""

    miss_rows: Tensor  # [M] int64, rows that come ...
    miss_slots: Tensor  # [M] int64, ... and the slots they take
    victim_rows: Tensor  # [V] int64, rows that leave ...
    victim_slots: Tensor  # [V] int64, ... and the slots they leave, the first V of `miss_slots`


@dataclass
class CachePlan:
    """What was planned for one batch and pool. How many rows it concerns is known on the host after :meth:`wait`."""

    request: PlanRequest
    buffers: PlanBuffers
    seen: int | None
    planned: torch.Event | None
    moved: torch.Event | None = None  # when its rows are in their slots; None if none has moved
    is_counted: bool = False  # whether the slot map has taken in how many slots it holds
    stages: list[TimedStage] = field(default_factory=list)  # that the counters have not taken in

    @property
    def batch_index(self) -> int:
        """Of all that were planned in its pool, counted from 1."""
        return self.request.batch_index

    @property
    def num_ids(self) -> int:
        """I."""
        return self.request.ids.ids.numel()

    @property
    def slots(self) -> Tensor:
        """[>= I] int64, of all pools of the kernel group."""
        return self.request.slots

    @property
    def is_known(self) -> bool:
        """Whether :meth:`wait` would return at once."""
        return self.planned is None or self.planned.query()

    def wait(self) -> list[int]:
        """Wait until the counts have come to the host."""
        if self.planned is not None:
            self.planned.synchronize()
        counts: list[int] = self.buffers.host_counts.tolist()
        return counts

    def moves(self) -> RowMoves:
        """The rows that come and go; waits for the plan."""
        counts = self.wait()
        num_fills, num_writebacks = counts[Count.FILLS], counts[Count.WRITEBACKS]
        miss_slots = self.buffers.miss_slots[:num_fills].long()
        return RowMoves(
            self.buffers.miss_rows[:num_fills],
            miss_slots,
            self.buffers.victim_rows[:num_writebacks],
            miss_slots[:num_writebacks],
        )

    def note_stage(self, stage: Stage, start_s: float, moved: tuple[Count, ...]) -> None:
        """Note that a stage has ended just now."""
        self.stages.append(TimedStage(stage, start_s, time.perf_counter(), moved))

    @contextmanager
    def timed(self, stage: Stage, moved: tuple[Count, ...]) -> Iterator[None]:
        """While entered, a stage runs."""
        start_s = time.perf_counter()
        with record_function(f"## scratchpipe {stage.value} {self.batch_index} ##"):
            yield
        self.note_stage(stage, start_s, moved)


class SlotMap:
    """The two maps between rows and slots of one pool, and the holds of batches in flight.

    A slot is held while ``last_use >= first_held``. `first_held` is the oldest batch that was planned and not yet
    released. Held slots never become victims (hazards 1 and 3).

    A batch may be seen before it is planned. Then the choice of victims knows that the batch will use its rows.

    The device learns the sizes, and Plan waits for nothing, if the plan is certain to find its slots: if what batches
    in flight use, together with the ids of this one, is no more than there are slots. Where it is not certain,
    :meth:`confirm` waits to see, because whoever asks must try again after the next Train.

    Slots are not scanned for each batch. One scan lists a sixteenth of them, or as many as are wanted, by bins of an
    eighth of an octave of their frequency, and the list serves until it is spent.

    The maps cost 4 bytes per row and 26.5 bytes per slot, and 2 bytes per id of each batch that is seen ahead.

    All methods but :meth:`release`, :meth:`unsee` and :meth:`unsee_failed` enqueue on the current stream, and must be
    called between the stages of two batches.

    Source: ScratchPipe (ISCA 2022): Hit-Map, Hold mask and Plan stage.
    """

    def __init__(
        self,
        num_rows: int,
        num_slots: int,
        row_offsets: Sequence[int],
        ops: SlotOps,
        device: torch.device,
        streams: StageStreams | None = None,
        half_life: float = HALF_LIFE,
    ) -> None:
        assert 1 <= num_slots <= max(1, num_rows), f"{num_slots=} must lie in [1, {num_rows=}]"
        self.num_rows = num_rows
        self.num_slots = num_slots
        self.device = device
        self.ops = ops
        self._streams = streams or StageStreams(device, is_overlapped=False)
        self.table_counts = TableCounts.of(row_offsets, device)
        self._capacity = 0
        row_to_slot = torch.full((num_rows,), -1, dtype=torch.int32, device=device)
        self.maps = make_maps(row_to_slot, num_slots, self._num_listed)
        self._scratch = _make_scratch(0, device)
        self.order_buffers: dict[Count, OrderBuffers] = {}  # by what moves, if `ops` orders it
        self.num_remakes = 0  # how often maps, or what all batches share, have been made anew
        for tensor in (*vars(self.maps).values(), *vars(self.table_counts).values()):
            self._streams.record_use(tensor)
        self._free_buffers: list[tuple[PlanBuffers, torch.Event | None]] = []  # and when their last plan was made
        self._moved_of_released: list[torch.Event] = []  # of batches that may have been dropped while their rows moved
        self.next_batch = 1  # so that slots which nobody holds can have been used by an earlier batch, 0
        self.first_held = 1  # the oldest batch in flight, or `next_batch`; as of the last `take_in_releases`
        self.num_early_frees = 0  # how often slots were made to look as if used earlier than they were
        self._newly_released: deque[int] = deque()
        self._released_early: set[int] = set()
        self._in_flight: dict[int, CachePlan] = {}
        self._slots_held_by: dict[int, int] = {}  # at most, for each batch since the first held
        self._seen: deque[int] = deque()  # batches seen and not yet planned, in the order they were seen
        self._num_seen = 0
        # Where the sightings of a batch begin, from when it is seen until it is released.
        self._first_places: dict[int, int] = {}
        self._free_places: list[int] = []
        self._sightings_per_batch = 0
        self._newly_unseen: deque[int] = deque()
        self._newly_failed: deque[int] = deque()
        self.half_life = half_life
        self._origin = 0
        self._newest: CachePlan | None = None
        self.num_waits = 0  # how often Plan had to wait to see whether there were slots
        self.observer: Callable[[CachePlan], None] | None = None  # is shown each plan that stands, right after it

    @property
    def num_seen_ahead(self) -> int:
        """Batches that were seen and are not planned yet."""
        return len(self._seen)

    @property
    def scratch(self) -> ScratchBuffers:
        """What the latest plan has found, until the next one."""
        return self._scratch

    @property
    def num_batches_in_flight(self) -> int:
        """Batches planned and not yet released, counted from the oldest one that still holds."""
        released, first_held = self._released_early.union(self._newly_released), self.first_held
        while first_held in released:
            first_held += 1
        return self.next_batch - first_held

    def count_resident_rows(self) -> int:
        """Rows that sit in a slot now; waits for the device."""
        return self.num_slots - int(self.maps.state[State.NUM_FREE])

    def see(self, batch: PoolIds) -> int | None:
        """Take note of what a batch will use, before it is planned; places and moves nothing.

        Returns a ticket for :meth:`plan` or :meth:`unsee`; None if too many batches are seen already.
        """
        self._take_back_sightings()
        # A distance has a bin for each of MAX_SEEN batches in a row.
        if self._seen and self._num_seen - self._seen[0] >= MAX_SEEN:
            return None
        seen, num_ids = self._num_seen, batch.ids.ids.numel()
        self._num_seen += 1
        self._seen.append(seen)
        first = self._first_places[seen] = self._take_places(num_ids)
        self.maps.sightings[first : first + num_ids] = 0
        self.ops.mark(*batch, self.maps, self._sighting_of(seen), use_of(self._seen[0]))
        return seen

    def unsee(self, seen: int) -> None:
        """Take back :meth:`see` of a batch that was not planned and will not be; from any thread.

        All rows are looked at, once for all batches that are taken back together.
        """
        self._newly_unseen.append(seen)

    def unsee_failed(self, seen: int) -> None:
        """Take back :meth:`see` of a batch whose plan was refused for a bad id; from any thread."""
        self._newly_failed.append(seen)

    def release(self, batch_index: int) -> None:
        """Let go of a batch's slots; may be called from any thread, in any order; a second call does nothing."""
        self._newly_released.append(batch_index)

    def take_in_releases(self) -> None:
        """Take in what was released; the caller then orders the current stream after the Trains of those batches."""
        while self._newly_released:
            batch_index = self._newly_released.popleft()
            if batch_index >= self.first_held:
                self._released_early.add(batch_index)
                plan = self._in_flight.pop(batch_index, None)
                if plan is not None:
                    self._recycle(plan)
                    self._take_back_sightings()  # of a batch that was refused, before its places are given away
                    self._let_go_of_places(plan.seen)
        # Slots are held from one batch on. A batch that is released before an older one keeps its slots until then.
        while self.first_held in self._released_early:
            self._released_early.remove(self.first_held)
            self._slots_held_by.pop(self.first_held, None)
            self.first_held += 1

    def plan(
        self, batch: PoolIds, seen: int | None = None, slots: Tensor | None = None, *, has_whole_tables: bool = False
    ) -> CachePlan:
        """Enqueue what gives every row of the next batch a slot, as of the last :meth:`take_in_releases`.

        Hits keep their slot. Misses take free slots, then those of victims. All slots of the batch are held until
        :meth:`release`. Moves may be enqueued at once: if there are too few slots they move nothing. The plan stands
        after :meth:`confirm`. If it is refused all the same, an id is bad.

        `slots` [>= I] int64 are to be written, if the batch has them from another pool of its kernel group. With
        `has_whole_tables`, ids of features that no pool serves are slots as they are.
        """
        self._take_back_sightings()
        self._newest = None
        # 1. Buffers that the device is done with, and that all ids fit into.
        num_ids = batch.ids.ids.numel()
        self._make_room(num_ids)
        buffers = self._take_buffers()
        # 2. Batches that were dropped while their rows moved: their slots may be given away now, and their buffers are
        # used again.
        for moved in self._moved_of_released:
            self._streams.wait(self._streams.plan, moved)
        self._moved_of_released.clear()
        # 3. The numbers that tell this plan from the one before.
        if slots is None:
            slots = buffers.slots
            if has_whole_tables:
                slots[:num_ids].copy_(batch.ids.ids)
        request = PlanRequest(
            batch.ids,
            batch.features,
            slots,
            self.next_batch,
            self.first_held,
            use_of(self._seen[0] if self._seen else self._num_seen),
            self._sighting_of(seen) if seen is not None and seen in self._seen else NOT_SEEN,
            self._age(self.next_batch),
        )
        self.ops.prepare(request, buffers)
        # 4. The launches. They depend on the key and on the buffers, and on nothing else, so that they can be recorded.
        addresses = tuple(tensor.data_ptr() for tensor in batch.features)
        key = (self.num_remakes, addresses, batch.ids.ids.dtype, batch.ids.bounds.dtype)
        with self.ops.recorded(buffers, key) as is_enqueued:
            if not is_enqueued:
                self._enqueue_plan(request, buffers)
        planned = self._streams.record(self._streams.plan)
        return CachePlan(request, buffers, seen, planned)

    def count_misses(self, plan: CachePlan) -> None:
        """Count which ids of a plan that stands do not find their row in their slot: there must be none.

        From any thread.
        """
        key = ("count_misses", self.num_remakes)
        num_misses = self.table_counts.num_misses_at_train
        with self.ops.recorded(plan.buffers, key) as is_enqueued:
            if not is_enqueued:
                self.ops.count_misses(plan.request, self.maps, plan.buffers, num_misses)

    def _enqueue_plan(self, request: PlanRequest, buffers: PlanBuffers) -> None:
        ops, maps, scratch = self.ops, self.maps, self._scratch

        # Hits are held from now on. Misses are marked.
        ops.find(request, maps, buffers, scratch)

        # Misses that free slots do not suffice for take listed victims, if no batch seen ahead will use those ...
        ops.take(request, maps, buffers, scratch, True)
        # ... and where the list is spent, all slots are listed anew.
        ops.scan(request, maps, buffers, self._num_listed)
        ops.take(request, maps, buffers, scratch, False)

        # If each miss has a slot, rows change places. Else everything is as before.
        ops.commit(request, maps, buffers, scratch, self.table_counts)

        # Train looks up slots instead of ids.
        ops.translate(request, maps, buffers, self.table_counts)
        ops.report(buffers)

    def confirm(self, plan: CachePlan) -> bool:
        """Let a plan stand; waits for it where it is not certain to have found its slots.

        False: it found too few, and some have been freed since. Plan again, at once. Raises SlotsHeldError if there are
        none to free.
        """
        # 1. A plan that may have found too few slots is waited for.
        if not self._is_certain(plan.num_ids):
            self.num_waits += 1
            counts = plan.wait()
            if counts[Count.IS_REFUSED] and not counts[Count.BAD_POSITION]:
                are_slots_freed = self._free_early_releases(plan)
                self._recycle(plan)
                if are_slots_freed:
                    return False
                num_held = int((self.maps.last_use >= self.first_held).sum())
                raise SlotsHeldError(counts[Count.HITS] + counts[Count.MISSES], self.num_slots - num_held)
        # 2. It stands: the batch is in flight, and is not ahead any more.
        if plan.seen is not None and plan.seen in self._seen:
            self._seen.remove(plan.seen)
        self._in_flight[plan.batch_index] = self._newest = plan
        self._slots_held_by[plan.batch_index] = min(plan.num_ids, self.num_rows)
        self.next_batch += 1
        if self.observer is not None:
            self.observer(plan)
        return True

    def undo(self, plan: CachePlan) -> None:
        """Take back a plan, none of whose rows has moved; its batch counts as released. Waits for it."""
        assert plan is self._newest, f"{plan.batch_index=} is not what was planned last, {self.next_batch=}"
        counts = plan.wait()
        if not counts[Count.IS_REFUSED]:
            self._put_back(plan, counts)
        self.release(plan.batch_index)

    def purge(self) -> None:
        """Empty every slot without writing anything back; no batch may be in flight."""
        assert self.num_batches_in_flight == 0, f"{self.num_batches_in_flight} batches in flight"
        maps = self.maps
        occupied = (maps.slot_to_row >= 0).nonzero().view(-1)
        # What was seen ahead of a row stays known, by the entry of the absent row.
        maps.row_to_slot.index_copy_(0, self.rows_in(occupied), self._entries_of_absent(occupied))
        maps.next_use.zero_()
        maps.newest_sighting.fill_(-1)
        maps.slot_to_row.fill_(-1)
        maps.last_use.fill_(-1)
        maps.frequency.zero_()
        maps.free_slots.copy_(torch.arange(self.num_slots - 1, -1, -1, dtype=torch.int32))
        maps.state[State.NUM_FREE] = self.num_slots
        self.ops.clear_victim_list(maps)

    def grow(self, num_slots: int) -> None:
        """Add free slots behind those there are; only between the stages of two batches."""
        assert self.num_slots < num_slots <= self.num_rows, (
            f"{num_slots=} must lie in ({self.num_slots}, {self.num_rows}]"
        )
        old, num_old, self.num_slots = self.maps, self.num_slots, num_slots
        new_maps = make_maps(old.row_to_slot, num_slots, self._num_listed + self._capacity)
        self.maps = replace(new_maps, sightings=old.sightings)
        for name in ("slot_to_row", "last_use", "next_use", "newest_sighting", "frequency"):
            getattr(self.maps, name)[:num_old] = getattr(old, name)
        num_free = int(old.state[State.NUM_FREE])
        new = torch.arange(num_old, num_slots, dtype=torch.int32, device=self.device).flip(0)
        self.maps.free_slots[: num_free + new.numel()] = torch.cat([new, old.free_slots[:num_free]])
        self.maps.state[State.NUM_FREE] = num_free + new.numel()
        for tensor in vars(self.maps).values():
            self._streams.record_use(tensor)
        self._drop_free_buffers()  # what is recorded for them is about the old maps
        self.num_remakes += 1

    def resident_since(self, batch_index: int) -> tuple[Tensor, Tensor]:
        """Rows in slots that this batch or a later one uses; scans all slots.

        Nothing is said of slots that were freed early: where :attr:`num_early_frees` has changed, ask for all.

        Shapes: returns [N] int64.
        """
        slots = (self.maps.last_use >= batch_index).nonzero().view(-1)
        return slots, self.rows_in(slots)

    def rows_in(self, slots: Tensor) -> Tensor:
        """The rows that sit in these slots now. Shapes: `slots` [N] int64, returns [N] int64."""
        return self.maps.slot_to_row.index_select(0, slots)

    @property
    def metadata_bytes(self) -> int:
        """Device memory of maps and buffers of all kinds, without rows."""
        tensors = [*vars(self.maps).values(), *vars(self._scratch).values(), *vars(self.table_counts).values()]
        for order_buffers in self.order_buffers.values():
            tensors += vars(order_buffers).values()
        in_flight = [plan.buffers for plan in self._in_flight.values()]
        for buffers in [*in_flight, *(buffers for buffers, _ in self._free_buffers)]:
            tensors += vars(buffers).values()
        return sum(tensor.nbytes for tensor in tensors)

    def check_integrity(self) -> None:
        """Assert the laws of the maps; scans them, for tests. Raises AssertionError."""
        maps = self.maps
        occupied = (maps.slot_to_row >= 0).nonzero().view(-1)
        rows = maps.slot_to_row[occupied]
        num_mapped = int((maps.row_to_slot >= 0).sum())
        free_slots = maps.free_slots[: int(maps.state[State.NUM_FREE])].long()
        num_free = free_slots.numel()
        assert num_free + occupied.numel() == self.num_slots, f"{num_free=} + {occupied.numel()=} != {self.num_slots=}"
        assert num_mapped == occupied.numel(), f"{num_mapped=} rows mapped, {occupied.numel()=} slots occupied"
        assert torch.equal(maps.row_to_slot[rows].long(), occupied), "row_to_slot is not the inverse of slot_to_row"
        assert int((maps.slot_to_row[free_slots] >= 0).sum()) == 0, "a free slot holds a row"
        assert free_slots.unique().numel() == num_free, "a slot is free twice"
        assert int((maps.last_use[occupied] < 0).sum()) == 0, "an occupied slot was never used"
        newest = maps.newest_sighting
        absent = -1 - maps.row_to_slot[maps.row_to_slot < 0]
        places = torch.cat([newest[newest >= 0], absent[absent >= SEEN] - SEEN]).long()
        assert places.unique().numel() == places.numel(), "two rows have one sighting"
        is_ahead = torch.zeros_like(maps.sightings, dtype=torch.bool)
        for seen in self._seen:
            is_ahead[self._first_places[seen] : self._first_places[seen] + self._sightings_per_batch] = True
        stray = int((~is_ahead[places]).sum())
        assert stray == 0, f"{stray} slots or rows wait for a batch that is not ahead"
        assert int((maps.sightings[places] > 0).sum()) == 0, "a row's newest sighting is not its newest"
        assert int((maps.sightings[newest[newest >= 0].long()] != 0).sum()) == 0, "a row in a slot has a note"

    @property
    def _num_listed(self) -> int:
        return max(1, self.num_slots // 16)

    def _age(self, batch_index: int) -> Aging:
        # A use counts 2 ** half_lives instead of all older uses being halved again and again. Before that number
        # leaves the range of float32, all frequencies are multiplied once, and counting starts anew.
        half_lives = (batch_index - self._origin) / self.half_life
        if half_lives > MAX_HALF_LIVES:
            self.ops.age(self.maps, 2.0**-half_lives)
            self._origin, half_lives = batch_index, 0.0
        return Aging(2.0**half_lives, math.fmod(self._origin / self.half_life * NOTES_PER_OCTAVE, NUM_NOTES))

    def _is_certain(self, num_ids: int) -> bool:
        # A batch in flight holds at most as many slots as it has ids, and exactly as many as its plan has counted.
        for batch_index, plan in self._in_flight.items():
            if plan.is_known and not plan.is_counted:
                plan.is_counted = True
                counts = plan.wait()
                self._slots_held_by[batch_index] = counts[Count.HITS] + counts[Count.MISSES]
        return sum(self._slots_held_by.values()) + min(num_ids, self.num_rows) <= self.num_slots

    def _free_early_releases(self, refused: CachePlan) -> bool:
        """Free slots of batches that were released out of order; whether there were any.

        Slots are held from the oldest batch in flight on. A batch that was released before it therefore keeps its
        slots. This costs nothing while batches are released in order. Where one stays behind (a loss that is kept and
        never sees a backward), its own slots must be told from the others: `last_use` of the others is set to before
        `first_held`.
        """
        is_held = torch.zeros(self.num_slots, dtype=torch.bool, device=self.device)
        for plan in [*self._in_flight.values(), refused]:
            rows = plan.buffers.rows[: plan.num_ids]
            slots = self.maps.row_to_slot[rows[rows >= 0]]
            is_held[slots[slots >= 0].long()] = True
        may_leave = (self.maps.last_use >= self.first_held) & ~is_held
        if not bool(may_leave.any()):
            return False
        self.maps.last_use[may_leave] = self.first_held - 1
        self.num_early_frees += 1
        self.ops.clear_victim_list(self.maps)
        return True

    def _put_back(self, plan: CachePlan, counts: list[int]) -> None:
        """Make the maps as they were before a plan."""
        # The scratch still has what this plan found: no other plan has been made since.
        maps, moves = self.maps, plan.moves()
        freed = moves.miss_slots[moves.victim_slots.numel() :]  # those that were free
        newest_of_victims = -1 - maps.row_to_slot.index_select(0, moves.victim_rows) - SEEN
        is_ahead = newest_of_victims >= 0
        maps.row_to_slot.index_copy_(0, moves.miss_rows, self._entries_of_absent(moves.miss_slots))
        maps.slot_to_row.index_fill_(0, freed, -1)
        maps.last_use.index_fill_(0, freed, -1)
        maps.next_use.index_fill_(0, freed, 0)
        maps.newest_sighting.index_fill_(0, freed, -1)
        # Victims come back to their slots, and may be used soon: which of their uses is next is not known any more.
        maps.sightings.index_fill_(0, newest_of_victims[is_ahead].long(), 0)
        maps.newest_sighting.index_copy_(0, moves.victim_slots, torch.where(is_ahead, newest_of_victims, -1))
        maps.next_use.index_copy_(0, moves.victim_slots, is_ahead.short() * plan.request.first_use)
        maps.row_to_slot.index_copy_(0, moves.victim_rows, moves.victim_slots.int())
        maps.slot_to_row.index_copy_(0, moves.victim_slots, moves.victim_rows)
        maps.last_use[moves.victim_slots] = self._scratch.victim_last_use[: moves.victim_slots.numel()]
        # Hits look as if this batch had not used them.
        hits = self._scratch.hit_slots[: counts[Count.HITS]].long()
        maps.last_use[hits] = self._scratch.hit_last_use[: hits.numel()]
        # Free slots are a stack: those that were taken last go back on top.
        num_free = int(maps.state[State.NUM_FREE])
        maps.free_slots[num_free : num_free + freed.numel()] = freed.flip(0).int()
        maps.state[State.NUM_FREE] = num_free + freed.numel()
        self.ops.clear_victim_list(maps)

    def _entries_of_absent(self, slots: Tensor) -> Tensor:
        """[N] int32: what `row_to_slot` says of the rows in these slots once they have left; no note of their uses."""
        newest = self.maps.newest_sighting.index_select(0, slots)
        return -1 - torch.where(newest >= 0, newest | SEEN, 0)

    def _make_room(self, num_ids: int) -> None:
        if num_ids <= self._capacity:
            return
        self._capacity = max(SMALLEST_CAPACITY, math.ceil(BUFFER_HEADROOM * num_ids))
        self._drop_free_buffers()
        self._scratch = _make_scratch(self._capacity, self.device)
        if self.ops.orders_moves:
            self.order_buffers = {
                count: _make_order_buffers(self._capacity, self.device) for count in (Count.FILLS, Count.WRITEBACKS)
            }
        for shared in (self._scratch, *self.order_buffers.values()):
            for tensor in vars(shared).values():
                self._streams.record_use(tensor)
        self.num_remakes += 1
        num_listed = self._num_listed + self._capacity  # a whole batch may be missing
        listed = torch.zeros(num_listed, dtype=torch.int32, device=self.device)
        self.ops.clear_victim_list(self.maps)
        self.maps = replace(self.maps, listed=listed, listed_last_use=torch.zeros_like(listed))

    def _take_buffers(self) -> PlanBuffers:
        if self._free_buffers:
            buffers, planned = self._free_buffers.pop()
            if planned is not None:
                planned.synchronize()  # has long happened, but for a batch that was dropped: the host writes to them
            return buffers
        buffers = _make_buffers(self._capacity, self.device)
        for tensor in vars(buffers).values():
            self._streams.record_use(tensor)
        return buffers

    def _recycle(self, plan: CachePlan) -> None:
        if plan.moved is not None:
            self._moved_of_released.append(plan.moved)
        if plan.buffers.rows.numel() == self._capacity:
            self._free_buffers.append((plan.buffers, plan.planned))
        elif plan.planned is not None:
            plan.planned.synchronize()  # Plan's kernels read and write its page-locked numbers

    def _drop_free_buffers(self) -> None:
        for _, planned in self._free_buffers:
            if planned is not None:
                planned.synchronize()  # as above
        self._free_buffers.clear()

    def _take_back_sightings(self) -> None:
        dropped = []
        while self._newly_unseen:
            seen = self._newly_unseen.popleft()
            if seen in self._seen:
                self._seen.remove(seen)
                dropped.append(seen)
        while self._newly_failed:
            dropped.append(self._newly_failed.popleft())
        if dropped:
            self._forget(dropped)

    def _forget(self, dropped: Sequence[int]) -> None:
        """No row is to be found by the sightings of these batches any more, or wait for them.

        A use after one of theirs is forgotten where theirs was the next.
        """
        maps, size = self.maps, self._sightings_per_batch
        is_dropped = torch.zeros(maps.sightings.numel() // size, dtype=torch.bool, device=self.device)
        for seen in dropped:
            is_dropped[self._first_places[seen] // size] = True
        for entries in maps.row_to_slot.split(ROWS_AT_A_TIME):
            absent = (entries < -SEEN).nonzero().view(-1)
            places = -1 - SEEN - entries.index_select(0, absent)
            theirs = is_dropped[places // size]
            absent = absent[theirs]
            entries.index_copy_(0, absent, -1 - notes_of(entries.index_select(0, absent), maps))
        newest = maps.newest_sighting
        newest.masked_fill_((newest >= 0) & is_dropped[newest.clamp(min=0) // size], -1)
        for seen in dropped:
            maps.next_use.masked_fill_(maps.next_use == use_of(seen), 0)
            self._let_go_of_places(seen)

    def _sighting_of(self, seen: int) -> Sighting:
        return Sighting(use_of(seen), self._first_places[seen])

    def _take_places(self, num_ids: int) -> int:
        """Where the sightings of a batch begin."""
        if self._sightings_per_batch < max(1, num_ids):
            self._widen_sightings(max(SMALLEST_CAPACITY, math.ceil(BUFFER_HEADROOM * num_ids)))
        if not self._free_places:
            old, size = self.maps.sightings, self._sightings_per_batch
            more = torch.zeros(SIGHTINGS_AT_A_TIME * size, dtype=torch.int16, device=self.device)
            self._free_places = list(range(old.numel(), old.numel() + more.numel(), size))
            self._replace_sightings(torch.cat([old, more]))
        return self._free_places.pop()

    def _let_go_of_places(self, seen: int | None) -> None:
        """No row is found by the sightings of this batch any more."""
        if seen in self._first_places:
            self._free_places.append(self._first_places.pop(seen))

    def _widen_sightings(self, size: int) -> None:
        """More room for each batch: all sightings move, and rows find them where they come to be."""
        maps, old_size = self.maps, max(1, self._sightings_per_batch)
        self._sightings_per_batch = size

        def moved(place: Any) -> Any:
            return place // old_size * size + place % old_size

        for entries in maps.row_to_slot.split(ROWS_AT_A_TIME):
            places = -1 - entries - SEEN
            seen = ((entries < 0) & (places >= 0)).nonzero().view(-1)
            entries.index_copy_(0, seen, -1 - (moved(places[seen]) | SEEN))
        newest = maps.newest_sighting
        newest.copy_(torch.where(newest >= 0, moved(newest), -1))
        wider = torch.zeros(maps.sightings.numel() // old_size, size, dtype=torch.int16, device=self.device)
        wider[:, :old_size] = maps.sightings.view(-1, old_size)
        self._replace_sightings(wider.view(-1))
        self._first_places = {seen: moved(place) for seen, place in self._first_places.items()}
        self._free_places = [moved(place) for place in self._free_places]

    def _replace_sightings(self, sightings: Tensor) -> None:
        self._streams.record_use(sightings)
        self.maps = replace(self.maps, sightings=sightings)
        self.num_remakes += 1


def _make_scratch(capacity: int, device: torch.device) -> ScratchBuffers:
    return ScratchBuffers(*(torch.empty(capacity, dtype=torch.int32, device=device) for _ in range(4)))


def _make_order_buffers(capacity: int, device: torch.device) -> OrderBuffers:
    return OrderBuffers(
        rows=torch.empty(capacity, dtype=torch.int64, device=device),
        slots=torch.empty(capacity, dtype=torch.int32, device=device),
        bins=torch.zeros(NUM_ORDER_BINS, dtype=torch.int32, device=device),
    )


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
        numbers=torch.zeros(len(Number), dtype=torch.int64, device=device),
        host_numbers=torch.zeros(len(Number), dtype=torch.int64, pin_memory=device.type == "cuda"),
    )
