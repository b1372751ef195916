# SPDX-License-Identifier: BSD-3-Clause
"""TorchRec's planner, which sizes scratchpads within a memory budget, and knows scratchpad tables on a CPU too."""

import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.collective_utils import invoke_on_rank_and_broadcast_result
from torchrec.distributed.embedding_sharding import USE_ONE_TBE_PER_TABLE
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner
from torchrec.distributed.planner.types import (
    Enumerator,
    ParameterConstraints,
    Partitioner,
    Perf,
    PerfModel,
    PlanLoader,
    PlannerError,
    PlannerErrorType,
    Proposer,
    ShardingOption,
    Stats,
    Storage,
    StorageReservation,
)
from torchrec.distributed.types import CacheParams, EmbeddingModuleShardingPlan, ModuleSharder, ShardingPlan
from torchrec.distributed.utils import optimizer_type_to_emb_opt_type
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_scratchpipe.collection import warn_of_stock_sharder
from torchrec_scratchpipe.enumerator import FUSED, SCRATCHPAD, ScratchpadEnumerator
from torchrec_scratchpipe.errors import ConfigError, MeasurementError
from torchrec_scratchpipe.memory import PoolDemand
from torchrec_scratchpipe.options import (
    MIN_SLOTS_PER_TABLE,
    OPTIMIZER_STATES,
    PlannedCacheParams,
    check_load_factor,
)
from torchrec_scratchpipe.plan_report import PlanReport, RankReport, as_size, device_bytes_of, table_reports
from torchrec_scratchpipe.reuse import Floats, Reuse
from torchrec_scratchpipe.sharder import serves_scratchpads
from torchrec_scratchpipe.sizing import ShardToSize, SizedTable, TableToSize, size_tables
from torchrec_scratchpipe.spelling import did_you_mean, few
from torchrec_scratchpipe.working_set import (
    WorkingSets,
    check_count,
    check_number,
    configs_of,
    has_tables,
    table_configs,
)

__all__ = ["Advice", "ScratchPipeShardingPlanner"]

logger: logging.Logger = logging.getLogger(__name__)

DEFAULT_LOOKAHEAD = 2
# A table that takes more of all memory than this share of one rank's part is spread over all ranks.
ROW_WISE_ABOVE = 0.1
# Row blocks are not looked up equally often; so many standard deviations are added to a block's working set.
BLOCK_DEVIATIONS = 4.0


class Advice:
    """How a user sets what messages ask for. A command, whose settings have other names, has a subclass of it."""

    can_constrain = True  # whether constraints can be given

    def budget(self, setting: str, num_bytes: int) -> str:
        """The way out where memory is short.

        Args:
            setting: `scratchpad_bytes`, `hbm_cap` or `ddr_cap`.
            num_bytes: The least that would do.

        Returns:
            What to do.
        """
        return f"set {setting} to at least {num_bytes:,} bytes ({as_size(num_bytes)})"


