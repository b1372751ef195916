# SPDX-License-Identifier: BSD-3-Clause
"""Where the memory of host tables comes from: RAM, page-locked RAM, memory-mapped files."""

import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from torchrec_scratchpipe.errors import TableStorageError

__all__ = ["MappedStorage", "PageLockedStorage", "RamStorage", "TableStorage"]

CUDA_HOST_REGISTER_PORTABLE_AND_MAPPED = 0x1 | 0x2


class TableStorage(Protocol):
    """Where a host table's memory comes from."""

    is_slow_to_write: bool  # whether single rows should be gathered in RAM before they are written
    is_device_accessible: bool  # whether kernels on the device may read and write it in place
    is_copied_by_fork: bool  # whether a forked child has memory of its own, with the same content

    def allocate(self, num_values: int, dtype: torch.dtype, label: str) -> Tensor:
        """Allocate zero-filled memory. Shapes: returns [num_values]."""

    def persist(self) -> None:
        """Wait until everything written so far has reached the medium."""


class RamStorage:
    """Anonymous memory; pages are taken from the system when they are first written."""

    is_slow_to_write = False
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

    is_slow_to_write = False
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


class MappedStorage:
    """Files in a directory, mapped into memory, whose pages the system may write out and drop.

    The whole file is reserved up front, so that a full disk is an error here and not a crash while training. The file
    never has a name (where the file system knows no such files, not for long): the space is returned when the table is
    freed, however the process ends, and no table of an earlier run can be mistaken for this one.

    Raises TableStorageError.
    """

    is_slow_to_write = True
    is_device_accessible = False
    is_copied_by_fork = False

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
        self._mappings: list[mmap.mmap] = []
        if not self._directory.is_dir():
            raise TableStorageError(
                f"table_dir {str(directory)!r} is not an existing directory. Create it, or name one that exists."
            )
        try:
            with tempfile.TemporaryFile(dir=self._directory):
                pass
        except OSError as error:
            raise TableStorageError(
                f"table_dir {str(directory)!r} is not writable ({error.strerror}). Name a directory that this user "
                "may write to."
            ) from error

    def allocate(self, num_values: int, dtype: torch.dtype, label: str) -> Tensor:
        """See :class:`TableStorage`. Shapes: returns [num_values]. Raises TableStorageError."""
        num_bytes = max(1, num_values) * dtype.itemsize
        try:
            with tempfile.TemporaryFile(prefix="scratchpipe_table_", dir=self._directory) as file:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
                mapped = mmap.mmap(file.fileno(), num_bytes)
            # Rows are written at random. Without this advice the page cache uses folios of up to 2 MiB, and one row
            # of 256 bytes makes 2 MiB dirty: writing 10,000 rows to a 6.7 GB file took 1,200 ms instead of 13 ms
            # (Linux 6.18, ext4, 2 cores of an AMD EPYC).
            mapped.madvise(mmap.MADV_RANDOM)
        except OSError as error:
            free_bytes = shutil.disk_usage(self._directory).free
            raise TableStorageError(
                f"table_dir {str(self._directory)!r} cannot hold {label}: it needs {num_bytes:,} bytes, "
                f"{free_bytes:,} are free ({error.strerror}). Free space there, or name another directory."
            ) from error
        self._mappings.append(mapped)
        return torch.frombuffer(mapped, dtype=dtype, count=num_values) if num_values else torch.empty(0, dtype=dtype)

    def persist(self) -> None:
        """See :class:`TableStorage`."""
        for mapped in self._mappings:
            mapped.flush()
