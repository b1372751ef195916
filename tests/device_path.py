# SPDX-License-Identifier: BSD-3-Clause
"""Has scratchpads on a CPU filled in place, as those on a GPU are.

With ``TEST_DEVICE_PATH=torch``, every test that shards a model has rows moved by torch operations; with ``triton``, by
interpreted kernels, which plan too; with ``locked``, by torch operations, in memory that says that it is page-locked.
"""

import os
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from torchrec_scratchpipe.core import storage as storage_module
from torchrec_scratchpipe.core.slot_ops import PlanBuffers, SlotOps
from torchrec_scratchpipe.core.storage import PageLockedStorage, RamStorage, TableStorage
from torchrec_scratchpipe.core.torch_ops import TorchOps
from torchrec_scratchpipe.sharding.options import ScratchpadOptions

KINDS = ("torch", "triton")
LOCKED = "locked"


class ReachableRam(RamStorage):
    """RAM that "kernels" of a CPU read and write in place."""

    is_device_accessible = True


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


class WrappedOps:
    """Operations that something is done with; none is recorded, so that it is done each time."""

    def __init__(self, ops: SlotOps) -> None:
        self._ops = ops
        self.orders_moves = ops.orders_moves

    def prepare(self, *args: Any) -> None:
        self._ops.prepare(*args)

    def recorded(self, buffers: PlanBuffers, key: Hashable) -> AbstractContextManager[bool]:
        return nullcontext(False)

    def order(self, *args: Any) -> tuple[Tensor, Tensor]:
        self._run("order", args)
        return args[-1].rows, args[-1].slots

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self._run(name, args)

    def _run(self, name: str, args: tuple[Any, ...]) -> None:
        getattr(self._ops, name)(*args)


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


class LaunchList:
    """A recorder for a CPU: what was launched for an earlier batch is launched again, with the same parameters."""

    def __init__(self) -> None:
        self._launches: list[Callable[[], None]] = []

    def add(self, kernel: Any, num_programs: int, args: Sequence[Tensor | int], options: Mapping[str, Any]) -> None:
        self._launches.append(lambda: kernel[(num_programs,)](*args, **options))

    def finish(self) -> Callable[[], None]:
        def replay() -> None:
            for launch in self._launches:
                launch()

        return replay


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
