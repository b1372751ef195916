# SPDX-License-Identifier: BSD-3-Clause
"""Holds all rows of a pool's tables on the host: in RAM, in page-locked RAM or in memory-mapped files.

Shapes: ``R`` rows of all tables of the pool, ``D`` row width.
"""

import mmap
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from torchrec_scratchpipe.errors import TableStorageError
from torchrec_scratchpipe.fork import prepare_for_forks
from torchrec_scratchpipe.lent_memory import LentMemories
from torchrec_scratchpipe.row_parts import read_rows, write_rows
from torchrec_scratchpipe.snapshot import SnapshotStorage, TableSnapshot
from torchrec_scratchpipe.types import RowLayout, TableSpec

__all__ = ["HostTable", "MappedStorage", "PageLockedStorage", "RamStorage", "TableStorage"]


WRITE_BUFFER_BYTES = 512 * 1024 * 1024
CUDA_HOST_REGISTER_PORTABLE_AND_MAPPED = 0x1 | 0x2
SWEEP_ROWS = 16384  # how far the write buffer's hand moves at a time: 4 MiB of rows of 64 floats


class TableStorage(Protocol):
    """Where a host table's memory comes from."""

    is_slow_to_write: bool  # whether single rows should be gathered in RAM before they are written
    is_device_accessible: bool  # whether kernels on the device may read and write it in place
    is_copied_by_fork: bool  # whether a forked child has memory of its own, with the same content

    def allocate(self, num_values: int, dtype: torch.dtype, label: str) -> Tensor:
        """Allocate zero-filled memory.

        Args:
            num_values: Length of the flat tensor.
            dtype: Its element type.
            label: For error messages and file names, e.g. ``"weights of t_cat_0, t_cat_1"``.

        Returns:
            [num_values], contiguous, on the host.
        """

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

    Exactly as much as is asked for: the caching allocator for page-locked memory rounds up to a power of two, which for a table
    of 40 GB would take 64 GB. Unlocked when nobody holds this storage any more; the memory stays as long as its tensors.
    """

    is_slow_to_write = False
    is_device_accessible = True
    is_copied_by_fork = False

    def __init__(self) -> None:
        self._locked: list[Tensor] = []
        weakref.finalize(self, _unlock, self._locked)

    def allocate(self, num_values: int, dtype: torch.dtype, label: str) -> Tensor:
        """See :class:`TableStorage`.

        Args:
            num_values: Length of the flat tensor.
            dtype: Its element type.
            label: For error messages.

        Returns:
            [num_values], contiguous, page-locked.

        Raises:
            TableStorageError: The system does not lock so much.
        """
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
                f"{label}: {tensor.nbytes:,} bytes cannot be page-locked ({error}). Raise the limit (ulimit -l), free host memory, "
                "or give the sharder host_access='staged', which needs no page-locked tables."
            )
        self._locked.append(tensor)
        return tensor[:num_values]

    def persist(self) -> None:
        """Does nothing."""


def _lock_pages(tensor: Tensor) -> str:
    """Why it could not be done, or nothing."""
    cudart = torch.cuda.cudart()
    error = cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, CUDA_HOST_REGISTER_PORTABLE_AND_MAPPED)
    return "" if int(error) == 0 else str(cudart.cudaGetErrorString(error))


def _unlock(locked: list[Tensor]) -> None:
    if locked:
        torch.cuda.synchronize()  # kernels of batches that were dropped may still be at these tables
    for tensor in locked:
        torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
    locked.clear()


class MappedStorage:
    """Files in a directory, mapped into memory, whose pages the system may write out and drop.

    The whole file is reserved up front, so that a full disk is an error here and not a crash
    while training. The file never has a name (where the file system knows no such files, not for long): the space is
    returned when the table is freed, however the process ends, and no table of an earlier run can be mistaken for this one.

    Args:
        directory: An existing, writable directory on the disk that is to hold the tables.

    Raises:
        TableStorageError: The directory is missing or not writable.
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
        """See :class:`TableStorage`.

        Args:
            num_values: Length of the flat tensor.
            dtype: Its element type.
            label: For error messages.

        Returns:
            [num_values], contiguous, backed by an unnamed file.

        Raises:
            TableStorageError: The disk has no room for it.
        """
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


