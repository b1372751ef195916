# SPDX-License-Identifier: BSD-3-Clause
"""A fold writes the checkpoint that a save would have written; whatever stops it, base and deltas stay as they were."""

import fcntl
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import (
    Setting,
    Trainer,
    assert_same_bits,
    drain,
    make_batches,
    run_ranks,
    scratchpad_constraints,
    with_optimizer,
)
from processes import end, start
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_scratchpipe import (
    CheckpointManager,
    CheckpointMismatchError,
    CheckpointSaveError,
    ConfigError,
    load_checkpoint,
)
from torchrec_scratchpipe.__main__ import main
from torchrec_scratchpipe.checkpoint import compaction, delta_log, fold_files
from torchrec_scratchpipe.checkpoint import files as checkpoint_files
from torchrec_scratchpipe.checkpoint.compaction import compact, growth
from torchrec_scratchpipe.checkpoint.files import Manifest, SafeReader
from torchrec_scratchpipe.core import changes

SETTING = Setting(num_batches=60, load_factor=0.25)
OPTIMIZERS = [torch.optim.SGD, torch.optim.Adagrad, RowWiseAdagrad]


def make_small() -> None:
    """So that tables and deltas of these tests are cut into many blocks and files."""
    checkpoint_files.BLOCK_BYTES = 1000
    changes.ROWS_READ_TOGETHER = 16
    delta_log.SEGMENT_BYTES = 40_000


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(changes, "ROWS_READ_TOGETHER", 16)
    monkeypatch.setattr(delta_log, "SEGMENT_BYTES", 40_000)


def run(
    manager: CheckpointManager,
    trainer: Trainer,
    last: int,
    first: int = 0,
    after: Callable[[int], object] = lambda _: None,
    setting: Setting = SETTING,
    rank: int = 0,
) -> None:
    """Train batches `first` to `last`, and say so."""
    pipeline, batches = trainer.pipeline(), iter(make_batches(setting, rank)[first:])
    for step in range(first + 1, last + 1):
        pipeline.progress(batches)
        manager.trained(step, trainer.model, trainer.optimizer, extra={"step": step, "rank": rank})
        after(step)
    manager.wait()


def logging_manager(directory: Path | str, **kwargs: Any) -> CheckpointManager:
    return CheckpointManager(directory, delta_every=3, **kwargs)


def logged(directory: Path, last: int = 29, setting: Setting = SETTING, **kwargs: Any) -> CheckpointManager:
    """A job's directory: a base of batch 1, and deltas up to `last`, or one or two batches before it."""
    manager = logging_manager(directory, **kwargs)
    run(manager, Trainer.scratchpipe(setting), last, setting=setting)
    return manager


def trained(num_batches: int, setting: Setting = SETTING) -> Trainer:
    trainer = Trainer.scratchpipe(setting)
    drain(trainer.pipeline(), make_batches(setting)[:num_batches])
    return trainer


def state_of(trainer: Trainer) -> dict[str, Any]:
    return {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}


