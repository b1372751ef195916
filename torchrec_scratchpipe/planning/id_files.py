# SPDX-License-Identifier: BSD-3-Clause
"""Reads ids of past batches from files: Parquet, NumPy's `.npz`, or a raw Criteo TSV.

Shapes: ``B`` samples of a batch, ``I`` ids of one feature.
"""

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe.errors import MeasurementError

__all__ = ["read_trace"]

# One feature's share of some samples: all ids, and how many belong to each sample.
Bags = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]

CRITEO_COLUMNS, CRITEO_FIRST_SPARSE = 40, 14  # a label, 13 integers, 26 hexadecimal values


def read_trace(
    paths: Sequence[str | Path], tables: Sequence[BaseEmbeddingConfig], batch_size: int
) -> Iterator[KeyedJaggedTensor]:
    """Batches of ids, in the order of the files; samples that do not fill the last batch of a file are left out.

    * `.npz`: an array per feature, [samples] for one id each; or [I], with the numbers per sample in
      `<feature>_lengths`.
    * `.parquet`: a column per feature, of integers or of lists of integers; missing values have no id. Needs pyarrow.
    * `.tsv`, `.txt`: Criteo's 40 columns; the 26 hexadecimal ones go, in order, to the tables' features, modulo their
      rows.

    Raises MeasurementError.
    """
    features = [feature for table in tables for feature in table.feature_names]
    rows_of = {feature: table.num_embeddings for table in tables for feature in table.feature_names}
    if batch_size < 1:
        raise MeasurementError(f"batch_size is {batch_size}, it must be at least 1.")
    return _read_all([Path(path).absolute() for path in paths], features, rows_of, batch_size)


def _read_all(
    paths: Sequence[Path], features: Sequence[str], rows_of: dict[str, int], batch_size: int
) -> Iterator[KeyedJaggedTensor]:
    num_samples, num_batches = 0, 0
    for path in paths:
        if not path.is_file():
            raise MeasurementError(f"{path}: no such file. Give the path of a .npz, .parquet or .tsv file.")
        read = _READERS.get(path.suffix)
        if read is None:
            raise MeasurementError(f"{path}: cannot tell what it is. Name it {', '.join(_READERS)}.")
        try:
            num_in_file = yield from _as_features(features, read(path, features, rows_of, batch_size))
        except MeasurementError:
            raise
        except Exception as error:  # a damaged file makes decoders raise nearly anything
            raise MeasurementError(
                f"{path}: cannot be read ({type(error).__name__}: {error}). Is it whole, and of the kind that "
                "its name says?"
            ) from error
        num_samples += num_in_file
        num_batches += num_in_file // batch_size
    if num_batches == 0:
        raise MeasurementError(
            f"{num_samples:,} samples were read, one batch takes {batch_size:,} of one file. Lower the batch size, or "
            "give more samples."
        )


def _as_features(
    features: Sequence[str], batches: Generator[list[Bags], None, int]
) -> Generator[KeyedJaggedTensor, None, int]:
    """Returns what the reader returns, the number of samples."""
    while True:
        try:
            bags = next(batches)
        except StopIteration as end:
            return int(end.value)
        yield KeyedJaggedTensor(
            keys=features,
            values=torch.from_numpy(np.concatenate([ids for ids, _ in bags])),
            lengths=torch.from_numpy(np.concatenate([lengths for _, lengths in bags])),
        )


def _read_npz(
    path: Path, features: Sequence[str], _rows: dict[str, int], batch_size: int
) -> Generator[list[Bags], None, int]:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        raise MeasurementError(
            f"{path}: one array without a name, a .npy file. Save with numpy.savez(path, feature=ids)."
        )
    with loaded as arrays:
        bags = []
        for feature in features:
            if feature not in arrays:
                raise MeasurementError(f"{path}: no array {feature}, it has {', '.join(arrays.files)}.")
            ids = _integers(path, feature, arrays[feature])
            name = f"{feature}_lengths"
            lengths = _integers(path, name, arrays[name]) if name in arrays else np.ones(ids.size, dtype=np.int64)
            if lengths.min(initial=0) < 0:
                raise MeasurementError(f"{path}: {name} has {lengths.min()}, a sample cannot have fewer than 0 ids.")
            if int(lengths.sum()) != ids.size:
                raise MeasurementError(f"{path}: {name} sum up to {int(lengths.sum())}, {feature} has {ids.size} ids.")
            bags.append((ids, lengths.astype(np.int32)))
    return (yield from _in_batches(path, features, bags, batch_size))


