# SPDX-License-Identifier: BSD-3-Clause
"""Rows that the device plans and moves itself arrive in any order of the streams, and every event is needed."""

import random
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from core_helpers import (
    CPU,
    LAYOUT,
    RandomVictims,
    check_training,
    expected_parts,
    make_pool_in_place,
    max_diff,
    planned,
    random_rows,
    run,
    train,
)
from simulated_streams import DeferredOps, Device, InlineRunner, SimulatedStreams
from torch import Tensor

from torchrec_scratchpipe.core import row_log, slot_map
from torchrec_scratchpipe.core.batch import Batch, BatchState
from torchrec_scratchpipe.core.disk import MappedStorage, RamBudget
from torchrec_scratchpipe.core.disk_rows import DiskRows, RowsAhead
from torchrec_scratchpipe.core.host_table import HostTable
from torchrec_scratchpipe.core.pool import Pool
from torchrec_scratchpipe.core.row_log import Records
from torchrec_scratchpipe.core.rows import Stage
from torchrec_scratchpipe.core.runner import OverlappedStageRunner, StageRunner
from torchrec_scratchpipe.core.slot_map import CachePlan, SlotMap
from torchrec_scratchpipe.core.storage import TableStorage
from torchrec_scratchpipe.core.torch_ops import TorchOps
from torchrec_scratchpipe.core.triton_ops import TritonOps
from torchrec_scratchpipe.errors import IdOutOfRangeError, ScratchpadFullError, StageFailedError

pytestmark = pytest.mark.any_torchrec

RUNNERS = [StageRunner, OverlappedStageRunner]


@pytest.mark.parametrize("runner_class", RUNNERS)
@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_trained_tables_are_exact(runner_class: type[StageRunner], lookahead: int) -> None:
    pool = make_pool_in_place(TorchOps())
    stats = check_training(pool, runner_class(CPU), lookahead)
    assert stats.num_batches == 200
    spans = [span for span in pool.counters.spans if span.stage in (Stage.COLLECT, Stage.INSERT)]
    assert sum(span.num_bytes for span in spans) == stats.fill_bytes + stats.writeback_bytes


def simulate(
    pool: Pool,
    device: Device,
    runner: InlineRunner,
    batches: Sequence[Tensor],
    lookahead: int,
    drop_every: int = 0,
    num_seen_ahead: int = 0,
) -> list[Tensor]:
    """As `run`, on a device whose streams run in random order; the host runs ahead of it. Returns what was trained."""
    seen: deque[tuple[Batch, Tensor]] = deque()
    in_flight: deque[tuple[Batch, Tensor]] = deque()
    remaining = deque(batches)
    trained: list[Tensor] = []
    num_rounds = 0
    while in_flight or seen or remaining:
        while (seen or remaining) and len(in_flight) <= lookahead:
            with runner.streams.on(device.load):  # as a pipeline's, which is not ordered after Train
                while remaining and len(seen) <= num_seen_ahead:
                    rows = remaining.popleft()
                    seen.append((planned(pool, rows, runner), rows))
                    if num_seen_ahead:
                        runner.see(seen[-1][0])
                in_flight.append(seen.popleft())
                runner.submit(in_flight[-1][0])
            device.run_some()
        num_rounds += 1
        if drop_every and num_rounds % drop_every == 0:
            runner.release(in_flight.pop()[0])  # the newest, as reset() would
            continue
        batch, rows = in_flight.popleft()
        slots = runner.wait(batch)
        device.train.work.append(partial(train, pool.scratchpad.parts, slots))
        runner.release(batch, is_updated=True)
        trained.append(rows)
        device.run_some()
    with runner.between_batches():
        pool.flush()
    device.drain()
    return trained


def make_simulation(
    seed: int,
    missing_edges: Sequence[tuple[str, str]] = (),
    slow: Sequence[str] = (),
    num_slots: int = 30,
    is_certain: bool = True,
    storage: TableStorage | None = None,
) -> tuple[Pool, Device, InlineRunner]:
    device = Device(seed, slow)
    streams = SimulatedStreams(device, missing_edges)
    ops = DeferredOps(RandomVictims(seed), device)
    pool = make_pool_in_place(ops, num_slots=num_slots, streams=streams, storage=storage)
    if is_certain:  # else Plan waits for the device while slots are few, and little can go wrong
        pool.slot_map._is_certain = lambda num_ids: True
    return pool, device, InlineRunner(CPU, streams)


STREAMS = ["train", "plan", "writeback", "fill"]


