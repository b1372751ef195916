# SPDX-License-Identifier: BSD-3-Clause
"""Files under host tables: mapped into memory, and logs that are written in order.

Shapes: ``N`` rows, ``P`` ranges of pages.
"""

import ctypes
import errno
import logging
import mmap
import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchrec_scratchpipe.core.disk_reads import ReadFile, blocks_of, read_fully
from torchrec_scratchpipe.errors import TableStorageError

__all__ = ["DEFAULT_RAM_GIB", "LogFile", "MappedStorage", "PageRanges", "RamBudget", "page_ranges"]

logger: logging.Logger = logging.getLogger(__name__)

DEFAULT_RAM_GIB = 0.5  # for rows of tables on a disk
SYS_PROCESS_MADVISE = 440  # of Linux, on every processor
RANGES_PER_CALL = 1024  # the most that Linux takes
EHWPOISON = 133  # of Linux; the errno module has no name for it
MADV_PAGEOUT = 21  # of Linux since 5.4; the mmap module has no name for it
MADV_POPULATE_WRITE = 23  # since 5.14

PageRanges = npt.NDArray[np.uint64]  # [P, 2] beginning and length, in bytes


class RamBudget:
    """RAM that rows of tables on a disk may take, shared by the tables in proportion to their bytes."""

    def __init__(self, num_bytes: int = int(DEFAULT_RAM_GIB * 1024**3)) -> None:
        self.num_bytes = num_bytes
        self._tables: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()

    def register(self, table: object, num_bytes: int) -> None:
        """Count a table."""
        self._tables[table] = num_bytes

    def share_of(self, table: object) -> int:
        """Bytes of RAM for a table's rows; ask when all tables are registered."""
        return self.num_bytes * self._tables[table] // max(1, sum(self._tables.values()))


class MappedStorage:
    """Files in a directory, mapped into memory, whose pages the system may write out and drop.

    The whole file is reserved up front, so that a full disk is an error here and not a crash while training. The file
    never has a name (where the file system knows no such files, not for long): the space is returned when the table is
    freed, however the process ends, and no table of an earlier run can be mistaken for this one.

    Raises TableStorageError.
    """

    is_device_accessible = False
    is_copied_by_fork = False

    def __init__(
        self,
        directory: str | os.PathLike[str],
        ram_budget: RamBudget | None = None,
        *,
        keeps_files: bool = True,  # for `file_of`; each takes a file descriptor
    ) -> None:
        self._keeps_files = keeps_files
        self.ram_budget = ram_budget or RamBudget()
        self._directory = Path(directory)
        self._mappings: list[mmap.mmap] = []
        self._files: dict[int, ReadFile] = {}  # by address
        self._ask = _PageCalls(mmap.MADV_WILLNEED, "pages are read from the disk one after another")
        self._bring_in = _PageCalls(MADV_POPULATE_WRITE, "the process ends if the disk fails")
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
                mapped = _map(file.fileno(), num_bytes)
                read_file = ReadFile(file.fileno(), num_bytes) if self._keeps_files else None
        except OSError as error:
            free_bytes = shutil.disk_usage(self._directory).free
            raise TableStorageError(
                f"table_dir {str(self._directory)!r} cannot hold {label}: it needs {num_bytes:,} bytes, "
                f"{free_bytes:,} are free ({error.strerror}). Free space there, or name another directory."
            ) from error
        self._mappings.append(mapped)
        if not num_values:
            return torch.empty(0, dtype=dtype)
        tensor = torch.frombuffer(mapped, dtype=dtype, count=num_values)
        if read_file is not None:
            self._files[tensor.data_ptr()] = read_file
        return tensor

    def file_of(self, tensor: Tensor) -> ReadFile | None:
        """The file in which an allocated tensor lies, from its beginning; None if it lies in none."""
        return self._files.get(tensor.data_ptr())

    def open_log(self, num_bytes: int) -> "LogFile":
        """A file that takes space when it is written, and at most so much. Raises OSError."""
        return LogFile(self._directory, num_bytes)

    def bring_in(self, pages: PageRanges) -> None:
        """Have pages of files in RAM, to be written; all are asked for at once.

        A page that cannot be read is an error here. Whoever touches it ends the process. Raises OSError.
        """
        self._advise(pages)
        self._bring_in(pages)

    def ask_for(self, begin: int, num_bytes: int) -> None:
        """Have a range of a mapped file brought into RAM, by its address; it is read as one piece."""
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        self._advise(np.array([[first, begin + num_bytes - first]], dtype=np.uint64))

    def _advise(self, pages: PageRanges) -> None:
        with suppress(OSError):  # advice; whoever touches them will find out
            self._ask(pages)

    def failure(self, label: str, error: OSError) -> TableStorageError:
        """What to say when the disk fails under tables that are in use."""
        reason = (
            "the disk failed, or a file was cut short" if error.errno == errno.EFAULT else error.strerror or str(error)
        )
        return TableStorageError(
            f"{label}: rows cannot be moved between RAM and their file in table_dir {str(self._directory)!r} "
            f"({reason}). Nothing that was trained is lost in RAM or in the scratchpad. Look at the disk and its free "
            "space; then go on, or build the model anew and load a checkpoint."
        )

    def forget_pages(self) -> None:
        """Have the system drop what is in RAM of the tables and is on the disk too: for whoever measures the disk."""
        for mapped in self._mappings:
            with suppress(OSError):  # a system that does not know it
                mapped.madvise(MADV_PAGEOUT)

    def persist(self) -> None:
        """See :class:`TableStorage`."""
        for mapped in self._mappings:
            mapped.flush()


