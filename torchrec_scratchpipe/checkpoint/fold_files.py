# SPDX-License-Identifier: BSD-3-Clause
"""Writes the files of a checkpoint that takes in deltas, block by block, from files alone."""

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from torchrec_scratchpipe.checkpoint import files
from torchrec_scratchpipe.checkpoint.delta_chain import DeltaSet, RankRecord
from torchrec_scratchpipe.checkpoint.delta_files import open_part
from torchrec_scratchpipe.checkpoint.delta_load import (
    LoggedState,
    RowBlocks,
    RowWriter,
    check_fit,
    first_of_each,
    logged_names,
    read_state,
    row_blocks_of,
    states_between,
    write_state,
)
from torchrec_scratchpipe.checkpoint.files import ChecksummedWriter, Manifest, load_plain, row_blocks, write_durably
from torchrec_scratchpipe.checkpoint.pieces import Piece
from torchrec_scratchpipe.errors import CheckpointMismatchError

__all__ = ["Fold", "write_fold"]


def write_fold(temporary: Path, fold: "Fold") -> Manifest:
    """Write all but the manifest: as many files as the run that logged had ranks, and what each had in no pool.

    Args:
        temporary: An empty directory.
        fold: What is written.

    Returns:
        What was written.

    Raises:
        CheckpointMismatchError: The deltas have something else than the checkpoint.
        OSError: The disk is full.
    """
    world_size = len(fold.last.ranks)
    writer = ChecksummedWriter(temporary)
    planner = _FoldPlanner(fold)
    items: list[list[WriteItem]] = [[] for _ in range(world_size)]
    # 1. What is in no pool: of the last set alone. What no state_dict shows, by rank.
    states = []
    for rank, record in enumerate(fold.last.newest):
        state = read_state(record)
        stream = io.BytesIO()
        torch.save(state.beside, stream)
        name = f"extra_{rank}.pt"
        writer.files[name] = write_durably(temporary / name, stream.getvalue())
        states.append(_without_data(state))
        del state
    logged = first_of_each(states)
    items[0] += [planner.add_value(name, value) for name, value in logged.values.items()]
    # 2. Blocks of tables, as they lie in the old files: rows ascending, and all parts of a row together.
    whole = _whole_tensors(logged)
    for number, (index, chunk) in fold.table_blocks(logged, whole):
        items[number % world_size].append(planner.add_block(index, chunk))
    # 3. Tensors of one rank after another, so that only those are in memory.
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for rank, state in enumerate(states):
        for key, piece in state.tensors.items():
            if key[0] in whole and key not in seen:
                items[rank] += planner.add_tensor(rank, key, piece)
        seen |= state.tensors.keys()
    plans, metadata = planner.create_global_plan([SavePlan(some, planner_data=logged.places) for some in items])
    writer.set_up_storage_writer(True)
    plans = writer.prepare_global_plan(plans)
    writer.finish(metadata, [writer.write_data(plan, planner).wait() for plan in plans])
    return Manifest(fold.last.step, world_size, writer.files, fold.last.run, fold.last.digest)


def _without_data(state: LoggedState) -> LoggedState:
    tensors = {key: piece._replace(tensor=piece.tensor.to("meta")) for key, piece in state.tensors.items()}
    return state._replace(tensors=tensors, beside={})


def _whole_tensors(state: LoggedState) -> set[str]:
    """Names of tensors of which a state has all."""
    left: dict[str, int] = {}
    for (name, _), piece in state.tensors.items():
        left[name] = left.get(name, torch.Size(piece.size).numel()) - piece.tensor.numel()
    return {name for name, count in left.items() if count == 0}


class _Change(NamedTuple):
    """Brings a block up to date: rows of a record, or tensors that a run had in no pool and a later one has in one."""

    record: RankRecord | None
    blocks: RowBlocks
    state: LoggedState | None


