# SPDX-License-Identifier: BSD-3-Clause
"""One Arrow column to ids, dense values or labels, without a loop over rows.

Shapes: ``R`` rows of a piece of a row group, ``I`` ids.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from torchrec_scratchpipe.data.arrow import compute, empty, pyarrow
from torchrec_scratchpipe.errors import DataError

FNV_OFFSET, FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3  # FNV-1a, 64 bits
TRANSFORMS = (None, "log1p")
CHUNK = 8192  # values that are computed at a time, so that what lies between two steps stays in the cache


@dataclass(frozen=True)
class Columns:
    """Which columns are read, and what becomes of them.

    Attributes:
        label: None if it is not read.
        dense: In the order of the batch.
        sparse: In the order of the batch.
        hash_sizes: Rows of each feature that is hashed.
        dense_transform: Of all dense columns.
        fill_missing: Stands for a missing value of a sparse column without lists; None: it has no id.
    """

    label: str | None
    dense: tuple[str, ...]
    sparse: tuple[str, ...]
    hash_sizes: dict[str, int]
    dense_transform: str | None
    fill_missing: int | None

    def names(self) -> list[str]:
        """Each column once."""
        label = () if self.label is None else (self.label,)
        return list(dict.fromkeys([*label, *self.dense, *self.sparse]))

    def only_sparse(self) -> "Columns":
        """The same ids, and nothing else."""
        return replace(self, label=None, dense=())


class Bags(NamedTuple):
    """The ids of one feature."""

    values: npt.NDArray[np.int64]  # [I]
    lengths: npt.NDArray[np.int32] | npt.NDArray[np.bool_] | None  # [R], ids of each row; None: one of each


def is_list(kind: Any) -> bool:
    """Whether a column of this Arrow type has lists."""
    types = pyarrow.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def is_text(kind: Any) -> bool:
    """Whether values of this Arrow type are strings or bytes."""
    types = pyarrow.types
    tests = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return any(test(kind) for test in tests)


def value_type(kind: Any) -> Any:
    """The type of a column's values, out of lists and dictionaries."""
    if is_list(kind):
        kind = kind.value_type
    return kind.value_type if pyarrow.types.is_dictionary(kind) else kind


def to_bags(column: Any, num_rows: int | None, fill_missing: int | None, out: npt.NDArray[np.int64]) -> Bags:
    """The ids of a column of integers, strings, bytes, or lists of these.

    Args:
        column: R rows, an Arrow array.
        num_rows: Of the table; None for ids as they are.
        fill_missing: Stands for a missing value where the column has no lists.
        out: [R]. Memory for the ids where the column has no lists.

    Returns:
        The ids.

    Raises:
        DataError: An id does not fit 64 bits with sign.
    """
    lengths = None
    is_scalar = not is_list(column.type)
    if not is_scalar:
        lengths = compute.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
        lengths = lengths.astype(np.int32, copy=False)
        column = compute.list_flatten(column)  # leaves out what stands behind a missing list
        out = empty((len(column),), np.int64)
    if pyarrow.types.is_dictionary(column.type) or pyarrow.types.is_null(column.type):
        column = column.cast(pyarrow.int64() if pyarrow.types.is_null(column.type) else column.type.value_type)
    numbers = _hash_text(column) if is_text(column.type) else column
    if numbers.null_count and is_scalar and fill_missing is not None:
        numbers = _filled(numbers, fill_missing)
    values, is_valid = _split(numbers)
    if is_valid is not None:
        values = values[is_valid]
        lengths = is_valid if lengths is None else _counts(is_valid, lengths)
    out = out[: values.size]
    _to_rows(values, num_rows, out)
    return Bags(out, lengths)


def _split(numbers: Any) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
    """Values, and which of them are there; None where all are. What stands for a missing value may be anything."""
    is_valid = None
    if numbers.null_count:
        bits = np.unpackbits(np.frombuffer(numbers.buffers()[0], dtype=np.uint8), bitorder="little")
        is_valid = bits[numbers.offset : numbers.offset + len(numbers)].view(np.bool_)
        parts = [None, numbers.buffers()[1]]
        numbers = pyarrow.Array.from_buffers(numbers.type, len(numbers), parts, 0, numbers.offset)
    return numbers.to_numpy(zero_copy_only=False), is_valid


