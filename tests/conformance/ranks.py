# SPDX-License-Identifier: BSD-3-Clause
"""Runs one case in its processes, and ends them when one fails or time is up."""

import itertools
import json
import logging
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

from .case import Case, Contender, RankReport

__all__ = ["prepare", "run_ranks"]

GRACE_S = 10.0  # for the other ranks to say what happened to them, once one has failed
FIRST_PORT, LAST_PORT = 20000, 29999  # below what systems hand out by themselves
_ports: Iterator[int] = itertools.count(os.getpid())


def prepare() -> None:
    """Let processes start from one that has imported TorchRec already; seconds per process otherwise."""
    path = os.pathsep.join(entry for entry in [*sys.path, os.environ.get("PYTHONPATH", "")] if entry)
    forkserver.set_forkserver_preload([f"{__package__}.contenders"])
    with patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}):
        forkserver.ensure_running()


def run_ranks(case: Case, contender: Contender, timeout_s: float) -> list[RankReport]:
    """Run a case; a process that does not report has its reason in the report.

    Args:
        case: What to run.
        contender: With whose sharder.
        timeout_s: For all of it.

    Returns:
        One report per rank.
    """
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as directory:
        port = _free_port()
        processes = [
            context.Process(target=_run_rank, args=(case, contender, rank, port, directory))
            for rank in range(case.world_size)
        ]
        for process in processes:
            process.start()
        has_timed_out = _wait(processes, time.monotonic() + timeout_s)
        for process in processes:
            process.kill()
            process.join()
        return [
            _read_report(Path(directory), rank, timeout_s if has_timed_out else None) for rank in range(case.world_size)
        ]


def _wait(processes: list[Any], deadline_s: float) -> bool:
    """Wait for all, or for a failed one and a grace period; true if time is up."""
    while any(process.is_alive() for process in processes):
        if time.monotonic() > deadline_s:
            return True
        if any(process.exitcode not in (None, 0) for process in processes):
            last_s = min(deadline_s, time.monotonic() + GRACE_S)
            while any(process.is_alive() for process in processes) and time.monotonic() < last_s:
                time.sleep(0.05)
            return False
        time.sleep(0.02)
    return False


def _read_report(directory: Path, rank: int, timeout_s: float | None) -> RankReport:
    path = directory / str(rank)
    if path.exists():
        return RankReport(**json.loads(path.read_text()))
    reason = "ended without a report" if timeout_s is None else f"still running after {timeout_s:.0f} s"
    return RankReport(rank, error=f"rank {rank} {reason}", error_type="NoReport", end_time_s=float("inf"))


def _free_port() -> int:
    while True:
        port = FIRST_PORT + next(_ports) % (LAST_PORT - FIRST_PORT + 1)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _run_rank(case: Case, contender: Contender, rank: int, port: int, directory: str) -> None:
    path = Path(directory)
    silence = open(os.devnull, "w")  # noqa: SIM115
    sys.stdout = sys.stderr = silence
    os.dup2(silence.fileno(), 1)
    os.dup2(silence.fileno(), 2)
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    try:
        report = _run_in_suite(case, contender, rank, port)
    except BaseException as error:
        report = _report_of(error, rank)
    # Written under another name first: a report is whole or absent.
    (path / f"{rank}.part").write_text(json.dumps(asdict(report)))
    (path / f"{rank}.part").rename(path / str(rank))
    os._exit(0 if report.error is None else 1)


def _report_of(error: BaseException, rank: int) -> RankReport:
    from torchrec_scratchpipe import ConfigError

    first_line = next((line for line in str(error).splitlines() if line.strip()), "")
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {first_line}".strip()
    if isinstance(error, AssertionError):
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return RankReport(
        rank,
        error=text if str(error) else f"{text} at {Path(where.filename).name}:{where.lineno}",
        error_type=type(error).__name__,
        is_refusal=isinstance(error, ConfigError),
        end_time_s=time.time(),
    )


def _run_in_suite(case: Case, contender: Contender, rank: int, port: int) -> RankReport:
    import torch

    from .contenders import Swap
    from .suite import ShardingSuite, SparseOnlySuite, StateDictSuite

    torch.set_num_threads(1)
    swap = Swap(case, contender, rank)
    with ExitStack() as stack:
        for swapped in swap.patches():
            stack.enter_context(swapped)
        if case.test in ("sharding", "dynamic_sharding"):
            sharding = ShardingSuite(case, rank, swap.make_sharder)
            sharding.setUp("gloo")
            os.environ["MASTER_PORT"] = str(port)
            _seed(case, rank)
            sharding.run_case()
        else:
            suite_type = StateDictSuite if hasattr(StateDictSuite, case.test) else SparseOnlySuite
            one_rank = suite_type(case, swap.make_stock_twin)
            _seed(case, rank)
            one_rank.setUp()
            one_rank.run_case()
        victims, misses = swap.count()
    return RankReport(rank, end_time_s=time.time(), num_victims=victims, num_misses_at_train=misses)


def _seed(case: Case, rank: int) -> None:
    """The suite seeds by the clock; its few draws from `random` differ by rank."""
    import torch

    seed = zlib.crc32(case.name.encode())
    torch.manual_seed(seed)
    random.seed(seed + rank)
