# SPDX-License-Identifier: BSD-3-Clause
"""Files of a delta log: what a rank appends after every few batches, and how it is read.

A *segment* is one file of one rank. It begins with what it is of, and goes on with *records*, one per delta::

    segment   SCHEMA record record record ...
    record    ROWS ROWS ... STATE END              STATE only where dense state was taken
    block     header (40 bytes), payload
    header    magic  kind  pool  0  rows  bytes  crc32 of the payload  crc32 of this header
    ROWS      row ids, ascending (int32 or int64); then, part after part, their values
    STATE     what torch.save makes of everything that is in no pool
    SCHEMA    JSON: of which run, rank and tables; after which record it goes on
    END       JSON: of which batch, since which, when; the digest of this record

Row ids count the rows of a pool of that rank. SCHEMA says which rows, of which tensor of the state, those are. Payloads
are multiples of 8 bytes, and records of 4,096: SCHEMA and END are made longer by zeros. Numbers are little-endian.

The digest of a record covers the digest before it, the headers of its blocks, and so the checksums of their payloads.
So no record can be missing, twice, elsewhere or of another run without being noticed.
"""

import hashlib
import json
import os
import re
import struct
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor

from torchrec_scratchpipe.checkpoint.appending import PAGE_BYTES, AppendedFile
from torchrec_scratchpipe.checkpoint.files import READ_BYTES, Window, byte_view, fill, sync_directory
from torchrec_scratchpipe.errors import CheckpointMismatchError

__all__ = [
    "Block",
    "Entry",
    "Kind",
    "Part",
    "PoolSchema",
    "Record",
    "Rows",
    "Schema",
    "Segment",
    "SegmentReader",
    "SegmentWriter",
    "open_part",
    "segment_paths",
]

FORMAT_VERSION = 1
MAGIC = b"SPdl"
HEADER = struct.Struct("<4sIIIQQII")
MAX_JSON_BYTES = 1 << 30
ALIGNMENT = 8
_NAME = re.compile(r"([0-9]{12,})_([0-9]{5,})\.log")


class Kind:
    """What a block holds."""

    SCHEMA = 1
    ROWS = 2
    STATE = 3
    END = 4


class Part(NamedTuple):
    """One part of a pool's rows."""

    dtype: str
    num_columns: int  # 0: one value per row, and no dimension for it

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return max(1, self.num_columns) * getattr(torch, self.dtype).itemsize

    def shape(self, num_rows: int) -> tuple[int, ...]:
        """Of so many rows."""
        return (num_rows, self.num_columns) if self.num_columns else (num_rows,)


class Entry(NamedTuple):
    """Which rows of a pool are which piece of a tensor of the state."""

    name: str  # in the flat state, as in a checkpoint
    part: int
    first_row: int  # in the pool
    num_rows: int
    offsets: tuple[int, ...]  # of the piece in the tensor
    size: tuple[int, ...]  # of the tensor


class PoolSchema(NamedTuple):
    """What a pool's rows are."""

    num_rows: int
    parts: tuple[Part, ...]
    entries: tuple[Entry, ...]

    @property
    def id_dtype(self) -> torch.dtype:
        """Of row ids in the log."""
        return torch.int32 if self.num_rows <= 1 << 31 else torch.int64

    def payload_bytes(self, num_rows: int) -> int:
        """Of a block of so many rows."""
        sizes = [num_rows * self.id_dtype.itemsize, *(num_rows * part.row_bytes for part in self.parts)]
        return sum(_aligned(size) for size in sizes)


@dataclass(frozen=True)
class Schema:
    """What a segment is of."""

    run: str  # a name that no other run has
    run_since: int  # the batch after which the run began to log
    run_follows: str  # digest of what the run goes on from
    rank: int
    world_size: int
    since: int  # the batch after which this segment begins
    follows: str  # digest of the record before, or what the run follows
    pools: tuple[PoolSchema, ...]

    def to_json(self) -> bytes:
        """As the payload of a block."""
        return _json_bytes({"format": FORMAT_VERSION, **self.__dict__})

    @classmethod
    def from_json(cls, payload: bytes) -> "Schema":
        """Raises ValueError, KeyError or TypeError."""
        fields = json.loads(payload)
        if fields.pop("format") != FORMAT_VERSION:
            raise ValueError(f"its format is not {FORMAT_VERSION}, which this version reads")
        pools = tuple(
            PoolSchema(
                num_rows,
                tuple(Part(*part) for part in parts),
                tuple(
                    Entry(name, part, first_row, num_rows, tuple(offsets), tuple(size))
                    for name, part, first_row, num_rows, offsets, size in entries
                ),
            )
            for num_rows, parts, entries in fields.pop("pools")
        )
        return cls(**fields, pools=pools)


