# SPDX-License-Identifier: BSD-3-Clause
"""One gloo process group for the whole run; tests with more ranks spawn processes of their own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when imported, here and in processes that tests start

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels are compiled, or interpreted, as of their import

import device_path  # noqa: F401  acts when imported
import interpreter
from helpers import note_planned

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.make_quick()


@pytest.fixture(scope="session", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    torch.set_num_threads(1)  # tensors are tiny; several threads only wait for each other
    store: Path = tmp_path_factory.mktemp("store") / "file"
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TEST_DEVICE_PATH"):
        skip = pytest.mark.skip(reason="about rows that the host plans and moves")
        for item in items:
            if item.get_closest_marker("host_path"):
                item.add_marker(skip)


@pytest.fixture
def was_planned(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every lookup of a scratchpad, whether its batch had been planned ahead."""
    return note_planned(monkeypatch)
