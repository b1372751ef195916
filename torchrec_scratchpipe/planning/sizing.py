# SPDX-License-Identifier: BSD-3-Clause
"""Decides how many slots each table brings, and which tables stay in device memory whole, within a budget per rank.

Shapes: ``W`` ranks.

Every table starts with the rows of the batches in flight. What is left of the budget goes, step by step, to where a
byte saves most misses; the last step of a table is to be kept whole, which costs no map and no second copy.
"""

import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from torchrec_scratchpipe.core.memory import PoolDemand
from torchrec_scratchpipe.planning.reuse import Floats, Reuse, misses_of_pool

__all__ = ["ShardToSize", "SizedTable", "TableToSize", "size_tables"]

GROWTH = 1.3  # of slots, from step to step


@dataclass(frozen=True)
class ShardToSize:
    """One shard of a table."""

    rank: int
    share: float  # of the table's slots that lie here: its share of the rows
    demand: PoolDemand
    pool: Hashable = None  # shards of a rank that agree in it share slots


@dataclass(frozen=True)
class TableToSize:
    """One table, placed and not yet sized."""

    name: str
    reuse: Reuse
    min_slots: int  # of the whole table
    shards: tuple[ShardToSize, ...]
    may_have_slots: bool = True
    may_have_more: bool = True
    may_stay_whole: bool = True
    group: Hashable = None  # tables of a rank that agree in it are looked up together, and planned together


@dataclass(frozen=True)
class SizedTable:
    """How a table is kept."""

    table: TableToSize
    num_slots: int  # of the whole table; 0 if it is kept whole
    ranks_with_plans: frozenset[int] = frozenset()  # where a whole table is looked up together with scratchpads

    @property
    def is_whole(self) -> bool:
        """Whether it is kept in device memory whole, without a scratchpad."""
        return self.num_slots == 0


class _Costs:
    """A table's device memory on the ranks where it has shards."""

    def __init__(self, table: TableToSize) -> None:
        self.ranks = np.unique([shard.rank for shard in table.shards])
        position = {int(rank): index for index, rank in enumerate(self.ranks)}
        self._fixed, self._per_slot, self._whole, self.plans = (np.zeros(len(self.ranks)) for _ in range(4))
        for shard in table.shards:
            index = position[shard.rank]
            self._fixed[index] += shard.demand.fixed_bytes
            self._per_slot[index] += shard.demand.slot_bytes * shard.share
            self._whole[index] += shard.demand.whole_bytes
            self.plans[index] += shard.demand.plan_bytes

    def of(self, num_slots: float) -> Floats:
        """Bytes on each of the ranks; 0 slots for the whole table."""
        return self._whole + self.plans if num_slots == 0 else self._fixed + self._per_slot * num_slots


def size_tables(tables: Sequence[TableToSize], free_bytes: Floats) -> tuple[list[SizedTable], Floats]:
    """Give every table its slots, within [W] bytes of device memory that ranks have free.

    Returns [W] bytes that are left; negative where not even the least fits.
    """
    # 1. The least that each table must have.
    left = free_bytes.astype(np.float64).copy()
    costs = [_Costs(table) for table in tables]
    num_slots: list[float] = []
    for table, cost in zip(tables, costs, strict=True):
        least = _least(table, cost)
        num_slots.append(least)
        left[cost.ranks] -= cost.of(least)
    _drop_plans(tables, costs, num_slots, left)
    if left.min(initial=0.0) < 0:
        return _sized(tables, costs, num_slots), left
    # 2. The best step for its bytes, again and again. Where a group ends up without scratchpads, the bytes of its plans
    # come back, and buy more.
    is_changed = True
    while is_changed:
        _grow(tables, costs, num_slots, left, may_stay_whole=True)
        is_changed = _drop_plans(tables, costs, num_slots, left)
    # 3. What is too little to keep another table whole still buys slots.
    _grow(tables, costs, num_slots, left, may_stay_whole=False)
    return _sized(tables, costs, num_slots), left


def _drop_plans(
    tables: Sequence[TableToSize], costs: Sequence[_Costs], num_slots: Sequence[float], left: Floats
) -> bool:
    """Charge no plans where a group has whole tables alone; changes `costs` and `left`, and tells whether it did."""
    has_scratchpads: dict[Hashable, np.ndarray] = {}
    for table, cost, slots in zip(tables, costs, num_slots, strict=True):
        if slots > 0:
            has_scratchpads.setdefault(table.group, np.zeros(len(left), np.bool_))[cost.ranks] = True
    nowhere = np.zeros(len(left), np.bool_)
    is_changed = False
    for table, cost, slots in zip(tables, costs, num_slots, strict=True):
        is_dropped = ~has_scratchpads.get(table.group, nowhere)[cost.ranks] & (cost.plans > 0)
        if slots == 0 and is_dropped.any():
            left[cost.ranks[is_dropped]] += cost.plans[is_dropped]
            cost.plans[is_dropped] = 0.0
            is_changed = True
    return is_changed


