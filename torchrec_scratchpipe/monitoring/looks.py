# SPDX-License-Identifier: BSD-3-Clause
"""Looks at a pool's slot map now and then, right after a plan, and foretells misses with other numbers of slots.

Shapes: ``H`` hits, ``M`` misses, ``S`` slots, ``R`` rows, ``T`` tables, ``L`` levels, ``A`` ages, ``N`` any number.

The slot map lets the rows with the lowest frequency go first, and remembers how often absent rows were used. So it
knows already what another number of slots would do. The level of a row is its frequency over the weight of one use
now; a level of 1 is one use in this batch::

    level   high                                                    low
            |  rows that are resident, S of them  |  absent rows that have a note
            |                 ^                    ^             ^
            |        with fewer slots,      the scratchpad    with more slots,
            |        it ends here           ends here         it ends here

With fewer slots, hits on rows between the two ends become misses. With more slots, misses of rows between them become
hits. A hit on a row that was held or seen ahead since its last use is a hit with any number of slots.

A look costs a few small operations on the device, and no wait. It takes every k-th of what there is, and scales it up.
"""

import logging
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchrec_scratchpipe.core.pool import Pool
from torchrec_scratchpipe.core.slot_map import CachePlan
from torchrec_scratchpipe.core.slot_ops import MAX_SEEN, Count
from torchrec_scratchpipe.core.torch_ops import distances, frequencies_of_notes, notes_of

__all__ = ["Looks", "MissCurve", "PoolWatch"]

logger: logging.Logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]

# Levels from 2 ** -24 to 2 ** 8, each octave in 128 parts: the exponent and seven bits of the mantissa of a float32.
LOWEST_OCTAVE, NUM_OCTAVES, LEVEL_SHIFT = -24, 32, 23 - 7
NUM_LEVELS = NUM_OCTAVES << 7
LOWEST_LEVEL = (127 + LOWEST_OCTAVE) << 7
NUM_AGES = 64  # batches since the last use; the last of them stands for longer ones
MAX_LOOKED_AT = 1 << 15  # of hits, of misses, of slots, of rows


class MissCurve(NamedTuple):
    """What one batch would miss with other numbers of slots; by level, the lowest first."""

    num_slots: int
    num_unique: float
    num_misses: float
    num_first_uses: float  # among them; no number of slots saves these
    num_pinned: float  # slots that are held, or whose row a batch seen ahead will use
    resident: Floats  # [L] rows in other slots
    absent: Floats  # [L] rows that were used and have left
    hits: Floats  # [L] on rows that might have left
    misses: Floats  # [L] of rows that were used before

    def misses_with(self, num_slots: float) -> float:
        """Unique rows missed in a batch; infinite where not even the pinned rows would fit."""
        too_many = self.num_pinned + self.resident.sum() - num_slots
        if too_many > 0:
            if num_slots < self.num_pinned:
                return float("inf")
            return self.num_misses + _upto(too_many, self.resident, self.hits)
        more = num_slots - self.num_slots
        return self.num_misses - (_upto(more, self.absent[::-1], self.misses[::-1]) if more > 0 else 0.0)


def _upto(amount: float, rows: Floats, uses: Floats) -> float:
    """The uses of so many of the first rows."""
    return float(np.interp(amount, np.append(0.0, np.cumsum(rows)), np.append(0.0, np.cumsum(uses))))


@dataclass(frozen=True)
class Looks:
    """What was seen since the last time, per batch where nothing else is said."""

    num_looks: int
    last_batch: int  # planned in the pool, counted from 1
    num_ids: npt.NDArray[np.int64]  # [T], up to then, as are the next
    num_unique: npt.NDArray[np.int64]
    num_misses: npt.NDArray[np.int64]
    num_victims: npt.NDArray[np.int64]
    num_misses_at_train: int
    held: Floats  # [N] slots held by batches in flight, at each look
    num_unique_most: float  # of the batches looked at
    num_resident: float
    hits_by_age: Floats  # [A] hits on rows that were used so many batches before
    curve: MissCurve

    def distinct_in(self, num_batches: int) -> float:
        """Distinct rows of so many successive batches.

        Source: Denning's working-set recursion: one more batch brings the rows that the others have not used.
        """
        new = self.curve.num_unique - np.append(0.0, np.cumsum(self.hits_by_age))
        return float(np.maximum(new[:num_batches], 0.0).sum())


