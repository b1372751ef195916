# SPDX-License-Identifier: BSD-3-Clause
"""The device operations in torch: the twin that :mod:`torchrec_scratchpipe.triton_ops` is compared with.

Right on any device; on CUDA slow, because most of these wait for it.
"""

import torch
from torch import Tensor

from torchrec_scratchpipe.device_ops import (
    BEING_PLACED,
    BINS_PER_OCTAVE,
    FREQUENCY_BINS,
    LOWEST_OCTAVE,
    NUM_BINS,
    Aging,
    CommonOps,
    Count,
    DeviceMaps,
    FeatureIds,
    FeatureRows,
    PlanBuffers,
    ScratchBuffers,
    State,
    TableCounts,
)
from torchrec_scratchpipe.eviction import MAX_OCTAVES, NOTES_PER_OCTAVE, NUM_NOTES, WINDOW_BITS
from torchrec_scratchpipe.slot_map_base import WINDOW_MASK

__all__ = ["TwinOps"]

LOWEST_FREQUENCY = 2.0**-90


class TwinOps(CommonOps):
    """See :class:`~torchrec_scratchpipe.device_ops.DeviceOps`, which says what each operation does."""

    def mark(self, ids: FeatureIds, features: FeatureRows, maps: DeviceMaps, bit: int, is_used: bool) -> None:
        """See :class:`DeviceOps`."""
        rows, _ = _rows_of_ids(ids, features)
        rows = rows[rows >= 0]
        slots = maps.row_to_slot[rows]
        absent, present = rows[slots < 0], slots[slots >= 0].long()

        def change(uses: Tensor) -> Tensor:
            return uses | bit if is_used else uses & ~bit

        maps.row_to_slot[absent] = -1 - change(-1 - maps.row_to_slot[absent])
        maps.uses_ahead[present] = change(maps.uses_ahead[present])

    def find(
        self,
        ids: FeatureIds,
        features: FeatureRows,
        maps: DeviceMaps,
        buffers: PlanBuffers,
        scratch: ScratchBuffers,
        batch_index: int,
    ) -> None:
        """See :class:`DeviceOps`."""
        counts = buffers.counts.zero_()
        rows, bad_position = _rows_of_ids(ids, features)
        counts[Count.BAD_POSITION] = bad_position
        buffers.rows[: rows.numel()] = rows
        rows = rows[rows >= 0]
        slots = maps.row_to_slot[rows]
        hits = slots[slots >= 0].long().unique()
        _put(scratch.hit_slots, hits)
        _put(scratch.hit_last_use, maps.last_use[hits])
        maps.last_use[hits] = batch_index
        misses = rows[slots < 0].unique()
        _put(buffers.miss_rows, misses)
        _put(scratch.miss_known, maps.row_to_slot[misses])
        maps.row_to_slot[misses] = BEING_PLACED
        counts[Count.HITS], counts[Count.MISSES] = hits.numel(), misses.numel()

    def take(
        self,
        maps: DeviceMaps,
        buffers: PlanBuffers,
        scratch: ScratchBuffers,
        batch_index: int,
        first_held: int,
        skips_used_ahead: bool,
    ) -> None:
        """See :class:`DeviceOps`."""
        counts, state = buffers.counts, maps.state
        counts[Count.FROM_FREE] = min(int(counts[Count.MISSES]), int(state[State.NUM_FREE]))
        taken, missing = int(counts[Count.VICTIMS]), _num_missing(counts)
        head, length = int(state[State.LIST_HEAD]), int(state[State.LIST_LENGTH])
        if missing <= 0 or head >= length:
            return
        listed, last_use = maps.listed[head:length].long(), maps.listed_last_use[head:length]
        is_usable = (maps.last_use[listed] == last_use) & (last_use < first_held)
        if skips_used_ahead:
            is_usable &= maps.uses_ahead[listed] == 0
        positions = is_usable.nonzero().view(-1)[:missing]
        chosen = listed[positions]
        _put(buffers.miss_slots[taken:], chosen)
        _put(scratch.victim_last_use[taken:], last_use[positions])
        maps.last_use[chosen] = batch_index
        counts[Count.VICTIMS] = taken + chosen.numel()
        state[State.LIST_HEAD] = head + int(positions[-1]) + 1 if positions.numel() == missing else length

    def scan(self, maps: DeviceMaps, buffers: PlanBuffers, first_held: int, next_bit: int, num_wanted: int) -> None:
        """See :class:`DeviceOps`."""
        missing = _num_missing(buffers.counts)
        if missing <= 0:
            return
        bins = _bins(maps, first_held, next_bit)
        at_most = torch.bincount(bins[bins >= 0], minlength=NUM_BINS).cumsum(0)
        num_unused_ahead = int(at_most[FREQUENCY_BINS - 1])
        target = max(missing, num_wanted)
        if num_unused_ahead >= missing:
            target = min(target, num_unused_ahead)
        threshold = min(int((at_most < target).sum()), NUM_BINS - 1)
        below = ((bins >= 0) & (bins < threshold)).nonzero().view(-1)
        listed = torch.cat([below, (bins == threshold).nonzero().view(-1)])[: maps.listed.numel()]
        _put(maps.listed, listed)
        _put(maps.listed_last_use, maps.last_use[listed])
        state = maps.state
        state[State.LIST_HEAD], state[State.LIST_LENGTH] = 0, listed.numel()
        state[State.THRESHOLD], state[State.NUM_BELOW] = threshold, below.numel()

    def commit(
        self,
        maps: DeviceMaps,
        buffers: PlanBuffers,
        scratch: ScratchBuffers,
        tables: TableCounts,
        batch_index: int,
        keep_bits: int,
        aging: Aging,
    ) -> None:
        """See :class:`DeviceOps`."""
        counts = buffers.counts
        num_misses, num_victims = int(counts[Count.MISSES]), int(counts[Count.VICTIMS])
        hits = scratch.hit_slots[: int(counts[Count.HITS])].long()
        misses = buffers.miss_rows[:num_misses]
        known = scratch.miss_known[:num_misses]
        victims = buffers.miss_slots[:num_victims].long()
        if _is_refused(counts):
            maps.last_use[hits] = scratch.hit_last_use[: hits.numel()]
            maps.last_use[victims] = scratch.victim_last_use[:num_victims]
            maps.row_to_slot[misses] = known
            return
        maps.frequency[hits] += aging.weight
        maps.uses_ahead[hits] &= keep_bits
        victim_rows = maps.slot_to_row[victims]
        _put(buffers.victim_rows, victim_rows)
        notes = _notes(maps.frequency[victims], aging.origin)
        maps.row_to_slot[victim_rows] = -1 - (maps.uses_ahead[victims] | (notes << WINDOW_BITS))
        num_free = int(maps.state[State.NUM_FREE])
        free = maps.free_slots[num_free - (num_misses - num_victims) : num_free].flip(0).long()
        slots = torch.cat([victims, free])
        _put(buffers.miss_slots, slots)
        maps.row_to_slot[misses] = slots.int()
        maps.slot_to_row[slots] = misses
        maps.last_use[slots] = batch_index
        maps.uses_ahead[slots] = (-1 - known) & WINDOW_MASK & keep_bits
        maps.frequency[slots] = _frequencies((-1 - known) >> WINDOW_BITS, aging.origin) + aging.weight
        _add_per_table(tables.num_unique, tables, torch.cat([maps.slot_to_row[hits], misses]))
        _add_per_table(tables.num_misses, tables, misses)
        _add_per_table(tables.num_victims, tables, victim_rows)

    def translate(
        self, maps: DeviceMaps, buffers: PlanBuffers, tables: TableCounts, slots: Tensor, num_ids: int
    ) -> None:
        """See :class:`DeviceOps`."""
        counts = buffers.counts
        rows = buffers.rows[:num_ids]
        positions = (rows >= 0).nonzero().view(-1)
        if _is_refused(counts):
            slots[positions] = 0
            counts[Count.IS_REFUSED] = 1
            return
        slots[positions] = maps.row_to_slot[rows[positions]].long()
        _add_per_table(tables.num_ids, tables, rows[positions])
        maps.state[State.NUM_FREE] -= counts[Count.FROM_FREE]
        counts[Count.FILLS], counts[Count.WRITEBACKS] = counts[Count.MISSES], counts[Count.VICTIMS]

    def move(
        self, source: Tensor, source_index: Tensor, target: Tensor, target_index: Tensor, counts: Tensor, count: Count
    ) -> None:
        """See :class:`DeviceOps`."""
        num_rows = int(counts[count])
        values = source[source_index[:num_rows].long().to(source.device)]
        # Not in place as autograd and the tables' version counters would see it: a kernel leaves no such trace.
        target.data[target_index[:num_rows].long().to(target.device)] = values.to(target.device)

    def count_misses(self, maps: DeviceMaps, rows: Tensor, slots: Tensor, num_ids: int, num_misses: Tensor) -> None:
        """See :class:`DeviceOps`."""
        rows = rows[:num_ids]
        is_mine = rows >= 0
        num_misses += (maps.slot_to_row[slots[:num_ids][is_mine]] != rows[is_mine]).sum()


