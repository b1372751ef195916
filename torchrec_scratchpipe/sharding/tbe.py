# SPDX-License-Identifier: BSD-3-Clause
"""FBGEMM's TBE over scratchpads: its arithmetic is over slots, what it shows to others are tables.

Shapes: ``S`` slots, ``R`` rows, ``D`` row width, ``T`` tables.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NoReturn

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType as OptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn

from torchrec_scratchpipe.core.scratchpad import ScratchpadMemory
from torchrec_scratchpipe.errors import ConfigError
from torchrec_scratchpipe.sharding.table_view import TableView

__all__ = ["ScratchpadTbe"]


class ScratchpadTbe(SplitTableBatchedEmbeddingBagsCodegen):
    """A TBE of T tables whose weights and optimizer states are slots of scratchpads.

    Made of T one-row tables, because FBGEMM allocates what it is told, and T tables of S slots would be T times too
    much. Their offsets are then pointed at scratchpads. Whoever finds this module in a model, and asks it for its
    tables, gets the tables.
    """

    def __init__(
        self, show_tables: Callable[[], list[list[Tensor]]], buffers: Sequence[str], embedding_specs: Any, **kwargs: Any
    ) -> None:
        super().__init__(embedding_specs, **kwargs)
        self.embedding_specs: list[tuple[Any, ...]]
        self.optimizer_args: Any
        self._show_tables = show_tables
        self._buffers_of_parts = tuple(buffers)
        self._suffix = "host" if self.use_cpu else "dev"

    def point_at(self, memory: ScratchpadMemory, blocks: Sequence[int]) -> None:
        """Look up, and train, the rows of these scratchpads from the next forward on. Shapes: `blocks` [T]."""
        for buffer, flat, offsets_of_blocks in zip(
            self._buffers_of_parts, memory.flat_parts, memory.value_offsets, strict=True
        ):
            name = f"{buffer}_{self._suffix}"
            if getattr(self, name).data_ptr() == flat.data_ptr():  # a scratchpad has grown where it is
                continue
            offsets = [offsets_of_blocks[block] for block in blocks]
            # .data gives the TBE a version counter of its own: Insert of coming batches writes slots between this
            # batch's forward and backward, which autograd would take for an error (the hold makes it none).
            is_parameter = isinstance(getattr(self, name), nn.Parameter)
            setattr(self, name, nn.Parameter(flat.data) if is_parameter else flat.data)
            setattr(self, f"{buffer}_physical_offsets", offsets)
            self._set_per_feature(f"{buffer}_offsets", offsets)
        # What FBGEMM derives from the number of rows: its backward sorts ids by table and row, in so many bits.
        nums_slots = [memory.scratchpads[block].num_slots for block in blocks]
        self.embedding_specs = [
            (num_slots, *spec[1:]) for num_slots, spec in zip(nums_slots, self.embedding_specs, strict=True)
        ]
        cumulative = [0, *accumulate(nums_slots)]
        self.total_hash_size = cumulative[-1]
        self.total_hash_size_bits = int(math.log2(float(max(1, cumulative[-1]))) + 1)
        self._set_per_feature("hash_size_cumsum", cumulative, cumulative[-1])
        self._set_per_feature("rows_per_table", nums_slots)
        self.optimizer_args = self.optimizer_args._replace(total_hash_size=cumulative[-1])

    def split_embedding_weights(self) -> list[Tensor]:
        """As stock, of the tables."""
        return [parts[0] for parts in self._show_tables()]

    def split_optimizer_states(self) -> list[tuple[Tensor, ...]]:
        """As stock, of the tables; empty if the optimizer has no states."""
        return [tuple(parts[1:]) for parts in self._show_tables()] if len(self._buffers_of_parts) > 1 else []

    def get_optimizer_buffer(self, state: str) -> NoReturn:
        """Refused: the states of all tables do not lie in one piece. Raises ConfigError."""
        raise ConfigError(
            f"get_optimizer_buffer({state!r}): optimizer states of scratchpad tables lie with their tables, not in one "
            "buffer. Use split_optimizer_states() or get_optimizer_state()."
        )

    def reset_embedding_weight_momentum(
        self,
        pruned_indices: Tensor,
        pruned_indices_offsets: Tensor,
        logical_table_ids: Tensor,
        buffer_ids: Tensor,
    ) -> None:
        """As FBGEMM, over rows of the tables: set rows to zero, weights and row-wise Adagrad's sums.

        As in FBGEMM, nothing happens with another optimizer; TorchRec's managed collision then writes weights itself.
        What training has planned ahead sees the new rows.

        FBGEMM counts `logical_table_ids` by features, and TorchRec (1.6.1 to 1.9.2) gives it the numbers of tables.
        With several features per table, stock then resets rows of another table. Here they are numbers of tables.

        Shapes: `pruned_indices` [N], of all tables; `pruned_indices_offsets` [buffers + 1], where those of each buffer
        begin; `logical_table_ids` and `buffer_ids` [K], which table has which buffer. All int32 or int64.

        Args:
            pruned_indices: Rows, counted within their table.
            pruned_indices_offsets: Bounds of buffers in it.
            logical_table_ids: Tables, by their number in this lookup.
            buffer_ids: The buffer of each of these tables.

        Raises:
            NotImplementedError: This lookup has no optimizer.
            TableStorageError: Rows cannot be read or written.

        Source:
            fbgemm_gpu SplitTableBatchedEmbeddingBagsCodegen (1.8.0).
        """
        if self.optimizer is OptimType.NONE:
            raise NotImplementedError(f"Resetting embedding weight momentum is not supported for {self.optimizer}")
        bounds = pruned_indices_offsets.tolist()
        tables = self._show_tables()
        for table, buffer in zip(logical_table_ids.tolist(), buffer_ids.tolist(), strict=True):
            rows = pruned_indices[bounds[buffer] : bounds[buffer + 1]].long()
            if isinstance(tables[table][0], TableView):
                tables[table][0]._owner.note_reset(rows.numel())
            for part in tables[table] if self.optimizer is OptimType.EXACT_ROWWISE_ADAGRAD and rows.numel() else ():
                part[rows] = 0.0

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: these are slots. TorchRec's collections never ask for it. Raises ConfigError."""
        raise self._slots_error("state_dict()")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as :meth:`state_dict`. Raises ConfigError."""
        raise self._slots_error("load_state_dict()")

    def _slots_error(self, what: str) -> ConfigError:
        return ConfigError(
            f"{what} of the lookup of tables {', '.join(self.table_names)}: its own buffers are slots of a scratchpad, "
            "not rows. Use that of the model or of the collection, or split_embedding_weights() and "
            "split_optimizer_states()."
        )

    def _set_per_feature(self, name: str, values_of_tables: Sequence[int], *last: int) -> None:
        # A new tensor, because a forward that has not seen its backward keeps the one it has used.
        before: Tensor = getattr(self, name)
        values = [*(values_of_tables[table] for table in self.feature_table_map), *last]
        setattr(self, name, torch.tensor(values, dtype=before.dtype, device=before.device))