def check_loads(directory: Path, step: int, setting: Setting = SETTING) -> None:
    """What is loaded is what a run that never stopped has after batch `step`."""
    other = Trainer.scratchpipe(replace(setting, seed=5))
    found = CheckpointManager(directory).load(other.model, other.optimizer)
    assert found is not None
    assert found.step == step
    assert found.extra == {"step": step, "rank": 0}
    assert_same_bits(trained(step, setting), other)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def segments(directory: Path) -> list[Path]:
    return sorted((directory / "deltas").iterdir())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_fold_has_the_bits_of_the_run_that_logged(optimizer: type[torch.optim.Optimizer], tmp_path: Path) -> None:
    setting = with_optimizer(SETTING, optimizer)
    manager = logged(tmp_path, setting=setting)
    before = contents(tmp_path)
    assert compact(tmp_path) == 28
    after = contents(tmp_path)
    assert before.items() < after.items(), "something else was touched"
    assert manager.steps() == [1, 28]
    base = CheckpointManager(tmp_path).path(28)
    # 1. Without deltas, by whatever reads checkpoints.
    expected = trained(28, setting)
    (tmp_path / "deltas").rename(tmp_path / "away")
    check_loads(tmp_path, 28, setting)
    for load in (lambda state: dcp.load(state, checkpoint_id=base), lambda state: load_checkpoint(base, state)):
        for make in (Trainer, Trainer.scratchpipe):
            other = make(replace(setting, seed=6))
            load(state_of(other))
            assert_same_bits(expected, other)
    # 2. Metadata are those that a save of this moment writes.
    saved = CheckpointManager(tmp_path / "saved")
    saved.save(28, expected.model, expected.optimizer, extra={"step": 28, "rank": 0})
    ours, theirs = (SafeReader(path).read_metadata() for path in (base, saved.path(28)))
    assert ours.planner_data == theirs.planner_data
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    for name, one in ours.state_dict_metadata.items():
        other_one = theirs.state_dict_metadata[name]
        if isinstance(one, TensorStorageMetadata):
            assert (one.properties, one.size) == (other_one.properties, other_one.size), name
            assert sorted(map(str, one.chunks)) == sorted(map(str, other_one.chunks)), name
        else:
            assert one == other_one, name
    assert Manifest.read(base).files.keys() == Manifest.read(saved.path(28)).files.keys()
    dcp_to_torch_save(base, tmp_path / "whole.pt")
    dcp_to_torch_save(saved.path(28), tmp_path / "whole_saved.pt")
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in ("whole", "whole_saved"))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())


def test_there_is_nothing_to_fold(tmp_path: Path) -> None:
    assert compact(tmp_path) is None
    logged(tmp_path, 3)  # no delta yet
    assert compact(tmp_path) is None
    assert growth(tmp_path) == 0
    logged(tmp_path / "other", 8)
    assert growth(tmp_path / "other") > 0
    assert compact(tmp_path / "other") == 7
    before = contents(tmp_path)
    assert compact(tmp_path / "other") is None
    assert growth(tmp_path / "other") == 0
    assert before == contents(tmp_path)
    with pytest.raises(ConfigError, match="keep_last is 0"):
        compact(tmp_path, 0)
    with pytest.raises(CheckpointMismatchError, match="does not exist"):
        compact(tmp_path / "elsewhere")


def test_only_deltas_that_a_job_can_go_on_from_are_folded(tmp_path: Path) -> None:
    logged(tmp_path, 29, state_every=9)
    assert compact(tmp_path) == 28
    run(manager := logging_manager(tmp_path / "c", state_every=9), Trainer.scratchpipe(SETTING), 26)
    assert compact(tmp_path / "c") == 19
    check_loads(tmp_path / "c", 19)
    assert manager.steps() == [1, 19]


def test_a_job_that_is_resumed_from_a_fold_logs_on(tmp_path: Path) -> None:
    logged(tmp_path)
    assert compact(tmp_path, keep_last=1) == 28
    for first, last, step in ((28, 41, 40), (40, 60, 58)):
        manager, resumed = logging_manager(tmp_path), Trainer.scratchpipe(replace(SETTING, seed=6))
        found = manager.load(resumed.model, resumed.optimizer)
        assert found is not None
        assert found.step == first
        run(manager, resumed, last, first)
        check_loads(tmp_path, step)
        assert compact(tmp_path) == step
        check_loads(tmp_path, step)


def test_a_job_goes_on_while_and_after_it_is_folded(tmp_path: Path) -> None:
    manager, ours, folds = logging_manager(tmp_path, keep_last=2), Trainer.scratchpipe(SETTING), []

    def fold(step: int) -> None:
        if step in (14, 30, 44):
            manager.wait()  # so that there is something to fold
            folds.append(manager.compact())
        if step in (27, 41):
            folds[-1].result()

    run(manager, ours, 60, after=fold)
    steps = [fold.result() for fold in folds]
    assert all(step is not None for step in steps)
    assert manager.steps() == steps[1:]
    check_loads(tmp_path, 58)
    assert compact(tmp_path) == (58 if steps[-1] < 58 else None)
    check_loads(tmp_path, 58)


