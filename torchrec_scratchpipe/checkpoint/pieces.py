# SPDX-License-Identifier: BSD-3-Clause
"""What a tensor of a state consists of on this rank, whatever way it is sharded."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torchrec.distributed.shards_wrapper import LocalShardsWrapper

__all__ = ["Piece", "common_box", "copy_box", "pieces_of"]


class Piece(NamedTuple):
    """A box of a tensor."""

    tensor: Tensor
    offsets: tuple[int, ...]  # where it begins
    size: tuple[int, ...]  # of the whole tensor


def pieces_of(value: Any) -> list[Piece] | None:
    """The pieces of a tensor that are on this rank; None if it is no tensor."""
    if isinstance(value, ShardedTensor):
        size = tuple(value.metadata().size)  # size() warns that the class is old
        return [Piece(shard.tensor, tuple(shard.metadata.shard_offsets), size) for shard in value.local_shards()]
    if isinstance(value, DTensor):
        size, local = tuple(value.shape), value.to_local()
        if isinstance(local, LocalShardsWrapper):  # TorchRec's; without shards, it has one offset all the same
            shards = zip(local.local_shards(), local.local_offsets(), strict=False)
            return [Piece(tensor, tuple(offsets), size) for tensor, offsets in shards]
        _, offsets = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
        return [Piece(local.detach(), tuple(offsets), size)]
    if isinstance(value, Tensor):
        return [Piece(value.detach(), (0,) * value.dim(), tuple(value.shape))]
    return None


def copy_box(source: Piece, target: Piece) -> None:
    """Copy what two pieces of a tensor have in common."""
    box = common_box(source.offsets, source.tensor.shape, target.offsets, target.tensor.shape)
    if box is not None:
        here = tuple(slice(first - at, last - at) for (first, last), at in zip(box, source.offsets, strict=True))
        there = tuple(slice(first - at, last - at) for (first, last), at in zip(box, target.offsets, strict=True))
        target.tensor[there].copy_(source.tensor[here])


def common_box(
    offsets: Sequence[int], sizes: Sequence[int], other_offsets: Sequence[int], other_sizes: Sequence[int]
) -> list[tuple[int, int]] | None:
    """What two boxes have in common: by dimension, where it begins and ends; None if nothing."""
    box = [
        (max(first, other_first), min(first + size, other_first + other_size))
        for first, size, other_first, other_size in zip(offsets, sizes, other_offsets, other_sizes, strict=True)
    ]
    return box if all(first < last for first, last in box) else None