@pytest.mark.parametrize("slow", [(), *((name,) for name in STREAMS)], ids=str)
@pytest.mark.parametrize("lookahead", [1, 2, 3])
def test_any_order_of_the_streams_gives_the_same_bits(lookahead: int, slow: tuple[str, ...]) -> None:
    for seed in range(8):
        pool, device, runner = make_simulation(seed, slow=slow)
        batches = random_rows(num_batches=60, ids_per_batch=6, seed=seed)
        expected = expected_parts(pool, batches)
        simulate(pool, device, runner, batches, lookahead)
        assert max_diff(expected, pool.host_table.parts) == 0.0
        stats = pool.stats()
        assert stats.num_victims > 60
        assert stats.num_misses_at_train == 0
        pool.slot_map.check_integrity()


@pytest.mark.parametrize(
    ("missing_edge", "slow"),
    [
        (("train", "plan"), "train"),  # hazard 1: a victim is read before its last update
        (("writeback", "fill"), "writeback"),  # hazards 2 and 3: its slot, or its row in the table, is used too early
        (("fill", "train"), "fill"),  # hazard 4
        (("plan", "writeback"), "plan"),  # rows are moved before it is known which
    ],
    ids=str,
)
def test_control_without_one_event_rows_are_lost(missing_edge: tuple[str, str], slow: str) -> None:
    num_wrong = 0
    for seed in range(8):
        pool, device, runner = make_simulation(seed, [missing_edge], (slow,))
        batches = random_rows(num_batches=60, ids_per_batch=6, seed=seed)
        expected = expected_parts(pool, batches)
        try:
            simulate(pool, device, runner, batches, lookahead=2)
        except IndexError:  # rows of a plan that is not there yet
            num_wrong += 1
            continue
        num_wrong += max_diff(expected, pool.host_table.parts) > 0.0 or pool.stats().num_misses_at_train > 0
    assert num_wrong >= 4


@pytest.mark.parametrize("is_guarded", [True, False])
def test_whoever_stands_between_batches_comes_after_train_whatever_stream_it_is_on(is_guarded: bool) -> None:
    num_wrong = 0
    for seed in range(8):
        pool, device, runner = make_simulation(seed, slow=("train",))
        batch = planned(pool, torch.arange(6), runner)
        runner.submit(batch)
        device.train.work.append(partial(train, pool.scratchpad.parts, runner.wait(batch)))
        expected = expected_parts(pool, [torch.arange(6)])
        runner.release(batch, is_updated=True)
        if not is_guarded:
            runner.streams._trains.clear()
        with runner.streams.on(device.load), runner.between_batches():
            pool.flush()
        device.drain()
        num_wrong += max_diff(expected, pool.host_table.parts) > 0.0
    assert (num_wrong == 0) == is_guarded


@pytest.mark.parametrize("missing_edges", [(), [("fill", "plan")]], ids=["guarded", "unguarded"])
def test_buffers_of_a_dropped_batch_are_used_again_when_its_rows_have_moved(
    missing_edges: Sequence[tuple[str, str]],
) -> None:
    num_wrong = 0
    for seed in range(12):
        pool, device, runner = make_simulation(seed, missing_edges, ("fill", "writeback"))
        batches = random_rows(num_batches=60, ids_per_batch=6, seed=seed)
        table = [part.clone() for part in pool.host_table.parts]
        trained = simulate(pool, device, runner, batches, lookahead=2, drop_every=3)
        assert len(trained) < 60
        for rows in trained:
            train(table, rows)
        num_wrong += max_diff(table, pool.host_table.parts) > 0.0 or pool.stats().num_misses_at_train > 0
    assert (num_wrong > 0) == bool(missing_edges)


