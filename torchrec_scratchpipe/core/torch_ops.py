# SPDX-License-Identifier: BSD-3-Clause
"""The device operations in torch: those of a CPU, and what the Triton kernels are compared with.

They are right on any device. On CUDA they are slow, because most of them wait for the device.
"""

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchrec_scratchpipe.core.slot_ops import (
    BEING_PLACED,
    FREQUENCY_BINS,
    FREQUENCY_SHIFT,
    LOWEST_BIN,
    LOWEST_FREQUENCY,
    MAX_OCTAVES,
    MAX_SEEN,
    NOTES_PER_OCTAVE,
    NUM_BINS,
    NUM_NOTES,
    NUM_USES,
    SEEN,
    CommonOps,
    Count,
    FeatureIds,
    FeatureRows,
    PlanBuffers,
    PlanRequest,
    ScratchBuffers,
    Sighting,
    SlotMaps,
    State,
    TableCounts,
)

__all__ = ["TorchOps", "distances", "frequencies_of_notes", "notes_of", "rows_of_ids"]

SMALLEST_CHUNK = 1024  # of the list of coming victims, looked at together


class _Found(NamedTuple):
    """What :meth:`TorchOps.find` knows of a batch, and later operations need. ``N`` ids are the pool's own."""

    rows: Tensor  # [N] int64
    positions: Tensor | None  # [N] int64, among all ids; None if all ids are the pool's
    known: Tensor  # [N] int32, what row_to_slot said
    # By feature, to be counted when the plan stands:
    table: Tensor  # [F] int32, -1 for other pools' features
    num_ids: Tensor  # [F]
    num_unique: Tensor  # [F]; a row that several features look up is the first one's
    num_misses: Tensor  # [F]

    def add_to(self, tables: TableCounts) -> None:
        """Count."""
        is_mine = self.table >= 0
        table = self.table.clamp(min=0)
        for counts, of_feature in (
            (tables.num_ids, self.num_ids),
            (tables.num_unique, self.num_unique),
            (tables.num_misses, self.num_misses),
        ):
            counts.index_add_(0, table, of_feature * is_mine)


