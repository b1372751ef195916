# SPDX-License-Identifier: BSD-3-Clause
"""From TorchRec's sharding options to tables to size, and back; and the errors of a shortage."""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.embedding_sharding import USE_ONE_TBE_PER_TABLE
from torchrec.distributed.embedding_types import ShardingType
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import PlannerError, PlannerErrorType, ShardingOption, Storage
from torchrec.distributed.types import CacheParams, ModuleSharder
from torchrec.distributed.utils import optimizer_type_to_emb_opt_type
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_scratchpipe.core.memory import PoolDemand
from torchrec_scratchpipe.errors import MeasurementError
from torchrec_scratchpipe.planning.checks import did_you_mean, few
from torchrec_scratchpipe.planning.disk_plan import DiskSettings, disk_report
from torchrec_scratchpipe.planning.enumerators import FUSED, SCRATCHPAD
from torchrec_scratchpipe.planning.report import PlanReport, RankReport, as_size, device_bytes_of, table_reports
from torchrec_scratchpipe.planning.reuse import Floats, Reuse
from torchrec_scratchpipe.planning.sizing import ShardToSize, SizedTable, TableToSize, size_tables
from torchrec_scratchpipe.planning.working_set import WorkingSets, table_configs
from torchrec_scratchpipe.sharding.options import (
    MIN_SLOTS_PER_TABLE,
    OPTIMIZER_STATES,
    PlannedCacheParams,
    num_slots_of,
    row_layout,
)

__all__ = ["Choice", "Sizer", "WaysOut", "step_ms"]

# A table that takes more of all memory than this share of one rank's part is spread over all ranks.
ROW_WISE_ABOVE = 0.1


# Row blocks are not looked up equally often; so many standard deviations are added to a block's working set.
BLOCK_DEVIATIONS = 4.0


class WaysOut:
    """How a user sets what messages ask for. A command, whose settings have other names, has a subclass of it."""

    can_constrain = True  # whether constraints can be given

    def budget(self, setting: str, num_bytes: int) -> str:
        """The way out where memory is short."""
        return f"set {setting} to at least {num_bytes:,} bytes ({as_size(num_bytes)})"


@dataclasses.dataclass(frozen=True)
class Choice:
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


class Sizer:
    """Between TorchRec's sharding options and :func:`size_tables`; storage of an option is the least that it takes."""

    def __init__(
        self,
        topology: Topology,
        choices: Mapping[str, Choice],
        working_sets: WorkingSets,
        scratchpad_bytes: int | None,
        ways_out: WaysOut,
        disk: DiskSettings | None = None,
    ) -> None:
        self._topology = topology
        self._disk = disk
        self._choices = choices
        self._ways_out = ways_out
        self._learned: dict[str, Choice] = {}  # of what the enumerator leaves
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

    def choice(self, name: str) -> Choice:
        """What is open for a table."""
        return self._learned.get(name) or self._choices.get(name, Choice())

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
        """Compare the working sets with the model's tables. Raises MeasurementError."""
        configs = self._configs = {config.name: config for config in table_configs(module)}
        for name, reuse in self._reuses.items():
            if name not in configs:
                raise MeasurementError(
                    f"working_sets have a table {name}, the model has {few(configs)}.{did_you_mean(name, configs)} "
                    "Measure this model."
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
                    way_out = ', or constrain it to compute_kernels=["fused"]' if self._ways_out.can_constrain else ""
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
        ways = [self._ways_out.budget("scratchpad_bytes" if is_limit else "hbm_cap", smallest)]
        if lookahead > 1:
            self.set_lookahead(1)
            if np.all(self.need(options).bytes_of_rank <= budgets):
                ways.append(f"lower lookahead from {lookahead} to 1")
            self.set_lookahead(lookahead)
        fitting = self._fitting_batch_size(options, budgets, batch_size or 0)
        if fitting >= 1:
            ways.append(f"lower the batch size from {batch_size} to about {fitting}")
        return PlannerError(
            f"rank {rank}: batches in flight with lookahead {lookahead} need {as_size(need.bytes_of_rank[rank])} of "
            f"device memory, the budget is {as_size(budgets[rank])}"
            + (f" ({kept_back:.0%} of {as_size(total)} are reserved)" if kept_back > 0 else "")
            + f". Table {need.table_name} alone needs {as_size(need.table_bytes)}. {_do(ways)}",
            PlannerErrorType.INSUFFICIENT_STORAGE,
        )

    def _host_error(self, needed: Floats, there: Floats) -> PlannerError:
        rank = int(np.argmax(needed - there))
        ways = [self._ways_out.budget("ddr_cap", math.ceil(needed.max())), "add ranks"]
        if self._is_cpu and self._topology.world_size > 1 and self._ways_out.can_constrain:
            ways.append("constrain the largest tables to row_wise sharding")
        return PlannerError(
            f"rank {rank}: tables need {as_size(needed[rank])} of host memory, the topology has "
            f"{as_size(there[rank])}. {_do(ways)}",
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
            step_ms=step_ms(options, self._topology.world_size),
            bus_bytes_per_ms=float(self._topology.hbm_to_ddr_mem_bw),
            disk=None if self._disk is None else disk_report(sized, self._disk),
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
        num_slots = num_slots_of(load_factor, reuse.num_rows)
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
        layout = row_layout(num_cols, option.tensor.dtype, OPTIMIZER_STATES[self._optimizers[option.name]])
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
                row_bytes=layout.row_bytes,
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

        Source: torchrec `group_tables` and `add_params_from_parameter_sharding` (1.8.0).
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


def step_ms(options: Sequence[ShardingOption], world_size: int) -> float:
    """How long TorchRec's estimate takes the slowest rank's step to be."""
    per_rank = np.zeros(world_size)
    for option in options:
        for shard in option.shards:
            if shard.perf is not None and shard.rank is not None:
                per_rank[shard.rank] += shard.perf.total
    return float(per_rank.max())


def _do(ways: Sequence[str]) -> str:
    return f"{'Do one of' if len(ways) > 1 else 'Do this'}: {'; '.join(ways)}."