def _read_parquet(
    path: Path, features: Sequence[str], _rows: dict[str, int], batch_size: int
) -> Generator[list[Bags], None, int]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MeasurementError(f"{path}: reading Parquet needs pyarrow. Install torchrec-scratchpipe[plan].") from error
    file = parquet.ParquetFile(path)
    missing = [feature for feature in features if feature not in file.schema_arrow.names]
    if missing:
        raise MeasurementError(f"{path}: no column {missing[0]}, it has {', '.join(file.schema_arrow.names)}.")
    for part in file.iter_batches(batch_size=batch_size, columns=list(dict.fromkeys(features))):
        if part.num_rows == batch_size:
            yield [_bags_of_column(path, feature, part.column(feature)) for feature in features]
    return int(file.metadata.num_rows)


def _bags_of_column(path: Path, feature: str, column: Any) -> Bags:
    lengths = np.ones(len(column), dtype=np.int64)
    if hasattr(column, "value_lengths"):  # a column of lists
        lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        column = column.flatten()
    if column.null_count:
        is_valid = column.is_valid().to_numpy(zero_copy_only=False)
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        lengths = np.diff(np.concatenate([[0], np.cumsum(is_valid)])[bounds])
        column = column.drop_null()
    # Where every list is empty, or every value missing, Parquet need not know that they are integers.
    ids = _integers(path, feature, column.to_numpy(zero_copy_only=False)) if len(column) else np.zeros(0, np.int64)
    return ids, lengths.astype(np.int32)


def _read_criteo(
    path: Path, features: Sequence[str], rows: dict[str, int], batch_size: int
) -> Generator[list[Bags], None, int]:
    if len(features) > CRITEO_COLUMNS - CRITEO_FIRST_SPARSE:
        raise MeasurementError(f"{path}: the tables have {len(features)} features, a Criteo TSV has 26.")
    with path.open(encoding="ascii") as file:
        for first_line in itertools.count(1, batch_size):
            lines = [line.rstrip("\n").split("\t") for line in itertools.islice(file, batch_size)]
            if len(lines) < batch_size:
                return first_line - 1 + len(lines)
            for offset, line in enumerate(lines):
                if len(line) != CRITEO_COLUMNS:
                    raise MeasurementError(
                        f"{path}, line {first_line + offset}: {len(line)} columns, expected {CRITEO_COLUMNS}."
                    )
            columns = list(zip(*lines, strict=True))[CRITEO_FIRST_SPARSE:]
            yield [
                (np.array([int(cell or "0", 16) % rows[feature] for cell in column]), np.ones(batch_size, np.int32))
                for feature, column in zip(features, columns, strict=False)
            ]
    raise AssertionError("a file ends")


def _in_batches(
    path: Path, features: Sequence[str], bags: Sequence[Bags], batch_size: int
) -> Generator[list[Bags], None, int]:
    nums_samples = {lengths.size for _, lengths in bags}
    if len(nums_samples) > 1:
        raise MeasurementError(
            f"{path}: features {', '.join(features)} have {sorted(nums_samples)} samples, not as many."
        )
    bounds = [np.concatenate([[0], np.cumsum(lengths)]) for _, lengths in bags]
    for first in range(0, min(nums_samples, default=0) - batch_size + 1, batch_size):
        last = first + batch_size
        yield [
            (ids[bound[first] : bound[last]], lengths[first:last])
            for (ids, lengths), bound in zip(bags, bounds, strict=True)
        ]
    return min(nums_samples, default=0)


def _integers(path: Path, feature: str, values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    if not np.issubdtype(values.dtype, np.integer) or values.ndim != 1:
        raise MeasurementError(
            f"{path}: {feature} is {values.ndim}-dimensional {values.dtype}, expected integers in a row."
        )
    if values.dtype == np.uint64 and values.max(initial=0) >= 1 << 63:
        raise MeasurementError(
            f"{path}: {feature} has {values.max()}, which no table has. Give the ids that the model looks up, hashed "
            "as it hashes them."
        )
    return values.astype(np.int64)


_READERS: dict[str, Callable[[Path, Sequence[str], dict[str, int], int], Generator[list[Bags], None, int]]] = {
    ".npz": _read_npz,
    ".parquet": _read_parquet,
    ".tsv": _read_criteo,
    ".txt": _read_criteo,
}
