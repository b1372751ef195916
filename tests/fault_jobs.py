# SPDX-License-Identifier: BSD-3-Clause
"""Small training jobs that tests/test_faults.py starts, kills, starves and interrupts.

Each runs in a process of its own.
"""

import gc
import logging
import os
import resource
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import Setting, Trainer, drain, full_state, make_batches
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe import (
    CheckpointManager,
    CheckpointSaveError,
    IdOutOfRangeError,
    PeerFailedError,
    TableStorageError,
)
from torchrec_scratchpipe.checkpoint import delta_log
from torchrec_scratchpipe.checkpoint.delta_chain import Chain
from torchrec_scratchpipe.core import changes

SETTING = Setting(num_batches=60, load_factor=0.25)


def set_up(directory: Path, rank: int = 0, world_size: int = 1, timeout_s: float = 60) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store_{time.time_ns() if world_size == 1 else 'shared'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )


def _go_on(manager: CheckpointManager, ours: Trainer, directory: Path) -> int:
    """Load the latest checkpoint, if there is one; tell, and return, how many batches have trained."""
    found = manager.load(ours.model, ours.optimizer)
    first = found.step if found is not None else 0
    (directory / f"began_at_{first}").touch()
    return first


def train_and_save(directory: Path, table_dir: Path | None, save_every: int) -> None:
    """Go on from the latest checkpoint, save on the way, leave the final state as a file."""
    set_up(directory)
    ours = Trainer.scratchpipe(SETTING, table_dir=table_dir and str(table_dir))
    manager = CheckpointManager(directory / "checkpoints", keep_last=2)
    first = _go_on(manager, ours, directory)
    pipeline, iterator = ours.pipeline(), iter(make_batches(SETTING)[first:])
    for step in range(first + 1, SETTING.num_batches + 1):
        pipeline.progress(iterator)
        if step % save_every == 0:
            manager.async_save(step, ours.model, ours.optimizer)
    manager.wait()
    torch.save(full_state(ours), directory / "final.pt.unfinished")
    (directory / "final.pt.unfinished").rename(directory / "final.pt")


DELTA_EVERY = 4


def train_and_log(directory: Path, table_dir: Path | None, rank: int, world_size: int, attempt: int) -> None:
    """See :func:`_train_and_log`; leave what went wrong as a file."""
    try:
        _train_and_log(directory, table_dir, rank, world_size, attempt)
    except BaseException:
        (directory / f"failed_{attempt}_{rank}").write_text(traceback.format_exc())
        raise


def _train_and_log(directory: Path, table_dir: Path | None, rank: int, world_size: int, attempt: int) -> None:
    """Go on from the last delta, log on the way, leave the final state as a file; say how far it is.

    Tables are split by rows, where there are two ranks.
    """
    (directory / f"store_{attempt}").mkdir(exist_ok=True)
    set_up(directory / f"store_{attempt}", rank, world_size)
    changes.ROWS_READ_TOGETHER = 16
    delta_log.SEGMENT_BYTES = 20_000
    setting = SETTING if world_size == 1 else replace(SETTING, num_rows=(200, 150, 40), sharding_type="row_wise")
    ours = Trainer.scratchpipe(setting, table_dir=table_dir and str(table_dir))
    manager = CheckpointManager(directory / "checkpoints", keep_last=2, delta_every=DELTA_EVERY)
    found = manager.load(ours.model, ours.optimizer)
    first = found.step if found is not None else 0
    (directory / f"began_{attempt}_{rank}_{first}").touch()
    progress = os.open(directory / f"progress_{rank}", os.O_RDWR | os.O_CREAT)
    pipeline, iterator = ours.pipeline(), iter(make_batches(setting, rank=rank)[first:])
    for step in range(first + 1, setting.num_batches + 1):
        pipeline.progress(iterator)
        manager.trained(step, ours.model, ours.optimizer)
        os.pwrite(
            progress, step.to_bytes(4, "little"), 0
        )  # a batch has trained when the log was told, and has answered
        if step % 25 == 0:
            manager.async_save(step, ours.model, ours.optimizer)
    manager.wait()
    assert first > 0 or ours.num_victims > 0
    torch.save(full_state(ours), directory / f"final_{rank}.pt.unfinished")
    (directory / f"final_{rank}.pt.unfinished").rename(directory / f"final_{rank}.pt")


def train_and_fold(directory: Path) -> None:
    """Go on from the last delta, fold deltas all the time, leave the final state as a file."""
    set_up(directory)
    ours = Trainer.scratchpipe(SETTING)
    manager = CheckpointManager(directory / "checkpoints", keep_last=2, delta_every=1, state_every=1, compact_at=1e-9)
    first = _go_on(manager, ours, directory)
    pipeline, iterator = ours.pipeline(), iter(make_batches(SETTING)[first:])
    for step in range(first + 1, SETTING.num_batches + 1):
        pipeline.progress(iterator)
        manager.trained(step, ours.model, ours.optimizer)
        time.sleep(0.02)  # or folds would fall far behind
    manager.compact()
    manager.wait()
    torch.save(full_state(ours), directory / "final.pt.unfinished")
    (directory / "final.pt.unfinished").rename(directory / "final.pt")


