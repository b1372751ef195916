# SPDX-License-Identifier: BSD-3-Clause
"""Has scratchpads on a CPU planned and filled as those on a GPU are.

With ``TEST_DEVICE_PATH=twin``, every test that shards a model does so, by torch operations; with ``triton``, by interpreted
kernels; with ``staged``, planned by torch operations, and rows moved through staging.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from torchrec_scratchpipe.device_ops import DeviceOps
from torchrec_scratchpipe.eviction import LeastFrequentlyUsed
from torchrec_scratchpipe.host_table import RamStorage, TableStorage
from torchrec_scratchpipe.options import ScratchpadOptions
from torchrec_scratchpipe.torch_ops import TorchOps

KINDS = ("twin", "triton", "staged")


class ReachableRam(RamStorage):
    """RAM that "kernels" of a CPU read and write in place."""

    is_device_accessible = True


class OneAtATime:
    """Operations of which no two run at once: Triton's interpreter changes its own module while a kernel runs."""

    def __init__(self, ops: DeviceOps) -> None:
        self._ops = ops
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._ops, name)

        def run(*args: Any) -> None:
            with self._lock:
                operation(*args)

        return run


def make_ops(kind: str) -> DeviceOps:
    if kind == "triton":
        from torchrec_scratchpipe.triton_ops import TritonOps

        return OneAtATime(TritonOps())
    return TorchOps()


def use_device_path(kind: str) -> Callable[[], None]:
    """Have sharders use device operations from now on, except with an eviction order that those do not know.

    Returns what ends it.
    """
    originals = ScratchpadOptions.find_device_ops, ScratchpadOptions.make_storage
    ops = make_ops(kind)

    def find_device_ops(self: ScratchpadOptions, device: torch.device) -> DeviceOps | None:
        return ops if self.make_eviction_order is LeastFrequentlyUsed else None

    def make_storage(self: ScratchpadOptions, device_ops: DeviceOps | None) -> TableStorage:
        is_reachable = self.table_dir is None and kind != "staged"
        return ReachableRam() if is_reachable else originals[1](self, None)

    def end() -> None:
        ScratchpadOptions.find_device_ops, ScratchpadOptions.make_storage = originals  # type: ignore[method-assign]

    ScratchpadOptions.find_device_ops = find_device_ops  # type: ignore[method-assign]
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
