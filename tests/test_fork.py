# SPDX-License-Identifier: BSD-3-Clause
"""A forked child answers, with a worker of its own, or raises at once; its parent goes on."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Setting, Trainer, assert_same_bits, assert_same_outputs, make_batches

from torchrec_scratchpipe import TableStorageError
from torchrec_scratchpipe.core import storage

SETTING = Setting(num_batches=30)
LIMIT_S = 30


def in_child(do: Callable[[], None]) -> int:
    """What a forked child ends with: 0, 1 (TableStorageError) or 2 (another error); one that hangs fails the test."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)  # OpenMP's threads have stayed with the parent, for stock too
            do()
            os._exit(0)
        except TableStorageError:
            os._exit(1)
        except BaseException:
            os._exit(2)
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the child waits for ever")


def evaluate(trainer: Trainer, expected: torch.Tensor, pipeline: Any) -> Callable[[], None]:
    def do() -> None:
        if pipeline is not None:
            pipeline.detach()  # its batches stay in flight
        trainer.model.eval()
        with torch.no_grad():
            assert torch.equal(expected, trainer.model(make_batches(SETTING)[20])[1])

    return do


def expected_of(stock: Trainer) -> torch.Tensor:
    stock.model.eval()
    with torch.no_grad():
        logits: torch.Tensor = stock.model(make_batches(SETTING)[20])[1]
    stock.model.train()
    return logits


@pytest.mark.parametrize("overlap", [False, True], ids=["sequential", "overlapped"])
@pytest.mark.parametrize("lookahead", [None, 4])
def test_child_evaluates_and_reads_tables(lookahead: int | None, overlap: bool) -> None:
    """Between any two batches, with batches in flight or without a pipeline.

    It cannot train or use a pipeline, stock's neither: gloo's threads are gone.
    """
    stock, ours = Trainer(SETTING), Trainer.scratchpipe(SETTING, overlap=overlap)
    ours.copy_from(stock)
    batches = make_batches(SETTING)
    pipeline, iterator = None if lookahead is None else ours.pipeline(lookahead), iter(batches)
    for index, batch in enumerate(batches[:16]):
        actual = ours.step(next(iterator)) if pipeline is None else pipeline.progress(iterator)
        assert torch.equal(stock.step(batch), actual)
        if index % 3 == 0:
            assert in_child(evaluate(ours, expected_of(stock), pipeline)) == 0
            assert in_child(lambda: ours.model.state_dict()["ebc.embedding_bags.t0.weight"]) == 0
            assert in_child(lambda: assert_same_bits(stock, ours)) == 0
    rest = batches[16:]
    actual_rest = ours.train_plain(rest) if pipeline is None else [pipeline.progress(iterator) for _ in rest]
    assert_same_outputs(stock.train_plain(rest), actual_rest)
    assert_same_bits(stock, ours)
    assert ours.num_victims > 0


def test_child_that_ends_unlocks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Page-locked memory is its parent's; CUDA would print an error in a child."""
    unlocked: list[int] = []
    monkeypatch.setattr(storage, "_lock_pages", lambda tensor: "")
    monkeypatch.setattr(storage, "_unlock", lambda locked: unlocked.append(len(locked)))
    holders = [storage.PageLockedStorage()]
    holders[0].allocate(10, torch.float32, "weights")

    def let_go() -> None:
        holders.clear()
        assert unlocked == []

    assert in_child(let_go) == 0
    holders.clear()
    assert unlocked == [1]


def test_child_of_memory_mapped_tables_raises_at_once(tmp_path: Any) -> None:
    """What it writes would be in its parent's tables."""
    stock, ours = Trainer(SETTING), Trainer.scratchpipe(SETTING, table_dir=str(tmp_path))
    ours.copy_from(stock)
    batches = make_batches(SETTING)
    assert_same_outputs(stock.train_plain(batches[:10]), ours.train_plain(batches[:10]))
    assert in_child(lambda: ours.model(batches[3])) == 1
    assert in_child(lambda: ours.model.state_dict()) == 1
    assert in_child(lambda: next(ours.model.module.ebc.parameters()).norm()) == 1
    assert_same_outputs(stock.train_plain(batches[10:]), ours.train_plain(batches[10:]))
    assert_same_bits(stock, ours)


def test_control_a_child_without_a_worker_of_its_own_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Trainer.scratchpipe(SETTING)
    ours.train_plain(make_batches(SETTING)[:3])
    runner = ours.model.module.ebc._runner
    monkeypatch.setattr(type(runner), "after_fork_in_child", lambda self: self._lock.release())
    monkeypatch.setattr("test_fork.LIMIT_S", 3)
    with pytest.raises(AssertionError, match="the child waits for ever"):
        in_child(lambda: ours.model(make_batches(SETTING)[4]))


def test_a_fork_while_a_stage_is_about_to_write_a_table() -> None:
    """The worker holds its own lock then, and needs the table's: whoever forks must not hold that one first."""
    ours = Trainer.scratchpipe(SETTING)
    ours.train_plain(make_batches(SETTING)[:2])
    collection = ours.model.module.ebc
    writes, goes_on = threading.Event(), threading.Event()
    table = collection.pools[0].host_table
    write = table.write

    def write_late(*args: Any) -> None:
        writes.set()
        goes_on.wait(LIMIT_S)
        write(*args)

    table.write = write_late
    pipeline, iterator = ours.pipeline(lookahead=1), iter(make_batches(SETTING)[2:])
    training = threading.Thread(target=lambda: pipeline.progress(iterator))
    training.start()
    assert writes.wait(LIMIT_S)
    pids: list[int] = []
    forking = threading.Thread(target=lambda: pids.append(in_child(lambda: None)))
    forking.start()
    forking.join(0.2)  # it stands in the handlers now
    goes_on.set()
    forking.join(LIMIT_S)
    training.join(LIMIT_S)
    assert pids == [0]
    assert not training.is_alive()
