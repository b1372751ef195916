# SPDX-License-Identifier: BSD-3-Clause
"""Cells of a Criteo TSV to numbers, a block of lines at a time and without a loop over lines.

Shapes: ``N`` lines of 40 cells: a label, 13 integers, 26 values of at most 8 hexadecimal digits; empty where missing.
"""

import re
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

NUM_DENSE, NUM_SPARSE = 13, 26
NUM_COLUMNS = 1 + NUM_DENSE + NUM_SPARSE
FIRST_SPARSE = 1 + NUM_DENSE
TAB, NEWLINE, RETURN, MINUS = b"\t\n\r-"
MAX_HEX_DIGITS = 8
MAX_SHORT_DIGITS = 18  # so many fit 64 bits, whatever they are
NO_DIGIT = 255


class CellError(ValueError):
    """A line or a cell that cannot be used.

    Args:
        line: Counted from 0, in the block.
        where: What follows the line's number in a message.
    """

    def __init__(self, line: int, where: str) -> None:
        super().__init__(line, where)
        self.line, self.where = line, where


class Block(NamedTuple):
    """Lines, and where their cells are."""

    data: npt.NDArray[np.uint8]
    starts: npt.NDArray[np.int64]  # [N, 40]
    ends: npt.NDArray[np.int64]  # [N, 40]


class Samples(NamedTuple):
    """The numbers of a block; those of missing cells are 0."""

    labels: npt.NDArray[np.int32]  # [N]
    integers: npt.NDArray[np.int64]  # [13, N]
    is_integer_missing: npt.NDArray[np.bool_]  # [13, N]
    values: npt.NDArray[np.uint32]  # [26, N]
    is_value_missing: npt.NDArray[np.bool_]  # [26, N]


def _digits(base: int) -> npt.NDArray[np.uint8]:
    values = np.full(256, NO_DIGIT, dtype=np.uint8)
    for digit in range(base):
        values[[ord(f"{digit:x}"), ord(f"{digit:X}")]] = digit
    return values


HEXADECIMAL, DECIMAL = _digits(16), _digits(10)


def split(content: bytes) -> Block:
    """Find the cells of whole lines.

    Args:
        content: Ends with the end of a line, be it of Unix or of Windows.

    Returns:
        Where they are.

    Raises:
        CellError: A line has not 40 cells.
    """
    data = np.frombuffer(content, dtype=np.uint8)
    ends = np.flatnonzero((data == TAB) | (data == NEWLINE))
    nums_cells = np.diff(np.flatnonzero(data[ends] == NEWLINE), prepend=-1)
    bad = np.flatnonzero(nums_cells != NUM_COLUMNS)
    if bad.size:
        raise CellError(
            int(bad[0]),
            f": {nums_cells[bad[0]]} columns, expected {NUM_COLUMNS} (label, {NUM_DENSE} integers, {NUM_SPARSE} "
            "hexadecimal values) separated by tabs.",
        )
    block = Block(data, np.concatenate([[0], ends[:-1] + 1]).reshape(-1, NUM_COLUMNS), ends.reshape(-1, NUM_COLUMNS))
    last = block.ends[:, -1]
    last -= (last > block.starts[:, -1]) & (data[last - 1] == RETURN)
    return block


def parse(block: Block) -> Samples:
    """Read all cells.

    Args:
        block: Lines.

    Returns:
        Their numbers.

    Raises:
        CellError: A cell is not what its column has.
    """
    starts, ends = np.ascontiguousarray(block.starts.T), np.ascontiguousarray(block.ends.T)
    is_bad = np.zeros(starts.shape, dtype=np.bool_)
    labels = block.data[starts[0]] - np.uint8(ord("0"))
    is_bad[0] = (ends[0] - starts[0] != 1) | (labels > 1)
    dense, sparse = slice(1, FIRST_SPARSE), slice(FIRST_SPARSE, None)
    integers = _integers(block.data, starts[dense], ends[dense], is_bad[dense])
    values = _hexadecimals(block.data, starts[sparse], ends[sparse], is_bad[sparse])
    if is_bad.any():
        raise _bad_cell(block, is_bad)
    is_missing = starts == ends
    return Samples(labels.astype(np.int32), integers, is_missing[dense], values, is_missing[sparse])


def _hexadecimals(
    data: npt.NDArray[np.uint8],
    starts: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    is_bad: npt.NDArray[np.bool_],
) -> npt.NDArray[np.uint32]:
    lengths = ends - starts
    is_bad |= lengths > MAX_HEX_DIGITS
    values = np.zeros(starts.shape, dtype=np.uint32)
    for place in range(MAX_HEX_DIGITS):  # from the last digit on
        is_there = lengths > place
        digits = HEXADECIMAL[data[np.maximum(ends - 1 - place, 0)]]
        is_bad |= is_there & (digits == NO_DIGIT)
        values |= (digits * is_there).astype(np.uint32) << np.uint32(4 * place)
    return values


def _integers(
    data: npt.NDArray[np.uint8],
    starts: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    is_bad: npt.NDArray[np.bool_],
) -> npt.NDArray[np.int64]:
    is_negative = (data[starts] == MINUS) & (ends > starts)
    lengths = ends - starts - is_negative
    is_bad |= is_negative & (lengths == 0)
    values = np.zeros(starts.shape, dtype=np.int64)
    for place in range(min(int(lengths.max()), MAX_SHORT_DIGITS)):
        is_there = lengths > place
        digits = DECIMAL[data[np.maximum(ends - 1 - place, 0)]]
        is_bad |= is_there & (digits == NO_DIGIT)
        values += (digits * is_there) * np.int64(10**place)
    values = np.where(is_negative, -values, values)
    for cell in zip(*np.nonzero(lengths > MAX_SHORT_DIGITS), strict=True):  # rare
        text = data[starts[cell] : ends[cell]].tobytes()
        number = int(text) if re.fullmatch(rb"-?[0-9]{1,40}", text) else 1 << 63
        is_bad[cell] = not -(1 << 63) <= number < 1 << 63
        values[cell] = 0 if is_bad[cell] else number
    return values


def _bad_cell(block: Block, is_bad: npt.NDArray[np.bool_]) -> CellError:
    """The first of them."""
    line = int(np.argmax(is_bad.any(axis=0)))
    column = int(np.argmax(is_bad[:, line]))
    text = block.data[block.starts[line, column] : block.ends[line, column]].tobytes().decode("ascii", "replace")
    shown = repr(text if len(text) <= 40 else f"{text[:40]}...")
    if column == 0:
        return CellError(line, f", column 1: the label is {shown}, needs to be 0 or 1.")
    what = "an integer of 64 bits" if column < FIRST_SPARSE else f"at most {MAX_HEX_DIGITS} hexadecimal digits"
    return CellError(line, f", column {column + 1}: {shown} is not {what}.")
