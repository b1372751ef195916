# SPDX-License-Identifier: BSD-3-Clause
"""Explains a sharding plan: what each table gets, what it will miss, and what each rank's memory holds."""

from collections.abc import Sequence
from dataclasses import dataclass

from torchrec_scratchpipe.planning.checks import few
from torchrec_scratchpipe.planning.disk_plan import DiskReport
from torchrec_scratchpipe.planning.pools import misses_of_members, num_slots_of_members, pools_of
from torchrec_scratchpipe.planning.sizing import ShardToSize, SizedTable

__all__ = [
    "GIB",
    "MIB",
    "PlanReport",
    "RankReport",
    "TableReport",
    "as_size",
    "device_bytes_of",
    "table_reports",
]

GIB, MIB = 1024**3, 1024**2
LEFT_OVER = 0.01  # of a budget, or of misses: less than this is not worth a word


@dataclass(frozen=True)
class TableReport:
    """One table of a plan; numbers are those of all its shards together, per step of all ranks."""

    sized: SizedTable
    sharding_type: str
    num_slots: int
    load_factor: float
    table_bytes: int
    device_bytes: float
    num_unique: float
    num_misses: float
    num_first_uses: float  # among the misses: no scratchpad can hold a row before it is used
    bus_bytes: float

    @property
    def name(self) -> str:
        """Of the table."""
        return self.sized.table.name


@dataclass(frozen=True)
class RankReport:
    """One rank of a plan: bytes, and bytes per step over the bus, both ways together."""

    budget_bytes: float
    device_bytes: float
    other_bytes: float  # of tables that had no choice
    host_bytes: float
    bus_bytes: float


@dataclass(frozen=True)
class PlanReport:
    """What a sharding plan gives for its memory.

    `step_ms` is TorchRec's estimate for the busiest rank, without the bus; `bus_bytes_per_ms` the topology's. `disk` is
    there if the planner was given `ram_budget_gb`.
    """

    tables: tuple[TableReport, ...]
    ranks: tuple[RankReport, ...]
    lookahead: int
    num_batches_seen_ahead: int
    batch_size: int
    step_ms: float
    bus_bytes_per_ms: float
    disk: DiskReport | None = None

    @property
    def bus_ms(self) -> float:
        """Time per step on the bus of the rank that moves most."""
        return max(rank.bus_bytes for rank in self.ranks) / self.bus_bytes_per_ms

    def __str__(self) -> str:
        all_bus_bytes = max(sum(table.bus_bytes for table in self.tables), 1e-9)
        rows = [_row(table, table.bus_bytes / all_bus_bytes) for table in self.tables]
        return "\n".join([*_aligned([_HEADINGS, *rows]), "", *self.summary()])

    @property
    def unused_bytes(self) -> list[float]:
        """What is left of each rank's budget."""
        return [rank.budget_bytes - rank.device_bytes - rank.other_bytes for rank in self.ranks]

    def summary(self) -> list[str]:
        """What it comes to, line by line."""
        device = [rank.device_bytes + rank.other_bytes for rank in self.ranks]
        host = [rank.host_bytes for rank in self.ranks]
        bus = [rank.bus_bytes for rank in self.ranks]
        step_ms = max(self.step_ms, self.bus_ms)
        return [
            f"{len(self.ranks)} ranks, batch {self.batch_size}, lookahead {self.lookahead}, "
            f"{self.num_batches_seen_ahead} batches seen beyond",
            f"device memory per rank: {as_size(min(device))} to {as_size(max(device))} of a budget of "
            f"{as_size(min(rank.budget_bytes for rank in self.ranks))}",
            f"host memory per rank:   {as_size(min(host))} to {as_size(max(host))}, {as_size(sum(host))} in all",
            f"bus per rank and step:  {min(bus) / MIB:.2f} to {max(bus) / MIB:.2f} MiB, {self.bus_ms:.3f} ms beside an "
            f"estimated step of {self.step_ms:.3f} ms: {self.bus_ms / max(step_ms, 1e-9):.0%}, hidden while below 100%",
            *self._about_misses(),
            *([] if self.disk is None else str(self.disk).splitlines()),
        ]

    def _about_misses(self) -> list[str]:
        """Which misses more memory would save, and why memory is left over."""
        is_left_over = max(self.unused_bytes) > LEFT_OVER * min(rank.budget_bytes for rank in self.ranks)
        unused = f"unused memory per rank: {as_size(min(self.unused_bytes))} to {as_size(max(self.unused_bytes))}: "
        with_slots = [table for table in self.tables if not table.sized.is_whole]
        if not with_slots:
            return [f"{unused}every table is kept whole"] if is_left_over else []
        misses, first_uses = (
            sum(getattr(table, name) for table in with_slots) for name in ("num_misses", "num_first_uses")
        )
        of_these = f", of which {first_uses:,.0f} are first uses of a row, which no number of slots saves"
        lines = [f"misses per step:        {misses:,.0f}{of_these if first_uses >= 0.5 else ''}"]
        if is_left_over:
            lines.append(unused + self._why_left_over(misses - first_uses, with_slots))
        return lines

    def _why_left_over(self, num_saveable: float, with_slots: "Sequence[TableReport]") -> str:
        if num_saveable <= max(0.5, LEFT_OVER * sum(table.num_misses for table in with_slots)):
            return f"more slots would save no misses{self._next_whole(with_slots)}"
        fixed = [table.name for table in with_slots if not table.sized.table.may_have_more]
        if fixed:
            return f"constraints fix the slots of {few(fixed)}"
        return (
            "no larger step fits"
            if len(self.ranks) == 1
            else "other ranks, which share tables with these, have no more"
        )

    def _next_whole(self, with_slots: "Sequence[TableReport]") -> str:
        """Whose first uses, too, would be saved by the least more memory."""
        short = {
            table.name: max(needed - self.unused_bytes[rank] for rank, needed in _bytes_to_whole(table).items())
            for table in with_slots
            if table.sized.table.may_stay_whole
        }
        if not short:
            return ""
        name = min(short, key=lambda name: short[name])
        return f"; with at most {as_size(short[name])} more, table {name} could be kept whole and would miss none"