class TorchOps(CommonOps):
    """See :class:`~torchrec_scratchpipe.core.slot_ops.SlotOps`, which says what each operation does.

    Not to be shared by slot maps that plan at the same time: what :meth:`find` has found stays here until
    :meth:`translate`.
    """

    _found: _Found

    def prepare(self, request: PlanRequest, buffers: PlanBuffers) -> None:
        """Does nothing: operations take what they need from the request."""

    def recorded(self, buffers: PlanBuffers, key: Hashable) -> AbstractContextManager[bool]:
        """See :class:`SlotOps`; nothing is recorded."""
        return nullcontext(False)

    def mark(self, ids: FeatureIds, features: FeatureRows, maps: SlotMaps, sighting: Sighting, first_use: int) -> None:
        use, first_place = sighting
        rows, positions = _rows_of_ids(ids, features).valid()
        places = torch.arange(first_place, first_place + ids.ids.numel(), dtype=torch.int32, device=rows.device)
        if positions is not None:
            places = places.index_select(0, positions)
        entries = maps.row_to_slot.index_select(0, rows)
        is_absent = entries < 0
        self._mark_absent(rows, entries, places, _positions(is_absent), maps, use)
        present = _positions(is_absent.logical_not_())
        slots, places = entries.index_select(0, present).long(), places.index_select(0, present)
        before = maps.newest_sighting.index_select(0, slots)
        # Of several places of a row, one stands for it: the one that is read back.
        maps.newest_sighting.scatter_(0, slots, places)
        stands = _positions(maps.newest_sighting.index_select(0, slots) == places)
        slots, before = slots.index_select(0, stands), before.index_select(0, stands)
        has_sighting = before >= 0
        maps.sightings.scatter_(0, before.index_select(0, _positions(has_sighting)).long(), use)
        slots = slots.index_select(0, _positions(has_sighting.logical_not_()))
        is_unused_ahead = distances(maps.next_use.index_select(0, slots), first_use) == MAX_SEEN
        maps.next_use.scatter_(0, slots.index_select(0, _positions(is_unused_ahead)), use)

    def _mark_absent(
        self, rows: Tensor, entries: Tensor, places: Tensor, absent: Tensor, maps: SlotMaps, use: int
    ) -> None:
        """Absent rows, at some positions among these: their notes move to their newest sightings."""
        rows, places = rows.index_select(0, absent), places.index_select(0, absent)
        new_entries = -1 - (places | SEEN)
        maps.row_to_slot.scatter_(0, rows, new_entries)
        stands = _positions(maps.row_to_slot.index_select(0, rows) == new_entries)
        entries = entries.index_select(0, absent).index_select(0, stands)
        notes = notes_of(entries, maps).short()
        before = -1 - SEEN - entries
        maps.sightings.scatter_(0, before.index_select(0, _positions(before >= 0)).long(), use)
        maps.sightings.scatter_(0, places.index_select(0, stands).long(), -notes)

    def find(self, request: PlanRequest, maps: SlotMaps, buffers: PlanBuffers, scratch: ScratchBuffers) -> None:
        ids, features = request.ids, request.features
        looked_up = _rows_of_ids(ids, features)
        _put(buffers.rows, looked_up.rows)
        rows, positions_of_rows = looked_up.valid()
        known = maps.row_to_slot.index_select(0, rows)
        is_miss = known < 0
        # Every id writes its position; the one that is read back represents its row. No sort. Rows in slots write to
        # their slot's last use, which is set anyway.
        hits = _positions(is_miss.logical_not())
        slots, marks = known.index_select(0, hits).long(), hits.int()
        last_use = maps.last_use.index_select(0, slots)
        maps.last_use.scatter_(0, slots, marks)
        stands = _positions(maps.last_use.index_select(0, slots) == marks)
        hits, hit_slots = hits.index_select(0, stands), slots.index_select(0, stands)
        maps.last_use.scatter_(0, hit_slots, request.batch_index)
        _put(scratch.hit_slots, hit_slots)
        _put(scratch.hit_last_use, last_use.index_select(0, stands))
        # Absent ones write to their entry.
        misses = _positions(is_miss)
        miss_rows, marks = rows.index_select(0, misses), misses.int()
        maps.row_to_slot.scatter_(0, miss_rows, marks)
        stands = _positions(maps.row_to_slot.index_select(0, miss_rows) == marks)
        misses, miss_rows = misses.index_select(0, stands), miss_rows.index_select(0, stands)
        maps.row_to_slot.scatter_(0, miss_rows, BEING_PLACED)
        _put(buffers.miss_rows, miss_rows)
        _put(scratch.miss_known, known.index_select(0, misses))
        if positions_of_rows is not None:
            hits, misses = positions_of_rows.index_select(0, hits), positions_of_rows.index_select(0, misses)
        bounds = ids.bounds.long()
        num_misses = torch.searchsorted(misses, bounds).diff()
        self._found = _Found(
            rows,
            positions_of_rows,
            known,
            features.table,
            num_ids=bounds.diff(),
            num_unique=torch.searchsorted(hits, bounds).diff() + num_misses,
            num_misses=num_misses,
        )
        counts = [0] * len(Count)
        counts[Count.HITS], counts[Count.MISSES] = hit_slots.numel(), misses.numel()
        counts[Count.BAD_POSITION] = looked_up.bad_position
        buffers.counts.copy_(torch.tensor(counts, dtype=torch.int64))

    def take(
        self,
        request: PlanRequest,
        maps: SlotMaps,
        buffers: PlanBuffers,
        scratch: ScratchBuffers,
        skips_used_ahead: bool,
    ) -> None:
        counts, state = buffers.counts.tolist(), maps.state.tolist()
        counts[Count.FROM_FREE] = min(counts[Count.MISSES], state[State.NUM_FREE])
        buffers.counts[Count.FROM_FREE] = counts[Count.FROM_FREE]
        taken, missing = counts[Count.VICTIMS], _num_missing(counts)
        head, length = state[State.LIST_HEAD], state[State.LIST_LENGTH]
        while missing > 0 and head < length:
            end = min(length, head + max(SMALLEST_CHUNK, 2 * missing))
            listed, last_use = maps.listed[head:end], maps.listed_last_use[head:end]
            is_usable = (maps.last_use.index_select(0, listed) == last_use) & (last_use < request.first_held)
            if skips_used_ahead:
                is_usable &= distances(maps.next_use.index_select(0, listed), request.first_use) == MAX_SEEN
            positions = _positions(is_usable)[:missing]
            chosen = listed.index_select(0, positions)
            _put(buffers.miss_slots[taken:], chosen)
            _put(scratch.victim_last_use[taken:], last_use.index_select(0, positions))
            maps.last_use.scatter_(0, chosen.long(), request.batch_index)
            head = head + int(positions[-1]) + 1 if positions.numel() == missing else end
            taken, missing = taken + positions.numel(), missing - positions.numel()
        buffers.counts[Count.VICTIMS], maps.state[State.LIST_HEAD] = taken, head

    def scan(self, request: PlanRequest, maps: SlotMaps, buffers: PlanBuffers, num_wanted: int) -> None:
        missing = _num_missing(buffers.counts.tolist())
        if missing <= 0:
            return
        bins = _bins(maps, request.first_held, request.first_use)
        at_most = torch.bincount(bins, minlength=NUM_BINS + 1)[:NUM_BINS].cumsum(0)
        num_unused_ahead = int(at_most[FREQUENCY_BINS - 1])
        target = max(missing, num_wanted)
        if num_unused_ahead >= missing:
            target = min(target, num_unused_ahead)
        threshold = min(int((at_most < target).sum()), NUM_BINS - 1)
        below = _positions(bins < threshold)
        listed = torch.cat([below, _positions(bins == threshold)])[: maps.listed.numel()]
        _put(maps.listed, listed)
        _put(maps.listed_last_use, maps.last_use.index_select(0, listed))
        state = maps.state
        state[State.LIST_HEAD], state[State.LIST_LENGTH] = 0, listed.numel()
        state[State.THRESHOLD], state[State.NUM_BELOW] = threshold, below.numel()

    def commit(
        self, request: PlanRequest, maps: SlotMaps, buffers: PlanBuffers, scratch: ScratchBuffers, tables: TableCounts
    ) -> None:
        batch_index, aging = request.batch_index, request.aging
        use, first_place = request.sighting
        end_place = first_place + (request.ids.ids.numel() if use > 0 else 0)
        counts = buffers.counts.tolist()
        num_misses, num_victims = counts[Count.MISSES], counts[Count.VICTIMS]
        hits = scratch.hit_slots[: counts[Count.HITS]].long()
        misses = buffers.miss_rows[:num_misses]
        known = scratch.miss_known[:num_misses]
        victims = buffers.miss_slots[:num_victims].long()
        if _is_refused(counts):
            maps.last_use.scatter_(0, hits, scratch.hit_last_use[: hits.numel()])
            maps.last_use.scatter_(0, victims, scratch.victim_last_use[:num_victims])
            maps.row_to_slot.scatter_(0, misses, known)
            return
        # Victims leave: their rows remember how often they were used, at their newest sighting if there is one.
        victim_rows = maps.slot_to_row.index_select(0, victims)
        _put(buffers.victim_rows, victim_rows)
        notes = _notes(maps.frequency.index_select(0, victims), aging.origin)
        newest = maps.newest_sighting.index_select(0, victims)
        seen = _positions(newest >= 0)
        maps.sightings.scatter_(0, newest.index_select(0, seen).long(), -notes.index_select(0, seen).short())
        maps.row_to_slot.scatter_(0, victim_rows, -1 - torch.where(newest >= 0, newest | SEEN, notes))
        # Misses come, the first of them into the slots of victims, with what their rows remembered.
        num_free = int(maps.state[State.NUM_FREE])
        free = maps.free_slots[num_free - (num_misses - num_victims) : num_free].flip(0).long()
        slots = torch.cat([victims, free])
        frequencies = frequencies_of_notes(notes_of(known, maps), aging.origin)
        places = -1 - known - SEEN
        is_later = (places >= 0) & ((places < first_place) | (places >= end_place))
        maps.sightings.scatter_(0, places.index_select(0, _positions(is_later)).long(), 0)
        # Where a batch was not seen, its rows may be used soon: which of their uses is next is not known.
        maps.newest_sighting.scatter_(0, slots, torch.where(is_later, places, -1))
        maps.next_use.scatter_(0, slots, 0)
        if use == 0:
            maps.next_use.scatter_(0, slots.index_select(0, _positions(is_later)), request.first_use)
        _put(buffers.miss_slots, slots)
        maps.row_to_slot.scatter_(0, misses, slots.int())
        maps.slot_to_row.scatter_(0, slots, misses)
        maps.last_use.scatter_(0, slots, batch_index)
        maps.frequency.scatter_(0, slots, frequencies + aging.weight)
        # Hits stay.
        maps.frequency.scatter_(0, hits, maps.frequency.index_select(0, hits) + aging.weight)
        if use > 0:
            newest = maps.newest_sighting.index_select(0, hits)
            is_mine = (newest >= first_place).logical_and_(newest < end_place)
            maps.newest_sighting.scatter_(0, hits.index_select(0, _positions(is_mine)), -1)
            # A batch that goes ahead of others leaves their uses known.
            if use != request.first_use:
                hits = hits.index_select(0, _positions(maps.next_use.index_select(0, hits) == use))
            maps.next_use.scatter_(0, hits, 0)
        self._found.add_to(tables)
        table_of_victims = torch.bucketize(victim_rows, tables.row_offsets[1:], right=True)
        tables.num_victims.add_(torch.bincount(table_of_victims, minlength=tables.num_victims.numel()))

    def translate(self, request: PlanRequest, maps: SlotMaps, buffers: PlanBuffers, tables: TableCounts) -> None:
        slots, num_ids = request.slots, request.ids.ids.numel()
        counts = buffers.counts.tolist()
        rows, positions, known = self._found[:3]
        if _is_refused(counts):
            slots_of_rows = torch.zeros_like(rows)
            buffers.counts[Count.IS_REFUSED] = 1
        else:
            slots_of_rows = known.long()
            misses = _positions(known < 0)
            slots_of_misses = maps.row_to_slot.index_select(0, rows.index_select(0, misses))
            slots_of_rows.scatter_(0, misses, slots_of_misses.long())
            maps.state[State.NUM_FREE] -= counts[Count.FROM_FREE]
            buffers.counts[Count.FILLS], buffers.counts[Count.WRITEBACKS] = counts[Count.MISSES], counts[Count.VICTIMS]
        if positions is None:
            slots[:num_ids].copy_(slots_of_rows)
        else:
            slots.scatter_(0, positions, slots_of_rows)
        if not _is_refused(counts):
            self._follow_sightings(request, maps, buffers.rows[:num_ids])
        del self._found

    def _follow_sightings(self, request: PlanRequest, maps: SlotMaps, rows: Tensor) -> None:
        """What the batch's sightings say is now the next use of its rows."""
        first_place = request.sighting.first_place
        if first_place >= 0:
            uses = maps.sightings[first_place : first_place + request.ids.ids.numel()]
            positions = _positions((uses > 0).logical_and_(rows >= 0))
            slots = request.slots.index_select(0, positions)
            maps.next_use.scatter_(0, slots, uses.index_select(0, positions))

    def move(
        self, source: Tensor, source_index: Tensor, target: Tensor, target_index: Tensor, counts: Tensor, count: Count
    ) -> None:
        num_rows = int(counts[count])
        values = source.index_select(0, source_index[:num_rows].long().to(source.device))
        # Not in place as autograd and the tables' version counters would see it: a kernel leaves no such trace.
        target.data.index_copy_(0, target_index[:num_rows].long().to(target.device), values.to(target.device))

    def count_misses(self, request: PlanRequest, maps: SlotMaps, buffers: PlanBuffers, num_misses: Tensor) -> None:
        num_ids = request.ids.ids.numel()
        rows = buffers.rows[:num_ids]
        is_mine = rows >= 0
        found = maps.slot_to_row.index_select(0, request.slots[:num_ids].masked_fill(is_mine.logical_not(), 0))
        num_misses.add_((found != rows).logical_and_(is_mine).sum())


