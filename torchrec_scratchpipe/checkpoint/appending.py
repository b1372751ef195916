# SPDX-License-Identifier: BSD-3-Clause
"""A file that grows without going through the system's page cache, where that can be."""

import errno
import fcntl
import mmap
import os
from pathlib import Path
from types import TracebackType

import numpy as np

__all__ = ["PAGE_BYTES", "AppendedFile"]

PAGE_BYTES = 4096  # what goes past the page cache begins and ends at multiples of it, in memory and in the file
BUFFER_BYTES = 4 * 1024 * 1024


class AppendedFile:
    """A new file to which much is appended, and of which little is read soon.

    It is written with O_DIRECT. The page cache would keep its bytes in place of what others read again, and new pages
    for 109 MB take 140 ms of a processor, where to write them past the cache takes 4 (2 cores of an AMD EPYC, a virtual
    machine with free memory). A file system without O_DIRECT is written as any other.

    Args:
        path: Of a file that does not exist.

    Raises:
        OSError: By every method.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._is_direct = self._set_direct(True)
        self._memory = np.frombuffer(mmap.mmap(-1, BUFFER_BYTES), dtype=np.uint8)  # begins at a page
        self._begin = 0  # of the buffer in the file, a multiple of PAGE_BYTES
        self._num_filled = 0

    @property
    def num_bytes(self) -> int:
        """All that was appended; the file may have less of it, or zeros after it."""
        return self._begin + self._num_filled

    def append(self, data: bytes | memoryview) -> None:
        """Add bytes; nothing is kept of `data`."""
        left = memoryview(data).cast("B")
        while left:
            part = left[: BUFFER_BYTES - self._num_filled]
            self._memory[self._num_filled : self._num_filled + len(part)] = np.frombuffer(part, dtype=np.uint8)
            self._num_filled += len(part)
            left = left[len(part) :]
            if self._num_filled == BUFFER_BYTES:
                self.flush()

    def flush(self) -> None:
        """Have everything in the file, and zeros up to the next multiple of `PAGE_BYTES`."""
        num_whole = self._num_filled // PAGE_BYTES * PAGE_BYTES
        num_padded = -(-self._num_filled // PAGE_BYTES) * PAGE_BYTES
        self._memory[self._num_filled : num_padded] = 0
        self._write(num_padded)
        # The last page is written again with what comes next; the bytes that it has now stay the same.
        self._memory[: self._num_filled - num_whole] = self._memory[num_whole : self._num_filled].copy()
        self._begin += num_whole
        self._num_filled -= num_whole

    def sync(self) -> None:
        """:meth:`flush`, and have everything on the disk."""
        self.flush()
        os.fdatasync(self._descriptor)

    def truncate(self, num_bytes: int) -> None:
        """Leave out what was appended after so many bytes: a multiple of `PAGE_BYTES`, and in the file already."""
        assert num_bytes % PAGE_BYTES == 0, "it would have to be read"
        assert num_bytes <= self._begin, "it is not in the file"
        self._begin, self._num_filled = num_bytes, 0  # even if the rest fails: what comes next is written over it
        os.ftruncate(self._descriptor, num_bytes)

    def finish(self) -> None:
        """Have the file on the disk with what was appended, and no zeros after it; nothing is appended any more."""
        self.flush()
        os.ftruncate(self._descriptor, self.num_bytes)
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Append no more."""
        os.close(self._descriptor)

    def __enter__(self) -> "AppendedFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, num_bytes: int) -> None:
        view, at = memoryview(self._memory.data)[:num_bytes], self._begin
        while view:
            try:
                count = os.pwrite(self._descriptor, view, at)
            except OSError as error:
                # Larger blocks than ours, or what was left to write after a disk had been nearly full.
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                self._is_direct = self._set_direct(False)
                continue
            view, at = view[count:], at + count

    def _set_direct(self, is_direct: bool) -> bool:
        flag = getattr(os, "O_DIRECT", 0)
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | flag if is_direct else flags & ~flag)
        except OSError:  # the file system has no O_DIRECT
            return False
        return is_direct and flag != 0