def _grow(
    tables: Sequence[TableToSize],
    costs: Sequence[_Costs],
    num_slots: list[float],
    left: Floats,
    *,
    may_stay_whole: bool,
) -> None:
    """Take steps in the order of what they save per byte, as far as there is room; changes `num_slots` and `left`."""
    # Steps of one table come in their order, because they save less and less per byte.
    steps = [
        step
        for index, table in enumerate(tables)
        for step in _steps(index, table, costs[index], num_slots[index], table.may_stay_whole and may_stay_whole)
    ]
    is_finished = [slots == 0 for slots in num_slots]
    for step in sorted(steps, key=lambda step: -step.misses_saved_per_byte):
        if is_finished[step.table_index]:
            continue
        cost, now = costs[step.table_index], num_slots[step.table_index]
        more = cost.of(step.num_slots) - cost.of(now)
        if np.all(more <= left[cost.ranks]):
            left[cost.ranks] -= more
            num_slots[step.table_index] = step.num_slots
        # A scratchpad may take a part of a step; a table is whole or is not.
        elif step.num_slots > 0:
            share = float(np.min(left[cost.ranks] / np.maximum(more, 1e-9)))
            part = math.floor(now + max(0.0, share) * (step.num_slots - now))
            left[cost.ranks] -= cost.of(part) - cost.of(now)
            num_slots[step.table_index] = part
        is_finished[step.table_index] = step.num_slots == 0 or num_slots[step.table_index] != step.num_slots


class _Point(NamedTuple):
    """What a table takes, and what it misses."""

    num_bytes: float
    misses: float
    num_slots: float  # 0: the whole table


@dataclass(frozen=True)
class _Step:
    table_index: int
    num_slots: float  # 0: the whole table
    misses_saved_per_byte: float


def _least(table: TableToSize, cost: _Costs) -> float:
    """The slots to start with; 0 where the whole table takes no more."""
    if not table.may_have_slots:
        return 0.0
    is_smaller_whole = cost.of(0).sum() <= cost.of(table.min_slots).sum()
    return 0.0 if table.may_stay_whole and is_smaller_whole else float(table.min_slots)


def _steps(index: int, table: TableToSize, cost: _Costs, least: float, may_stay_whole: bool) -> list[_Step]:
    """From `least` slots to the whole table, along the lower convex hull of misses over bytes."""
    if least == 0 or not table.may_have_more:
        return []
    num_rows = table.reuse.num_rows
    num_steps = math.ceil(math.log(max(1.0, num_rows / least)) / math.log(GROWTH))
    slots = [float(n) for n in np.geomspace(least, num_rows, num_steps + 1)] if num_steps else [least]
    points = [_Point(cost.of(n).sum(), _misses(table.reuse, n), n) for n in slots]
    if may_stay_whole:
        # the whole table takes less than as many slots as rows, and never misses
        whole = cost.of(0).sum()
        points = [point for point in points if point.num_bytes < whole] + [_Point(whole, 0.0, 0.0)]
    hull: list[_Point] = []
    for point in points:
        if hull and hull[-1].misses <= point.misses:  # no better for more bytes
            continue
        # A corner that lies above the line from the one before it to the new point is none.
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [_Step(index, after.num_slots, _slope(before, after)) for before, after in itertools.pairwise(hull)]


def _slope(before: _Point, after: _Point) -> float:
    """Misses saved per byte."""
    return (before.misses - after.misses) / max(after.num_bytes - before.num_bytes, 1e-9)


def _misses(reuse: Reuse, num_slots: float) -> float:
    """Per batch, in the second half, when the scratchpad is full."""
    (misses,) = misses_of_pool([reuse], num_slots)
    return reuse.in_second_half(misses)


def _sized(tables: Sequence[TableToSize], costs: Sequence[_Costs], num_slots: Sequence[float]) -> list[SizedTable]:
    return [
        SizedTable(table, int(slots), frozenset(cost.ranks[cost.plans > 0].tolist()) if slots == 0 else frozenset())
        for table, cost, slots in zip(tables, costs, num_slots, strict=True)
    ]
