# SPDX-License-Identifier: BSD-3-Clause
"""Reads many short pieces of files at once, with as many reads in flight as a disk can use.

Reads go past the system's page cache (O_DIRECT). A page that is read for one row of 256 bytes would push another out of
the cache, and the system's work for that takes more of a processor than the read itself: 12,400 rows of 256 bytes took
44 ms of a processor past the cache, and 150 ms through pages that were asked for and mapped (2 cores of an AMD EPYC,
Linux 6.18, ext4, memory limited to 0.9 GB, 2026-11-27). What others have written to the cache is not missed: the system
writes it to the disk before it reads there.

Reads are those of Linux's own asynchronous interface (io_submit), which containers allow, unlike io_uring. Where a
system or a file does not know them, pieces are read one by one, after they have all been asked for.

Shapes: ``N`` pieces, ``B`` blocks, ``U`` runs of neighbouring blocks.
"""

import ctypes
import errno
import math
import mmap
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["MAX_DEPTH", "DiskReader", "Pieces", "ReadFile", "blocks_of", "read_fully"]

MAX_DEPTH = 256  # reads in flight; more did not make the disk quicker, and 64 took a third more of a processor
BLOCK_BYTES = (512, 4096)  # that disks read at least
# Numbers of io_setup, io_destroy, io_getevents and io_submit, by processor.
SYSTEM_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
# struct iocb and struct io_event of Linux, little-endian.
REQUEST = np.dtype(
    [
        ("number", "u8"),
        ("key", "u4"),
        ("flags", "u4"),
        ("call", "u2"),
        ("priority", "i2"),
        ("file", "u4"),
        ("memory", "u8"),
        ("num_bytes", "u8"),
        ("first", "i8"),
        ("unused", "u8"),
        ("more_flags", "u4"),
        ("event_file", "u4"),
    ]
)
RESULT = np.dtype([("number", "u8"), ("request", "u8"), ("num_bytes", "i8"), ("more", "i8")])

Numbers = npt.NDArray[np.int64]


