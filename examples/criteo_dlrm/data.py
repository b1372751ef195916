# SPDX-License-Identifier: BSD-3-Clause
"""Batches for the Criteo DLRM example: from a raw Criteo TSV, or generated in its shape.

Shapes: ``B`` samples of a batch, 13 dense and 26 sparse features, one id per sparse feature and sample.
"""

import gzip
import itertools
import logging
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

logger = logging.getLogger(__name__)

NUM_DENSE = 13
RAW_VALUE_BITS = 32  # 8 hexadecimal digits
NUM_SPARSE = 26
NUM_COLUMNS = 1 + NUM_DENSE + NUM_SPARSE
FEATURE_NAMES = [f"cat_{i}" for i in range(NUM_SPARSE)]
GZIP_MAGIC = b"\x1f\x8b"
VALIDATION_SHARE = 0.1  # the last tenth of a TSV, in time order

# Criteo Kaggle: distinct values per column in the whole training file.
KAGGLE_CARDINALITIES = [
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
    27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
]  # fmt: skip


class Popularity(NamedTuple):
    """How lookups spread over one column's values, measured on the first 10,000 rows of Criteo Kaggle."""

    num_distinct: int
    hottest: float  # share of the most frequent value
    top_1_percent: float  # share of the most frequent 1 % of the values seen
    top_10_percent: float


KAGGLE_POPULARITY = [
    Popularity(*column)
    for column in [
        (175, 0.500, 0.672, 0.948), (386, 0.123, 0.270, 0.702), (5521, 0.047, 0.315, 0.488),
        (4033, 0.073, 0.377, 0.583), (56, 0.666, 0.666, 0.955), (8, 0.459, 0.459, 0.459),
        (3184, 0.011, 0.159, 0.477), (93, 0.589, 0.589, 0.957), (3, 0.887, 0.887, 0.887),
        (2986, 0.276, 0.394, 0.608), (2084, 0.020, 0.176, 0.525), (5284, 0.047, 0.327, 0.506),
        (1725, 0.022, 0.187, 0.539), (24, 0.363, 0.363, 0.869), (2035, 0.019, 0.181, 0.575),
        (4724, 0.047, 0.344, 0.543), (9, 0.430, 0.430, 0.430), (1149, 0.051, 0.243, 0.668),
        (547, 0.450, 0.826, 0.910), (4, 0.450, 0.450, 0.450), (5037, 0.047, 0.336, 0.523),
        (8, 0.818, 0.818, 0.818), (12, 0.452, 0.452, 0.654), (2525, 0.075, 0.494, 0.699),
        (40, 0.450, 0.450, 0.802), (1939, 0.450, 0.631, 0.773),
    ]
]  # fmt: skip
TAIL_EXPONENT = 1.05


class CriteoFormatError(ValueError):
    """A Criteo TSV does not look like one; the message names the file, the line and what was expected."""


class BatchSource(Protocol):
    """Where the example's batches come from; every call gives the same ones."""

    num_train_batches: int
    num_val_batches: int

    def train(self, first_batch: int = 0) -> Iterator[Batch]:
        """The rank's training batches, from any of them on."""

    def validate(self) -> Iterator[Batch]:
        """The rank's validation batches."""


@dataclass(frozen=True)
class Share:
    """Which part of the data a rank gets: every `world_size`-th batch."""

    rank: int = 0
    world_size: int = 1


def make_batch(dense: npt.NDArray[np.float32], ids: npt.NDArray[np.int64], labels: npt.NDArray[np.int32]) -> Batch:
    """Assemble one batch.

    Args:
        dense: [B, 13].
        ids: [26, B].
        labels: [B], 0 or 1.

    Returns:
        The batch.
    """
    return Batch(
        dense_features=torch.from_numpy(dense),
        sparse_features=KeyedJaggedTensor.from_lengths_sync(
            keys=FEATURE_NAMES,
            values=torch.from_numpy(ids.reshape(-1)),
            lengths=torch.ones(ids.size, dtype=torch.int32),
        ),
        labels=torch.from_numpy(labels),
    )


