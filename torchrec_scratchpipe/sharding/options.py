# SPDX-License-Identifier: BSD-3-Clause
"""What a scratchpad table may be: the sharder's options, and the checks that refuse the rest at construction."""

import dataclasses
import importlib
import logging
import math
import os
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import KW_ONLY, dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig
from torchrec.distributed.types import CacheParams
from torchrec.modules.embedding_configs import data_type_to_sparse_type

from torchrec_scratchpipe.core.disk import MappedStorage, RamBudget
from torchrec_scratchpipe.core.rows import RowLayout, StateSpec
from torchrec_scratchpipe.core.scratchpad import Scratchpad
from torchrec_scratchpipe.core.slot_ops import HALF_LIFE, SlotOps
from torchrec_scratchpipe.core.storage import PageLockedStorage, RamStorage, TableStorage
from torchrec_scratchpipe.core.torch_ops import TorchOps
from torchrec_scratchpipe.errors import ConfigError
from torchrec_scratchpipe.sharding.compat import WeightDecayMode

__all__ = [
    "CACHE_SETTINGS",
    "DEFAULT_LOAD_FACTOR",
    "OptimizerState",
    "PlannedCacheParams",
    "ScratchpadBudget",
    "ScratchpadOptions",
    "check_load_factor",
    "make_ram_budget",
    "num_slots_of",
    "optimizer_states",
    "row_layout",
    "tables_by_width",
    "warn_of_cache_settings",
    "warn_of_ignored_settings",
]

logger: logging.Logger = logging.getLogger(__name__)

DEFAULT_LOAD_FACTOR = 0.2  # FBGEMM's default cache_load_factor
HOST_ACCESSES = ("direct", "staged")
WAYS_WHEN_FULL = ("grow", "error")
WAYS_OUT_OF_RANGE = ("error", "fbgemm")
MIN_SLOTS_PER_TABLE = 32  # rows of one set of FBGEMM's cache, its smallest; a table of 3 rows simply fits


@dataclass(frozen=True)
class OptimizerState:
    """One per-row state of a fused optimizer."""

    name: str  # in TorchRec's optimizer state_dict
    buffer: str  # FBGEMM's name
    is_rowwise: bool  # one value per row, or one per weight
    dtype: torch.dtype = torch.float32


_SUM = OptimizerState("sum", "momentum1", is_rowwise=False)
_EXP_AVG = OptimizerState("exp_avg", "momentum1", is_rowwise=False)
_EXP_AVG_SQ = OptimizerState("exp_avg_sq", "momentum2", is_rowwise=False)

# All that an optimizer keeps per row; FBGEMM's iteration counter is per kernel group and stays where it is.
OPTIMIZER_STATES: dict[EmbOptimType, tuple[OptimizerState, ...]] = {
    EmbOptimType.EXACT_SGD: (),
    EmbOptimType.EXACT_ADAGRAD: (_SUM,),
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: (dataclasses.replace(_SUM, is_rowwise=True),),
    EmbOptimType.LARS_SGD: (OptimizerState("momentum_buffer", "momentum1", is_rowwise=False),),
    EmbOptimType.ADAM: (_EXP_AVG, _EXP_AVG_SQ),
    EmbOptimType.PARTIAL_ROWWISE_ADAM: (_EXP_AVG, dataclasses.replace(_EXP_AVG_SQ, is_rowwise=True)),
    EmbOptimType.LAMB: (_EXP_AVG, _EXP_AVG_SQ),
    EmbOptimType.PARTIAL_ROWWISE_LAMB: (_EXP_AVG, dataclasses.replace(_EXP_AVG_SQ, is_rowwise=True)),
}

# What FBGEMM has kernels for on a CPU.
CPU_OPTIMIZERS = (EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD)
STOCK_CPU_OPTIMIZERS = (*CPU_OPTIMIZERS, EmbOptimType.EMAINPLACE_ROWWISE_ADAGRAD)

IGNORED_ON_CPU = ("max_norm", "weight_decay")  # measured with fbgemm-gpu-cpu 1.8.0, for all three

ROW_PRECISIONS = (SparseType.FP32, SparseType.FP16)

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


@dataclass
class PlannedCacheParams(CacheParams):
    """TorchRec's words for a scratchpad table in a sharding plan, and what the plan was made for."""

    _: KW_ONLY
    lookahead: int | None = None  # batches planned ahead
    growth_bytes: int | None = None  # of the budget, not used on the fullest rank

    __hash__ = CacheParams.__hash__


