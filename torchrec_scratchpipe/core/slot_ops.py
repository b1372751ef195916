# SPDX-License-Identifier: BSD-3-Clause
"""What Plan and the moving of rows ask of a device: the operations, and the tensors that they share.

Shapes: ``I`` ids, ``F`` features, ``T`` tables, ``M`` misses, ``V`` victims, ``S`` slots, ``R`` rows, ``C`` capacity in
    ids.

The host need not know the sizes: how many rows an operation concerns stands in tensors on the device. Two classes have
all operations. :class:`~torchrec_scratchpipe.core.torch_ops.TorchOps` has them in torch, for a CPU.
:class:`~torchrec_scratchpipe.core.triton_ops.TritonOps` has them in Triton, and enqueues each one without waiting.
Tests compare the two.

**The entry of a row in** ``row_to_slot``, 32 bits::

    the row sits in a slot:  slot
    it sits in none:         -1 - note, if no batch seen ahead will use it
                             -1 - (SEEN | place), if one will; its note is in the sighting at that place
    it is being placed:      BEING_PLACED, the smallest int32, while Plan works

While the row sits in a slot, how often it was used is in ``frequency``. When the row leaves, its note keeps the
frequency, as a position on a scale of logarithms that wraps around. Note 0 is for rows that were never used. To forget
how often rows were used would cost 5 % more misses.

**What is known of the future.** A batch that is seen and not yet planned has a stretch of ``sightings``, one for each
of its ids. A sighting says which batch uses the row after this one. So all uses of a row that are ahead form a chain::

    row_to_slot     sits in slot 7                    sits in none: SEEN | place
                       |        |                                       |
    next_use[7]: batch 5      newest_sighting[7]: place                 |
                  |                              |                      |
    sightings of  v                              v                      v
       batch 5:  "then batch 90"   batch 90:  nothing yet     batch 33: its note

A batch that is seen now looks up the newest sighting of each row, writes its own number there, and becomes the newest.
When a batch is planned, what its sightings say becomes the next use of its rows. A use is written as
``1 + number % NUM_USES``, where batches are numbered as they are seen; 0 is none. A note is written as its negative.

**Which rows leave**: those that no batch seen ahead will use, the least often used first; then those whose next use is
farthest. A use counts half as much after a half-life, so that yesterday's favourites leave.

Source:
    LRFU (Lee et al., IEEE Transactions on Computers 2001) for the count, ScratchPipe (ISCA 2022) for the known future.
"""

import enum
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "BEING_PLACED",
    "FREQUENCY_BINS",
    "FREQUENCY_SHIFT",
    "HALF_LIFE",
    "LOWEST_BIN",
    "LOWEST_FREQUENCY",
    "MAX_BATCHES_SEEN_AHEAD",
    "MAX_HALF_LIVES",
    "MAX_OCTAVES",
    "MAX_SEEN",
    "NOTES_PER_OCTAVE",
    "NOT_SEEN",
    "NUM_BINS",
    "NUM_NOTES",
    "NUM_ORDER_BINS",
    "NUM_USES",
    "SEEN",
    "Aging",
    "CommonOps",
    "Count",
    "FeatureIds",
    "FeatureRows",
    "Number",
    "OrderBuffers",
    "PlanBuffers",
    "PlanRequest",
    "ScratchBuffers",
    "Sighting",
    "SlotMaps",
    "SlotOps",
    "State",
    "TableCounts",
    "make_maps",
    "use_of",
]

MAX_SEEN = 512  # batches that are seen and not planned
MAX_BATCHES_SEEN_AHEAD = 500  # of a pipeline, which has some more on their way
NUM_USES = 1 << 14  # of batches that can be told apart; more than are ahead, so that a use from long ago is told, too
SEEN = 1 << 30
NUM_NOTES = (1 << 11) - 2
NOTES_PER_OCTAVE = 16
BEING_PLACED = -(1 << 31)

HALF_LIFE = 256.0  # batches after which a use counts half
MAX_HALF_LIVES = 32  # since the origin of frequencies; float32 would end at 127
MAX_OCTAVES = 48  # of a frequency, since the origin: a note that says more is long past
LOWEST_FREQUENCY = 2.0**-90

