# SPDX-License-Identifier: BSD-3-Clause
"""Reads checkpoints block after block: the next one while the last one is put where it belongs."""

import io
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from torchrec_scratchpipe.checkpoint.files import CHECKSUM_BYTES, FileChecksums, Window, byte_view, fill, load_plain
from torchrec_scratchpipe.checkpoint.pieces import Piece, common_box, copy_box
from torchrec_scratchpipe.errors import CheckpointMismatchError

__all__ = ["read_ahead", "read_checkpoint"]

T = TypeVar("T")
R = TypeVar("R")

MAX_BYTES_AHEAD = 80 * 1024 * 1024  # with those in use; two blocks of a checkpoint, and what is small
SMALL_BYTES = 1024 * 1024  # that may as well be copied


def read_ahead(requests: Iterable[T], read: Callable[[T, Tensor], R], size_of: Callable[[T], int]) -> Iterator[R]:
    """Read on a thread of its own, in the order asked; what is yielded is valid until the next is asked for.

    Args:
        requests: What to read.
        read: Reads one of them into a buffer of so many bytes, uint8.
        size_of: Bytes of one of them.

    Yields:
        What `read` returned.
    """
    waiting = iter(requests)
    request = next(waiting, None)
    under_way: deque[tuple[Future[R], Tensor]] = deque()
    free: list[Tensor] = []
    num_bytes = 0  # of what is under way, and of what is used
    with ThreadPoolExecutor(1, "scratchpipe-read") as executor:
        while request is not None or under_way:
            # Small ones lie between large ones: the next large one is read while this one is used.
            while request is not None and (not under_way or num_bytes + size_of(request) <= MAX_BYTES_AHEAD):
                size = size_of(request)
                buffer = _take(free, size)
                under_way.append((executor.submit(read, request, buffer[:size]), buffer))
                num_bytes += buffer.numel()
                request = next(waiting, None)
            done, buffer = under_way.popleft()
            yield done.result()
            num_bytes -= buffer.numel()
            free.append(buffer)