def test_deltas_are_folded_when_they_have_grown(tmp_path: Path) -> None:
    manager, ours, found = logging_manager(tmp_path, compact_at=0.2, keep_last=1), Trainer.scratchpipe(SETTING), []

    def note(_: int) -> None:
        manager.wait()
        found.append(growth(tmp_path))

    run(manager, ours, 60, after=note)
    (step,) = manager.steps()
    assert step > 1
    assert max(found) < 0.3  # it may have grown by one delta more
    folded_at = [index for index in range(1, 60) if found[index] < found[index - 1]]
    assert len(folded_at) > 1
    assert all(found[index - 1] > 0.13 for index in folded_at), "it was not due"
    check_loads(tmp_path, 58)
    for bad in (0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="compact_at is"):
            CheckpointManager(tmp_path, compact_at=bad)


def test_what_cannot_be_folded_is_tried_again_when_it_has_grown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []

    def fail(*_: Any) -> int:
        tries.append(growth(tmp_path))
        raise CheckpointSaveError("the disk is full")

    monkeypatch.setattr("torchrec_scratchpipe.checkpoint.folding.compact", fail)
    manager = logging_manager(tmp_path, compact_at=0.2)
    run(manager, Trainer.scratchpipe(SETTING), 60, after=lambda _: manager.wait())
    assert 2 <= len(tries) <= growth(tmp_path) / 0.2
    assert "the disk is full" in caplog.text
    check_loads(tmp_path, 58)


def test_keep_last_counts_checkpoints_and_deltas_that_nobody_needs_go(tmp_path: Path) -> None:
    manager = logged(tmp_path, 41)
    assert len(segments(tmp_path)) > 1
    assert compact(tmp_path) == 40
    assert manager.steps() == [1, 40]
    many = len(segments(tmp_path))
    logged(tmp_path / "other", 41)
    assert compact(tmp_path / "other", keep_last=1) == 40
    assert CheckpointManager(tmp_path / "other").steps() == [40]
    assert len(segments(tmp_path / "other")) == 1 < many
    check_loads(tmp_path / "other", 40)


@pytest.mark.parametrize("keep_last", [None, 1])
def test_a_checkpoint_that_is_saved_meanwhile_wins(
    keep_last: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, ours = logging_manager(tmp_path, keep_last=keep_last), Trainer.scratchpipe(SETTING)
    is_reading, may_go_on = threading.Event(), threading.Event()
    original = fold_files.Fold.read_block

    def read_block(*args: Any) -> torch.Tensor:
        is_reading.set()
        assert may_go_on.wait(60)
        return original(*args)

    monkeypatch.setattr(fold_files.Fold, "read_block", read_block)
    folds: list[Future[int | None]] = []

    def act(step: int) -> None:
        if step == 20:
            manager.wait()  # so that there is something to fold
            folds.append(manager.compact())
            assert is_reading.wait(60)
        if step == 26:  # does not wait for the fold, and deletes what that reads
            manager.async_save(26, ours.model, ours.optimizer, extra={"step": 26, "rank": 0}).result()
            may_go_on.set()

    run(manager, ours, 30, after=act)
    assert folds[0].result() is None
    assert manager.steps() == ([1, 26] if keep_last is None else [26])
    assert not list(tmp_path.glob(".*"))
    check_loads(tmp_path, 29)
    assert compact(tmp_path) == 29
    check_loads(tmp_path, 29)


def stop_at(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, call: int) -> None:
    """From the `call`-th call on, a function raises, as if the disk were full."""
    original, calls = getattr(where, name), []

    def stopped(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) >= call:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, stopped)


STOPS: list[tuple[Any, str, int]] = [
    (fold_files, "write_durably", 1),
    (fold_files.Fold, "read_block", 1),
    (fold_files.Fold, "read_block", 7),
    (checkpoint_files.ChecksummedWriter, "finish", 1),
    (checkpoint_files, "write_durably", 1),
    (checkpoint_files, "sync_directory", 1),
    (Path, "rename", 1),
]


