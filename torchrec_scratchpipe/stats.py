# SPDX-License-Identifier: BSD-3-Clause
"""Counts what moves and what waits.

Shapes: ``T`` tables of a pool.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_scratchpipe.device_ops import TableCounts
from torchrec_scratchpipe.host_table import HostTable
from torchrec_scratchpipe.types import CachePlan, StageSpan

__all__ = ["DevicePoolCounters", "HostPoolCounters", "PoolCounters", "PoolStats", "TableStats"]

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
    `num_growths` counts how often one batch needed more slots than there were, and got them.
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
    num_growths: int
    scratchpad_bytes: int
    table_bytes: int
    tables: tuple[TableStats, ...]


class PoolCounters:
    """Running counts of one pool; device counts stay on the device until :meth:`stats`."""

    def __init__(self, host_table: HostTable) -> None:
        self._host_table = host_table
        self.num_batches = 0
        self.num_stalls = 0
        self.stall_ms = 0.0
        self.num_growths = 0
        self.spans: deque[StageSpan] = deque(maxlen=MAX_STAGE_SPANS)

    def add_stall(self, stall_ms: float) -> None:
        """Count one batch for which Train waited.

        Args:
            stall_ms: For how long.
        """
        self.num_stalls += 1
        self.stall_ms += stall_ms

    def stats(self, num_slots: int, num_resident_rows: int) -> PoolStats:
        """Read all counts; waits for the device.

        Args:
            num_slots: S of the pool.
            num_resident_rows: Rows in slots now.

        Returns:
            Counts since construction.
        """
        tables = self._host_table.tables
        counts = self._counts()
        row_bytes = self._host_table.layout.row_bytes
        return PoolStats(
            table_names=tuple(table.name for table in tables),
            num_slots=num_slots,
            num_rows=self._host_table.num_rows,
            num_resident_rows=num_resident_rows,
            num_batches=self.num_batches,
            num_ids=sum(counts.num_ids),
            num_unique_ids=sum(counts.num_unique),
            num_unique_misses=sum(counts.num_misses),
            num_victims=sum(counts.num_victims),
            fill_bytes=sum(counts.num_misses) * row_bytes,
            writeback_bytes=sum(counts.num_victims) * row_bytes,
            num_stalls=self.num_stalls,
            stall_ms=self.stall_ms,
            num_misses_at_train=counts.num_misses_at_train,
            num_growths=self.num_growths,
            scratchpad_bytes=num_slots * row_bytes,
            table_bytes=self._host_table.num_bytes,
            tables=tuple(
                TableStats(table.name, table.num_rows, *numbers)
                for table, *numbers in zip(
                    tables, counts.num_ids, counts.num_unique, counts.num_misses, counts.num_victims, strict=True
                )
            ),
        )

    def add_growth(self, num_slots: int) -> None:
        """Count one growth.

        Args:
            num_slots: S from now on.
        """
        self.num_growths += 1

    def _counts(self) -> "_Counts":
        raise NotImplementedError


class _Counts(NamedTuple):
    """Lists are by table."""

    num_ids: list[int]
    num_unique: list[int]
    num_misses: list[int]
    num_victims: list[int]
    num_misses_at_train: int


class DevicePoolCounters(PoolCounters):
    """Counts of a pool whose device counts them itself.

    Args:
        host_table: Every row.
        table_counts: What the device counts.
    """

    def __init__(self, host_table: HostTable, table_counts: TableCounts) -> None:
        super().__init__(host_table)
        self._table_counts = table_counts

    def _counts(self) -> _Counts:
        counts = self._table_counts
        return _Counts(
            counts.num_ids.tolist(),
            counts.num_unique.tolist(),
            counts.num_misses.tolist(),
            counts.num_victims.tolist(),
            int(counts.num_misses_at_train),
        )


class HostPoolCounters(PoolCounters):
    """Counts of a pool whose plans have sizes that the host knows.

    Args:
        host_table: Every row.
        num_slots: S.
        device: Where Plan runs.
    """

    def __init__(self, host_table: HostTable, num_slots: int, device: torch.device) -> None:
        super().__init__(host_table)
        num_tables = len(host_table.tables)
        self._table_ends = torch.tensor(host_table.row_offsets[1:], dtype=torch.int64, device=device)
        # A row's table is looked up once, when it comes: for all rows of each batch that took a tenth of Plan.
        self._slot_to_table = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._num_ids = [0] * num_tables
        self._num_unique = torch.zeros(num_tables, dtype=torch.int64, device=device)
        self._num_misses = torch.zeros(num_tables, dtype=torch.int64, device=device)
        self._num_victims = torch.zeros(num_tables, dtype=torch.int64, device=device)
        self._num_misses_at_train = torch.zeros((), dtype=torch.int64, device=device)

    def add_plan(self, cache_plan: CachePlan, num_ids_per_table: Sequence[int]) -> None:
        """Count one planned batch.

        Args:
            cache_plan: The batch's cache plan.
            num_ids_per_table: Lookups per table.
        """
        self.num_batches += 1
        for table_index, num_ids in enumerate(num_ids_per_table):
            self._num_ids[table_index] += num_ids
        self._add_per_table(self._num_victims, self._slot_to_table.index_select(0, cache_plan.victim_slots))
        tables_of_misses = torch.bucketize(cache_plan.miss_rows, self._table_ends, right=True)
        self._slot_to_table.index_copy_(0, cache_plan.miss_slots, tables_of_misses)
        self._add_per_table(self._num_misses, tables_of_misses)
        self._add_per_table(self._num_unique, self._slot_to_table.index_select(0, cache_plan.unique_slots))

    def undo_plan(self, cache_plan: CachePlan) -> None:
        """Note that victims stayed where they were; the batch stays counted.

        Args:
            cache_plan: A plan that was taken back.
        """
        tables = torch.bucketize(cache_plan.victim_rows, self._table_ends, right=True)
        self._slot_to_table.index_copy_(0, cache_plan.victim_slots, tables)

    def add_growth(self, num_slots: int) -> None:
        """See :class:`PoolCounters`."""
        super().add_growth(num_slots)
        num_new = num_slots - self._slot_to_table.numel()
        self._slot_to_table = torch.cat([self._slot_to_table, self._slot_to_table.new_zeros(num_new)])

    def add_misses_at_train(self, num_misses: Tensor) -> None:
        """Count ids that did not find their row.

        Args:
            num_misses: [] int64 on the device.
        """
        self._num_misses_at_train += num_misses

    def _counts(self) -> _Counts:
        unique, misses, victims = (
            counts.tolist() for counts in (self._num_unique, self._num_misses, self._num_victims)
        )
        return _Counts(self._num_ids, unique, misses, victims, int(self._num_misses_at_train))

    def _add_per_table(self, counts: Tensor, table_indices: Tensor) -> None:
        if self._slot_to_table.device.type == "cpu":
            counts += torch.bincount(table_indices, minlength=counts.numel())
        else:  # bincount would wait for the device
            counts.index_add_(0, table_indices, torch.ones_like(table_indices))