class Block(NamedTuple):
    """Where a payload lies, and what it must be."""

    kind: int
    pool: int
    num_rows: int
    offset: int
    num_bytes: int
    crc32: int


@dataclass(frozen=True)
class Record:
    """One rank's delta: all that changed after batch `since`, as it was after batch `step`."""

    step: int
    since: int
    time_s: float  # time.time() when it was taken
    has_state: bool
    digest: str
    blocks: tuple[Block, ...]
    end_offset: int  # in its segment

    @property
    def row_blocks(self) -> list[Block]:
        """Those with rows."""
        return [block for block in self.blocks if block.kind == Kind.ROWS]


@dataclass
class Segment:
    """A segment as it is on the disk now."""

    path: Path
    schema: Schema
    records: list[Record] = field(default_factory=list)
    begin: int = 0  # where the first record is
    num_bytes: int = 0  # up to the end of the last whole record
    is_torn: bool = False  # whether the beginning of another record follows

    @property
    def own_name(self) -> str:
        """What its file was called when it was written."""
        return segment_name(self.schema.since, self.schema.rank)

    @property
    def step(self) -> int:
        """The last batch that it has."""
        return self.records[-1].step if self.records else self.schema.since

    @property
    def digest(self) -> str:
        """Of its last record, or of what it goes on from."""
        return self.records[-1].digest if self.records else self.schema.follows


class Rows(NamedTuple):
    """The payload of a block of rows; tensors in a buffer that the next block is read into."""

    rows: Tensor  # [N] int32 or int64
    values: list[Tensor]  # [N, D] or [N]


def segment_name(since: int, rank: int) -> str:
    """Of a segment that begins after this batch."""
    return f"{since:012d}_{rank:05d}.log"


def segment_paths(directory: Path) -> dict[Path, tuple[int, int]]:
    """Each segment's first batch and rank, ascending."""
    found = {}
    for path in directory.glob("*.log"):
        match = _NAME.fullmatch(path.name)
        if match:
            found[path] = (int(match[1]), int(match[2]))
    return dict(sorted(found.items(), key=lambda item: item[1]))


class SegmentWriter:
    """Appends records to a new segment. Raises OSError; what was appended of a record before is dropped then."""

    def __init__(self, directory: Path, schema: Schema) -> None:
        assert sys.byteorder == "little", "the log is little-endian"
        self.schema = schema
        self.path = directory / segment_name(schema.since, schema.rank)
        self._file = AppendedFile(self.path)
        self.step, self.digest = schema.since, schema.follows
        self._num_bytes = 0
        self._chain = _digest_of(schema.follows)
        try:
            self._append_last_block(Kind.SCHEMA, schema.to_json())
            self._file.sync()
            sync_directory(directory)
        except BaseException:
            self._file.close()
            self.path.unlink(missing_ok=True)
            raise
        self._begin()

    @property
    def num_bytes(self) -> int:
        """Of whole records."""
        return self._num_bytes

    def add_rows(self, pool: int, rows: Tensor, values: Sequence[Tensor]) -> None:
        """Shapes: `rows` [N] int64, ascending, `values` [N, D] or [N]."""
        ids = rows.to(self.schema.pools[pool].id_dtype)
        self._append_block(Kind.ROWS, pool, rows.numel(), [_bytes_of(tensor) for tensor in (ids, *values)])

    def add_state(self, state: bytes) -> None:
        """What :func:`torch.save` made of everything else."""
        self._append_block(Kind.STATE, 0, 0, [state])
        self._has_state = True

    def end(self, step: int, time_s: float, when_written: Callable[[], object] = lambda: None) -> None:
        """Have the record on the disk, and only then call it whole.

        Args:
            step: The batch.
            time_s: When it was taken.
            when_written: Called when the file has the whole record. If this process is killed then, it stays there; if
                the system goes down before the disk has it, it is a record without an end.
        """
        self._file.sync()  # before the end is there: an end is never seen without what it ends
        facts = {"step": step, "since": self.step, "time_s": time_s, "has_state": self._has_state}
        self._chain.update(_json_bytes(facts))
        digest = self._chain.hexdigest()
        self._append_last_block(Kind.END, _json_bytes({**facts, "digest": digest}))
        self._file.flush()
        when_written()
        self._file.sync()
        self.step, self.digest = step, digest
        self._begin()

    def drop(self) -> None:
        """Leave out what was added since the last :meth:`end`."""
        try:
            self._file.truncate(self._num_bytes)
        finally:
            self._begin()

    def close(self) -> None:
        """No record is added any more."""
        self._file.close()

    def _begin(self) -> None:
        self._num_bytes = self._file.num_bytes
        self._chain = _digest_of(self.digest)
        self._has_state = False

    def _append_last_block(self, kind: int, payload: bytes) -> None:
        """One after which a record may begin."""
        num_bytes = self._file.num_bytes + HEADER.size + len(payload)
        self._append_block(kind, 0, 0, [payload + bytes(-num_bytes % PAGE_BYTES)])

    def _append_block(self, kind: int, pool: int, num_rows: int, pieces: Sequence[bytes | memoryview]) -> None:
        crc, num_bytes = 0, 0
        parts: list[bytes | memoryview] = []
        for piece in pieces:
            for part in (piece, bytes(_aligned(len(piece)) - len(piece))):
                crc = zlib.crc32(part, crc)
                num_bytes += len(part)
                parts.append(part)
        header = HEADER.pack(MAGIC, kind, pool, 0, num_rows, num_bytes, crc, 0)[:-4]
        header += struct.pack("<I", zlib.crc32(header))
        if kind != Kind.END:
            self._chain.update(header)
        for part in (header, *parts):
            self._file.append(part)