@pytest.mark.parametrize(("where", "name", "call"), STOPS)
@pytest.mark.parametrize("is_killed", [False, True])
def test_a_fold_that_is_stopped_leaves_everything_as_it_was(
    where: Any, name: str, call: int, is_killed: bool, tmp_path: Path
) -> None:
    logged(tmp_path)
    before = contents(tmp_path)
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_at(monkeypatch, where, name, call)
        if is_killed:  # nobody cleans up
            monkeypatch.setattr(compaction.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(CheckpointSaveError, match=r"deltas cannot be folded: OSError.* free space, and fold again"):
            compact(tmp_path)
    assert len(list(tmp_path.glob(".fold_*"))) == is_killed
    left = {path: data for path, data in contents(tmp_path).items() if not path.startswith(".fold_")}
    assert left == before
    check_loads(tmp_path, 28)
    assert compact(tmp_path) == 28
    assert not list(tmp_path.glob(".fold_*"))
    check_loads(tmp_path, 28)


@pytest.mark.parametrize("pattern", ["deltas/*.log", "step_*/*.distcp", "step_*/.metadata", "step_*/extra_0.pt"])
@pytest.mark.parametrize("at", [0.4, 0.9])
def test_damage_is_named_and_nothing_changes(pattern: str, at: float, tmp_path: Path) -> None:
    manager = logged(tmp_path)
    path = sorted(tmp_path.glob(pattern))[0]
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 0x10
    path.write_bytes(data)
    before = contents(tmp_path)
    with pytest.raises(CheckpointMismatchError, match=path.name):
        compact(tmp_path, keep_last=1)
    with pytest.raises(CheckpointMismatchError, match=path.name):
        manager.compact().result()
    manager.wait()
    assert before == contents(tmp_path)


def test_one_fold_at_a_time(tmp_path: Path) -> None:
    manager = logged(tmp_path)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # as another process would
    with pytest.raises(CheckpointSaveError, match="are being folded already"):
        compact(tmp_path)
    os.close(descriptor)
    first, second = manager.compact(), manager.compact()
    assert (first.result(), second.result()) == (28, None)
    assert not first.cancel()


def test_the_thread_of_a_fold_gives_way_to_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "torchrec_scratchpipe.checkpoint.folding.compact",
        lambda *_: seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())),
    )
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    CheckpointManager(tmp_path).compact().result()
    assert seen == [min(19, max(before, 10))]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_a_table_that_went_into_a_scratchpad_between_two_runs(tmp_path: Path) -> None:
    """Its changes are in the first run's last state, then in the second run's deltas."""
    kept_whole = replace(SETTING, fused_tables=("t1",))
    run(logging_manager(tmp_path), Trainer.scratchpipe(kept_whole), 29)
    manager, resumed = logging_manager(tmp_path), Trainer.scratchpipe(replace(SETTING, seed=6))
    assert manager.load(resumed.model, resumed.optimizer).step == 28  # type: ignore[union-attr]
    run(manager, resumed, 41, 28)
    check_loads(tmp_path, 40)
    assert compact(tmp_path) == 40
    check_loads(tmp_path, 40)


def test_a_table_that_left_the_scratchpad_between_two_runs(tmp_path: Path) -> None:
    logged(tmp_path)
    manager, resumed = logging_manager(tmp_path), Trainer.scratchpipe(replace(SETTING, seed=6, fused_tables=("t1",)))
    assert manager.load(resumed.model, resumed.optimizer).step == 28  # type: ignore[union-attr]
    run(manager, resumed, 41, 28)
    check_loads(tmp_path, 40)
    assert compact(tmp_path) == 40
    check_loads(tmp_path, 40)


