# SPDX-License-Identifier: BSD-3-Clause
"""Takes deltas of a model that trains, and appends them to this rank's log in the background."""

import copy
import dataclasses
import io
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.tensor import DTensor

from torchrec_scratchpipe.checkpoint.delta_files import Entry, Part, PoolSchema, Schema, SegmentWriter
from torchrec_scratchpipe.checkpoint.pieces import pieces_of
from torchrec_scratchpipe.core.changes import Changes
from torchrec_scratchpipe.core.pool import Pool
from torchrec_scratchpipe.errors import CheckpointSaveError
from torchrec_scratchpipe.sharding.collection import ScratchpadCollection
from torchrec_scratchpipe.sharding.model import scratchpad_collections
from torchrec_scratchpipe.sharding.table_view import shown

__all__ = ["DeltaLog", "TakenState", "pool_schemas", "take_state"]

logger: logging.Logger = logging.getLogger(__name__)

MAX_DIGESTS = 1024  # of records; a checkpoint wants that of its own moment
SEGMENT_BYTES = 1 << 30  # after which a rank begins another segment, so that old ones can be deleted


class TakenState(NamedTuple):
    """What is in no pool, as it was at one moment."""

    tensors: list[tuple[str, list[int], list[int], Tensor]]  # name in the flat state, offsets, size of all, piece
    values: dict[str, Any]  # what is no tensor
    beside: dict[str, Any]  # what no state_dict shows
    places: dict[str, tuple[str | int, ...]]  # by name in the flat state, pools included, the path in the nested one
    is_copied: torch.Event | None

    def to_bytes(self) -> bytes:
        """As :func:`torch.save` writes it; waits for the device."""
        if self.is_copied is not None:
            self.is_copied.synchronize()
        tensors = [(name, offsets, size, tensor.cpu()) for name, offsets, size, tensor in self.tensors]
        stream = io.BytesIO()
        content = {"tensors": tensors, "values": self.values, "beside": self.beside, "places": self.places}
        torch.save(content, stream)
        return stream.getvalue()


def take_state(state: dict[str, Any], pools: Sequence[Pool], beside: dict[str, Any], names: set[str]) -> TakenState:
    """Copy what is in no pool.

    Args:
        state: Of model and optimizer; nothing is read of tables in pools.
        pools: Of this rank.
        beside: What no state_dict shows.
        names: What another rank writes: tensors that are the same on all.

    Returns:
        Copies; those of a device are made when its event has happened.
    """
    tensors, values = [], {}
    flat, places = flatten_state_dict(state)
    for name, value in flat.items():
        pieces = pieces_of(value)
        if pieces is None:
            values[name] = value
        elif isinstance(value, ShardedTensor | DTensor) or name not in names:
            tensors += [
                (name, list(piece.offsets), list(piece.size), piece.tensor.detach().clone())
                for piece in pieces
                if _locate(pools, piece.tensor) is None
            ]
    devices = {tensor.device for *_, tensor in tensors if tensor.device.type != "cpu"}
    event = None
    for device in devices:  # one at most
        event = torch.get_device_module(device).Event()
        event.record(torch.get_device_module(device).current_stream(device))
    return TakenState(tensors, copy.deepcopy(values), copy.deepcopy(beside), dict(places), event)


def pool_schemas(state: dict[str, Any], pools: Sequence[Pool]) -> tuple[PoolSchema, ...]:
    """Which rows of which pool are which piece of the state."""
    entries: list[list[Entry]] = [[] for _ in pools]
    for name, value in flatten_state_dict(state)[0].items():
        for piece in pieces_of(value) or ():
            place = _locate(pools, piece.tensor)
            if place is not None:
                index, part, first_row = place
                num_rows = piece.tensor.shape[0]
                entries[index].append(Entry(name, part, first_row, num_rows, piece.offsets, piece.size))
    schemas = []
    for pool, some in zip(pools, entries, strict=True):
        layout, num_rows = pool.host_table.layout, pool.host_table.num_rows
        parts = tuple(
            Part(str(dtype).removeprefix("torch."), shape[1] if len(shape) == 2 else 0)
            for shape, dtype, _ in layout.part_shapes(num_rows)
        )
        schemas.append(PoolSchema(num_rows, parts, tuple(some)))
    return tuple(schemas)


def _locate(pools: Sequence[Pool], tensor: Tensor) -> tuple[int, int, int] | None:
    for index, pool in enumerate(pools):
        place = pool.host_table.locate(shown(tensor))
        if place is not None:
            return (index, *place)
    return None


class _Progress(NamedTuple):
    """How far a delta is; all are set, too, if it is given up."""

    is_read: threading.Event  # another may be taken
    is_written: threading.Event  # its file has it whole, and keeps it if this process is killed
    done: "Future[None]"  # the disk has it