class ScratchpadBudget:
    """Bytes that the scratchpads of a sharder may take on this rank, as long as they live."""

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self._max_growth_bytes: int | None = None
        self._planned_bytes: WeakKeyDictionary[Scratchpad, int] = WeakKeyDictionary()

    def note_plan(self, num_bytes: int) -> None:
        """Take note of what a sharding plan leaves of its budget; a job is told when it takes more, and goes on."""
        limits = [num_bytes] if self._max_growth_bytes is None else [num_bytes, self._max_growth_bytes]
        self._max_growth_bytes = min(limits)

    def charge(self, scratchpad: Scratchpad) -> None:
        """Count a scratchpad, as large as the sharding plan says it is."""
        self._planned_bytes[scratchpad] = scratchpad.num_bytes

    def refusal(self, num_bytes: int) -> str:
        """Why a scratchpad may not grow by so many bytes, or nothing."""
        if self.max_bytes is not None and self._taken_bytes + num_bytes > self.max_bytes:
            return f"may not take {num_bytes:,} bytes more: max_scratchpad_bytes is {self.max_bytes:,}"
        return ""

    @property
    def bytes_beyond_plan(self) -> int:
        """By how much scratchpads have grown beyond what their sharding plan left of its budget."""
        if self._max_growth_bytes is None:
            return 0
        grown = self._taken_bytes - sum(self._planned_bytes.values())
        return max(0, grown - self._max_growth_bytes)

    @property
    def _taken_bytes(self) -> int:
        return sum(scratchpad.num_bytes for scratchpad in self._planned_bytes)


@dataclass(frozen=True)
class ScratchpadOptions:
    """What all scratchpad tables of a sharder share; most fields are parameters of the sharders, which explain them.

    `lookahead` is what the sharding plan was made for, if it says so. `load_factors` are slots per row of each
    scratchpad table of a collection, by name; the sharder adds them.
    """

    table_dir: str | None = None
    overlap: bool = True
    host_access: str = "direct"
    on_full: str = "grow"
    budget: ScratchpadBudget = field(default_factory=ScratchpadBudget)
    half_life: float = HALF_LIFE
    out_of_range_ids: str = "error"
    ram_budget: RamBudget = field(default_factory=RamBudget)
    lookahead: int | None = None
    load_factors: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.table_dir is not None:  # tables are made later, when the job may have changed its working directory
            object.__setattr__(self, "table_dir", os.path.abspath(self.table_dir))
        if self.host_access not in HOST_ACCESSES:
            raise ConfigError(f"host_access is {self.host_access!r}, it must be one of {', '.join(HOST_ACCESSES)}.")
        if self.on_full not in WAYS_WHEN_FULL:
            raise ConfigError(f"on_full is {self.on_full!r}, it must be one of {', '.join(WAYS_WHEN_FULL)}.")
        if self.out_of_range_ids not in WAYS_OUT_OF_RANGE:
            raise ConfigError(
                f"out_of_range_ids is {self.out_of_range_ids!r}, it must be one of {', '.join(WAYS_OUT_OF_RANGE)}."
            )
        if not self.half_life > 0:
            raise ConfigError(f"half_life is {self.half_life}, it must be a positive number of batches.")

    def make_storage(self, ops: SlotOps) -> TableStorage:
        """Where host tables come from."""
        if self.table_dir is not None:
            return MappedStorage(self.table_dir, self.ram_budget)
        is_direct = self.host_access == "direct" and not isinstance(ops, TorchOps)
        return PageLockedStorage() if is_direct else RamStorage()

    def make_slot_ops(self, device: torch.device) -> SlotOps:
        """What plans, and moves rows in place."""
        if device.type == "cpu":
            return TorchOps()
        try:
            triton_ops, cuda_graph = (
                importlib.import_module(f"torchrec_scratchpipe.core.{name}") for name in ("triton_ops", "cuda_graph")
            )
        except ImportError as error:
            logger.warning("Triton cannot be imported (%s): Plan waits for the device, and rows are staged", error)
            return TorchOps()
        ops: SlotOps = triton_ops.TritonOps(cuda_graph.CudaGraph)
        return ops


def make_ram_budget(gb: float) -> RamBudget:
    """What a user allows for rows of tables on a disk. Raises ConfigError."""
    if not (isinstance(gb, int | float) and 0 < gb < math.inf):
        raise ConfigError(f"ram_budget_gb is {gb!r}, it must be a number of GiB above 0.")
    return RamBudget(int(gb * 1024**3))


def warn_of_cache_settings(names: str, settings: Mapping[str, Any]) -> None:
    """Say which settings of FBGEMM's cache have no effect."""
    ignored = sorted(CACHE_SETTINGS & settings.keys() - {"cache_load_factor", "prefetch_pipeline"})
    if ignored:
        logger.warning("tables %s: %s set FBGEMM's cache and have no effect on a scratchpad", names, ", ".join(ignored))