# Victims are listed by bins: frequency from 2 ** -96 to 2 ** 64, each octave in eight equal parts, then rows that a
# batch seen ahead will use, a bin for each batch, the farthest first. The bin of a frequency is what a float32 says
# without its last bits: a sign of 0, the exponent, three bits of the mantissa.
FREQUENCY_SHIFT = 23 - 3
LOWEST_BIN = (127 - 96) << 3
FREQUENCY_BINS = 160 << 3
NUM_BINS = 2048  # a power of two, at least FREQUENCY_BINS + MAX_SEEN
assert NUM_BINS >= FREQUENCY_BINS + MAX_SEEN

NUM_ORDER_BINS = 4096  # into which rows are put before they move, by where they lie in the tables


class Number(enum.IntEnum):
    """Positions in :attr:`PlanBuffers.numbers`: what changes from batch to batch, for launches that are recorded."""

    NUM_IDS = 0
    IDS = 1  # an address, as are the next and the one after the stride
    BOUNDS = 2
    BOUNDS_STRIDE = 3
    SLOTS = 4
    BATCH_INDEX = 5
    FIRST_HELD = 6
    USE = 7
    FIRST_USE = 8
    FIRST_PLACE = 9
    WEIGHT = 10  # a float32, by its bits, as is the next
    ORIGIN = 11


class Count(enum.IntEnum):
    """Positions in :attr:`PlanBuffers.counts`."""

    HITS = 0
    MISSES = 1
    VICTIMS = 2
    FROM_FREE = 3  # misses that take free slots
    BAD_POSITION = 4  # of an id that is out of range, counted from 1; 0 if there is none
    IS_REFUSED = 5  # too few slots, or a bad id: the maps are as before
    FILLS = 6  # rows to move, 0 if refused
    WRITEBACKS = 7


class State(enum.IntEnum):
    """Positions in :attr:`SlotMaps.state`."""

    NUM_FREE = 0
    LIST_HEAD = 1
    LIST_LENGTH = 2
    THRESHOLD = 3  # the last bin that is listed
    NUM_BELOW = 4  # slots in bins below it
    BELOW_CURSOR = 5
    AT_CURSOR = 6


class FeatureIds(NamedTuple):
    """The ids of one kernel group's features, behind each other."""

    ids: Tensor  # [I] int32 or int64
    bounds: Tensor  # [F + 1] int32 or int64: feature f owns ids[bounds[f] : bounds[f + 1]]


class FeatureRows(NamedTuple):
    """Where the features of a kernel group look up their rows in one pool."""

    first_row: Tensor  # [F] int64, the row of id 0
    num_rows: Tensor  # [F] int64, of the table
    table: Tensor  # [F] int32, position in the pool, -1 if the table is in another


class Sighting(NamedTuple):
    """Of a batch that is seen: how its uses are written, and where its sightings are."""

    use: int  # in [1, NUM_USES]; 0 if the batch was not seen
    first_place: int  # one place for each id, from here on; -1 if the batch was not seen


NOT_SEEN = Sighting(0, -1)


class Aging(NamedTuple):
    """How uses are weighed now; a use in batch `t` counts ``2 ** ((t - origin) / half_life)``."""

    weight: float  # of a use by this batch
    origin: float  # the time at which a use weighs 1, as a note: in [0, NUM_NOTES)


class PlanRequest(NamedTuple):
    """One batch, as Plan is asked for it."""

    ids: FeatureIds
    features: FeatureRows
    slots: Tensor  # [>= I] int64, to be written: the slot of each id
    batch_index: int
    first_held: int  # slots with ``last_use >= first_held`` stay
    first_use: int  # in [1, NUM_USES]: a use by the oldest batch that was seen and not planned
    sighting: Sighting  # of the batch itself
    aging: Aging


@dataclass(frozen=True, eq=False)
class SlotMaps:
    """A slot map's state on the device."""

    row_to_slot: Tensor  # [R] int32, see above
    slot_to_row: Tensor  # [S] int64, -1 for a free slot
    last_use: Tensor  # [S] int32, the newest planned batch that uses the slot's row, -1 for a free slot
    next_use: Tensor  # [S] int16, the next use of the slot's row by a batch seen ahead
    newest_sighting: Tensor  # [S] int32, where the last of them is; -1 for none
    frequency: Tensor  # [S] float32
    sightings: Tensor  # [any] int16, by place: the use after this one; at a row's newest, 0 or the row's note
    free_slots: Tensor  # [S] int32, of which the first NUM_FREE count
    listed: Tensor  # [S // 16 + C] int32, coming victims
    listed_last_use: Tensor  # the same shape, int32: as it was when they were listed
    histogram: Tensor  # [NUM_BINS] int32, zero between scans
    state: Tensor  # [len(State)] int64


