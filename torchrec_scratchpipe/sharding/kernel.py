# SPDX-License-Identifier: BSD-3-Clause
"""The lookup of one kernel group: FBGEMM's TBE over scratchpad slots, tables on the host.

Shapes: ``I`` ids, ``S`` slots, ``R`` rows, ``D`` row width, ``T`` tables.

FBGEMM builds a TBE of T tables as usual; then all its weight and optimizer offsets are pointed at
the pool's one scratchpad. Ids become slots before the lookup, and nothing else of the arithmetic changes.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import (
    BatchedFusedEmbedding,
    BatchedFusedEmbeddingBag,
    EmbeddingFusedOptimizer,
)
from torchrec.distributed.composable.table_batched_embedding_slice import TableBatchedEmbeddingSlice
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig, ShardingType
from torchrec.distributed.types import ShardingEnv
from torchrec.distributed.utils import append_prefix
from torchrec.modules.embedding_configs import data_type_to_dtype, data_type_to_sparse_type
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizer, FusedOptimizerModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe.core.batch import Batch, FeatureSource, feature_rows
from torchrec_scratchpipe.core.host_table import HostTable, LentMemory
from torchrec_scratchpipe.core.memory import SLOT_BYTES_OF_MAPS
from torchrec_scratchpipe.core.pool import Pool
from torchrec_scratchpipe.core.rows import RowLayout, TableSpec
from torchrec_scratchpipe.core.runner import StageRunner
from torchrec_scratchpipe.core.scratchpad import Scratchpad, ScratchpadMemory, allocate_scratchpads, grow_scratchpad
from torchrec_scratchpipe.core.slot_map import SlotMap
from torchrec_scratchpipe.core.slot_ops import FeatureIds, SlotOps
from torchrec_scratchpipe.errors import BackwardTwiceError
from torchrec_scratchpipe.sharding.compat import BoundsCheckMode, ComputeDevice, EmbeddingLocation, PoolingMode
from torchrec_scratchpipe.sharding.options import (
    CACHE_SETTINGS,
    ScratchpadBudget,
    ScratchpadOptions,
    num_slots_of,
    optimizer_states,
    row_layout,
    tables_by_width,
    warn_of_ignored_settings,
)
from torchrec_scratchpipe.sharding.table_view import NUM_DRAWN_TOGETHER, TableParameter, TableView
from torchrec_scratchpipe.sharding.tbe import ScratchpadTbe

__all__ = ["ScratchPipeEmbedding", "ScratchPipeEmbeddingBag", "ScratchpadKernel"]

logger: logging.Logger = logging.getLogger(__name__)


class ScratchpadKernel(FusedOptimizerModule):
    """What pooled and unpooled lookups of a group with scratchpad tables share; mixed into TorchRec's fused kernels.

    The tables of a kernel group share data type, pooling and optimizer, and are grouped as TorchRec groups them if all
    are `fused`. Scratchpad tables of equal row width form one pool. A table of the group that is kept whole has a block
    of device memory with a place for every row. Parameters and optimizer states are shown under stock names; those of
    scratchpad tables are :class:`TableView`.
    """

    # From TorchRec's kernels.
    _config: GroupedEmbeddingConfig
    _pg: dist.ProcessGroup | None
    _local_rows: list[int]
    _local_cols: list[int]
    _feature_table_map: list[int]
    table_name_to_count: dict[str, int]

    def _set_up(
        self,
        device: torch.device | None,
        pooling: PoolingMode,
        options: ScratchpadOptions,
        runner: StageRunner,
    ) -> None:
        """Allocate tables, scratchpads and TBE; what a constructor does after TorchRec's base class for kernels."""
        self._scratchpad_device = device or torch.device("cpu")
        self._runner = runner
        self._expected: list[Batch] = []  # at most one; to set an attribute of a module takes 10 us
        fused_params = dict(self._config.fused_params or {})
        warn_of_ignored_settings(self._config, fused_params, self._scratchpad_device.type)
        self._states = optimizer_states(self._config, fused_params, self._scratchpad_device.type)
        self._place_tables(options)
        self.pools, self._memory = self._make_pools(options)
        self._owners = [_PoolOwner(pool, runner) for pool in self.pools]
        # With a gradient, as stock's weights have: what is cut out of it cannot be frozen.
        self._flat_weights = [nn.Parameter(pool.host_table.parts[0].data.view(-1)) for pool in self.pools]
        self._emb_module = self._make_tbe(pooling, fused_params)
        self._point_tbe_at_memory()
        mode = fused_params.get("bounds_check_mode", BoundsCheckMode.WARNING)
        self._bounds_check = self._make_bounds_check(options, mode)
        self._in_train: WeakSet[Batch] = WeakSet()  # of forwards whose backward may still come
        self._features = [
            FeatureSource(feature_name, *self._pool_of_table.get(table_index, (None, 0)))
            for table_index, table in enumerate(self._config.embedding_tables)
            for feature_name in table.feature_names
        ]
        self._rows_of_features = feature_rows(self.pools, self._features, self._scratchpad_device)
        self._optim: FusedOptimizer = self._make_optimizer()
        if self._scratchpad_device.type == "cpu":
            self._draw_as_stock()
        # The stages' streams are not ordered after the caller's, which all of this was made on
        runner.wait_for_device()

    def _draw_as_stock(self) -> None:
        """Draw what stock's kernel draws for its weights, and drop it: what is drawn later is as stock's then.

        The collection's reset_parameters() writes the weights. To write a large file twice takes minutes. A CPU draws
        one value after another: in pieces, the same.
        """
        for weights in self.split_embedding_weights():
            drawn = torch.empty(min(NUM_DRAWN_TOGETHER, weights.numel()), dtype=weights.dtype)
            for first in range(0, weights.numel(), NUM_DRAWN_TOGETHER):
                drawn[: weights.numel() - first].uniform_()

    def make_batch(self, features: KeyedJaggedTensor) -> Batch:
        """What this group's pools know of one batch."""
        bounds = _feature_bounds(features)  # the sizes of the features stay on the device
        ids = FeatureIds(self._within_tables(features.values(), bounds), bounds)
        return Batch(self.pools, self._features, ids, self._rows_of_features, self._runner.release)

    def _within_tables(self, ids: Tensor, bounds: Tensor) -> Tensor:
        """Do to ids that are out of range what FBGEMM does to them, if the user wants that.

        Its own check sees slots only.
        """
        if self._bounds_check is None or ids.numel() == 0:
            return ids
        ids = ids.clone()
        mode, rows_of_features, num_warnings = self._bounds_check
        offsets = bounds.to(ids.dtype)
        torch.ops.fbgemm.bounds_check_indices(rows_of_features, ids, offsets, mode, num_warnings, None)
        return ids

    def _make_bounds_check(
        self, options: ScratchpadOptions, mode: BoundsCheckMode
    ) -> tuple[int, Tensor, Tensor] | None:
        if options.out_of_range_ids == "error" or mode is BoundsCheckMode.NONE:
            return None
        rows = [self._local_rows[table] for table in self._feature_table_map]
        device = self._scratchpad_device
        return (
            mode.value,
            torch.tensor(rows, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )

    # TorchRec calls forward() with features alone. So the batch of the next forward is left here for it.

    def expect(self, batch: Batch | None) -> None:
        """Say which batch the next forward looks up; None plans it on the spot."""
        self._expected[:] = [] if batch is None else [batch]

    def drop_expected(self) -> None:
        """Drop a batch that was expected and not looked up, because another lookup has failed."""
        if self._expected:
            self._runner.release(self._expected.pop())

    def _look_up(self, features: KeyedJaggedTensor, look_up_slots: Callable[[KeyedJaggedTensor], Tensor]) -> Tensor:
        """Look up the expected batch, or fetch these features on the spot, over slots instead of ids."""
        if self._expected:
            batch = self._expected.pop()
        else:
            batch = self.make_batch(features)
            self._runner.submit(batch)
        assert batch.num_ids == features.values().numel(), f"{batch.num_ids=}, {features.values().numel()=}"
        # From here on the rows are in their slots, and Train may run. FBGEMM sees slots where the model sees ids.
        slots = self._runner.wait(batch)
        features_over_slots = copy.copy(features)
        features_over_slots._values = slots
        self._in_train.add(batch)
        output = look_up_slots(features_over_slots)
        _release_after_backward(output, batch, self._runner)
        return output

    @property
    def pool_tables(self) -> list[list[int]]:
        """For each pool, the positions of its tables in the group."""
        return self._pool_tables

    @property
    def emb_module(self) -> ScratchpadTbe:
        """FBGEMM's TBE over the scratchpads; it shows tables, and computes over slots."""
        return self._emb_module

    @property
    def fused_optimizer(self) -> FusedOptimizer:
        """TorchRec's optimizer surface over the tables."""
        return self._optim

    def flush(self) -> None:
        """Bring every table up to date with its scratchpad (hazard 5); waits for the worker and the device.

        TorchRec calls this when somebody takes a state_dict. What is done to that by PyTorch's operations is noticed;
        for the sake of what goes round them, resident rows are read anew before the next batch.
        """
        if self._runner.is_only_located:
            return
        self._runner.wait_until_idle()
        with self._runner.between_batches():
            for pool in self.pools:
                if not self._runner.is_only_read:  # a checkpoint says which rows have not caught up
                    pool.catch_up_all()
                pool.flush()
                if not self._runner.is_only_read:
                    pool.host_table.mark_overwritten()

    def purge(self) -> None:
        """Flush, and make sure that no old row is used once tables are overwritten (hazard 6).

        No stage runs until the caller submits or trains a batch, so that none reads or writes tables meanwhile.
        """
        self._runner.pause()
        with self._runner.between_batches():
            for pool in self.pools:
                pool.catch_up_all()
                pool.purge()

    def split_embedding_weights(self) -> list[Tensor]:
        """[local_rows, local_cols] of each table: a view of the host's memory, or of the device's if kept whole."""
        return [parts[0] for parts in self._show_tables()]

    def split_optimizer_states(self) -> list[dict[str, Tensor]]:
        """Each table's optimizer states, under FBGEMM's names; views, as :meth:`split_embedding_weights`."""
        if not self._states:
            return []
        names = [state.name for state in self._states]
        return [dict(zip(names, parts[1:], strict=True)) for parts in self._show_tables()]

    def named_split_embedding_weights(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """As TorchRec's, over the tables."""
        for table, weights in zip(self._config.embedding_tables, self.split_embedding_weights(), strict=True):
            yield append_prefix(prefix, f"{table.name}.weight"), weights

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As TorchRec's, over the tables; dense optimizers are told to leave them alone."""
        for name, weights in self.named_split_embedding_weights(prefix, recurse, remove_duplicate):
            parameter = nn.Parameter(weights)
            parameter._in_backward_optimizers = [EmptyFusedOptimizer()]  # type: ignore[attr-defined]
            yield name, parameter

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """None, as TorchRec's fused kernels show none."""
        yield from ()

    def named_parameters_by_table(self) -> Iterator[tuple[str, TableBatchedEmbeddingSlice]]:
        """As TorchRec's: one slice per table name, its local column shards joined."""
        tables = self._config.embedding_tables
        for name, count in self.table_name_to_count.items():
            first = next(index for index, table in enumerate(tables) if table.name == name)
            weight = self._slice_of_tables(first, count)
            weight._in_backward_optimizers = [  # type: ignore[attr-defined]
                self._make_optimizer(create_for_table=name, param_weight_for_table=weight)
            ]
            yield name, weight

    def _slice_of_tables(self, first: int, count: int) -> TableBatchedEmbeddingSlice:
        """The weights of `count` tables that lie behind each other, in one piece."""
        dim = self._local_cols[first]
        # A table behind a scratchpad is shown where all its rows are, on the host.
        if first in self._pool_of_table:
            pool_index, position = self._pool_of_table[first]
            host_table = self.pools[pool_index].host_table
            first_row, last_row = (host_table.row_offsets[index] for index in (position, position + count))
            flat, table = self._flat_weights[pool_index], host_table.parts[0]
            return TableParameter.of(flat, table, first_row, last_row, self._owners[pool_index])
        # A table that is kept whole lies in the same device memory as the scratchpads, so that one TBE has all tables.
        start = self._memory.value_offsets[0][self._block_of_table[first]]
        num_values = sum(self._local_rows[first : first + count]) * dim
        weights = nn.Parameter(self._memory.piece(0, start, num_values))
        return TableBatchedEmbeddingSlice(weights, 0, num_values, -1, dim)

    def _make_optimizer(self, **kwargs: Any) -> EmbeddingFusedOptimizer:
        """TorchRec's optimizer surface: settings of the TBE, weights and states of the tables."""
        return EmbeddingFusedOptimizer(
            self._config,
            self._emb_module,
            self._pg,
            embedding_weights_by_table=self.split_embedding_weights(),
            all_optimizer_states=self.split_optimizer_states(),
            **kwargs,
        )

    def _show_tables(self) -> list[list[Tensor]]:
        """Each table's weights, then its optimizer states."""
        return [self._show_table(index) for index in range(len(self._local_rows))]

    def _show_table(self, table_index: int) -> list[Tensor]:
        if table_index not in self._pool_of_table:
            block = self._memory.scratchpads[self._block_of_table[table_index]]
            return [part.detach() for part in block.parts]
        pool_index, position = self._pool_of_table[table_index]
        parts = self.pools[pool_index].host_table.table_parts(position)
        return [TableView(part, self._owners[pool_index]) for part in parts]

    def _place_tables(self, options: ScratchpadOptions) -> None:
        """Say which pool has which table, and which block of device memory.

        Those of the pools first, then whole tables.
        """
        tables = self._config.embedding_tables
        whole = [index for index, table in enumerate(tables) if table.name not in options.load_factors]
        self._pool_tables = tables_by_width(self._config, set(whole))
        self._pool_of_table = {
            index: (pool_index, position)
            for pool_index, indices in enumerate(self._pool_tables)
            for position, index in enumerate(indices)
        }
        self._block_of_table = {index: pool_index for index, (pool_index, _) in self._pool_of_table.items()}
        self._block_of_table |= {index: len(self._pool_tables) + position for position, index in enumerate(whole)}

    def _make_pools(self, options: ScratchpadOptions) -> tuple[list[Pool], ScratchpadMemory]:
        ops = options.make_slot_ops(self._scratchpad_device)
        storage = options.make_storage(ops)
        host_tables = []
        nums_slots: list[int] = []
        for indices in self._pool_tables:
            specs = [
                TableSpec(table.name, table.local_rows, options.load_factors[table.name])
                for table in (self._config.embedding_tables[index] for index in indices)
            ]
            host_tables.append(HostTable(specs, self._row_layout(indices[0]), storage))
            # A row-wise table shorter than the number of ranks leaves some of them without rows.
            nums_slots.append(max(1, sum(num_slots_of(spec.load_factor, spec.num_rows) for spec in specs)))
        whole = [index for index in self._block_of_table if index not in self._pool_of_table]
        layouts = [host_table.layout for host_table in host_tables] + [self._row_layout(index) for index in whole]
        nums_slots += [self._local_rows[index] for index in whole]
        max_slots = [max(1, host_table.num_rows) for host_table in host_tables] if options.on_full == "grow" else []
        max_slots += nums_slots[len(max_slots) :]
        memory = allocate_scratchpads(layouts, nums_slots, self._scratchpad_device, max_slots)
        pools = [
            self._make_pool(index, host_table, memory.scratchpads[index], options, ops)
            for index, host_table in enumerate(host_tables)
        ]
        for tensor in memory.flat_parts:
            self._runner.streams.record_use(tensor)
        return pools, memory

    def _row_layout(self, table_index: int) -> RowLayout:
        return row_layout(self._local_cols[table_index], data_type_to_dtype(self._config.data_type), self._states)

    def _make_pool(
        self,
        index: int,
        host_table: HostTable,
        scratchpad: Scratchpad,
        options: ScratchpadOptions,
        ops: SlotOps,
    ) -> Pool:
        slot_map = SlotMap(
            host_table.num_rows,
            scratchpad.num_slots,
            host_table.row_offsets,
            ops,
            self._scratchpad_device,
            self._runner.streams,
            options.half_life,
        )
        options.budget.charge(scratchpad)
        enlarge = partial(self._enlarge, index, options.budget) if options.on_full == "grow" else None
        pool = Pool(host_table, scratchpad, slot_map, enlarge)
        logger.info(
            "%s: %s slots for %s rows, %.1f MB of %.1f MB",
            pool.name,
            f"{pool.scratchpad.num_slots:,}",
            f"{pool.host_table.num_rows:,}",
            pool.scratchpad.num_bytes / 1e6,
            pool.host_table.num_bytes / 1e6,
        )
        return pool

    def _enlarge(self, pool_index: int, budget: ScratchpadBudget, num_slots: int) -> str:
        """Give a pool's scratchpad so many slots; says why not, or nothing.

        Between the stages of two batches; Train waits for one of them.
        """
        scratchpad = self._memory.scratchpads[pool_index]
        is_moved = num_slots > self._memory.capacities[pool_index]
        # Memory that moves leaves behind whoever holds tensors of the old one: the views of whole tables, and forwards
        # whose backward is still to come.
        if is_moved and len(self._memory.scratchpads) > len(self.pools):
            return "cannot grow beside tables that are kept whole on this device"
        if is_moved and any(not batch.is_released for batch in self._in_train):
            return "cannot grow before the backward of an earlier forward"
        num_new_bytes = math.ceil(
            (num_slots - scratchpad.num_slots) * (scratchpad.layout.row_bytes + SLOT_BYTES_OF_MAPS)
        )
        refused = budget.refusal(num_new_bytes)
        if refused:
            return refused
        # No kernel may be at the old memory while its rows are copied, nor look up the new one before.
        try:
            if is_moved:
                self._runner.wait_for_device()
            self._memory = grow_scratchpad(self._memory, pool_index, num_slots)
            if is_moved:
                self._runner.wait_for_device()
        except (RuntimeError, MemoryError) as error:
            return f"cannot grow ({str(error).splitlines()[0]})"
        for tensor in self._memory.flat_parts:
            self._runner.streams.record_use(tensor)
        self._point_tbe_at_memory()
        if budget.bytes_beyond_plan:
            logger.warning(
                "scratchpads have grown by %s bytes beyond the budget of the sharding plan. Give the planner a larger "
                "one, or measure batches as large as this one; max_scratchpad_bytes of the sharder sets a limit.",
                f"{budget.bytes_beyond_plan:,}",
            )
        return ""

    def _point_tbe_at_memory(self) -> None:
        self._emb_module.point_at(self._memory, [self._block_of_table[index] for index in range(len(self._local_cols))])

    def _make_tbe(self, pooling: PoolingMode, fused_params: dict[str, Any]) -> ScratchpadTbe:
        is_cuda = self._scratchpad_device.type == "cuda"
        location = EmbeddingLocation.DEVICE if is_cuda else EmbeddingLocation.HOST
        compute_device = ComputeDevice.CUDA if is_cuda else ComputeDevice.CPU
        return ScratchpadTbe(
            self._show_tables,
            ["weights", *(state.buffer for state in self._states)],
            [(1, dim, location, compute_device) for dim in self._local_cols],
            feature_table_map=self._feature_table_map,
            pooling_mode=pooling,
            weights_precision=data_type_to_sparse_type(self._config.data_type),
            device=self._scratchpad_device,
            table_names=[table.name for table in self._config.embedding_tables],
            **{key: value for key, value in fused_params.items() if key not in CACHE_SETTINGS},
        )


class _PoolOwner:
    """Answers those who read and write a pool's tables from outside; see :class:`TableOwner`."""

    def __init__(self, pool: Pool, runner: StageRunner) -> None:
        self._pool = pool
        self._runner = runner
        self._has_warned = False
        self.drawing_device = None if runner.device.type == "cpu" else runner.device

    def prepare_read(self, shown: Tensor) -> None:
        # Hazards 5 and 10.
        self._pool.check_usable()
        if not self._pool.is_flushed or self._pool.is_any_late:
            self._runner.wait_until_idle()
            with self._runner.between_batches():
                self._pool.catch_up_all()
                self._pool.flush()
        self._pool.host_table.ask_for(shown)

    def prepare_write(self, shown: Tensor) -> None:
        # Hazard 6.
        self._pool.host_table.check_process()
        self._runner.pause()
        with self._runner.between_batches():
            self._pool.catch_up_all()
            self._pool.purge()
        self._pool.host_table.ask_for(shown)

    def read_rows(self, shown: Tensor, rows: Tensor) -> Tensor | None:
        place = self._pool.host_table.locate_rows(shown)
        if place is None:
            return None
        part_index, first_row = place
        with self._between_batches():
            return self._pool.read_some(rows + first_row)[part_index]

    def write_rows(self, shown: Tensor, rows: Tensor, values: Tensor) -> None:
        # Hazard 8.
        place = self._pool.host_table.locate_rows(shown)
        assert place is not None, "what is written was read before"
        part_index, first_row = place
        with self._between_batches():
            parts = self._pool.read_some(rows + first_row)
            parts[part_index] = values
            self._pool.write_some(rows + first_row, parts)

    def note_reset(self, num_rows: int) -> None:
        self._pool.counters.num_rows_reset += num_rows

    @contextmanager
    def _between_batches(self) -> Iterator[None]:
        """While entered, no stage runs, and rows in slots are as their tables, or newer."""
        self._pool.check_usable()
        with self._runner.between_batches():
            self._runner.refresh_pool(self._pool)
            self._pool.catch_up_all()
            yield

    def note_lent(self, memory: LentMemory) -> None:
        # What is written through it raises no version counter. So nothing runs ahead, and nothing is taken for current,
        # until it is given back.
        self._runner.lent.add(memory)
        self._pool.host_table.lent.add(memory)
        self.prepare_write(torch.empty(0, dtype=torch.float32))
        if not self._has_warned:
            self._has_warned = True
            logger.info(
                "%s: memory of its tables has left PyTorch (NumPy, DLPack, a storage). As long as somebody keeps it, "
                "all resident rows are read before and written after every batch, which is right and slow. Copy what "
                "you need, and let go of it.",
                self._pool.name,
            )


class ScratchPipeEmbeddingBag(ScratchpadKernel, BatchedFusedEmbeddingBag):
    """Pooled lookup of one group of scratchpad tables.

    Raises ConfigError or TableStorageError. Source: torchrec BatchedFusedEmbeddingBag (1.8.0), whose surface this
    keeps.
    """

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        pg: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        sharding_type: ShardingType | None = None,
        env: ShardingEnv | None = None,
        *,
        options: ScratchpadOptions,
        runner: StageRunner,
    ) -> None:
        # The next constructor would build a TBE with all rows.
        super(BatchedFusedEmbeddingBag, self).__init__(config, pg, device, sharding_type)
        self._set_up(device, self._pooling, options, runner)

    def forward(
        self,
        features: KeyedJaggedTensor,
        vbe_output: Tensor | None = None,
        vbe_output_offsets: Tensor | None = None,
    ) -> Tensor:
        """Look up and pool; rows that no stage has brought yet are fetched on the spot.

        Shapes: returns [B, sum of the features' D]. Raises IdOutOfRangeError or ScratchpadFullError.
        """
        look_up = super().forward
        return self._look_up(features, lambda over_slots: look_up(over_slots, vbe_output, vbe_output_offsets))


class ScratchPipeEmbedding(ScratchpadKernel, BatchedFusedEmbedding):
    """Unpooled lookup of one group of scratchpad tables.

    Raises ConfigError or TableStorageError. Source: torchrec BatchedFusedEmbedding (1.8.0), whose surface this
    keeps.
    """

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        pg: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        *,
        options: ScratchpadOptions,
        runner: StageRunner,
    ) -> None:
        super(BatchedFusedEmbedding, self).__init__(config, pg, device)
        self._set_up(device, PoolingMode.NONE, options, runner)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Look up one row per id; rows that no stage has brought yet are fetched on the spot.

        Shapes: returns [I, D]. Raises IdOutOfRangeError or ScratchpadFullError.
        """
        return self._look_up(features, super().forward)


def _feature_bounds(features: KeyedJaggedTensor) -> Tensor:
    """[F + 1] int32 or int64 on the device: where each feature's ids begin, and the number of all."""
    offsets, num_features = features.offsets(), len(features.keys())
    if features.values().numel() == 0:
        return offsets.new_zeros(num_features + 1)
    if not features.variable_stride_per_key():
        bounds = offsets[:: features.stride()]
        # A view keeps all offsets; on a device, a copy costs a kernel.
        return bounds.clone() if bounds.device.type == "cpu" else bounds
    positions = torch.tensor(
        [0, *accumulate(features.stride_per_key())], dtype=torch.int64, pin_memory=offsets.device.type == "cuda"
    )
    return offsets.index_select(0, positions.to(offsets.device, non_blocking=True))


def _release_after_backward(output: Tensor, batch: Batch, runner: StageRunner) -> None:
    """Keep the batch's slots until its fused update has run, or until nobody can run it any more.

    The autograd node owns the batch: it lets go after the node's backward, or when the graph is freed.
    """
    # Without a graph there is no backward to wait for.
    if not output.requires_grad or output.grad_fn is None:
        runner.release(batch)
        return

    def prepare_update(_grad_outputs: object) -> None:
        if batch.is_released:
            raise BackwardTwiceError(
                "backward runs through a scratchpad lookup whose rows were already released, by an earlier backward or "
                "by the pipeline's reset(). Call backward once per forward (retain_graph=True cannot be used through "
                "embeddings), and not for batches that were dropped."
            )
        runner.begin_update(batch)  # tables may have been loaded since the forward, and this update goes on top

    # The first hook runs right before the fused update, the second right after it (hazards 1 and 3).
    output.grad_fn.register_prehook(prepare_update)
    output.grad_fn.register_hook(lambda _grad_inputs, _grad_outputs: runner.release(batch, is_updated=True))