def _take(free: list[Tensor], size: int) -> Tensor:
    """The smallest buffer that is large enough; memory that is new costs more than to fill it."""
    fitting = [index for index, buffer in enumerate(free) if buffer.numel() >= size]
    if fitting:
        return free.pop(min(fitting, key=lambda index: free[index].numel()))
    del free[: len(free) // 2]
    return torch.empty(size, dtype=torch.uint8)


class _Block(NamedTuple):
    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    first_byte: int
    num_bytes: int


def read_checkpoint(
    directory: Path,
    metadata: Metadata,
    files: Mapping[str, FileChecksums] | None,
    targets: Mapping[str, Sequence[Piece]],
) -> dict[str, Any]:
    """Read what belongs here of a checkpoint, each block once, in the order of the files.

    Args:
        directory: Of the checkpoint.
        metadata: Of it.
        files: What its files must be; None if that is known to be so.
        targets: By name in the flat state, the pieces of each tensor that are here, and none of what is no tensor.

    Returns:
        By name, what is no tensor.

    Raises:
        CheckpointMismatchError: A file is not what was written, or a value is not plain data. What was read before has
            been written to `targets`.
    """
    blocks = sorted(_blocks(metadata, targets), key=lambda block: (block.file, block.first_byte))
    values: dict[str, Any] = {}
    with ExitStack() as stack:
        opened: dict[str, _File] = {}

        def read(block: _Block, buffer: Tensor) -> tuple[_Block, Tensor, list[_Read]]:
            if block.file not in opened:
                checksums = None if files is None else files[block.file]
                opened[block.file] = stack.enter_context(_File(directory / block.file, checksums))
            return block, buffer, opened[block.file].read(block.first_byte, byte_view(buffer))

        # Checksums are computed here, and not where it is read: so neither waits for the other.
        for block, buffer, pieces in read_ahead(blocks, read, lambda block: block.num_bytes):
            opened[block.file].compare(pieces)
            if isinstance(metadata.state_dict_metadata[block.name], TensorStorageMetadata):
                piece = Piece(_tensor_in(buffer, block.name), block.offsets, block.sizes)
                for target in targets[block.name]:
                    copy_box(piece, target)
            else:
                values[block.name] = load_plain(io.BytesIO(byte_view(buffer)), block.name)
        for file in opened.values():
            file.compare(file.finish())
    return values


def _blocks(metadata: Metadata, targets: Mapping[str, Sequence[Piece]]) -> Iterator[_Block]:
    for index, place in (metadata.storage_data or {}).items():
        if index.fqn not in targets:
            continue
        stored = metadata.state_dict_metadata[index.fqn]
        where = (place.relative_path, place.offset, place.length)
        if not isinstance(stored, TensorStorageMetadata):
            yield _Block(index.fqn, (), (), *where)
            continue
        offsets = tuple(index.offset or (0,) * len(stored.size))
        sizes = next(tuple(chunk.sizes) for chunk in stored.chunks if tuple(chunk.offsets) == offsets)
        boxes = [common_box(offsets, sizes, piece.offsets, piece.tensor.shape) for piece in targets[index.fqn]]
        if any(box is not None for box in boxes):
            yield _Block(index.fqn, offsets, sizes, *where)


class _Read(NamedTuple):
    first_byte: int
    data: memoryview


class _File:
    """A file that is read from its beginning to its end, and whose checksums are compared on the way."""

    def __init__(self, path: Path, checksums: FileChecksums | None) -> None:
        self._path = path
        self._checksums = checksums
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointMismatchError(f"{path}: cannot be read ({error.strerror}). Load another step.") from error
        self._at = 0  # what is read next
        self._crc32 = 0  # of the piece that has one checksum, as far as it was compared
        if checksums is not None and os.fstat(self._file.fileno()).st_size != checksums.num_bytes:
            raise self._error(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, first_byte: int, out: memoryview) -> list[_Read]:
        """Read on, further on than before; returns all that was read, for :meth:`compare`."""
        pieces: list[_Read] = []
        begin = first_byte
        if self._checksums is not None and first_byte != self._at:
            begin = first_byte // CHECKSUM_BYTES * CHECKSUM_BYTES
            if begin > self._at:
                pieces += self.finish()
            begin = max(begin, self._at)
        if begin != self._at:
            self._file.seek(begin)
            self._at = begin
        pieces += self._skip(first_byte - begin)
        return [*pieces, self._read(out)]

    def finish(self) -> list[_Read]:
        """Read on to the end of the piece that has one checksum."""
        if self._checksums is None or self._at % CHECKSUM_BYTES == 0:
            return []
        end = min(self._checksums.num_bytes, -(-self._at // CHECKSUM_BYTES) * CHECKSUM_BYTES)
        return self._skip(end - self._at)

    def compare(self, pieces: Sequence[_Read]) -> None:
        """Compare checksums of what was read, in the order in which it was. Raises CheckpointMismatchError."""
        if self._checksums is None:
            return
        for first_byte, whole in pieces:
            at, data = first_byte, whole
            while data:
                if at % CHECKSUM_BYTES == 0:
                    self._crc32 = 0
                piece = data[: CHECKSUM_BYTES - at % CHECKSUM_BYTES]
                self._crc32 = zlib.crc32(piece, self._crc32)
                at, data = at + len(piece), data[len(piece) :]
                is_end = at % CHECKSUM_BYTES == 0 or at == self._checksums.num_bytes
                if is_end and self._crc32 != self._checksums.crc32[(at - 1) // CHECKSUM_BYTES]:
                    raise self._error(at)

    def _skip(self, num_bytes: int) -> list[_Read]:
        return [self._read(memoryview(bytearray(num_bytes)))] if num_bytes else []

    def _read(self, out: memoryview) -> _Read:
        first_byte, done = self._at, fill(self._file, out)
        self._at += done
        if done < len(out):
            raise self._error(self._at)
        if self._checksums is not None:  # nobody reads it a second time, and tables need the memory
            os.posix_fadvise(self._file.fileno(), first_byte, done, os.POSIX_FADV_DONTNEED)
        return _Read(first_byte, out)

    def _error(self, before: int) -> CheckpointMismatchError:
        return CheckpointMismatchError(
            f"{self._path}: is not what was written, before byte {before:,}. Some of it was loaded: load another "
            "step before you train."
        )


def _tensor_in(buffer: Tensor, name: str) -> Tensor:
    """What torch.save has written; where it can be, in the memory of the buffer, which takes no time."""
    file = io.BytesIO(byte_view(buffer)) if buffer.numel() < SMALL_BYTES else _BufferFile(byte_view(buffer))
    shape = torch.load(file, map_location="meta", weights_only=True)  # type: ignore[arg-type]
    offset = getattr(shape.untyped_storage(), "_checkpoint_offset", None)
    if offset is None or offset % shape.itemsize or not shape.is_contiguous() or shape.storage_offset():
        loaded = load_plain(io.BytesIO(byte_view(buffer)), name)
        assert isinstance(loaded, Tensor), name
        return loaded
    num_bytes = shape.numel() * shape.itemsize
    return buffer[offset : offset + num_bytes].view(shape.dtype).view(shape.shape)


class _BufferFile(Window):
    """A buffer, which nobody copies."""

    def __init__(self, data: memoryview) -> None:
        super().__init__(len(data))
        self._data = data

    def readinto(self, out: Any) -> int:
        data = self._data[self._at : self._at + len(out)]
        out[: len(data)] = data
        self._at += len(data)
        return len(data)