class ScratchPipeShardingPlanner(EmbeddingShardingPlanner):
    """Stock planner that sizes scratchpads, given what the batches use, and places scratchpad tables on a CPU too.

    With `working_sets` it needs no constraint. Large tables are spread by rows over all ranks, the others placed as stock
    places them; each scratchpad gets at least the rows of the batches in flight, what is left of the budget goes where a
    byte saves most misses, and tables that fit whole become `fused`. A table whose constraints name a kernel, a sharding
    type or a load factor gets that. :attr:`report` says what every table got and what it will miss.

    Without `working_sets` a table is a scratchpad table when its constraints name the compute kernel `fused_uvm_caching`;
    `cache_params` gives its load factor, and nothing is sized. On CUDA this is stock TorchRec. On a CPU, where stock offers
    `fused` alone, such tables are planned as if they were `fused` and then renamed, so every table gets the sharding type
    that stock would choose; row-wise and its kin are considered only where a scratchpad table's constraints ask for them,
    and a table with load factor 1 stays `fused`, since it fits.

    Args:
        topology: As stock. Its `hbm_cap`, less the storage reservation, is the budget of each rank.
        batch_size: As stock; with working sets theirs, which is the default.
        enumerator: As stock. On a CPU, and with working sets, it is wrapped: scratchpad tables are offered under the kernel
            and the sharding types that can be planned, and what its own constraints say of them is honoured.
        storage_reservation: As stock.
        proposer: As stock.
        partitioner: As stock; with working sets, by default one that balances host memory and lookups.
        performance_model: As stock.
        stats: As stock.
        constraints: As stock.
        debug: As stock.
        callbacks: As stock; they run before scratchpads are sized and get their final kernel name.
        timeout_seconds: As stock.
        plan_loader: As stock.
        working_sets: What the batches use; see :func:`measure_working_set`.
        lookahead: As the pipeline will have it. By default what was measured, or 1 where no more fits; then
            :attr:`lookahead` says what to give the pipeline.
        scratchpad_bytes: Budget of each rank on a CPU: RAM for scratchpads, and for tables kept whole instead. On CUDA it
            lowers what the topology allows.

    Raises:
        ConfigError: Constraints contradict each other or cannot be served, or a setting is missing or makes no sense.
        MeasurementError: Working sets are of another batch size; or, in :meth:`plan`, missing, or those of other tables.
        PlannerError: In :meth:`plan`, before anything is allocated: the budget is too small; says what would do.
    """

    advice = Advice()
    _enumerator: Enumerator

    def __init__(
        self,
        topology: Topology | None = None,
        batch_size: int | None = None,
        enumerator: Enumerator | None = None,
        storage_reservation: StorageReservation | None = None,
        proposer: Proposer | list[Proposer] | None = None,
        partitioner: Partitioner | None = None,
        performance_model: PerfModel | None = None,
        stats: Stats | list[Stats] | None = None,
        constraints: dict[str, ParameterConstraints] | None = None,
        debug: bool = True,
        callbacks: list[Callable[[list[ShardingOption]], list[ShardingOption]]] | None = None,
        timeout_seconds: int | None = None,
        plan_loader: PlanLoader | None = None,
        *,
        working_sets: WorkingSets | None = None,
        lookahead: int | None = None,
        scratchpad_bytes: int | None = None,
    ) -> None:
        _check_numbers(batch_size, lookahead, scratchpad_bytes)
        choices = {name: _choice_of(name, constraint) for name, constraint in (constraints or {}).items()}
        if working_sets is not None:  # stock passes over what contradicts itself
            for name, constraint in (constraints or {}).items():
                _check_choice(name, constraint)
            batch_size = _batch_size_of(working_sets, batch_size)
            partitioner = partitioner or _LoadPartitioner()
        super().__init__(
            topology=topology,
            batch_size=batch_size,
            enumerator=enumerator,
            storage_reservation=storage_reservation,
            proposer=proposer,
            partitioner=partitioner,
            performance_model=performance_model,
            stats=stats,
            constraints=constraints,
            debug=debug,
            callbacks=[*(callbacks or []), self._finish],
            timeout_seconds=timeout_seconds,
            plan_loader=plan_loader,
        )
        self.report: PlanReport | None = None
        self._sizer: _Sizer | None = None
        self._names: _CpuNames | None = None
        is_cpu = self._topology.compute_device == "cpu"
        if working_sets is not None:
            _check_topology(self._topology, scratchpad_bytes)
            self._lookaheads = [lookahead] if lookahead is not None else _lookaheads_to_try(working_sets.lookahead)
            self._sizer = _Sizer(self._topology, choices, working_sets, scratchpad_bytes, self.advice)
            self._enumerator = ScratchpadEnumerator(self._enumerator, self._sizer, is_cpu=is_cpu)
        elif scratchpad_bytes is not None:
            raise ConfigError(
                "scratchpad_bytes needs working_sets, which say where the bytes are worth most. Measure them with "
                "measure_working_set(), or set load factors instead."
            )
        elif is_cpu:
            self._names = _CpuNames(choices)
            self._enumerator = ScratchpadEnumerator(self._enumerator, self._names, is_cpu=True)

    @property
    def lookahead(self) -> int:
        """What the last plan was made for, and the pipeline should be given."""
        return self._sizer.lookahead if self._sizer is not None else DEFAULT_LOOKAHEAD

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        """As stock; with working sets, scratchpads are sized and :attr:`report` is set.

        Args:
            module: As stock.
            sharders: As stock.

        Returns:
            As stock.

        Raises:
            ConfigError: Constraints name a table that the model does not have, which stock would pass over; or no sharder takes
                the tables.
            PlannerError: No plan fits; with the smallest budget, and what would fit instead.
        """
        _check_names(self._constraints or {}, module, sharders)
        plan = self._plan(module, sharders)
        _warn_of_stock_sharders(plan, module, sharders)
        return plan

    def _plan(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        if self._sizer is None:
            return super().plan(module, sharders)
        self._sizer.check(module)
        self.report = None
        for lookahead in self._lookaheads:
            self._sizer.set_lookahead(lookahead)
            try:
                plan = super().plan(module, sharders)
            except PlannerError as error:
                if lookahead == self._lookaheads[-1]:
                    raise self._explained(error, module, sharders) from error
            else:
                if self.report is None:  # stock gives an empty plan
                    raise _no_sharder(module)
                logger.info("scratchpads:\n%s", self.report)
                return plan
        raise AssertionError("at least one lookahead is tried")

    def collective_plan(
        self,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]] | None = None,
        pg: dist.ProcessGroup | None = None,
    ) -> ShardingPlan:
        """As stock: rank 0 plans, with its working sets; every rank then has its plan, lookahead and report.

        Args:
            module: As stock.
            sharders: As stock.
            pg: As stock.

        Returns:
            As stock.
        """
        plan = super().collective_plan(module, sharders, pg)
        if self._sizer is not None:  # ranks that look ahead differently would wait for each other for ever
            group = pg or dist.group.WORLD
            self._sizer.lookahead, self.report = invoke_on_rank_and_broadcast_result(
                group, 0, lambda: (self.lookahead, self.report)
            )
        return plan

    def _finish(self, options: list[ShardingOption]) -> list[ShardingOption]:
        if self._sizer is None:
            return self._names.rename(options) if self._names is not None else options
        reserved = self._storage_reservation.last_reserved_topology or self._topology
        self.report = self._sizer.size(options, reserved, self._batch_size)
        return options

    def _explained(
        self, error: PlannerError, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]
    ) -> PlannerError:
        """What would have fitted, found by planning without a limit."""
        assert self._sizer is not None
        if self._sizer.shortage is None and error.error_type not in _ABOUT_STORAGE:
            return error
        self._sizer.set_lookahead(self._lookaheads[0])
        options = self._place_without_limit(module, sharders)
        if options is None:
            return error
        reserved = self._storage_reservation.last_reserved_topology or self._topology
        return self._sizer.error(options, reserved, self._batch_size)

    def _place_without_limit(
        self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]
    ) -> list[ShardingOption] | None:
        assert self._sizer is not None
        topology = copy.deepcopy(self._topology)
        for device in topology.devices:
            device.storage = Storage(hbm=1 << 60, ddr=1 << 60)
        proposal = _cheapest_options(self._enumerator.enumerate(module, sharders))
        try:
            return list(self._partitioner.partition(proposal, topology))
        except PlannerError:
            return None


