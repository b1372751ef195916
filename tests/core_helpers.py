# SPDX-License-Identifier: BSD-3-Clause
"""A pool with a simulated Train, and choices of victims that provoke hazards."""

import itertools
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrec_scratchpipe.core.batch import Batch, FeatureSource, feature_rows
from torchrec_scratchpipe.core.host_table import HostTable
from torchrec_scratchpipe.core.pool import Pool
from torchrec_scratchpipe.core.rows import RowLayout, StateSpec, TableSpec
from torchrec_scratchpipe.core.runner import StageRunner
from torchrec_scratchpipe.core.scratchpad import allocate_scratchpads
from torchrec_scratchpipe.core.slot_map import CachePlan, PoolIds, SlotMap
from torchrec_scratchpipe.core.slot_ops import (
    HALF_LIFE,
    SEEN,
    FeatureIds,
    FeatureRows,
    PlanBuffers,
    PlanRequest,
    Sighting,
    SlotMaps,
    SlotOps,
)
from torchrec_scratchpipe.core.stats import PoolStats
from torchrec_scratchpipe.core.storage import RamStorage, TableStorage
from torchrec_scratchpipe.core.streams import StageStreams
from torchrec_scratchpipe.core.torch_ops import TorchOps

CPU = torch.device("cpu")
LAYOUT = RowLayout(dim=4, dtype=torch.float32, states=(StateSpec("momentum1", is_rowwise=True),))


class ReachableRam(RamStorage):
    """RAM that "kernels" of a CPU read and write in place."""

    is_device_accessible = True


class WrappedOps:
    """Operations that something is done with; none is recorded, so that it is done each time."""

    def __init__(self, ops: SlotOps) -> None:
        self._ops = ops
        self.orders_moves = ops.orders_moves

    def prepare(self, *args: Any) -> None:
        self._ops.prepare(*args)

    def recorded(self, buffers: PlanBuffers, key: Hashable) -> AbstractContextManager[bool]:
        return nullcontext(False)

    def order(self, *args: Any) -> tuple[Tensor, Tensor]:
        self._run("order", args)
        return args[-1].rows, args[-1].slots

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self._run(name, args)

    def _run(self, name: str, args: tuple[Any, ...]) -> None:
        getattr(self._ops, name)(*args)


class LaunchList:
    """A recorder for a CPU: what was launched for an earlier batch is launched again, with the same parameters."""

    def __init__(self) -> None:
        self._launches: list[Callable[[], None]] = []

    def add(self, kernel: Any, num_programs: int, args: Sequence[Tensor | int], options: Mapping[str, Any]) -> None:
        self._launches.append(lambda: kernel[(num_programs,)](*args, **options))

    def finish(self) -> Callable[[], None]:
        def replay() -> None:
            for launch in self._launches:
                launch()

        return replay


class ListedAnew(TorchOps):
    """Lists victims anew for every batch, in an order of its own."""

    def take(self, request: PlanRequest, maps: SlotMaps, *args: Any) -> None:
        if args[-1]:  # the first of two
            self.clear_victim_list(maps)
        super().take(request, maps, *args)

    def scan(self, request: PlanRequest, maps: SlotMaps, *args: Any) -> None:
        maps.frequency.copy_(self.frequencies(maps))
        super().scan(request, maps, *args)

    def frequencies(self, maps: SlotMaps) -> Tensor:
        """[S] float32: the slots with the lowest ones go first."""
        raise NotImplementedError


class RandomVictims(ListedAnew):
    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def frequencies(self, maps: SlotMaps) -> Tensor:
        return torch.empty_like(maps.frequency).exponential_(generator=self._generator)


class MostRecentlyUsed(ListedAnew):
    def frequencies(self, maps: SlotMaps) -> Tensor:
        return torch.exp2((maps.last_use.max() - maps.last_use) / 8 - 80)  # victims are listed by eighths of an octave


class LeastRecentlyUsed(ListedAnew):
    def frequencies(self, maps: SlotMaps) -> Tensor:
        return torch.exp2((maps.last_use - maps.last_use.max()) / 8 + 60)


class UnguardedSlotMap(SlotMap):
    """Hazards 1 and 3 let loose: only the batch that is being planned holds its slots, batches in flight do not."""

    def take_in_releases(self) -> None:
        super().take_in_releases()
        self.first_held = self.next_batch


class PlannedRows(NamedTuple):
    """What was planned for a batch, in tensors of the right sizes."""

    batch_index: int
    slots: Tensor  # [I]
    miss_rows: Tensor  # [M]
    miss_slots: Tensor  # [M]
    victim_rows: Tensor  # [V]
    victim_slots: Tensor  # [V]


