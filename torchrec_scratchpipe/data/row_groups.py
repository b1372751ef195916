# SPDX-License-Identifier: BSD-3-Clause
"""One piece of a row group: read, hashed, and put together for batches.

Shapes: ``R`` rows of the piece, ``D`` dense features.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from torchrec_scratchpipe.data.arrow import empty, pyarrow
from torchrec_scratchpipe.data.columns import Bags, Columns, fill_dense, to_bags, to_labels
from torchrec_scratchpipe.data.files import File
from torchrec_scratchpipe.data.row_ranges import Piece
from torchrec_scratchpipe.errors import DataError


class Rows(NamedTuple):
    """Rows as a batch wants them."""

    num_rows: int
    bags: list[Bags]  # one for each feature
    dense: npt.NDArray[np.float32]  # [R, D]
    labels: npt.NDArray[Any] | None  # [R]; None where they are not read


class RowGroups:
    """All row groups of all files, in order; reads any of them, on any thread.

    Args:
        files: In order.
        columns: What to read of them.
    """

    def __init__(self, files: Sequence[File], columns: Columns) -> None:
        self._columns = columns
        self._places = [(file, index) for file in files for index in range(file.metadata.num_row_groups)]

    def sizes(self) -> tuple[int, ...]:
        """Rows of each."""
        return tuple(file.metadata.row_group(index).num_rows for file, index in self._places)

    def only_sparse(self) -> "RowGroups":
        """The same, without labels and dense features."""
        groups = RowGroups([], self._columns.only_sparse())
        groups._places = self._places
        return groups

    def read(self, piece: Piece) -> Rows:
        """Read one piece.

        Args:
            piece: Of which row group.

        Returns:
            Its rows.

        Raises:
            DataError: It cannot be read; file, row group and column are named.
        """
        file, index = self._places[piece.row_group]
        table = self._read_table(file, index).slice(piece.first, piece.last - piece.first)
        columns, num_rows = self._columns, table.num_rows
        labels, dense = None, empty((num_rows, len(columns.dense)), np.float32)
        ids = empty((len(columns.sparse), num_rows), np.int64)
        name = ""
        try:
            if columns.label is not None:
                name = columns.label
                labels = to_labels(_array(table, name))
            for number, name in enumerate(columns.dense):
                fill_dense(dense[:, number], _array(table, name), columns.dense_transform)
            bags = []
            for out, name in zip(ids, columns.sparse, strict=True):
                rows = columns.hash_sizes.get(name)
                bags.append(to_bags(_array(table, name), rows, columns.fill_missing, out))
        except (DataError, pyarrow.ArrowException) as error:
            raise DataError(f"{file.name}, row group {index}, column {name}: {error}") from error
        return Rows(num_rows, bags, dense, labels)

    def _read_table(self, file: File, index: int) -> Any:
        names = self._columns.names()
        try:
            with file.open() as reader:
                # One thread: the readers are the threads.
                return reader.read_row_group(index, columns=names, use_threads=False)
        except (OSError, pyarrow.ArrowException) as error:
            raise self._damage(file, index, error) from error

    def _damage(self, file: File, index: int, error: Exception) -> DataError:
        """Which column it is, by reading one at a time."""
        where = f"{file.name}, row group {index}"
        try:
            with file.open() as reader:
                for name in self._columns.names():
                    where = f"{file.name}, row group {index}, column {name}"
                    reader.read_row_group(index, columns=[name], use_threads=False)
        except (OSError, pyarrow.ArrowException) as of_column:
            error = of_column
        return DataError(
            f"{where}: cannot be read ({' '.join(str(error).split())}). Is the file whole? Write or copy it again."
        )


def _array(table: Any, name: str) -> Any:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
