# SPDX-License-Identifier: BSD-3-Clause
"""The monitor tells what was counted, changes nothing, and its advice comes true."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from core_helpers import SlotMapOfRows
from helpers import DEVICE, Setting, Trainer, assert_same_bits, drain, make_batches
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe import Advice, ConfigError, ScratchPipeMonitor, scratchpad_stats
from torchrec_scratchpipe.monitoring.advice import advice_of
from torchrec_scratchpipe.monitoring.looks import NUM_LEVELS, MissCurve, PoolWatch
from torchrec_scratchpipe.monitoring.window import PoolWindow, Speeds, StepWindow, as_json

SETTING = Setting(num_rows=(60, 90), dims=(4, 4), load_factor=0.5)
SKEWED = Setting(num_rows=(20_000, 30_000), dims=(4, 4), load_factor=0.1, batch_size=256)
COUNTED = ("num_ids", "num_unique_ids", "num_unique_misses", "num_victims", "fill_bytes", "writeback_bytes")
OTHERS = ("num_stalls", "num_slot_waits", "num_growths", "num_rows_reset", "num_disk_rows_read")


def skewed_batches(setting: Setting, num_batches: int, exponent: float = 1.0, seed: int = 0) -> list[Batch]:
    """One id a sample and table, by a Zipf law, popular rows spread over the table."""
    generator = np.random.default_rng(seed)
    columns = []
    for rows in setting.num_rows:
        cumulative = np.cumsum(np.arange(1, rows + 1) ** -exponent)
        ranks = np.searchsorted(cumulative, generator.random((num_batches, setting.batch_size)) * cumulative[-1])
        columns.append(generator.permutation(rows)[np.minimum(ranks, rows - 1)])
    ids = torch.from_numpy(np.stack(columns, axis=1))  # [batches, tables, samples]
    return [
        Batch(
            dense_features=torch.rand(setting.batch_size, 3, dtype=torch.float32),
            sparse_features=KeyedJaggedTensor(
                keys=[f"f{index}" for index in range(len(setting.num_rows))],
                values=some.reshape(-1),
                lengths=torch.ones(some.numel(), dtype=torch.int32),
            ),
            labels=torch.zeros(setting.batch_size, dtype=torch.float32),
        )
        for some in ids
    ]


class Scalars:
    def __init__(self) -> None:
        self.of_step: dict[int, dict[str, float]] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.of_step.setdefault(global_step, {})[tag] = scalar_value


def test_training_is_the_same_to_the_bit() -> None:
    batches = make_batches(SETTING)
    watched, unwatched = Trainer.scratchpipe(SETTING), Trainer.scratchpipe(SETTING)
    watched.copy_from(unwatched)
    pipeline = watched.pipeline()
    with ScratchPipeMonitor(watched.model, pipeline, every=7):
        drain(pipeline, batches)
    drain(unwatched.pipeline(), batches)
    assert watched.num_victims > 0
    assert_same_bits(unwatched, watched)


@pytest.mark.parametrize("seen_ahead", [0, 3])
def test_windows_add_up_to_what_pools_count(seen_ahead: int) -> None:
    trainer = Trainer.scratchpipe(SETTING)
    pipeline = trainer.pipeline(num_batches_seen_ahead=seen_ahead)
    iterator = iter(make_batches(SETTING))
    for _ in range(4):
        pipeline.progress(iterator)
    trainer.model.module.ebc.wait_until_idle()
    before = scratchpad_stats(trainer.model)
    with ScratchPipeMonitor(trainer.model, pipeline, every=8) as monitor:
        drain(pipeline, iterator)  # type: ignore[arg-type]
        assert [window.last_step for window in monitor.windows] == list(range(8, 97, 8))
    for index, (first, last) in enumerate(zip(before, scratchpad_stats(trainer.model), strict=True)):
        windows = [window.pools[index] for window in monitor.windows]
        num_batches = sum(window.num_batches for window in windows)
        assert last.num_batches - first.num_batches == num_batches  # the last look is at the last batch
        for name in (*COUNTED, *OTHERS):
            assert getattr(last, name) - getattr(first, name) == sum(getattr(window, name) for window in windows), name
        for position, table in enumerate(last.tables):
            of_table = [window.tables[position] for window in windows]
            misses = sum(window.num_unique_misses for window in of_table)
            assert table.num_unique_misses - first.tables[position].num_unique_misses == misses
        assert windows[-1].num_misses_at_train == 0
        assert windows[-1].num_resident_rows == last.num_resident_rows
        assert windows[-1].num_slots == last.num_slots
        assert windows[-1].scratchpad_bytes == last.scratchpad_bytes
        assert windows[-1].num_victims > 0


def test_every_window_is_told_to_all_who_listen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, scalars, path = Trainer.scratchpipe(SETTING), Scalars(), tmp_path / "windows.jsonl"
    pipeline = trainer.pipeline()
    with (
        caplog.at_level(logging.INFO, "torchrec_scratchpipe"),
        ScratchPipeMonitor(trainer.model, pipeline, 10, scalars, path) as monitor,
    ):
        drain(pipeline, make_batches(SETTING, num_batches=35))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["last_step"] for line in lines] == [10, 20, 30] == list(scalars.of_step)
    for window, line in zip(monitor.windows, lines, strict=True):
        assert line == {**as_json(window), "advice": line["advice"]}
    last = monitor.windows[-1]
    assert last.samples_per_s == pytest.approx(60 / last.seconds)
    assert round(last.pools[0].misses_per_batch, 6) == scalars.of_step[30]["scratchpipe_pool_0/misses_per_batch"]
    assert scalars.of_step[30]["scratchpipe_table_t1/num_ids"] == last.pools[0].tables[1].num_ids
    assert len([record for record in caplog.records if record.message.startswith("step ")]) == 3
    assert set(last.pools[0].stage_ms) >= {"plan", "collect", "insert", "train"}


def test_tensorboard_itself_takes_the_figures(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="needs tensorboard")
    trainer = Trainer.scratchpipe(SETTING)
    pipeline = trainer.pipeline()
    with (
        tensorboard.SummaryWriter(str(tmp_path)) as writer,
        ScratchPipeMonitor(trainer.model, pipeline, 10, writer, log=False),
    ):
        drain(pipeline, make_batches(SETTING, num_batches=20))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("scratchpipe/step_p50_ms")] == [10, 20]


def test_stock_pipeline_and_no_pipeline_call_step() -> None:
    trainer = Trainer.scratchpipe(SETTING)
    batches = make_batches(SETTING, num_batches=20)
    pipeline = TrainPipelineSparseDist(trainer.model, trainer.optimizer, DEVICE)
    with ScratchPipeMonitor(trainer.model, pipeline, every=10) as monitor:
        iterator = iter(batches)
        for batch in batches:
            pipeline.progress(iterator)
            monitor.step(batch)
    assert [window.num_steps for window in monitor.windows] == [10, 10]
    assert monitor.windows[0].samples_per_s is not None
    pipeline.detach()
    with ScratchPipeMonitor(trainer.model, every=5) as monitor:
        for batch in batches[:10]:
            trainer.step(batch)
            monitor.step()
    assert [window.samples_per_s for window in monitor.windows] == [None, None]


def test_a_monitor_that_fails_stops_no_job(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = make_batches(SETTING)
    trainer, twin = Trainer.scratchpipe(SETTING), Trainer.scratchpipe(SETTING)
    trainer.copy_from(twin)

    def fail(*_: Any) -> None:
        raise RuntimeError("of a look")

    monkeypatch.setattr(PoolWatch, "_parts", fail)
    pipeline = trainer.pipeline()
    with ScratchPipeMonitor(trainer.model, pipeline, every=10, json_lines="/dev/full") as monitor:
        drain(pipeline, batches)
    assert not monitor.windows
    assert caplog.text.count("is watched no more") == len(trainer.model.module.ebc.pools)
    drain(twin.pipeline(), batches)
    assert_same_bits(twin, trainer)


def test_a_full_disk_stops_no_job(caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer.scratchpipe(SETTING)
    pipeline = trainer.pipeline()
    with ScratchPipeMonitor(trainer.model, pipeline, every=10, json_lines="/dev/full", log=False) as monitor:
        drain(pipeline, make_batches(SETTING))
    assert len(monitor.windows) == 10
    assert caplog.text.count("no more figures are written") == 1


def test_closed_monitor_watches_no_more() -> None:
    trainer = Trainer.scratchpipe(SETTING)
    pipeline = trainer.pipeline()
    monitor = ScratchPipeMonitor(trainer.model, pipeline, every=5)
    with pytest.raises(ConfigError, match="another monitor"):
        ScratchPipeMonitor(trainer.model, pipeline)
    batches = iter(make_batches(SETTING))
    for _ in range(10):
        pipeline.progress(batches)
    monitor.close()
    monitor.close()
    drain(pipeline, batches)  # type: ignore[arg-type]
    assert len(monitor.windows) == 2
    ScratchPipeMonitor(trainer.model, pipeline).close()


@pytest.mark.parametrize("every", [0, -1, 2.0, True, "10"])
def test_bad_number_of_steps_is_refused(every: Any) -> None:
    with pytest.raises(ConfigError, match="every is"):
        ScratchPipeMonitor(Trainer.scratchpipe(SETTING).model, every=every)


def test_model_without_scratchpad_is_refused() -> None:
    with pytest.raises(ConfigError, match="no scratchpad"):
        ScratchPipeMonitor(Trainer(SETTING).model)


def test_an_error_of_a_hook_leaves_the_pipeline_as_it_is() -> None:
    trainer, twin = Trainer.scratchpipe(SETTING), Trainer.scratchpipe(SETTING)
    twin.copy_from(trainer)
    batches = make_batches(SETTING, num_batches=10)
    pipeline, seen = trainer.pipeline(), []

    def hook(batch: Batch) -> None:
        seen.append(batch)
        if len(seen) == 4:
            raise RuntimeError("of a hook")

    handle = pipeline.register_progress_hook(hook)
    iterator = iter(batches)
    for _ in range(3):
        pipeline.progress(iterator)
    with pytest.raises(RuntimeError, match="of a hook"):
        pipeline.progress(iterator)
    handle.remove()
    drain(pipeline, iterator)  # type: ignore[arg-type]
    drain(twin.pipeline(), batches)
    assert len(seen) == 4
    assert_same_bits(twin, trainer)


# Advice: what it predicts, and what is counted once it has been followed.


def counted(setting: Setting, batches: Sequence[Batch], **pipeline: Any) -> tuple[PoolWindow, list[Advice], StepWindow]:
    """The last window of a run, when its scratchpad is full."""
    trainer = Trainer.scratchpipe(setting)
    ours = trainer.pipeline(**pipeline)
    with ScratchPipeMonitor(trainer.model, ours, every=len(batches) // 2, log=False) as monitor:
        drain(ours, batches)
    return monitor.windows[-1].pools[0], monitor.advice, monitor.windows[-1]


@pytest.mark.parametrize(
    ("load_factor", "exponent", "seen_ahead"), [(0.1, 1.0, 0), (0.1, 1.0, 5), (0.2, 0.8, 5), (0.05, 1.2, 0)]
)
def test_misses_with_other_numbers_of_slots_come_true(load_factor: float, exponent: float, seen_ahead: int) -> None:
    setting = dataclasses.replace(SKEWED, load_factor=load_factor)
    batches = skewed_batches(setting, 160, exponent)
    pool, *_ = counted(setting, batches, num_batches_seen_ahead=seen_ahead)
    for factor in (0.7, 2.0):
        other = dataclasses.replace(setting, load_factor=load_factor * factor)
        after, *_ = counted(other, batches, num_batches_seen_ahead=seen_ahead)
        predicted = pool.curve.misses_with(after.num_slots)
        if predicted == float("inf"):  # what is seen ahead would not fit: nothing is said
            continue
        assert predicted == pytest.approx(after.misses_per_batch, rel=0.05), factor
        assert (
            abs(after.misses_per_batch - pool.misses_per_batch) > 0.05 * pool.misses_per_batch
        )  # it made a difference


def follow(setting: Setting, advice: Advice) -> Setting:
    return dataclasses.replace(setting, load_factor=advice.settings["load_factor"])


def test_smaller_scratchpad_misses_as_predicted() -> None:
    setting = dataclasses.replace(SKEWED, load_factor=0.6)
    batches = skewed_batches(setting, 300, exponent=1.3)
    pool, _, window = counted(setting, batches)
    calm = dataclasses.replace(window, stall_share=0.0)  # this machine may be slow just now
    (advice,) = [one for one in advice_of(calm, Speeds(1e12), 2) if one.kind == "smaller_scratchpad"]
    after, *_ = counted(follow(setting, advice), batches)
    assert after.num_slots < 0.95 * pool.num_slots
    assert advice.predicted["misses_per_batch"] == pytest.approx(after.misses_per_batch, rel=0.05)
    assert after.misses_per_batch < 1.1 * pool.misses_per_batch + 1
    assert after.num_slot_waits == after.num_growths == 0


def test_larger_scratchpad_misses_as_predicted() -> None:
    batches = skewed_batches(SKEWED, 240)
    pool, _, window = counted(SKEWED, batches)
    slow = dataclasses.replace(window, stall_share=0.5)
    (advice,) = [one for one in advice_of(slow, Speeds(1e12), 2) if one.kind == "larger_scratchpad"]
    after, *_ = counted(follow(SKEWED, advice), batches)
    assert after.num_slots == pytest.approx(2 * pool.num_slots, rel=0.01)
    assert advice.predicted["misses_per_batch"] == pytest.approx(after.misses_per_batch, rel=0.05)
    assert after.misses_per_batch < 0.9 * pool.misses_per_batch


@pytest.mark.parametrize("lookahead", [2, 4])
@pytest.mark.host_path
def test_plan_waits_no_more_with_what_it_is_told_to_set(lookahead: int) -> None:
    setting = dataclasses.replace(SKEWED, load_factor=0.014)  # some more slots than one batch needs
    batches = skewed_batches(setting, 80, exponent=0.6)
    pool, advice, _ = counted(setting, batches, lookahead=lookahead)
    (waits,) = [one for one in advice if one.kind == "slot_waits"]
    assert pool.num_slot_waits > 0.5 * pool.num_batches
    after, later_advice, _ = counted(follow(setting, waits), batches, lookahead=lookahead)
    assert after.num_slot_waits == waits.predicted["slot_wait_share"] == 0
    assert "slot_waits" not in {one.kind for one in later_advice}
    needed = (lookahead + 1) * after.num_unique_ids / after.num_batches
    assert after.num_slots < 1.2 * needed  # no more than it takes
    if "lookahead" in waits.settings:
        with_less, *_ = counted(setting, batches, lookahead=int(waits.settings["lookahead"]))
        assert with_less.num_slot_waits == 0


@pytest.mark.host_path
def test_growth_is_named_with_the_size_to_begin_with() -> None:
    setting = dataclasses.replace(SKEWED, load_factor=0.002)
    batches = skewed_batches(setting, 50)
    trainer = Trainer.scratchpipe(setting)
    pipeline = trainer.pipeline()
    with ScratchPipeMonitor(trainer.model, pipeline, every=50, log=False) as monitor:
        drain(pipeline, batches)
    (growths,) = [one for one in monitor.advice if one.kind == "growths"]
    after, *_ = counted(follow(setting, growths), batches)
    assert after.num_growths == growths.predicted["num_growths"] == 0


# Rules of which no run on a CPU can be sure: figures are put together by hand.


@pytest.fixture(scope="module")
def window() -> StepWindow:
    return counted(SETTING, make_batches(SETTING))[2]


def kinds(window: StepWindow, **changes: Any) -> set[str]:
    of_window = {name: changes.pop(name) for name in ("stall_share",) if name in changes}
    pool = dataclasses.replace(window.pools[0], **{"num_slot_waits": 0, "fill_bus_share": 0.0, **changes})
    changed = dataclasses.replace(window, pools=(pool,), **{"stall_share": 0.0, **of_window})
    return {advice.kind for advice in advice_of(changed, Speeds(1e9, 1e5), 2)}


def test_the_bus_is_the_limit(window: StepWindow) -> None:
    assert "bus" in kinds(window, fill_bus_share=0.9)
    assert "bus" in kinds(window, writeback_bus_share=0.9)
    assert "bus" not in kinds(window, fill_bus_share=0.7)


def test_the_disk_is_the_limit(window: StepWindow) -> None:
    assert "disk" in kinds(window, disk_share=0.9)
    assert "disk" not in kinds(window, disk_share=0.7)
    assert "disk" not in kinds(window, disk_share=None)


def test_stalls_that_nothing_else_explains(window: StepWindow) -> None:
    assert "stages" in kinds(window, stall_share=0.5, num_stalls=3)
    assert "stages" not in kinds(window, stall_share=0.01, num_stalls=3)
    assert "stages" not in kinds(window, stall_share=0.5, num_stalls=3, fill_bus_share=0.9)
    assert "stages" not in kinds(window, stall_share=0.5, num_stalls=3, num_slot_waits=50)


def test_curve_of_few_levels() -> None:
    def levels(*numbers: float) -> Any:
        return np.concatenate([np.array(numbers), np.zeros(NUM_LEVELS - len(numbers))])

    curve = MissCurve(
        num_slots=100,
        num_unique=50.0,
        num_misses=20.0,
        num_first_uses=5.0,
        num_pinned=40.0,
        resident=levels(20, 40),
        absent=levels(30, 10),
        hits=levels(2, 6),
        misses=levels(4, 8),
    )
    assert [curve.misses_with(slots) for slots in (100, 90, 80, 60, 40)] == [20, 21, 22, 25, 28]
    assert curve.misses_with(39) == float("inf")
    assert [curve.misses_with(slots) for slots in (110, 125, 140, 1000)] == [12, 10, 8, 8]


def test_pieces_of_a_window_are_json(window: StepWindow) -> None:
    content = as_json(dataclasses.replace(window, step_p50_ms=float("nan")))
    assert json.loads(json.dumps(content, allow_nan=False))["step_p50_ms"] is None
    assert "looks" not in content["pools"][0]


@pytest.mark.parametrize("seen_ahead", [0, 4])
def test_a_look_counts_what_is_there(seen_ahead: int) -> None:
    """Beside a plain count of the same batches."""
    num_rows, num_slots, lookahead = 120, 60, 2
    slot_map = SlotMapOfRows(num_rows, num_slots)
    pool: Any = SimpleNamespace(
        slot_map=slot_map, scratchpad=SimpleNamespace(num_slots=num_slots), host_table=SimpleNamespace(tables=[0])
    )
    watch = PoolWatch(pool, 1)
    watch.start()
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.rand(10, generator=generator) ** 2 * num_rows).long() for _ in range(80)]
    seen = [slot_map.see(rows) if seen_ahead else None for rows in batches[:seen_ahead]]
    last_use: dict[int, int] = {}
    in_flight: list[int] = []
    checked = 0
    for now, rows in enumerate(batches):
        if seen_ahead:
            seen.append(slot_map.see(batches[now + seen_ahead]) if now + seen_ahead < len(batches) else None)
        plan = slot_map.plan(rows, seen[now] if seen_ahead else None)
        looks = watch.take()
        assert looks is not None
        curve = looks.curve
        unique, misses = set(rows.tolist()), set(plan.miss_rows.tolist())
        held = {row for some in batches[max(0, now - lookahead) : now + 1] for row in some.tolist()}
        resident = set(slot_map.maps.slot_to_row[slot_map.maps.slot_to_row >= 0].tolist())
        ahead = {row for some in batches[now + 1 : now + 1 + seen_ahead] for row in some.tolist()}
        left = set(last_use) - resident - unique
        assert looks.held.tolist() == [len(held)]
        assert looks.num_resident == len(resident)
        assert curve.num_pinned == len(held | (resident & ahead))
        assert curve.resident.sum() == len(resident - held - ahead)
        assert curve.absent.sum() == len(left)
        assert curve.num_unique == len(unique)
        assert curve.num_misses == len(misses)
        assert curve.num_first_uses == len(unique - set(last_use))
        assert curve.misses.sum() == len(misses & set(last_use))
        ages = [now - last_use[row] for row in unique - misses]
        assert looks.hits_by_age.sum() == len(ages)
        assert all(looks.hits_by_age[age - 1] == ages.count(age) for age in set(ages) if age < 60)
        num_held = plan.batch_index - min([*in_flight, plan.batch_index])
        num_ahead = slot_map.num_seen_ahead
        assert curve.hits.sum() == sum(age > num_held + num_ahead + 1 for age in ages)
        checked += curve.hits.sum() > 0 and curve.misses.sum() > 0
        last_use |= dict.fromkeys(unique, now)
        in_flight.append(plan.batch_index)
        if len(in_flight) > lookahead:
            slot_map.release(in_flight.pop(0))
    assert checked > 20
