# SPDX-License-Identifier: BSD-3-Clause
"""Explains a sharding plan: what each table gets, what it will miss, and what each rank's memory holds."""

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torchrec_scratchpipe.reuse import misses_of_pool
from torchrec_scratchpipe.sizing import ShardToSize, SizedTable

__all__ = ["GIB", "PlanReport", "RankReport", "TableReport", "as_size", "plot_plan"]

GIB, MIB = 1024**3, 1024**2


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

    `step_ms` is TorchRec's estimate for the busiest rank, without the bus; `bus_bytes_per_ms` the topology's.
    """

    tables: tuple[TableReport, ...]
    ranks: tuple[RankReport, ...]
    lookahead: int
    num_batches_seen_ahead: int
    batch_size: int
    step_ms: float
    bus_bytes_per_ms: float

    @property
    def bus_ms(self) -> float:
        """Time per step on the bus of the rank that moves most."""
        return max(rank.bus_bytes for rank in self.ranks) / self.bus_bytes_per_ms

    def __str__(self) -> str:
        all_bus_bytes = max(sum(table.bus_bytes for table in self.tables), 1e-9)
        rows = [_row(table, table.bus_bytes / all_bus_bytes) for table in self.tables]
        return "\n".join([*_aligned([_HEADINGS, *rows]), "", *self._summary()])

    def _summary(self) -> list[str]:
        device = [rank.device_bytes + rank.other_bytes for rank in self.ranks]
        host = [rank.host_bytes for rank in self.ranks]
        bus = [rank.bus_bytes for rank in self.ranks]
        step_ms = max(self.step_ms, self.bus_ms)
        return [
            f"{len(self.ranks)} ranks, batch {self.batch_size}, lookahead {self.lookahead}, "
            f"{self.num_batches_seen_ahead} batches seen beyond",
            f"device memory per rank: {min(device) / GIB:.3f} to {max(device) / GIB:.3f} GiB of a budget of "
            f"{min(rank.budget_bytes for rank in self.ranks) / GIB:.3f} GiB",
            f"host memory per rank:   {min(host) / GIB:.3f} to {max(host) / GIB:.3f} GiB, {sum(host) / GIB:.3f} GiB in all",
            f"bus per rank and step:  {min(bus) / MIB:.2f} to {max(bus) / MIB:.2f} MiB, {self.bus_ms:.3f} ms beside an "
            f"estimated step of {self.step_ms:.3f} ms: {self.bus_ms / max(step_ms, 1e-9):.0%}, hidden while below 100%",
        ]


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
    """For a message.

    Args:
        num_bytes: Of memory.

    Returns:
        In GiB, or in MiB where that is less than a tenth.
    """
    return f"{num_bytes / GIB:.3f} GiB" if num_bytes >= 0.1 * GIB else f"{num_bytes / MIB:.3f} MiB"


def table_reports(tables: Sequence[tuple[SizedTable, str]]) -> tuple[list[TableReport], dict[int, float]]:
    """What each table misses when it shares slots with the others of its pools, and what that moves.

    Args:
        tables: With their sharding types.

    Returns:
        One report per table, and bytes over the bus per rank and step.
    """
    misses = {sized.table.name: 0.0 for sized, _ in tables}
    bus_bytes = dict.fromkeys(misses, 0.0)
    bus_bytes_of_rank: dict[int, float] = {}
    pools: dict[tuple[int, Hashable], list[tuple[SizedTable, ShardToSize]]] = {}
    for sized, _ in tables:
        for shard in sized.table.shards:
            if not sized.is_whole:
                pools.setdefault((shard.rank, shard.pool), []).append((sized, shard))
    known: dict[tuple[tuple[str, float], ...], list[float]] = {}
    for (rank, _), members in pools.items():
        key = tuple((sized.table.name, round(shard.share, 9)) for sized, shard in members)
        if key not in known:
            known[key] = _misses_of(members)
        for (sized, shard), missed in zip(members, known[key], strict=True):
            misses[sized.table.name] += missed
            moved = (
                2 * missed * shard.demand.row_bytes
            )  # once the scratchpad is full, a victim goes for each row that comes
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
                bus_bytes=bus_bytes[table.name],
            )
        )
    return reports, bus_bytes_of_rank


def device_bytes_of(sized: SizedTable, shard: ShardToSize) -> float:
    """Device memory of one shard.

    Args:
        sized: The table.
        shard: One of its shards.

    Returns:
        Bytes.
    """
    if sized.is_whole:
        return shard.demand.whole_bytes
    return shard.demand.device_bytes(sized.num_slots * shard.share)


def _misses_of(members: Sequence[tuple[SizedTable, ShardToSize]]) -> list[float]:
    num_slots = sum(sized.num_slots * shard.share for sized, shard in members)
    per_bin = misses_of_pool([sized.table.reuse.scaled(share=shard.share) for sized, shard in members], num_slots)
    half = len(per_bin[0]) // 2
    sizes = members[0][0].table.reuse.bin_sizes[half:]
    return [float((misses[half:] * sizes).sum() / sizes.sum()) for misses in per_bin]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def plot_plan(report: PlanReport, path: str | os.PathLike[str], num_tables: int = 12) -> None:
    """Draw memory per rank, and the miss-rate curves of the tables that miss most, with the chosen points.

    Args:
        report: Of :class:`ScratchPipeShardingPlanner`.
        path: Where the picture goes; the ending says what kind.
        num_tables: How many curves.
    """
    import matplotlib.pyplot as plt  # optional, and slow to import
    import numpy as np

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    ranks = np.arange(len(report.ranks))
    sized = np.array([rank.device_bytes for rank in report.ranks]) / GIB
    other = np.array([rank.other_bytes for rank in report.ranks]) / GIB
    left.bar(ranks, sized, width=1.0 if len(ranks) > 64 else 0.8, label="scratchpads, and tables kept whole by choice")
    left.bar(ranks, other, bottom=sized, width=1.0 if len(ranks) > 64 else 0.8, label="other tables")
    left.step(
        np.append(ranks - 0.5, ranks[-1] + 0.5),
        np.append([rank.budget_bytes / GIB for rank in report.ranks], report.ranks[-1].budget_bytes / GIB),
        where="post",
        color="black",
        linewidth=1,
        label="budget",
    )
    left.set(xlabel="rank", ylabel="device memory (GiB)", title="Memory per rank")
    left.legend()
    with_slots = [table for table in report.tables if not table.sized.is_whole]
    for table in sorted(with_slots, key=lambda table: -table.bus_bytes)[:num_tables]:
        reuse = table.sized.table.reuse
        slots = np.geomspace(max(1.0, reuse.window(1).mean), reuse.num_rows, 40)
        half = len(reuse.bin_sizes) // 2
        rates = [
            np.average(misses_of_pool([reuse], n)[0][half:], weights=reuse.bin_sizes[half:]) / table.num_unique
            for n in slots
        ]
        (line,) = right.plot(slots / reuse.num_rows, rates, linewidth=1, label=table.name)
        right.plot(table.load_factor, table.num_misses / table.num_unique, "o", color=line.get_color())
    right.set(
        xscale="log",
        xlabel="load factor (slots per row)",
        ylabel="misses per unique id",
        title="Miss rate of a scratchpad of one's own, and as chosen (shared)",
    )
    if with_slots:
        right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