_ABOUT_STORAGE = (
    PlannerErrorType.INSUFFICIENT_STORAGE,
    PlannerErrorType.STRICT_CONSTRAINTS,
    PlannerErrorType.PARTITION,
)


@dataclasses.dataclass(frozen=True)
class _Choice:
    """What a table's constraints leave open."""

    load_factor: float | None = None  # as given
    may_have_slots: bool = True
    may_stay_whole: bool = True
    has_kernels: bool = False
    sharding_types: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Need:
    """Least device memory of a placement."""

    bytes_of_rank: Floats  # [W]
    table_name: str  # the one that needs most where most is needed
    table_bytes: float
    host_bytes_of_rank: Floats


class _Sizer:
    """Between TorchRec's sharding options and :func:`size_tables`; storage of an option is the least that it takes."""

    def __init__(
        self,
        topology: Topology,
        choices: Mapping[str, _Choice],
        working_sets: WorkingSets,
        scratchpad_bytes: int | None,
        advice: Advice,
    ) -> None:
        self._topology = topology
        self._choices = choices
        self._advice = advice
        self._learned: dict[str, _Choice] = {}  # of what the enumerator leaves
        self._working_sets = working_sets
        self._scratchpad_bytes = scratchpad_bytes
        self._is_cpu = topology.compute_device == "cpu"
        self.alias = FUSED if self._is_cpu else SCRATCHPAD
        num_steps = topology.world_size / working_sets.world_size
        self._reuses = {name: working_set.reuse.scaled(num_steps) for name, working_set in working_sets.items()}
        self._row_wise: set[str] = set()
        self._optimizers: dict[str, EmbOptimType] = {}
        self._fused_params: dict[str, Mapping[str, Any]] = {}  # of each table's sharder
        self._configs: dict[str, BaseEmbeddingConfig] = {}
        self.lookahead = working_sets.lookahead
        self.shortage: Floats | None = None
        self._share_of_batch = 1.0

    def set_lookahead(self, lookahead: int) -> None:
        """Plan for this one; what was measured for another holds for the misses, about."""
        self.lookahead = lookahead
        self.shortage = None

    def choice(self, name: str) -> _Choice:
        """What is open for a table."""
        return self._learned.get(name) or self._choices.get(name, _Choice())

    def forget(self) -> None:
        """What the enumerator leaves open may be different for another model."""
        self._learned = {}

    def learn(self, name: str, kernels: set[str]) -> bool:
        """Take note of kernels that the enumerator's own constraints exclude."""
        before = self.choice(name)
        self._learned[name] = dataclasses.replace(
            before,
            may_have_slots=before.may_have_slots and SCRATCHPAD in kernels,
            may_stay_whole=before.may_stay_whole and FUSED in kernels,
        )
        return self._learned[name] != before

    def has_slots(self, name: str) -> bool:
        """Whether it is for this class to say what the table takes."""
        return self.choice(name).may_have_slots

    def sharding_types(self, name: str) -> Sequence[str]:
        """As constrained."""
        return self.choice(name).sharding_types

    def preferred_type(self, name: str) -> str | None:
        """The largest tables are spread over all ranks."""
        return (ShardingType.ROW_WISE if name in self._row_wise else ShardingType.TABLE_WISE).value

    def check(self, module: nn.Module) -> None:
        """Compare the working sets with the model's tables.

        Args:
            module: The model.

        Raises:
            MeasurementError: They are others.
        """
        configs = self._configs = {config.name: config for config in table_configs(module)}
        for name, reuse in self._reuses.items():
            if name not in configs:
                raise MeasurementError(
                    f"working_sets have a table {name}, the model has {few(configs)}.{did_you_mean(name, configs)} Measure "
                    "this model."
                )
            if reuse.num_rows != configs[name].num_embeddings:
                raise MeasurementError(
                    f"table {name}: working_sets were measured for {reuse.num_rows:,} rows, the model's table has "
                    f"{configs[name].num_embeddings:,}. Measure this model."
                )
        values = {name: config.num_embeddings * config.embedding_dim for name, config in configs.items()}
        least = ROW_WISE_ABOVE * sum(values.values()) / self._topology.world_size
        can_spread = self._topology.world_size > 1 and not self._is_cpu
        self._row_wise = {name for name, value in values.items() if can_spread and value > least}

    def estimate(self, options: list[ShardingOption], sharders: Sequence[ModuleSharder[nn.Module]]) -> None:
        """Put the least that each option takes where TorchRec's partitioner looks."""
        self._note_optimizers(options, sharders)
        for option in options:
            if self.has_slots(option.name):
                if option.name not in self._reuses:
                    way_out = ', or constrain it to compute_kernels=["fused"]' if self._advice.can_constrain else ""
                    raise MeasurementError(
                        f"table {option.name}: working_sets say nothing of it. Measure all tables{way_out}."
                    )
                (sized,), _ = size_tables(self._tables_to_size([option]), np.zeros(self._topology.world_size))
                self._set_storage(option, sized)

    def _note_optimizers(self, options: Sequence[ShardingOption], sharders: Sequence[ModuleSharder[nn.Module]]) -> None:
        """Find each table's optimizer, where TorchRec looks for it."""
        by_module = {sharder.module_type: sharder for sharder in sharders}
        for option in options:
            classes = getattr(option.tensor, "_optimizer_classes", None)
            sharder = by_module.get(type(option.module[1]))
            self._fused_params[option.name] = getattr(sharder, "fused_params", None) or {}
            given = self._fused_params[option.name].get("optimizer", EmbOptimType.EXACT_SGD)
            kind = optimizer_type_to_emb_opt_type(classes[0]) if classes else given
            self._optimizers[option.name] = kind if kind in OPTIMIZER_STATES else EmbOptimType.EXACT_SGD

    def need(self, options: Sequence[ShardingOption]) -> _Need:
        """The least that a placement takes."""
        tables = self._tables_to_size([option for option in options if self.has_slots(option.name)])
        sized, left = size_tables(tables, -self._bytes_of_others(options))
        rank = int(np.argmin(left))
        of_table = {
            table.table.name: sum(device_bytes_of(table, shard) for shard in table.table.shards if shard.rank == rank)
            for table in sized
        }
        name = max(of_table, key=lambda name: of_table[name])
        return _Need(-left, name, of_table[name], self._host_bytes(sized, options))

    def error(self, options: Sequence[ShardingOption], reserved: Topology, batch_size: int | None) -> PlannerError:
        """Say what a placement needs at least, and what would do."""
        lookahead, need = self.lookahead, self.need(options)
        budgets = self._budgets(reserved)
        host = np.array([device.storage.ddr for device in self._topology.devices], dtype=np.float64)
        if np.all(need.bytes_of_rank <= budgets):
            return self._host_error(need.host_bytes_of_rank, host)
        rank = int(np.argmax(need.bytes_of_rank - budgets))
        is_limit = self._is_cpu or budgets[rank] < reserved.devices[rank].storage.hbm
        total = 0.0 if is_limit else self._topology.devices[rank].storage.hbm
        # A reservation is a share of the device or a number of bytes; with the share, both are enough.
        kept_back = 0.0 if is_limit else 1 - reserved.devices[rank].storage.hbm / total
        smallest = math.ceil(need.bytes_of_rank.max() / max(1 - kept_back, 1e-3))
        ways = [self._advice.budget("scratchpad_bytes" if is_limit else "hbm_cap", smallest)]
        if lookahead > 1:
            self.set_lookahead(1)
            if np.all(self.need(options).bytes_of_rank <= budgets):
                ways.append(f"lower lookahead from {lookahead} to 1")
            self.set_lookahead(lookahead)
        fitting = self._fitting_batch_size(options, budgets, batch_size or 0)
        if fitting >= 1:
            ways.append(f"lower the batch size from {batch_size} to about {fitting}")
        return PlannerError(
            f"rank {rank}: batches in flight with lookahead {lookahead} need {as_size(need.bytes_of_rank[rank])} of device "
            f"memory, the budget is {as_size(budgets[rank])}"
            + (f" ({kept_back:.0%} of {as_size(total)} are reserved)" if kept_back > 0 else "")
            + f". Table {need.table_name} alone needs {as_size(need.table_bytes)}. {_do(ways)}",
            PlannerErrorType.INSUFFICIENT_STORAGE,
        )

    def _host_error(self, needed: Floats, there: Floats) -> PlannerError:
        rank = int(np.argmax(needed - there))
        ways = [self._advice.budget("ddr_cap", math.ceil(needed.max())), "add ranks"]
        if self._is_cpu and self._topology.world_size > 1 and self._advice.can_constrain:
            ways.append("constrain the largest tables to row_wise sharding")
        return PlannerError(
            f"rank {rank}: tables need {as_size(needed[rank])} of host memory, the topology has {as_size(there[rank])}. "
            f"{_do(ways)}",
            PlannerErrorType.INSUFFICIENT_STORAGE,
        )

    def _fitting_batch_size(self, options: Sequence[ShardingOption], budgets: Floats, batch_size: int) -> int:
        """The largest share of a batch that fits, in 32nds, as a batch size; 0 for none."""
        all_reuses, self._share_of_batch = self._reuses, 1.0
        lowest, highest = 0, 32
        while highest - lowest > 1:
            middle = (lowest + highest) // 2
            self._share_of_batch = middle / 32
            self._reuses = {name: reuse.scaled(self._share_of_batch) for name, reuse in all_reuses.items()}
            if np.all(self.need(options).bytes_of_rank <= budgets):
                lowest = middle
            else:
                highest = middle
        self._reuses, self._share_of_batch = all_reuses, 1.0
        return batch_size * lowest // 32

    def size(self, options: Sequence[ShardingOption], reserved: Topology, batch_size: int | None) -> PlanReport:
        """Give every table of a placement its final kernel, load factor and storage."""
        sized_options = [option for option in options if self.has_slots(option.name)]
        budgets, others = self._budgets(reserved), self._bytes_of_others(options)
        sized, left = size_tables(self._tables_to_size(sized_options), budgets - others)
        if left.min() < 0:
            self.shortage = left
            raise PlannerError("the scratchpads of a rank do not fit", PlannerErrorType.INSUFFICIENT_STORAGE)
        for option, table in zip(sized_options, sized, strict=True):
            option.compute_kernel = FUSED if table.is_whole else SCRATCHPAD
            given = option.cache_params or CacheParams()
            # Half a slot less, so that a shard's `ceil(load_factor * rows)` is what was meant.
            load_factor = None if table.is_whole else (table.num_slots - 0.5) / table.table.reuse.num_rows
            option.cache_params = None if table.is_whole else self._planned(given, load_factor, int(left.min()))
            self._set_storage(option, table)
        reports, bus_bytes = table_reports(
            [(table, option.sharding_type) for option, table in zip(sized_options, sized, strict=True)]
        )
        host = self._host_bytes(sized, options)
        used = budgets - others - left
        return PlanReport(
            tables=tuple(reports),
            ranks=tuple(
                RankReport(budgets[rank], used[rank], others[rank], host[rank], bus_bytes.get(rank, 0.0))
                for rank in range(self._topology.world_size)
            ),
            lookahead=self.lookahead,
            num_batches_seen_ahead=self._working_sets.num_batches_seen_ahead,
            batch_size=batch_size or 0,
            step_ms=_step_ms(options, self._topology.world_size),
            bus_bytes_per_ms=float(self._topology.hbm_to_ddr_mem_bw),
        )

    def _planned(self, given: CacheParams, load_factor: float | None, growth_bytes: int) -> PlannedCacheParams:
        settings = {field.name: getattr(given, field.name) for field in dataclasses.fields(CacheParams)}
        settings |= {"load_factor": load_factor, "stats": None}
        return PlannedCacheParams(**settings, lookahead=self.lookahead, growth_bytes=growth_bytes)

    def _tables_to_size(self, options: Sequence[ShardingOption]) -> list[TableToSize]:
        groups = [self._kernel_group(option) for option in options]
        widths_of_group: dict[Hashable, set[int]] = {}
        for option, group in zip(options, groups, strict=True):
            widths_of_group.setdefault(group, set()).update(shard.size[1] for shard in option.shards)
        return [
            self._table_to_size(option, group, len(widths_of_group[group]))
            for option, group in zip(options, groups, strict=True)
        ]

    def _table_to_size(self, option: ShardingOption, group: Hashable, num_pools: int) -> TableToSize:
        reuse, choice = self._reuses[option.name], self.choice(option.name)
        shards = tuple(
            self._shard_to_size(option, index, reuse, group, num_pools) for index in range(len(option.shards))
        )
        smallest_share = min(shard.share for shard in shards if shard.share > 0)
        window = reuse.window(self.lookahead + 1).max
        if smallest_share < 1.0:
            window += BLOCK_DEVIATIONS * math.sqrt(window / smallest_share)
        min_slots = min(reuse.num_rows, max(math.ceil(window), MIN_SLOTS_PER_TABLE))
        if choice.load_factor is not None:
            min_slots = self._slots_as_given(option.name, choice.load_factor, reuse)
        is_whole = choice.load_factor == 1.0
        return TableToSize(
            name=option.name,
            reuse=reuse,
            min_slots=min_slots,
            shards=shards,
            may_have_slots=not is_whole,
            may_have_more=choice.load_factor is None,
            may_stay_whole=is_whole or (choice.may_stay_whole and choice.load_factor is None),
            group=group,
        )

    def _slots_as_given(self, name: str, load_factor: float, reuse: Reuse) -> int:
        num_slots = max(math.ceil(load_factor * reuse.num_rows), min(MIN_SLOTS_PER_TABLE, reuse.num_rows))
        needed = min(reuse.num_rows, reuse.window(1).max)
        if num_slots < needed:
            raise PlannerError(
                f"table {name}: load_factor {load_factor} gives {num_slots:,} slots, one batch was measured to use "
                f"{needed:,.0f} rows. Set it to at least {needed / reuse.num_rows:.6f}, or leave it out.",
                PlannerErrorType.STRICT_CONSTRAINTS,
            )
        return num_slots

    def _shard_to_size(
        self, option: ShardingOption, index: int, reuse: Reuse, group: Hashable, num_pools: int
    ) -> ShardToSize:
        num_rows, num_cols = option.shards[index].size
        share = num_rows / reuse.num_rows
        states = OPTIMIZER_STATES[self._optimizers[option.name]]
        row_bytes = num_cols * option.tensor.element_size() + sum(
            state.dtype.itemsize * (1 if state.is_rowwise else num_cols) for state in states
        )
        rank = option.shards[index].rank
        # A row-wise shard gives partial sums for the bags of all ranks.
        num_samples = option.batch_size * self._topology.world_size * self._share_of_batch
        num_outputs = num_samples if option.is_pooled else reuse.num_ids * share
        output_bytes = 0.0 if self._is_cpu else 2.0 * num_outputs * num_cols * option.tensor.element_size()
        return ShardToSize(
            rank=rank if rank is not None and rank >= 0 else index % self._topology.world_size,
            share=share,
            demand=PoolDemand(
                num_rows=num_rows,
                row_bytes=row_bytes,
                num_ids=reuse.num_ids * share,
                num_unique=reuse.window(1).mean * share,
                lookahead=self.lookahead,
                num_batches_seen_ahead=self._working_sets.num_batches_seen_ahead,
                is_cpu=self._is_cpu,
                output_bytes=output_bytes * option.num_inputs,
                num_bags=0.0 if self._is_cpu else num_samples * option.num_inputs,
                num_pools=num_pools,
            ),
            pool=(num_cols, group),
        )

    def _kernel_group(self, option: ShardingOption) -> Hashable:
        """Tables that agree in this get one kernel of TorchRec; those of equal width then share slots.

        Source:
            torchrec `group_tables` and `add_params_from_parameter_sharding` (1.8.0).
        """
        config, cache = self._configs[option.name], option.cache_params or CacheParams()
        params = {**self._fused_params[option.name], **getattr(option.tensor, "_optimizer_kwargs", [{}])[0]}
        return (
            option.path,
            option.sharding_type,
            config.data_type,
            getattr(config, "pooling", None),
            getattr(config, "stash_weights", False),
            option.has_feature_processor,
            self._optimizers[option.name],
            repr(sorted(params.items(), key=lambda item: item[0])),
            option.name if params.get(USE_ONE_TBE_PER_TABLE) else None,
            (cache.algorithm, cache.reserved_memory, cache.precision, repr(cache.multipass_prefetch_config)),
            (option.enforce_hbm, option.stochastic_rounding, option.bounds_check_mode, option.output_dtype),
        )

    def _set_storage(self, option: ShardingOption, sized: SizedTable) -> None:
        for shard, to_size in zip(option.shards, sized.table.shards, strict=True):
            device = math.ceil(device_bytes_of(sized, to_size))
            host = 0 if sized.is_whole else math.ceil(to_size.demand.host_bytes)
            shard.storage = Storage(hbm=0, ddr=device + host) if self._is_cpu else Storage(hbm=device, ddr=host)

    def _budgets(self, reserved: Topology) -> Floats:
        limit = self._scratchpad_bytes
        if self._is_cpu:
            return np.full(self._topology.world_size, float(limit or 0))
        budgets = np.array([device.storage.hbm for device in reserved.devices], dtype=np.float64)
        return budgets if limit is None else np.minimum(budgets, limit)

    def _bytes_of_others(self, options: Sequence[ShardingOption]) -> Floats:
        """[W] device memory of tables that have no choice; on a CPU they are outside the budget."""
        others = np.zeros(self._topology.world_size)
        for option in options:
            if not self.has_slots(option.name) and not self._is_cpu:
                for shard in option.shards:
                    others[shard.rank] += shard.storage.hbm
        return others

    def _host_bytes(self, sized: Sequence[SizedTable], options: Sequence[ShardingOption]) -> Floats:
        host = np.zeros(self._topology.world_size)
        for table in sized:
            for shard in table.table.shards:
                if not table.is_whole:
                    host[shard.rank] += shard.demand.host_bytes
                if self._is_cpu:
                    host[shard.rank] += device_bytes_of(table, shard)
        for option in options:
            if not self.has_slots(option.name):
                for shard in option.shards:
                    host[shard.rank] += shard.storage.ddr
        return host


