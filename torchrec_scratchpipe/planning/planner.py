# SPDX-License-Identifier: BSD-3-Clause
"""TorchRec's planner, which sizes scratchpads within a memory budget, and knows scratchpad tables on a CPU too."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import nn
from torchrec.distributed.collective_utils import invoke_on_rank_and_broadcast_result
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
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ModuleSharder, ShardingPlan

from torchrec_scratchpipe.errors import ConfigError, MeasurementError
from torchrec_scratchpipe.planning.checks import check_count, check_number, did_you_mean, few
from torchrec_scratchpipe.planning.disk_plan import DiskSettings
from torchrec_scratchpipe.planning.enumerators import FUSED, SCRATCHPAD, ScratchpadEnumerator
from torchrec_scratchpipe.planning.placement import Choice, Sizer, WaysOut
from torchrec_scratchpipe.planning.report import PlanReport
from torchrec_scratchpipe.planning.working_set import WorkingSets, configs_of, has_tables
from torchrec_scratchpipe.sharding.model import refuse_pruning, warn_of_stock_sharder
from torchrec_scratchpipe.sharding.options import check_load_factor
from torchrec_scratchpipe.sharding.sharder import serves_scratchpads

__all__ = ["ScratchPipeShardingPlanner", "WaysOut"]

logger: logging.Logger = logging.getLogger(__name__)

DEFAULT_LOOKAHEAD = 2


class ScratchPipeShardingPlanner(EmbeddingShardingPlanner):
    """Stock planner that sizes scratchpads, given what the batches use, and places scratchpad tables on a CPU too.

    With `working_sets` it needs no constraint. Large tables are spread by rows over all ranks, the others placed as
    stock places them; each scratchpad gets at least the rows of the batches in flight, what is left of the budget goes
    where a byte saves most misses, and tables that fit whole become `fused`. A table whose constraints name a kernel, a
    sharding type or a load factor gets that. :attr:`report` says what every table got and what it will miss.

    Without `working_sets` a table is a scratchpad table when its constraints name the compute kernel
    `fused_uvm_caching`; `cache_params` gives its load factor, and nothing is sized. On CUDA this is stock TorchRec. On
    a CPU, where stock offers `fused` alone, such tables are planned as if they were `fused` and then renamed, so every
    table gets the sharding type that stock would choose; row-wise and its kin are considered only where a scratchpad
    table's constraints ask for them, and a table with load factor 1 stays `fused`, since it fits.

    Args:
        topology: As stock. Its `hbm_cap`, less the storage reservation, is the budget of each rank.
        batch_size: As stock; with working sets theirs, which is the default.
        enumerator: As stock. On a CPU, and with working sets, it is wrapped: scratchpad tables are offered under the
            kernel and the sharding types that can be planned, and what its own constraints say of them is honoured.
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
        scratchpad_bytes: Budget of each rank on a CPU: RAM for scratchpads, and for tables kept whole instead. On CUDA
            it lowers what the topology allows.
        ram_budget_gb: As the sharder will have it, for tables in files (`table_dir`): the report then says what each
            step reads and writes there.
        disk_reads_per_s: Of that disk, as ``torchrec-scratchpipe disk`` measures them: the report then says from
            which step time on nothing waits for the disk.

    Raises:
        ConfigError: Constraints contradict each other or cannot be served, or a setting is missing or makes no sense.
        MeasurementError: Working sets are of another batch size; or, in :meth:`plan`, missing, or those of other
            tables.
        PlannerError: In :meth:`plan`, before anything is allocated: the budget is too small; says what would do.
    """

    ways_out = WaysOut()
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
        ram_budget_gb: float | None = None,
        disk_reads_per_s: float | None = None,
    ) -> None:
        _check_numbers(batch_size, lookahead, scratchpad_bytes)
        disk = _disk_settings(ram_budget_gb, disk_reads_per_s, working_sets)
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
        self._sizer: Sizer | None = None
        self._names: _CpuNames | None = None
        is_cpu = self._topology.compute_device == "cpu"
        if working_sets is not None:
            _check_topology(self._topology, scratchpad_bytes)
            self._lookaheads = [lookahead] if lookahead is not None else _lookaheads_to_try(working_sets.lookahead)
            self._sizer = Sizer(self._topology, choices, working_sets, scratchpad_bytes, self.ways_out, disk)
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
            ConfigError: Constraints name a table that the model does not have, which stock would pass over; or no
                sharder takes the tables.
            PlannerError: No plan fits; with the smallest budget, and what would fit instead.
        """
        _check_names(self._constraints or {}, module, sharders)
        plan = self._plan(module, sharders)
        _check_sharders(plan, module, sharders)
        return plan

    def _plan(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        if self._sizer is None:
            return super().plan(module, sharders)
        self._sizer.check(module)
        self.report = None
        # The most batches ahead first: fewer need fewer slots, so that a plan may fit that did not.
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
        # Memory without end, so that the error can say what would have sufficed.
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


class _LoadPartitioner(GreedyPerfPartitioner):
    """Stock's, which balances what a table costs in host memory and in lookups instead of TorchRec's time estimate.

    Reading and writing rows is what a scratchpad adds to a step; a rank that does more of it than others is waited for.
    """

    def partition(
        self, proposal: list[ShardingOption], storage_constraint: Topology, *args: Any
    ) -> list[ShardingOption]:
        """As stock."""
        # A shard's load: its share of all bytes and its share of all lookups. TorchRec's time stands in its place again
        # afterwards, because reports show it.
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

    def __init__(self, choices: Mapping[str, Choice]) -> None:
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
        choice = self._choices.get(name, Choice())
        return self._learned.get(name, choice.has_kernels and choice.may_have_slots)

    def sharding_types(self, name: str) -> Sequence[str]:
        """As constrained."""
        return self._choices.get(name, Choice()).sharding_types

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


def _choice_of(name: str, constraint: ParameterConstraints) -> Choice:
    kernels, sharding_types = constraint.compute_kernels or [], constraint.sharding_types or []
    load_factor = constraint.cache_params.load_factor if constraint.cache_params is not None else None
    may_have_slots = SCRATCHPAD in kernels if kernels else sharding_types != [ShardingType.DATA_PARALLEL.value]
    _check_words(name, "compute_kernels", kernels, [kernel.value for kernel in EmbeddingComputeKernel])
    _check_words(name, "sharding_types", sharding_types, [kind.value for kind in ShardingType])
    if load_factor is not None:
        check_load_factor(name, load_factor)
    return Choice(
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


def _disk_settings(
    ram_budget_gb: float | None, disk_reads_per_s: float | None, working_sets: WorkingSets | None
) -> DiskSettings | None:
    """Refuse what makes no sense. Raises ConfigError."""
    if ram_budget_gb is None and disk_reads_per_s is None:
        return None
    if ram_budget_gb is None or working_sets is None:
        missing = "working_sets" if working_sets is None else "ram_budget_gb"
        raise ConfigError(
            f"ram_budget_gb and disk_reads_per_s say what to report of tables in files: they need {missing}, too."
        )
    ram_bytes = int(check_number("ram_budget_gb", ram_budget_gb, is_positive=True) * 1024**3)
    if disk_reads_per_s is not None:
        check_number("disk_reads_per_s", disk_reads_per_s, is_positive=True)
    return DiskSettings(ram_bytes, disk_reads_per_s)


def _check_numbers(batch_size: int | None, lookahead: int | None, scratchpad_bytes: int | None) -> None:
    if batch_size is not None:
        check_count("batch_size", batch_size, 1)
    if scratchpad_bytes is not None:
        check_number("scratchpad_bytes", scratchpad_bytes)
    if lookahead is not None:
        check_count("lookahead", lookahead, 1)


def _check_sharders(plan: ShardingPlan, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> None:
    """Say which tables are planned for a scratchpad and will get none from the sharder that takes them.

    Raises ConfigError.
    """
    last_of_type = {sharder.module_type: sharder for sharder in sharders}
    for path, tables in plan.plan.items():
        if not isinstance(tables, EmbeddingModuleShardingPlan):
            continue
        names = [name for name, table in tables.items() if table.compute_kernel == SCRATCHPAD]
        collection = module.get_submodule(path)
        refuse_pruning(collection, names, f"collection {path}")
        sharder = last_of_type.get(type(collection))
        if sharder is not None and not serves_scratchpads(sharder):
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
            f"constraints name {'a table' if len(unknown) == 1 else 'tables'} {few(unknown)}, the model has "
            f"{few(known)}.{hints} Constraints go by the names of tables; stock would pass over these. Rename them or "
            "leave them out."
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
            f"working_sets are of batches of {measured:,} samples a rank, batch_size is {batch_size:,}. Measure "
            "batches of that size, or set batch_size to that of the measurement."
        )
    return batch_size or measured or 0


def _check_choice(name: str, constraint: ParameterConstraints) -> None:
    kernels, sharding_types = constraint.compute_kernels or [], constraint.sharding_types or []
    load_factor = constraint.cache_params.load_factor if constraint.cache_params is not None else None
    if SCRATCHPAD in kernels and sharding_types == [ShardingType.DATA_PARALLEL.value]:
        raise ConfigError(
            f"table {name}: constraints ask for {SCRATCHPAD} and for data_parallel sharding, which keeps whole tables "
            "on every rank. Leave one of them out."
        )
    if (
        load_factor is not None
        and kernels
        and not any("caching" in kernel or "key_value" in kernel for kernel in kernels)
    ):
        raise ConfigError(
            f"table {name}: constraints give load_factor {load_factor} and only the kernels {', '.join(kernels)}, "
            f"which have no cache. Add {SCRATCHPAD} to compute_kernels, or leave load_factor out."
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
