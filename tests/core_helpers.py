# SPDX-License-Identifier: BSD-3-Clause
"""A pool with a simulated Train, and eviction orders that provoke hazards."""

from collections import deque
from collections.abc import Sequence

import torch
from device_path import ReachableRam
from torch import Tensor

from torchrec_scratchpipe.device_batch import DeviceBatch, feature_rows
from torchrec_scratchpipe.device_ops import DeviceOps, FeatureIds, FeatureRows
from torchrec_scratchpipe.device_slot_map import DevicePlan, DeviceSlotMap, PoolIds
from torchrec_scratchpipe.eviction import EvictionOrder, SlotUses
from torchrec_scratchpipe.host_table import HostTable, RamStorage, TableStorage
from torchrec_scratchpipe.planned_batch import FeatureSource, PlannedBatch
from torchrec_scratchpipe.pool import Pool
from torchrec_scratchpipe.runner import StageRunner
from torchrec_scratchpipe.scratchpad import allocate_scratchpads
from torchrec_scratchpipe.slot_map import SlotMap
from torchrec_scratchpipe.stats import PoolStats
from torchrec_scratchpipe.streams import StageStreams
from torchrec_scratchpipe.types import CachePlan, RowLayout, StateSpec, TableSpec

CPU = torch.device("cpu")
LAYOUT = RowLayout(dim=4, dtype=torch.float32, states=(StateSpec("momentum1", is_rowwise=True),))


class ScanningOrder:
    """Base of orders that look at every slot; good enough for tests."""

    def used(self, slots: Tensor, notes_of_new: Tensor, batch_index: int, last_use: Tensor) -> None:
        pass

    def note(self, slots: Tensor) -> Tensor | None:
        return None

    def rebuild(self, last_use: Tensor, next_batch: int) -> None:
        pass

    def purge(self) -> None:
        pass

    def choose(self, num_victims: int, uses: SlotUses, first_held: int) -> Tensor:
        last_use = uses.last_use
        candidates = ((last_use >= 0) & (last_use < first_held)).nonzero().view(-1)
        return self.sort(candidates, last_use)[:num_victims]

    def sort(self, candidates: Tensor, last_use: Tensor) -> Tensor:
        raise NotImplementedError


class RandomOrder(ScanningOrder):
    def __init__(self, num_slots: int) -> None:
        self._generator = torch.Generator().manual_seed(num_slots)

    def sort(self, candidates: Tensor, last_use: Tensor) -> Tensor:
        return candidates[torch.randperm(candidates.numel(), generator=self._generator)]


class MostRecentlyUsed(ScanningOrder):
    def __init__(self, num_slots: int) -> None:
        pass

    def sort(self, candidates: Tensor, last_use: Tensor) -> Tensor:
        return candidates[last_use[candidates].argsort(descending=True, stable=True)]


class UnguardedSlotMap(SlotMap):
    """Hazards 1 and 3 let loose: only the batch that is being planned holds its slots, batches in flight do not."""

    @property
    def first_held(self) -> int:
        return self._next_batch


class DeviceSlotMapOfRows(DeviceSlotMap):
    """A device slot map that takes rows, as :class:`SlotMap` does, and says at once what it has planned."""

    def __init__(self, num_rows: int, num_slots: int, ops: DeviceOps) -> None:
        super().__init__(num_rows, num_slots, [0, num_rows], ops, CPU)
        self.plans: dict[int, DevicePlan] = {}

    def see(self, rows: Tensor) -> int | None:  # type: ignore[override]
        return super().see(self.ids_of(rows))

    def forget(self, seen: int, rows: Tensor) -> None:  # type: ignore[override]
        super().forget(seen, self.ids_of(rows))

    def plan(self, rows: Tensor, seen: int | None = None) -> CachePlan:  # type: ignore[override]
        is_confirmed = False
        while not is_confirmed:
            self.note_releases()
            plan = super().plan(self.ids_of(rows), seen)
            is_confirmed = self.confirm(plan)
        self.plans = {plan.batch_index: plan}
        cache_plan = self.cache_plan(plan)
        return CachePlan(*(value.clone() if isinstance(value, Tensor) else value for value in cache_plan))._replace(
            unique_slots=cache_plan.slots.unique()
        )

    def undo(self, plan: CachePlan) -> None:  # type: ignore[override]
        super().undo(self.plans[plan.batch_index])

    def ids_of(self, rows: Tensor) -> PoolIds:
        features = FeatureRows(torch.tensor([0]), torch.tensor([self.num_rows]), torch.tensor([0], dtype=torch.int32))
        return PoolIds(FeatureIds(rows, torch.tensor([0, rows.numel()])), features)


