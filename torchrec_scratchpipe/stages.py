# SPDX-License-Identifier: BSD-3-Clause
"""Moves rows: Plan, Collect, Exchange and Insert of one batch, in this order, before its Train.

Shapes: ``I`` ids, ``M`` misses, ``V`` victims.

Plan asks :class:`SlotMap` which row sits where; the other stages do as the plan says. Who runs them, and in which order
they must run, is :mod:`torchrec_scratchpipe.runner`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchrec_scratchpipe.pool import Pool
from torchrec_scratchpipe.row_parts import read_rows, write_rows
from torchrec_scratchpipe.types import CachePlan, StagedRows

__all__ = ["collect", "exchange", "insert", "plan"]


def plan(pool: Pool, rows: Tensor, num_ids_per_table: Sequence[int], seen: int | None = None) -> CachePlan:
    """Stage 1: decide where the batch's rows go and which rows leave; moves nothing.

    Args:
        pool: The pool.
        rows: [I] int64 row ids on the planning device.
        num_ids_per_table: How many of them belong to each table; for statistics.
        seen: What :meth:`SlotMap.see` returned for the batch.

    Returns:
        The cache plan.

    Raises:
        SlotsHeldError: Batches in flight hold too many slots for now.
    """
    cache_plan = pool.slot_map.plan(rows, seen)
    pool.counters.add_plan(cache_plan, num_ids_per_table)
    return cache_plan


def collect(pool: Pool, cache_plan: CachePlan) -> StagedRows:
    """Stage 2: copy missing rows out of the table, and victims out of the scratchpad, into staging.

    Args:
        pool: The pool.
        cache_plan: What Plan decided.

    Returns:
        Staged rows: `fill` on the host, `writeback` on the device.
    """
    miss_rows = cache_plan.miss_rows.cpu()
    fill = pool.staging.take("fill", miss_rows.numel())
    pool.host_table.read(miss_rows, fill)
    if pool.slot_map.device.type == "cpu":
        writeback = pool.staging.take("writeback", cache_plan.victim_slots.numel())
        read_rows(pool.scratchpad.parts, cache_plan.victim_slots, writeback)
    else:
        writeback = [part.index_select(0, cache_plan.victim_slots) for part in pool.scratchpad.parts]
    return StagedRows(fill, writeback)


def exchange(pool: Pool, staged: StagedRows) -> StagedRows:
    """Stage 3: carry staged rows over the bus, both ways; on a CPU both sides are the same memory.

    Args:
        pool: The pool.
        staged: What Collect gave.

    Returns:
        Staged rows: `fill` on the device, `writeback` on the host.
    """
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


def insert(pool: Pool, cache_plan: CachePlan, staged: StagedRows) -> None:
    """Stage 4: write victims to their table and missing rows to their slots.

    Args:
        pool: The pool.
        cache_plan: What Plan decided.
        staged: What Exchange gave.
    """
    pool.host_table.write(cache_plan.victim_rows.cpu(), staged.writeback)
    write_rows(pool.scratchpad.parts, cache_plan.miss_slots, staged.fill)
