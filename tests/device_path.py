# SPDX-License-Identifier: BSD-3-Clause
"""Has scratchpads on a CPU filled in place, as those on a GPU are.

With ``TEST_DEVICE_PATH=torch``, every test that shards a model has rows moved by torch operations; with ``triton``, by
interpreted kernels, which plan too; with ``locked``, by torch operations, in memory that says that it is page-locked.
"""

import os
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from core_helpers import LaunchList, ReachableRam, WrappedOps
from torch import Tensor

from torchrec_scratchpipe.core import storage as storage_module
from torchrec_scratchpipe.core.slot_ops import PlanBuffers, SlotOps
from torchrec_scratchpipe.core.storage import PageLockedStorage, TableStorage
from torchrec_scratchpipe.core.torch_ops import TorchOps
from torchrec_scratchpipe.sharding.options import ScratchpadOptions

KINDS = ("torch", "triton")
LOCKED = "locked"


class FakeDriver:
    """Registers page-locked memory, and knows of an address whether it was registered."""

    def __init__(self) -> None:
        self._ranges: dict[int, int] = {}

    def lock(self, tensor: Tensor) -> str:
        self._ranges[tensor.data_ptr()] = tensor.nbytes
        return ""

    def unlock(self, locked: list[Tensor]) -> None:
        for tensor in locked:
            del self._ranges[tensor.data_ptr()]
        locked.clear()

    def is_pinned(self, tensor: Tensor) -> bool:
        """As torch asks: about the address where the storage begins."""
        start = tensor.untyped_storage().data_ptr()
        return any(first <= start < first + num_bytes for first, num_bytes in self._ranges.items())


class OneAtATime(WrappedOps):
    """Operations of which no two run at once: Triton's interpreter changes its own module while a kernel runs."""

    _lock = threading.RLock()

    @contextmanager
    def recorded(self, buffers: PlanBuffers, key: Hashable) -> Iterator[bool]:
        with self._lock, self._ops.recorded(buffers, key) as is_enqueued:
            yield is_enqueued

    def _run(self, name: str, args: tuple[Any, ...]) -> None:
        with self._lock:
            super()._run(name, args)


def make_ops(kind: str) -> SlotOps:
    if kind == "triton":
        from torchrec_scratchpipe.core.triton_ops import TritonOps

        return OneAtATime(TritonOps(LaunchList))
    return TorchOps()


def fake_locking() -> Callable[[], None]:
    """Have page-locked memory without a driver, from now on; returns what ends it."""
    driver = FakeDriver()
    originals = storage_module._lock_pages, storage_module._unlock, torch.Tensor.is_pinned

    def end() -> None:
        storage_module._lock_pages, storage_module._unlock, torch.Tensor.is_pinned = originals  # type: ignore[method-assign]

    storage_module._lock_pages, storage_module._unlock = driver.lock, driver.unlock
    torch.Tensor.is_pinned = lambda tensor, device=None: driver.is_pinned(tensor)  # type: ignore[method-assign]
    return end


def use_device_path(kind: str) -> Callable[[], None]:
    """Have sharders use these operations from now on; returns what ends it."""
    originals = ScratchpadOptions.make_slot_ops, ScratchpadOptions.make_storage
    end_locking = fake_locking() if kind == LOCKED else lambda: None

    new_storage = PageLockedStorage if kind == LOCKED else ReachableRam

    def make_slot_ops(self: ScratchpadOptions, device: torch.device) -> SlotOps:
        return make_ops(kind)

    def make_storage(self: ScratchpadOptions, ops: SlotOps) -> TableStorage:
        return originals[1](self, ops) if self.table_dir is not None else new_storage()

    def end() -> None:
        end_locking()
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