def warn_of_ignored_settings(config: GroupedEmbeddingConfig, fused_params: dict[str, Any], device_type: str) -> None:
    """Say which settings of the user have no effect."""
    names = ", ".join(table.name for table in config.embedding_tables)
    warn_of_cache_settings(names, fused_params)
    ignored = sorted(name for name in IGNORED_ON_CPU if fused_params.get(name)) if device_type == "cpu" else []
    if ignored:
        logger.warning("tables %s: FBGEMM's CPU kernels ignore %s, with any sharder", names, ", ".join(ignored))


def optimizer_states(
    config: GroupedEmbeddingConfig, fused_params: dict[str, Any], device_type: str
) -> tuple[OptimizerState, ...]:
    """The states that travel with each row of a group. Raises ConfigError."""
    names = ", ".join(table.name for table in config.embedding_tables)
    is_cpu = device_type == "cpu"
    # On a CPU FBGEMM's own kernels have none of these either.
    or_fused = "" if is_cpu else ", or compute kernel fused"
    if data_type_to_sparse_type(config.data_type) not in ROW_PRECISIONS:
        where = "on a CPU, by any compute kernel" if is_cpu else "in a scratchpad"
        raise ConfigError(
            f"tables {names}: data_type {config.data_type.value} is not supported {where}. Use DataType.FP32 or "
            f"DataType.FP16{or_fused}."
        )
    optimizer = fused_params.get("optimizer", EmbOptimType.EXACT_SGD)
    _check_optimizer(names, optimizer, is_cpu=is_cpu)
    if fused_params.get("use_rowwise_bias_correction"):
        raise ConfigError(
            f"tables {names}: use_rowwise_bias_correction keeps a counter per row that cannot travel with it yet. "
            f"Leave it out{or_fused}."
        )
    decay_mode = fused_params.get("weight_decay_mode", WeightDecayMode.NONE)
    if decay_mode not in (WeightDecayMode.NONE, WeightDecayMode.L2, WeightDecayMode.DECOUPLE):
        raise ConfigError(
            f"tables {names}: weight_decay_mode {decay_mode} changes rows that a batch does not use. Use NONE, L2 or "
            "DECOUPLE, or compute kernel fused."
        )
    dtypes = fused_params.get("optimizer_state_dtypes") or {}
    return tuple(
        dataclasses.replace(state, dtype=dtypes[state.buffer].as_dtype()) if state.buffer in dtypes else state
        for state in OPTIMIZER_STATES[optimizer]
    )


def _check_optimizer(table_names: str, optimizer: EmbOptimType, *, is_cpu: bool) -> None:
    supported = CPU_OPTIMIZERS if is_cpu else tuple(OPTIMIZER_STATES)
    if optimizer in supported:
        return
    has_kernel = not is_cpu or optimizer in STOCK_CPU_OPTIMIZERS
    reason = "keeps state that cannot travel" if has_kernel else "has no kernel on a CPU, scratchpad or not"
    kinds = ", ".join(sorted(kind.name for kind in supported))
    raise ConfigError(
        f"tables {table_names}: optimizer {optimizer} {reason}. Use one of {kinds}, or "
        f"{'compute kernel fused' if has_kernel else 'a GPU'}."
    )


def tables_by_width(config: GroupedEmbeddingConfig, whole: AbstractSet[int]) -> list[list[int]]:
    """Table indices of each pool; shards of one table must end up side by side. Raises ConfigError."""
    by_width: dict[int, list[int]] = {}
    widths_of_name: dict[str, set[int]] = {}
    for index, table in enumerate(config.embedding_tables):
        if index in whole:
            continue
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


def row_layout(dim: int, dtype: torch.dtype, states: Iterable[OptimizerState]) -> RowLayout:
    """What a row consists of that an optimizer of FBGEMM updates."""
    return RowLayout(dim, dtype, tuple(StateSpec(state.buffer, state.is_rowwise, state.dtype) for state in states))


def num_slots_of(load_factor: float, num_rows: int) -> int:
    """How many slots a table, or a shard of it, brings to its pool."""
    return max(math.ceil(load_factor * num_rows), min(MIN_SLOTS_PER_TABLE, num_rows))


def check_load_factor(table_name: str, load_factor: float) -> float:
    """Refuse what cannot be a share of a table. Raises ConfigError."""
    if not 0.0 < load_factor <= 1.0:  # false for NaN too
        raise ConfigError(
            f"table {table_name}: load_factor is {load_factor}, it must lie in (0, 1]. Set "
            "CacheParams(load_factor=...) in the table's ParameterConstraints."
        )
    return float(load_factor)
