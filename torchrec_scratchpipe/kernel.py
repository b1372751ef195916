# SPDX-License-Identifier: BSD-3-Clause
"""The pooled lookup of one kernel group: FBGEMM's TBE over scratchpad slots, tables on the host.

Shapes: ``I`` ids, ``S`` slots, ``R`` rows, ``D`` row width, ``T`` tables.

FBGEMM builds a TBE of T tables as usual; then all its weight and optimizer offsets are pointed at
the pool's one scratchpad. Ids become slots before the lookup, and nothing else of the arithmetic changes.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbeddingBag, EmbeddingFusedOptimizer
from torchrec.distributed.composable.table_batched_embedding_slice import TableBatchedEmbeddingSlice
from torchrec.distributed.embedding_kernel import get_state_dict
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig, ShardedEmbeddingTable, ShardingType
from torchrec.distributed.utils import append_prefix
from torchrec.modules.embedding_configs import data_type_to_sparse_type
from torchrec.optim.fused import EmptyFusedOptimizer, FusedOptimizer, FusedOptimizerModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe.compat import ComputeDevice, EmbeddingLocation, WeightDecayMode
from torchrec_scratchpipe.errors import BackwardTwiceError, ConfigError
from torchrec_scratchpipe.host_table import HostTable, MappedStorage, RamStorage, TableStorage
from torchrec_scratchpipe.scratchpad import ScratchpadMemory, allocate_scratchpads
from torchrec_scratchpipe.slot_map import EvictionOrder, LeastRecentlyUsed, SlotMap
from torchrec_scratchpipe.stages import FeatureSource, PlannedBatch, Pool, StageRunner
from torchrec_scratchpipe.types import RowLayout, StateSpec, TableSpec

__all__ = ["ScratchPipeEmbeddingBag", "ScratchpadOptions", "check_load_factor"]

logger: logging.Logger = logging.getLogger(__name__)

DEFAULT_LOAD_FACTOR = 0.2  # FBGEMM's default cache_load_factor
MIN_SLOTS_PER_TABLE = 32  # rows of one set of FBGEMM's cache, its smallest; a table of 3 rows simply fits

# Per optimizer: the name in TorchRec's optimizer state_dict, FBGEMM's buffer, one value per row or per weight.
OPTIMIZER_STATES: dict[EmbOptimType, tuple[tuple[str, str, bool], ...]] = {
    EmbOptimType.EXACT_SGD: (),
    EmbOptimType.EXACT_ADAGRAD: (("sum", "momentum1", False),),
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: (("sum", "momentum1", True),),
}

# FBGEMM settings of its own cache. The scratchpad has no use for them; load_factor is read per table.
CACHE_SETTINGS = frozenset(
    {
        "cache_algorithm",
        "cache_load_factor",
        "cache_precision",
        "cache_reserved_memory",
        "cache_sets",
        "enforce_hbm",
        "gather_uvm_cache_stats",
        "multipass_prefetch_config",
        "prefetch_pipeline",
        "record_cache_metrics",
        "uvm_host_mapped",
        "uvm_non_rowwise_momentum",
    }
)


@dataclass(frozen=True)
class ScratchpadOptions:
    """What all scratchpad tables of a sharder share.

    Args:
        table_dir: Existing directory for memory-mapped tables; None keeps them in RAM.
        overlap: Run the stages beside Train. False runs them on the training thread: slower, same bits.
        make_eviction_order: Makes a pool's eviction order, given its number of slots.
    """

    table_dir: str | None = None
    overlap: bool = True
    make_eviction_order: Callable[[int], EvictionOrder] = LeastRecentlyUsed

    def make_storage(self, device: torch.device) -> TableStorage:
        """Where host tables of a scratchpad on this device come from."""
        if self.table_dir is not None:
            return MappedStorage(self.table_dir)
        return RamStorage(pin_memory=device.type == "cuda")


class ScratchPipeEmbeddingBag(BaseBatchedEmbeddingBag[Tensor], FusedOptimizerModule):
    """Pooled lookup of scratchpad tables that share data type, pooling and optimizer.

    Tables of equal row width form one pool. The parameters and optimizer states it shows are the host tables, under
    stock names; reading them flushes.

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
        pg: dist.ProcessGroup | None,
        device: torch.device | None,
        sharding_type: ShardingType | None,
        options: ScratchpadOptions,
        runner: StageRunner,
    ) -> None:
        super().__init__(config, pg, device, sharding_type)
        self._scratchpad_device = device or torch.device("cpu")
        self._runner = runner
        self._next_batch: PlannedBatch | None = None
        fused_params = dict(config.fused_params or {})
        self._state_names = _states_of(config, fused_params)
        self._pool_tables = _tables_by_width(config)
        self._pool_of_table = {
            index: (pool_index, position)
            for pool_index, indices in enumerate(self._pool_tables)
            for position, index in enumerate(indices)
        }
        self.pools, memory = self._make_pools(options)
        self._emb_module = self._make_tbe(fused_params, memory)
        self._features = [
            FeatureSource(feature_name, *self._pool_of_table[table_index])
            for table_index, table in enumerate(config.embedding_tables)
            for feature_name in table.feature_names
        ]
        if self._scratchpad_device.type == "cuda" and options.table_dir is None:
            for table in config.embedding_tables:
                if table.global_metadata is not None:
                    table.global_metadata.tensor_properties.pin_memory = True
        self._optim: FusedOptimizer = _FlushingFusedOptimizer(self, config, _TableSurface(self), pg)
        self.init_parameters()

    def submit(self, features: KeyedJaggedTensor) -> PlannedBatch:
        """Send one batch through the stages, ahead of its lookup.

        Args:
            features: This group's rank-local features, as the lookup will get them.

        Returns:
            What :meth:`expect` takes when the batch is about to be looked up.
        """
        batch = PlannedBatch(self.pools, self._features, features.values(), features.offset_per_key(), self._runner)
        self._runner.submit(batch)
        return batch

    def expect(self, batch: PlannedBatch | None) -> None:
        """Say which planned batch the next forward looks up; None plans it on the spot.

        Args:
            batch: From :meth:`submit`.
        """
        self._next_batch = batch

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
        batch, self._next_batch = self._next_batch, None
        if batch is None:
            batch = self.submit(features)
        slots = batch.wait()
        features_over_slots = copy.copy(features)
        features_over_slots._values = slots
        output = super().forward(features_over_slots, vbe_output, vbe_output_offsets)
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
        """Bring every table up to date with its scratchpad (hazard 5); waits for the device."""
        with self._runner.between_batches():
            for pool in self.pools:
                pool.flush()

    def purge(self) -> None:
        """Flush, then empty the scratchpads, before tables are overwritten (hazard 6).

        Raises:
            BatchesInFlightError: Planned batches rely on resident rows.
        """
        with self._runner.between_batches():
            for pool in self.pools:
                pool.purge()

    def split_embedding_weights(self) -> list[Tensor]:
        """[local_rows, local_cols] of each table, on the host, as of the last flush."""
        return [self._table_parts(index)[0] for index in range(len(self._local_rows))]

    def split_optimizer_states(self) -> list[dict[str, Tensor]]:
        """Each table's optimizer states on the host, under FBGEMM's names, as of the last flush."""
        if not self._state_names:
            return []
        return [
            dict(zip(self._state_names, self._table_parts(index)[1:], strict=True))
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
                _FlushingFusedOptimizer(
                    self,
                    self._config,
                    _TableSurface(self),
                    self._pg,
                    create_for_table=name,
                    param_weight_for_table=weight,
                )
            ]
            yield name, weight

    def state_dict(
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """As TorchRec's, after a flush; the tensors are the tables themselves, not copies."""
        self.flush()
        return get_state_dict(
            self._config.embedding_tables, self.split_embedding_weights(), self._pg, destination, prefix
        )

    def _table_parts(self, table_index: int) -> list[Tensor]:
        pool_index, position = self._pool_of_table[table_index]
        return self.pools[pool_index].host_table.table_parts(position)

    def _make_pools(self, options: ScratchpadOptions) -> tuple[list[Pool], ScratchpadMemory]:
        states = tuple(StateSpec(prefix, is_rowwise) for prefix, is_rowwise in self._state_names.values())
        storage = options.make_storage(self._scratchpad_device)
        host_tables = []
        nums_slots = []
        for indices in self._pool_tables:
            specs = [
                TableSpec(table.name, table.local_rows, _load_factor(table))
                for table in (self._config.embedding_tables[index] for index in indices)
            ]
            layout = RowLayout(self._local_cols[indices[0]], torch.float32, states)
            host_tables.append(HostTable(specs, layout, storage))
            nums_slots.append(sum(_num_slots(spec) for spec in specs))
        layouts = [host_table.layout for host_table in host_tables]
        memory = allocate_scratchpads(layouts, nums_slots, self._scratchpad_device)
        pools = [
            Pool(
                host_table,
                scratchpad,
                SlotMap(
                    host_table.num_rows,
                    scratchpad.num_slots,
                    options.make_eviction_order(scratchpad.num_slots),
                    self._scratchpad_device,
                ),
            )
            for host_table, scratchpad in zip(host_tables, memory.scratchpads, strict=True)
        ]
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

    def _make_tbe(
        self, fused_params: dict[str, Any], memory: ScratchpadMemory
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
            pooling_mode=self._pooling,
            weights_precision=data_type_to_sparse_type(self._config.data_type),
            device=self._scratchpad_device,
            table_names=[table.name for table in self._config.embedding_tables],
            **{key: value for key, value in fused_params.items() if key not in CACHE_SETTINGS},
        )
        slots_of_table = [
            self.pools[self._pool_of_table[index][0]].scratchpad.num_slots for index in range(len(self._local_cols))
        ]
        self._point_rows_at_slots(tbe, slots_of_table)
        suffix = "dev" if is_cuda else "host"
        prefixes = ["weights", *(prefix for prefix, _ in self._state_names.values())]
        for prefix, flat, pool_offsets in zip(prefixes, memory.flat_parts, memory.value_offsets, strict=True):
            offsets = [pool_offsets[self._pool_of_table[index][0]] for index in range(len(self._local_cols))]
            # .data gives the TBE a version counter of its own: Insert of coming batches writes slots between this
            # batch's forward and backward, which autograd would take for an error (the hold makes it none).
            is_parameter = isinstance(getattr(tbe, f"{prefix}_{suffix}"), nn.Parameter)
            setattr(tbe, f"{prefix}_{suffix}", nn.Parameter(flat.data) if is_parameter else flat.data)
            setattr(tbe, f"{prefix}_physical_offsets", offsets)
            getattr(tbe, f"{prefix}_offsets").copy_(torch.tensor([offsets[t] for t in self._feature_table_map]))
        return tbe

    def _point_rows_at_slots(self, tbe: SplitTableBatchedEmbeddingBagsCodegen, slots_of_table: list[int]) -> None:
        tbe.embedding_specs = [
            (num_slots, *spec[1:]) for num_slots, spec in zip(slots_of_table, tbe.embedding_specs, strict=True)
        ]
        cumulative = [0, *accumulate(slots_of_table)]
        tbe.total_hash_size = cumulative[-1]
        tbe.total_hash_size_bits = int(math.log2(float(cumulative[-1])) + 1)
        tbe.hash_size_cumsum.copy_(torch.tensor([cumulative[t] for t in self._feature_table_map] + [cumulative[-1]]))
        tbe.rows_per_table.copy_(torch.tensor([slots_of_table[t] for t in self._feature_table_map]))
        tbe.optimizer_args = tbe.optimizer_args._replace(total_hash_size=cumulative[-1])


class _TableSurface:
    """The part of a TBE that EmbeddingFusedOptimizer uses: state from the host tables, settings from the TBE."""

    def __init__(self, kernel: ScratchPipeEmbeddingBag) -> None:
        self.split_embedding_weights = kernel.split_embedding_weights
        self.get_optimizer_state = kernel.split_optimizer_states
        tbe = kernel.emb_module
        self.get_learning_rate = tbe.get_learning_rate
        self.set_learning_rate = tbe.set_learning_rate
        self.set_optimizer_step = tbe.set_optimizer_step
        self.update_hyper_parameters = tbe.update_hyper_parameters


class _FlushingFusedOptimizer(EmbeddingFusedOptimizer):
    """TorchRec's fused optimizer, whose state is brought up to date whenever it is read.

    CombinedOptimizer reads `state` of its children and calls no hook of theirs, so the read itself has to flush.
    """

    def __init__(self, kernel: ScratchPipeEmbeddingBag, *args: Any, **kwargs: Any) -> None:
        self._kernel = kernel
        super().__init__(*args, **kwargs)

    @property
    def state(self) -> Any:
        """Optimizer state by parameter; flushes."""
        self._kernel.flush()
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        self._state = state

    def post_load_state_dict(self) -> None:
        """The tables' states were overwritten: forget the rows in the scratchpad."""
        self._kernel.purge()


def _release_after_backward(output: Tensor, batch: PlannedBatch) -> None:
    """Hold the batch's slots until its fused update has run, or until nobody can run it any more.

    The autograd node owns the hold: it lets go after the node's backward, or when the graph is freed.
    """
    hold = batch.hold
    if not output.requires_grad or output.grad_fn is None:
        hold.release()
        return

    def refuse_second_backward(_grad_outputs: object) -> None:
        if hold.is_released:
            raise BackwardTwiceError(
                "backward ran a second time through one scratchpad lookup, whose rows may have left the scratchpad. "
                "Call backward once per forward (retain_graph=True cannot be used through embeddings)."
            )

    output.grad_fn.register_prehook(refuse_second_backward)
    output.grad_fn.register_hook(lambda _grad_inputs, _grad_outputs: hold.release(is_updated=True))


def _states_of(config: GroupedEmbeddingConfig, fused_params: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    names = ", ".join(table.name for table in config.embedding_tables)
    precision = data_type_to_sparse_type(config.data_type)
    if precision is not SparseType.FP32:
        raise ConfigError(
            f"tables {names}: data_type {config.data_type.value} is not supported in a scratchpad. Use DataType.FP32, "
            "or compute kernel fused."
        )
    optimizer = fused_params.get("optimizer", EmbOptimType.EXACT_SGD)
    if optimizer not in OPTIMIZER_STATES:
        supported = ", ".join(sorted(kind.name for kind in OPTIMIZER_STATES))
        raise ConfigError(
            f"tables {names}: optimizer {optimizer} keeps state that cannot travel with its row yet. Use one of "
            f"{supported}, or compute kernel fused."
        )
    decay_mode = fused_params.get("weight_decay_mode", WeightDecayMode.NONE)
    if decay_mode not in (WeightDecayMode.NONE, WeightDecayMode.L2, WeightDecayMode.DECOUPLE):
        raise ConfigError(
            f"tables {names}: weight_decay_mode {decay_mode} changes rows that a batch does not use. Use NONE, L2 or "
            "DECOUPLE, or compute kernel fused."
        )
    return {name: (prefix, is_rowwise) for name, prefix, is_rowwise in OPTIMIZER_STATES[optimizer]}


def _tables_by_width(config: GroupedEmbeddingConfig) -> list[list[int]]:
    """Table indices of each pool; shards of one table must end up side by side."""
    by_width: dict[int, list[int]] = {}
    widths_of_name: dict[str, set[int]] = {}
    for index, table in enumerate(config.embedding_tables):
        if table.local_cols % 4 != 0:
            raise ConfigError(
                f"table {table.name}: a shard has {table.local_cols} columns, FBGEMM needs a multiple of 4. Change "
                "embedding_dim or min_partition."
            )
        by_width.setdefault(table.local_cols, []).append(index)
        widths_of_name.setdefault(table.name, set()).add(table.local_cols)
    for name, widths in widths_of_name.items():
        if len(widths) > 1:
            raise ConfigError(
                f"table {name}: its column shards on this rank have widths {sorted(widths)}, one width is needed. "
                "Choose min_partition so that it divides embedding_dim."
            )
    return list(by_width.values())


def _num_slots(table: TableSpec) -> int:
    return max(math.ceil(table.load_factor * table.num_rows), min(MIN_SLOTS_PER_TABLE, table.num_rows))


def check_load_factor(table_name: str, load_factor: float) -> float:
    """Refuse what cannot be a share of a table.

    Args:
        table_name: For the message.
        load_factor: Slots per row.

    Returns:
        The load factor.

    Raises:
        ConfigError: It does not lie in (0, 1].
    """
    if not 0.0 < load_factor <= 1.0:  # false for NaN too
        raise ConfigError(
            f"table {table_name}: load_factor is {load_factor}, it must lie in (0, 1]. Set "
            "CacheParams(load_factor=...) in the table's ParameterConstraints."
        )
    return float(load_factor)


def _load_factor(table: ShardedEmbeddingTable) -> float:
    fused_params = table.fused_params or {}
    return check_load_factor(table.name, fused_params.get("cache_load_factor", DEFAULT_LOAD_FACTOR))