class _LoadPartitioner(GreedyPerfPartitioner):
    """Stock's, which balances what a table costs in host memory and in lookups instead of TorchRec's time estimate.

    Reading and writing rows is what a scratchpad adds to a step; a rank that does more of it than others is waited for.
    """

    def partition(
        self, proposal: list[ShardingOption], storage_constraint: Topology, *args: Any
    ) -> list[ShardingOption]:
        """As stock."""
        shards = [shard for option in proposal for shard in option.shards]
        perfs = [shard.perf for shard in shards]
        stored = np.array([shard.storage.ddr + shard.storage.hbm for shard in shards], dtype=np.float64)
        looked_up = np.array([perf.total if perf is not None else 0.0 for perf in perfs])
        loads = stored / max(stored.sum(), 1e-9) + looked_up / max(looked_up.sum(), 1e-9)
        for shard, load in zip(shards, loads, strict=True):
            shard.perf = Perf(fwd_compute=float(load), fwd_comms=0.0, bwd_compute=0.0, bwd_comms=0.0)
        try:
            return list(super().partition(proposal, storage_constraint, *args))
        finally:
            for shard, perf in zip(shards, perfs, strict=True):
                shard.perf = perf


class _CpuNames:
    """Plans scratchpad tables as `fused`, which stock can estimate on a CPU, and renames them."""

    alias = FUSED

    def __init__(self, choices: Mapping[str, _Choice]) -> None:
        self._choices = choices
        self._learned: dict[str, bool] = {}

    def forget(self) -> None:
        """Whether an enumerator's own constraints ask for a scratchpad."""
        self._learned = {}

    def learn(self, name: str, kernels: set[str]) -> bool:
        """A table is a scratchpad table if its constraints name no other kernel, or the planner's constraints do."""
        before = self.has_slots(name)
        if SCRATCHPAD not in kernels or FUSED not in kernels:
            self._learned[name] = SCRATCHPAD in kernels
        return self.has_slots(name) != before

    def has_slots(self, name: str) -> bool:
        """Whether constraints ask for a scratchpad."""
        choice = self._choices.get(name, _Choice())
        return self._learned.get(name, choice.has_kernels and choice.may_have_slots)

    def sharding_types(self, name: str) -> Sequence[str]:
        """As constrained."""
        return self._choices.get(name, _Choice()).sharding_types

    def preferred_type(self, name: str) -> str | None:
        """None: stock chooses."""
        return None

    def estimate(self, options: list[ShardingOption], sharders: Sequence[ModuleSharder[nn.Module]]) -> None:
        """Stock's estimates stay."""

    def rename(self, options: list[ShardingOption]) -> list[ShardingOption]:
        """Give scratchpad tables their kernel."""
        for option in options:
            # With a load factor of 1 the table needs no scratchpad, and TorchRec's validation wants less.
            is_partial = option.cache_params is None or option.cache_params.load_factor != 1.0
            if option.compute_kernel == FUSED and is_partial and self.has_slots(option.name):
                option.compute_kernel = SCRATCHPAD
        return options


