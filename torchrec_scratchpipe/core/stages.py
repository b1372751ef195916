# SPDX-License-Identifier: BSD-3-Clause
"""Moves rows: Plan, Collect, Exchange and Insert of one batch and pool, in this order, before its Train.

Shapes: ``M`` misses, ``V`` victims.

Plan decides which row sits where. Then rows move as the plan says, in one of two ways.

*Staged*: rows pass through buffers on the host, in both directions at once. Collect gathers rows from the table and
from the scratchpad, Exchange carries them over the bus, Insert writes them. A CPU moves rows so. A GPU does where its
kernels cannot reach the tables (memory-mapped files), or where old rows must be kept for a snapshot; then the worker
thread waits for the plan.

*In place*: kernels read and write the tables in host memory. Collect, Exchange and Insert of one direction are one
kernel per part of a row. *Writeback* takes victims from the scratchpad to their table, *fill* takes missing rows from
their table to the slots. Each direction has a stream, and their order is

* Plan(N) after every Train whose release it has seen, and writeback(N) after Plan(N) (hazards 1 and 3);
* fill(N) after writeback(N), which frees its slots, and so after every earlier writeback (hazard 2);
* Train(N) after fill(N) (hazard 4).

So writeback(N + 1) may run beside fill(N). Its victims are not rows that fill(N) brings, because those are held. They
are not rows that fill(N) reads either, because those were absent.

Who runs the stages, and in which order they must run, is :mod:`torchrec_scratchpipe.core.runner`.
"""

import time

import torch
from torch import Tensor
from torch.profiler import record_function

from torchrec_scratchpipe.core.batch import Batch
from torchrec_scratchpipe.core.disk_rows import RowsAhead
from torchrec_scratchpipe.core.pool import Pool
from torchrec_scratchpipe.core.rows import Stage, StagedRows, read_rows, write_rows
from torchrec_scratchpipe.core.slot_map import CachePlan, RowMoves
from torchrec_scratchpipe.core.slot_ops import Count, PlanBuffers
from torchrec_scratchpipe.core.streams import StageStreams

__all__ = ["collect", "exchange", "fill", "insert", "plan_rows", "run_stages", "write_back"]

BOTH = (Count.FILLS, Count.WRITEBACKS)


def run_stages(batch: Batch, streams: StageStreams) -> None:
    """Run the stages of the next pool of a batch. Raises SlotsHeldError or StageFailedError."""
    pool = batch.pools[len(batch.plans)]
    is_in_place = pool.host_table.is_device_accessible and not pool.host_table.has_snapshots
    # Before Plan: who reads ahead looks which rows have no slot, and Plan gives them slots.
    ahead = pool.host_table.wait_for_rows(batch.asked[len(batch.plans)])
    start_s = time.perf_counter()
    is_confirmed = False
    while not is_confirmed:
        # In this order: Plan must come after the Train of every batch whose slots it may give away (hazards 1 and 3).
        pool.slot_map.take_in_releases()
        streams.order_after_trains()
        plan = plan_rows(batch, start_s)
        # Rows move before it is known whether there are slots. Without slots, nothing moves.
        if is_in_place:
            _move_in_place(pool, plan, streams)
        is_confirmed = pool.slot_map.confirm(plan)
    batch.held.append((pool, plan))
    pool.counters.num_batches += 1
    if not is_in_place:
        # Earlier stages may still write the tables on other streams. Here the host reads them.
        streams.synchronize()
        _move_through_staging(pool, plan, ahead)
    batch.asked[len(batch.plans)] = None
    batch.plans.append(plan)


def plan_rows(batch: Batch, start_s: float) -> CachePlan:
    """Plan: decide where the batch's rows go and which rows leave, in its next pool; moves nothing."""
    index = len(batch.plans)
    pool = batch.pools[index]
    slots = batch.plans[0].slots if index > 0 else None
    with record_function(f"## scratchpipe plan {pool.slot_map.next_batch} ##"):
        plan = pool.slot_map.plan(
            batch.pool_ids[index], batch.tickets[index], slots, has_whole_tables=batch.has_whole_tables
        )
    plan.note_stage(Stage.PLAN, start_s, ())
    return plan


def _move_through_staging(pool: Pool, plan: CachePlan, ahead: RowsAhead | None) -> None:
    moves = plan.moves()
    try:
        with plan.timed(Stage.COLLECT, BOTH):
            staged = collect(pool, moves, ahead)
        with plan.timed(Stage.EXCHANGE, BOTH):
            staged = exchange(pool, staged)
    except BaseException:
        # No row has moved yet, so that the plan can be taken back and the pool stays usable.
        pool.slot_map.undo(plan)
        raise
    with pool.failing_for_good(f"Insert of batch {plan.batch_index} failed"), plan.timed(Stage.INSERT, BOTH):
        insert(pool, moves, staged)


