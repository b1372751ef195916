# SPDX-License-Identifier: BSD-3-Clause
"""The device operations as Triton kernels; :mod:`torchrec_scratchpipe.core.torch_ops` says the same in torch.

Shapes: as in :mod:`torchrec_scratchpipe.core.slot_ops`.

Grids follow what the host knows, ids, slots or a buffer's capacity, or are fixed. How many rows there are the kernels
read on the device, so that nothing waits for the host. No sort: who is the first to mark a slot or a row stands for it.
"""

import logging
import math
import struct
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
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
    NUM_ORDER_BINS,
    NUM_USES,
    SEEN,
    CommonOps,
    Count,
    FeatureIds,
    FeatureRows,
    Number,
    OrderBuffers,
    PlanBuffers,
    PlanRequest,
    ScratchBuffers,
    Sighting,
    SlotMaps,
    State,
    TableCounts,
)

__all__ = ["LaunchGraph", "TritonOps"]

logger: logging.Logger = logging.getLogger(__name__)

IDS_PER_PROGRAM = 1024
LISTED_PER_ROUND = 4096
WARPS_OF_TAKE = 16
SLOTS_PER_PROGRAM = 2048
WORDS_PER_MOVE = 4096  # that a program has under way at a time
WARPS_OF_MOVE = 8
# Few, because the bus is the limit, and because accesses that wait for it stand in the way of Train's. Measured on an
# H200, beside Train of 26 tables: 4 and 4 took 22.8 ms a step, 8 and 8 23.7, 32 and 32 27.6, two large programs of 32
# warps 23.4; no moves 21.8.
NUM_MOVE_PROGRAMS = {Count.FILLS: 4, Count.WRITEBACKS: 4}

_SMALL = tl.constexpr(16)  # a power of two that numbers and counts fit into
_BEING_PLACED = tl.constexpr(BEING_PLACED)
_HITS = tl.constexpr(int(Count.HITS))
_MISSES = tl.constexpr(int(Count.MISSES))
_VICTIMS = tl.constexpr(int(Count.VICTIMS))
_FROM_FREE = tl.constexpr(int(Count.FROM_FREE))
_BAD_POSITION = tl.constexpr(int(Count.BAD_POSITION))
_IS_REFUSED = tl.constexpr(int(Count.IS_REFUSED))
_FILLS = tl.constexpr(int(Count.FILLS))
_WRITEBACKS = tl.constexpr(int(Count.WRITEBACKS))
_NUM_FREE = tl.constexpr(int(State.NUM_FREE))
_LIST_HEAD = tl.constexpr(int(State.LIST_HEAD))
_LIST_LENGTH = tl.constexpr(int(State.LIST_LENGTH))
_THRESHOLD = tl.constexpr(int(State.THRESHOLD))
_NUM_BELOW = tl.constexpr(int(State.NUM_BELOW))
_BELOW_CURSOR = tl.constexpr(int(State.BELOW_CURSOR))
_AT_CURSOR = tl.constexpr(int(State.AT_CURSOR))
_NUM_IDS = tl.constexpr(int(Number.NUM_IDS))
_IDS = tl.constexpr(int(Number.IDS))
_BOUNDS = tl.constexpr(int(Number.BOUNDS))
_BOUNDS_STRIDE = tl.constexpr(int(Number.BOUNDS_STRIDE))
_SLOTS = tl.constexpr(int(Number.SLOTS))
_BATCH_INDEX = tl.constexpr(int(Number.BATCH_INDEX))
_FIRST_HELD = tl.constexpr(int(Number.FIRST_HELD))
_USE = tl.constexpr(int(Number.USE))
_FIRST_USE = tl.constexpr(int(Number.FIRST_USE))
_FIRST_PLACE = tl.constexpr(int(Number.FIRST_PLACE))
_WEIGHT = tl.constexpr(int(Number.WEIGHT))
_ORIGIN = tl.constexpr(int(Number.ORIGIN))
_SEEN = tl.constexpr(SEEN)
_MAX_SEEN = tl.constexpr(MAX_SEEN)
_LAST_OF_USES = tl.constexpr(NUM_USES - 1)
_NUM_BINS = tl.constexpr(NUM_BINS)
_NUM_ORDER_BINS = tl.constexpr(NUM_ORDER_BINS)
_FREQUENCY_BINS = tl.constexpr(FREQUENCY_BINS)
_FREQUENCY_SHIFT = tl.constexpr(FREQUENCY_SHIFT)
_LOWEST_BIN = tl.constexpr(LOWEST_BIN)
_LOWEST_FREQUENCY = tl.constexpr(LOWEST_FREQUENCY)
_NUM_NOTES = tl.constexpr(NUM_NOTES)
_NOTES_PER_OCTAVE = tl.constexpr(NOTES_PER_OCTAVE)
_FIRST_NOTE_LONG_PAST = tl.constexpr(MAX_OCTAVES * NOTES_PER_OCTAVE)


class LaunchGraph(Protocol):
    """Launches that are enqueued by one call; :class:`~torchrec_scratchpipe.core.cuda_graph.CudaGraph` is one."""

    def add(self, kernel: Any, num_programs: int, args: Sequence[Tensor | int], options: Mapping[str, Any]) -> None:
        """Add the launch that ``kernel[(num_programs,)](*args, **options)`` would be."""

    def finish(self) -> Callable[[], None]:
        """What enqueues all of them, in their order, on the then current stream."""


