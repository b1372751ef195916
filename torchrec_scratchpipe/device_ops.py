# SPDX-License-Identifier: BSD-3-Clause
"""What Plan and the moving of rows ask of a device: operations whose sizes the host need not know.

Shapes: ``I`` ids, ``F`` features, ``T`` tables, ``M`` misses, ``V`` victims, ``S`` slots, ``R`` rows, ``C`` capacity in ids.

Every operation is enqueued and returns at once; how many rows it concerns stands in tensors on the device. Two classes have
them all: :class:`~torchrec_scratchpipe.torch_ops.TorchOps` in torch operations, and
:class:`~torchrec_scratchpipe.triton_ops.TritonOps` in Triton kernels. Tests compare the two.
"""

import enum
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from torchrec_scratchpipe.eviction import WINDOW_BITS

__all__ = [
    "BEING_PLACED",
    "FREQUENCY_BINS",
    "NUM_BINS",
    "Aging",
    "CommonOps",
    "Count",
    "DeviceMaps",
    "DeviceOps",
    "FeatureIds",
    "FeatureRows",
    "PlanBuffers",
    "ScratchBuffers",
    "State",
    "TableCounts",
    "make_maps",
]

BEING_PLACED = -(1 << 31)  # what row_to_slot says of a miss while it is being planned

# Victims are listed by bins: frequency in eighths of an octave, from 2 ** -96 to 2 ** 64, then rows that a batch
# seen ahead will use, the farthest first.
BINS_PER_OCTAVE = 8
LOWEST_OCTAVE = -96
FREQUENCY_BINS = 160 * BINS_PER_OCTAVE
NUM_BINS = 2048  # a power of two, at least FREQUENCY_BINS + WINDOW_BITS
assert NUM_BINS >= FREQUENCY_BINS + WINDOW_BITS


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
    """Positions in :attr:`DeviceMaps.state`."""

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


class Aging(NamedTuple):
    """How uses are weighed now; see :class:`~torchrec_scratchpipe.eviction.LeastFrequentlyUsed`."""

    weight: float  # of a use by this batch
    origin: float  # the time at which a use weighs 1, as a note: in [0, NUM_NOTES)


@dataclass(frozen=True)
class DeviceMaps:
    """A slot map's state on the device."""

    row_to_slot: Tensor  # [R] int32
    slot_to_row: Tensor  # [S] int64
    last_use: Tensor  # [S] int32
    uses_ahead: Tensor  # [S + 1] int32
    frequency: Tensor  # [S] float32
    free_slots: Tensor  # [S] int32, of which the first NUM_FREE count
    listed: Tensor  # [S // 16 + C] int32, coming victims
    listed_last_use: Tensor  # the same shape, int32: as it was when they were listed
    histogram: Tensor  # [NUM_BINS] int32, zero between scans
    state: Tensor  # [len(State)] int64


@dataclass(frozen=True)
class ScratchBuffers:
    """What Plan needs until its batch is planned; shared by all batches of a pool."""

    hit_slots: Tensor  # [C] int32
    hit_last_use: Tensor  # [C] int32, before this batch
    miss_known: Tensor  # [C] int32, what row_to_slot said
    victim_last_use: Tensor  # [C] int32


@dataclass(frozen=True)
class PlanBuffers:
    """What is planned for one batch and pool, until the batch has trained."""

    rows: Tensor  # [C] int64, row of each id, -1 if it is another pool's
    slots: Tensor  # [C] int64, slot of each id, of all pools of the kernel group
    miss_rows: Tensor  # [C] int64
    miss_slots: Tensor  # [C] int32; the first V are those of the victims
    victim_rows: Tensor  # [C] int64
    counts: Tensor  # [len(Count)] int64
    host_counts: Tensor  # the same on the host, page-locked where the device is another


@dataclass(frozen=True)
class TableCounts:
    """Statistics of a pool, by table."""

    row_offsets: Tensor  # [T + 1] int64
    num_ids: Tensor  # [T] int64
    num_unique: Tensor  # [T] int64
    num_misses: Tensor  # [T] int64
    num_victims: Tensor  # [T] int64
    num_misses_at_train: Tensor  # [1] int64


