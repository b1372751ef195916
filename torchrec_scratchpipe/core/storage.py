# SPDX-License-Identifier: BSD-3-Clause
"""Where the memory of host tables comes from: RAM, page-locked RAM, memory-mapped files."""

import ctypes
import errno
import logging
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchrec_scratchpipe.errors import TableStorageError

__all__ = ["MappedStorage", "PageLockedStorage", "RamStorage", "TableStorage"]

logger: logging.Logger = logging.getLogger(__name__)

CUDA_HOST_REGISTER_PORTABLE_AND_MAPPED = 0x1 | 0x2
SYS_PROCESS_MADVISE = 440  # of Linux, on every processor
RANGES_PER_CALL = 1024  # the most that Linux takes


class TableStorage(Protocol):
    """Where a host table's memory comes from."""

    is_on_disk: bool  # whether rows may have to be brought into RAM, and are to be gathered there on their way back
    is_device_accessible: bool  # whether kernels on the device may read and write it in place
    is_copied_by_fork: bool  # whether a forked child has memory of its own, with the same content

    def allocate(self, num_values: int, dtype: torch.dtype, label: str) -> Tensor:
        """Allocate zero-filled memory. Shapes: returns [num_values]."""

    def ask_for(self, part: Tensor, rows: Tensor) -> None:
        """Have rows of an allocated tensor brought into RAM, all at once, without waiting. Shapes: `rows` [N] int64."""

    def persist(self) -> None:
        """Wait until everything written so far has reached the medium."""


class RamStorage:
    """Anonymous memory; pages are taken from the system when they are first written."""

    is_on_disk = False
    is_device_accessible = False
    is_copied_by_fork = True

    def allocate(self, num_values: int, dtype: torch.dtype, label: str) -> Tensor:
        """See :class:`TableStorage`."""
        return torch.zeros(num_values, dtype=dtype)

    def ask_for(self, part: Tensor, rows: Tensor) -> None:
        """Does nothing."""

    def persist(self) -> None:
        """Does nothing."""


class PageLockedStorage:
    """Page-locked memory that kernels of every CUDA device read and write in place.

    Exactly as much as is asked for: the caching allocator for page-locked memory rounds up to a power of two, which for
    a table of 40 GB would take 64 GB. Unlocked when nobody holds this storage any more; the memory stays as long as its
    tensors.
    """

    is_on_disk = False
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

    def ask_for(self, part: Tensor, rows: Tensor) -> None:
        """Does nothing."""

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

    is_on_disk = True
    is_device_accessible = False
    is_copied_by_fork = False

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
        self._mappings: list[mmap.mmap] = []
        self._ask = _PageAdvice()
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

    def ask_for(self, part: Tensor, rows: Tensor) -> None:
        """See :class:`TableStorage`."""
        self._ask(_page_ranges(part.data_ptr() + rows.numpy() * part[:1].nbytes, part[:1].nbytes))

    def persist(self) -> None:
        """See :class:`TableStorage`."""
        for mapped in self._mappings:
            mapped.flush()


class _PageAdvice:
    """Asks the system for pages of this process, many ranges a call; nothing where the system knows no such call."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)  # a call lets other threads have Python's lock
        self._process = -1
        self._is_known = True

    def __call__(self, ranges: npt.NDArray[np.uint64]) -> None:
        if self._process < 0 and self._is_known:
            self._open()
        for first in range(0, len(ranges), RANGES_PER_CALL) if self._is_known else ():
            some = ranges[first : first + RANGES_PER_CALL]
            done = self._libc.syscall(
                SYS_PROCESS_MADVISE,
                ctypes.c_int(self._process),
                ctypes.c_void_p(some.ctypes.data),
                ctypes.c_size_t(len(some)),
                ctypes.c_int(mmap.MADV_WILLNEED),
                ctypes.c_uint(0),
            )
            if done < 0 and ctypes.get_errno() != errno.EAGAIN:  # advice; whoever reads the rows will wait for them
                self._is_known = False
                logger.info("rows are read from the disk one after another (%s)", os.strerror(ctypes.get_errno()))
                break

    def _open(self) -> None:
        try:
            self._process = os.pidfd_open(os.getpid())
            weakref.finalize(self, os.close, self._process)
        except (AttributeError, OSError) as error:  # not Linux, or one of before 5.10
            self._is_known = False
            logger.info("rows are read from the disk one after another (%s)", error)


def _page_ranges(addresses: npt.NDArray[np.int64], num_bytes: int) -> npt.NDArray[np.uint64]:
    """[P, 2] beginning and length of the pages in which these bytes lie, each page once, ascending."""
    first, last = addresses // mmap.PAGESIZE, (addresses + (num_bytes - 1)) // mmap.PAGESIZE
    span = int((last - first).max(initial=0)) + 1
    pages = np.unique(np.minimum(first[:, None] + np.arange(span), last[:, None]))
    # Neighbours make one range.
    begins = np.flatnonzero(np.diff(pages, prepend=pages[:1] - 2) != 1)
    lengths = np.diff(begins, append=len(pages))
    return np.stack([pages[begins], lengths], axis=1).astype(np.uint64) * np.uint64(mmap.PAGESIZE)