def make_pool(
    num_rows: int = 60,
    num_slots: int = 20,
    eviction_order: EvictionOrder | None = None,
    slot_map_class: type[SlotMap] = SlotMap,
    storage: TableStorage | None = None,
) -> Pool:
    host_table = HostTable([TableSpec("t0", num_rows, num_slots / num_rows)], LAYOUT, storage or RamStorage())
    for part in host_table.parts:
        part.copy_(torch.rand(part.shape, generator=torch.Generator().manual_seed(7)))
    memory = allocate_scratchpads([LAYOUT], [num_slots], CPU)
    return Pool(host_table, memory.scratchpads[0], slot_map_class(num_rows, num_slots, eviction_order, CPU))


def random_rows(num_batches: int, ids_per_batch: int, num_rows: int = 60, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(ids_per_batch, generator=generator) ** 2 * num_rows).long().clamp_(max=num_rows - 1)
        for _ in range(num_batches)
    ]


def make_device_pool(
    ops: DeviceOps, num_rows: int = 60, num_slots: int = 20, streams: StageStreams | None = None
) -> Pool:
    """As :func:`make_pool`, planned and filled by device operations that reach the table."""
    pool = make_pool(num_rows, num_slots, storage=ReachableRam())
    offsets = pool.host_table.row_offsets
    return Pool(pool.host_table, pool.scratchpad, DeviceSlotMap(num_rows, num_slots, offsets, ops, CPU, streams))


def planned(pool: Pool, rows: Tensor, runner: StageRunner) -> PlannedBatch:
    if isinstance(pool.slot_map, DeviceSlotMap):
        features = [FeatureSource("f0", 0, 0)]
        ids = FeatureIds(rows, torch.tensor([0, rows.numel()]))
        return DeviceBatch([pool], features, ids, feature_rows([pool], features, CPU), runner)
    return PlannedBatch([pool], [FeatureSource("f0", 0, 0)], rows, [0, rows.numel()], runner)


def train(parts: Sequence[Tensor], index: Tensor) -> None:
    """Update rows in a way that depends on what they were, so that a lost or stale row shows for ever."""
    weights, state = parts
    unique = index.unique()
    state[unique] += weights[unique].sum(dim=1) * 0.01 + 1.0
    weights[unique] = weights[unique] * 0.9 + 0.1 / state[unique, None]


def expected_parts(pool: Pool, batches: Sequence[Tensor]) -> list[Tensor]:
    """What the batches make of the table when nothing is cached; call before training."""
    parts = [part.clone() for part in pool.host_table.parts]
    for rows in batches:
        train(parts, rows)
    return parts


def run(pool: Pool, batches: Sequence[Tensor], runner: StageRunner, lookahead: int) -> None:
    """Train all batches, `lookahead` of them planned ahead, then flush."""
    in_flight: deque[PlannedBatch] = deque()
    remaining = deque(batches)
    while in_flight or remaining:
        while remaining and len(in_flight) <= lookahead:
            batch = planned(pool, remaining.popleft(), runner)
            runner.submit(batch)
            in_flight.append(batch)
        batch = in_flight.popleft()
        train(pool.scratchpad.parts, batch.wait())
        batch.hold.release(is_updated=True)
    with runner.between_batches():
        pool.flush()


def check_training(pool: Pool, runner: StageRunner, lookahead: int) -> PoolStats:
    """Train 200 batches through 20 slots: tables are exact, rows were evicted, counts agree."""
    batches = random_rows(num_batches=200, ids_per_batch=6)
    expected = expected_parts(pool, batches)
    run(pool, batches, runner, lookahead)
    assert max_diff(expected, pool.host_table.parts) == 0.0
    stats = pool.stats()
    assert stats.num_victims > 300
    assert stats.num_misses_at_train == 0
    assert stats.num_ids == 200 * 6
    assert stats.num_unique_misses - stats.num_victims == stats.num_resident_rows == 20
    pool.slot_map.check_integrity()
    return stats


def max_diff(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(expected, actual, strict=True))