def _counts(is_valid: npt.NDArray[np.bool_], lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """How many elements of each list are there."""
    before = np.concatenate([[0], np.cumsum(is_valid)])
    ends = np.cumsum(lengths, dtype=np.int64)
    return (before[ends] - before[ends - lengths]).astype(np.int32)


def _filled(numbers: Any, fill: int) -> Any:
    try:
        return numbers.fill_null(pyarrow.scalar(fill, numbers.type))
    except (pyarrow.ArrowInvalid, OverflowError):
        raise DataError(f"fill_missing is {fill}, which {numbers.type} cannot hold. Give one that it can.") from None


def _to_rows(values: npt.NDArray[Any], num_rows: int | None, out: npt.NDArray[np.int64]) -> None:
    if num_rows is not None:
        modulo(values, num_rows, out)
        return
    if values.dtype == np.uint64 and values.size and values.max() >= 1 << 63:
        raise DataError(f"it has the id {values.max()}, above 2^63 - 1. Give hash_sizes for it.")
    out[:] = values


def modulo(values: npt.NDArray[Any], num_rows: int, out: npt.NDArray[np.int64]) -> None:
    """`values` mod `num_rows`, with the sign of Python's ``%``.

    NumPy divides by one number with SIMD, and takes remainders without: 0.5 against 1.7 ns a value of 32 bits, 1.0
    against 2.0 ns a value of 64 bits (one core of an AMD EPYC).

    Args:
        values: [I] integers of any width.
        num_rows: At least 1, below 2^63.
        out: [I]. Where they go.
    """
    if values.dtype.itemsize < 4 or num_rows > np.iinfo(values.dtype).max:
        values = values.astype(np.int64)
    if values.size == 0 or (values.max() < num_rows and values.min() >= 0):
        out[:] = values
        return
    divisor = values.dtype.type(num_rows)
    scratch = np.empty(CHUNK, dtype=values.dtype)
    for first in range(0, values.size, CHUNK):
        part = values[first : first + CHUNK]
        below = np.floor_divide(part, divisor, out=scratch[: part.size])
        np.multiply(below, divisor, out=below)  # wraps around where the subtraction wraps back
        np.subtract(part, below, out=out[first : first + CHUNK], casting="unsafe")


def _hash_text(column: Any) -> Any:
    """FNV-1a of every string, an Arrow array of uint64; missing values stay missing."""
    encoded = column.dictionary_encode()
    hashes = fnv1a(encoded.dictionary.cast(pyarrow.large_binary()))
    return pyarrow.array(hashes, type=pyarrow.uint64()).take(encoded.indices)


def fnv1a(texts: Any) -> npt.NDArray[np.uint64]:
    """64-bit FNV-1a of each text, all texts at once, byte by byte.

    Args:
        texts: An Arrow array of large_binary without missing values.

    Returns:
        A hash for each.
    """
    _, offsets, data = texts.buffers()
    bounds = np.frombuffer(offsets, dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1]
    if len(texts) == 0:
        return np.zeros(0, dtype=np.uint64)
    content = np.frombuffer(data, dtype=np.uint8) if data is not None and data.size else np.zeros(0, dtype=np.uint8)
    lengths = np.diff(bounds)
    longest_first = np.argsort(-lengths, kind="stable")
    starts, falling = bounds[:-1][longest_first], -lengths[longest_first]
    hashes = np.full(len(texts), FNV_OFFSET, dtype=np.uint64)
    for index in range(int(lengths.max())):
        num_left = int(np.searchsorted(falling, -index))  # those longer than index
        part = hashes[:num_left]
        part ^= content[starts[:num_left] + index]
        part *= np.uint64(FNV_PRIME)
    result = np.empty_like(hashes)
    result[longest_first] = hashes
    return result


def fill_dense(out: npt.NDArray[np.float32], column: Any, transform: str | None) -> None:
    """Write a column of integers or floats into one of the dense features; a missing value is 0.

    Args:
        out: [R], may be strided.
        column: R rows, an Arrow array.
        transform: One of :data:`TRANSFORMS`.
    """
    if pyarrow.types.is_null(column.type):
        out[:] = 0
        return
    if column.null_count:
        column = column.fill_null(pyarrow.scalar(0, column.type))
    values = column.to_numpy(zero_copy_only=False)
    if transform is None:
        out[:] = values
        return
    is_clipped = values.size > 0 and not values.min() >= 0  # NaN, too, goes where clipping leaves it
    if values.dtype.kind in "iu" and values.size and values.max() < values.size // 2:
        # Small integers, as most counts are: each logarithm is taken once, with the same bits.
        logarithms = np.log1p(np.arange(max(0, int(values.max())) + 1), dtype=np.float64).astype(np.float32)
        out[:] = logarithms.take(np.maximum(values, 0) if is_clipped else values)
        return
    for first in range(0, values.size, CHUNK):
        part = values[first : first + CHUNK]
        part = np.maximum(part, 0) if is_clipped else part
        # In double precision whatever the column has, so that a column's width does not change bits.
        out[first : first + CHUNK] = np.log1p(part, dtype=np.float64)


def to_labels(column: Any) -> npt.NDArray[np.int32] | npt.NDArray[np.float32]:
    """Labels: [R] float32 if the column is floating, otherwise int32.

    Args:
        column: R rows, an Arrow array.

    Returns:
        The labels.

    Raises:
        DataError: A label is missing, or beyond 32 bits.
    """
    if column.null_count:
        first = int(np.argmin(column.is_valid().to_numpy(zero_copy_only=False)))
        raise DataError(
            f"{column.null_count:,} labels are missing, the first in row {first} of what was read. Every sample needs "
            "one: filter these rows out."
        )
    if pyarrow.types.is_floating(column.type):
        return np.asarray(column.to_numpy(zero_copy_only=False).astype(np.float32, copy=False))
    try:
        return np.asarray(column.cast(pyarrow.int32()).to_numpy(zero_copy_only=False))
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"a label does not fit int32 ({error}). Give labels that do, or floats.") from None