class _Look(NamedTuple):
    batch_index: int
    numbers: Tensor  # [N] int64 on the host
    is_there: torch.Event | None


class PoolWatch:
    """Looks at every k-th plan of a pool, on whichever thread plans, and hands out what it saw."""

    def __init__(self, pool: Pool, every: int) -> None:
        self.pool = pool
        self._every = every
        self._looks: deque[_Look] = deque()
        slot_map = pool.slot_map
        self._slot_step = _step(slot_map.num_slots)
        self._row_step = _step(slot_map.num_rows)
        self._id_step = 1

    def start(self) -> None:
        """Be shown plans from now on."""
        self.pool.slot_map.observer = self.look

    def stop(self) -> None:
        """Be shown no more plans."""
        self.pool.slot_map.observer = None

    def look(self, plan: CachePlan) -> None:
        """Take in a plan that was just made, if it is its turn; on the stream of Plan."""
        if plan.batch_index % self._every == 0:
            try:
                self._looks.append(self._look(plan))
            except Exception:  # whoever only watches stops no job
                self.stop()
                logger.exception("%s is watched no more", self.pool.name)

    def _look(self, plan: CachePlan) -> _Look:
        numbers = torch.cat(self._parts(plan))
        if numbers.device.type == "cpu":
            return _Look(plan.batch_index, numbers, None)
        host = torch.empty(numbers.shape, dtype=torch.int64, pin_memory=numbers.device.type == "cuda")
        event = torch.Event(numbers.device)
        host.copy_(numbers, non_blocking=True)
        event.record()
        return _Look(plan.batch_index, host, event)

    def take(self) -> Looks | None:
        """What was seen since the last call; None if nothing was."""
        looks = [self._looks.popleft() for _ in range(len(self._looks))]
        if not looks:
            return None
        for look in looks:
            if look.is_there is not None:
                look.is_there.synchronize()
        numbers = np.stack([look.numbers.numpy() for look in looks])
        return self._as_looks(looks[-1].batch_index, numbers)

    def _parts(self, plan: CachePlan) -> list[Tensor]:
        """All int64, on the device; :meth:`_as_looks` has the same order."""
        slot_map, request, buffers = self.pool.slot_map, plan.request, plan.buffers
        maps, scratch, counts = slot_map.maps, slot_map.scratch, buffers.counts
        weight, origin = request.aging
        num_held, num_ahead = request.batch_index - request.first_held, slot_map.num_seen_ahead
        # A row might last have left before the batch was seen. It was less faded then.
        weight_at_last_chance = weight * 2.0 ** (-(num_ahead + 1) / slot_map.half_life)
        # 1. Hits. Whoever was used shortly before could not leave.
        capacity = scratch.hit_slots.numel()
        self._id_step = _step(capacity)
        positions = torch.arange(0, capacity, self._id_step, device=counts.device)
        is_hit = positions < counts[Count.HITS]
        slots = scratch.hit_slots.index_select(0, positions).long() * is_hit
        ages = request.batch_index - scratch.hit_last_use.index_select(0, positions)
        hits = _levels(maps.frequency.index_select(0, slots) - weight, weight_at_last_chance)
        might_have_left = is_hit & (ages > num_held + num_ahead + 1)
        # 2. Misses. Whoever has no note was never used.
        is_miss = positions < counts[Count.MISSES]
        slots = buffers.miss_slots.index_select(0, positions).long() * is_miss
        before = maps.frequency.index_select(0, slots) - weight
        has_note = is_miss & (before > 0)
        misses = _levels(before, weight_at_last_chance)
        # 3. Slots.
        some = slice(None, None, self._slot_step)
        is_held = maps.last_use[some] >= request.first_held
        is_occupied = maps.slot_to_row[some] >= 0
        is_pinned = is_held | (is_occupied & (distances(maps.next_use[some], request.first_use) < MAX_SEEN))
        resident = _levels(maps.frequency[some], weight)
        # 4. Rows that have left.
        entries = maps.row_to_slot[:: self._row_step]
        notes = torch.where(entries < 0, notes_of(entries, maps), 0)
        absent = _levels(frequencies_of_notes(notes, origin), weight)
        tables = slot_map.table_counts
        by_id, by_slot, by_row = self._id_step, self._slot_step, self._row_step
        numbers = [
            by_slot * is_held.sum(),
            by_slot * is_pinned.sum(),
            by_slot * is_occupied.sum(),
            by_id * (is_miss & ~has_note).sum(),
            counts[Count.HITS] + counts[Count.MISSES],
            counts[Count.MISSES],
        ]
        return [
            _histogram(hits, by_id * might_have_left, NUM_LEVELS),
            _histogram(misses, by_id * has_note, NUM_LEVELS),
            _histogram(resident, by_slot * (is_occupied & ~is_pinned), NUM_LEVELS),
            _histogram(absent, by_row * (notes > 0), NUM_LEVELS),
            _histogram((ages - 1).clamp_(0, NUM_AGES - 1), by_id * is_hit, NUM_AGES),
            torch.stack(numbers),
            tables.num_misses_at_train,
            tables.num_ids,
            tables.num_unique,
            tables.num_misses,
            tables.num_victims,
        ]

    def _as_looks(self, last_batch: int, numbers: npt.NDArray[np.int64]) -> Looks:
        num_tables = len(self.pool.host_table.tables)
        ends = np.cumsum([NUM_LEVELS] * 4 + [NUM_AGES, 6, 1] + [num_tables] * 3)
        hits, misses, resident, absent, ages, scalars, at_train, *of_tables = np.split(numbers, ends, axis=1)
        held, pinned, occupied, first_uses, unique, num_misses = scalars.T.astype(np.float64)
        num_ids, nums_unique, nums_misses, nums_victims = (counts[-1] for counts in of_tables)
        curve = MissCurve(
            num_slots=self.pool.scratchpad.num_slots,
            num_unique=float(unique.mean()),
            num_misses=float(num_misses.mean()),
            num_first_uses=float(first_uses.mean()),
            num_pinned=float(pinned.mean()),
            resident=resident.mean(axis=0),
            absent=absent.mean(axis=0),
            hits=hits.mean(axis=0),
            misses=misses.mean(axis=0),
        )
        return Looks(
            num_looks=len(numbers),
            last_batch=last_batch,
            num_ids=num_ids,
            num_unique=nums_unique,
            num_misses=nums_misses,
            num_victims=nums_victims,
            num_misses_at_train=int(at_train[-1, 0]),
            held=held,
            num_unique_most=float(unique.max()),
            num_resident=float(occupied[-1]),
            hits_by_age=ages.mean(axis=0),
            curve=curve,
        )


def _step(num: int) -> int:
    return max(1, num // MAX_LOOKED_AT)


def _levels(frequency: Tensor, weight: float) -> Tensor:
    """[N] int32: what the frequencies are, seen from a batch whose use weighs so much."""
    levels = ((frequency / weight).view(torch.int32) >> LEVEL_SHIFT) - LOWEST_LEVEL
    return levels.clamp_(0, NUM_LEVELS - 1)


def _histogram(values: Tensor, counts: Tensor, num_bins: int) -> Tensor:
    """[num_bins] int64; each value counts so many times. Waits for nothing."""
    bins = torch.zeros(num_bins, dtype=torch.int64, device=values.device)
    return bins.index_add_(0, values, counts)
