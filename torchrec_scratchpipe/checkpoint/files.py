# SPDX-License-Identifier: BSD-3-Clause
"""Files of torch.distributed.checkpoint: written row block by row block, checksummed, and read without running code.

What is written can be read by stock `torch.distributed.checkpoint.load`, and the other way round.
"""

import dataclasses
import io
import json
import os
import pickle
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from torchrec_scratchpipe.checkpoint.appending import AppendedFile
from torchrec_scratchpipe.errors import CheckpointMismatchError

__all__ = [
    "ChecksummedWriter",
    "FileChecksums",
    "Manifest",
    "RowBlockSavePlanner",
    "SafeLoadPlanner",
    "SafeReader",
    "Window",
    "base_path",
    "base_steps",
    "byte_view",
    "check_values",
    "checksums_of",
    "complete",
    "fill",
    "load_plain",
    "row_blocks",
    "sync_directory",
    "write_durably",
]

METADATA_FILE = ".metadata"
MANIFEST_FILE = "scratchpipe.json"
FORMAT_VERSION = 1
BLOCK_BYTES = 32 * 1024 * 1024  # of rows, states included, that are copied at a time; some copies exist at once
NUM_BUFFERS = 4  # blocks of different shapes whose memory is kept for the next one
READ_BYTES = 4 * 1024 * 1024  # at a time: the system reads ahead of that
CHECKSUM_BYTES = 4 * 1024 * 1024  # of a file that one checksum is for


def base_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return directory / f"step_{step:012d}"


def base_steps(directory: Path) -> list[int]:
    """Steps of all complete checkpoints, ascending."""
    names = [path.name for path in directory.glob("step_*") if (path / MANIFEST_FILE).is_file()]
    steps = sorted(int(name[5:]) for name in names if re.fullmatch(r"step_[0-9]{12,}", name))
    return [step for step in steps if base_path(directory, step).name in names]


class FileChecksums(NamedTuple):
    """What a file must be."""

    num_bytes: int
    crc32: list[int]  # of each CHECKSUM_BYTES