def _rows_of_ids(ids: FeatureIds, features: FeatureRows) -> tuple[Tensor, int]:
    """[I] int64 rows, -1 for what is not this pool's or out of range; and where an id is, counted from 1, or 0."""
    positions = torch.arange(ids.ids.numel(), dtype=torch.int64, device=ids.ids.device)
    feature = torch.bucketize(positions, ids.bounds[1:].contiguous(), right=True)
    is_mine = features.table[feature] >= 0
    values = ids.ids.long()
    is_bad = is_mine & ((values < 0) | (values >= features.num_rows[feature]))
    rows = torch.where(is_mine & ~is_bad, values + features.first_row[feature], -1)
    return rows, int(positions[is_bad].max()) + 1 if bool(is_bad.any()) else 0


def _put(target: Tensor, values: Tensor) -> None:
    target[: values.numel()] = values.to(target.dtype)


def _add_per_table(counts: Tensor, tables: TableCounts, rows: Tensor) -> None:
    table = torch.bucketize(rows, tables.row_offsets[1:], right=True)
    counts += torch.bincount(table, minlength=counts.numel())


def _num_missing(counts: Tensor) -> int:
    return int(counts[Count.MISSES] - counts[Count.FROM_FREE] - counts[Count.VICTIMS])


def _is_refused(counts: Tensor) -> bool:
    return _num_missing(counts) > 0 or int(counts[Count.BAD_POSITION]) > 0