def fill_the_disk_of_a_log(directory: Path) -> None:
    """Let no file grow for some deltas, at several points; what they were to save is in the next one."""
    set_up(directory)
    changes.ROWS_READ_TOGETHER = 16
    ours = Trainer.scratchpipe(SETTING)
    manager = CheckpointManager(directory / "checkpoints", delta_every=2)
    pipeline, iterator = ours.pipeline(), iter(make_batches(SETTING))
    (directory / "probe").write_bytes(b"")
    failed = []
    for step in range(1, 42):
        pipeline.progress(iterator)
        log = max(directory.glob("checkpoints/deltas/*.log"), default=directory / "probe")
        room = {11: 0, 13: 10, 15: 300, 23: 900, 31: 1800}.get(step)
        if room is not None:
            manager.wait()
            limit = log.stat().st_size + room
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        future = manager.trained(step, ours.model, ours.optimizer)
        if room is not None:
            assert future is not None
            error = future.exception()
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert isinstance(error, CheckpointSaveError)
            assert f"the delta of batch {step} cannot be saved" in str(error)
            failed.append(step)
    manager.wait()
    chain = Chain.read(directory / "checkpoints")
    assert [one.step for one in chain.sets] == [step for step in range(3, 42, 2) if step not in failed]
    for step in (9, 17, 41):
        loaded, twin = Trainer.scratchpipe(replace(SETTING, seed=3)), Trainer.scratchpipe(SETTING)
        CheckpointManager(directory / "checkpoints").load(loaded.model, loaded.optimizer, step)
        drain(twin.pipeline(), make_batches(SETTING)[:step])
        for (name, expected), found in zip(full_state(twin).items(), full_state(loaded).values(), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), (step, name)


LARGE = replace(
    SETTING, num_rows=(400_000, 60_000, 300), dims=(64, 64, 64), load_factor=0.02, batch_size=1024, num_batches=30
)  # 236 MB


def train_large_tables(directory: Path, group: Path | None) -> None:
    """Go on from the latest checkpoint, with tables in files and within a control group's memory, if there is one."""
    if group is not None:
        (group / "cgroup.procs").write_text(str(os.getpid()))
    set_up(directory)
    kwargs = {} if group is None else {"table_dir": str(directory / "tables"), "ram_budget_gb": 0.01}
    ours = Trainer.scratchpipe(LARGE, **kwargs)
    manager = CheckpointManager(directory / "checkpoints")
    first = _go_on(manager, ours, directory)
    pipeline, iterator = ours.pipeline(), iter(make_batches(LARGE)[first:])
    for step in range(first + 1, LARGE.num_batches + 1):
        pipeline.progress(iterator)
        if step % 15 == 0:
            manager.save(step, ours.model, ours.optimizer)
    assert ours.num_victims > 10_000