class ReadFile:
    """A file that is read in pieces; it may have no name, and others may write it.

    Args:
        file: Descriptor, open for reading; it is copied.
        num_bytes: The file's size, which stays.
    """

    def __init__(self, file: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        direct, self.block_bytes = _open_direct(file)
        self.is_direct = direct is not None  # read past the page cache
        self.file = os.dup(file) if direct is None else direct
        weakref.finalize(self, os.close, self.file)

    def start_writing(self, first: int = 0, num_bytes: int = 0) -> None:
        """Have the system begin to write a range, or all, to the disk, and keep no more of it; does not wait."""
        with suppress(OSError, AttributeError):  # not every system can be told
            os.posix_fadvise(self.file, first, num_bytes, os.POSIX_FADV_DONTNEED)


class Pieces(NamedTuple):
    """Equally long pieces of a file: where each begins, in bytes, a multiple of its length."""

    file: ReadFile
    begins: Tensor  # [N] int64
    num_bytes: int  # of each


class DiskReader:
    """Reads pieces of files; from several threads, each call with a queue of its own."""

    def __init__(self) -> None:
        self._idle: list[_Queue] = []

    def read(self, wanted: Sequence[Pieces]) -> tuple[list[Tensor], int]:
        """Read pieces of several files together.

        Shapes: returns [N, num_bytes] uint8 for each of `wanted`, and how many reads the disk had to do; those of
        neighbours are one.

        Raises OSError.
        """
        blocks = [_Blocks(pieces) for pieces in wanted]
        try:
            queue = self._idle.pop()
        except IndexError:  # all are in use, by other threads
            queue = _Queue()
        memory = queue.memory(sum(some.num_bytes for some in blocks))
        first, parts = 0, []
        for some in blocks:
            parts.append(memory[first : first + some.num_bytes])
            first += some.num_bytes
        num_reads = queue.read(blocks, parts)
        values = [some.gather(part) for some, part in zip(blocks, parts, strict=True)]
        self._idle.append(queue)  # not after an error: reads may be in flight
        return values, num_reads


def blocks_of(begins: Numbers, num_bytes: int, block_bytes: int) -> tuple[Numbers, Numbers]:
    """The blocks in which pieces lie, each once, ascending; and where among them runs of neighbours start.

    Shapes: `begins` [N], in bytes, returns [B] numbers of blocks, [U] places in those.
    """
    first, last = begins // block_bytes, (begins + (num_bytes - 1)) // block_bytes
    span = int((last - first).max(initial=0)) + 1
    blocks = np.unique(np.minimum(first[:, None] + np.arange(span), last[:, None]))
    return blocks, np.flatnonzero(np.diff(blocks, prepend=blocks[:1] - 2) != 1)


class _Blocks:
    """The blocks of a file in which pieces lie, each once, ascending; neighbours make one run."""

    def __init__(self, pieces: Pieces) -> None:
        self.file, self._piece_bytes = pieces.file, pieces.num_bytes
        size = self.file.block_bytes
        begins: Numbers = pieces.begins.numpy()
        blocks, starts = blocks_of(begins, pieces.num_bytes, size)
        self.num_bytes = len(blocks) * size
        # Where pieces begin in memory that has these blocks and no others.
        self._places: Numbers = np.searchsorted(blocks, begins // size) * size + begins % size
        self.run_begins: Numbers = blocks[starts] * size  # [U], in the file
        self.run_places: Numbers = starts * size  # [U], in memory
        self.run_bytes: Numbers = np.diff(starts, append=len(blocks)) * size  # [U]

    def gather(self, memory: Tensor) -> Tensor:
        """Cut the pieces out. Shapes: `memory` [bytes] uint8, returns [N, num_bytes]."""
        # Pieces begin at multiples of this in their file, and blocks at multiples of it in memory.
        word = math.gcd(self._piece_bytes, self.file.block_bytes)
        num_words = self._piece_bytes // word
        index = torch.from_numpy(self._places // word)
        if num_words > 1:
            index = (index[:, None] + torch.arange(num_words)).view(-1)
        return memory.view(-1, word).index_select(0, index).view(-1, self._piece_bytes)


class _Queue:
    """Reads in flight, and the memory that they fill; for one thread at a time."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)  # a call lets other threads have Python's lock
        self._buffer: Any = mmap.mmap(-1, mmap.PAGESIZE)
        self._results = np.zeros(MAX_DEPTH, RESULT)
        self._context = ctypes.c_ulong(0)
        self._calls = SYSTEM_CALLS.get(os.uname().machine)
        if self._calls is not None and self._call(0, ctypes.c_uint(MAX_DEPTH), ctypes.byref(self._context)) < 0:
            self._calls = None  # a system that does not know it, or has no more of them
        if self._calls is not None:
            # Waits for reads in flight, which fill this buffer and no later one.
            weakref.finalize(self, self._libc.syscall, self._calls[1], self._context)

    def memory(self, num_bytes: int) -> Tensor:
        """Room for blocks, valid until the next call. Shapes: returns [num_bytes] uint8."""
        if num_bytes > len(self._buffer):
            self._buffer = mmap.mmap(-1, num_bytes + num_bytes // 4)
        return torch.frombuffer(self._buffer, dtype=torch.uint8)[:num_bytes]

    def read(self, blocks: Sequence[_Blocks], memories: Sequence[Tensor]) -> int:
        """Fill memory with blocks; returns how many reads the disk had to do. Raises OSError."""
        pairs: list[tuple[_Blocks, Tensor]] = []
        plain: list[tuple[_Blocks, Tensor]] = []
        for some, memory in zip(blocks, memories, strict=True):
            is_plain = self._calls is None or not some.file.is_direct
            (plain if is_plain else pairs).append((some, memory))
        num_reads = _read_plainly(plain)
        if not pairs:
            return num_reads
        requests = np.concatenate([_requests(*pair) for pair in pairs])
        found = self._run(requests)
        sizes = np.repeat([some.file.num_bytes for some, _ in pairs], [len(some.run_begins) for some, _ in pairs])
        is_short = found < np.minimum(requests["num_bytes"].astype(np.int64), sizes - requests["first"])
        if is_short.any():
            code = -int(found[is_short].min())
            raise OSError(code, os.strerror(code)) if code > 0 else OSError(errno.EFAULT, "the file was cut")
        return num_reads + len(requests)

    def _run(self, requests: npt.NDArray[Any]) -> Numbers:
        """Have requests done, many at a time. Shapes: returns [U], bytes read or minus an error. Raises OSError."""
        found = np.zeros(len(requests), np.int64)
        requests["number"] = np.arange(len(requests))
        addresses = requests.ctypes.data + np.arange(len(requests), dtype=np.uint64) * np.uint64(REQUEST.itemsize)
        num_given = num_done = 0
        while num_done < len(requests):
            num_more = min(len(requests) - num_given, MAX_DEPTH - (num_given - num_done))
            if num_more:
                num_given += self._check(
                    self._call(3, self._context, num_more, ctypes.c_void_p(addresses[num_given:].ctypes.data))
                )
            if num_given == num_done:
                continue  # the system had no room for any
            num_wanted = ctypes.c_long(-(-(num_given - num_done) // 2))
            results = ctypes.c_void_p(self._results.ctypes.data)
            num_results = self._check(self._call(2, self._context, num_wanted, ctypes.c_long(MAX_DEPTH), results, None))
            some = self._results[:num_results]
            found[some["number"]] = some["num_bytes"]
            num_done += num_results
        return found

    def _call(self, name: int, *arguments: Any) -> int:
        assert self._calls is not None, "without system calls there is nothing to call"
        number: int = self._libc.syscall(ctypes.c_long(self._calls[name]), *arguments)
        return number

    def _check(self, number: int) -> int:
        """A number of requests; none if the system asks to be called again. Raises OSError."""
        if number >= 0:
            return number
        code = ctypes.get_errno()
        if code in (errno.EAGAIN, errno.EINTR):
            return 0
        raise OSError(code, os.strerror(code))


def _requests(blocks: _Blocks, memory: Tensor) -> npt.NDArray[Any]:
    requests = np.zeros(len(blocks.run_begins), REQUEST)
    requests["memory"] = memory.data_ptr() + blocks.run_places
    requests["num_bytes"] = blocks.run_bytes
    requests["first"] = blocks.run_begins
    requests["file"] = blocks.file.file
    return requests


def _read_plainly(pairs: Sequence[tuple[_Blocks, Tensor]]) -> int:
    """Read blocks one by one, after all have been asked for; returns how many runs. Raises OSError."""
    num_reads = 0
    for is_asking in (True, False):
        for blocks, memory in pairs:
            file = blocks.file
            runs = np.stack([blocks.run_begins, blocks.run_places, blocks.run_bytes], axis=1).tolist()
            for begin, place, num_bytes in runs:
                if is_asking:
                    with suppress(OSError, AttributeError):  # advice; not every system takes it
                        os.posix_fadvise(file.file, begin, num_bytes, os.POSIX_FADV_WILLNEED)
                else:
                    needed = min(num_bytes, file.num_bytes - begin)
                    read_fully(file.file, memory[place : place + num_bytes], begin, needed)
                    num_reads += 1
    return num_reads


def read_fully(file: int, memory: Tensor, first: int, num_needed: int) -> None:
    """Read a range of a file, of whose end there may be less. Shapes: `memory` [bytes] uint8. Raises OSError."""
    view, num_read = memoryview(memory.numpy()), 0  # type: ignore[arg-type]  # numpy has buffers
    while num_read < num_needed:
        num_more = os.preadv(file, [view[num_read:]], first + num_read)
        if num_more == 0:
            raise OSError(errno.EFAULT, "the file was cut")
        num_read += num_more


def _open_direct(file: int) -> tuple[int | None, int]:
    """The same file without the page cache, and the bytes that are read at least; none where that is not possible."""
    with suppress(OSError, AttributeError):  # no such file system, or not Linux
        direct = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_DIRECT)
        for num_bytes in BLOCK_BYTES:
            with suppress(OSError), mmap.mmap(-1, mmap.PAGESIZE) as memory:
                os.preadv(direct, [memoryview(memory)[:num_bytes]], 0)
                return direct, num_bytes
        os.close(direct)
    return None, BLOCK_BYTES[0]
