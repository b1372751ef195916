# SPDX-License-Identifier: BSD-3-Clause
"""The files of a data set: which there are, what their footers say, and whether they have the columns."""

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrec_scratchpipe.data.arrow import check_installed, fsspec, parquet, pyarrow
from torchrec_scratchpipe.data.columns import Columns, is_text, value_type
from torchrec_scratchpipe.errors import DataError

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class File:
    """One Parquet file.

    Attributes:
        name: Path or URL.
        path: What its file system calls it.
        system: An fsspec file system; None for a local path.
        metadata: Its footer.
        schema: Its columns, as Arrow types.
    """

    name: str
    path: str
    system: Any
    metadata: Any
    schema: Any

    @contextmanager
    def open(self) -> Iterator[Any]:
        """A reader of this file alone, for one thread."""
        with _source(self.path, self.system) as source:
            yield parquet.ParquetFile(
                source, metadata=self.metadata, pre_buffer=self.system is not None, page_checksum_verification=True
            )


def _source(path: str, system: Any) -> Any:
    return pyarrow.OSFile(path, "rb") if system is None else system.open(path, "rb")


def find_files(paths: Paths, columns: Columns, storage_options: Mapping[str, Any] | None) -> list[File]:
    """Open every file's footer, and see that all have the columns.

    Args:
        paths: Files, directories, globs or URLs of fsspec. Files of a directory or a glob come in the order of names.
        columns: What will be read.
        storage_options: For fsspec.

    Returns:
        The files, in order.

    Raises:
        DataError: There is no file, or one cannot be read, lacks a column, or has one of a wrong type.
    """
    check_installed("Reading Parquet")
    several = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    files = []
    for path in several:
        system, names = _expand(os.fspath(path), storage_options)
        if not names:
            raise DataError(f"{path}: no Parquet file there. Give a file, a directory of *.parquet, a glob or a URL.")
        files += [_open_footer(name, system) for name in names]
    if not files:
        raise DataError("paths is empty, needs at least one Parquet file. Name it.")
    for file in files:
        _check_types(file, columns)
        _check_same(files[0], file, columns)
    return files


def _expand(path: str, storage_options: Mapping[str, Any] | None) -> tuple[Any, list[str]]:
    """The file system, and the files that a path stands for."""
    if "://" not in path:
        if os.path.isdir(path):
            return None, sorted(str(file) for file in Path(path).rglob("*.parquet") if file.is_file())
        return None, [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    if fsspec is None:
        raise DataError(f"{path}: a URL needs fsspec, which is missing. Run: pip install torchrec-scratchpipe[parquet]")
    try:
        system, inner = fsspec.core.url_to_fs(path, **(storage_options or {}))
        if system.isdir(inner):
            return system, sorted(name for name in system.find(inner) if name.endswith(".parquet"))
        return system, [inner] if system.exists(inner) else sorted(system.glob(inner))
    except (OSError, ImportError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be reached ({type(error).__name__}: {error}). Check the URL and storage_options."
        ) from error


def _open_footer(path: str, system: Any) -> File:
    name = path if system is None else system.unstrip_protocol(path)
    try:
        with _source(path, system) as source:
            reader = parquet.ParquetFile(source)
            return File(name, path, system, reader.metadata, reader.schema_arrow)
    except FileNotFoundError:
        raise DataError(f"{name}: no such file. Give the path of a Parquet file.") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{name}: cannot be read as Parquet ({' '.join(str(error).split())}). Is it whole? Write or copy it again."
        ) from error


def _check_types(file: File, columns: Columns) -> None:
    names = file.schema.names
    for name in columns.names():
        if name not in names:
            shown = ", ".join(names[:40]) + (", ..." if len(names) > 40 else "")
            raise DataError(f"{file.name}: no column {name}, it has {shown}. Name one of these.")
    types = pyarrow.types

    def check(name: str, kind: Any, need: str, *is_good: Any) -> None:
        if not any(test(kind) for test in is_good):
            raise DataError(
                f"{file.name}, column {name}: its type is {file.schema.field(name).type}, needs {need}. Cast it, or "
                "name another column."
            )

    if columns.label is not None:
        kind = file.schema.field(columns.label).type
        check(columns.label, kind, "integers or floats", types.is_integer, types.is_floating, types.is_boolean)
    for name in columns.dense:
        kind = file.schema.field(name).type
        check(name, kind, "integers or floats", types.is_integer, types.is_floating, types.is_null)
    for name in columns.sparse:
        kind = value_type(file.schema.field(name).type)
        check(name, kind, "integers, strings, bytes or lists of these", types.is_integer, types.is_null, is_text)
        if is_text(kind) and name not in columns.hash_sizes:
            raise DataError(
                f"{file.name}, column {name}: it has {kind}, which needs to be hashed. Give its rows in hash_sizes."
            )


def _check_same(first: File, file: File, columns: Columns) -> None:
    for name in columns.names():
        expected, actual = first.schema.field(name).type, file.schema.field(name).type
        if actual != expected:
            raise DataError(
                f"{file.name}, column {name}: its type is {actual}, {first.name} has {expected}. Write both alike."
            )
