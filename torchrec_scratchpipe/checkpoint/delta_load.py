# SPDX-License-Identifier: BSD-3-Clause
"""Brings tensors up to date with delta sets, whatever ranks and sharding wrote them, and whatever have them now.

Shapes: ``N`` rows.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchrec_scratchpipe.checkpoint.delta_chain import DeltaSet, RankRecord
from torchrec_scratchpipe.checkpoint.delta_files import Block, Entry, Part, PoolSchema, Rows
from torchrec_scratchpipe.checkpoint.files import load_plain
from torchrec_scratchpipe.checkpoint.pieces import Piece, common_box, copy_box
from torchrec_scratchpipe.checkpoint.reads import read_ahead
from torchrec_scratchpipe.core.rows import write_rows
from torchrec_scratchpipe.errors import CheckpointMismatchError

__all__ = [
    "LoggedState",
    "RowBlocks",
    "RowWriter",
    "check_fit",
    "first_of_each",
    "logged_names",
    "read_state",
    "row_blocks_of",
    "states_between",
    "write_state",
]


class LoggedState(NamedTuple):
    """What is in no pool, of one rank at one moment."""

    tensors: dict[tuple[str, tuple[int, ...]], Piece]  # by name in the flat state and offsets
    values: dict[str, Any]
    beside: dict[str, Any]
    places: dict[str, tuple[str | int, ...]]  # of each name in the nested state

    @property
    def names(self) -> set[str]:
        """In the flat state."""
        return {name for name, _ in self.tensors} | self.values.keys()


def read_state(of_rank: RankRecord) -> LoggedState:
    """Read what :func:`take_state` has taken. Raises CheckpointMismatchError."""
    file = of_rank.reader.state(of_rank.record)
    content = load_plain(file, f"{of_rank.reader.path}, batch {of_rank.record.step}")
    pieces = [(name, Piece(tensor, tuple(offsets), tuple(size))) for name, offsets, size, tensor in content["tensors"]]
    tensors = {(name, piece.offsets): piece for name, piece in pieces}
    return LoggedState(tensors, content["values"], content["beside"], content["places"])


def states_between(sets: Sequence[DeltaSet]) -> dict[int, list[LoggedState]]:
    """Tensors that a run had in no pool, as they were at its end, where another run logs their rows.

    Args:
        sets: Ascending, of one run or several.

    Returns:
        By the number of the set after which they are to be written; mostly none.

    Raises:
        CheckpointMismatchError: A record is damaged.
    """
    names = logged_names(sets)
    found: dict[int, list[LoggedState]] = {}
    for number, (before, after) in enumerate(itertools.pairwise(sets)):
        if before.run != after.run:
            for state in [read_state(record) for record in before.newest] if before.has_state else []:
                tensors = {key: piece for key, piece in state.tensors.items() if key[0] in names}
                if tensors:
                    found.setdefault(number, []).append(LoggedState(tensors, {}, {}, {}))
    return found


def check_fit(sets: Sequence[DeltaSet], state: LoggedState | None, pieces: Mapping[str, Sequence[Piece]]) -> None:
    """Make sure that what is logged fits. Raises CheckpointMismatchError.

    Args:
        sets: To be written.
        state: To be written, of all ranks.
        pieces: By name in the flat state, the pieces of each tensor that are here.
    """
    logged = {
        (entry.name, entry.size, pool.parts[entry.part].dtype)
        for delta_set in sets
        for record in delta_set.records
        for pool in record.segment.schema.pools
        for entry in pool.entries
    }
    if state is not None:
        logged |= {(name, piece.size, _dtype_of(piece)) for (name, _), piece in state.tensors.items()}
    for name, size, dtype in sorted(logged):
        for piece in pieces.get(name, ()):
            if (piece.size, _dtype_of(piece)) != (size, dtype):
                raise CheckpointMismatchError(
                    f"{name} is {piece.size} {_dtype_of(piece)} here and {size} {dtype} in the delta log. Build the "
                    "model with the same tables and optimizers."
                )


def _dtype_of(piece: Piece) -> str:
    return str(piece.tensor.dtype).removeprefix("torch.")


def logged_names(sets: Iterable[DeltaSet]) -> set[str]:
    """Tensors of the state whose rows are logged."""
    schemas = {record.segment.schema for delta_set in sets for record in delta_set.records}
    return {entry.name for schema in schemas for pool in schema.pools for entry in pool.entries}


class _Copy(NamedTuple):
    """Rows of a pool that belong to one piece of a target."""

    part: int
    first_row: int  # in the pool
    last_row: int
    shift: int  # from a row of the pool to one of the target
    source_columns: slice | None
    target: Tensor  # [rows, D] or [rows]

    def write(self, ids: Tensor, values: Tensor) -> None:
        """Shapes: `ids` [N], of the pool, `values` [N, D] or [N]."""
        rows = ids.long() + self.shift
        if self.source_columns is not None:
            values = values[:, self.source_columns]
        if self.source_columns is None and _is_plain(self.target):
            write_rows([self.target], rows, [values])
        else:
            self.target.index_copy_(0, rows, values)


class PoolBlocks(NamedTuple):
    """Blocks of rows of one pool in a record, and the rows between which they lie."""

    firsts: "npt.NDArray[np.int64]"  # [blocks]
    lasts: "npt.NDArray[np.int64]"  # [blocks]
    blocks: list[Block]


RowBlocks = dict[int, PoolBlocks]  # by pool


def row_blocks_of(record: RankRecord) -> RowBlocks:
    """Where the rows of a record are. Raises CheckpointMismatchError."""
    of_pools: dict[int, list[Block]] = {}
    for block in record.record.row_blocks:
        if block.num_rows:
            of_pools.setdefault(block.pool, []).append(block)
    found = {}
    for pool, blocks in of_pools.items():
        bounds = np.array([record.reader.bounds(block) for block in blocks], dtype=np.int64)
        found[pool] = PoolBlocks(bounds[:, 0], bounds[:, 1], blocks)
    return found


class RowWriter:
    """Writes logged rows to where they belong.

    Args:
        targets: By name in the flat state, the pieces of each tensor that are here. Other rows are left out, unread.
        is_checked: Whether all bytes are known to be what was written; else checksums are compared.
    """

    def __init__(self, targets: Mapping[str, Sequence[Piece]], *, is_checked: bool = False) -> None:
        self._targets = targets
        self._is_checked = is_checked
        self._copies: dict[PoolSchema, list[_Copy]] = {}

    def write_from(self, record: RankRecord, blocks: "RowBlocks") -> None:
        """Write all rows of a record that belong here, and read no others; they were checked before."""
        for number, (firsts, lasts, of_pool) in blocks.items():
            for copy in self._copies_of(record.segment.schema.pools[number]):
                (found,) = np.nonzero((firsts < copy.last_row) & (lasts >= copy.first_row))
                for index in found.tolist():
                    ids, values = record.reader.rows_between(of_pool[index], copy.part, copy.first_row, copy.last_row)
                    if ids.numel():
                        copy.write(ids, values)

    def write(self, records: Iterable[RankRecord]) -> int:
        """Write all rows of records that belong here, in their order, and say how many.

        Raises CheckpointMismatchError.
        """
        requests = (
            (of_rank, block)
            for of_rank in records
            for block in of_rank.record.row_blocks
            if self._copies_of(of_rank.segment.schema.pools[block.pool])
        )

        def read(request: tuple[RankRecord, Block], buffer: Tensor) -> tuple[RankRecord, Block, Tensor]:
            of_rank, block = request
            return of_rank, block, of_rank.reader.read_payload(block, buffer)

        num_rows = 0
        for of_rank, block, payload in read_ahead(requests, read, lambda request: request[1].num_bytes):
            rows = of_rank.reader.rows_in(block, payload, is_checked=self._is_checked)
            num_rows += self._write_block(rows, self._copies_of(of_rank.segment.schema.pools[block.pool]))
        return num_rows

    def _write_block(self, block: Rows, copies: list[_Copy]) -> int:
        ids, values = block
        bounds = torch.tensor([(copy.first_row, copy.last_row) for copy in copies], dtype=ids.dtype)
        places = torch.searchsorted(ids, bounds).tolist()
        num_rows = 0
        for copy, (first, last) in zip(copies, places, strict=True):
            if first == last:
                continue
            copy.write(ids[first:last], values[copy.part][first:last])
            num_rows += last - first
        return num_rows

    def _copies_of(self, pool: PoolSchema) -> list[_Copy]:
        if pool not in self._copies:
            found = [
                _overlap(entry, pool.parts[entry.part], piece)
                for entry in pool.entries
                for piece in self._targets.get(entry.name, ())
            ]
            self._copies[pool] = [copy for copy in found if copy is not None]
        return self._copies[pool]


def _is_plain(target: Tensor) -> bool:
    """Whether :func:`write_rows` can write it, eight bytes at a time."""
    return target.is_contiguous() and target.storage_offset() * target.dtype.itemsize % 8 == 0


def _overlap(entry: Entry, part: Part, piece: Piece) -> _Copy | None:
    """What is logged of a tensor and is here, too."""
    box = common_box(
        entry.offsets, (entry.num_rows, part.num_columns)[: len(entry.offsets)], piece.offsets, piece.tensor.shape
    )
    if box is None:
        return None
    (first, last), *columns = box
    target, source_columns = piece.tensor, None
    if columns:
        begin, end = columns[0]
        target = target[:, begin - piece.offsets[1] : end - piece.offsets[1]]
        if end - begin < part.num_columns:
            source_columns = slice(begin - entry.offsets[1], end - entry.offsets[1])
    to_pool = entry.first_row - entry.offsets[0]  # from a row of the tensor
    return _Copy(entry.part, first + to_pool, last + to_pool, -to_pool - piece.offsets[0], source_columns, target)


def first_of_each(states: Sequence[LoggedState]) -> LoggedState:
    """What all ranks together have; of what several have, that of the first."""
    tensors: dict[tuple[str, tuple[int, ...]], Piece] = {}
    values: dict[str, Any] = {}
    places: dict[str, tuple[str | int, ...]] = {}
    for state in reversed(states):
        tensors |= state.tensors
        values |= state.values
        places |= state.places
    return LoggedState(tensors, values, states[0].beside, places)


def write_state(state: LoggedState, targets: Mapping[str, Sequence[Piece]]) -> None:
    """Write tensors that are in no pool.

    Args:
        state: Of all ranks.
        targets: By name in the flat state, the pieces of each tensor that are here.
    """
    for (name, _), piece in state.tensors.items():
        for target in targets.get(name, ()):
            copy_box(piece, target)
