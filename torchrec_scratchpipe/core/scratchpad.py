# SPDX-License-Identifier: BSD-3-Clause
"""Holds rows on the device.

Shapes: ``S`` slots, ``D`` row width.
"""

import logging
import mmap
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_scratchpipe.core.rows import RowLayout

__all__ = ["Scratchpad", "ScratchpadMemory", "allocate_scratchpads", "grow_scratchpad"]

logger: logging.Logger = logging.getLogger(__name__)

MAP_NORESERVE = 0x4000  # of Linux; the mmap module has no name for it before Python 3.13


class Scratchpad:
    """Device memory of one pool's slots, one tensor per part of a row. Shapes: `parts` [S, D] or [S]."""

    def __init__(self, layout: RowLayout, parts: Sequence[Tensor]) -> None:
        self.layout = layout
        self.replace(parts)

    def replace(self, parts: Sequence[Tensor]) -> None:
        """Take other memory, with the same rows in the same slots."""
        self.parts = list(parts)
        self.num_slots = self.parts[0].shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots, optimizer states included."""
        return self.num_slots * self.layout.row_bytes


class ScratchpadMemory(NamedTuple):
    """Flat device memory that several scratchpads share, so that one kernel can address all of them."""

    scratchpads: list[Scratchpad]
    capacities: list[int]  # slots that each scratchpad has room for, where it is
    flat_parts: list[Tensor]  # one per part of a row
    value_offsets: list[list[int]]  # per part: where each scratchpad begins in its flat tensor, in values
    buffers: list[mmap.mmap | None]  # per part: what a flat tensor on a CPU lies in

    def piece(self, part_index: int, first: int, num_values: int) -> Tensor:
        """A range of a flat tensor.

        On a CPU it has a storage of its own, because `torch.save` writes whole storages, reserved or not.

        Shapes: returns [num_values].
        """
        flat, buffer = self.flat_parts[part_index], self.buffers[part_index]
        if buffer is None or num_values == 0:
            return flat[first : first + num_values]
        return torch.frombuffer(buffer, dtype=flat.dtype, count=num_values, offset=first * flat.dtype.itemsize)


def allocate_scratchpads(
    layouts: Sequence[RowLayout],
    nums_slots: Sequence[int],
    device: torch.device,
    max_slots: Sequence[int] | None = None,
) -> ScratchpadMemory:
    """Lay several scratchpads behind each other in one tensor per part of a row.

    On a CPU, each has room for `max_slots` where it is: addresses are reserved, and a slot takes memory when it is
    first written. Elsewhere there is no such memory.
    """
    if max_slots is not None and device.type == "cpu":
        try:
            return _allocate(layouts, nums_slots, max_slots, device)
        except OSError:  # a system that lends no addresses beyond its memory
            logger.debug("addresses for %s slots cannot be reserved", max_slots, exc_info=True)
    return _allocate(layouts, nums_slots, nums_slots, device)


def _allocate(
    layouts: Sequence[RowLayout], nums_slots: Sequence[int], capacities: Sequence[int], device: torch.device
) -> ScratchpadMemory:
    shapes = [layout.part_shapes(capacity) for layout, capacity in zip(layouts, capacities, strict=True)]
    memory = ScratchpadMemory([], list(capacities), [], [], [])
    for part_index, (_, dtype, _) in enumerate(shapes[0]):
        sizes = [int(torch.Size(shape[part_index][0]).numel()) for shape in shapes]
        flat, buffer = _zeros(sum(sizes), dtype, device)
        memory.flat_parts.append(flat)
        memory.buffers.append(buffer)
        memory.value_offsets.append([sum(sizes[:i]) for i in range(len(sizes))])
    for index, (layout, num_slots) in enumerate(zip(layouts, nums_slots, strict=True)):
        memory.scratchpads.append(Scratchpad(layout, _parts_of(memory, layout, index, num_slots)))
    return memory


def _parts_of(memory: ScratchpadMemory, layout: RowLayout, index: int, num_slots: int) -> list[Tensor]:
    return [
        memory.piece(part_index, offsets[index], int(torch.Size(shape).numel())).view(shape)
        for part_index, ((shape, _, _), offsets) in enumerate(
            zip(layout.part_shapes(num_slots), memory.value_offsets, strict=True)
        )
    ]


def grow_scratchpad(memory: ScratchpadMemory, index: int, num_slots: int) -> ScratchpadMemory:
    """Give a scratchpad more slots; all rows stay in theirs. Whoever holds tensors of the old memory must let go."""
    if num_slots > memory.capacities[index]:
        memory = _moved(memory, index, num_slots)
    scratchpad = memory.scratchpads[index]
    scratchpad.replace(_parts_of(memory, scratchpad.layout, index, num_slots))
    return memory


def _moved(memory: ScratchpadMemory, index: int, num_slots: int) -> ScratchpadMemory:
    nums_slots = [scratchpad.num_slots for scratchpad in memory.scratchpads]
    nums_slots[index] = num_slots
    layouts = [scratchpad.layout for scratchpad in memory.scratchpads]
    larger = allocate_scratchpads(layouts, nums_slots, memory.flat_parts[0].device)
    for scratchpad, copy in zip(memory.scratchpads, larger.scratchpads, strict=True):
        for source, target in zip(scratchpad.parts, copy.parts, strict=True):
            target[: scratchpad.num_slots].copy_(source)
        scratchpad.replace(copy.parts)
    return larger._replace(scratchpads=memory.scratchpads)


def _zeros(num_values: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, mmap.mmap | None]:
    if device.type != "cpu" or num_values == 0:
        return torch.zeros(num_values, dtype=dtype, device=device), None
    # Reserved, not taken: the system neither counts nor fills pages before they are written.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    buffer = mmap.mmap(-1, num_values * dtype.itemsize, flags=flags)
    return torch.frombuffer(buffer, dtype=dtype, count=num_values), buffer
