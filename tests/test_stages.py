# SPDX-License-Identifier: BSD-3-Clause
"""The stages move rows without loss, and each hazard's guard is needed."""

import gc
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from core_helpers import (
    CPU,
    MostRecentlyUsed,
    RandomVictims,
    UnguardedSlotMap,
    check_training,
    expected_parts,
    make_pool,
    max_diff,
    planned,
    random_rows,
    run,
    train,
)
from torch import Tensor

from torchrec_scratchpipe.core import stages
from torchrec_scratchpipe.core.batch import Batch, FeatureSource
from torchrec_scratchpipe.core.rows import StagedRows
from torchrec_scratchpipe.core.runner import OverlappedStageRunner, StageRunner
from torchrec_scratchpipe.core.slot_map import CachePlan
from torchrec_scratchpipe.core.slot_ops import FeatureIds, FeatureRows
from torchrec_scratchpipe.core.stages import collect, exchange, insert, plan_rows
from torchrec_scratchpipe.core.torch_ops import TorchOps, rows_of_ids
from torchrec_scratchpipe.errors import (
    IdOutOfRangeError,
    ScratchpadFullError,
    StageFailedError,
    TableOverwrittenError,
)

pytestmark = pytest.mark.any_torchrec

RUNNERS = [StageRunner, OverlappedStageRunner]
VICTIMS = [TorchOps, RandomVictims, MostRecentlyUsed]


@pytest.mark.parametrize("runner_class", RUNNERS)
@pytest.mark.parametrize("ops", VICTIMS)
@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_trained_tables_are_exact(runner_class: type[StageRunner], ops: type[TorchOps], lookahead: int) -> None:
    check_training(make_pool(ops=ops()), runner_class(CPU), lookahead)


@pytest.mark.parametrize("ops", [RandomVictims, MostRecentlyUsed])
def test_hazards_1_and_3_without_hold_rows_are_lost(ops: type[TorchOps]) -> None:
    pool = make_pool(ops=ops(), slot_map_class=UnguardedSlotMap)
    batches = random_rows(num_batches=200, ids_per_batch=6)
    expected = expected_parts(pool, batches)
    run(pool, batches, StageRunner(CPU), lookahead=2)
    assert pool.stats().num_misses_at_train > 0
    assert max_diff(expected, pool.host_table.parts) > 1e-3


@pytest.mark.parametrize("is_guarded", [True, False])
def test_hazard_2_collect_must_not_pass_the_insert_before_it(is_guarded: bool) -> None:
    pool = make_pool(ops=MostRecentlyUsed())
    runner = StageRunner(CPU)
    batches = random_rows(num_batches=200, ids_per_batch=6)
    expected = expected_parts(pool, batches)

    def plan(rows: Tensor) -> CachePlan:
        pool.slot_map.take_in_releases()
        cache_plan = plan_rows(planned(pool, rows, runner), 0.0)
        assert pool.slot_map.confirm(cache_plan)
        return cache_plan

    for first, second in zip(batches[::2], batches[1::2], strict=True):
        plans = [plan(first)]
        staged = [_copied(collect(pool, plans[0].moves()))]
        if is_guarded:
            insert(pool, plans[0].moves(), exchange(pool, staged[0]))
        plans.append(plan(second))
        staged.append(_copied(collect(pool, plans[1].moves())))
        if not is_guarded:
            insert(pool, plans[0].moves(), exchange(pool, staged[0]))
        insert(pool, plans[1].moves(), exchange(pool, staged[1]))
        for cache_plan in plans:
            train(pool.scratchpad.parts, cache_plan.slots[: cache_plan.num_ids])
            pool.note_update()
            pool.slot_map.release(cache_plan.batch_index)
    pool.flush()
    assert pool.stats().num_victims > 300
    assert (max_diff(expected, pool.host_table.parts) == 0.0) == is_guarded


def _copied(staged: StagedRows) -> StagedRows:
    return StagedRows([part.clone() for part in staged.fill], [part.clone() for part in staged.writeback])


