# SPDX-License-Identifier: BSD-3-Clause
"""Holds rows on the device.

Shapes: ``S`` slots, ``D`` row width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_scratchpipe.types import RowLayout

__all__ = ["Scratchpad", "ScratchpadMemory", "allocate_scratchpads"]


class Scratchpad:
    """Device memory of one pool's slots, one tensor per part of a row.

    Args:
        layout: What a row consists of.
        parts: [S, D] or [S] each, weights first, as `layout` says.
    """

    def __init__(self, layout: RowLayout, parts: Sequence[Tensor]) -> None:
        self.layout = layout
        self.parts = list(parts)
        self.num_slots = self.parts[0].shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots, optimizer states included."""
        return self.num_slots * self.layout.row_bytes


class ScratchpadMemory(NamedTuple):
    """Flat device memory that several scratchpads share, so that one kernel can address all of them."""

    scratchpads: list[Scratchpad]
    flat_parts: list[Tensor]  # one per part of a row
    value_offsets: list[list[int]]  # per part: where each pool begins in its flat tensor, in values


def allocate_scratchpads(
    layouts: Sequence[RowLayout], nums_slots: Sequence[int], device: torch.device
) -> ScratchpadMemory:
    """Lay the scratchpads of several pools behind each other in one tensor per part.

    Args:
        layouts: One per pool; they may differ in width only.
        nums_slots: Slots of each pool.
        device: Where they lie.

    Returns:
        The scratchpads and the memory that they share.
    """
    shapes = [layout.part_shapes(num_slots) for layout, num_slots in zip(layouts, nums_slots, strict=True)]
    parts_per_pool: list[list[Tensor]] = [[] for _ in layouts]
    flat_parts: list[Tensor] = []
    value_offsets: list[list[int]] = []
    for part_index, (_, dtype, _) in enumerate(shapes[0]):
        sizes = [int(torch.Size(pool[part_index][0]).numel()) for pool in shapes]
        flat = torch.zeros(sum(sizes), dtype=dtype, device=device)
        flat_parts.append(flat)
        value_offsets.append([sum(sizes[:i]) for i in range(len(sizes))])
        for pool_index, piece in enumerate(flat.split(sizes)):
            parts_per_pool[pool_index].append(piece.view(shapes[pool_index][part_index][0]))
    scratchpads = [Scratchpad(layout, parts) for layout, parts in zip(layouts, parts_per_pool, strict=True)]
    return ScratchpadMemory(scratchpads, flat_parts, value_offsets)