def collect(pool: Pool, moves: RowMoves, ahead: RowsAhead | None = None) -> StagedRows:
    """Collect: copy missing rows out of the table, and victims out of the scratchpad, into staging.

    `fill` comes to lie on the host, `writeback` on the device.
    """
    miss_rows = moves.miss_rows.cpu()
    fill = pool.staging.take("fill", miss_rows.numel())
    pool.host_table.read(miss_rows, fill, ahead)
    pool.host_table.make_room(moves.victim_rows.numel())
    if pool.slot_map.device.type == "cpu":
        writeback = pool.staging.take("writeback", moves.victim_slots.numel())
        read_rows(pool.scratchpad.parts, moves.victim_slots, writeback)
    else:
        writeback = [part.index_select(0, moves.victim_slots) for part in pool.scratchpad.parts]
    return StagedRows(fill, writeback)


def exchange(pool: Pool, staged: StagedRows) -> StagedRows:
    """Exchange: carry staged rows over the bus, both ways; on a CPU both sides are the same memory."""
    device = pool.slot_map.device
    if device.type == "cpu":
        return staged
    fill = [part.to(device, non_blocking=True) for part in staged.fill]
    writeback = pool.staging.take("writeback", staged.writeback[0].shape[0])
    for source, target in zip(staged.writeback, writeback, strict=True):
        target.copy_(source, non_blocking=True)
    # Both copies must have ended before Insert of this batch reads `writeback` on the host, and before Collect of the
    # next one refills the staging behind `fill`.
    torch.get_device_module(device).current_stream(device).synchronize()
    return StagedRows(fill, writeback)


def insert(pool: Pool, moves: RowMoves, staged: StagedRows) -> None:
    """Insert: write victims to their table and missing rows to their slots."""
    pool.host_table.write(moves.victim_rows.cpu(), staged.writeback)
    write_rows(pool.scratchpad.parts, moves.miss_slots, staged.fill)
    if pool.host_table.is_on_disk:
        pool.host_table.hand_over(moves.miss_rows.cpu())


def _move_in_place(pool: Pool, plan: CachePlan, streams: StageStreams) -> None:
    # Each direction waits for what frees its way: victims for Plan, missing rows for the victims' slots (hazards 2, 3).
    with pool.failing_for_good(f"moving the rows of batch {plan.batch_index} failed"):
        streams.wait(streams.writeback, plan.planned)
        with streams.on(streams.writeback), plan.timed(Stage.COLLECT, (Count.WRITEBACKS,)):
            write_back(pool, plan)
            written_back = streams.record(streams.writeback)
        streams.wait(streams.fill, written_back)
        with streams.on(streams.fill), plan.timed(Stage.INSERT, (Count.FILLS,)):
            fill(pool, plan)
            plan.moved = streams.record(streams.fill)


def write_back(pool: Pool, plan: CachePlan) -> None:
    """Collect, exchange and insert victims, in place: from their slots to their table."""
    with pool.slot_map.ops.recorded(plan.buffers, _key(pool, Count.WRITEBACKS)) as is_enqueued:
        if not is_enqueued:
            _enqueue_writeback(pool, plan.buffers)


def fill(pool: Pool, plan: CachePlan) -> None:
    """Collect, exchange and insert missing rows, in place: from their table to their slots."""
    with pool.slot_map.ops.recorded(plan.buffers, _key(pool, Count.FILLS)) as is_enqueued:
        if not is_enqueued:
            _enqueue_fill(pool, plan.buffers)


def _enqueue_writeback(pool: Pool, buffers: PlanBuffers) -> None:
    ops = pool.slot_map.ops
    rows, places = _order(pool, buffers, buffers.victim_rows, Count.WRITEBACKS)
    for table, slots in zip(pool.host_table.parts, pool.scratchpad.parts, strict=True):
        ops.move(slots, places, table, rows, buffers.counts, Count.WRITEBACKS)


def _enqueue_fill(pool: Pool, buffers: PlanBuffers) -> None:
    ops = pool.slot_map.ops
    rows, places = _order(pool, buffers, buffers.miss_rows, Count.FILLS)
    for table, slots in zip(pool.host_table.parts, pool.scratchpad.parts, strict=True):
        ops.move(table, rows, slots, places, buffers.counts, Count.FILLS)


def _order(pool: Pool, buffers: PlanBuffers, rows: Tensor, count: Count) -> tuple[Tensor, Tensor]:
    slot_map = pool.slot_map
    order_buffers = slot_map.order_buffers.get(count)
    if order_buffers is None:
        return rows, buffers.miss_slots
    return slot_map.ops.order(rows, buffers.miss_slots, buffers.counts, count, slot_map.num_rows, order_buffers)


def _key(pool: Pool, count: Count) -> tuple[int, ...]:
    """Tells apart all that moves of one set of buffers depend on; tables stay where they are."""
    return (count, pool.slot_map.num_remakes, *(part.data_ptr() for part in pool.scratchpad.parts))