def fill_the_disk(directory: Path, is_async: bool) -> None:
    """Save once, let no file grow any more, fail to save, train on, save again."""
    set_up(directory)
    ours, whole = Trainer.scratchpipe(SETTING), Trainer.scratchpipe(SETTING)
    batches = make_batches(SETTING)
    drain(ours.pipeline(), batches[:30])
    manager = CheckpointManager(directory / "checkpoints")
    manager.save(30, ours.model, ours.optimizer)
    for limit in (0, 100, 5_000, 20_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            if is_async:
                manager.async_save(31, ours.model, ours.optimizer).result()
            else:
                manager.save(31, ours.model, ours.optimizer)
        except CheckpointSaveError as error:
            reason = str(error)
        else:
            raise AssertionError("nothing was raised")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert "step 31 cannot be saved" in reason
        assert manager.steps() == [30]
        assert [path.name for path in manager.path(30).parent.iterdir()] == [manager.path(30).name]
    drain(ours.pipeline(), batches[30:])
    manager.save(60, ours.model, ours.optimizer)
    loaded = Trainer.scratchpipe(replace(SETTING, seed=3))
    manager.load(loaded.model, loaded.optimizer, step=30)
    drain(loaded.pipeline(), batches[30:])
    drain(whole.pipeline(), batches)
    for other in (ours, loaded):
        for (name, expected), found in zip(full_state(whole).items(), full_state(other).values(), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), name


def be_interrupted(directory: Path, moment: str) -> None:
    """Be sent SIGINT while the pipeline fills, in mid-run, or while it drains; tell how it ended.

    A child of a job in the background, or below nohup, starts with the signal ignored.
    """
    set_up(directory)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ours = Trainer.scratchpipe(SETTING, table_dir=str(directory / "tables"))
    signal_at = {"fill": 0, "mid-run": 30, "drain": SETTING.num_batches}[moment]
    batches = make_batches(SETTING)

    def loader() -> Iterator[Any]:
        for index, batch in enumerate(batches):
            if index == signal_at:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch
        if moment == "drain":
            os.kill(os.getpid(), signal.SIGINT)

    pipeline = ours.pipeline(lookahead=3)
    try:
        drain(pipeline, loader())
    except KeyboardInterrupt:
        (directory / "was_interrupted").touch()
    pipeline.reset()
    del pipeline, ours
    deadline_s = time.monotonic() + 10
    while any(thread.name == "scratchpipe-stages" for thread in threading.enumerate()):
        gc.collect()  # a sharded model is part of cycles
        assert time.monotonic() < deadline_s, "a worker is left"
        time.sleep(0.01)
    (directory / "ended").touch()


def be_interrupted_below_nohup(directory: Path, moment: str) -> None:
    """The same, started as a child of a process that ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    be_interrupted(directory, moment)


def lose_a_rank(directory: Path, rank: int, how: str) -> None:
    """Rank 1 dies or raises at batch 10; rank 0 says what it was told, and when."""
    set_up(directory, rank, 2, timeout_s=5)
    setting = replace(SETTING, sharding_type="row_wise", num_rows=(200, 150, 40))
    ours = Trainer.scratchpipe(setting)
    pipeline = ours.pipeline()

    def loader() -> Iterator[Any]:
        for index, batch in enumerate(make_batches(setting, rank=rank)):
            if rank == 1 and index == 10:
                if how == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "stands still":
                    time.sleep(30)
                    os._exit(0)
                raise ValueError("line 77 of the data is broken")
            yield batch

    start_s = time.monotonic()
    try:
        drain(pipeline, loader())
    except PeerFailedError as error:
        (directory / f"rank_{rank}").write_text(f"{time.monotonic() - start_s:.1f} {error}")
    except Exception as error:
        (directory / f"rank_{rank}").write_text(f"own {error!r}")
        if how == "raises and lives on":
            time.sleep(20)
    os._exit(0)


def lose_a_rank_outside_the_pipeline(directory: Path, rank: int, sharding_type: str, how: str) -> None:
    """Rank 1 meets ids out of range at batch 10, in a plain forward; rank 0 says what it was told."""
    set_up(directory, rank, 2, timeout_s=5)
    setting = replace(SETTING, sharding_type=sharding_type, num_rows=(200, 150, 40))
    ours = Trainer.scratchpipe(setting)
    if how == "lives on, attached":
        drain(ours.pipeline(), make_batches(setting, rank=rank)[:2])
    told = directory / "rank_0"
    try:
        for index, batch in enumerate(make_batches(setting, rank=rank)):
            if rank == 1 and index == 10:
                _train_on_bad_ids(ours, batch)
                if how.startswith("lives on"):
                    wait_for(told)
                if how != "goes on":
                    os._exit(0)
            if rank == 1 and index == 20:
                os._exit(0)
            ours.step(batch)
    except PeerFailedError as error:
        told.write_text(str(error))
    os._exit(0)


def _train_on_bad_ids(ours: Trainer, batch: Batch) -> None:
    """Of tables that rank 1 plans for, so that it fails alone; the error is caught."""
    features = batch.sparse_features
    plans = {key: ours.model.plan.plan["ebc"][f"t{index}"] for index, key in enumerate(features.keys())}
    is_bad = torch.cat([torch.full_like(features[key].values(), 1 in plan.ranks) for key, plan in plans.items()])
    ids = torch.where(is_bad.bool(), 10_000, features.values())
    bad = replace(batch, sparse_features=KeyedJaggedTensor(features.keys(), ids, lengths=features.lengths()))
    try:
        ours.step(bad)
    except IdOutOfRangeError:
        return
    raise AssertionError("ids out of range were trained")


def wait_for(path: Path, process: BaseProcess | None = None) -> float:
    """Until another process has made a file; the time when it was seen. It must not end before, if it is given."""
    while not path.exists():
        assert process is None or process.is_alive() or path.exists(), f"it ended with {process.exitcode}"
        time.sleep(0.001)
    return time.monotonic()


def leave_a_table(directory: Path) -> None:
    """Die with memory-mapped tables half trained."""
    set_up(directory)
    ours = Trainer.scratchpipe(SETTING, table_dir=str(directory / "tables"))
    drain(ours.pipeline(), make_batches(SETTING)[:20])
    os.kill(os.getpid(), signal.SIGKILL)


def run_out_of_table_space(directory: Path) -> None:
    """No room for memory-mapped tables."""
    set_up(directory)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        Trainer.scratchpipe(SETTING, table_dir=str(directory))
    except TableStorageError as error:
        (directory / "said").symlink_to(str(error).replace("/", "_")[:200])