def test_hazard_4_train_waits_for_insert(monkeypatch: pytest.MonkeyPatch) -> None:
    may_insert = threading.Event()

    def late_insert(*args: object) -> None:
        assert may_insert.wait(timeout=30)
        insert(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(stages, "insert", late_insert)
    pool = make_pool()
    runner = OverlappedStageRunner(CPU)
    rows = torch.arange(6)
    batch = planned(pool, rows, runner)
    runner.submit(batch)
    time.sleep(0.2)
    assert batch.is_pending
    # Without the wait, Train would find slots that are promised but not filled.
    promised = pool.slot_map.maps.row_to_slot[rows].long()
    assert int((promised >= 0).sum()) == 6
    assert max_diff([pool.scratchpad.parts[0][promised]], [pool.host_table.parts[0][rows]]) > 1e-3
    threading.Timer(0.5, may_insert.set).start()  # when Train has begun to wait
    slots = runner.wait(batch)
    assert torch.equal(pool.scratchpad.parts[0][slots], pool.host_table.parts[0][rows])
    assert pool.stats().num_stalls == 1


@pytest.mark.parametrize("is_guarded", [True, False])
def test_hazard_5_a_table_is_stale_until_flushed(is_guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool()
    if not is_guarded:
        monkeypatch.setattr(pool, "flush", lambda: None)
    batches = random_rows(num_batches=20, ids_per_batch=6)
    expected = expected_parts(pool, batches)
    run(pool, batches, OverlappedStageRunner(CPU), lookahead=2)
    assert (max_diff(expected, pool.host_table.parts) == 0.0) == is_guarded


def test_hazard_5_flush_between_batches_keeps_training_exact() -> None:
    pool = make_pool()
    runner = OverlappedStageRunner(CPU)
    batches = random_rows(num_batches=60, ids_per_batch=6)
    for start in range(0, 60, 20):
        expected = expected_parts(pool, batches[start : start + 20])
        run(pool, batches[start : start + 20], runner, lookahead=2)
        assert max_diff(expected, pool.host_table.parts) == 0.0


@pytest.mark.parametrize("is_guarded", [True, False])
def test_hazard_6_planned_batches_train_what_was_loaded(is_guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool()
    if not is_guarded:
        monkeypatch.setattr(pool, "refresh", lambda: None)
    runner = StageRunner(CPU)
    batches = random_rows(num_batches=20, ids_per_batch=6)
    run(pool, batches[:10], runner, lookahead=2)
    in_flight = [planned(pool, rows, runner) for rows in batches[10:12]]
    for batch in in_flight:
        runner.submit(batch)
    pool.purge()
    assert pool.slot_map.num_batches_in_flight == 2
    for part in pool.host_table.parts:
        part.fill_(5.0)
    expected = expected_parts(pool, batches[10:])
    for batch in in_flight:
        train(pool.scratchpad.parts, runner.wait(batch))
        runner.release(batch, is_updated=True)
    run(pool, batches[12:], runner, lookahead=2)
    assert (max_diff(expected, pool.host_table.parts) == 0.0) == is_guarded


@pytest.mark.parametrize("is_guarded", [True, False])
def test_hazard_6_slots_released_while_tables_are_overwritten_do_not_wake_the_worker(is_guarded: bool) -> None:
    pool = make_pool(num_slots=10)
    runner = OverlappedStageRunner(CPU)
    first, second = (planned(pool, torch.arange(start, start + 7), runner) for start in (0, 5))
    runner.submit(first)
    slots = runner.wait(first)
    runner.submit(second)  # has to wait for slots that the first one holds
    if is_guarded:
        runner.pause()
    else:
        runner.wait_until_idle()
    with runner.between_batches():
        pool.purge()
    # A graph that is collected only now lets go of its slots.
    runner.release(first)
    time.sleep(0.1)
    for part in pool.host_table.parts:
        part.data.fill_(5.0)  # which leaves no trace in the tensor's version
    del slots
    assert second.is_pending == is_guarded
    second_slots = runner.wait(second)
    is_fresh = bool((pool.scratchpad.parts[0][second_slots] == 5.0).all())
    assert is_fresh == is_guarded


def test_hazard_6_a_ready_batch_waits_while_the_worker_reads_rows_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool()
    runner = OverlappedStageRunner(CPU)
    first, second = (planned(pool, torch.arange(start, start + 7), runner) for start in (0, 20))
    runner.submit(first)
    runner.wait_until_idle()
    runner.pause()
    with runner.between_batches():
        pool.flush()
    for part in pool.host_table.parts:
        part.fill_(5.0)
    refresh, is_refreshing = pool.refresh, threading.Event()

    def refresh_late() -> None:
        is_refreshing.set()
        time.sleep(0.1)
        refresh()

    monkeypatch.setattr(pool, "refresh", refresh_late)
    runner.submit(second)
    is_refreshing.wait()
    assert bool((pool.scratchpad.parts[0][runner.wait(first)] == 5.0).all())


@pytest.mark.parametrize("is_batch_trained_since", [False, True])
def test_hazard_6_a_table_that_is_written_in_place_is_noticed(is_batch_trained_since: bool) -> None:
    pool = make_pool()
    runner = StageRunner(CPU)
    batches = random_rows(num_batches=12, ids_per_batch=6)
    run(pool, batches[:8], runner, lookahead=2)
    pool.flush()
    if is_batch_trained_since:
        batch = planned(pool, batches[8], runner)
        runner.submit(batch)
        train(pool.scratchpad.parts, runner.wait(batch))
        runner.release(batch, is_updated=True)
    with torch.no_grad():
        pool.host_table.table_parts(0)[0][3:20].mul_(2.0)
    batch = planned(pool, batches[9], runner)
    runner.submit(batch)
    if is_batch_trained_since:  # its rows are newer in the scratchpad, and would be lost
        with pytest.raises(TableOverwrittenError, match=r"Take a state_dict\(\) right before you write"):
            runner.wait(batch)
        return
    expected = expected_parts(pool, batches[9:])
    train(pool.scratchpad.parts, runner.wait(batch))
    runner.release(batch, is_updated=True)
    run(pool, batches[10:], runner, lookahead=2)
    pool.flush()
    assert max_diff(expected, pool.host_table.parts) == 0.0


def test_purge_without_batches_in_flight_empties_the_scratchpad() -> None:
    pool = make_pool()
    run(pool, random_rows(num_batches=5, ids_per_batch=6), StageRunner(CPU), lookahead=1)
    pool.purge()
    assert pool.stats().num_resident_rows == 0


def test_int32_ids_are_widened_before_the_row_offset_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool()
    monkeypatch.setattr(pool.host_table, "row_offsets", [3_000_000_000])
    batch = planned(pool, torch.tensor([5, 6], dtype=torch.int32), StageRunner(CPU))
    assert rows_of_ids(*batch.pool_ids[0]).tolist() == [3_000_000_005, 3_000_000_006]


def test_purge_keeps_what_was_trained() -> None:
    pool = make_pool()
    batches = random_rows(num_batches=10, ids_per_batch=6)
    expected = expected_parts(pool, batches)
    runner = StageRunner(CPU)
    for rows in batches:
        batch = planned(pool, rows, runner)
        runner.submit(batch)
        train(pool.scratchpad.parts, runner.wait(batch))
        runner.release(batch, is_updated=True)
    pool.purge()
    assert max_diff(expected, pool.host_table.parts) == 0.0


@pytest.mark.parametrize("runner_class", RUNNERS)
def test_batches_that_do_not_fit_together_wait_for_train(runner_class: type[StageRunner]) -> None:
    pool = make_pool(num_slots=10)
    batches = [torch.randperm(60, generator=torch.Generator().manual_seed(i))[:7] for i in range(50)]
    expected = expected_parts(pool, batches)
    run(pool, batches, runner_class(CPU), lookahead=4)
    assert max_diff(expected, pool.host_table.parts) == 0.0
    assert runner_class is OverlappedStageRunner or pool.stats().num_stalls > 0


@pytest.mark.parametrize("runner_class", RUNNERS)
def test_one_batch_too_large_is_an_error_and_nothing_is_lost(runner_class: type[StageRunner]) -> None:
    pool = make_pool(num_slots=10)
    runner = runner_class(CPU)
    batches = random_rows(num_batches=10, ids_per_batch=6)
    expected = expected_parts(pool, batches + batches)
    run(pool, batches, runner, lookahead=1)
    batch = planned(pool, torch.arange(30), runner)
    runner.submit(batch)
    message = r"pool of table t0 \(dim 4\): one batch needs 30 slots, the scratchpad has 10. Raise load_factor to at"
    with pytest.raises(ScratchpadFullError, match=message):
        runner.wait(batch)
    assert pool.slot_map.num_batches_in_flight == 0
    run(pool, batches, runner, lookahead=1)
    assert max_diff(expected, pool.host_table.parts) == 0.0


@pytest.mark.parametrize("runner_class", RUNNERS)
def test_slots_held_by_others_are_an_error_not_a_deadlock(runner_class: type[StageRunner]) -> None:
    pool = make_pool(num_slots=10)
    runner = runner_class(CPU)
    first = planned(pool, torch.arange(8), runner)
    runner.submit(first)
    runner.wait(first)
    blocked = planned(pool, torch.arange(20, 28), runner)
    runner.submit(blocked)
    urgent = planned(pool, torch.arange(8, 10), runner)  # fits beside the first; must not queue behind the blocked one
    runner.submit(urgent)
    assert runner.wait(urgent).numel() == 2
    with pytest.raises(ScratchpadFullError, match="all but 0 are held by batches since the oldest"):
        runner.wait(blocked)
    runner.release(first)
    runner.release(urgent)
    again = planned(pool, torch.arange(20, 28), runner)
    runner.submit(again)
    assert runner.wait(again).numel() == 8


@pytest.mark.parametrize("bad_id", [-1, 60])
def test_id_out_of_range_names_table_id_and_range(bad_id: int) -> None:
    pool = make_pool()
    runner = OverlappedStageRunner(CPU)
    batch = planned(pool, torch.tensor([3, bad_id]), runner)
    runner.submit(batch)
    with pytest.raises(IdOutOfRangeError, match=rf"table t0: feature f0 has id {bad_id}, there are rows \[0, 60\)"):
        runner.wait(batch)
    assert pool.slot_map.num_batches_in_flight == 0
    assert pool.stats().num_resident_rows == 0


def test_empty_batch() -> None:
    pool = make_pool()
    runner = OverlappedStageRunner(CPU)
    run(pool, [torch.empty(0, dtype=torch.int64), torch.tensor([1, 1]), torch.empty(0, dtype=torch.int64)], runner, 2)
    assert pool.stats().num_unique_ids == 1


@pytest.mark.fault("an exception in a stage")
def test_failure_in_collect_takes_the_plan_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool()
    runner = OverlappedStageRunner(CPU)
    batches = random_rows(num_batches=20, ids_per_batch=6)
    expected = expected_parts(pool, batches + batches)
    run(pool, batches, runner, lookahead=2)
    resident = pool.slot_map.maps.row_to_slot.clone()

    def no_memory(*_args: object) -> StagedRows:
        raise MemoryError("no room for staging")

    with monkeypatch.context() as patch:
        patch.setattr(stages, "collect", no_memory)
        batch = planned(pool, torch.arange(40, 50), runner)
        runner.submit(batch)
        with pytest.raises(MemoryError, match="no room for staging"):
            runner.wait(batch)
    assert torch.equal(resident.clamp(min=-1), pool.slot_map.maps.row_to_slot.clamp(min=-1))
    pool.slot_map.check_integrity()
    run(pool, batches, runner, lookahead=2)
    assert max_diff(expected, pool.host_table.parts) == 0.0


@pytest.mark.fault("an exception in a stage")
def test_failure_in_insert_stops_the_pool_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool()
    runner = OverlappedStageRunner(CPU)
    run(pool, random_rows(num_batches=5, ids_per_batch=6), runner, lookahead=1)

    def torn(*_args: object) -> None:
        raise RuntimeError("torn")

    with monkeypatch.context() as patch:
        patch.setattr(stages, "insert", torn)
        batch = planned(pool, torch.arange(40, 50), runner)
        runner.submit(batch)
        with pytest.raises(StageFailedError, match="torn"):
            runner.wait(batch)
    later = planned(pool, torch.arange(3), runner)
    runner.submit(later)
    with pytest.raises(StageFailedError, match="load a checkpoint"):
        runner.wait(later)
    with pytest.raises(StageFailedError):
        pool.flush()


def test_a_batch_that_is_dropped_lets_go_of_its_slots() -> None:
    pool = make_pool()
    runner = OverlappedStageRunner(CPU)
    batch = planned(pool, torch.arange(6), runner)
    runner.submit(batch)
    runner.wait(batch)
    assert pool.slot_map.num_batches_in_flight == 1
    del batch
    gc.collect()
    assert pool.slot_map.num_batches_in_flight == 0


def test_worker_ends_with_its_runner() -> None:
    pool = make_pool()
    runner = OverlappedStageRunner(CPU)
    run(pool, random_rows(num_batches=3, ids_per_batch=6), runner, lookahead=1)
    thread = runner._thread
    assert thread is not None
    assert thread.is_alive()
    del runner
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_worker_that_is_suspended_ends_with_its_runner_too() -> None:
    pool = make_pool(num_slots=10)
    runner = OverlappedStageRunner(CPU)
    first, second = (planned(pool, torch.arange(start, start + 7), runner) for start in (0, 5))
    runner.submit(first)
    runner.wait(first)
    runner.submit(second)  # has to wait for slots
    runner.pause()
    thread = runner._thread
    assert thread is not None
    del runner, first, second, pool
    gc.collect()
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_suspended_worker_serves_a_batch_that_train_waits_for() -> None:
    """A thread that reads states suspends again and again, while another one trains."""
    pool = make_pool(num_slots=10)
    runner = OverlappedStageRunner(CPU)
    first, second = (planned(pool, torch.arange(start, start + 7), runner) for start in (0, 5))
    runner.submit(first)
    runner.wait(first)
    runner.submit(second)
    trainer = threading.Thread(target=runner.wait, args=(second,))
    for entry in runner._queue.waiting():
        entry.is_awaited = True  # the trainer waits already ...
    runner.pause()  # ... when somebody pauses
    runner.release(first)
    trainer.start()
    runner.pause()
    trainer.join(timeout=5)
    assert not trainer.is_alive()


class RunnerOfADevice(OverlappedStageRunner):
    """Says that its worker enqueues on a device; everything happens on a CPU."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.streams.plan = SimpleNamespace(synchronize=lambda: None)  # type: ignore[assignment]


@pytest.mark.parametrize("make_runner", [RunnerOfADevice, lambda: OverlappedStageRunner(CPU)], ids=["device", "cpu"])
@pytest.mark.parametrize("is_waited_for", [False, True])
def test_a_worker_that_only_enqueues_waits_until_forward_is_issued_or_somebody_waits_for_it(
    is_waited_for: bool, make_runner: Callable[[], OverlappedStageRunner]
) -> None:
    runner = make_runner()
    is_device = runner.streams.plan is not None
    pool = make_pool(num_slots=30)
    batches = [planned(pool, torch.arange(index, index + 5), runner) for index in range(3)]
    with runner.holding_back():
        for batch in batches:
            runner.submit(batch)
        if is_device:
            assert runner._queue._find_work() is None
        else:
            runner.wait_until_idle()
        assert [batch.is_pending for batch in batches] == [is_device] * 3
        runner.wait(batches[0])  # Train goes ahead
        assert [batch.is_pending for batch in batches] == [False, is_device, is_device]
        if is_waited_for:
            runner.wait_until_idle()
            assert [batch.is_pending for batch in batches] == [False] * 3
    runner.wait_until_idle()
    assert [batch.is_pending for batch in batches] == [False] * 3
    for batch in batches[1:]:
        runner.wait(batch)
    for batch in batches:
        runner.release(batch)


def test_a_batch_that_was_interrupted_while_it_was_made_leaves_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", errors.append)
    pool = make_pool()

    class Interrupting(list[FeatureRows]):
        def __iter__(self) -> Iterator[FeatureRows]:
            raise KeyboardInterrupt

    ids = FeatureIds(torch.arange(3), torch.tensor([0, 3]))
    with pytest.raises(KeyboardInterrupt):
        Batch([pool], [FeatureSource("f0", 0, 0)], ids, Interrupting(), StageRunner(CPU).release)
    gc.collect()
    assert errors == []
