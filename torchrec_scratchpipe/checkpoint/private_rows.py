# SPDX-License-Identifier: BSD-3-Clause
"""Of a private model: up to which step each row has its noise, as a part of a training state.

Shapes: ``R`` rows of a table.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard

from torchrec_scratchpipe.checkpoint.pieces import Piece
from torchrec_scratchpipe.core.pool import Pool
from torchrec_scratchpipe.errors import ConfigError
from torchrec_scratchpipe.sharding.model import scratchpad_collections
from torchrec_scratchpipe.sharding.private import PrivateSteps
from torchrec_scratchpipe.sharding.table_view import shown

__all__ = ["PRIVACY", "pending_pieces", "pending_state", "private_steps"]

PRIVACY = "privacy"  # in a state, beside "model" and "optimizer"


class _Local(NamedTuple):
    """The rows of one shard of a table."""

    updated_to: Tensor  # [rows of the shard] int32
    first_row: int
    first_column: int


def private_steps(model: nn.Module) -> PrivateSteps | None:
    """What takes the private steps of a model, if it is trained so."""
    return next((one.private_steps for one in scratchpad_collections(model) if one.private_steps is not None), None)


def pending_state(model_state: dict[str, Any], pools: Sequence[Pool]) -> dict[str, ShardedTensor]:
    """For each table of a model's state_dict, [R] int32: up to which step a row has its noise. Shares memory.

    Raises ConfigError.
    """
    state = {}
    for name, value in _tables(model_state):
        metadata = value.metadata()
        first_columns = [shard for shard in metadata.shards_metadata if shard.shard_offsets[1] == 0]
        shards = [_rows_of(shard) for shard in first_columns if shard.shard_sizes[0]]
        whole = ShardedTensorMetadata(
            shards, torch.Size([metadata.size[0]]), TensorProperties(dtype=torch.int32, requires_grad=False)
        )
        # Shards of other columns have the same numbers.
        local = {one.first_row: one.updated_to for one in _local_rows(value, pools) if one.first_column == 0}
        state[name] = ShardedTensor._init_from_local_shards_and_global_metadata(
            [Shard(local[shard.shard_offsets[0]], shard) for shard in shards if shard.shard_offsets[0] in local],
            whole,
            process_group=value._process_group,
        )
    return state


def pending_pieces(model_state: dict[str, Any], pools: Sequence[Pool]) -> dict[str, list[Piece]]:
    """The same as pieces that are to be loaded, with those of shards of other columns."""
    return {
        name: [
            Piece(one.updated_to, (one.first_row,), (value.metadata().size[0],)) for one in _local_rows(value, pools)
        ]
        for name, value in _tables(model_state)
    }


def _tables(model_state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in model_state.items():
        if isinstance(value, ShardedTensor):
            yield name, value
        elif name.rpartition(".")[2] == "weight" and not isinstance(value, Tensor):
            raise ConfigError(
                f"{name} is a {type(value).__name__}, and a private model is saved with ShardedTensors. Build the "
                "model without DTensor output."
            )


def _local_rows(value: ShardedTensor, pools: Sequence[Pool]) -> Iterator[_Local]:
    for shard in value.local_shards():
        for pool in pools:
            place = pool.host_table.locate(shown(shard.tensor))
            if place is not None and pool.late is not None:
                first, offsets = place[1], shard.metadata.shard_offsets
                rows = pool.late.updated_to[first : first + shard.tensor.shape[0]]
                yield _Local(rows, offsets[0], offsets[1])


def _rows_of(shard: ShardMetadata) -> ShardMetadata:
    return ShardMetadata([shard.shard_offsets[0]], [shard.shard_sizes[0]], shard.placement)