@pytest.mark.parametrize("arguments", [[], ["--keep_last", "1"]])
def test_the_command(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logged(tmp_path)
    for said, status in (("step 28 is a checkpoint now", 0), ("nothing to fold", 0)):
        monkeypatch.setattr(sys, "argv", ["torchrec-scratchpipe", "compact", str(tmp_path), *arguments])
        assert main() == status
        assert capsys.readouterr().out == f"{tmp_path}: {said}\n"
    assert CheckpointManager(tmp_path).steps() == ([28] if arguments else [1, 28])
    monkeypatch.setattr(sys, "argv", ["torchrec-scratchpipe", "compact", str(tmp_path / "no")])
    assert main() == 1
    assert "does not exist" in capsys.readouterr().err


SHARDED = replace(SETTING, num_rows=(200, 150, 40), num_batches=24)
MIXED = {"t0": "row_wise", "t1": "column_wise", "t2": "table_wise"}


def mixed(setting: Setting) -> Trainer:
    constraints = scratchpad_constraints(setting)
    for name, sharding_type in MIXED.items():
        constraints[name].sharding_types = [sharding_type]
        constraints[name].min_partition = 4 if sharding_type == "column_wise" else None
    return Trainer.scratchpipe(setting, constraints)


def _log_mixed(rank: int, directory: str, optimizer: type[torch.optim.Optimizer]) -> None:
    make_small()
    setting = with_optimizer(SHARDED, optimizer)
    manager = logging_manager(directory)
    ours = mixed(setting)
    run(manager, ours, 22, setting=setting, rank=rank)
    dist.barrier()  # all have written their last
    assert manager.compact().result() == (22 if rank == 0 else None)
    dist.barrier()
    dcp.save(state_of(ours), checkpoint_id=Path(directory) / "expected")


def _load_mixed(rank: int, directory: str, optimizer: type[torch.optim.Optimizer], is_mixed: bool) -> None:
    make_small()
    setting = with_optimizer(replace(SHARDED, seed=5), optimizer)
    make: Callable[[Setting], Trainer] = mixed if is_mixed else Trainer.scratchpipe
    ours, expected, stock = make(setting), make(replace(setting, seed=6)), make(replace(setting, seed=7))
    dcp.load(state_of(expected), checkpoint_id=Path(directory) / "expected")
    manager = CheckpointManager(directory)
    found = manager.load(ours.model, ours.optimizer)
    assert found is not None
    assert (found.step, found.world_size) == (22, 2)
    assert found.extra == {"step": 22, "rank": rank}
    assert_same_bits(expected, ours)
    dcp.load(state_of(stock), checkpoint_id=manager.path(22))
    assert_same_bits(expected, stock)


@pytest.mark.dist
@pytest.mark.parametrize("optimizer", [torch.optim.Adagrad, RowWiseAdagrad])
def test_what_two_ranks_have_logged_is_folded_by_one_process(
    optimizer: type[torch.optim.Optimizer], tmp_path: Path
) -> None:
    run_ranks(2, _log_mixed, str(tmp_path), optimizer)
    assert CheckpointManager(tmp_path).steps() == [1, 22]
    if optimizer is not RowWiseAdagrad:  # whose states of a table in columns, no other sharding takes
        run_ranks(1, _load_mixed, str(tmp_path), optimizer, False)
    run_ranks(2, _load_mixed, str(tmp_path), optimizer, True)


def log_big(directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    setting = Setting(
        num_rows=(400_000, 200_000, 300_000), dims=(64, 64, 64), batch_size=40_000, num_batches=4, load_factor=0.9
    )
    ours = Trainer.scratchpipe(setting)
    manager = CheckpointManager(directory, delta_every=1)
    pipeline, batches = ours.pipeline(), iter(make_batches(setting))
    for step in range(1, 5):
        pipeline.progress(batches)
        manager.trained(step, ours.model, ours.optimizer)
    manager.wait()


def anonymous_mb() -> float:
    """What this process has in memory that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1000


def fold_big(directory: Path) -> None:
    """Fold, and say how much memory that took, in MB."""
    torch.set_num_threads(1)
    before, peaks, is_done = anonymous_mb(), [0.0], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.002):
            peaks.append(max(peaks.pop(), anonymous_mb()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert compact(directory) == 4
    is_done.set()
    watcher.join()
    (directory / "peak_mb").write_text(str(peaks[0] - before))


def test_memory_is_that_of_a_few_blocks(tmp_path: Path) -> None:
    """Of 460 MB of tables and states; a fold that loads them, or a delta, is found out."""
    assert end(start(log_big, tmp_path)) == 0
    base_bytes = sum(path.stat().st_size for path in (tmp_path / "step_000000000001").iterdir())
    log_bytes = sum(path.stat().st_size for path in segments(tmp_path))
    assert base_bytes > 400e6
    assert log_bytes > 40e6
    assert end(start(fold_big, tmp_path)) == 0
    assert 0 < float((tmp_path / "peak_mb").read_text()) < 150