_HEADINGS = [
    "table", "sharding", "kept", "rows", "GiB", "slots", "load factor", "device GiB", "unique/step", "misses/step",
    "bus MiB/step", "bus share",
]  # fmt: skip


def _row(table: TableReport, share_of_bus: float) -> list[str]:
    is_whole = table.sized.is_whole
    return [
        table.name,
        table.sharding_type,
        "whole" if is_whole else "scratchpad",
        f"{table.sized.table.reuse.num_rows:,}",
        f"{table.table_bytes / GIB:.3f}",
        "-" if is_whole else f"{table.num_slots:,}",
        f"{table.load_factor:.4f}",
        f"{table.device_bytes / GIB:.3f}",
        f"{table.num_unique:,.0f}",
        f"{table.num_misses:,.0f}",
        f"{table.bus_bytes / MIB:.2f}",
        f"{share_of_bus:.1%}",
    ]


def as_size(num_bytes: float) -> str:
    """For a message."""
    return f"{num_bytes / GIB:.3f} GiB" if num_bytes >= 0.1 * GIB else f"{num_bytes / MIB:.3f} MiB"


def table_reports(tables: Sequence[tuple[SizedTable, str]]) -> tuple[list[TableReport], dict[int, float]]:
    """What each table misses when it shares slots with the others of its pools, and what that moves."""
    misses = {sized.table.name: 0.0 for sized, _ in tables}
    first_uses = dict.fromkeys(misses, 0.0)
    bus_bytes = dict.fromkeys(misses, 0.0)
    bus_bytes_of_rank: dict[int, float] = {}
    pools = pools_of([sized for sized, _ in tables])
    known: dict[tuple[tuple[str, float], ...], list[float]] = {}
    for (rank, _), members in pools.items():
        key = tuple((sized.table.name, round(shard.share, 9)) for sized, shard in members)
        if key not in known:
            known[key] = misses_of_members(members, num_slots_of_members(members))
        for (sized, shard), missed in zip(members, known[key], strict=True):
            misses[sized.table.name] += missed
            first_uses[sized.table.name] += sized.table.reuse.in_second_half(sized.table.reuse.first_uses) * shard.share
            # Once the scratchpad is full, a victim goes for each row that comes.
            moved = 2 * missed * shard.demand.row_bytes
            bus_bytes[sized.table.name] += moved
            bus_bytes_of_rank[rank] = bus_bytes_of_rank.get(rank, 0.0) + moved
    reports = []
    for sized, sharding_type in tables:
        table = sized.table
        demands = [shard.demand for shard in table.shards]
        reports.append(
            TableReport(
                sized=sized,
                sharding_type=sharding_type,
                num_slots=sized.num_slots,
                load_factor=1.0 if sized.is_whole else min(1.0, sized.num_slots / table.reuse.num_rows),
                table_bytes=sum(demand.table_bytes for demand in demands),
                device_bytes=sum(device_bytes_of(sized, shard) for shard in table.shards),
                num_unique=table.reuse.window(1).mean,
                num_misses=misses[table.name],
                num_first_uses=first_uses[table.name],
                bus_bytes=bus_bytes[table.name],
            )
        )
    return reports, bus_bytes_of_rank


def device_bytes_of(sized: SizedTable, shard: ShardToSize) -> float:
    """Device memory of one shard."""
    if sized.is_whole:
        return shard.demand.whole_bytes + (shard.demand.plan_bytes if shard.rank in sized.ranks_with_plans else 0.0)
    return shard.demand.device_bytes(sized.num_slots * shard.share)


def _bytes_to_whole(table: TableReport) -> dict[int, float]:
    """By rank, how much more device memory the whole table takes than its slots."""
    more: dict[int, float] = {}
    for shard in table.sized.table.shards:
        whole = shard.demand.whole_bytes + shard.demand.plan_bytes
        more[shard.rank] = more.get(shard.rank, 0.0) + whole - device_bytes_of(table.sized, shard)
    return more


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