class _Rows(NamedTuple):
    rows: Tensor  # [I] int64, -1 for what is not this pool's or out of range
    are_all_valid: bool
    bad_position: int  # of an id that is out of range, counted from 1; 0 if there is none

    def valid(self) -> tuple[Tensor, Tensor | None]:
        """Those that are rows of this pool, and where they are; None for everywhere."""
        if self.are_all_valid:
            return self.rows, None
        positions = _positions(self.rows >= 0)
        return self.rows.index_select(0, positions), positions


def rows_of_ids(ids: FeatureIds, features: FeatureRows) -> Tensor:
    """The rows of one pool that a batch looks up. Shapes: returns [I] int64."""
    return _rows_of_ids(ids, features).rows


def _rows_of_ids(ids: FeatureIds, features: FeatureRows) -> _Rows:
    num_ids, lengths = ids.ids.numel(), ids.bounds.diff()

    def of_each_id(of_feature: Tensor) -> Tensor:
        return of_feature.repeat_interleave(lengths, output_size=num_ids)

    values = ids.ids.long()
    is_bad = (values < 0).logical_or_(values >= of_each_id(features.num_rows))
    rows = of_each_id(features.first_row).add_(values)
    are_mine = bool((features.table >= 0).all())
    if not are_mine:
        is_mine = of_each_id(features.table >= 0)
        is_bad.logical_and_(is_mine)
        rows.masked_fill_(is_mine.logical_not_(), -1)
    if not bool(is_bad.any()):
        return _Rows(rows, are_mine, 0)
    return _Rows(rows.masked_fill_(is_bad, -1), False, int(_positions(is_bad)[-1]) + 1)