class HostTable:
    """Every row of a pool, weights and optimizer states, as one flat tensor per part.

    The rows of one table are contiguous, tables follow each other in the order given. Not thread-safe, but for
    :meth:`read_snapshot` and :meth:`close_snapshot`, which another thread may call.

    Args:
        tables: The pool's tables.
        layout: What a row consists of.
        storage: Where the memory comes from.
    """

    def __init__(self, tables: Sequence[TableSpec], layout: RowLayout, storage: TableStorage) -> None:
        self.tables = tuple(tables)
        self.layout = layout
        self.num_rows = sum(table.num_rows for table in tables)
        self.row_offsets = [0]
        for table in tables:
            self.row_offsets.append(self.row_offsets[-1] + table.num_rows)
        names = ", ".join(table.name for table in tables)
        self.parts: list[Tensor] = []
        for shape, dtype, part_name in layout.part_shapes(self.num_rows):
            num_values = int(torch.Size(shape).numel())
            self.parts.append(storage.allocate(num_values, dtype, f"{part_name} of {names}").view(shape))
        self._storage = storage
        self._write_buffer = WriteBuffer(self._overwrite, self.num_rows, layout) if storage.is_slow_to_write else None
        self._own_versions = self._versions()
        self._is_overwritten = False
        self.lent = LentMemories()
        self._snapshots: list[TableSnapshot] = []
        self._snapshots_changed = threading.Condition()
        self._is_of_parent = False
        prepare_for_forks(self, is_worker=False)

    def before_fork(self) -> None:
        """See :class:`ForkAware`."""
        self._snapshots_changed.acquire()

    def after_fork_in_parent(self) -> None:
        """See :class:`ForkAware`."""
        self._snapshots_changed.release()

    def after_fork_in_child(self) -> None:
        """See :class:`ForkAware`: nobody in the child reads the parent's snapshots."""
        self._snapshots_changed = threading.Condition()
        self._snapshots = []
        self._is_of_parent = not self._storage.is_copied_by_fork

    def check_process(self) -> None:
        """Raise in a forked child whose writes would be its parent's, or whose reads would find no memory.

        Raises:
            TableStorageError: Says what to do instead.
        """
        if self._is_of_parent:
            names = ", ".join(table.name for table in self.tables)
            raise TableStorageError(
                f"tables {names} are in memory that a forked child shares with its parent, or does not have (memory-mapped files, "
                "page-locked memory). Use the model in the process that has made it; start a new process (spawn) for another."
            )

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows, optimizer states included."""
        return self.num_rows * self.layout.row_bytes

    @property
    def is_device_accessible(self) -> bool:
        """Whether kernels on the device may read and write `parts` in place."""
        return self._storage.is_device_accessible

    @property
    def has_snapshots(self) -> bool:
        """Whether old values of rows must be kept, by :meth:`write`, before they are overwritten."""
        return bool(self._snapshots)

    def table_parts(self, table_index: int) -> list[Tensor]:
        """One table's weights, then its optimizer states; views, not copies, as of the last :meth:`drain`.

        Args:
            table_index: Position in `tables`.

        Returns:
            [num_rows, D] or [num_rows], each contiguous.
        """
        first, last = self.row_offsets[table_index], self.row_offsets[table_index + 1]
        return [part[first:last] for part in self.parts]

    @property
    def is_overwritten(self) -> bool:
        """Whether somebody else has written `parts`, or a view of them, since :meth:`accept_overwrite`, or may do so unseen."""
        # Views share their base's version counter, which every in-place operation of torch raises.
        return self._is_overwritten or self.lent.is_any_lent or self._versions() != self._own_versions

    @property
    def is_seen_overwritten(self) -> bool:
        """Whether somebody else has written `parts` for certain; not only that somebody has or was given them."""
        return self._versions() != self._own_versions

    @property
    def is_marked_overwritten(self) -> bool:
        """Whether :meth:`mark_overwritten` was called since :meth:`accept_overwrite`."""
        return self._is_overwritten

    @property
    def is_drained(self) -> bool:
        """Whether `parts` have every :meth:`write`; else :meth:`drain` brings them up to date."""
        return self._write_buffer is None or self._write_buffer.is_empty

    def mark_overwritten(self) -> None:
        """Say that `parts` will be, or may have been, written by somebody else."""
        self._is_overwritten = True

    def accept_overwrite(self) -> None:
        """Forget about writes of others; whoever needs to know has taken them in."""
        with self._snapshots_changed:
            self._lose_snapshots_of_overwritten()
            self._is_overwritten = False
            self._own_versions = self._versions()

    def locate(self, tensor: Tensor) -> tuple[int, int] | None:
        """Find a view of this table.

        Args:
            tensor: Any tensor.

        Returns:
            The part that it shows, and the row where it begins; None if it shows something else, or nothing.
        """
        for index, part in enumerate(self.parts):
            if tensor.numel() and tensor.untyped_storage().data_ptr() == part.untyped_storage().data_ptr():
                return index, (tensor.data_ptr() - part.data_ptr()) // part[:1].nbytes
        return None

    def snapshot(self, storage: SnapshotStorage) -> TableSnapshot:
        """Keep all rows readable as they are now, until :meth:`close_snapshot`.

        Args:
            storage: Where old values of rows that are written meanwhile go.

        Returns:
            To be read by :meth:`read_snapshot`.

        Raises:
            TableStorageError: There is no room for it.
        """
        self.drain()
        with self._own_writes():  # writes of others until now belong to the snapshot
            snapshot = TableSnapshot(self.parts, self.layout, storage)
            self._snapshots.append(snapshot)
        return snapshot

    def read_snapshot(self, snapshot: TableSnapshot, part_index: int, first_row: int, out: Tensor) -> None:
        """See :meth:`TableSnapshot.read`.

        Args:
            snapshot: From :meth:`snapshot`.
            part_index: 0 for weights, then the optimizer states.
            first_row: Of the range.
            out: [N, D] or [N]; written.

        Raises:
            TableStorageError: Some rows could not be kept, or the table was overwritten by others.
        """
        with self._snapshots_changed:
            self._lose_snapshots_of_overwritten()
            snapshot.read(part_index, first_row, out)

    def close_snapshot(self, snapshot: TableSnapshot) -> None:
        """Keep no more rows for a snapshot, and free those that were kept.

        Args:
            snapshot: From :meth:`snapshot`.
        """
        with self._snapshots_changed:
            self._snapshots = [other for other in self._snapshots if other is not snapshot]
            self._snapshots_changed.notify_all()

    def wait_for_snapshots(self) -> None:
        """Wait until all snapshots are closed; somebody else is about to write the table."""
        with self._snapshots_changed:
            self._snapshots_changed.wait_for(lambda: not self._snapshots)

    def read(self, rows: Tensor, out: Sequence[Tensor]) -> None:
        """Copy rows out.

        Args:
            rows: [N] int64 row ids on the host.
            out: [N, D] or [N] each, contiguous, on the host; written.
        """
        read_rows(self.parts, rows, out)
        if self._write_buffer is not None:
            self._write_buffer.read_over(rows, out)

    def write(self, rows: Tensor, values: Sequence[Tensor]) -> None:
        """Copy rows in.

        Args:
            rows: [N] int64 row ids on the host, unique.
            values: [N, D] or [N] each, on the host.
        """
        with self._own_writes():
            if self._write_buffer is None:
                self._overwrite(rows, values)
            else:
                self._write_buffer.write(rows, values)

    def drain(self) -> None:
        """Bring `parts` up to date with every :meth:`write`."""
        if self._write_buffer is not None:
            with self._own_writes():
                self._write_buffer.drain()

    def persist(self) -> None:
        """Wait until every write has reached the table's medium, the disk of a memory-mapped table."""
        self.drain()
        self._storage.persist()

    def _overwrite(self, rows: Tensor, values: Sequence[Tensor]) -> None:
        for snapshot in self._snapshots:
            snapshot.keep(rows)
        write_rows(self.parts, rows, values)

    @contextmanager
    def _own_writes(self) -> Iterator[None]:
        with self._snapshots_changed:
            self._lose_snapshots_of_overwritten()
            self._is_overwritten = self._is_overwritten or self._versions() != self._own_versions
            try:
                yield
            finally:
                self._own_versions = self._versions()

    def _lose_snapshots_of_overwritten(self) -> None:
        if self._snapshots and self._versions() != self._own_versions:
            names = ", ".join(table.name for table in self.tables)
            for snapshot in self._snapshots:
                snapshot.fail(
                    TableStorageError(
                        f"tables {names} were written in place while they were being saved. Wait for async_save() "
                        "before writing tables or loading into them."
                    )
                )

    def _versions(self) -> list[int]:
        return [part._version for part in self.parts]