class SegmentReader:
    """Reads a segment: first where its records are, by their headers alone; then their payloads.

    Raises CheckpointMismatchError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._buffer = torch.empty(0, dtype=torch.uint8)
        try:
            self._file: IO[bytes] = path.open("rb", buffering=0)
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror})") from error
        self.inode = os.fstat(self._file.fileno()).st_ino
        self.segment: Segment | None = None

    def scan(self) -> Segment | None:
        """What there is now, or has come since the last call; None while its beginning is not whole."""
        num_bytes = self._file.seek(0, os.SEEK_END)
        if self.segment is not None and num_bytes < self.segment.num_bytes:  # a resumed job has cut it
            self.segment = None
        if self.segment is None:
            block = self._header(0, num_bytes)
            if block is None:
                return None
            if block.kind != Kind.SCHEMA:
                raise self._error("does not begin as a segment of a delta log does")
            payload = self._small_payload(block)
            try:
                schema = Schema.from_json(payload)
            except (ValueError, KeyError, TypeError) as error:
                raise self._error(f"does not say what it is of ({type(error).__name__}: {error})") from error
            begin = block.offset + block.num_bytes
            self.segment = Segment(self.path, schema, begin=begin, num_bytes=begin)
        segment = self.segment
        while (record := self._next_record(segment, num_bytes)) is not None:
            segment.records.append(record)
            segment.num_bytes = record.end_offset
        segment.is_torn = segment.num_bytes < num_bytes
        return segment

    def row_ids(self, block: Block) -> Tensor:
        """[N] int32 or int64; read alone, so their checksum is not verified. Valid until the next call."""
        assert self.segment is not None, "it was scanned"
        dtype = self.segment.schema.pools[block.pool].id_dtype
        num_bytes = block.num_rows * dtype.itemsize
        return self.read_payload(block._replace(num_bytes=num_bytes)).view(dtype)

    def rows(self, block: Block, *, is_checked: bool = False) -> Rows:
        """Read a block of rows; valid until the next call. `is_checked`: it is known to be what was written."""
        return self.rows_in(block, self.read_payload(block), is_checked=is_checked)

    def rows_in(self, block: Block, payload: Tensor, *, is_checked: bool = False) -> Rows:
        """The rows of a block that was read; in the memory of `payload`, [bytes] uint8."""
        assert self.segment is not None, "it was scanned"
        if not is_checked and zlib.crc32(byte_view(payload)) != block.crc32:
            raise self._damaged(block)
        schema = self.segment.schema.pools[block.pool]
        offset, tensors = 0, []
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = [((block.num_rows,), schema.id_dtype)]
        shapes += [(part.shape(block.num_rows), getattr(torch, part.dtype)) for part in schema.parts]
        for shape, dtype in shapes:
            size = torch.Size(shape).numel() * dtype.itemsize
            tensors.append(payload[offset : offset + size].view(dtype).view(shape))
            offset += _aligned(size)
        return Rows(tensors[0], tensors[1:])

    def rows_between(self, block: Block, part: int, first_row: int, last_row: int) -> tuple[Tensor, Tensor]:
        """Read one part of the rows `[first_row, last_row)` of a block, unchecked: [N] ids and [N, D] or [N] values."""
        assert self.segment is not None, "it was scanned"
        schema = self.segment.schema.pools[block.pool]
        ids = self._read(block.offset, (block.num_rows,), schema.id_dtype)
        first, last = torch.searchsorted(ids, torch.tensor([first_row, last_row], dtype=ids.dtype)).tolist()
        sizes = [ids.nbytes, *(one.row_bytes * block.num_rows for one in schema.parts[:part])]
        offset = block.offset + sum(_aligned(size) for size in sizes) + first * schema.parts[part].row_bytes
        dtype = getattr(torch, schema.parts[part].dtype)
        return ids[first:last], self._read(offset, schema.parts[part].shape(last - first), dtype)

    def bounds(self, block: Block) -> tuple[int, int]:
        """The first and the last row of a block of rows."""
        assert self.segment is not None, "it was scanned"
        dtype = self.segment.schema.pools[block.pool].id_dtype
        places = (block.offset, block.offset + (block.num_rows - 1) * dtype.itemsize)
        first, last = (int(self._read(place, (1,), dtype)) for place in places)
        return first, last

    def state(self, record: Record) -> IO[bytes]:
        """Open what :meth:`SegmentWriter.add_state` was given, some bytes longer; valid while this is open."""
        (block,) = (block for block in record.blocks if block.kind == Kind.STATE)
        self._check(block)
        return open_part(self._file, block.offset, block.num_bytes)

    def check(self, record: Record) -> None:
        """Read a record, and make sure that it is what was written; holds a few megabytes."""
        for block in record.blocks:
            self._check(block)

    def release(self) -> None:
        """Give back the memory that payloads were read into."""
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def close(self) -> None:
        """Read no more."""
        self._file.close()

    def _next_record(self, segment: Segment, num_bytes: int) -> Record | None:
        chain, offset = _digest_of(segment.digest), segment.num_bytes
        blocks: list[Block] = []
        while (block := self._header(offset, num_bytes)) is not None:
            offset = block.offset + block.num_bytes
            if block.kind == Kind.END:
                if not self._is_end(block.offset - HEADER.size) and not self._has_end_after(offset):
                    return None
                return self._record(segment, block, blocks, chain, offset)
            if block.kind not in (Kind.ROWS, Kind.STATE) or not self._fits(segment.schema, block):
                raise self._error(f"has a block at byte {block.offset - HEADER.size:,} that is not its own")
            self._file.seek(block.offset - HEADER.size)
            chain.update(self._file.read(HEADER.size))
            blocks.append(block)
        return None

    def _fits(self, schema: Schema, block: Block) -> bool:
        if block.kind == Kind.STATE:
            return True
        is_known = block.pool < len(schema.pools)
        return is_known and schema.pools[block.pool].payload_bytes(block.num_rows) == block.num_bytes

    def _record(self, segment: Segment, end: Block, blocks: list[Block], chain: Any, end_offset: int) -> Record:
        payload = self._small_payload(end)
        try:
            facts = json.loads(payload)
            digest = facts.pop("digest")
            chain.update(_json_bytes(facts))
            record = Record(**facts, digest=digest, blocks=tuple(blocks), end_offset=end_offset)
        except (ValueError, KeyError, TypeError) as error:
            raise self._error(f"has a record that does not say what it is of ({error})") from error
        if record.since != segment.step or record.step < record.since:
            raise self._error(
                f"has batches {segment.step} and then batches {record.since} to {record.step}: records are missing, "
                "or not in their order"
            )
        if chain.hexdigest() != digest:
            raise self._error(f"has a record of batch {record.step} that does not follow the one before it")
        return record

    def _header(self, offset: int, num_bytes: int) -> Block | None:
        """None if no whole block begins there: the writer was stopped, or has not come further."""
        if num_bytes - offset < HEADER.size:
            return None
        self._file.seek(offset)
        header = self._file.read(HEADER.size)
        if len(header) < HEADER.size:
            return None
        magic, kind, pool, _, num_rows, payload_bytes, crc, header_crc = HEADER.unpack(header)
        if magic != MAGIC or zlib.crc32(header[:-4]) != header_crc:
            if not self._has_end_after(offset):
                return None
            raise self._error(f"is damaged at byte {offset:,}, in the header of a block")
        if payload_bytes > num_bytes - offset - HEADER.size:
            return None
        return Block(kind, pool, num_rows, offset + HEADER.size, payload_bytes, crc)

    def _has_end_after(self, offset: int) -> bool:
        """Whether a record ends later.

        Else what begins here was never whole, and a system that goes down leaves any of its bytes.
        """
        mark = MAGIC + struct.pack("<I", Kind.END)
        rest = b""
        self._file.seek(offset)
        begin = offset
        while data := self._file.read(1 << 20):
            rest += data
            at = -1
            while (at := rest.find(mark, at + 1)) >= 0:
                if self._is_end(begin + at):
                    return True
                self._file.seek(begin + len(rest))
            begin, rest = begin + len(rest) - len(mark), rest[-len(mark) :]
        return False

    def _is_end(self, offset: int) -> bool:
        self._file.seek(offset)
        header = self._file.read(HEADER.size)
        if len(header) < HEADER.size or zlib.crc32(header[:-4]) != HEADER.unpack(header)[-1]:
            return False
        *_, num_bytes, crc, _ = HEADER.unpack(header)
        return num_bytes <= MAX_JSON_BYTES and zlib.crc32(self._file.read(num_bytes)) == crc

    def _small_payload(self, block: Block) -> bytes:
        if block.num_bytes > MAX_JSON_BYTES:
            raise self._error(f"is damaged at byte {block.offset:,}")
        self._file.seek(block.offset)
        payload = self._file.read(block.num_bytes)
        if zlib.crc32(payload) != block.crc32:
            raise self._damaged(block)
        return payload.rstrip(b"\0")

    def _check(self, block: Block) -> None:
        self._file.seek(block.offset)
        crc, left = 0, block.num_bytes
        while left and (data := self._file.read(min(left, READ_BYTES))):
            crc, left = zlib.crc32(data, crc), left - len(data)
        if left or crc != block.crc32:
            raise self._damaged(block)

    def _read(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        view = _bytes_of(tensor)
        self._file.seek(offset)
        if fill(self._file, view) < len(view):
            raise self._error(f"has become shorter than {offset + len(view):,} bytes")
        return tensor

    def read_payload(self, block: Block, buffer: Tensor | None = None) -> Tensor:
        """Read a block, unchecked, into a buffer of so many bytes, or into one that the next call uses again.

        Shapes: returns [bytes] uint8.
        """
        if buffer is None:
            if self._buffer.numel() < block.num_bytes:
                self._buffer = torch.empty(block.num_bytes, dtype=torch.uint8)
            buffer = self._buffer[: block.num_bytes]
        self._file.seek(block.offset)
        if fill(self._file, byte_view(buffer)) < block.num_bytes:
            raise self._damaged(block)
        return buffer

    def _damaged(self, block: Block) -> CheckpointMismatchError:
        return self._error(f"is damaged between bytes {block.offset:,} and {block.offset + block.num_bytes:,}")

    def _error(self, what: str) -> CheckpointMismatchError:
        return CheckpointMismatchError(
            f"{self.path}: {what}. Load a step before it, or copy the file anew from where it is whole."
        )


class _FilePart(Window):
    """Some bytes of a file."""

    def __init__(self, file: IO[bytes], offset: int, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self._file, self._offset = file, offset

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        self._file.seek(self._offset + self._at)
        count: int = self._file.readinto(view[: max(0, self._num_bytes - self._at)])  # type: ignore[attr-defined]
        self._at += count
        return count


def open_part(file: IO[bytes], offset: int, num_bytes: int) -> IO[bytes]:
    """Some bytes of a file, as a file; valid while that is open."""
    return cast(IO[bytes], _FilePart(file, offset, num_bytes))


def _digest_of(before: str) -> Any:
    return hashlib.blake2b(before.encode(), digest_size=16)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _bytes_of(tensor: Tensor) -> memoryview:
    return byte_view(tensor.contiguous().view(torch.uint8).view(-1))