@dataclass(frozen=True, eq=False)
class ScratchBuffers:
    """What Plan needs until its batch is planned; shared by all batches of a pool."""

    hit_slots: Tensor  # [C] int32
    hit_last_use: Tensor  # [C] int32, before this batch
    miss_known: Tensor  # [C] int32, what row_to_slot said
    victim_last_use: Tensor  # [C] int32


@dataclass(frozen=True, eq=False)
class OrderBuffers:
    """Room for the rows that move in one direction, in the order in which they move.

    Shared by all batches of a pool.
    """

    rows: Tensor  # [C] int64
    slots: Tensor  # [C] int32
    bins: Tensor  # [NUM_ORDER_BINS] int32


@dataclass(frozen=True, eq=False)
class PlanBuffers:
    """What is planned for one batch and pool, until the batch has trained."""

    rows: Tensor  # [C] int64, row of each id, -1 if it is another pool's
    slots: Tensor  # [C] int64, slot of each id, of all pools of the kernel group
    miss_rows: Tensor  # [C] int64
    miss_slots: Tensor  # [C] int32; the first V are those of the victims
    victim_rows: Tensor  # [C] int64
    counts: Tensor  # [len(Count)] int64
    host_counts: Tensor  # the same on the host, page-locked where the device is another
    numbers: Tensor  # [len(Number)] int64
    host_numbers: Tensor  # the same on the host, page-locked where the device is another


@dataclass(frozen=True, eq=False)
class TableCounts:
    """Statistics of a pool, by table."""

    row_offsets: Tensor  # [T + 1] int64
    num_ids: Tensor  # [T] int64
    num_unique: Tensor  # [T] int64
    num_misses: Tensor  # [T] int64
    num_victims: Tensor  # [T] int64
    num_misses_at_train: Tensor  # [1] int64

    @classmethod
    def of(cls, row_offsets: Sequence[int], device: torch.device) -> "TableCounts":
        """Zeros for tables that begin at these rows; the last offset is R."""
        offsets = torch.tensor(row_offsets, dtype=torch.int64, device=device)
        ids, unique, misses, victims = torch.zeros(4, len(row_offsets) - 1, dtype=torch.int64, device=device)
        return cls(offsets, ids, unique, misses, victims, torch.zeros(1, dtype=torch.int64, device=device))