class LogFile:
    """A file without a name that takes space piece by piece, written by calls and read in `pieces`.

    Raises OSError.
    """

    def __init__(self, directory: Path, num_bytes: int) -> None:
        # Not buffered, and kept open: it is written by position.
        self._file: Any = tempfile.TemporaryFile(prefix="scratchpipe_log_", dir=directory, buffering=0)  # noqa: SIM115
        os.ftruncate(self._file.fileno(), num_bytes)
        self.pieces = ReadFile(self._file.fileno(), num_bytes)

    def reserve(self, first: int, num_bytes: int) -> None:
        """Take space on the disk for a range of bytes. Raises OSError."""
        os.posix_fallocate(self._file.fileno(), first, num_bytes)

    def write(self, first: int, values: Tensor) -> None:
        """Write a contiguous tensor. Raises OSError."""
        begin = first
        rest = memoryview(values.view(torch.uint8).view(-1).numpy())  # type: ignore[arg-type]  # numpy has buffers
        while rest:
            num_written = os.pwrite(self._file.fileno(), rest, first)
            first, rest = first + num_written, rest[num_written:]
        self.pieces.start_writing(begin, first - begin)

    def read(self, first: int, num_bytes: int) -> Tensor:
        """Read a range, in order. Shapes: returns [num_bytes] uint8. Raises OSError."""
        values = torch.empty(num_bytes, dtype=torch.uint8)
        read_fully(self._file.fileno(), values, first, num_bytes)
        return values


def _map(file: int, num_bytes: int) -> mmap.mmap:
    mapped = mmap.mmap(file, num_bytes)
    # Rows are read at random. Without this advice the page cache uses folios of up to 2 MiB, and one row of 256 bytes
    # makes 2 MiB dirty: writing 10,000 rows to a 6.7 GB file took 1,200 ms instead of 13 ms (Linux 6.18, ext4, 2 cores
    # of an AMD EPYC).
    mapped.madvise(mmap.MADV_RANDOM)
    return mapped


class _PageCalls:
    """Tells the system one thing about many pages of this process; nothing where it does not know that thing."""

    def __init__(self, advice: int, what_if_unknown: str) -> None:
        self._advice = advice
        self._what_if_unknown = what_if_unknown
        self._libc = ctypes.CDLL(None, use_errno=True)  # a call lets other threads have Python's lock
        self._process: int | None = None
        self._ways = [self._call_for_many, self._call_for_each]

    def __call__(self, pages: PageRanges) -> None:
        """Raises OSError."""
        first = 0
        while first < len(pages) and self._ways:
            some = pages[first : first + RANGES_PER_CALL]
            ctypes.set_errno(0)  # what an earlier call has left would be taken for this one's
            num_done = self._ways[0](some)
            first += num_done
            code = ctypes.get_errno()
            if num_done > 0 or code == errno.EAGAIN:
                continue
            if code in (errno.EFAULT, errno.EIO, errno.ENOMEM, EHWPOISON):
                raise OSError(code, os.strerror(code))
            # The system does not know the call, or does not allow it.
            del self._ways[0]
            if not self._ways:
                logger.info("%s (%s)", self._what_if_unknown, os.strerror(code))

    # Each returns how many ranges were dealt with, at least one; or 0, and errno says why.

    def _call_for_many(self, some: PageRanges) -> int:
        if self._process is None:
            try:
                self._process = os.pidfd_open(os.getpid())
                weakref.finalize(self, os.close, self._process)
            except (AttributeError, OSError) as error:  # not Linux, or one of before 5.10
                ctypes.set_errno(getattr(error, "errno", errno.ENOSYS))
                return 0
        num_bytes: int = self._libc.syscall(
            SYS_PROCESS_MADVISE,
            ctypes.c_int(self._process),
            ctypes.c_void_p(some.ctypes.data),
            ctypes.c_size_t(len(some)),
            ctypes.c_int(self._advice),
            ctypes.c_uint(0),
        )
        return int(np.searchsorted(np.cumsum(some[:, 1]), max(0, num_bytes), side="right"))

    def _call_for_each(self, some: PageRanges) -> int:
        for number, (begin, num_bytes) in enumerate(some.tolist()):
            if self._libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(num_bytes), ctypes.c_int(self._advice)):
                return number
        return len(some)


def page_ranges(part: Tensor, rows: Tensor) -> PageRanges:
    """The pages in which rows of a tensor lie, each page once, ascending. Shapes: `rows` [N] int64."""
    num_bytes = part[:1].nbytes
    addresses: npt.NDArray[np.int64] = part.data_ptr() + rows.numpy() * num_bytes
    pages, starts = blocks_of(addresses, num_bytes, mmap.PAGESIZE)
    lengths = np.diff(starts, append=len(pages))
    return np.stack([pages[starts], lengths], axis=1).astype(np.uint64) * np.uint64(mmap.PAGESIZE)
