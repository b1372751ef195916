# SPDX-License-Identifier: BSD-3-Clause
"""Counts what moves and what waits.

Shapes: ``T`` tables of a pool.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchrec_scratchpipe.core.host_table import HostTable
from torchrec_scratchpipe.core.rows import Stage, StageSpan, TimedStage
from torchrec_scratchpipe.core.slot_ops import TableCounts

__all__ = ["PoolCounters", "PoolStats", "TableStats"]

MAX_STAGE_SPANS = 8192  # about 1,600 batches of one pool


@dataclass(frozen=True)
class TableStats:
    """One table's share of its pool's counts, since construction."""

    table_name: str
    num_rows: int
    num_ids: int
    num_unique_ids: int
    num_unique_misses: int
    num_victims: int


@dataclass(frozen=True)
class PoolStats:
    """What one pool did since construction.

    `num_ids` counts lookups, `num_unique_ids` distinct rows per batch, summed over batches.
    `num_stalls` and `stall_ms` count batches for which Train had to wait for rows, and how long; pools of one kernel
    group wait together, and the first of them counts it.
    `num_slot_waits` counts batches for which there were too few slots until another batch had trained.
    `num_growths` counts how often one batch needed more slots than there were, and got them.
    `num_rows_reset` counts rows that managed collision gave to another id.
    `num_disk_rows_read` counts rows that came from files of `table_dir`, neither in the scratchpad nor in RAM before.
    `num_disk_pages_read` are the reads that this took, and `num_cold_pages_at_collect` those of them that had not ended
    when their batch was to be planned. `disk_bytes_written` are bytes of rows that left RAM.
    `num_misses_at_train` compares, at every lookup, each id's slot with the row that sits there.
    """

    table_names: tuple[str, ...]
    num_slots: int
    num_rows: int
    num_resident_rows: int
    num_batches: int
    num_ids: int
    num_unique_ids: int
    num_unique_misses: int
    num_victims: int
    fill_bytes: int
    writeback_bytes: int
    num_stalls: int
    stall_ms: float
    num_misses_at_train: int
    num_slot_waits: int
    num_growths: int
    num_rows_reset: int
    num_disk_rows_read: int
    num_disk_pages_read: int
    num_cold_pages_at_collect: int
    disk_bytes_written: int
    scratchpad_bytes: int
    table_bytes: int
    tables: tuple[TableStats, ...]


class PoolCounters:
    """Running counts of one pool; those of rows stay on the device until :meth:`stats`."""

    def __init__(self, host_table: HostTable, table_counts: TableCounts) -> None:
        self._host_table = host_table
        self._table_counts = table_counts
        self.num_batches = 0
        self.num_stalls = 0
        self.stall_ms = 0.0
        self.num_slot_waits = 0
        self.num_growths = 0
        self.num_rows_reset = 0
        self.spans: deque[StageSpan] = deque(maxlen=MAX_STAGE_SPANS)

    def add_spans(self, batch_index: int, stages: list[TimedStage], counts: Sequence[int]) -> None:
        """Take in when the stages of a batch ran."""
        row_bytes = self._host_table.layout.row_bytes
        for stage, start_s, end_s, moved in stages:
            num_rows = sum(counts[count] for count in moved)
            self.spans.append(StageSpan(batch_index, stage, start_s, end_s, num_rows * row_bytes))
        stages.clear()

    def add_train(self, batch_index: int, start_s: float) -> None:
        """Take in that the Train of a batch has ended just now."""
        self.spans.append(StageSpan(batch_index, Stage.TRAIN, start_s, time.perf_counter(), 0))

    def add_stall(self, stall_ms: float) -> None:
        """Count one batch for which Train waited."""
        self.num_stalls += 1
        self.stall_ms += stall_ms

    def on_host(self) -> dict[str, Any]:
        """Those counts that no device has, by their names in :class:`PoolStats`; waits for nothing."""
        disk = self._host_table.disk_counts
        return {
            "num_stalls": self.num_stalls,
            "stall_ms": self.stall_ms,
            "num_slot_waits": self.num_slot_waits,
            "num_growths": self.num_growths,
            "num_rows_reset": self.num_rows_reset,
            "num_disk_rows_read": disk.num_rows_read,
            "num_disk_pages_read": disk.num_pages_read,
            "num_cold_pages_at_collect": disk.num_pages_waited_for,
            "disk_bytes_written": disk.num_bytes_written + self._host_table.num_log_bytes_written,
        }

    def stats(self, num_slots: int, num_resident_rows: int) -> PoolStats:
        """Read all counts; waits for the device."""
        tables, counts = self._host_table.tables, self._table_counts
        num_ids, num_unique, num_misses, num_victims = (
            numbers.tolist() for numbers in (counts.num_ids, counts.num_unique, counts.num_misses, counts.num_victims)
        )
        row_bytes = self._host_table.layout.row_bytes
        return PoolStats(
            table_names=tuple(table.name for table in tables),
            num_slots=num_slots,
            num_rows=self._host_table.num_rows,
            num_resident_rows=num_resident_rows,
            num_batches=self.num_batches,
            num_ids=sum(num_ids),
            num_unique_ids=sum(num_unique),
            num_unique_misses=sum(num_misses),
            num_victims=sum(num_victims),
            fill_bytes=sum(num_misses) * row_bytes,
            writeback_bytes=sum(num_victims) * row_bytes,
            num_misses_at_train=int(counts.num_misses_at_train),
            scratchpad_bytes=num_slots * row_bytes,
            table_bytes=self._host_table.num_bytes,
            tables=tuple(
                TableStats(table.name, table.num_rows, *numbers)
                for table, *numbers in zip(tables, num_ids, num_unique, num_misses, num_victims, strict=True)
            ),
            **self.on_host(),
        )