class DeviceOps(Protocol):
    """The operations, in the order in which Plan enqueues them."""

    def mark(self, ids: FeatureIds, features: FeatureRows, maps: DeviceMaps, bit: int, is_used: bool) -> None:
        """Note that a batch seen ahead will use these rows, or take that back; ids out of range are left alone.

        `bit` is ``1 << (seen % WINDOW_BITS)``.
        """

    def find(
        self,
        ids: FeatureIds,
        features: FeatureRows,
        maps: DeviceMaps,
        buffers: PlanBuffers,
        scratch: ScratchBuffers,
        batch_index: int,
    ) -> None:
        """Tell unique hits, which are held from now on, from unique misses, which are marked in row_to_slot."""

    def take(
        self,
        maps: DeviceMaps,
        buffers: PlanBuffers,
        scratch: ScratchBuffers,
        batch_index: int,
        first_held: int,
        skips_used_ahead: bool,
    ) -> None:
        """Take listed slots until there is one for every miss, or the list is spent.

        Slots with ``last_use >= first_held`` stay; with `skips_used_ahead`, so do rows that a batch seen ahead will use.
        """

    def scan(self, maps: DeviceMaps, buffers: PlanBuffers, first_held: int, next_bit: int, num_wanted: int) -> None:
        """List those slots that should go first, if slots are missing after :meth:`take`; else nothing.

        About `num_wanted` of them, or as many as are missing. `next_bit`, in ``[0, WINDOW_BITS)``, is that of the oldest batch
        that was seen and not planned.
        """

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
        """Place every miss, if there is a slot for each and no id is bad; else put the maps back as they were.

        `keep_bits` clears the batch's own bit in `uses_ahead`, if it was seen; -1 keeps all.
        """

    def translate(
        self, maps: DeviceMaps, buffers: PlanBuffers, tables: TableCounts, slots: Tensor, num_ids: int
    ) -> None:
        """Write the slot of each of this pool's ids to `slots`, and settle the counts."""

    def report(self, buffers: PlanBuffers) -> None:
        """Copy the counts to the host."""

    def move(
        self, source: Tensor, source_index: Tensor, target: Tensor, target_index: Tensor, counts: Tensor, count: Count
    ) -> None:
        """``target[target_index[i]] = source[source_index[i]]`` for the first ``counts[count]`` rows.

        Both [N, D] or [N], contiguous, of one dtype, with an even number of bytes per row; on the device or in page-locked host
        memory. Indices are [C] int32 or int64.
        """

    def count_misses(self, maps: DeviceMaps, rows: Tensor, slots: Tensor, num_ids: int, num_misses: Tensor) -> None:
        """Add how many ids would not find their row in their slot."""

    def age(self, maps: DeviceMaps, factor: float) -> None:
        """Multiply all frequencies."""

    def unlist(self, maps: DeviceMaps) -> None:
        """Forget the list of coming victims."""


class CommonOps:
    """What needs no kernel: see :class:`DeviceOps`."""

    def report(self, buffers: PlanBuffers) -> None:
        """See :class:`DeviceOps`."""
        buffers.host_counts.copy_(buffers.counts, non_blocking=True)

    def age(self, maps: DeviceMaps, factor: float) -> None:
        """See :class:`DeviceOps`."""
        maps.frequency.mul_(factor)

    def unlist(self, maps: DeviceMaps) -> None:
        """See :class:`DeviceOps`."""
        maps.state[State.LIST_LENGTH : State.LIST_LENGTH + 1].zero_()


def make_maps(
    row_to_slot: Tensor, slot_to_row: Tensor, last_use: Tensor, uses_ahead: Tensor, list_capacity: int
) -> DeviceMaps:
    """Complete a slot map's state for an empty scratchpad.

    Args:
        row_to_slot: [R] int32.
        slot_to_row: [S] int64.
        last_use: [S] int32.
        uses_ahead: [S + 1] int32.
        list_capacity: Coming victims that can be listed.

    Returns:
        All of it, on the same device.
    """
    device, num_slots = row_to_slot.device, slot_to_row.numel()
    state = torch.zeros(len(State), dtype=torch.int64, device=device)
    state[State.NUM_FREE] = num_slots
    return DeviceMaps(
        row_to_slot=row_to_slot,
        slot_to_row=slot_to_row,
        last_use=last_use,
        uses_ahead=uses_ahead,
        frequency=torch.zeros(num_slots, dtype=torch.float32, device=device),
        free_slots=torch.arange(num_slots - 1, -1, -1, dtype=torch.int32, device=device),
        listed=torch.zeros(list_capacity, dtype=torch.int32, device=device),
        listed_last_use=torch.zeros(list_capacity, dtype=torch.int32, device=device),
        histogram=torch.zeros(NUM_BINS, dtype=torch.int32, device=device),
        state=state,
    )