def _positions(mask: Tensor) -> Tensor:
    """[N] int64: where a mask is true."""
    if mask.device.type == "cpu":
        # 48 us for 106,496 values, where torch takes 410 us (one core of an AMD EPYC, torch 2.13).
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().view(-1)


def _put(target: Tensor, values: Tensor) -> None:
    target[: values.numel()].copy_(values)


def _num_missing(counts: Sequence[int]) -> int:
    return counts[Count.MISSES] - counts[Count.FROM_FREE] - counts[Count.VICTIMS]


def _is_refused(counts: Sequence[int]) -> bool:
    return _num_missing(counts) > 0 or counts[Count.BAD_POSITION] > 0


def distances(uses: Tensor, first_use: int) -> Tensor:
    """[N] int16: how many batches after `first_use`, MAX_SEEN for none. Shapes: `uses` [N] int16."""
    ahead = (uses - first_use).bitwise_and_(NUM_USES - 1)
    return ahead.masked_fill_((uses == 0).logical_or_(ahead >= MAX_SEEN), MAX_SEEN)


def _bins(maps: SlotMaps, first_held: int, first_use: int) -> Tensor:
    """[S] int32: the bin of each slot, NUM_BINS if it must not go."""
    bins = (maps.frequency.view(torch.int32) >> FREQUENCY_SHIFT).sub_(LOWEST_BIN).clamp_(0, FREQUENCY_BINS - 1)
    if maps.sightings.numel() and int(maps.next_use.max()) > 0:
        ahead = distances(maps.next_use, first_use).int()
        bins = torch.where(ahead < MAX_SEEN, FREQUENCY_BINS + MAX_SEEN - 1 - ahead, bins)
    # All ones where last_use is below 0 or not below first_held: a slot that is free, or held. Three times as fast as
    # masks.
    must_stay = (maps.last_use | (first_held - 1 - maps.last_use)) >> 31
    return torch.maximum(bins, must_stay.bitwise_and_(NUM_BINS))