class WriteBuffer:
    """Rows on their way to a memory-mapped table, kept in RAM until many of them can be written side by side.

    Writing a row makes its whole page dirty, and the system writes dirty pages out. Victims are spread over
    the whole table, so writing each at once costs a page, and its write to the disk, per row. Here they
    gather first; a hand then sweeps through the table in row order and takes along all that lie in its way, so that
    neighbouring rows share a page and neighbouring pages one write. Costs 4 bytes per row of the table, and at most
    :data:`WRITE_BUFFER_BYTES` of rows.

    Args:
        write_table: Writes rows to the table: row ids, then the values of each part.
        num_rows: Rows of the table.
        layout: What a row consists of.
    """

    def __init__(
        self, write_table: Callable[[Tensor, Sequence[Tensor]], None], num_rows: int, layout: RowLayout
    ) -> None:
        self._write_table = write_table
        self._num_rows = num_rows
        self._capacity = max(1, min(self._num_rows, WRITE_BUFFER_BYTES // layout.row_bytes))
        self._buffer = layout.empty(self._capacity)
        self._row_to_place = torch.full((self._num_rows,), -1, dtype=torch.int32)
        self._free_places = torch.arange(self._capacity, dtype=torch.int64)
        self._hand = 0

    def read_over(self, rows: Tensor, out: Sequence[Tensor]) -> None:
        """Replace what was read from the table by what is newer here.

        Args:
            rows: [N] int64.
            out: [N, D] or [N] each; rows that wait here are written.
        """
        places = self._row_to_place.index_select(0, rows).long()
        positions = (places >= 0).nonzero().view(-1)
        if positions.numel() == 0:
            return
        newer = [buffer.index_select(0, places.index_select(0, positions)) for buffer in self._buffer]
        write_rows(out, positions, newer)

    def write(self, rows: Tensor, values: Sequence[Tensor]) -> None:
        """Take rows in, and pass others on to the table where there is no room.

        Args:
            rows: [N] int64, unique.
            values: [N, D] or [N] each.
        """
        for first in range(0, rows.numel(), self._capacity):
            last = first + self._capacity
            self._write_some(rows[first:last], [value[first:last] for value in values])

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits here."""
        return self._free_places.numel() == self._capacity

    def drain(self) -> None:
        """Pass everything on to the table."""
        self._make_room(self._capacity)

    def _write_some(self, rows: Tensor, values: Sequence[Tensor]) -> None:
        self._make_room(rows.numel())
        places = self._row_to_place.index_select(0, rows).long()
        new = (places < 0).nonzero().view(-1)
        places[new] = self._free_places[: new.numel()]
        self._free_places = self._free_places[new.numel() :]
        self._row_to_place.index_copy_(0, rows, places.int())
        write_rows(self._buffer, places, values)

    def _make_room(self, num_places: int) -> None:
        freed = [self._free_places]
        num_free = self._free_places.numel()
        while num_free < num_places:
            first = self._hand
            self._hand = last = min(first + SWEEP_ROWS, self._num_rows)
            waiting = (self._row_to_place[first:last] >= 0).nonzero().view(-1) + first
            places = self._row_to_place.index_select(0, waiting).long()
            self._write_table(waiting, [buffer.index_select(0, places) for buffer in self._buffer])
            self._row_to_place.index_fill_(0, waiting, -1)
            freed.append(places)
            num_free += places.numel()
            if self._hand == self._num_rows:
                self._hand = 0
        self._free_places = torch.cat(freed)
