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
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbedding, BaseBatchedEmbeddingBag
from torchrec.distributed.composable.table_batched_embedding_slice import TableBatchedEmbeddingSlice
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig, ShardingType
from torchrec.distributed.utils import append_prefix
from torchrec.modules.embedding_configs import data_type_to_dtype, data_type_to_sparse_type
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizer, FusedOptimizerModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe.compat import ComputeDevice, EmbeddingLocation, PoolingMode
from torchrec_scratchpipe.device_batch import DeviceBatch, feature_rows
from torchrec_scratchpipe.device_ops import DeviceOps, FeatureIds, FeatureRows
from torchrec_scratchpipe.device_slot_map import DeviceSlotMap
from torchrec_scratchpipe.errors import BackwardTwiceError, ConfigError
from torchrec_scratchpipe.fused_optimizer import FlushingFusedOptimizer
from torchrec_scratchpipe.host_table import HostTable
from torchrec_scratchpipe.options import (
    CACHE_SETTINGS,
    ScratchpadOptions,
    load_factor_of,
    num_slots_of,
    optimizer_states,
    tables_by_width,
    warn_of_ignored_settings,
)
from torchrec_scratchpipe.planned_batch import FeatureSource, PlannedBatch
from torchrec_scratchpipe.pool import Pool
from torchrec_scratchpipe.runner import StageRunner
from torchrec_scratchpipe.scratchpad import ScratchpadMemory, allocate_scratchpads
from torchrec_scratchpipe.slot_map import SlotMap
from torchrec_scratchpipe.types import RowLayout, StateSpec, TableSpec

__all__ = ["ScratchPipeEmbedding", "ScratchPipeEmbeddingBag", "ScratchpadKernel"]

logger: logging.Logger = logging.getLogger(__name__)