class Manifest(NamedTuple):
    """What a checkpoint consists of, beside the files that torch.distributed.checkpoint knows about."""

    step: int
    world_size: int
    files: dict[str, FileChecksums]
    run: str = ""  # that logs deltas, if it does
    digest: str = ""  # of the delta set of this step, if there is one
    is_noise_pending: bool = False  # rows of a private model have not got all their noise

    def to_json(self) -> str:
        """With a checksum of itself."""
        body: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "step": self.step,
            "world_size": self.world_size,
            "files": {name: file._asdict() for name, file in sorted(self.files.items())},
        }
        if self.run:
            body |= {"run": self.run, "digest": self.digest}
        if self.is_noise_pending:
            body["is_noise_pending"] = True
        return json.dumps({"crc32": _crc32_of_json(body), "checkpoint": body}, indent=1)

    @classmethod
    def read_base(cls, directory: Path, step: int) -> "Manifest":
        """Of the checkpoint of a step. Raises CheckpointMismatchError."""
        path = base_path(directory, step)
        if not path.is_dir():
            raise CheckpointMismatchError(
                f"{path} does not exist. Steps that were saved: {', '.join(map(str, base_steps(directory))) or 'none'}."
            )
        manifest = cls.read(path)
        if manifest.step != step:
            raise CheckpointMismatchError(f"{path} holds step {manifest.step}. It was renamed; give it its name back.")
        return manifest

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """From the directory of a checkpoint. Raises CheckpointMismatchError."""
        path = directory / MANIFEST_FILE
        try:
            whole = json.loads(path.read_text(encoding="utf-8"))
            body = whole["checkpoint"]
            if whole["crc32"] != _crc32_of_json(body):
                raise ValueError("its checksum differs")
            if body["format"] != FORMAT_VERSION:
                raise ValueError(f"its format is {body['format']}, this version reads {FORMAT_VERSION}")
            files = {name: FileChecksums(**file) for name, file in body["files"].items()}
            return cls(
                int(body["step"]),
                int(body["world_size"]),
                files,
                body.get("run", ""),
                body.get("digest", ""),
                body.get("is_noise_pending", False),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointMismatchError(
                f"{path}: cannot be read ({error}). Load another step, or read the tables with "
                "torch.distributed.checkpoint, which does without this file and without checksums."
            ) from error


class RowBlockSavePlanner(DefaultSavePlanner):
    """Saves large tensors in blocks of rows, so that no more than a few blocks are copied at once.

    Blocks of tables and of their optimizer states take turns, rows ascending.
    """

    def __init__(
        self,
        locate: Callable[[Tensor], tuple[int, int, int] | None],
        read: Callable[[int, int, int, Tensor], None],
        row_bytes: Sequence[int],
    ) -> None:
        super().__init__()
        # `locate` finds the pool, part and first row that a tensor shows, if it is a view of a host table. `read`
        # copies some of its rows.
        self._locate = locate
        self._read = read
        self._row_bytes = row_bytes
        self._blocks: dict[MetadataIndex, _Block] = {}
        self._detached: dict[MetadataIndex, Any] = {}
        self._buffers: dict[tuple[torch.Size, torch.dtype], Tensor] = {}  # memory that is new costs more than the copy

    def detach(self, state_dict: dict[str, Any]) -> None:
        """Copy everything that is no view of a host table; what is saved later is as it is now."""
        self.set_up_planner(state_dict, None, False)
        for item in self.create_local_plan().items:
            if item.type == WriteItemType.BYTE_IO or self._blocks[item.index].place is None:
                data = self.resolve_data(item)
                self._detached[item.index] = data.clone() if isinstance(data, Tensor) else data

    def create_local_plan(self) -> SavePlan:
        """As stock, cut into blocks of rows."""
        plan = super().create_local_plan()
        self._blocks = {}
        blocks = [block for item in plan.items for block in self._cut(item)]
        self.plan = dataclasses.replace(plan, items=sorted(blocks, key=self._order))
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        """The data of one block, valid until the next call."""
        # 1. What was copied when the state was taken.
        if write_item.index in self._detached:
            data = self._detached[write_item.index]
            return io.BytesIO(data.getvalue()) if isinstance(data, io.BytesIO) else data
        # 2. Values that are no tensors. Better to fail now than when somebody loads them.
        block = self._blocks.get(write_item.index)
        if block is None:
            data = cast(io.BytesIO, super().resolve_data(write_item))
            load_plain(io.BytesIO(data.getvalue()), write_item.index.fqn)
            return data
        # 3. Rows of a host table, as they were when the state was taken.
        if block.place is not None:
            pool, part, first_row = block.place
            assert write_item.tensor_data is not None
            key = (write_item.tensor_data.chunk.sizes, write_item.tensor_data.properties.dtype)
            if key not in self._buffers:
                if len(self._buffers) == NUM_BUFFERS:
                    self._buffers.clear()
                self._buffers[key] = torch.empty(key[0], dtype=key[1])
            self._read(pool, part, first_row, self._buffers[key])
            return self._buffers[key]
        # 4. Any other tensor.
        tensor = self.lookup_object(block.shard).detach()
        return (tensor.narrow(0, block.first_row, block.num_rows) if tensor.dim() else tensor).cpu()

    def _cut(self, item: WriteItem) -> list[WriteItem]:
        if item.type == WriteItemType.BYTE_IO or item.tensor_data is None:
            return [item]
        tensor = self.lookup_object(item.index)
        chunk = item.tensor_data.chunk
        place = self._locate(tensor)
        num_rows = tensor.shape[0] if tensor.dim() else 1
        row_bytes = max(1, tensor.nbytes // max(1, num_rows)) if place is None else self._row_bytes[place[0]]
        rows_per_block = max(1, BLOCK_BYTES // row_bytes)
        items = []
        for first, block in row_blocks(chunk, rows_per_block):
            index = dataclasses.replace(item.index, offset=block.offsets)
            block_place = None if place is None else (place[0], place[1], place[2] + first)
            self._blocks[index] = _Block(item.index, first, block.sizes[0] if block.sizes else 1, block_place)
            data = dataclasses.replace(item.tensor_data, chunk=block)
            items.append(dataclasses.replace(item, index=index, tensor_data=data))
        return items

    def _order(self, item: WriteItem) -> tuple[int, int, int]:
        block = self._blocks.get(item.index)
        if block is None or block.place is None:
            return (-1, 0, 0)
        # Rows ascending, and all parts of them together: a snapshot need not keep rows that all parts have read.
        pool, part, first_row = block.place
        return (pool, first_row, part)


class _Block(NamedTuple):
    shard: MetadataIndex
    first_row: int  # in the shard
    num_rows: int
    place: tuple[int, int, int] | None  # pool, part, row, if it lies in a host table


def row_blocks(chunk: ChunkStorageMetadata, rows_per_block: int) -> Iterator[tuple[int, ChunkStorageMetadata]]:
    """Cut a piece of a tensor into blocks of rows: the first row of each in the piece, and where it is."""
    if not chunk.sizes:
        yield 0, chunk
        return
    num_rows = chunk.sizes[0]
    for first in range(0, max(1, num_rows), rows_per_block):
        offsets = torch.Size([chunk.offsets[0] + first, *chunk.offsets[1:]])
        yield (
            first,
            ChunkStorageMetadata(offsets, torch.Size([min(rows_per_block, num_rows - first), *chunk.sizes[1:]])),
        )


class ChecksummedWriter(FileSystemWriter):
    """One file per rank, with a checksum of every few megabytes; holds one block at a time."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.files: dict[str, FileChecksums] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """See stock's, which keeps the last block of each tensor."""
        name = f"{cast(Any, plan.storage_data).prefix}0.distcp"
        results = []
        with _without_checksums_of_torch(), AppendedFile(Path(self.path) / name) as file:
            stream = _ChecksummedFile(file)
            for item in plan.items:
                first = stream.tell()
                data = planner.resolve_data(item)
                if isinstance(data, io.BytesIO):
                    stream.write(data.getbuffer())
                else:
                    if data.untyped_storage().nbytes() != data.nbytes:  # torch.save writes the whole storage
                        data = data.clone()
                    torch.save(data, cast(IO[bytes], stream))
                del data
                length = stream.tell() - first
                results.append(WriteResult(item.index, length, _StorageInfo(name, first, length)))
            file.finish()  # on the disk before anybody calls it complete
        self.files[name] = stream.checksums()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


class _ChecksumsOfTorch:
    """A setting of torch's for the whole process, which writers on several threads want otherwise."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_without = 0
        self.was_on = True


_checksums_of_torch = _ChecksumsOfTorch()


@contextmanager
def _without_checksums_of_torch() -> Iterator[None]:
    """torch.save computes checksums that torch.load does not look at, at the speed of ours."""
    setting = _checksums_of_torch
    with setting.lock:
        if setting.num_without == 0:
            setting.was_on = get_crc32_options()
            set_crc32_options(False)
        setting.num_without += 1
    try:
        yield
    finally:
        with setting.lock:
            setting.num_without -= 1
            if setting.num_without == 0:  # the first to begin may be the first to end
                set_crc32_options(setting.was_on)


class SafeReader(FileSystemReader):
    """Reads what any FileSystemWriter wrote; of what a pickle may name, only what such metadata consist of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """See stock's, which runs whatever code the file names. Raises CheckpointMismatchError."""
        path = Path(self.path) / METADATA_FILE
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
            if not isinstance(metadata, Metadata):
                raise pickle.UnpicklingError(f"it holds {type(metadata).__name__}")
            for place in (metadata.storage_data or {}).values():
                if Path(place.relative_path).name != place.relative_path:
                    raise pickle.UnpicklingError(f"it names the file {place.relative_path!r}, outside its directory")
        except Exception as error:  # a damaged pickle raises almost anything
            raise CheckpointMismatchError(
                f"{path}: cannot be read as metadata of torch.distributed.checkpoint ({type(error).__name__}: "
                f"{error}). Load another step."
            ) from error
        if getattr(metadata, "storage_meta", None) is not None:
            metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return metadata


class SafeLoadPlanner(DefaultLoadPlanner):
    """Stock's, which would run code that a value other than a tensor names.

    And which takes what only other ranks hold, an optimizer's state of their tables, for the sign of an old format.
    """

    def create_local_plan(self) -> LoadPlan:
        """Read items of this rank."""
        assert self.metadata is not None
        return create_default_local_load_plan(self.state_dict, self.metadata)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """See stock's. Raises CheckpointMismatchError."""
        plain = load_plain(value, read_item.dest_index.fqn)
        super().load_bytes(read_item, _saved(plain))


def load_plain(value: IO[bytes], name: str) -> Any:
    """Load what torch.save wrote, unless it could run code. Raises CheckpointMismatchError."""
    try:
        return torch.load(value, weights_only=True)
    except Exception as error:
        raise CheckpointMismatchError(
            f"{name}: is not plain data ({type(error).__name__}), and reading it might run code. Leave it out of the "
            "state that is saved, or load this checkpoint with torch.distributed.checkpoint if you trust it."
        ) from error


def check_values(directory: Path, metadata: Metadata, names: Iterable[str]) -> None:
    """Make sure that values other than tensors can be loaded. Raises CheckpointMismatchError."""
    for name in names:
        if isinstance(metadata.state_dict_metadata.get(name), BytesStorageMetadata):
            place = metadata.storage_data[MetadataIndex(name)]
            with (directory / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                load_plain(io.BytesIO(file.read(place.length)), name)


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor of bytes, on the host."""
    array: Any = tensor.numpy()
    return memoryview(array)


def fill(file: IO[bytes], view: memoryview) -> int:
    """Read from where a file is until there is no more room, or no more to read; how many bytes."""
    done = 0
    while done < len(view) and (count := file.readinto(view[done : done + READ_BYTES])):  # type: ignore[attr-defined]
        done += count
    return done


class Window(io.RawIOBase):
    """Some bytes as a file that can only be read; whoever inherits says how, in `readinto`."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._at = 0

    def readable(self) -> bool:
        """As of a file."""
        return True

    def seekable(self) -> bool:
        """As of a file."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of a file."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._num_bytes}[whence]
        return self._at

    def tell(self) -> int:
        """As of a file."""
        return self._at


def checksums_of(path: Path) -> FileChecksums:
    """Read a file and compute what it is; holds a few megabytes at a time."""
    checksums = []
    with path.open("rb") as file:
        while block := file.read(CHECKSUM_BYTES):
            checksums.append(zlib.crc32(block))
        return FileChecksums(file.tell(), checksums)


def complete(temporary: Path, directory: Path, manifest: Manifest) -> None:
    """Give a checkpoint that was written beside its manifest, and then its name. Raises OSError."""
    manifest.files[METADATA_FILE] = checksums_of(temporary / METADATA_FILE)
    write_durably(temporary / MANIFEST_FILE, manifest.to_json().encode())
    # The files' names must be on the disk before the directory's new one, and this one before older steps go.
    sync_directory(temporary)
    temporary.rename(base_path(directory, manifest.step))
    sync_directory(directory)


def write_durably(path: Path, content: bytes) -> FileChecksums:
    """Have a small file on the disk. Raises OSError."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return checksums_of(path)


def sync_directory(path: Path) -> None:
    """Have the names of a directory's files on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _ChecksummedFile:
    """A file that is written from its beginning to its end."""

    def __init__(self, file: AppendedFile) -> None:
        self._file = file
        self._num_bytes = 0
        self._checksums = [0]

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        self._file.append(view)
        written = 0
        while written < len(view):
            room = CHECKSUM_BYTES * len(self._checksums) - self._num_bytes
            if room == 0:
                self._checksums.append(0)
                continue
            piece = view[written : written + room]
            self._checksums[-1] = zlib.crc32(piece, self._checksums[-1])
            self._num_bytes += len(piece)
            written += len(piece)
        return written

    def tell(self) -> int:
        return self._num_bytes

    def flush(self) -> None:
        """Does nothing: torch.save asks for it after each tensor."""

    def checksums(self) -> FileChecksums:
        return FileChecksums(self._num_bytes, self._checksums if self._num_bytes else [])


_PLAIN_GLOBALS = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}
_PATH_MODULES = ("pathlib", "pathlib._local")
_METADATA_MODULE = "torch.distributed.checkpoint.metadata"


class _MetadataUnpickler(pickle._Unpickler):  # type: ignore[name-defined, misc] # only its opcodes can be overridden
    """Makes what metadata consist of, and nothing else; writes no attribute of a class or a function."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def load_build(self) -> None:
        target = self.stack[-2]  # type: ignore[attr-defined]
        if isinstance(target, type) or callable(target):
            raise pickle.UnpicklingError(f"it writes attributes of {target!r}")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if module == _METADATA_MODULE and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == _METADATA_MODULE:
                return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            return getattr(torch, name)
        if module in _PATH_MODULES and name in ("Path", "PosixPath", "PurePosixPath"):
            return _join  # of where it was saved; nobody asks
        if (module, name) in _PLAIN_GLOBALS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which metadata do not consist of")


def _join(*parts: str) -> str:
    return "/".join(parts)


def _saved(value: Any) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return stream


def _crc32_of_json(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
