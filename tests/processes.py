# SPDX-License-Identifier: BSD-3-Clause
"""Processes that begin with everything imported: a server imports once, and forks whatever a test asks for.

To import torch, TorchRec and this package takes seconds, and most processes of these tests do little else. What a user
sees of a program that starts, such as warnings while it imports, is for `subprocess`.
"""

import multiprocessing as mp
import os
import runpy
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

SERVER = mp.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "torchrec_scratchpipe",
        "torchrec_scratchpipe.data",
        "opacus",
        "torchrec.models.dlrm",
        "torchrec.datasets.utils",
        "torch.distributed.checkpoint.state_dict_loader",
        "torch.distributed.optim",  # scripts of optimizers are compiled: most of what a model's set-up takes
        "matplotlib.pyplot",
        "torchmetrics",
        "tqdm",
        "hypothesis",
        "pytest",
    ]
)


class Script:
    """A Python script that runs as `python FILE ARGUMENTS` would."""

    def __init__(self, *command: str, env: dict[str, Any] | None = None) -> None:
        self._command = command
        self._directory = tempfile.TemporaryDirectory()
        self._paths = [Path(self._directory.name) / name for name in ("out", "err")]
        self._process = start(_run_script, command, self._paths, env or {})

    @property
    def is_running(self) -> bool:
        return self._process.exitcode is None

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def error(self) -> str:
        """What it has written to stderr so far."""
        return self._paths[1].read_text() if self._paths[1].exists() else ""

    def end(self, timeout_s: float = 300) -> CompletedProcess[str]:
        """Wait for it; a script that hangs is killed, and fails the test."""
        code = end(self._process, timeout_s)
        out, error = (path.read_text() for path in self._paths)
        self._directory.cleanup()
        return CompletedProcess(self._command, code, out, error)


def run_script(*command: str, timeout_s: float = 300) -> CompletedProcess[str]:
    """Run a script to its end."""
    return Script(*command).end(timeout_s)


def run_script_on_ranks(num_ranks: int, *command: str, timeout_s: float = 300) -> CompletedProcess[str]:
    """Run a script to its end as torchrun would, on one host; returns what rank 0 gave, or the first that failed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    ranks = [Script(*command, env=common | {"RANK": rank, "LOCAL_RANK": rank}) for rank in range(num_ranks)]
    results = [rank.end(timeout_s) for rank in ranks]
    return next((result for result in results if result.returncode), results[0])


def start(job: Callable[..., None], *args: Any) -> BaseProcess:
    """Start a function of a module in a process of its own."""
    process = SERVER.Process(target=job, args=args)
    process.start()
    return process


def end(process: BaseProcess, timeout_s: float = 120) -> int:
    """Wait for a process; one that hangs is killed, and fails the test."""
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("the process hangs")
    return int(process.exitcode)


def _run_script(command: tuple[str, ...], outputs: list[Path], env: dict[str, Any]) -> None:
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a step in the background has it ignored
    os.environ.update({name: str(value) for name, value in env.items()})
    sys.argv = list(command)
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")