class SlotOps(Protocol):
    """The operations, in the order in which Plan enqueues them, and those that move rows."""

    orders_moves: bool  # whether :meth:`order` needs buffers

    def mark(self, ids: FeatureIds, features: FeatureRows, maps: SlotMaps, sighting: Sighting, first_use: int) -> None:
        """Note that a batch seen ahead will use these rows; ids out of range are left alone.

        Its sightings are zeros. `first_use` is as in :class:`PlanRequest`.
        """

    def prepare(self, request: PlanRequest, buffers: PlanBuffers) -> None:
        """Take in what is asked for; before the operations of a plan, which may be :meth:`recorded`."""

    def recorded(self, buffers: PlanBuffers, key: Hashable) -> AbstractContextManager[bool]:
        """While entered, the operations of `key` are enqueued: by this, if it has recorded them, or else by the caller.

        They must depend on nothing but what :meth:`prepare` takes in, and what `key` tells apart. Says whether they are
        enqueued already.
        """

    def find(self, request: PlanRequest, maps: SlotMaps, buffers: PlanBuffers, scratch: ScratchBuffers) -> None:
        """Tell unique hits, which are held from now on, from unique misses, which are marked in row_to_slot."""

    def take(
        self,
        request: PlanRequest,
        maps: SlotMaps,
        buffers: PlanBuffers,
        scratch: ScratchBuffers,
        skips_used_ahead: bool,
    ) -> None:
        """Take listed slots until there is one for every miss, or the list is spent.

        Slots that are held stay; with `skips_used_ahead`, so do rows that a batch seen ahead will use.
        """

    def scan(self, request: PlanRequest, maps: SlotMaps, buffers: PlanBuffers, num_wanted: int) -> None:
        """List those slots that should go first, if slots are missing after :meth:`take`; else nothing.

        About `num_wanted` of them, or as many as are missing.
        """

    def commit(
        self, request: PlanRequest, maps: SlotMaps, buffers: PlanBuffers, scratch: ScratchBuffers, tables: TableCounts
    ) -> None:
        """Place every miss, if there is a slot for each and no id is bad; else put the maps back as they were."""

    def translate(self, request: PlanRequest, maps: SlotMaps, buffers: PlanBuffers, tables: TableCounts) -> None:
        """Write the slot of each of this pool's ids, and settle the counts."""

    def report(self, buffers: PlanBuffers) -> None:
        """Copy the counts to the host."""

    def order(
        self, rows: Tensor, slots: Tensor, counts: Tensor, count: Count, num_rows: int, buffers: OrderBuffers
    ) -> tuple[Tensor, Tensor]:
        """Put the first ``counts[count]`` pairs of a row and its slot in the order in which they had better move.

        `num_rows` is R. Returns [C] int64 and [C] int32.
        """

    def move(
        self, source: Tensor, source_index: Tensor, target: Tensor, target_index: Tensor, counts: Tensor, count: Count
    ) -> None:
        """``target[target_index[i]] = source[source_index[i]]`` for the first ``counts[count]`` rows.

        Both [N, D] or [N], contiguous, of one dtype, with an even number of bytes per row; on the device or in
        page-locked host memory. Indices are [C] int32 or int64.
        """

    def count_misses(self, request: PlanRequest, maps: SlotMaps, buffers: PlanBuffers, num_misses: Tensor) -> None:
        """Add how many ids would not find their row in their slot; before Train of a plan that stands."""

    def age(self, maps: SlotMaps, factor: float) -> None:
        """Multiply all frequencies."""

    def clear_victim_list(self, maps: SlotMaps) -> None:
        """Empty the list of coming victims."""


class CommonOps:
    """What needs no kernel: see :class:`SlotOps`."""

    orders_moves = False

    def order(
        self, rows: Tensor, slots: Tensor, counts: Tensor, count: Count, num_rows: int, buffers: OrderBuffers
    ) -> tuple[Tensor, Tensor]:
        """See :class:`SlotOps`; no order is better than another."""
        return rows, slots

    def report(self, buffers: PlanBuffers) -> None:
        """See :class:`SlotOps`."""
        buffers.host_counts.copy_(buffers.counts, non_blocking=True)

    def age(self, maps: SlotMaps, factor: float) -> None:
        """See :class:`SlotOps`."""
        maps.frequency.mul_(factor)

    def clear_victim_list(self, maps: SlotMaps) -> None:
        """See :class:`SlotOps`."""
        maps.state[State.LIST_LENGTH : State.LIST_LENGTH + 1].zero_()


def make_maps(row_to_slot: Tensor, num_slots: int, list_capacity: int) -> SlotMaps:
    """Make a slot map's state for an empty scratchpad. Shapes: `row_to_slot` [R] int32."""
    device = row_to_slot.device
    state = torch.zeros(len(State), dtype=torch.int64, device=device)
    state[State.NUM_FREE] = num_slots
    return SlotMaps(
        row_to_slot=row_to_slot,
        slot_to_row=torch.full((num_slots,), -1, dtype=torch.int64, device=device),
        last_use=torch.full((num_slots,), -1, dtype=torch.int32, device=device),
        next_use=torch.zeros(num_slots, dtype=torch.int16, device=device),
        newest_sighting=torch.full((num_slots,), -1, dtype=torch.int32, device=device),
        frequency=torch.zeros(num_slots, dtype=torch.float32, device=device),
        sightings=torch.zeros(0, dtype=torch.int16, device=device),
        free_slots=torch.arange(num_slots - 1, -1, -1, dtype=torch.int32, device=device),
        listed=torch.zeros(list_capacity, dtype=torch.int32, device=device),
        listed_last_use=torch.zeros(list_capacity, dtype=torch.int32, device=device),
        histogram=torch.zeros(NUM_BINS, dtype=torch.int32, device=device),
        state=state,
    )


def use_of(seen: int) -> int:
    """How a use by this batch is written, counted as batches are seen."""
    return 1 + seen % NUM_USES
