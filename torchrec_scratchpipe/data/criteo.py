# SPDX-License-Identifier: BSD-3-Clause
"""A Criteo TSV to Parquet, a block of lines at a time."""

import gzip
import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO, Any

from torchrec_scratchpipe.data.arrow import check_installed, parquet, pyarrow
from torchrec_scratchpipe.data.criteo_cells import (
    FIRST_SPARSE,
    NUM_COLUMNS,
    NUM_DENSE,
    NUM_SPARSE,
    CellError,
    parse,
    split,
)
from torchrec_scratchpipe.errors import DataError

LABEL = "label"
DENSE_NAMES = [f"int_{index}" for index in range(NUM_DENSE)]
SPARSE_NAMES = [f"cat_{index}" for index in range(NUM_SPARSE)]
BLOCK_BYTES = 8 << 20
GZIP_MAGIC = b"\x1f\x8b"

logger = logging.getLogger(__name__)


def criteo_to_parquet(source: str | Path, target: str | Path, rows_per_group: int = 65_536) -> int:
    """Write a raw Criteo TSV as Parquet; missing cells are nulls.

    Columns are ``label`` int32, ``int_0`` to ``int_12`` int64 and ``cat_0`` to ``cat_25`` uint32. Memory does not grow
    with the file. The target appears when it is complete; before, it has another name beside it.

    Args:
        source: The file, as it is or gzip'd. A first line of names is left out.
        target: Replaced if it exists.
        rows_per_group: Rows of a row group.

    Returns:
        How many samples there are.

    Raises:
        DataError: The file is missing, empty or damaged, or a line is no sample.
    """
    check_installed("Writing Parquet")
    source, target = Path(source), Path(target)
    if rows_per_group < 1:
        raise DataError(f"rows_per_group is {rows_per_group}, needs to be at least 1. Change it.")
    if not source.is_file():
        raise DataError(f"{source}: no such file. Give the path of a raw Criteo TSV.")
    if target.exists() and target.samefile(source):
        raise DataError(f"{target}: it is the source, too. Give another name.")
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        num_rows = _write(_tables(source), unfinished, rows_per_group)
        if num_rows == 0:
            raise DataError(f"{source}: no sample in it, expected one per line. Give the path of a raw Criteo TSV.")
        unfinished.replace(target)
    finally:
        with suppress(FileNotFoundError):
            unfinished.unlink()
    return num_rows


def _schema() -> Any:
    fields = [(LABEL, pyarrow.int32())]
    fields += [(name, pyarrow.int64()) for name in DENSE_NAMES]
    fields += [(name, pyarrow.uint32()) for name in SPARSE_NAMES]
    return pyarrow.schema(fields)


def _write(tables: Iterator[Any], path: Path, rows_per_group: int) -> int:
    num_rows, waiting = 0, _schema().empty_table()
    with parquet.ParquetWriter(path, waiting.schema, write_page_checksum=True) as writer:
        for table in tables:
            num_rows += table.num_rows
            waiting = pyarrow.concat_tables([waiting, table])
            while waiting.num_rows >= rows_per_group:
                writer.write_table(waiting.slice(0, rows_per_group), row_group_size=rows_per_group)
                waiting = waiting.slice(rows_per_group)
        if waiting.num_rows:
            writer.write_table(waiting, row_group_size=rows_per_group)
    return num_rows


def _tables(source: Path) -> Iterator[Any]:
    num_lines = 0
    try:
        for content in _blocks(source):
            lines = content
            if num_lines == 0 and _is_header(first := content[: content.index(b"\n") + 1]):
                names = ", ".join(first.decode("utf-8", "replace").split("\t")[:3])
                logger.warning("%s: line 1 is taken for names of columns (%s, ...) and left out", source, names)
                lines, num_lines = content[len(first) :], 1
            if lines:
                table = _table(lines)
                num_lines += table.num_rows
                yield table
    except CellError as error:
        raise DataError(f"{source}, line {num_lines + 1 + error.line}{error.where}") from None


def _table(lines: bytes) -> Any:
    samples = parse(split(lines))
    pairs = [*zip(samples.integers, samples.is_integer_missing, strict=True)]
    pairs += zip(samples.values, samples.is_value_missing, strict=True)
    columns = [pyarrow.array(samples.labels), *(pyarrow.array(values, mask=mask) for values, mask in pairs)]
    return pyarrow.table(columns, schema=_schema())


def _blocks(source: Path) -> Iterator[bytes]:
    """Whole lines, some MiB at a time, decompressed if need be."""
    with source.open("rb") as file:
        is_gzip = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        file.seek(0)
        try:
            with gzip.open(file) if is_gzip else nullcontext(file) as content:
                yield from _whole_lines(source, content)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{source}: cannot be decompressed ({error}). Get the file again.") from None


def _whole_lines(source: Path, content: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    rest = b""
    while block := content.read(BLOCK_BYTES):
        end = block.rfind(b"\n") + 1
        if end == 0:
            rest += block
            if len(rest) > BLOCK_BYTES:
                raise DataError(f"{source}: a line of more than {BLOCK_BYTES:,} bytes. Is it a raw Criteo TSV?")
            continue
        yield rest + block[:end]
        rest = block[end:]
    if rest:
        yield rest + b"\n"


def _is_header(line: bytes) -> bool:
    """Whether a line has a sample's columns, and a name where each of its integers should be."""
    cells = line.rstrip(b"\r\n").split(b"\t")
    return len(cells) == NUM_COLUMNS and not any(
        not cell or cell.lstrip(b"-").isdigit() for cell in cells[:FIRST_SPARSE]
    )