class SlotMapOfRows(SlotMap):
    """A slot map that takes the rows of one table, and says at once what it has planned."""

    def __init__(self, num_rows: int, num_slots: int, ops: SlotOps | None = None, half_life: float = HALF_LIFE) -> None:
        super().__init__(num_rows, num_slots, [0, num_rows], ops or TorchOps(), CPU, half_life=half_life)
        self.plans: dict[int, CachePlan] = {}

    def see(self, rows: Tensor) -> int | None:  # type: ignore[override]
        return super().see(self.ids_of(rows))

    def plan(self, rows: Tensor, seen: int | None = None) -> PlannedRows:  # type: ignore[override]
        is_confirmed = False
        while not is_confirmed:
            self.take_in_releases()
            plan = super().plan(self.ids_of(rows), seen)
            is_confirmed = self.confirm(plan)
        self.plans = {plan.batch_index: plan}
        slots = plan.slots[: rows.numel()].clone()
        return PlannedRows(plan.batch_index, slots, *(tensor.clone() for tensor in plan.moves()))

    def undo(self, plan: PlannedRows) -> None:  # type: ignore[override]
        super().undo(self.plans[plan.batch_index])

    def ids_of(self, rows: Tensor) -> PoolIds:
        features = FeatureRows(torch.tensor([0]), torch.tensor([self.num_rows]), torch.tensor([0], dtype=torch.int32))
        return PoolIds(FeatureIds(rows, torch.tensor([0, rows.numel()])), features)


def check_ahead(maps: SlotMaps, seen: Sequence[tuple[Tensor, Sighting]]) -> None:
    """What is known of the batches that are ahead, oldest first, each with the rows of its ids, -1 for none."""
    ahead: dict[int, list[tuple[int, Sighting, Tensor]]] = {}
    for rows, sighting in seen:
        for row in rows[rows >= 0].unique().tolist():
            ahead.setdefault(row, []).append((row, sighting, (rows == row).nonzero().view(-1)))
    for row, entry in enumerate(maps.row_to_slot.tolist()):
        uses = ahead.get(row, [])
        # 1. The first of them.
        if entry >= 0:
            assert int(maps.next_use[entry]) == (uses[0][1].use if uses else 0), f"{row=}"
        # 2. From each of them to the next.
        for (_, sighting, positions), following in itertools.zip_longest(uses, uses[1:]):
            said = maps.sightings[sighting.first_place + positions]
            expected = [] if following is None else [following[1].use]
            assert said[said > 0].tolist() == expected, f"{row=}"
        # 3. The last of them.
        newest = int(maps.newest_sighting[entry]) if entry >= 0 else -1 - entry - SEEN
        if uses:
            assert newest in (uses[-1][1].first_place + uses[-1][2]).tolist(), f"{row=}"
        else:
            assert newest < 0, f"{row=}"


def make_pool(
    num_rows: int = 60,
    num_slots: int = 20,
    ops: SlotOps | None = None,
    slot_map_class: type[SlotMap] = SlotMap,
    storage: TableStorage | None = None,
    streams: StageStreams | None = None,
    layout: RowLayout = LAYOUT,
) -> Pool:
    host_table = HostTable([TableSpec("t0", num_rows, num_slots / num_rows)], layout, storage or RamStorage())
    for part in host_table.parts:
        generator = torch.Generator().manual_seed(7)
        for some in part.split(1 << 16):  # a table may be larger than RAM
            some.copy_(torch.rand(some.shape, generator=generator))
    memory = allocate_scratchpads([layout], [num_slots], CPU)
    slot_map = slot_map_class(num_rows, num_slots, host_table.row_offsets, ops or TorchOps(), CPU, streams)
    return Pool(host_table, memory.scratchpads[0], slot_map)


def make_pool_in_place(
    ops: SlotOps,
    num_rows: int = 60,
    num_slots: int = 20,
    streams: StageStreams | None = None,
    storage: TableStorage | None = None,
) -> Pool:
    """As :func:`make_pool`, filled by operations that reach the table, unless a storage is given that they do not."""
    return make_pool(num_rows, num_slots, ops, storage=storage or ReachableRam(), streams=streams)


def random_rows(num_batches: int, ids_per_batch: int, num_rows: int = 60, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(ids_per_batch, generator=generator) ** 2 * num_rows).long().clamp_(max=num_rows - 1)
        for _ in range(num_batches)
    ]


def planned(pool: Pool, rows: Tensor, runner: StageRunner) -> Batch:
    """A new batch; the runner has not been told of it."""
    features = [FeatureSource("f0", 0, 0)]
    ids = FeatureIds(rows, torch.tensor([0, rows.numel()]))
    return Batch([pool], features, ids, feature_rows([pool], features, CPU), runner.release)


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
    in_flight: deque[Batch] = deque()
    remaining = deque(batches)
    while in_flight or remaining:
        while remaining and len(in_flight) <= lookahead:
            batch = planned(pool, remaining.popleft(), runner)
            runner.submit(batch)
            in_flight.append(batch)
        batch = in_flight.popleft()
        train(pool.scratchpad.parts, runner.wait(batch))
        runner.release(batch, is_updated=True)
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