class TritonOps(CommonOps):
    """See :class:`~torchrec_scratchpipe.core.slot_ops.SlotOps`, which says what each operation does.

    A launch from Python costs the host 20 us or more. So a plan's launches are recorded for each set of buffers, and
    replayed as one.
    """

    orders_moves = True

    def __init__(self, make_graph: Callable[[], LaunchGraph] | None = None) -> None:
        self._make_graph = make_graph
        # By buffers, then by key: None after the first time, which compiles kernels and records nothing.
        self._recordings: WeakKeyDictionary[PlanBuffers, dict[Hashable, Callable[[], None] | None]] = (
            WeakKeyDictionary()
        )
        self._of_thread = threading.local()  # `graph`, while this thread records

    def mark(self, ids: FeatureIds, features: FeatureRows, maps: SlotMaps, sighting: Sighting, first_use: int) -> None:
        # Never recorded: the ids' address and number are parameters.
        num_ids, num_features = ids.ids.numel(), features.table.numel()
        if num_ids:
            self._launch(
                _mark_kernel,
                triton.cdiv(num_ids, IDS_PER_PROGRAM),
                ids.ids,
                ids.bounds,
                *features,
                maps.row_to_slot,
                maps.next_use,
                maps.newest_sighting,
                maps.sightings,
                num_ids,
                num_features,
                ids.bounds.stride(0),
                *sighting,
                first_use,
                SEARCH_STEPS=num_features.bit_length(),
                BLOCK=IDS_PER_PROGRAM,
            )

    def prepare(self, request: PlanRequest, buffers: PlanBuffers) -> None:
        ids, bounds = request.ids
        numbers = [0] * len(Number)
        numbers[Number.NUM_IDS] = ids.numel()
        numbers[Number.IDS] = ids.data_ptr()
        numbers[Number.BOUNDS] = bounds.data_ptr()
        numbers[Number.BOUNDS_STRIDE] = bounds.stride(0)
        numbers[Number.SLOTS] = request.slots.data_ptr()
        numbers[Number.BATCH_INDEX] = request.batch_index
        numbers[Number.FIRST_HELD] = request.first_held
        numbers[Number.USE], numbers[Number.FIRST_PLACE] = request.sighting
        numbers[Number.FIRST_USE] = request.first_use
        numbers[Number.WEIGHT] = _bits_of(request.aging.weight)
        numbers[Number.ORIGIN] = _bits_of(request.aging.origin)
        buffers.host_numbers.numpy()[:] = numbers

    @contextmanager
    def recorded(self, buffers: PlanBuffers, key: Hashable) -> Iterator[bool]:
        """See :class:`SlotOps`; recorded the second time, while the caller enqueues them."""
        recordings = self._recordings.setdefault(buffers, {})
        recording = recordings.get(key)
        if recording is not None:
            recording()
            yield True
            return
        if key in recordings:
            self._begin_recording()
        recordings[key] = None
        try:
            yield False
            recordings[key] = self._end_recording()
        finally:
            self._of_thread.graph = None

    def _begin_recording(self) -> None:
        if self._make_graph is not None:
            with self._giving_up():
                self._of_thread.graph = self._make_graph()

    def _end_recording(self) -> Callable[[], None] | None:
        graph: LaunchGraph | None = getattr(self._of_thread, "graph", None)
        if graph is not None:
            with self._giving_up():
                return graph.finish()
        return None

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except (OSError, AttributeError, RuntimeError) as error:  # no driver, an older one, one that refuses
            logger.warning("launches cannot be recorded, and cost more of the host's time (%s)", error)
            self._make_graph = self._of_thread.graph = None

    def _launch(self, kernel: Any, num_programs: int, *args: Tensor | int, **options: Any) -> None:
        kernel[(num_programs,)](*args, **options)
        graph: LaunchGraph | None = getattr(self._of_thread, "graph", None)
        if graph is not None:
            with self._giving_up():
                graph.add(kernel, num_programs, args, options)

    def find(self, request: PlanRequest, maps: SlotMaps, buffers: PlanBuffers, scratch: ScratchBuffers) -> None:
        self._launch(
            _begin_kernel,
            1,
            buffers.host_numbers,
            buffers.numbers,
            buffers.counts,
            NUM_NUMBERS=len(Number),
            NUM_COUNTS=len(Count),
        )
        num_features = request.features.table.numel()
        self._launch(
            _find_kernel,
            _num_programs(buffers),
            buffers.numbers,
            *request.features,
            maps.row_to_slot,
            maps.last_use,
            buffers.rows,
            scratch.hit_slots,
            scratch.hit_last_use,
            buffers.miss_rows,
            scratch.miss_known,
            buffers.counts,
            num_features,
            ARE_IDS_64_BIT=request.ids.ids.dtype is torch.int64,
            ARE_BOUNDS_64_BIT=request.ids.bounds.dtype is torch.int64,
            SEARCH_STEPS=num_features.bit_length(),
            BLOCK=IDS_PER_PROGRAM,
        )

    def take(
        self,
        request: PlanRequest,
        maps: SlotMaps,
        buffers: PlanBuffers,
        scratch: ScratchBuffers,
        skips_used_ahead: bool,
    ) -> None:
        self._launch(
            _take_kernel,
            1,
            buffers.numbers,
            buffers.counts,
            maps.state,
            maps.listed,
            maps.listed_last_use,
            maps.last_use,
            maps.next_use,
            buffers.miss_slots,
            scratch.victim_last_use,
            SKIPS_USED_AHEAD=skips_used_ahead,
            BLOCK=LISTED_PER_ROUND,
            num_warps=WARPS_OF_TAKE,
        )

    def scan(self, request: PlanRequest, maps: SlotMaps, buffers: PlanBuffers, num_wanted: int) -> None:
        num_slots = maps.last_use.numel()
        num_programs = triton.cdiv(num_slots, SLOTS_PER_PROGRAM)
        slots = (maps.last_use, maps.next_use, maps.frequency, num_slots)
        self._launch(
            _histogram_kernel,
            num_programs,
            buffers.numbers,
            buffers.counts,
            maps.histogram,
            *slots,
            BLOCK=SLOTS_PER_PROGRAM,
        )
        num_listed = maps.listed.numel()
        self._launch(_threshold_kernel, 1, buffers.counts, maps.state, maps.histogram, num_wanted, num_listed)
        self._launch(
            _list_kernel,
            num_programs,
            buffers.numbers,
            buffers.counts,
            maps.state,
            maps.listed,
            maps.listed_last_use,
            num_listed,
            *slots,
            BLOCK=SLOTS_PER_PROGRAM,
        )

    def commit(
        self, request: PlanRequest, maps: SlotMaps, buffers: PlanBuffers, scratch: ScratchBuffers, tables: TableCounts
    ) -> None:
        num_tables = tables.num_unique.numel()
        # As many programs as the unique rows can need, of which there are no more than a buffer has room for.
        self._launch(
            _commit_kernel,
            _num_programs(buffers),
            buffers.numbers,
            buffers.counts,
            maps.state,
            maps.row_to_slot,
            maps.slot_to_row,
            maps.last_use,
            maps.next_use,
            maps.newest_sighting,
            maps.sightings,
            maps.frequency,
            maps.free_slots,
            scratch.hit_slots,
            scratch.hit_last_use,
            buffers.miss_rows,
            scratch.miss_known,
            buffers.miss_slots,
            buffers.victim_rows,
            scratch.victim_last_use,
            tables.row_offsets,
            tables.num_unique,
            tables.num_misses,
            tables.num_victims,
            num_tables,
            SEARCH_STEPS=num_tables.bit_length(),
            TABLE_BINS=_table_bins(num_tables),
            BLOCK=IDS_PER_PROGRAM,
        )

    def translate(self, request: PlanRequest, maps: SlotMaps, buffers: PlanBuffers, tables: TableCounts) -> None:
        num_tables = tables.num_ids.numel()
        self._launch(
            _translate_kernel,
            _num_programs(buffers),
            buffers.numbers,
            buffers.counts,
            maps.state,
            maps.row_to_slot,
            maps.next_use,
            maps.sightings,
            buffers.rows,
            tables.row_offsets,
            tables.num_ids,
            num_tables,
            SEARCH_STEPS=num_tables.bit_length(),
            TABLE_BINS=_table_bins(num_tables),
            BLOCK=IDS_PER_PROGRAM,
        )

    def report(self, buffers: PlanBuffers) -> None:
        self._launch(_report_kernel, 1, buffers.counts, buffers.host_counts, NUM_COUNTS=len(Count))

    def order(
        self, rows: Tensor, slots: Tensor, counts: Tensor, count: Count, num_rows: int, buffers: OrderBuffers
    ) -> tuple[Tensor, Tensor]:
        """See :class:`SlotOps`; by bins of neighbouring rows.

        A device reaches rows of a large table in any order at a third of the bus's speed, because it must look up each
        one's page.
        """
        shift = max(0, (max(1, num_rows) - 1).bit_length() - (NUM_ORDER_BINS - 1).bit_length())
        num_programs = triton.cdiv(max(1, rows.numel()), IDS_PER_PROGRAM)
        common = {"COUNT": int(count), "BLOCK": IDS_PER_PROGRAM}
        self._launch(_clear_bins_kernel, 1, buffers.bins, num_warps=16)
        self._launch(_count_bins_kernel, num_programs, rows, buffers.bins, counts, shift, **common)
        self._launch(_first_of_bins_kernel, 1, buffers.bins, num_warps=16)
        self._launch(
            _put_in_bins_kernel,
            num_programs,
            rows,
            slots,
            buffers.rows,
            buffers.slots,
            buffers.bins,
            counts,
            shift,
            **common,
        )
        return buffers.rows, buffers.slots

    def move(
        self, source: Tensor, source_index: Tensor, target: Tensor, target_index: Tensor, counts: Tensor, count: Count
    ) -> None:
        """See :class:`SlotOps`; `source` and `target` may lie in page-locked host memory."""
        row_bytes = math.prod(source.shape[1:]) * source.itemsize  # also where a rank has no rows of a table
        word = torch.int32 if row_bytes % 4 == 0 else torch.int16
        num_words = row_bytes // word.itemsize
        words_per_block = min(triton.next_power_of_2(num_words), 1024)
        self._launch(
            _move_kernel,
            NUM_MOVE_PROGRAMS[count],
            source.view(word),
            source_index,
            target.view(word),
            target_index,
            counts,
            COUNT=int(count),
            WORDS=num_words,
            BLOCK_WORDS=words_per_block,
            BLOCK_ROWS=max(1, min(4096, WORDS_PER_MOVE // words_per_block)),
            num_warps=WARPS_OF_MOVE,
        )

    def count_misses(self, request: PlanRequest, maps: SlotMaps, buffers: PlanBuffers, num_misses: Tensor) -> None:
        self._launch(
            _count_misses_kernel,
            _num_programs(buffers),
            buffers.numbers,
            maps.slot_to_row,
            buffers.rows,
            num_misses,
            BLOCK=IDS_PER_PROGRAM,
        )


def _num_programs(buffers: PlanBuffers) -> int:
    """For all ids that the buffers have room for; programs beyond the last id do nothing."""
    return int(triton.cdiv(buffers.rows.numel(), IDS_PER_PROGRAM))


def _table_bins(num_tables: int) -> int:
    return max(32, triton.next_power_of_2(num_tables))


def _bits_of(number: float) -> int:
    bits: int = struct.unpack("<i", struct.pack("<f", number))[0]
    return bits


@triton.jit
def _float_of(numbers_ptr, position: tl.constexpr):
    return tl.load(numbers_ptr + position).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _address_of(numbers_ptr, position: tl.constexpr, IS_64_BIT: tl.constexpr):
    """The address of integers that a batch has brought."""
    address = tl.load(numbers_ptr + position)
    if IS_64_BIT:  # noqa: SIM108  one type for the compiler
        pointer = address.to(tl.pointer_type(tl.int64))
    else:
        pointer = address.to(tl.pointer_type(tl.int32))
    return pointer


@triton.jit
def _segment_of(bounds_ptr, bounds_stride, positions, num_segments, inside, SEARCH_STEPS: tl.constexpr):
    """The segment f with bounds[f] <= position < bounds[f + 1]."""
    # By halves. An empty segment begins where the next one does, and is never found.
    low = tl.zeros_like(positions)
    high = low + num_segments
    for _ in tl.static_range(SEARCH_STEPS):
        middle = (low + high) // 2
        is_after = tl.load(bounds_ptr + middle * bounds_stride, mask=inside, other=0).to(tl.int64) <= positions
        low = tl.where(is_after, middle, low)
        high = tl.where(is_after, high, middle)
    return low


@triton.jit
def _rows_of_ids(
    ids_ptr,
    bounds_ptr,
    first_row_ptr,
    num_rows_ptr,
    table_ptr,
    num_ids,
    num_features,
    bounds_stride,
    SEARCH_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Positions of this program's ids, their rows, whether those are this pool's, and which ids are out of range."""
    positions = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = positions < num_ids
    feature = _segment_of(bounds_ptr, bounds_stride, positions, num_features, inside, SEARCH_STEPS)
    is_mine = inside & (tl.load(table_ptr + feature, mask=inside, other=-1) >= 0)
    ids = tl.load(ids_ptr + positions, mask=is_mine, other=0).to(tl.int64)
    is_bad = is_mine & ((ids < 0) | (ids >= tl.load(num_rows_ptr + feature, mask=is_mine, other=1)))
    is_mine = is_mine & ~is_bad
    rows = tl.load(first_row_ptr + feature, mask=is_mine, other=0) + ids
    return positions, rows, is_mine, is_bad


@triton.jit
def _num_missing(counts_ptr):
    return tl.load(counts_ptr + _MISSES) - tl.load(counts_ptr + _FROM_FREE) - tl.load(counts_ptr + _VICTIMS)


@triton.jit
def _is_refused(counts_ptr):
    return (_num_missing(counts_ptr) > 0) | (tl.load(counts_ptr + _BAD_POSITION) > 0)


@triton.jit
def _append(cursor_ptr, is_new):
    """Where each new value of this program goes in a list that all programs append to."""
    is_new_int = is_new.to(tl.int32)
    first = tl.atomic_add(cursor_ptr, tl.sum(is_new_int, 0).to(tl.int64), sem="relaxed")
    return first + tl.cumsum(is_new_int, 0) - is_new_int


@triton.jit
def _per_table(row_offsets_ptr, rows, inside, num_tables, SEARCH_STEPS: tl.constexpr, TABLE_BINS: tl.constexpr):
    """How many of these rows each table has."""
    table = _segment_of(row_offsets_ptr, 1, rows, num_tables, inside, SEARCH_STEPS)
    return tl.histogram(table.to(tl.int32), TABLE_BINS, mask=inside).to(tl.int64)


@triton.jit
def _add_per_table(counts_ptr, sizes, TABLE_BINS: tl.constexpr):
    tl.atomic_add(counts_ptr + tl.arange(0, TABLE_BINS), sizes, mask=sizes > 0, sem="relaxed")


@triton.jit
def _is_ahead(uses, first_use):
    """Whether these uses are by batches that are seen, and how many batches after the first of them they are."""
    distance = (uses - first_use) & _LAST_OF_USES
    return (uses > 0) & (distance < _MAX_SEEN), distance


@triton.jit(
    do_not_specialize=["num_ids", "num_features", "bounds_stride", "use", "first_place", "first_use"],
    do_not_specialize_on_alignment=["ids_ptr", "bounds_ptr"],
)
def _mark_kernel(
    ids_ptr,
    bounds_ptr,
    first_row_ptr,
    num_rows_ptr,
    table_ptr,
    row_to_slot_ptr,
    next_use_ptr,
    newest_sighting_ptr,
    sightings_ptr,
    num_ids,
    num_features,
    bounds_stride,
    use,
    first_place,
    first_use,
    SEARCH_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    positions, rows, inside, _ = _rows_of_ids(
        ids_ptr,
        bounds_ptr,
        first_row_ptr,
        num_rows_ptr,
        table_ptr,
        num_ids,
        num_features,
        bounds_stride,
        SEARCH_STEPS,
        BLOCK,
    )
    places = first_place + positions.to(tl.int32)
    end_place = first_place + num_ids
    uses = tl.zeros_like(places) + use
    entries = tl.load(row_to_slot_ptr + rows, mask=inside, other=0)

    # 1. Rows in slots: whoever comes first finds the sighting before. Any place may be the newest in the end.
    is_present = inside & (entries >= 0)
    before = tl.atomic_xchg(newest_sighting_ptr + entries, places, mask=is_present, sem="relaxed")
    is_first = is_present & ((before < first_place) | (before >= end_place))
    tl.store(sightings_ptr + before, uses.to(tl.int16), mask=is_first & (before >= 0))
    is_first &= before < 0
    is_known, _ = _is_ahead(tl.load(next_use_ptr + entries, mask=is_first, other=0).to(tl.int32), first_use)
    tl.store(next_use_ptr + entries, uses.to(tl.int16), mask=is_first & ~is_known)

    # 2. Absent rows: whoever marks one first gets its entry, and moves its note to the new sighting. Who comes later,
    # because it had read the old entry, gets the new one, and puts it back.
    before = -1 - entries - _SEEN
    is_mine = (before >= first_place) & (before < end_place)
    is_absent = inside & (entries < 0) & (entries != _BEING_PLACED) & ~is_mine
    mark = tl.full(entries.shape, _BEING_PLACED, tl.int32)
    known = tl.atomic_min(row_to_slot_ptr + rows, mark, mask=is_absent, sem="relaxed")
    is_absent &= known != _BEING_PLACED
    before = -1 - known - _SEEN
    is_mine = is_absent & (before >= first_place) & (before < end_place)
    is_first = is_absent & ~is_mine
    is_seen = is_first & (before >= 0)
    # Never above 0, where notes are: where ids have changed since they were seen, a sighting may say anything.
    notes = tl.minimum(tl.load(sightings_ptr + before, mask=is_seen, other=0).to(tl.int32), 0)
    notes = tl.where(is_seen, notes, 1 + known)
    tl.store(sightings_ptr + places, notes.to(tl.int16), mask=is_first)
    tl.store(sightings_ptr + before, uses.to(tl.int16), mask=is_seen)
    tl.store(row_to_slot_ptr + rows, tl.where(is_mine, known, -1 - (places | _SEEN)), mask=is_absent)


@triton.jit
def _begin_kernel(host_numbers_ptr, numbers_ptr, counts_ptr, NUM_NUMBERS: tl.constexpr, NUM_COUNTS: tl.constexpr):
    """The host's numbers come to the device once, and counting begins."""
    positions = tl.arange(0, _SMALL)
    inside = positions < NUM_NUMBERS
    tl.store(numbers_ptr + positions, tl.load(host_numbers_ptr + positions, mask=inside, other=0), mask=inside)
    tl.store(counts_ptr + positions, tl.zeros([_SMALL], tl.int64), mask=positions < NUM_COUNTS)


@triton.jit(do_not_specialize=["num_features"])
def _find_kernel(
    numbers_ptr,
    first_row_ptr,
    num_rows_ptr,
    table_ptr,
    row_to_slot_ptr,
    last_use_ptr,
    rows_ptr,
    hit_slots_ptr,
    hit_last_use_ptr,
    miss_rows_ptr,
    miss_known_ptr,
    counts_ptr,
    num_features,
    ARE_IDS_64_BIT: tl.constexpr,
    ARE_BOUNDS_64_BIT: tl.constexpr,
    SEARCH_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The grid is for as many ids as the buffers have room for.
    num_ids = tl.load(numbers_ptr + _NUM_IDS)
    if tl.program_id(0) * BLOCK >= num_ids:
        return
    batch_index = tl.load(numbers_ptr + _BATCH_INDEX).to(tl.int32)
    positions, rows, is_mine, is_bad = _rows_of_ids(
        _address_of(numbers_ptr, _IDS, ARE_IDS_64_BIT),
        _address_of(numbers_ptr, _BOUNDS, ARE_BOUNDS_64_BIT),
        first_row_ptr,
        num_rows_ptr,
        table_ptr,
        num_ids,
        num_features,
        tl.load(numbers_ptr + _BOUNDS_STRIDE),
        SEARCH_STEPS,
        BLOCK,
    )
    # 1. Which ids are out of range. One is enough to refuse the plan.
    last_bad = tl.max(tl.where(is_bad, positions + 1, 0), 0)
    if last_bad > 0:
        tl.atomic_max(counts_ptr + _BAD_POSITION, last_bad, sem="relaxed")
    tl.store(rows_ptr + positions, tl.where(is_mine, rows, -1), mask=positions < num_ids)

    # 2. Hits: whoever raises a slot's last use first lists it, and holds it from now on.
    slots = tl.load(row_to_slot_ptr + rows, mask=is_mine, other=0)
    is_hit = is_mine & (slots >= 0)
    # Looking first spares most of the atomics on popular rows.
    is_hit &= tl.load(last_use_ptr + slots, mask=is_hit, other=0) < batch_index
    last_use = tl.atomic_max(last_use_ptr + slots, batch_index + tl.zeros_like(slots), mask=is_hit, sem="relaxed")
    is_hit &= last_use < batch_index
    place = _append(counts_ptr + _HITS, is_hit)
    tl.store(hit_slots_ptr + place, slots, mask=is_hit)
    tl.store(hit_last_use_ptr + place, last_use, mask=is_hit)

    # 3. Misses: whoever marks an absent row first lists it, with what was known of it.
    is_miss = is_mine & (slots < 0) & (slots != _BEING_PLACED)
    mark = tl.full(slots.shape, _BEING_PLACED, tl.int32)
    known = tl.atomic_min(row_to_slot_ptr + rows, mark, mask=is_miss, sem="relaxed")
    is_miss &= known != _BEING_PLACED
    place = _append(counts_ptr + _MISSES, is_miss)
    tl.store(miss_rows_ptr + place, rows, mask=is_miss)
    tl.store(miss_known_ptr + place, known, mask=is_miss)


@triton.jit
def _take_kernel(
    numbers_ptr,
    counts_ptr,
    state_ptr,
    listed_ptr,
    listed_last_use_ptr,
    last_use_ptr,
    next_use_ptr,
    miss_slots_ptr,
    victim_last_use_ptr,
    SKIPS_USED_AHEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch_index = tl.load(numbers_ptr + _BATCH_INDEX).to(tl.int32)
    first_held = tl.load(numbers_ptr + _FIRST_HELD)
    # One program, because victims are taken in the order of the list. Free slots come first.
    num_misses = tl.load(counts_ptr + _MISSES)
    from_free = tl.minimum(num_misses, tl.load(state_ptr + _NUM_FREE))
    wanted = num_misses - from_free
    taken = tl.load(counts_ptr + _VICTIMS)
    head = tl.load(state_ptr + _LIST_HEAD)
    length = tl.load(state_ptr + _LIST_LENGTH)
    while (taken < wanted) & (head < length):
        positions = head + tl.arange(0, BLOCK)
        inside = positions < length
        slots = tl.load(listed_ptr + positions, mask=inside, other=0)
        listed_last_use = tl.load(listed_last_use_ptr + positions, mask=inside, other=0)
        # A listed slot that has been used since it was listed is no victim any more.
        is_usable = inside & (tl.load(last_use_ptr + slots, mask=inside, other=-1) == listed_last_use)
        is_usable &= listed_last_use < first_held
        if SKIPS_USED_AHEAD:
            uses = tl.load(next_use_ptr + slots, mask=inside, other=0).to(tl.int32)
            is_used_ahead, _ = _is_ahead(uses, tl.load(numbers_ptr + _FIRST_USE).to(tl.int32))
            is_usable &= ~is_used_ahead
        is_usable_int = is_usable.to(tl.int32)
        places = taken + tl.cumsum(is_usable_int, 0) - is_usable_int
        is_chosen = is_usable & (places < wanted)
        tl.store(miss_slots_ptr + places, slots, mask=is_chosen)
        tl.store(victim_last_use_ptr + places, listed_last_use, mask=is_chosen)
        # Held from now on, so that a second scan does not list it.
        tl.store(last_use_ptr + slots, batch_index + tl.zeros_like(slots), mask=is_chosen)
        taken += tl.sum(is_chosen.to(tl.int64), 0)
        after_last_chosen = tl.max(tl.where(is_chosen, positions + 1, 0), 0)
        head = tl.where(taken < wanted, tl.minimum(head + BLOCK, length), after_last_chosen)
    tl.store(state_ptr + _LIST_HEAD, head)
    tl.store(counts_ptr + _VICTIMS, taken)
    tl.store(counts_ptr + _FROM_FREE, from_free)


@triton.jit
def _bins_of(numbers_ptr, last_use_ptr, next_use_ptr, frequency_ptr, slots, num_slots):
    """The bin of each slot, -1 if it must not go; and its last use."""
    first_held = tl.load(numbers_ptr + _FIRST_HELD)
    # Occupied, and held by no batch in flight (hazards 1 and 3).
    inside = slots < num_slots
    last_use = tl.load(last_use_ptr + slots, mask=inside, other=-1)
    is_usable = (last_use >= 0) & (last_use < first_held)
    uses = tl.load(next_use_ptr + slots, mask=is_usable, other=0).to(tl.int32)
    frequency = tl.load(frequency_ptr + slots, mask=is_usable, other=1.0)
    bins = (frequency.to(tl.int32, bitcast=True) >> _FREQUENCY_SHIFT) - _LOWEST_BIN
    bins = tl.minimum(tl.maximum(bins, 0), _FREQUENCY_BINS - 1)
    # Slots whose next use is near have the highest bins.
    is_used_ahead, distance = _is_ahead(uses, tl.load(numbers_ptr + _FIRST_USE).to(tl.int32))
    bins = tl.where(is_used_ahead, _FREQUENCY_BINS + _MAX_SEEN - 1 - distance, bins)
    return tl.where(is_usable, bins, -1), last_use


@triton.jit(do_not_specialize=["num_slots"])
def _histogram_kernel(
    numbers_ptr,
    counts_ptr,
    histogram_ptr,
    last_use_ptr,
    next_use_ptr,
    frequency_ptr,
    num_slots,
    BLOCK: tl.constexpr,
):
    if _num_missing(counts_ptr) > 0:
        slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        bins, _ = _bins_of(numbers_ptr, last_use_ptr, next_use_ptr, frequency_ptr, slots, num_slots)
        # Most slots share few bins: counted here first, so that atomics on one address are rare.
        sizes = tl.histogram(tl.maximum(bins, 0), _NUM_BINS, mask=bins >= 0)
        tl.atomic_add(histogram_ptr + tl.arange(0, _NUM_BINS), sizes, mask=sizes > 0, sem="relaxed")


@triton.jit(do_not_specialize=["num_wanted", "capacity"])
def _threshold_kernel(counts_ptr, state_ptr, histogram_ptr, num_wanted, capacity):
    missing = _num_missing(counts_ptr)
    if missing > 0:
        bins = tl.arange(0, _NUM_BINS)
        sizes = tl.load(histogram_ptr + bins)
        at_most = tl.cumsum(sizes, 0).to(tl.int64)
        num_unused_ahead = tl.sum(tl.where(bins < _FREQUENCY_BINS, sizes, 0), 0).to(tl.int64)
        # As many as are wanted, but none that a batch ahead will use unless there is no other.
        target = tl.maximum(missing, num_wanted)
        target = tl.where(num_unused_ahead >= missing, tl.minimum(target, num_unused_ahead), target)
        threshold = tl.minimum(tl.sum((at_most < target).to(tl.int64), 0), _NUM_BINS - 1)
        num_below = tl.sum(tl.where(bins < threshold, sizes, 0), 0).to(tl.int64)
        num_up_to = num_below + tl.sum(tl.where(bins == threshold, sizes, 0), 0).to(tl.int64)
        tl.store(state_ptr + _LIST_HEAD, 0)
        tl.store(state_ptr + _LIST_LENGTH, tl.minimum(num_up_to, capacity))
        tl.store(state_ptr + _THRESHOLD, threshold)
        tl.store(state_ptr + _NUM_BELOW, num_below)
        tl.store(state_ptr + _BELOW_CURSOR, 0)
        tl.store(state_ptr + _AT_CURSOR, 0)
        # All threads have read the histogram before it is cleared for the next scan.
        tl.debug_barrier()
        tl.store(histogram_ptr + bins, tl.zeros_like(sizes))


@triton.jit(do_not_specialize=["capacity", "num_slots"])
def _list_kernel(
    numbers_ptr,
    counts_ptr,
    state_ptr,
    listed_ptr,
    listed_last_use_ptr,
    capacity,
    last_use_ptr,
    next_use_ptr,
    frequency_ptr,
    num_slots,
    BLOCK: tl.constexpr,
):
    if _num_missing(counts_ptr) > 0:
        slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        bins, last_use = _bins_of(numbers_ptr, last_use_ptr, next_use_ptr, frequency_ptr, slots, num_slots)
        threshold = tl.load(state_ptr + _THRESHOLD)
        # All slots below the threshold first, then as many at the threshold as there is room for.
        is_below = (bins >= 0) & (bins < threshold)
        place = _append(state_ptr + _BELOW_CURSOR, is_below)
        tl.store(listed_ptr + place, slots, mask=is_below)
        tl.store(listed_last_use_ptr + place, last_use, mask=is_below)
        is_at = bins == threshold
        place = tl.load(state_ptr + _NUM_BELOW) + _append(state_ptr + _AT_CURSOR, is_at)
        is_at &= place < capacity
        tl.store(listed_ptr + place, slots, mask=is_at)
        tl.store(listed_last_use_ptr + place, last_use, mask=is_at)


@triton.jit(do_not_specialize=["num_tables"])
def _commit_kernel(
    numbers_ptr,
    counts_ptr,
    state_ptr,
    row_to_slot_ptr,
    slot_to_row_ptr,
    last_use_ptr,
    next_use_ptr,
    newest_sighting_ptr,
    sightings_ptr,
    frequency_ptr,
    free_slots_ptr,
    hit_slots_ptr,
    hit_last_use_ptr,
    miss_rows_ptr,
    miss_known_ptr,
    miss_slots_ptr,
    victim_rows_ptr,
    victim_last_use_ptr,
    row_offsets_ptr,
    num_unique_ptr,
    num_misses_ptr,
    num_victims_ptr,
    num_tables,
    SEARCH_STEPS: tl.constexpr,
    TABLE_BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if (first >= tl.load(counts_ptr + _HITS)) & (first >= tl.load(counts_ptr + _MISSES)):
        return
    batch_index = tl.load(numbers_ptr + _BATCH_INDEX).to(tl.int32)
    use = tl.load(numbers_ptr + _USE).to(tl.int32)
    first_place = tl.load(numbers_ptr + _FIRST_PLACE).to(tl.int32)
    end_place = first_place + tl.where(use > 0, tl.load(numbers_ptr + _NUM_IDS).to(tl.int32), 0)
    weight = _float_of(numbers_ptr, _WEIGHT)
    origin = _float_of(numbers_ptr, _ORIGIN)
    positions = first + tl.arange(0, BLOCK)
    num_victims = tl.load(counts_ptr + _VICTIMS)
    is_hit = positions < tl.load(counts_ptr + _HITS)
    is_miss = positions < tl.load(counts_ptr + _MISSES)
    is_victim = positions < num_victims
    hits = tl.load(hit_slots_ptr + positions, mask=is_hit, other=0)
    rows = tl.load(miss_rows_ptr + positions, mask=is_miss, other=0)
    known = tl.load(miss_known_ptr + positions, mask=is_miss, other=-1)
    slots = tl.load(miss_slots_ptr + positions, mask=is_victim, other=0)
    # Refused: every mark and hold of this plan is taken back.
    if _is_refused(counts_ptr):
        tl.store(last_use_ptr + hits, tl.load(hit_last_use_ptr + positions, mask=is_hit, other=0), mask=is_hit)
        old = tl.load(victim_last_use_ptr + positions, mask=is_victim, other=0)
        tl.store(last_use_ptr + slots, old, mask=is_victim)
        tl.store(row_to_slot_ptr + rows, known, mask=is_miss)
    else:
        # Who stays.
        frequency = tl.load(frequency_ptr + hits, mask=is_hit, other=0.0)
        newest = tl.load(newest_sighting_ptr + hits, mask=is_hit, other=-1)
        next_use = tl.load(next_use_ptr + hits, mask=is_hit, other=0).to(tl.int32)
        first_use = tl.load(numbers_ptr + _FIRST_USE).to(tl.int32)
        hit_rows = tl.load(slot_to_row_ptr + hits, mask=is_hit, other=0)
        tl.store(frequency_ptr + hits, frequency + weight, mask=is_hit)
        # What its own sightings say of later uses, a batch that was seen writes when its slots are translated.
        is_seen = is_hit & (tl.zeros_like(hits) + use > 0)
        is_mine = is_seen & (newest >= first_place) & (newest < end_place)
        tl.store(newest_sighting_ptr + hits, tl.full(hits.shape, -1, tl.int32), mask=is_mine)
        # A batch that goes ahead of others leaves their uses known.
        is_next = is_seen & ((next_use == use) | (tl.zeros_like(hits) + use == first_use))
        tl.store(next_use_ptr + hits, tl.zeros_like(hits).to(tl.int16), mask=is_next)
        num_hits = _per_table(row_offsets_ptr, hit_rows, is_hit, num_tables, SEARCH_STEPS, TABLE_BINS)
        num_misses = _per_table(row_offsets_ptr, rows, is_miss, num_tables, SEARCH_STEPS, TABLE_BINS)
        _add_per_table(num_unique_ptr, num_hits + num_misses, TABLE_BINS)
        _add_per_table(num_misses_ptr, num_misses, TABLE_BINS)

        # Who leaves, and what is to be remembered of it.
        victim_rows = tl.load(slot_to_row_ptr + slots, mask=is_victim, other=0)
        victim_newest = tl.load(newest_sighting_ptr + slots, mask=is_victim, other=-1)
        victim_frequency = tl.load(frequency_ptr + slots, mask=is_victim, other=1.0)
        log2 = tl.log2(tl.maximum(victim_frequency, _LOWEST_FREQUENCY))
        note = tl.floor(log2 * _NOTES_PER_OCTAVE + origin).to(tl.int32)
        note = (note + 2 * _NUM_NOTES) % _NUM_NOTES + 1
        tl.store(victim_rows_ptr + positions, victim_rows, mask=is_victim)
        is_seen = is_victim & (victim_newest >= 0)
        tl.store(sightings_ptr + victim_newest, (-note).to(tl.int16), mask=is_seen)
        tl.store(row_to_slot_ptr + victim_rows, -1 - tl.where(is_seen, victim_newest | _SEEN, note), mask=is_victim)
        sizes = _per_table(row_offsets_ptr, victim_rows, is_victim, num_tables, SEARCH_STEPS, TABLE_BINS)
        _add_per_table(num_victims_ptr, sizes, TABLE_BINS)
        tl.debug_barrier()  # the same places are written below

        # Who comes.
        from_free = is_miss & ~is_victim
        # Victims' slots go to the first misses, free ones to the rest, from the top of their stack.
        free_places = tl.load(state_ptr + _NUM_FREE) - 1 - (positions - num_victims)
        free = tl.load(free_slots_ptr + free_places, mask=from_free, other=0)
        slots = tl.where(is_victim, slots, free)
        places = -1 - known - _SEEN
        is_seen = is_miss & (places >= 0)
        note = -tl.minimum(tl.load(sightings_ptr + places, mask=is_seen, other=0).to(tl.int32), 0)
        note = tl.where(is_seen, note, -1 - known)
        is_later = is_seen & ((places < first_place) | (places >= end_place))
        tl.store(sightings_ptr + places, tl.zeros_like(places).to(tl.int16), mask=is_later)
        # Where a batch was not seen, its rows may be used soon: which of their uses is next is not known.
        next_use = tl.where(is_later & (tl.zeros_like(slots) + use == 0), first_use, 0)
        tl.store(newest_sighting_ptr + slots, tl.where(is_later, places, -1), mask=is_miss)
        tl.store(next_use_ptr + slots, next_use.to(tl.int16), mask=is_miss)
        # The row's frequency as it was when it left. Notes go round, so that a note from long ago is taken for no more
        # than the oldest that can be told apart.
        since_origin = (note - 1).to(tl.float32) - origin
        since_origin = tl.where(since_origin < 0, since_origin + _NUM_NOTES, since_origin)
        since_origin = tl.where(since_origin >= _FIRST_NOTE_LONG_PAST, since_origin - _NUM_NOTES, since_origin)
        frequency = tl.where(note == 0, 0.0, tl.exp2(since_origin / _NOTES_PER_OCTAVE)) + weight
        tl.store(miss_slots_ptr + positions, slots, mask=is_miss)
        tl.store(row_to_slot_ptr + rows, slots, mask=is_miss)
        tl.store(slot_to_row_ptr + slots, rows, mask=is_miss)
        tl.store(last_use_ptr + slots, batch_index + tl.zeros_like(slots), mask=is_miss)
        tl.store(frequency_ptr + slots, frequency, mask=is_miss)


@triton.jit(do_not_specialize=["num_tables"])
def _translate_kernel(
    numbers_ptr,
    counts_ptr,
    state_ptr,
    row_to_slot_ptr,
    next_use_ptr,
    sightings_ptr,
    rows_ptr,
    row_offsets_ptr,
    num_ids_ptr,
    num_tables,
    SEARCH_STEPS: tl.constexpr,
    TABLE_BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_ids = tl.load(numbers_ptr + _NUM_IDS)
    slots_ptr = _address_of(numbers_ptr, _SLOTS, True)
    positions = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_refused = _is_refused(counts_ptr)
    rows = tl.load(rows_ptr + positions, mask=positions < num_ids, other=-1)
    is_mine = rows >= 0
    slots = tl.load(row_to_slot_ptr + rows, mask=is_mine, other=0).to(tl.int64)
    # A bad plan leaves negative values in row_to_slot; its batch will not be looked up.
    tl.store(slots_ptr + positions, tl.where(is_refused, tl.zeros_like(slots), slots), mask=is_mine)
    if not is_refused:
        sizes = _per_table(row_offsets_ptr, rows, is_mine, num_tables, SEARCH_STEPS, TABLE_BINS)
        _add_per_table(num_ids_ptr, sizes, TABLE_BINS)
        # What the batch's sightings say is now the next use of its rows. One place of a row says it.
        first_place = tl.load(numbers_ptr + _FIRST_PLACE)
        is_seen = is_mine & (first_place + positions >= positions)
        uses = tl.load(sightings_ptr + first_place + positions, mask=is_seen, other=0)
        tl.store(next_use_ptr + slots, uses, mask=is_seen & (uses > 0))
    # Moves, which come next, read these: nothing moves if the plan was refused.
    if tl.program_id(0) == 0:
        if is_refused:
            tl.store(counts_ptr + _IS_REFUSED, 1)
        else:
            from_free = tl.load(counts_ptr + _FROM_FREE)
            tl.store(state_ptr + _NUM_FREE, tl.load(state_ptr + _NUM_FREE) - from_free)
            tl.store(counts_ptr + _FILLS, tl.load(counts_ptr + _MISSES))
            tl.store(counts_ptr + _WRITEBACKS, tl.load(counts_ptr + _VICTIMS))


@triton.jit
def _report_kernel(counts_ptr, host_counts_ptr, NUM_COUNTS: tl.constexpr):
    positions = tl.arange(0, _SMALL)
    inside = positions < NUM_COUNTS
    tl.store(host_counts_ptr + positions, tl.load(counts_ptr + positions, mask=inside, other=0), mask=inside)


@triton.jit
def _clear_bins_kernel(bins_ptr):
    tl.store(bins_ptr + tl.arange(0, _NUM_ORDER_BINS), tl.zeros([_NUM_ORDER_BINS], tl.int32))


@triton.jit(do_not_specialize=["shift"])
def _count_bins_kernel(rows_ptr, bins_ptr, counts_ptr, shift, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    num_rows = tl.load(counts_ptr + COUNT)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if first < num_rows:
        positions = first + tl.arange(0, BLOCK)
        inside = positions < num_rows
        bins = tl.load(rows_ptr + positions, mask=inside, other=0) >> shift
        tl.atomic_add(bins_ptr + bins, tl.full(bins.shape, 1, tl.int32), mask=inside, sem="relaxed")


@triton.jit
def _first_of_bins_kernel(bins_ptr):
    """From how many there are in each bin to where each begins."""
    bins = tl.arange(0, _NUM_ORDER_BINS)
    # One program: the barrier keeps reads before writes.
    sizes = tl.load(bins_ptr + bins)
    firsts = tl.cumsum(sizes, 0) - sizes
    tl.debug_barrier()
    tl.store(bins_ptr + bins, firsts)


@triton.jit(do_not_specialize=["shift"])
def _put_in_bins_kernel(
    rows_ptr,
    slots_ptr,
    ordered_rows_ptr,
    ordered_slots_ptr,
    bins_ptr,
    counts_ptr,
    shift,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_rows = tl.load(counts_ptr + COUNT)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if first < num_rows:
        positions = first + tl.arange(0, BLOCK)
        inside = positions < num_rows
        rows = tl.load(rows_ptr + positions, mask=inside, other=0)
        slots = tl.load(slots_ptr + positions, mask=inside, other=0)
        one = tl.full(rows.shape, 1, tl.int32)
        places = tl.atomic_add(bins_ptr + (rows >> shift), one, mask=inside, sem="relaxed")
        tl.store(ordered_rows_ptr + places, rows, mask=inside)
        tl.store(ordered_slots_ptr + places, slots, mask=inside)


@triton.jit
def _move_kernel(
    source_ptr,
    source_index_ptr,
    target_ptr,
    target_index_ptr,
    counts_ptr,
    COUNT: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    # Few programs, each with many rows under way; a row is as many words, 16 bytes of which a thread moves at a time.
    num_rows = tl.load(counts_ptr + COUNT)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK_ROWS
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    while first < num_rows:
        positions = first + tl.arange(0, BLOCK_ROWS)
        inside = positions < num_rows
        source = tl.load(source_index_ptr + positions, mask=inside, other=0).to(tl.int64) * WORDS
        target = tl.load(target_index_ptr + positions, mask=inside, other=0).to(tl.int64) * WORDS
        for first_word in tl.static_range(0, WORDS, BLOCK_WORDS):
            words = first_word + tl.arange(0, BLOCK_WORDS)
            mask = inside[:, None] & (words < WORDS)[None, :]
            values = tl.load(source_ptr + source[:, None] + words[None, :], mask=mask)
            tl.store(target_ptr + target[:, None] + words[None, :], values, mask=mask)
        first += stride


@triton.jit
def _count_misses_kernel(numbers_ptr, slot_to_row_ptr, rows_ptr, num_misses_ptr, BLOCK: tl.constexpr):
    slots_ptr = _address_of(numbers_ptr, _SLOTS, True)
    positions = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(rows_ptr + positions, mask=positions < tl.load(numbers_ptr + _NUM_IDS), other=-1)
    is_mine = rows >= 0
    slots = tl.load(slots_ptr + positions, mask=is_mine, other=0)
    is_miss = is_mine & (tl.load(slot_to_row_ptr + slots, mask=is_mine, other=0) != rows)
    num_misses = tl.sum(is_miss.to(tl.int64), 0)
    if num_misses > 0:
        tl.atomic_add(num_misses_ptr, num_misses, sem="relaxed")