def _choice_of(name: str, constraint: ParameterConstraints) -> _Choice:
    kernels, sharding_types = constraint.compute_kernels or [], constraint.sharding_types or []
    load_factor = constraint.cache_params.load_factor if constraint.cache_params is not None else None
    may_have_slots = SCRATCHPAD in kernels if kernels else sharding_types != [ShardingType.DATA_PARALLEL.value]
    _check_words(name, "compute_kernels", kernels, [kernel.value for kernel in EmbeddingComputeKernel])
    _check_words(name, "sharding_types", sharding_types, [kind.value for kind in ShardingType])
    if load_factor is not None:
        check_load_factor(name, load_factor)
    return _Choice(
        load_factor=load_factor if may_have_slots else None,
        may_have_slots=may_have_slots,
        may_stay_whole=not kernels or FUSED in kernels,
        has_kernels=bool(kernels),
        sharding_types=tuple(sharding_types),
    )


def _check_words(table_name: str, setting: str, words: Any, known: Sequence[str]) -> None:
    """Stock passes over words that it does not know, and then finds nothing to choose from."""
    if isinstance(words, str):
        raise ConfigError(f"table {table_name}: {setting} is {words!r}, it must be a list. Write [{words!r}].")
    for word in words:
        if word not in known:
            raise ConfigError(f"table {table_name}: {setting} has {word!r}. Use of {', '.join(known)}.")


