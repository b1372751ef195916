# SPDX-License-Identifier: BSD-3-Clause
"""Where the memory of host tables comes from: RAM and page-locked RAM; files are in :mod:`.disk`."""

import mmap
import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from torchrec_scratchpipe.errors import TableStorageError

__all__ = ["PageLockedStorage", "RamStorage", "TableStorage"]

CUDA_HOST_REGISTER_PORTABLE_AND_MAPPED = 0x1 | 0x2


class TableStorage(Protocol):
    """Where a host table's memory comes from."""

    is_device_accessible: bool  # whether kernels on the device may read and write it in place
    is_copied_by_fork: bool  # whether a forked child has memory of its own, with the same content

    def allocate(self, num_values: int, dtype: torch.dtype, label: str) -> Tensor:
        """Allocate zero-filled memory. Shapes: returns [num_values]."""

    def persist(self) -> None:
        """Wait until everything written so far has reached the medium."""


class RamStorage:
    """Anonymous memory; pages are taken from the system when they are first written."""

    is_device_accessible = False
    is_copied_by_fork = True

    def allocate(self, num_values: int, dtype: torch.dtype, label: str) -> Tensor:
        """See :class:`TableStorage`."""
        return torch.zeros(num_values, dtype=dtype)

    def persist(self) -> None:
        """Does nothing."""


class PageLockedStorage:
    """Page-locked memory that kernels of every CUDA device read and write in place.

    Exactly as much as is asked for: the caching allocator for page-locked memory rounds up to a power of two, which for
    a table of 40 GB would take 64 GB. Unlocked when nobody holds this storage any more; the memory stays as long as its
    tensors.
    """

    is_device_accessible = True
    is_copied_by_fork = False

    def __init__(self) -> None:
        self._locked: list[Tensor] = []
        weakref.finalize(self, _in_process, os.getpid(), _unlock, self._locked)

    def allocate(self, num_values: int, dtype: torch.dtype, label: str) -> Tensor:
        """See :class:`TableStorage`. Shapes: returns [num_values]. Raises TableStorageError."""
        # Zeros, in whole pages of its own; private, because shared memory gets no huge pages.
        num_bytes = max(1, num_values) * dtype.itemsize
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_DONTFORK)  # a data loader's worker would make locked pages be copied
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        pages = torch.frombuffer(memory, dtype=torch.uint8)
        pages[:: mmap.PAGESIZE].zero_()  # by several threads; to lock untouched pages takes one, and longer
        tensor = pages.view(dtype)
        error = _lock_pages(tensor)
        if error:
            raise TableStorageError(
                f"{label}: {tensor.nbytes:,} bytes cannot be page-locked ({error}). Raise the limit (ulimit -l), free "
                "host memory, or give the sharder host_access='staged', which needs no page-locked tables."
            )
        self._locked.append(tensor)
        return tensor[:num_values]

    def persist(self) -> None:
        """Does nothing."""


def _lock_pages(tensor: Tensor) -> str:
    """Page-lock a tensor; says why it could not be done, or nothing."""
    cudart = torch.cuda.cudart()
    error = cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, CUDA_HOST_REGISTER_PORTABLE_AND_MAPPED)
    if int(error) == 0:
        return ""
    # The runtime tells the error again to whoever launches a kernel next. This kernel is to hear it.
    with suppress(RuntimeError):
        torch.zeros(1, dtype=torch.int8, device="cuda")
    return str(cudart.cudaGetErrorString(error))


def _in_process(process: int, unlock: Callable[[list[Tensor]], None], locked: list[Tensor]) -> None:
    """Unlock where it was locked: a forked child that ends has no CUDA to call."""
    if os.getpid() == process:
        unlock(locked)


def _unlock(locked: list[Tensor]) -> None:
    try:
        if locked:
            torch.cuda.synchronize()  # kernels of batches that were dropped may still be at these tables
    finally:
        for tensor in locked:
            torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
        locked.clear()