def _notes(frequency: Tensor, origin: float) -> Tensor:
    log2 = frequency.clamp(min=LOWEST_FREQUENCY).log2()
    return (log2 * NOTES_PER_OCTAVE + origin).floor().int().remainder(NUM_NOTES) + 1


def notes_of(entries: Tensor, maps: SlotMaps) -> Tensor:
    """The notes of absent rows, by their entries in `row_to_slot`. Waits for nothing. Shapes: [N] int32 both."""
    values = -1 - entries
    if maps.sightings.numel() == 0:
        return values
    # Never below 0: where ids have changed since they were seen, a sighting may say anything.
    at_newest = maps.sightings.index_select(0, (values - SEEN).clamp_(min=0)).int().neg_().clamp_(min=0)
    return torch.where(values < SEEN, values, at_newest)


def frequencies_of_notes(notes: Tensor, origin: float) -> Tensor:
    """[N] float32: how often absent rows were used, by their notes; 0 without one. Shapes: `notes` [N] integers."""
    since_origin = (notes - 1).float() - origin
    since_origin = torch.where(since_origin < 0, since_origin + NUM_NOTES, since_origin)
    long_past = since_origin >= MAX_OCTAVES * NOTES_PER_OCTAVE
    since_origin = torch.where(long_past, since_origin - NUM_NOTES, since_origin)
    return torch.where(notes == 0, 0.0, torch.exp2(since_origin / NOTES_PER_OCTAVE))
