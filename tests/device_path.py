# SPDX-License-Identifier: BSD-3-Clause
"""Has scratchpads on a CPU filled in place, as those on a GPU are.

With ``TEST_DEVICE_PATH=torch``, every test that shards a model has rows moved by torch operations; with ``triton``, by interpreted
kernels, which plan too.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from torchrec_scratchpipe.host_table import RamStorage, TableStorage
from torchrec_scratchpipe.options import ScratchpadOptions
from torchrec_scratchpipe.slot_ops import SlotOps
from torchrec_scratchpipe.torch_ops import TorchOps

KINDS = ("torch", "triton")


class ReachableRam(RamStorage):
    """RAM that "kernels" of a CPU read and write in place."""

    is_device_accessible = True


class OneAtATime:
    """Operations of which no two run at once: Triton's interpreter changes its own module while a kernel runs."""

    _lock = threading.Lock()

    def __init__(self, ops: SlotOps) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._ops, name)

        def run(*args: Any) -> None:
            with self._lock:
                operation(*args)

        return run


def make_ops(kind: str) -> SlotOps:
    if kind == "triton":
        from torchrec_scratchpipe.triton_ops import TritonOps

        return OneAtATime(TritonOps())
    return TorchOps()


def use_device_path(kind: str) -> Callable[[], None]:
    """Have sharders use these operations from now on; returns what ends it."""
    originals = ScratchpadOptions.make_slot_ops, ScratchpadOptions.make_storage

    def make_slot_ops(self: ScratchpadOptions, device: torch.device) -> SlotOps:
        return make_ops(kind)

    def make_storage(self: ScratchpadOptions, ops: SlotOps) -> TableStorage:
        return originals[1](self, ops) if self.table_dir is not None else ReachableRam()

    def end() -> None:
        ScratchpadOptions.make_slot_ops, ScratchpadOptions.make_storage = originals  # type: ignore[method-assign]

    ScratchpadOptions.make_slot_ops = make_slot_ops  # type: ignore[method-assign]
    ScratchpadOptions.make_storage = make_storage  # type: ignore[method-assign]
    return end


@contextmanager
def device_path(kind: str) -> Iterator[None]:
    end = use_device_path(kind)
    try:
        yield
    finally:
        end()


if os.environ.get("TEST_DEVICE_PATH"):
    use_device_path(os.environ["TEST_DEVICE_PATH"])