@pytest.mark.parametrize("is_guarded", [True, False])
@pytest.mark.parametrize("what", ["larger batch", "newest first"])
def test_slots_of_dropped_batches_are_given_away_when_their_rows_have_moved(
    what: str, is_guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_guarded:
        monkeypatch.setattr(SlotMap, "_recycle", _recycle_without_event)
    num_wrong = 0
    for seed in range(8):
        pool, device, runner = make_simulation(seed, slow=("fill", "writeback"), num_slots=12)
        table = [part.clone() for part in pool.host_table.parts]
        batches = random_rows(num_batches=30, ids_per_batch=4, seed=seed)
        for index, rows in enumerate(batches):
            dropped = [planned(pool, rows + offset, runner) for offset in range(2)]
            for batch in dropped:
                runner.submit(batch)
            for batch in reversed(dropped) if what == "newest first" else dropped:
                runner.release(batch)
            num_ids = 1500 + 100 * index if what == "larger batch" else 4  # more than there is room for
            trained = torch.arange(40, 44).repeat(num_ids)[:num_ids] + index % 10
            batch = planned(pool, trained, runner)
            runner.submit(batch)
            slots = runner.wait(batch)
            device.train.work.append(partial(train, pool.scratchpad.parts, slots))
            runner.release(batch, is_updated=True)
            train(table, trained)
        with runner.between_batches():
            pool.flush()
        device.drain()
        num_wrong += max_diff(table, pool.host_table.parts) > 0.0
    assert (num_wrong == 0) == is_guarded


def _recycle_without_event(self: SlotMap, plan: CachePlan) -> None:
    if plan.buffers.rows.numel() == self._capacity:
        self._free_buffers.append((plan.buffers, plan.planned))


@pytest.mark.parametrize("lookahead", [1, 4])
def test_where_slots_are_few_plan_waits_to_see_and_nothing_is_lost(lookahead: int) -> None:
    for seed in range(8):
        pool, device, runner = make_simulation(seed, num_slots=10, is_certain=False)
        batches = [torch.randperm(60, generator=torch.Generator().manual_seed(i))[:7] for i in range(40)]
        expected = expected_parts(pool, batches)
        simulate(pool, device, runner, batches, lookahead)
        assert max_diff(expected, pool.host_table.parts) == 0.0
        assert pool.slot_map.num_waits > 30
        assert pool.stats().num_misses_at_train == 0


def test_where_slots_are_plenty_plan_never_waits() -> None:
    pool, device, runner = make_simulation(0, num_slots=30, is_certain=False)
    batches = random_rows(num_batches=60, ids_per_batch=6)
    simulate(pool, device, runner, batches, lookahead=2)  # 3 batches in flight and the next: at most 24 slots
    assert pool.slot_map.num_waits == 0
    assert pool.stats().num_victims > 60


def test_rows_pass_through_staging_while_there_are_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(6):
        die = random.Random(seed)
        monkeypatch.setattr(HostTable, "has_snapshots", property(lambda _, die=die: die.random() < 0.4))
        pool, device, runner = make_simulation(seed)
        batches = random_rows(num_batches=60, ids_per_batch=6, seed=seed)
        expected = expected_parts(pool, batches)
        simulate(pool, device, runner, batches, lookahead=2)
        assert max_diff(expected, pool.host_table.parts) == 0.0
        assert pool.stats().num_victims > 60


class AtOnce(Executor):
    """Runs what it is given when it is given."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future


@pytest.mark.parametrize("is_falsified", [False, True])
def test_rows_of_files_are_read_long_before_a_device_needs_them(
    is_falsified: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They pass through staging, in any order of the streams; and what was read ahead is what is used."""
    read_ahead = DiskRows.read_ahead

    def falsify(self: DiskRows, rows: Tensor) -> RowsAhead:
        ahead = read_ahead(self, rows)
        ahead.values[0].zero_()
        return ahead

    if is_falsified:
        monkeypatch.setattr(DiskRows, "read_ahead", falsify)
    monkeypatch.setattr(row_log, "SEGMENT_BYTES", 4 * Records(LAYOUT).num_bytes)
    num_wrong = num_from_disk = 0
    for seed in range(8):
        storage = MappedStorage(tmp_path, RamBudget(3 * Records(LAYOUT).num_bytes))
        pool, device, runner = make_simulation(seed, storage=storage)
        runner._asking = AtOnce()
        batches = random_rows(num_batches=60, ids_per_batch=6, seed=seed)
        expected = expected_parts(pool, batches)
        simulate(pool, device, runner, batches, lookahead=1, num_seen_ahead=6)
        num_wrong += max_diff(expected, pool.host_table.parts) > 0.0
        num_from_disk += pool.stats().num_disk_rows_read
    assert num_wrong == (8 if is_falsified else 0)
    assert num_from_disk > 500


@pytest.mark.parametrize("runner_class", RUNNERS)
def test_bad_id_stops_its_batch_alone(runner_class: type[StageRunner]) -> None:
    pool = make_pool_in_place(TorchOps(), num_slots=40)
    runner = runner_class(CPU)
    batches = random_rows(num_batches=20, ids_per_batch=6)
    expected = expected_parts(pool, batches)
    run(pool, batches[:10], runner, lookahead=2)
    bad, good = planned(pool, torch.tensor([3, 60, 4]), runner), planned(pool, batches[10], runner)
    runner.see(bad)
    runner.wait_until_idle()
    assert bad.state is BatchState.SEEN
    runner.submit(bad)
    runner.submit(good)
    with pytest.raises(IdOutOfRangeError, match=r"table t0: feature f0 has id 60, there are rows \[0, 60\)"):
        runner.wait(bad)
    with pytest.raises(IdOutOfRangeError):
        runner.wait(bad)
    train(pool.scratchpad.parts, runner.wait(good))
    runner.release(good, is_updated=True)
    run(pool, batches[11:], runner, lookahead=2)
    assert max_diff(expected, pool.host_table.parts) == 0.0
    pool.slot_map.check_integrity()  # no row waits for the bad batch any more


@pytest.mark.parametrize("runner_class", RUNNERS)
def test_one_batch_too_large_is_an_error_and_nothing_is_lost(runner_class: type[StageRunner]) -> None:
    pool = make_pool_in_place(TorchOps(), num_slots=10)
    runner = runner_class(CPU)
    batches = random_rows(num_batches=10, ids_per_batch=6)
    expected = expected_parts(pool, batches + batches)
    run(pool, batches, runner, lookahead=1)
    batch = planned(pool, torch.arange(30), runner)
    runner.submit(batch)
    with pytest.raises(ScratchpadFullError, match="one batch needs 30 slots, the scratchpad has 10"):
        runner.wait(batch)
    run(pool, batches, runner, lookahead=1)
    assert max_diff(expected, pool.host_table.parts) == 0.0
    pool.slot_map.check_integrity()


def test_a_move_that_fails_stops_the_pool_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool_in_place(TorchOps())
    runner = OverlappedStageRunner(CPU)
    run(pool, random_rows(num_batches=5, ids_per_batch=6), runner, lookahead=1)

    def torn(*_args: object) -> None:
        raise RuntimeError("torn")

    monkeypatch.setattr(pool.slot_map.ops, "move", torn)
    batch = planned(pool, torch.arange(40, 50), runner)
    runner.submit(batch)
    with pytest.raises(StageFailedError, match="torn"):
        runner.wait(batch)
    with pytest.raises(StageFailedError):
        pool.flush()


def test_nothing_is_allocated_once_buffers_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool_in_place(TorchOps(), num_rows=3000, num_slots=1000)
    runner = StageRunner(CPU)
    run(pool, random_rows(num_batches=10, ids_per_batch=200, num_rows=3000), runner, lookahead=2)
    num_bytes = pool.slot_map.metadata_bytes
    made: list[int] = []
    make_buffers = slot_map._make_buffers
    monkeypatch.setattr(slot_map, "_make_buffers", lambda *args: made.append(1) or make_buffers(*args))
    run(pool, random_rows(num_batches=30, ids_per_batch=200, num_rows=3000, seed=1), runner, lookahead=2)
    assert not made
    assert pool.slot_map.metadata_bytes == num_bytes
    run(pool, [torch.arange(900).repeat(3)], runner, lookahead=0)
    assert pool.slot_map.metadata_bytes > num_bytes
    assert made
    assert len(pool.slot_map._free_buffers) <= 2  # the smaller ones are gone


@pytest.mark.parametrize("is_guarded", [True, False])
def test_numbers_of_a_dropped_batch_are_not_overwritten_before_its_plan_has_copied_them(
    is_guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host writes them at once, and the device copies them when it gets to the plan."""
    device = Device(0)
    streams = SimulatedStreams(device)
    pool = make_pool_in_place(DeferredOps(TritonOps(), device), num_slots=30, streams=streams)
    runner = InlineRunner(CPU, streams)
    maps = pool.slot_map
    maps._is_certain = lambda num_ids: True
    if not is_guarded:
        monkeypatch.setattr(SlotMap, "_recycle", _recycle_at_once)
    planned_of_each = []
    for index in range(4):
        batch = planned(pool, torch.arange(5) + 5 * index, runner)
        maps.take_in_releases()
        with streams.on(streams.plan):
            plan = maps.plan(batch.pool_ids[0])
        assert maps.confirm(plan)
        maps.release(plan.batch_index)  # it is dropped, before the device has begun
        planned_of_each.append(plan.buffers)
    device.drain()
    assert len({id(buffers) for buffers in planned_of_each}) < 4  # some were used twice
    num_resident = maps.count_resident_rows()
    assert (num_resident == 20) == is_guarded  # else a plan read the numbers of a later one


def _recycle_at_once(slot_map: SlotMap, plan: CachePlan) -> None:
    slot_map._free_buffers.append((plan.buffers, None))