def _check_numbers(batch_size: int | None, lookahead: int | None, scratchpad_bytes: int | None) -> None:
    if batch_size is not None:
        check_count("batch_size", batch_size, 1)
    if scratchpad_bytes is not None:
        check_number("scratchpad_bytes", scratchpad_bytes)
    if lookahead is not None:
        check_count("lookahead", lookahead, 1)


def _warn_of_stock_sharders(plan: ShardingPlan, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> None:
    """Say which tables are planned for a scratchpad and will get none from the sharder that takes them."""
    last_of_type = {sharder.module_type: sharder for sharder in sharders}
    for path, tables in plan.plan.items():
        sharder = last_of_type.get(type(module.get_submodule(path)))
        if isinstance(tables, EmbeddingModuleShardingPlan) and sharder is not None and not serves_scratchpads(sharder):
            names = [name for name, table in tables.items() if table.compute_kernel == SCRATCHPAD]
            warn_of_stock_sharder(names, f"collection {path}")


def _check_names(
    constraints: Mapping[str, ParameterConstraints], module: nn.Module, sharders: Sequence[ModuleSharder[nn.Module]]
) -> None:
    """Refuse constraints for tables that do not exist."""
    by_type = {sharder.module_type: sharder for sharder in sharders}
    parts = list(module.modules())
    known = {config.name for part in parts for config in configs_of(part)}
    known |= {
        name for part in parts if type(part) in by_type for name in by_type[type(part)].shardable_parameters(part)
    }
    unknown = [name for name in constraints if name not in known]
    if unknown:
        hints = "".join(dict.fromkeys(did_you_mean(name, known) for name in unknown))
        raise ConfigError(
            f"constraints name {'a table' if len(unknown) == 1 else 'tables'} {few(unknown)}, the model has {few(known)}.{hints} Constraints go by the names of tables; stock "
            "would pass over these. Rename them or leave them out."
        )


def _no_sharder(module: nn.Module) -> ConfigError:
    kinds = sorted({type(part).__name__ for part in module.modules() if has_tables(part)})
    return ConfigError(
        f"sharders have none for {', '.join(kinds)}, where the tables are. Give "
        "ScratchPipeEmbeddingBagCollectionSharder() or ScratchPipeEmbeddingCollectionSharder()."
    )


def _check_topology(topology: Topology, scratchpad_bytes: int | None) -> None:
    if topology.compute_device == "cpu" and scratchpad_bytes is None:
        raise ConfigError("working_sets on a CPU need scratchpad_bytes, the RAM that a rank's scratchpads may take.")
    if topology.compute_device != "cpu" and min(device.storage.hbm for device in topology.devices) <= 0:
        raise ConfigError("the topology has no device memory, which is the budget. Set its hbm_cap.")
    if min(device.storage.ddr for device in topology.devices) <= 0:
        raise ConfigError("the topology has no host memory, where scratchpad tables live. Set its ddr_cap.")


def _batch_size_of(working_sets: WorkingSets, batch_size: int | None) -> int:
    """The job's batch size, which must be the measurement's: what batches share cannot be scaled far."""
    measured = working_sets.batch_size
    if batch_size is None and measured is None:
        raise ConfigError(
            "batch_size is missing, and working_sets do not know theirs. Set it to a rank's samples per step."
        )
    if measured is None:
        logger.warning("working_sets do not say of which batch size they are; it is taken to be %s", batch_size)
    elif batch_size is not None and batch_size != measured:
        raise MeasurementError(
            f"working_sets are of batches of {measured:,} samples a rank, batch_size is {batch_size:,}. Measure batches of "
            "that size, or set batch_size to that of the measurement."
        )
    return batch_size or measured or 0


def _check_choice(name: str, constraint: ParameterConstraints) -> None:
    kernels, sharding_types = constraint.compute_kernels or [], constraint.sharding_types or []
    load_factor = constraint.cache_params.load_factor if constraint.cache_params is not None else None
    if SCRATCHPAD in kernels and sharding_types == [ShardingType.DATA_PARALLEL.value]:
        raise ConfigError(
            f"table {name}: constraints ask for {SCRATCHPAD} and for data_parallel sharding, which keeps whole tables on every "
            "rank. Leave one of them out."
        )
    if (
        load_factor is not None
        and kernels
        and not any("caching" in kernel or "key_value" in kernel for kernel in kernels)
    ):
        raise ConfigError(
            f"table {name}: constraints give load_factor {load_factor} and only the kernels {', '.join(kernels)}, which have "
            f"no cache. Add {SCRATCHPAD} to compute_kernels, or leave load_factor out."
        )


def _lookaheads_to_try(measured: int) -> list[int]:
    return list(dict.fromkeys([measured, 1]))


def _cheapest_options(options: Sequence[ShardingOption]) -> list[ShardingOption]:
    """One option per table: the one that TorchRec rates fastest."""
    cheapest: dict[str, ShardingOption] = {}
    for option in options:
        if option.fqn not in cheapest or option.total_perf < cheapest[option.fqn].total_perf:
            cheapest[option.fqn] = option
    return list(cheapest.values())


def _step_ms(options: Sequence[ShardingOption], world_size: int) -> float:
    per_rank = np.zeros(world_size)
    for option in options:
        for shard in option.shards:
            if shard.perf is not None and shard.rank is not None:
                per_rank[shard.rank] += shard.perf.total
    return float(per_rank.max())


def _do(ways: Sequence[str]) -> str:
    return f"{'Do one of' if len(ways) > 1 else 'Do this'}: {'; '.join(ways)}."