def hash_values(values: npt.NDArray[np.uint64], num_embeddings: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """The rows of raw values.

    Args:
        values: [26, B]; a missing value is 0.
        num_embeddings: [26, 1]. Rows of each table.

    Returns:
        [26, B].
    """
    # A multiplicative hash whose high bits decide; a missing value shares row 0 with its collisions.
    mixed = (values * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(20)
    return (mixed % num_embeddings).astype(np.int64)


class GeneratedCriteo:
    """Criteo-shaped samples without end: an empirical head, a Zipf tail, and a signal that can be learnt.

    A value's popularity follows three measured points of its column (hottest value, top 1 %, top 10 %) and a Zipf tail
    over the rest of the table. The label depends on the dense features and on a hidden effect of every value.

    Args:
        num_embeddings: Rows of each of the 26 tables.
        batch_size: B.
        num_train_batches: Per rank.
        num_val_batches: Per rank.
        seed: Of everything.
        share: This rank's part.
        is_raw: Each value as a number of 32 bits, in place of a row.
    """

    def __init__(
        self,
        num_embeddings: Sequence[int],
        batch_size: int,
        num_train_batches: int,
        num_val_batches: int,
        seed: int,
        share: Share,
        *,
        is_raw: bool = False,
    ) -> None:
        self._is_raw = is_raw
        self.num_train_batches = num_train_batches
        self.num_val_batches = num_val_batches
        self._batch_size = batch_size
        self._seed = seed
        self._share = share
        rng = np.random.default_rng(seed)
        self._cumulative = [
            _cumulative_popularity(rows, popularity)
            for rows, popularity in zip(num_embeddings, KAGGLE_POPULARITY, strict=True)
        ]
        # Popular values are spread over the table, as hashing would spread them.
        self._row_of_rank = [rng.permutation(rows) for rows in num_embeddings]
        self._effects = [
            _hidden_effects(rng, cumulative, row_of_rank)
            for cumulative, row_of_rank in zip(self._cumulative, self._row_of_rank, strict=True)
        ]
        self._dense_weights = rng.normal(0, 0.3, NUM_DENSE).astype(np.float32)

    def train(self, first_batch: int = 0) -> Iterator[Batch]:
        """The rank's training batches, the same at every call; those before the first are made and left out."""
        return itertools.islice(self._batches(stream=0), first_batch, self.num_train_batches)

    def validate(self) -> Iterator[Batch]:
        """The rank's validation batches, the same at every call."""
        return itertools.islice(self._batches(stream=1), self.num_val_batches)

    def _batches(self, stream: int) -> Iterator[Batch]:
        rng = np.random.default_rng([self._seed, stream, self._share.rank])
        while True:
            ids = np.empty((NUM_SPARSE, self._batch_size), dtype=np.int64)
            dense = rng.normal(0, 1, (self._batch_size, NUM_DENSE)).astype(np.float32)
            logits = dense @ self._dense_weights - 1.6
            for column, (cumulative, row_of_rank, effects) in enumerate(
                zip(self._cumulative, self._row_of_rank, self._effects, strict=True)
            ):
                ranks = np.searchsorted(cumulative, rng.random(self._batch_size))
                ids[column] = row_of_rank[np.minimum(ranks, len(row_of_rank) - 1)]
                logits += effects[ids[column]]
            labels = (rng.random(self._batch_size) < 1 / (1 + np.exp(-logits))).astype(np.int32)
            yield make_batch(dense, _spread(ids) if self._is_raw else ids, labels)


def _spread(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    # An odd factor permutes the numbers of 32 bits.
    return (ids * 0x9E3779B1) & ((1 << RAW_VALUE_BITS) - 1)


def _hidden_effects(
    rng: np.random.Generator, cumulative: npt.NDArray[np.float64], row_of_rank: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """What each row adds to the label's logit; 0 on average over the lookups, so that every seed has a like CTR."""
    effects = rng.normal(0, 0.35, len(row_of_rank))
    popularity = np.diff(cumulative, prepend=0.0)
    return np.asarray(effects - popularity @ effects[row_of_rank], dtype=np.float32)


def _cumulative_popularity(num_rows: int, popularity: Popularity) -> npt.NDArray[np.float64]:
    """Cumulative share of the `num_rows` most popular values, ends at 1."""
    ends = [1, int(0.01 * popularity.num_distinct), int(0.1 * popularity.num_distinct), num_rows]
    shares = [popularity.hottest, popularity.top_1_percent, popularity.top_10_percent, 1.0]
    weights = np.arange(1, num_rows + 1, dtype=np.float64) ** -TAIL_EXPONENT
    first, given = 0, 0.0
    for end, share in zip(ends, shares, strict=True):
        last = min(max(end, first), num_rows)
        if last > first:
            weights[first:last] *= max(share - given, 0.0) / weights[first:last].sum()
            first, given = last, max(share, given)
    cumulative = np.cumsum(weights)
    return np.asarray(cumulative / cumulative[-1])


class CriteoTsv:
    """Samples from a raw Criteo TSV, hashed into the tables while reading; the last tenth is for validation.

    A line is: label, 13 integers, 26 hexadecimal values, separated by tabs, empty where missing. The file may be
    gzip'd, and begin with a line of names, which is left out.

    Args:
        path: The file.
        num_embeddings: Rows of each of the 26 tables.
        batch_size: B; with several ranks an incomplete last round of batches is left out.
        share: This rank's part.
        is_raw: Values as they are, of 32 bits, in place of rows.

    Raises:
        CriteoFormatError: The file is missing, empty, damaged or too short, or its first line is no sample.
    """

    def __init__(
        self, path: str, num_embeddings: Sequence[int], batch_size: int, share: Share, *, is_raw: bool = False
    ) -> None:
        self._path = Path(path)
        self._is_raw = is_raw
        self._num_embeddings = np.asarray(num_embeddings, dtype=np.uint64)[:, None]
        self._batch_size = batch_size
        self._share = share
        if not self._path.is_file():
            raise CriteoFormatError(f"{path}: no such file. Give --criteo_tsv the path of a raw Criteo TSV.")
        with self._lines() as lines:
            first_line = next(lines, b"")
            num_lines = int(bool(first_line)) + sum(1 for _ in lines)
        self._num_header_lines = int(_is_header(first_line))
        num_lines -= self._num_header_lines
        if num_lines == 0:
            raise CriteoFormatError(f"{path}: the file is empty, expected one sample per line.")
        if self._num_header_lines and share.rank == 0:
            names = first_line.decode("utf-8", "replace").split("\t")
            logger.warning(
                "%s: line 1 is taken for names of columns (%s, ...) and left out", path, ", ".join(names[:3])
            )
        self._num_val_lines = int(num_lines * VALIDATION_SHARE)
        self._num_train_lines = num_lines - self._num_val_lines
        self.num_train_batches = self._num_batches(self._num_train_lines)
        self.num_val_batches = self._num_batches(self._num_val_lines)
        if self.num_train_batches == 0:
            raise CriteoFormatError(
                f"{path}: {num_lines} samples, of which {self._num_train_lines} are for training; {share.world_size} "
                f"ranks need {batch_size * share.world_size} for one batch each. Lower --batch_size."
            )
        with self._lines() as lines:
            first_sample = next(itertools.islice(lines, self._num_header_lines, None))
        self._parse([first_sample], 1 + self._num_header_lines)

    @contextmanager
    def _lines(self) -> Iterator[Iterator[bytes]]:
        """All lines of the file, decompressed if need be."""
        with self._path.open("rb") as file:
            is_gzip = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
            file.seek(0)
            try:
                with gzip.open(file) if is_gzip else nullcontext(file) as lines:
                    yield lines
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise CriteoFormatError(
                    f"{self._path}: cannot be decompressed ({error}). Get the file again."
                ) from None

    def train(self, first_batch: int = 0) -> Iterator[Batch]:
        """The rank's training batches, in time order; lines before the first are not parsed."""
        num_lines_before = min(first_batch * self._batch_size * self._share.world_size, self._num_train_lines)
        return self._batches(
            num_lines_before, self._num_train_lines - num_lines_before, self.num_train_batches - first_batch
        )

    def validate(self) -> Iterator[Batch]:
        """The rank's validation batches, in time order."""
        return self._batches(self._num_train_lines, self._num_val_lines, self.num_val_batches)

    def _num_batches(self, num_lines: int) -> int:
        if self._share.world_size == 1:
            return -(-num_lines // self._batch_size)
        return num_lines // (self._batch_size * self._share.world_size)

    def _batches(self, first_sample: int, num_samples: int, num_batches: int) -> Iterator[Batch]:
        with self._lines() as all_lines:
            first_line = self._num_header_lines + first_sample
            lines = itertools.islice(all_lines, first_line, first_line + num_samples)
            line_number = first_line + 1
            num_given = 0
            for index in itertools.count():
                chunk = list(itertools.islice(lines, self._batch_size))
                if not chunk or num_given == num_batches:
                    return
                if index % self._share.world_size == self._share.rank:
                    yield self._parse(chunk, line_number)
                    num_given += 1
                line_number += len(chunk)

    def _parse(self, chunk: list[bytes], line_number: int) -> Batch:
        rows = [line.rstrip(b"\r\n").split(b"\t") for line in chunk]
        for offset, row in enumerate(rows):
            if len(row) != NUM_COLUMNS:
                raise CriteoFormatError(
                    f"{self._path}, line {line_number + offset}: {len(row)} columns, expected {NUM_COLUMNS} (label, "
                    f"{NUM_DENSE} integers, {NUM_SPARSE} hexadecimal values) separated by tabs."
                )
        labels = self._labels([row[0] for row in rows], line_number)
        dense = self._integers([row[1 : 1 + NUM_DENSE] for row in rows], line_number, first_column=2)
        values = self._hexadecimals([row[1 + NUM_DENSE :] for row in rows], line_number)
        return make_batch(np.log1p(np.maximum(dense, 0)).astype(np.float32), self._hash(values), labels)

    def _labels(self, cells: list[bytes], line_number: int) -> npt.NDArray[np.int32]:
        for offset, cell in enumerate(cells):
            if cell not in (b"0", b"1"):
                raise CriteoFormatError(
                    f"{self._path}, line {line_number + offset}, column 1: the label is {_shown(cell)}, needs to "
                    "be 0 or 1."
                )
        return np.array([cell == b"1" for cell in cells], dtype=np.int32)

    def _integers(self, rows: list[list[bytes]], line_number: int, first_column: int) -> npt.NDArray[np.int64]:
        try:
            return np.array([[int(cell or b"0") for cell in row] for row in rows], dtype=np.int64)
        except (ValueError, OverflowError):
            what = "an integer of 64 bits"
            raise self._bad_cell(rows, line_number, first_column, base=10, what=what) from None

    def _hexadecimals(self, rows: list[list[bytes]], line_number: int) -> npt.NDArray[np.uint64]:
        cells = b"".join(cell.rjust(8, b"0") for row in rows for cell in row)
        try:
            if len(cells) != 8 * NUM_SPARSE * len(rows) or b" " in cells:
                raise ValueError
            packed = bytes.fromhex(cells.decode("ascii"))
        except ValueError:
            first_column = 2 + NUM_DENSE
            raise self._bad_cell(rows, line_number, first_column, 16, "at most 8 hexadecimal digits") from None
        return np.frombuffer(packed, dtype=">u4").reshape(len(rows), NUM_SPARSE).T.astype(np.uint64)

    def _hash(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        return values.astype(np.int64) if self._is_raw else hash_values(values, self._num_embeddings)

    def _bad_cell(
        self, rows: list[list[bytes]], line_number: int, first_column: int, base: int, what: str
    ) -> CriteoFormatError:
        for row_offset, row in enumerate(rows):
            for column_offset, cell in enumerate(row):
                try:
                    number = int(cell or b"0", base)
                    is_good = -(1 << 63) <= number < 1 << 63 if base == 10 else len(cell) <= 8
                except ValueError:
                    is_good = False
                if not is_good or b" " in cell:
                    return CriteoFormatError(
                        f"{self._path}, line {line_number + row_offset}, column {first_column + column_offset}: "
                        f"{_shown(cell)} is not {what}."
                    )
        return CriteoFormatError(f"{self._path}, lines from {line_number}: a value cannot be read.")


def _is_header(line: bytes) -> bool:
    """Whether a line has a sample's columns, and a name where each of its integers should be."""
    cells = line.rstrip(b"\r\n").split(b"\t")
    return len(cells) == NUM_COLUMNS and not any(_is_integer_or_empty(cell) for cell in cells[: 1 + NUM_DENSE])


def _is_integer_or_empty(cell: bytes) -> bool:
    return not cell or cell.lstrip(b"-").isdigit()


def _shown(cell: bytes) -> str:
    """A cell that may be anything, for a message."""
    text = cell.decode("ascii", "replace")
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
