# SPDX-License-Identifier: BSD-3-Clause
"""What a sharding plan asks of a disk that has its tables, and whether the disk can give it."""

import mmap
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torchrec_scratchpipe.planning.reuse import misses_of_pool
from torchrec_scratchpipe.planning.sizing import ShardToSize, SizedTable

__all__ = ["DiskReport", "DiskSettings", "disk_report"]


@dataclass(frozen=True)
class DiskSettings:
    """What is known of the disk of a rank, and the RAM that rows may take."""

    ram_bytes: int
    reads_per_s: float | None = None  # pages at random, as torchrec-scratchpipe disk measures them


@dataclass(frozen=True)
class DiskReport:
    """Per step, on the rank that reads most: what is neither in the scratchpad nor in RAM."""

    ram_bytes: int
    rows_read: float
    pages_read: float
    bytes_written: float
    reads_per_s: float | None

    @property
    def floor_ms(self) -> float | None:
        """No step can be shorter than the disk takes for its pages; None if nothing is known of the disk."""
        return None if self.reads_per_s is None else 1e3 * self.pages_read / self.reads_per_s

    def __str__(self) -> str:
        lines = [
            f"disk per rank and step: {self.rows_read:,.0f} rows read, in {self.pages_read:,.0f} pages; "
            f"{self.bytes_written / 1024**2:.2f} MiB written in order; "
            f"with {self.ram_bytes / 1024**3:.3f} GiB of RAM for rows"
        ]
        if self.floor_ms is not None:
            lines.append(
                f"disk: {self.reads_per_s:,.0f} reads a second: a step that takes less than {self.floor_ms:.1f} ms "
                "waits for the disk. Then more ram_budget_gb, or more slots, make it shorter"
            )
        return "\n".join(lines)


def disk_report(tables: Sequence[SizedTable], settings: DiskSettings) -> DiskReport:
    """Predict what a plan reads and writes, once the RAM is full."""
    pools: dict[tuple[int, Hashable], list[tuple[SizedTable, ShardToSize]]] = {}
    for sized in tables:
        for shard in sized.table.shards:
            if not sized.is_whole:
                pools.setdefault((shard.rank, shard.pool), []).append((sized, shard))
    bytes_of_rank: dict[int, float] = {}
    for (rank, _), members in pools.items():
        bytes_of_rank[rank] = bytes_of_rank.get(rank, 0.0) + _table_bytes(members)
    reports: dict[int, DiskReport] = {}
    for (rank, _), members in pools.items():
        ram_bytes = settings.ram_bytes * _table_bytes(members) / bytes_of_rank[rank]
        rows, pages, written = _of_pool(members, ram_bytes)
        before = reports.get(rank, DiskReport(settings.ram_bytes, 0.0, 0.0, 0.0, settings.reads_per_s))
        reports[rank] = DiskReport(
            settings.ram_bytes,
            before.rows_read + rows,
            before.pages_read + pages,
            before.bytes_written + written,
            settings.reads_per_s,
        )
    nothing = DiskReport(settings.ram_bytes, 0.0, 0.0, 0.0, settings.reads_per_s)
    return max(reports.values(), key=lambda report: report.pages_read, default=nothing)


def _table_bytes(members: Sequence[tuple[SizedTable, ShardToSize]]) -> float:
    return sum(shard.demand.table_bytes for _, shard in members)


def _of_pool(members: Sequence[tuple[SizedTable, ShardToSize]], ram_bytes: float) -> tuple[float, float, float]:
    """Rows read, pages read and bytes written of a step."""
    row_bytes = members[0][1].demand.row_bytes
    record_bytes = 8 + -(-row_bytes // 8) * 8
    reuses = [sized.table.reuse.scaled(share=shard.share) for sized, shard in members]
    num_slots = sum(sized.num_slots * shard.share for sized, shard in members)
    # RAM and scratchpad together. The hand that chooses who leaves RAM does as well as LRU, and no better.
    num_places = num_slots + ram_bytes / record_bytes
    rows = sum(
        reuse.in_second_half(misses)
        for reuse, misses in zip(reuses, misses_of_pool(reuses, num_places, "lru"), strict=True)
    )
    # Values that are shorter than a row, as row-wise states, lie in few pages, which stay in the page cache.
    return rows, rows * (1 + (record_bytes - 8) / mmap.PAGESIZE), rows * record_bytes
