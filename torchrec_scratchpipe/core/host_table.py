# SPDX-License-Identifier: BSD-3-Clause
"""Holds all rows of a pool's tables on the host, and knows who else has their memory.

Shapes: ``R`` rows of all tables of the pool, ``D`` row width.
"""

import ctypes
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from torchrec_scratchpipe.core.disk import MappedStorage
from torchrec_scratchpipe.core.disk_rows import DiskCounts, DiskRows, RowsAhead
from torchrec_scratchpipe.core.fork import prepare_for_forks
from torchrec_scratchpipe.core.rows import RowLayout, TableSpec, read_rows, write_rows
from torchrec_scratchpipe.core.snapshot import SnapshotStorage, TableSnapshot
from torchrec_scratchpipe.core.storage import RamStorage, TableStorage
from torchrec_scratchpipe.errors import TableStorageError

__all__ = ["HostTable", "LentMemories", "LentMemory"]


class HostTable:
    """Every row of a pool, weights and optimizer states, as one flat tensor per part.

    The rows of one table are contiguous, tables follow each other in the order given. Not thread-safe, but for
    :meth:`read_snapshot` and :meth:`close_snapshot`, which another thread may call.
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
            # One value per row is less than a file's pages would cost: each has the values of a thousand rows.
            is_kept = len(shape) == 1 and isinstance(storage, MappedStorage)
            home = RamStorage() if is_kept else storage
            self.parts.append(home.allocate(num_values, dtype, f"{part_name} of {names}").view(shape))
        self._storage = storage
        self._disk_rows = (
            DiskRows(self.parts, layout, storage, self._keep_old) if isinstance(storage, MappedStorage) else None
        )
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

        Raises TableStorageError.
        """
        if self._is_of_parent:
            names = ", ".join(table.name for table in self.tables)
            raise TableStorageError(
                f"tables {names} are in memory that a forked child shares with its parent, or does not have "
                "(memory-mapped files, page-locked memory). Use the model in the process that has made it; start a "
                "new process (spawn) for another."
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
    def is_on_disk(self) -> bool:
        """Whether rows may have to be brought into RAM; :meth:`read_ahead` has it done early."""
        return self._disk_rows is not None

    @property
    def has_snapshots(self) -> bool:
        """Whether old values of rows must be kept, by :meth:`write`, before they are overwritten."""
        return bool(self._snapshots)

    def table_parts(self, table_index: int) -> list[Tensor]:
        """One table's weights, then its optimizer states; views, not copies, as of the last :meth:`drain`.

        Shapes: returns [num_rows, D] or [num_rows].
        """
        first, last = self.row_offsets[table_index], self.row_offsets[table_index + 1]
        return [part[first:last] for part in self.parts]

    @property
    def is_overwritten(self) -> bool:
        """Whether others have written `parts`, or a view, since :meth:`accept_overwrite`, or may do so unseen."""
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
        return self._disk_rows is None or self._disk_rows.tier.is_empty

    @property
    def disk_counts(self) -> DiskCounts:
        """What the disk did; nothing for tables in RAM."""
        return DiskCounts() if self._disk_rows is None else self._disk_rows.counts

    @property
    def num_log_bytes_written(self) -> int:
        """Bytes of rows that went to the log of a table on a disk."""
        return 0 if self._disk_rows is None else self._disk_rows.tier.num_log_bytes_written

    def mark_overwritten(self) -> None:
        """Say that `parts` will be, or may have been, written by somebody else."""
        self._is_overwritten = True

    def accept_overwrite(self) -> None:
        """Forget about writes of others; whoever needs to know has taken them in."""
        with self._snapshots_changed:
            self._lose_snapshots_of_overwritten()
            self._is_overwritten = False
            self._own_versions = self._versions()
            if self._disk_rows is not None:
                self._disk_rows.note_overwritten()

    def locate(self, tensor: Tensor) -> tuple[int, int] | None:
        """The part that a view of this table shows, and the row where it begins; None if it shows something else."""
        for index, part in enumerate(self.parts):
            if tensor.numel() and tensor.untyped_storage().data_ptr() == part.untyped_storage().data_ptr():
                return index, (tensor.data_ptr() - part.data_ptr()) // part[:1].nbytes
        return None

    def locate_rows(self, tensor: Tensor) -> tuple[int, int] | None:
        """As :meth:`locate`, of a view that shows whole rows in their order; None of any other."""
        place = self.locate(tensor)
        if place is None:
            return None
        part = self.parts[place[0]]
        is_whole = tensor.shape[1:] == part.shape[1:] and tensor.stride() == part.stride()
        is_at_row = (tensor.data_ptr() - part.data_ptr()) % part[:1].nbytes == 0
        return place if is_whole and is_at_row else None

    def snapshot(self, storage: SnapshotStorage) -> TableSnapshot:
        """Keep all rows readable as they are now, until :meth:`close_snapshot`. Raises TableStorageError."""
        self.drain()
        with self._own_writes():  # writes of others until now belong to the snapshot
            snapshot = TableSnapshot(self.parts, self.layout, storage)
            self._snapshots.append(snapshot)
        return snapshot

    def read_snapshot(self, snapshot: TableSnapshot, part_index: int, first_row: int, out: Tensor) -> None:
        """See :meth:`TableSnapshot.read`. Shapes: `out` [N, D] or [N]. Raises TableStorageError."""
        self.ask_for(self.parts[part_index][first_row : first_row + out.shape[0]])
        with self._snapshots_changed:
            self._lose_snapshots_of_overwritten()
            snapshot.read(part_index, first_row, out)

    def close_snapshot(self, snapshot: TableSnapshot) -> None:
        """Keep no more rows for a snapshot, and free those that were kept."""
        with self._snapshots_changed:
            self._snapshots = [other for other in self._snapshots if other is not snapshot]
            self._snapshots_changed.notify_all()

    def wait_for_snapshots(self) -> None:
        """Wait until all snapshots are closed; somebody else is about to write the table."""
        with self._snapshots_changed:
            self._snapshots_changed.wait_for(lambda: not self._snapshots)

    def read(self, rows: Tensor, out: Sequence[Tensor], ahead: RowsAhead | None = None) -> None:
        """Copy rows out, of which some may have been read ahead.

        Shapes: `rows` [N] int64, `out` [N, D] or [N]. Raises TableStorageError.
        """
        if self._disk_rows is None:
            read_rows(self.parts, rows, out)
            return
        if self.is_overwritten:
            self._disk_rows.note_overwritten()
        with self._naming_disk():
            self._disk_rows.read(rows, out, ahead)

    def ask_for(self, shown: Tensor) -> None:
        """Have the system read what a view of `parts` shows into its page cache, if it lies in a file."""
        if self._disk_rows is not None and (place := self.locate(shown)) is not None:
            self._disk_rows.ask_for(place[0], shown)

    def read_ahead(self, rows: Tensor) -> RowsAhead:
        """Read rows of tables on a disk before they are needed. Shapes: `rows` [N] int64. Raises TableStorageError."""
        assert self._disk_rows is not None, "tables in RAM need not be read ahead"
        with self._naming_disk():
            return self._disk_rows.read_ahead(rows)

    def wait_for_rows(self, asked: "Future[RowsAhead] | None") -> RowsAhead | None:
        """Rows that :meth:`read_ahead` was asked for, once they are there."""
        return None if asked is None or self._disk_rows is None else self._disk_rows.wait_for_rows(asked)

    def make_room(self, num_rows: int) -> None:
        """Have the next :meth:`write` of so many rows find room in RAM, so that no disk can fail it.

        Raises TableStorageError.
        """
        if self._disk_rows is not None:
            with self._own_writes(), self._naming_disk():
                self._disk_rows.tier.make_room(num_rows)

    def hand_over(self, rows: Tensor) -> None:
        """Rows that were read are in the scratchpad now, which will :meth:`write` them before anybody reads them here.

        What the last :meth:`drain` has brought to `parts` stays there. Shapes: `rows` [N] int64.
        """
        assert self._disk_rows is not None, "tables in RAM keep all rows"
        self._disk_rows.tier.forget(rows)

    def write(self, rows: Tensor, values: Sequence[Tensor]) -> None:
        """Copy rows in. Shapes: `rows` [N] int64, `values` [N, D] or [N]. Raises TableStorageError."""
        with self._own_writes():
            if self._disk_rows is None:
                self._keep_old(rows)
                write_rows(self.parts, rows, values)
            else:
                with self._naming_disk():
                    self._disk_rows.tier.write(rows, values)

    def drain(self) -> None:
        """Bring `parts` up to date with every :meth:`write`. Raises TableStorageError."""
        if self._disk_rows is not None:
            with self._own_writes(), self._naming_disk():
                self._disk_rows.tier.drain()

    def persist(self) -> None:
        """Wait until every write has reached the table's medium, the disk of a memory-mapped table.

        Raises TableStorageError.
        """
        self.drain()
        self._storage.persist()

    def _keep_old(self, rows: Tensor) -> None:
        # Copy on write: the old rows first.
        for snapshot in self._snapshots:
            snapshot.keep(rows)

    @contextmanager
    def _naming_disk(self) -> Iterator[None]:
        """While entered, an error of the disk is raised as one that says which tables and which directory.

        Raises TableStorageError.
        """
        try:
            yield
        except OSError as error:
            assert isinstance(self._storage, MappedStorage), "without a disk, no error of a disk"
            names = ", ".join(table.name for table in self.tables)
            raise self._storage.failure(f"tables {names}", error) from error

    @contextmanager
    def _own_writes(self) -> Iterator[None]:
        # torch counts every write to a tensor, ours too. What others wrote before must not be lost in our own count.
        with self._snapshots_changed:
            self._lose_snapshots_of_overwritten()
            self._is_overwritten = self._is_overwritten or self._versions() != self._own_versions
            try:
                yield
            finally:
                self._own_versions = self._versions()

    def _lose_snapshots_of_overwritten(self) -> None:
        # Others do not keep old rows when they write.
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


class LentMemory:
    """A piece of a table that is lent until its last alias has gone.

    Every alias of a storage keeps the whole storage alive, and the table's own tensors are aliases too. So what is lent
    has a storage of its own, over the same memory, whose end can be seen.
    """

    def __init__(self, shown: Tensor) -> None:
        num_values = 1 + sum((size - 1) * stride for size, stride in zip(shown.shape, shown.stride(), strict=True))
        buffer: Any = (ctypes.c_char * (num_values * shown.dtype.itemsize)).from_address(shown.data_ptr())
        buffer.keeps = shown
        self._buffer = weakref.ref(buffer)
        values = torch.frombuffer(buffer, dtype=shown.dtype, count=num_values)
        self._tensor: Tensor | None = values.as_strided(shown.shape, shown.stride())

    def take(self) -> Tensor:
        """The memory as a plain tensor; call it once, because nothing of it is kept here."""
        tensor, self._tensor = self._tensor, None
        assert tensor is not None, "lent memory is taken once"
        return tensor

    @property
    def is_lent(self) -> bool:
        """Whether somebody still has it."""
        return self._buffer() is not None


class LentMemories:
    """All that is lent of one table, or of several."""

    def __init__(self) -> None:
        self._memories: list[LentMemory] = []

    def add(self, memory: LentMemory) -> None:
        """Note one more."""
        self._memories = [*(other for other in self._memories if other.is_lent), memory]

    @property
    def is_any_lent(self) -> bool:
        """Whether somebody has any of it."""
        if self._memories:
            self._memories = [memory for memory in self._memories if memory.is_lent]
        return bool(self._memories)
