# SPDX-License-Identifier: BSD-3-Clause
"""What a sharding plan asks of a disk that has its tables, and whether the disk can give it."""

from collections.abc import Sequence
from dataclasses import dataclass

from torchrec_scratchpipe.planning.pools import Members, misses_of_members, num_slots_of_members, pools_of
from torchrec_scratchpipe.planning.sizing import SizedTable

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
    bytes_written: float
    reads_per_s: float | None

    @property
    def floor_ms(self) -> float | None:
        """No step can be shorter than the disk takes for its reads; None if nothing is known of the disk."""
        return None if self.reads_per_s is None else 1e3 * self.rows_read / self.reads_per_s

    def __str__(self) -> str:
        lines = [
            f"disk per rank and step: {self.rows_read:,.0f} rows read, each by one read; "
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
    pools = pools_of(tables)
    table_bytes = {pool: sum(shard.demand.table_bytes for _, shard in members) for pool, members in pools.items()}
    bytes_of_rank: dict[int, float] = {}
    for (rank, _), num_bytes in table_bytes.items():
        bytes_of_rank[rank] = bytes_of_rank.get(rank, 0.0) + num_bytes
    of_rank: dict[int, list[float]] = {}  # rows, bytes
    for (rank, pool), members in pools.items():
        ram_bytes = settings.ram_bytes * table_bytes[rank, pool] / bytes_of_rank[rank]
        before = of_rank.get(rank, [0.0, 0.0])
        of_rank[rank] = [sum(pair) for pair in zip(before, _of_pool(members, ram_bytes), strict=True)]
    rows, written = max(of_rank.values(), key=lambda of_one: of_one[0], default=[0.0, 0.0])
    return DiskReport(settings.ram_bytes, rows, written, settings.reads_per_s)


def _of_pool(members: Members, ram_bytes: float) -> tuple[float, float]:
    """Rows read and bytes written of a step."""
    record_bytes = 8 + -(-members[0][1].demand.row_bytes // 8) * 8
    # RAM and scratchpad together. The hand that chooses who leaves RAM does as well as LRU, and no better.
    rows = sum(misses_of_members(members, num_slots_of_members(members) + ram_bytes / record_bytes, "lru"))
    # A row that was trained lies in the log, in one piece.
    return rows, rows * record_bytes