class ScratchpadKernel(FusedOptimizerModule):
    """What pooled and unpooled lookups of scratchpad tables share; mixed into TorchRec's base class for kernels.

    The tables of a kernel group share data type, pooling and optimizer; those of equal row width form one pool. The
    parameters and optimizer states it shows are the host tables, under stock names; state_dict and the optimizer's
    state flush before they are read, parameters do not.
    """

    # From TorchRec's base class for kernels.
    _config: GroupedEmbeddingConfig
    _pg: dist.ProcessGroup | None
    _local_rows: list[int]
    _local_cols: list[int]
    _feature_table_map: list[int]
    table_name_to_count: dict[str, int]
    init_parameters: Callable[[], None]

    def _set_up(
        self,
        device: torch.device | None,
        pooling: PoolingMode,
        options: ScratchpadOptions,
        runner: StageRunner,
    ) -> None:
        """Allocate tables, scratchpads and TBE; what a constructor does after TorchRec's."""
        self._scratchpad_device = device or torch.device("cpu")
        self._runner = runner
        self._next_batch: PlannedBatch | None = None
        fused_params = dict(self._config.fused_params or {})
        warn_of_ignored_settings(self._config, fused_params, self._scratchpad_device.type)
        self._states = optimizer_states(self._config, fused_params, self._scratchpad_device.type)
        self._pool_tables = tables_by_width(self._config)
        self._pool_of_table = {
            index: (pool_index, position)
            for pool_index, indices in enumerate(self._pool_tables)
            for position, index in enumerate(indices)
        }
        self.pools, memory = self._make_pools(options)
        self._emb_module = self._make_tbe(pooling, fused_params, memory)
        self._features = [
            FeatureSource(feature_name, *self._pool_of_table[table_index])
            for table_index, table in enumerate(self._config.embedding_tables)
            for feature_name in table.feature_names
        ]
        self._rows_of_features: tuple[FeatureRows, ...] | None = None
        if isinstance(self.pools[0].slot_map, DeviceSlotMap):
            self._rows_of_features = feature_rows(self.pools, self._features, self._scratchpad_device)
        self._optim: FusedOptimizer = self._make_optimizer()
        self.init_parameters()

    def submit(self, features: KeyedJaggedTensor, *, may_plan: bool = True) -> PlannedBatch:
        """Send one batch through the stages, ahead of its lookup.

        Args:
            features: This group's rank-local features, as the lookup will get them.
            may_plan: False to have it seen only, until :meth:`StageRunner.allow`.

        Returns:
            What :meth:`expect` takes when the batch is about to be looked up.
        """
        batch: PlannedBatch
        if self._rows_of_features is None:
            ids, bounds = features.values(), features.offset_per_key()
            batch = PlannedBatch(self.pools, self._features, ids, bounds, self._runner, may_plan=may_plan)
        else:  # the sizes of the features stay on the device
            on_device = FeatureIds(features.values(), _feature_bounds(features))
            batch = DeviceBatch(
                self.pools, self._features, on_device, self._rows_of_features, self._runner, may_plan=may_plan
            )
        self._runner.submit(batch)
        return batch

    def expect(self, batch: PlannedBatch | None) -> None:
        """Say which planned batch the next forward looks up; None plans it on the spot.

        Args:
            batch: From :meth:`submit`.
        """
        self._next_batch = batch

    def forget(self) -> None:
        """Drop a batch that was expected and not looked up, because another lookup has failed."""
        batch, self._next_batch = self._next_batch, None
        if batch is not None:
            batch.hold.release()

    def _look_up(self, features: KeyedJaggedTensor, look_up_slots: Callable[[KeyedJaggedTensor], Tensor]) -> Tensor:
        """Look up the expected batch, or fetch these features on the spot, over slots instead of ids."""
        batch, self._next_batch = self._next_batch, None
        if batch is None:
            batch = self.submit(features)
        assert batch.num_ids == features.values().numel(), f"{batch.num_ids=}, {features.values().numel()=}"
        slots = batch.wait()
        features_over_slots = copy.copy(features)
        features_over_slots._values = slots
        output = look_up_slots(features_over_slots)
        _release_after_backward(output, batch)
        return output

    @property
    def emb_module(self) -> SplitTableBatchedEmbeddingBagsCodegen:
        """FBGEMM's TBE over the scratchpads; its weights are slots, not tables."""
        return self._emb_module

    @property
    def fused_optimizer(self) -> FusedOptimizer:
        """TorchRec's optimizer surface over the host tables; reading its state flushes."""
        return self._optim

    def flush(self) -> None:
        """Bring every table up to date with its scratchpad (hazard 5); waits for the worker and the device."""
        self._runner.settle()
        with self._runner.between_batches():
            for pool in self.pools:
                pool.flush()

    def purge(self) -> None:
        """Flush, and make sure that no old row is used once tables are overwritten (hazard 6).

        No stage runs until the caller submits or trains a batch, so that none reads or writes tables meanwhile.
        """
        self._runner.suspend()
        with self._runner.between_batches():
            for pool in self.pools:
                pool.purge()

    def flush_to_write(self) -> None:
        """Flush, for somebody who may write tables in place; no stage runs until the caller submits or trains a batch."""
        self._runner.suspend()
        self.flush()

    def split_embedding_weights(self) -> list[Tensor]:
        """[local_rows, local_cols] of each table, on the host, as of the last flush."""
        return [self._table_parts(index)[0] for index in range(len(self._local_rows))]

    def split_optimizer_states(self) -> list[dict[str, Tensor]]:
        """Each table's optimizer states on the host, under FBGEMM's names, as of the last flush."""
        if not self._states:
            return []
        return [
            dict(zip((state.name for state in self._states), self._table_parts(index)[1:], strict=True))
            for index in range(len(self._local_rows))
        ]

    def named_split_embedding_weights(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """As TorchRec's, over the host tables."""
        for table, weights in zip(self._config.embedding_tables, self.split_embedding_weights(), strict=True):
            yield append_prefix(prefix, f"{table.name}.weight"), weights

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As TorchRec's, over the host tables; dense optimizers are told to leave them alone."""
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
        """As TorchRec's: one slice of the host table per table name, its local column shards joined."""
        tables = self._config.embedding_tables
        for name, count in self.table_name_to_count.items():
            first = next(index for index, table in enumerate(tables) if table.name == name)
            pool_index, position = self._pool_of_table[first]
            host_table = self.pools[pool_index].host_table
            dim = host_table.layout.dim
            weight = TableBatchedEmbeddingSlice(
                data=host_table.parts[0].view(-1),
                start_offset=host_table.row_offsets[position] * dim,
                end_offset=host_table.row_offsets[position + count] * dim,
                num_embeddings=-1,
                embedding_dim=dim,
            )
            weight._in_backward_optimizers = [  # type: ignore[attr-defined]
                self._make_optimizer(create_for_table=name, param_weight_for_table=weight)
            ]
            yield name, weight

    def _make_optimizer(self, **kwargs: Any) -> FlushingFusedOptimizer:
        """TorchRec's optimizer surface: settings of the TBE, weights and states of the host tables."""
        return FlushingFusedOptimizer(
            self._config,
            self._emb_module,
            self._pg,
            kernel=self,
            embedding_weights_by_table=self.split_embedding_weights(),
            all_optimizer_states=self.split_optimizer_states(),
            **kwargs,
        )

    def _table_parts(self, table_index: int) -> list[Tensor]:
        pool_index, position = self._pool_of_table[table_index]
        return self.pools[pool_index].host_table.table_parts(position)

    def _make_pools(self, options: ScratchpadOptions) -> tuple[list[Pool], ScratchpadMemory]:
        dtype = data_type_to_dtype(self._config.data_type)
        states = tuple(StateSpec(state.buffer, state.is_rowwise, state.dtype) for state in self._states)
        device_ops = options.find_device_ops(self._scratchpad_device)
        storage = options.make_storage(device_ops)
        host_tables = []
        nums_slots: list[int] = []
        for indices in self._pool_tables:
            specs = [
                TableSpec(table.name, table.local_rows, load_factor_of(table))
                for table in (self._config.embedding_tables[index] for index in indices)
            ]
            layout = RowLayout(self._local_cols[indices[0]], dtype, states)
            host_tables.append(HostTable(specs, layout, storage))
            # A row-wise table shorter than the number of ranks leaves some of them without rows.
            nums_slots.append(max(1, sum(num_slots_of(spec) for spec in specs)))
        layouts = [host_table.layout for host_table in host_tables]
        memory = allocate_scratchpads(layouts, nums_slots, self._scratchpad_device)
        pools = [
            Pool(host_table, scratchpad, self._make_slot_map(host_table, scratchpad.num_slots, options, device_ops))
            for host_table, scratchpad in zip(host_tables, memory.scratchpads, strict=True)
        ]
        for tensor in memory.flat_parts:
            self._runner.streams.record_use(tensor)
        for pool in pools:
            logger.info(
                "%s: %s slots for %s rows, %.1f MB of %.1f MB",
                pool.name,
                f"{pool.scratchpad.num_slots:,}",
                f"{pool.host_table.num_rows:,}",
                pool.scratchpad.num_bytes / 1e6,
                pool.host_table.num_bytes / 1e6,
            )
        return pools, memory

    def _make_slot_map(
        self, host_table: HostTable, num_slots: int, options: ScratchpadOptions, device_ops: DeviceOps | None
    ) -> SlotMap | DeviceSlotMap:
        device = self._scratchpad_device
        if device_ops is None:
            return SlotMap(host_table.num_rows, num_slots, options.make_eviction_order(num_slots), device)
        offsets = host_table.row_offsets
        return DeviceSlotMap(host_table.num_rows, num_slots, offsets, device_ops, device, self._runner.streams)

    def _make_tbe(
        self, pooling: PoolingMode, fused_params: dict[str, Any], memory: ScratchpadMemory
    ) -> SplitTableBatchedEmbeddingBagsCodegen:
        """A TBE of T one-row tables whose offsets are then pointed at the scratchpads.

        One-row tables, because FBGEMM allocates what it is told, and T tables of S slots would be T times too much.
        """
        is_cuda = self._scratchpad_device.type == "cuda"
        location = EmbeddingLocation.DEVICE if is_cuda else EmbeddingLocation.HOST
        compute_device = ComputeDevice.CUDA if is_cuda else ComputeDevice.CPU
        tbe = SplitTableBatchedEmbeddingBagsCodegen(
            embedding_specs=[(1, dim, location, compute_device) for dim in self._local_cols],
            feature_table_map=self._feature_table_map,
            pooling_mode=pooling,
            weights_precision=data_type_to_sparse_type(self._config.data_type),
            device=self._scratchpad_device,
            table_names=[table.name for table in self._config.embedding_tables],
            **{key: value for key, value in fused_params.items() if key not in CACHE_SETTINGS},
        )
        slots_of_table = [
            self.pools[self._pool_of_table[index][0]].scratchpad.num_slots for index in range(len(self._local_cols))
        ]
        self._point_rows_at_slots(tbe, slots_of_table)
        tbe.reset_embedding_weight_momentum = self._refuse_reset  # its rows would be taken for slots
        suffix = "dev" if is_cuda else "host"
        prefixes = ["weights", *(state.buffer for state in self._states)]
        for prefix, flat, pool_offsets in zip(prefixes, memory.flat_parts, memory.value_offsets, strict=True):
            offsets = [pool_offsets[self._pool_of_table[index][0]] for index in range(len(self._local_cols))]
            # .data gives the TBE a version counter of its own: Insert of coming batches writes slots between this
            # batch's forward and backward, which autograd would take for an error (the hold makes it none).
            is_parameter = isinstance(getattr(tbe, f"{prefix}_{suffix}"), nn.Parameter)
            setattr(tbe, f"{prefix}_{suffix}", nn.Parameter(flat.data) if is_parameter else flat.data)
            setattr(tbe, f"{prefix}_physical_offsets", offsets)
            getattr(tbe, f"{prefix}_offsets").copy_(
                torch.tensor([offsets[t] for t in self._feature_table_map], dtype=torch.int64)
            )
        return tbe

    def _refuse_reset(self, *args: Any, **kwargs: Any) -> None:
        names = ", ".join(table.name for table in self._config.embedding_tables)
        raise ConfigError(
            f"tables {names}: rows of scratchpad tables cannot be reset by managed collision or in-training pruning. Use "
            "compute kernel fused for these tables, or a collection without them."
        )

    def _point_rows_at_slots(self, tbe: SplitTableBatchedEmbeddingBagsCodegen, slots_of_table: list[int]) -> None:
        tbe.embedding_specs = [
            (num_slots, *spec[1:]) for num_slots, spec in zip(slots_of_table, tbe.embedding_specs, strict=True)
        ]
        cumulative = [0, *accumulate(slots_of_table)]
        tbe.total_hash_size = cumulative[-1]
        tbe.total_hash_size_bits = int(math.log2(float(cumulative[-1])) + 1)
        tbe.hash_size_cumsum.copy_(
            torch.tensor([cumulative[t] for t in [*self._feature_table_map, -1]], dtype=torch.int64)
        )
        tbe.rows_per_table.copy_(torch.tensor([slots_of_table[t] for t in self._feature_table_map], dtype=torch.int64))
        tbe.optimizer_args = tbe.optimizer_args._replace(total_hash_size=cumulative[-1])


class ScratchPipeEmbeddingBag(ScratchpadKernel, BaseBatchedEmbeddingBag[Tensor]):
    """Pooled lookup of one group of scratchpad tables.

    Args:
        config: TorchRec's group of local tables.
        pg: The process group that shards them.
        device: Where the scratchpads live.
        sharding_type: As the sharding passes it; it decides where MEAN is divided.
        options: What the sharder was given.
        runner: Runs the stages.

    Raises:
        ConfigError: A table's load factor, data type or optimizer cannot be served.
        TableStorageError: A table cannot be placed where it should be.

    Source:
        torchrec BatchedFusedEmbeddingBag (1.8.0), whose surface this keeps.
    """

    def __init__(
        self,
        config: GroupedEmbeddingConfig,
        pg: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        sharding_type: ShardingType | None = None,
        *,
        options: ScratchpadOptions,
        runner: StageRunner,
    ) -> None:
        super().__init__(config, pg, device, sharding_type)
        self._set_up(device, self._pooling, options, runner)

    def forward(
        self,
        features: KeyedJaggedTensor,
        vbe_output: Tensor | None = None,
        vbe_output_offsets: Tensor | None = None,
    ) -> Tensor:
        """Look up and pool; rows that no stage has brought yet are fetched on the spot.

        Args:
            features: This group's rank-local features, with ids.
            vbe_output: As TorchRec passes it.
            vbe_output_offsets: As TorchRec passes it.

        Returns:
            [B, sum of the features' D] as stock.

        Raises:
            IdOutOfRangeError: Names the table, the id and the range.
            ScratchpadFullError: Names both numbers and the setting to change.
        """
        look_up = super().forward
        return self._look_up(features, lambda over_slots: look_up(over_slots, vbe_output, vbe_output_offsets))


class ScratchPipeEmbedding(ScratchpadKernel, BaseBatchedEmbedding[Tensor]):
    """Unpooled lookup of one group of scratchpad tables.

    Args:
        config: TorchRec's group of local tables.
        pg: The process group that shards them.
        device: Where the scratchpads live.
        options: What the sharder was given.
        runner: Runs the stages.

    Raises:
        ConfigError: A table's load factor, data type or optimizer cannot be served.
        TableStorageError: A table cannot be placed where it should be.

    Source:
        torchrec BatchedFusedEmbedding (1.8.0), whose surface this keeps.
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
        super().__init__(config, pg, device)
        self._set_up(device, PoolingMode.NONE, options, runner)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Look up one row per id; rows that no stage has brought yet are fetched on the spot.

        Args:
            features: This group's rank-local features, with ids.

        Returns:
            [I, D] as stock.

        Raises:
            IdOutOfRangeError: Names the table, the id and the range.
            ScratchpadFullError: Names both numbers and the setting to change.
        """
        return self._look_up(features, super().forward)


def _feature_bounds(features: KeyedJaggedTensor) -> Tensor:
    """[F + 1] int32 or int64 on the device: where each feature's ids begin, and the number of all."""
    offsets, num_features = features.offsets(), len(features.keys())
    if features.values().numel() == 0:
        return offsets.new_zeros(num_features + 1)
    if not features.variable_stride_per_key():
        return offsets[:: features.stride()]
    positions = torch.tensor(
        [0, *accumulate(features.stride_per_key())], dtype=torch.int64, pin_memory=offsets.device.type == "cuda"
    )
    return offsets.index_select(0, positions.to(offsets.device, non_blocking=True))


def _release_after_backward(output: Tensor, batch: PlannedBatch) -> None:
    """Hold the batch's slots until its fused update has run, or until nobody can run it any more.

    The autograd node owns the hold: it lets go after the node's backward, or when the graph is freed.
    """
    hold = batch.hold
    if not output.requires_grad or output.grad_fn is None:
        hold.release()
        return

    def prepare_update(_grad_outputs: object) -> None:
        if hold.is_released:
            raise BackwardTwiceError(
                "backward runs through a scratchpad lookup whose rows were already released, by an earlier backward or "
                "by the pipeline's reset(). Call backward once per forward (retain_graph=True cannot be used through "
                "embeddings), and not for batches that were dropped."
            )
        batch.refresh()  # tables may have been loaded since the forward, and this update goes on top

    output.grad_fn.register_prehook(prepare_update)
    output.grad_fn.register_hook(lambda _grad_inputs, _grad_outputs: hold.release(is_updated=True))