def _bins(maps: DeviceMaps, first_held: int, next_bit: int) -> Tensor:
    """[S] int64: the bin of each slot, -1 if it must not go."""
    octaves = maps.frequency.clamp(min=LOWEST_FREQUENCY).log2() - LOWEST_OCTAVE
    bins = (octaves * BINS_PER_OCTAVE).floor().long().clamp(0, FREQUENCY_BINS - 1)
    uses = maps.uses_ahead[: bins.numel()]
    in_order = (uses >> next_bit) | ((uses & ((1 << next_bit) - 1)) << (WINDOW_BITS - next_bit))
    distance = (in_order & -in_order).float().log2().clamp(min=0).long()
    bins = torch.where(uses != 0, FREQUENCY_BINS + WINDOW_BITS - 1 - distance, bins)
    is_usable = (maps.last_use >= 0) & (maps.last_use < first_held)
    return torch.where(is_usable, bins, -1)


def _notes(frequency: Tensor, origin: float) -> Tensor:
    log2 = frequency.clamp(min=LOWEST_FREQUENCY).log2()
    return (log2 * NOTES_PER_OCTAVE + origin).floor().int().remainder(NUM_NOTES) + 1


def _frequencies(notes: Tensor, origin: float) -> Tensor:
    since_origin = (notes - 1).float() - origin
    since_origin = torch.where(since_origin < 0, since_origin + NUM_NOTES, since_origin)
    long_past = since_origin >= MAX_OCTAVES * NOTES_PER_OCTAVE
    since_origin = torch.where(long_past, since_origin - NUM_NOTES, since_origin)
    return torch.where(notes == 0, 0.0, torch.exp2(since_origin / NOTES_PER_OCTAVE))