class DeltaLog:
    """One rank's part of a log, from the batch after which it begins.

    Args:
        directory: Of the log; there already.
        model: Whose rows are watched from now on.
        schema: Of the first segment.

    Raises:
        OSError: The first segment cannot be written.
    """

    def __init__(self, directory: Path, model: nn.Module, schema: Schema) -> None:
        self.schema = schema
        self.model = model
        self.step = self.step_with_state = schema.since  # the last that was taken
        self.num_bytes = 0  # of whole records, in all segments
        self.digests: dict[int, str] = {}  # of the records of these batches
        self._directory = directory
        self._collections: list[ScratchpadCollection] = scratchpad_collections(model)
        self._segment = SegmentWriter(directory, schema)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scratchpipe-delta")
        self._latest: _Progress | None = None

    def wait_until_read(self) -> None:
        """Wait until the rows of the latest delta are read, well or badly: another may be taken."""
        if self._latest is not None:
            self._latest.is_read.wait()

    def wait_until_written(self) -> None:
        """Wait until the latest delta is complete in its file, or was given up; it need not be on the disk."""
        if self._latest is not None:
            self._latest.is_written.wait()

    def wait(self) -> None:
        """Wait until every delta is on the disk, or was given up."""
        if self._latest is not None:
            self._latest.done.exception()

    def take(self, step: int, state: TakenState | None) -> "Future[None]":
        """Append what has changed since the last delta; now is after this batch.

        Args:
            step: The batch.
            state: What is in no pool, where it is to be logged.

        Returns:
            Done when the record is on the disk. If it cannot be written, what has changed goes into the next one.
        """
        self.wait_until_read()
        time_s = time.time()
        for collection in self._collections:
            collection.cut_changes()
        progress = self._latest = _Progress(threading.Event(), threading.Event(), Future())
        self.step = step
        if state is not None:
            self.step_with_state = step
        self._executor.submit(self._append, step, time_s, state, progress)
        if any(collection.is_any_table_lent for collection in self._collections):
            self.wait_until_read()  # nothing could be kept of what is written unseen
        return progress.done

    def close(self) -> None:
        """Append no more."""
        self.wait()
        self._executor.shutdown()
        self._segment.close()

    def _append(self, step: int, time_s: float, state: TakenState | None, progress: "_Progress") -> None:
        try:
            self._append_record(step, time_s, state, progress)
        finally:  # nobody waits for what was given up
            progress.is_read.set()
            progress.is_written.set()

    def _append_record(self, step: int, time_s: float, state: TakenState | None, progress: "_Progress") -> None:
        # 1. Rows as they were at the moment, while training goes on. What fails here is read anew with the next delta.
        try:
            self._append_rows()
        except BaseException as error:
            self._drop()
            for collection in self._collections:
                with collection.between_batches():
                    for pool in collection.pools:
                        _changes(pool).take_back()
            self._fail(step, error, progress.done)
            return
        rows_of_pools = [(_changes(pool), _changes(pool).rows_of_interval) for pool in self._pools]
        progress.is_read.set()
        # 2. The rest, and the record's end. The next delta may have been taken.
        try:
            if state is not None:
                self._segment.add_state(state.to_bytes())
            before = self._segment.num_bytes
            self._segment.end(step, time_s, when_written=progress.is_written.set)
            self.num_bytes += self._segment.num_bytes - before
            self.digests[step] = self._segment.digest
            if len(self.digests) > MAX_DIGESTS:
                del self.digests[min(self.digests)]
        except BaseException as error:
            self._drop()
            for changes, rows in rows_of_pools:
                changes.take_in(rows)
            self._fail(step, error, progress.done)
            return
        try:
            if self._segment.num_bytes >= SEGMENT_BYTES:
                self._begin_segment()
        except OSError as error:
            logger.warning(
                "the delta log goes on in %s, because no other file can be begun (%s)", self._segment.path, error
            )
        progress.done.set_result(None)

    @property
    def _pools(self) -> list[Pool]:
        return [pool for collection in self._collections for pool in collection.pools]

    def _append_rows(self) -> None:
        pool_index = 0
        for collection in self._collections:
            for pool in collection.pools:
                for rows, values in _changes(pool).read(collection.between_batches):
                    self._segment.add_rows(pool_index, rows, values)
                pool_index += 1

    def _begin_segment(self) -> None:
        full = self._segment
        schema = dataclasses.replace(self.schema, since=full.step, follows=full.digest)
        self._segment = SegmentWriter(self._directory, schema)
        full.close()

    def _drop(self) -> None:
        try:
            self._segment.drop()
        except OSError as error:  # whoever reads the log leaves out what has no end
            logger.warning("%s: what was begun of a delta cannot be dropped (%s)", self._segment.path, error)

    def _fail(self, step: int, error: BaseException, done: "Future[None]") -> None:
        failure = CheckpointSaveError(
            f"the delta of batch {step} cannot be saved to {self._directory}: {type(error).__name__}: {error}. Free "
            "space. What it was to save goes into the next one."
        )
        failure.__cause__ = error
        logger.error("%s", failure)
        done.set_exception(failure)


def _changes(pool: Pool) -> Changes:
    assert pool.changes is not None, "nobody watches"
    return pool.changes
