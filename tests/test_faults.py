# SPDX-License-Identifier: BSD-3-Clause
"""What happens to jobs: killed, out of disk, interrupted, a rank gone. Nothing that was saved is lost.

`make faults` runs these and every other test marked `fault`, kills 50 times, and prints a table.
"""

import contextlib
import os
import random
import runpy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fault_jobs
import pytest
import torch
from processes import end, start
from test_examples import assert_same_checkpoints

pytestmark = pytest.mark.dist

NUM_KILLS = int(os.environ.get("SCRATCHPIPE_FAULT_TRIES", "3"))


@pytest.mark.fault("kill -9 at a random moment, then resume")
@pytest.mark.parametrize("is_mapped", [False, True])
def test_killed_jobs_resume_to_the_same_bits(
    is_mapped: bool, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    directories = [tmp_path / str(index) for index in range(NUM_KILLS + 1)]
    for directory in directories:
        (directory / "tables").mkdir(parents=True)

    def run(directory: Path) -> Any:
        table_dir = directory / "tables" if is_mapped else None
        return start(fault_jobs.train_and_save, directory, table_dir, 5)

    whole = run(directories[0])
    began_s = fault_jobs.wait_for(directories[0] / "began_at_0", whole)
    assert end(whole) == 0
    training_s = time.monotonic() - began_s
    expected = torch.load(directories[0] / "final.pt")
    rng = random.Random(7)
    num_killed_in_training = 0
    for directory in directories[1:]:
        killed = run(directory)
        fault_jobs.wait_for(directory / "began_at_0", killed)
        time.sleep(rng.random() * training_s)
        killed.kill()
        killed.join()
        saved = max((int(path.name[5:]) for path in directory.glob("checkpoints/step_*")), default=0)
        num_killed_in_training += not (directory / "final.pt").exists()
        assert list((directory / "tables").iterdir()) == []
        assert end(run(directory)) == 0
        assert (directory / f"began_at_{saved}").exists(), "a complete checkpoint was passed over"
        found = torch.load(directory / "final.pt")
        for name, tensors in expected.items():
            assert all(torch.equal(a, b) for a, b in zip(tensors, found[name], strict=True)), name
    record_property("tries", NUM_KILLS)
    record_property("note", f"{num_killed_in_training} of them in training")
    assert num_killed_in_training > 0


@pytest.mark.fault("kill -9 at a random moment of a job with a delta log, then resume")
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("is_mapped", [False, True])
def test_killed_jobs_resume_from_their_last_delta(
    is_mapped: bool, world_size: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    num_kills = max(2, NUM_KILLS // 2)
    directories = [tmp_path / str(index) for index in range(num_kills + 1)]
    for directory in directories:
        (directory / "tables").mkdir(parents=True)

    def run(directory: Path, attempt: int) -> list[Any]:
        table_dir = directory / "tables" if is_mapped else None
        job = fault_jobs.train_and_log
        return [start(job, directory, table_dir, rank, world_size, attempt) for rank in range(world_size)]

    whole = run(directories[0], 0)
    began_s = fault_jobs.wait_for(directories[0] / "began_0_0_0", whole[0])
    assert [end(each) for each in whole] == [0] * world_size
    training_s = time.monotonic() - began_s
    rng = random.Random(7)
    lost = []
    for directory in directories[1:]:
        ranks = run(directory, 0)
        fault_jobs.wait_for(directory / "began_0_0_0", ranks[0])
        time.sleep(rng.random() * training_s)
        for rank in rng.sample(ranks, world_size):
            rank.kill()
        for rank in ranks:
            rank.join()
        has_ended = all((directory / f"final_{rank}.pt").exists() for rank in range(world_size))
        has_checkpoint = bool(list(directory.glob("checkpoints/step_*")))  # the first is saved while training goes on
        progress = [directory / f"progress_{rank}" for rank in range(world_size)]
        # A batch has trained when `trained` has returned for it on all ranks.
        num_trained = min(int.from_bytes(path.read_bytes(), "little") if path.exists() else 0 for path in progress)
        statuses = [end(each) for each in run(directory, 1)]
        assert statuses == [0] * world_size, [path.read_text() for path in directory.glob("failed_1_*")]
        (began,) = directory.glob("began_1_0_*")
        if has_checkpoint and not has_ended:
            lost.append(num_trained - int(began.name.split("_")[-1]))
        for rank in range(world_size):
            expected = torch.load(directories[0] / f"final_{rank}.pt")
            found = torch.load(directory / f"final_{rank}.pt")
            for name, tensors in expected.items():
                assert all(torch.equal(a, b) for a, b in zip(tensors, found[name], strict=True)), name
    record_property("tries", num_kills)
    record_property("note", f"{len(lost)} of them in training, at most {max(lost, default=0)} batches lost")
    assert lost
    assert max(lost) <= fault_jobs.DELTA_EVERY


@pytest.mark.fault("kill -9 while deltas are being folded, then resume")
def test_jobs_that_are_killed_while_they_fold_resume_to_the_same_bits(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    num_kills = max(3, NUM_KILLS // 2)
    directories = [tmp_path / str(index) for index in range(num_kills + 1)]
    for directory in directories:
        directory.mkdir()
    assert end(start(fault_jobs.train_and_fold, directories[0])) == 0
    expected = torch.load(directories[0] / "final.pt")
    rng = random.Random(7)
    num_killed_in_fold = 0
    for directory in directories[1:]:
        killed = start(fault_jobs.train_and_fold, directory)
        fault_jobs.wait_for(directory / "began_at_0", killed)
        last_base = rng.randrange(1, fault_jobs.SETTING.num_batches // 2)
        while killed.is_alive():  # until one of the folds has just begun
            steps = [int(path.name[6:18]) for path in directory.glob("checkpoints/.fold_*.unfinished")]
            if max(steps, default=0) > last_base:
                break
            time.sleep(0.001)
        if directory != directories[1]:  # the first is killed at once, for a fold may take less than what follows
            time.sleep(rng.random() * 0.03)
        killed.kill()
        killed.join()
        assert not (directory / "final.pt").exists(), "it was to be killed in training"
        num_killed_in_fold += bool(list(directory.glob("checkpoints/.fold_*.unfinished")))
        assert end(start(fault_jobs.train_and_fold, directory)) == 0
        assert not list(directory.glob("checkpoints/.fold_*.unfinished"))
        (went_on,) = (int(path.name[9:]) for path in directory.glob("began_at_*") if path.name != "began_at_0")
        assert went_on > last_base
        found = torch.load(directory / "final.pt")
        for name, tensors in expected.items():
            assert all(torch.equal(a, b) for a, b in zip(tensors, found[name], strict=True)), name
    record_property("tries", num_kills)
    record_property("note", f"{num_killed_in_fold} of them in a fold")
    assert num_killed_in_fold > 0


@pytest.mark.fault("kill -9 under a memory limit that tables in files exceed, page cache dropped")
def test_a_job_under_a_memory_limit_is_killed_and_resumes(tmp_path: Path) -> None:
    benchmark = Path(__file__).parent.parent / "examples" / "benchmark" / "disk_tier.py"
    memory_limit = runpy.run_path(str(benchmark))["memory_limit"]
    directories = [tmp_path / "in_ram", tmp_path / "in_files"]
    for directory in directories:
        (directory / "tables").mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(memory_limit(220_000_000))
        except SystemExit as reason:
            pytest.skip(str(reason))
        assert end(start(fault_jobs.train_large_tables, directories[0], None)) == 0
        killed = start(fault_jobs.train_large_tables, directories[1], group)
        fault_jobs.wait_for(directories[1] / "checkpoints" / "step_000000000015", killed)
        killed.kill()
        killed.join()
        resumed = start(fault_jobs.train_large_tables, directories[1], group)
        fault_jobs.wait_for(directories[1] / "began_at_15", resumed)
        Path("/proc/sys/vm/drop_caches").write_text("1")  # clean pages of all files, in mid-run
        assert end(resumed) == 0
    in_ram, in_files = (directory / "checkpoints" for directory in directories)
    assert_same_checkpoints(in_ram, in_files, fault_jobs.LARGE.num_batches, min_tensors=6)


@pytest.mark.fault("disk full during save, at four points of the files")
@pytest.mark.parametrize("is_async", [False, True])
def test_full_disk_loses_that_save_alone(
    is_async: bool, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("tries", 4)
    assert end(start(fault_jobs.fill_the_disk, tmp_path, is_async)) == 0


@pytest.mark.fault("disk full for five deltas of a log, at five points")
def test_full_disk_loses_no_row_of_a_delta_log(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    record_property("tries", 5)
    assert end(start(fault_jobs.fill_the_disk_of_a_log, tmp_path)) == 0


@pytest.mark.fault("disk full when memory-mapped tables are made")
def test_no_room_for_tables(tmp_path: Path) -> None:
    assert end(start(fault_jobs.run_out_of_table_space, tmp_path)) == 0
    assert "cannot hold weights of" in os.readlink(tmp_path / "said")
    assert [path.name for path in tmp_path.iterdir() if "scratchpipe" in path.name] == []


@pytest.mark.fault("Ctrl-C while the pipeline fills, in mid-run, while it drains")
@pytest.mark.parametrize("moment", ["fill", "mid-run", "drain"])
def test_interrupt_leaves_nothing_behind(moment: str, tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    assert end(start(fault_jobs.be_interrupted, tmp_path, moment)) == 0
    assert (tmp_path / "was_interrupted").exists()
    assert (tmp_path / "ended").exists()
    assert list((tmp_path / "tables").iterdir()) == []


def test_interrupt_is_noticed_where_the_parent_ignores_it(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    assert end(start(fault_jobs.be_interrupted_below_nohup, tmp_path, "mid-run")) == 0
    assert (tmp_path / "was_interrupted").exists()


@pytest.mark.fault("one rank of two dies, raises, or stands still")
@pytest.mark.parametrize("how", ["dies", "raises", "raises and lives on", "stands still"])
def test_the_other_rank_ends_with_the_reason(how: str, tmp_path: Path) -> None:
    ranks = [start(fault_jobs.lose_a_rank, tmp_path, rank, how) for rank in range(2)]
    end(ranks[0], timeout_s=60)
    ranks[1].kill()
    ranks[1].join()
    seconds, _, reason = (tmp_path / "rank_0").read_text().partition(" ")
    assert float(seconds) < 20
    if how.startswith("raises"):
        assert reason == "another rank has failed. rank 1: ValueError: line 77 of the data is broken"
    else:
        assert "another rank has ended or stands still without a word" in reason


@pytest.mark.fault("one rank of two meets a bad id outside the pipeline")
@pytest.mark.parametrize(
    ("sharding_type", "how"),
    [
        ("row_wise", "dies"),
        ("row_wise", "lives on"),
        ("row_wise", "lives on, attached"),
        ("table_wise", "dies"),
        ("table_wise", "lives on"),
    ],
)
def test_the_other_rank_ends_with_the_reason_outside_the_pipeline(sharding_type: str, how: str, tmp_path: Path) -> None:
    job = fault_jobs.lose_a_rank_outside_the_pipeline
    ranks = [start(job, tmp_path, rank, sharding_type, how) for rank in range(2)]
    assert [end(each, timeout_s=60) for each in ranks] == [0, 0]
    reason = (tmp_path / "rank_0").read_text()
    assert reason.startswith("another rank has failed. rank 1: IdOutOfRangeError: ")
    assert "10000" in reason


def test_a_rank_that_goes_on_takes_its_word_back(tmp_path: Path) -> None:
    job = fault_jobs.lose_a_rank_outside_the_pipeline
    ranks = [start(job, tmp_path, rank, "row_wise", "goes on") for rank in range(2)]
    assert [end(each, timeout_s=60) for each in ranks] == [0, 0]
    assert "ended or stands still without a word" in (tmp_path / "rank_0").read_text()


@pytest.mark.fault("a memory-mapped table left by a crash")
def test_crash_leaves_no_table_to_be_mistaken(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    assert end(start(fault_jobs.leave_a_table, tmp_path)) == -9
    assert list((tmp_path / "tables").iterdir()) == []
