# SPDX-License-Identifier: BSD-3-Clause
"""Holds all rows of a pool's tables on the host: in RAM, in page-locked RAM or in memory-mapped files.

Shapes: ``R`` rows of all tables of the pool, ``D`` row width.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from torchrec_scratchpipe.errors import TableStorageError
from torchrec_scratchpipe.types import RowLayout, TableSpec

__all__ = ["HostTable", "MappedStorage", "RamStorage", "TableStorage"]


class TableStorage(Protocol):
    """Where a host table's memory comes from."""

    def allocate(self, num_values: int, dtype: torch.dtype, label: str) -> Tensor:
        """Allocate zero-filled memory.

        Args:
            num_values: Length of the flat tensor.
            dtype: Its element type.
            label: For error messages and file names, e.g. ``"weights of t_cat_0, t_cat_1"``.

        Returns:
            [num_values], contiguous, on the host.
        """


class RamStorage:
    """Anonymous memory; pages are taken from the system when they are first written.

    Args:
        pin_memory: Page-lock it, so that a CUDA device can copy from it asynchronously.
    """

    def __init__(self, pin_memory: bool = False) -> None:
        self._pin_memory = pin_memory

    def allocate(self, num_values: int, dtype: torch.dtype, label: str) -> Tensor:
        """See :class:`TableStorage`."""
        return torch.zeros(num_values, dtype=dtype, pin_memory=self._pin_memory)


class MappedStorage:
    """Files in a directory, mapped into memory, whose pages the system may write out and drop.

    The whole file is reserved up front, so that a full disk is an error here and not a crash
    while training. The file's name is removed at once: the space is returned when the table is
    freed, however the process ends, and no table of an earlier run can be mistaken for this one.

    Args:
        directory: An existing, writable directory on the disk that is to hold the tables.

    Raises:
        TableStorageError: The directory is missing or not writable.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
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
        file_descriptor, path = tempfile.mkstemp(prefix="scratchpipe_table_", dir=self._directory)
        try:
            os.posix_fallocate(file_descriptor, 0, num_bytes)
            mapped = torch.from_file(path, shared=True, size=num_values, dtype=dtype)
        except OSError as error:
            free_bytes = shutil.disk_usage(self._directory).free
            raise TableStorageError(
                f"table_dir {str(self._directory)!r} cannot hold {label}: it needs {num_bytes:,} bytes, "
                f"{free_bytes:,} are free ({error.strerror}). Free space there, or name another directory."
            ) from error
        finally:
            os.close(file_descriptor)
            os.unlink(path)
        return mapped


class HostTable:
    """Every row of a pool, weights and optimizer states, as one flat tensor per part.

    The rows of one table are contiguous, tables follow each other in the order given.

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

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows, optimizer states included."""
        return self.num_rows * self.layout.row_bytes

    def table_parts(self, table_index: int) -> list[Tensor]:
        """One table's weights, then its optimizer states; views, not copies.

        Args:
            table_index: Position in `tables`.

        Returns:
            [num_rows, D] or [num_rows], each contiguous.
        """
        first, last = self.row_offsets[table_index], self.row_offsets[table_index + 1]
        return [part[first:last] for part in self.parts]