class Fold:
    """A checkpoint, and the sets that lead on from it.

    Args:
        path: Of the checkpoint, whose files are whole.
        metadata: Of the checkpoint.
        sets: At least one, whose records are whole; the last has a state.
    """

    def __init__(self, path: Path, metadata: Metadata, sets: Sequence[DeltaSet]) -> None:
        self.last = sets[-1]
        self._path = path
        self._metadata = metadata
        self._sets = sets
        self._changes: list[_Change] = []

    def table_blocks(
        self, logged: LoggedState, whole: set[str]
    ) -> list[tuple[int, tuple[MetadataIndex, TensorWriteData]]]:
        """All blocks of the checkpoint that deltas have changes of, with the number of the file that has each.

        Raises CheckpointMismatchError.
        """
        names = logged_names(self._sets)
        parts = {name for (name, _), piece in logged.tensors.items() if piece.tensor.numel() or name not in names}
        unknown = sorted((parts | (names - self._metadata.state_dict_metadata.keys())) - whole)
        if unknown:
            raise CheckpointMismatchError(
                f"{self._path}: {unknown[0]} is in the delta log, and not all of it is there or here. Load an earlier "
                "step."
            )
        self._note_changes()
        found, pieces = [], {}
        for name in sorted(names - whole):
            saved = self._metadata.state_dict_metadata[name]
            assert isinstance(saved, TensorStorageMetadata), name
            meta = torch.empty(saved.size, dtype=saved.properties.dtype, device="meta")
            pieces[name] = [Piece(meta, (0,) * len(saved.size), tuple(saved.size))]
            for chunk in saved.chunks:
                if chunk.sizes.numel() or not saved.size.numel():
                    index = MetadataIndex(name, chunk.offsets)
                    place = self._metadata.storage_data[index]
                    data = TensorWriteData(chunk, saved.properties, saved.size)
                    found.append((place.relative_path, place.offset, (index, data)))
        check_fit(self._sets, logged, pieces)
        names_of_files = sorted({name for name, *_ in found})
        found.sort(key=lambda one: one[:2])
        return [(names_of_files.index(name), block) for name, _, block in found]

    def read_block(self, index: MetadataIndex, data: TensorWriteData) -> Tensor:
        """A block of the checkpoint, as it is after the last set."""
        place: _StorageInfo = self._metadata.storage_data[index]
        with (self._path / place.relative_path).open("rb", buffering=0) as file:
            tensor = load_plain(open_part(file, place.offset, place.length), index.fqn)
        if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype) != (data.chunk.sizes, data.properties.dtype):
            raise CheckpointMismatchError(f"{self._path}: {index.fqn} is not what its metadata say. Load another step.")
        targets = {index.fqn: [Piece(tensor, tuple(data.chunk.offsets), tuple(data.size))]}
        writer = RowWriter(targets)
        for record, blocks, state in self._changes:
            if record is not None:
                writer.write_from(record, blocks)
            if state is not None:
                write_state(state, targets)
        return tensor

    def _note_changes(self) -> None:
        between = states_between(self._sets)
        for number, delta_set in enumerate(self._sets):
            self._changes += [_Change(record, row_blocks_of(record), None) for record in delta_set.records]
            self._changes += [_Change(None, {}, state) for state in between.get(number, ())]


class _FoldPlanner(DefaultSavePlanner):
    """Reads what it is to write when it is its turn."""

    def __init__(self, fold: Fold) -> None:
        super().__init__()
        self._fold = fold
        self._read: dict[MetadataIndex, Callable[[], Tensor | io.BytesIO]] = {}
        self._state: tuple[int, LoggedState] | None = None  # of the rank whose tensors are being written

    def add_value(self, name: str, value: Any) -> WriteItem:
        """What is no tensor."""
        index = MetadataIndex(name)
        self._read[index] = partial(_saved, value)
        return WriteItem(index, WriteItemType.BYTE_IO)

    def add_block(self, index: MetadataIndex, data: TensorWriteData) -> WriteItem:
        """A block of a table."""
        self._read[index] = partial(self._fold.read_block, index, data)
        return WriteItem(index, WriteItemType.SHARD, tensor_data=data)

    def add_tensor(self, rank: int, key: tuple[str, tuple[int, ...]], piece: Piece) -> list[WriteItem]:
        """A piece of a tensor that is in no pool."""
        (name, offsets), shape = key, piece.tensor.shape
        row_bytes = max(1, piece.tensor.nbytes // max(1, shape[0] if shape else 1))
        items = []
        piece_chunk = ChunkStorageMetadata(torch.Size(offsets), shape)
        for first, chunk in row_blocks(piece_chunk, max(1, files.BLOCK_BYTES // row_bytes)):
            index = MetadataIndex(name, chunk.offsets)
            self._read[index] = partial(self._rows_of_state, rank, key, first, chunk.sizes)
            properties = TensorProperties.create_from_tensor(torch.empty(0, dtype=piece.tensor.dtype))
            data = TensorWriteData(chunk, properties, torch.Size(piece.size))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return items

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The data of one block."""
        return self._read[write_item.index]()

    def _rows_of_state(self, rank: int, key: tuple[str, tuple[int, ...]], first: int, sizes: torch.Size) -> Tensor:
        if self._state is None or self._state[0] != rank:
            self._state = None  # before the next one is read
            self._state = (rank, read_state(self._fold.last.newest[rank]))
        tensor = self._state[1].tensors[key].tensor
        return tensor.narrow(0, first, sizes[0]) if sizes else tensor


def _saved(value: Any) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream
