# SPDX-License-Identifier: BSD-3-Clause
"""One batch on its way through the stages on a device that moves rows itself, without the host knowing how many.

Shapes: ``I`` ids, ``F`` features.

Where kernels read and write the tables in host memory, Collect, Exchange and Insert of one direction are a single
kernel per part of a row: *writeback* takes victims from the scratchpad to their table, *fill* takes missing rows from
their table to the slots. Each direction has a stream, and their order is

* Plan(N) after every Train whose release it has seen, and writeback(N) after Plan(N) (hazards 1 and 3);
* fill(N) after writeback(N), which frees its slots, and so after every earlier writeback (hazard 2);
* Train(N) after fill(N) (hazard 4).

So writeback(N + 1) runs beside fill(N): its victims are neither rows that fill(N) brings, which are held, nor rows that it reads, which
were absent. Where kernels cannot reach the tables (memory-mapped files), or old rows must be kept for a snapshot, rows pass through
staging as they do on a CPU, and the worker thread waits for the plan.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from torchrec_scratchpipe.device_ops import Count, FeatureIds, FeatureRows
from torchrec_scratchpipe.device_slot_map import DevicePlan, PoolIds
from torchrec_scratchpipe.errors import IdOutOfRangeError, ScratchPipeError
from torchrec_scratchpipe.planned_batch import BatchRunner, FeatureSource, PlannedBatch, check_ids
from torchrec_scratchpipe.pool import Pool
from torchrec_scratchpipe.streams import StageStreams
from torchrec_scratchpipe.types import Stage, StageSpan

__all__ = ["DeviceBatch", "feature_rows"]


class _Enqueued(NamedTuple):
    """When the host enqueued work of one stage, and which count says how many rows it moves."""

    stage: Stage
    start_s: float
    end_s: float
    moved: Count | None


def feature_rows(
    pools: Sequence[Pool], features: Sequence[FeatureSource], device: torch.device
) -> tuple[FeatureRows, ...]:
    """Where each feature of a kernel group looks up, as the device reads it.

    Args:
        pools: The group's pools.
        features: In the order of the ids.
        device: Where Plan runs.

    Returns:
        One per pool.
    """
    rows = []
    for pool_index, pool in enumerate(pools):
        table = pool.host_table
        indices = [feature.table_index if feature.pool_index == pool_index else -1 for feature in features]
        rows.append(
            FeatureRows(
                torch.tensor([table.row_offsets[max(0, index)] for index in indices], dtype=torch.int64, device=device),
                torch.tensor(
                    [table.tables[max(0, index)].num_rows for index in indices], dtype=torch.int64, device=device
                ),
                torch.tensor(indices, dtype=torch.int32, device=device),
            )
        )
    return tuple(rows)


class DeviceBatch(PlannedBatch):
    """One kernel group's share of a batch, planned and moved by the device.

    Args:
        pools: The pools that the ids may look up; each has a :class:`DeviceSlotMap`.
        features: Where each feature looks up, in the order of the ids; for messages.
        ids: The ids, on the device.
        rows_of_features: As :func:`feature_rows` gives them.
        runner: Who runs the stages.
        may_plan: As for :class:`PlannedBatch`.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        features: Sequence[FeatureSource],
        ids: FeatureIds,
        rows_of_features: Sequence[FeatureRows],
        runner: BatchRunner,
        *,
        may_plan: bool = True,
    ) -> None:
        super().__init__(pools, features, ids.ids, (), runner, may_plan=may_plan)
        self._feature_ids = ids
        self._rows_of_features = rows_of_features
        self._plans: list[DevicePlan] = []
        self._slots: Tensor | None = None  # of all pools and whole tables; None until the first plan has them
        self._enqueued: list[list[_Enqueued]] = []

    def record_stages_streams(self, streams: StageStreams) -> None:
        """See :class:`PlannedBatch`."""
        streams.record_use(self._feature_ids.ids)
        streams.record_use(self._feature_ids.bounds)

    def record_train_stream(self, streams: StageStreams) -> None:
        """See :class:`PlannedBatch`."""
        for plan in self._plans:
            streams.record_use_by_caller(plan.buffers.rows)
            streams.record_use_by_caller(plan.slots)

    @property
    def _num_pools_planned(self) -> int:
        return len(self._plans)

    def _ids_of_pools(self) -> list[PoolIds]:
        return [PoolIds(self._feature_ids, rows) for rows in self._rows_of_features]

    def _run_stages(self, pool_index: int, plan_start_s: float) -> None:
        pool = self._pools[pool_index]
        pool.check_usable()
        if pool.is_overwritten:
            self._runner.streams.synchronize()  # kernels may be at the tables that are read now
        self._refresh(pool)
        slot_map = pool.slot_map
        moves_in_place = pool.host_table.is_device_accessible and not pool.host_table.has_snapshots
        is_confirmed = False
        while not is_confirmed:
            slot_map.note_releases()
            self._runner.order_after_trains()
            with record_function(f"## scratchpipe plan {slot_map.next_batch} ##"):
                plan = slot_map.plan(
                    self._ids_of_pool(pool_index),
                    self._seen_by_pool.get(pool_index),
                    self._slots,
                    has_whole_tables=any(feature.pool_index is None for feature in self._features),
                )
            enqueued = [_Enqueued(Stage.PLAN, plan_start_s, time.perf_counter(), None)]
            if moves_in_place:  # before it is known whether there are slots: without them, nothing moves
                self._move(pool, plan, enqueued)
            is_confirmed = slot_map.confirm(plan)
        self._slots = plan.slots
        self.hold.add(pool, plan.batch_index)
        pool.counters.num_batches += 1
        if not moves_in_place:
            self._move_through_staging(pool, plan)
        self._plans.append(plan)
        self._enqueued.append(enqueued)

    def _move(self, pool: Pool, plan: DevicePlan, enqueued: list[_Enqueued]) -> None:
        """Enqueue the writeback of victims and the fill of missing rows."""
        streams, buffers, ops = self._runner.streams, plan.buffers, pool.slot_map.ops
        parts = list(zip(pool.host_table.parts, pool.scratchpad.parts, strict=True))
        try:
            start_s = time.perf_counter()
            name = f"## scratchpipe collect, exchange and insert victims of {plan.batch_index} ##"
            streams.wait(streams.writeback, plan.planned)
            with streams.on(streams.writeback), record_function(name):
                for table, slots in parts:
                    ops.move(slots, buffers.miss_slots, table, buffers.victim_rows, buffers.counts, Count.WRITEBACKS)
                written_back = streams.record(streams.writeback)
            enqueued.append(_Enqueued(Stage.COLLECT, start_s, time.perf_counter(), Count.WRITEBACKS))
            start_s = time.perf_counter()
            name = f"## scratchpipe collect, exchange and insert misses of {plan.batch_index} ##"
            streams.wait(streams.fill, written_back)
            with streams.on(streams.fill), record_function(name):
                for table, slots in parts:
                    ops.move(table, buffers.miss_rows, slots, buffers.miss_slots, buffers.counts, Count.FILLS)
                plan.moved = streams.record(streams.fill)
            enqueued.append(_Enqueued(Stage.INSERT, start_s, time.perf_counter(), Count.FILLS))
        except BaseException as error:
            pool.failure = f"moving the rows of batch {plan.batch_index} failed ({error!r})"
            raise pool.failure_error() from error

    def _move_through_staging(self, pool: Pool, plan: DevicePlan) -> None:
        """Move rows as a CPU does; waits for the plan."""
        cache_plan = pool.slot_map.cache_plan(plan)
        self._runner.streams.synchronize()  # rows are read on the host, and on this stream
        try:
            staged = self._collect_and_exchange(pool, cache_plan)
        except BaseException:
            pool.slot_map.undo(plan)
            raise
        self._insert(pool, cache_plan, staged)

    def _check_planned(self) -> None:
        """Take in what the device has counted; it has long done so, unless the host is further ahead than the lookahead.

        Raises:
            IdOutOfRangeError: Names the table, the id and the range.
        """
        for pool, plan, enqueued in zip(self._pools, self._plans, self._enqueued, strict=True):
            counts = plan.wait()
            row_bytes = pool.host_table.layout.row_bytes
            for stage, start_s, end_s, moved in enqueued:
                num_bytes = 0 if moved is None else counts[moved] * row_bytes
                pool.counters.spans.append(StageSpan(plan.batch_index, stage, start_s, end_s, num_bytes))
            enqueued.clear()
            if counts[Count.IS_REFUSED]:
                self.fail(self._refused_error(pool, plan, counts[Count.BAD_POSITION]))
                break
        if self._error is not None:
            for pool_index, seen in self._seen_by_pool.items():
                self._pools[pool_index].slot_map.forget_failed(seen, self._ids_of_pool(pool_index))
            self.hold.release()
            raise self._error

    def _refused_error(self, pool: Pool, plan: DevicePlan, bad_position: int) -> Exception:
        if bad_position == 0:
            return ScratchPipeError(
                f"{pool.name}: batch {plan.batch_index} found too few of {pool.scratchpad.num_slots:,} slots for up to "
                f"{plan.num_ids:,} ids, although there should have been enough. This is a fault of this package, please report "
                "it; a larger load_factor may avoid it."
            )
        bounds = self._feature_ids.bounds.tolist()
        for feature, first, last in zip(self._features, bounds[:-1], bounds[1:], strict=True):
            if first < bad_position <= last:
                table = pool.host_table.tables[feature.table_index]
                try:
                    check_ids(table.name, feature.feature_name, self._ids[first:last], table.num_rows)
                except IdOutOfRangeError as error:
                    return error
        return ScratchPipeError(
            f"{pool.name}: an id of batch {plan.batch_index} was out of range when it was planned, and is not now. Do not change "
            "the ids of a batch that was given to the pipeline."
        )

    def _check_unchanged(self) -> None:
        """Nothing: the device has a copy of the batch."""

    def _count_misses_at_train(self) -> None:
        for pool, plan in zip(self._pools, self._plans, strict=True):
            slot_map = pool.slot_map
            num_misses = slot_map.table_counts.num_misses_at_train
            slot_map.ops.count_misses(slot_map.maps, plan.buffers.rows, plan.slots, plan.num_ids, num_misses)

    def _slots_of_ids(self) -> Tensor:
        assert self._slots is not None
        return self._slots[: self.num_ids]
