# SPDX-License-Identifier: BSD-3-Clause
"""What a tensor of a state consists of on this rank, whatever way it is sharded."""

from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

__all__ = ["Piece", "pieces_of"]


class Piece(NamedTuple):
    """A box of a tensor."""

    tensor: Tensor
    offsets: tuple[int, ...]  # where it begins
    size: tuple[int, ...]  # of the whole tensor


def pieces_of(value: Any) -> list[Piece] | None:
    """The pieces of a tensor that are on this rank; None if it is no tensor, or one that is sharded in another way."""
    if isinstance(value, ShardedTensor):
        size = tuple(value.size())
        return [Piece(shard.tensor, tuple(shard.metadata.shard_offsets), size) for shard in value.local_shards()]
    if isinstance(value, Tensor) and not isinstance(value, DTensor):
        return [Piece(value.detach(), (0,) * value.dim(), tuple(value.shape))]
    return None
