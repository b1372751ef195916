# SPDX-License-Identifier: BSD-3-Clause
"""Which rows come when, on which rank: the order of an epoch, ranks' parts, batches, and where to go on. Integers only.

A row's *position* is its place in the order of an epoch. All ranges are half-open, ``[first, last)``.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from torchrec_scratchpipe.errors import DataError

STATE_FORMAT = 1


class Interval(NamedTuple):
    """A range of positions, or of rows."""

    first: int
    last: int


class Piece(NamedTuple):
    """Rows of one row group, counted from its first."""

    row_group: int
    first: int
    last: int


Part = list[Interval]  # positions of one rank, in order


class Place(NamedTuple):
    """Where training stands: an epoch, and what is left of it for each rank."""

    epoch: int
    parts: list[Part]


def num_rows_of(part: Part) -> int:
    """Rows of a part."""
    return sum(last - first for first, last in part)


def skip_rows(part: Part, num_rows: int) -> Part:
    """A part without its first rows."""
    left = []
    for first, last in part:
        skipped = min(num_rows, last - first)
        num_rows -= skipped
        if first + skipped < last:
            left.append(Interval(first + skipped, last))
    return left


def divide(part: Part, world_size: int) -> list[Part]:
    """Contiguous parts of `part`, one for each rank; their sizes differ by at most one row."""
    num_rows = num_rows_of(part)
    bounds = [num_rows * rank // world_size for rank in range(world_size + 1)]
    parts = []
    for rank in range(world_size):
        left, taken = bounds[rank + 1] - bounds[rank], []
        for first, last in skip_rows(part, bounds[rank]):
            if left > 0:
                taken.append(Interval(first, min(last, first + left)))
                left -= taken[-1].last - first
        parts.append(taken)
    return parts


def count_batches(parts: Sequence[Part], batch_size: int) -> int:
    """Batches of every rank: as many as the largest part fills, unless the last would be empty for the smallest."""
    sizes = [num_rows_of(part) for part in parts]
    count = -(-max(sizes) // batch_size)
    return count - 1 if min(sizes) <= (count - 1) * batch_size else count


def batch_sizes(num_rows: int, num_batches: int, batch_size: int) -> Iterator[int]:
    """Rows of each batch; the last has all that is left, 1 to `batch_size` + 1."""
    for index in range(num_batches):
        yield batch_size if index < num_batches - 1 else num_rows - index * batch_size


def shuffled(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The numbers below `count` in an order of this seed and epoch, the same with every version of NumPy."""
    digest = hashlib.sha256(f"{seed},{epoch}".encode()).digest()
    keys = np.arange(count, dtype=np.uint64) + np.frombuffer(digest[:8], dtype="<u8")
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the mixer of SplitMix64
        keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
    return np.argsort(keys ^ (keys >> np.uint64(31)), kind="stable")


@dataclass(frozen=True)
class RowOrder:
    """In which order an epoch goes through the rows of all files.

    Attributes:
        row_group_sizes: Rows of each row group, of all files in order.
        rows: The rows that are read at all, counted over all files in order.
        shuffle_row_groups: A new order of row groups in every epoch; otherwise that of the files.
        seed: Of these orders.
    """

    row_group_sizes: tuple[int, ...]
    rows: Interval
    shuffle_row_groups: bool
    seed: int

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return self.rows.last - self.rows.first

    def row_groups(self, epoch: int) -> list[Piece]:
        """What an epoch reads of each row group, in order."""
        # Row groups are numbered over all files. `rows` may begin and end inside of one.
        ends = np.cumsum(np.asarray(self.row_group_sizes, dtype=np.int64))
        starts = ends - self.row_group_sizes
        firsts = np.maximum(self.rows.first, starts) - starts
        lasts = np.minimum(self.rows.last, ends) - starts
        used = np.flatnonzero(firsts < lasts)
        if self.shuffle_row_groups:
            used = used[shuffled(used.size, self.seed, epoch)]
        return [Piece(*each) for each in zip(used.tolist(), firsts[used].tolist(), lasts[used].tolist(), strict=True)]

    def pieces(self, epoch: int, part: Part) -> Iterator[Piece]:
        """Where the rows of a part are, in order."""
        # `part` counts rows in the epoch's own order, in which row group `index` begins at `starts[index]`.
        groups = self.row_groups(epoch)
        starts = [0, *np.cumsum([last - first for _, first, last in groups], dtype=np.int64).tolist()]
        for first, last in part:
            index = bisect_right(starts, first) - 1
            while first < last:
                group, skipped = groups[index], first - starts[index]
                end = min(last, starts[index + 1])
                yield Piece(group.row_group, group.first + skipped, group.first + end - starts[index])
                first, index = end, index + 1

    def fingerprint(self) -> dict[str, Any]:
        """What two orders must have in common so that a state of one is a state of the other."""
        sizes = ",".join(map(str, self.row_group_sizes))
        return {
            "num_row_groups": len(self.row_group_sizes),
            "row_group_sizes": hashlib.sha256(sizes.encode()).hexdigest()[:16],
            "rows": list(self.rows),
            "shuffle_row_groups": self.shuffle_row_groups,
            "seed": self.seed if self.shuffle_row_groups else None,
        }


@dataclass(frozen=True)
class Schedule:
    """Who gets which batch: an order of rows, cut into parts and batches.

    Attributes:
        order: The rows of an epoch.
        batch_size: B.
        world_size: Ranks; all get equally many batches.
    """

    order: RowOrder
    batch_size: int
    world_size: int

    def start(self, epoch: int) -> Place:
        """The first batch of an epoch."""
        return Place(epoch, divide([Interval(0, self.order.num_rows)], self.world_size))

    def num_batches_left(self, place: Place) -> int:
        """Batches of each rank to the end of the epoch."""
        return count_batches(place.parts, self.batch_size)

    def after(self, place: Place, num_batches: int) -> Place:
        """Where training stands after so many more batches on each rank."""
        # The rest of this epoch may be divided otherwise than a whole one, after a resume; those that follow are whole.
        left = self.num_batches_left(place)
        if num_batches >= left:
            per_epoch = self.num_batches_left(self.start(0))
            num_epochs, num_batches = divmod(num_batches - left, per_epoch)
            place = self.start(place.epoch + 1 + num_epochs)
        return Place(place.epoch, [skip_rows(part, num_batches * self.batch_size) for part in place.parts])

    def state_of(self, place: Place) -> dict[str, Any]:
        """A place as what JSON can hold."""
        next_rows = [next(self.order.pieces(place.epoch, part[:1])) for part in place.parts]
        return {
            "format": STATE_FORMAT,
            "epoch": place.epoch,
            "world_size": self.world_size,
            "batch_size": self.batch_size,
            "parts": [[list(interval) for interval in part] for part in place.parts],
            "next_row_groups": [row_group for row_group, _, _ in next_rows],
            "next_offsets": [first for _, first, _ in next_rows],
            "data": self.order.fingerprint(),
        }

    def place_of(self, state: dict[str, Any]) -> Place:
        """The place of a state, divided anew if it was saved with another batch size or number of ranks.

        Args:
            state: What :meth:`state_of` returned.

        Returns:
            The place.

        Raises:
            DataError: The state is of other data, is none, or leaves too few rows for all ranks.
        """
        # 1. What was saved must be of the same rows in the same order.
        try:
            place, theirs = _read_state(state), dict(state["data"])
            is_same = (state["world_size"], state["batch_size"]) == (self.world_size, self.batch_size)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"state: {error!r} where a state of ParquetBatches was expected. Give what state_dict returned."
            ) from None
        self._check_same_data(theirs)
        left = sorted(interval for part in place.parts for interval in part)
        if left[0].first < 0 or left[-1].last > self.order.num_rows:
            raise DataError(
                f"state: rows [{left[0].first}, {left[-1].last}) are left, an epoch has [0, {self.order.num_rows}). "
                "Give what state_dict returned."
            )
        # 2. What all ranks together have not read is divided among those that are there now.
        if is_same:
            return place
        if (num_left := num_rows_of(left)) < self.world_size:
            raise DataError(
                f"state: {num_left:,} rows are left of epoch {place.epoch}, {self.world_size} ranks need at least one "
                f"each. Resume on at most {num_left} ranks, or from an earlier state."
            )
        return Place(place.epoch, divide(left, self.world_size))

    def _check_same_data(self, theirs: dict[str, Any]) -> None:
        ours = self.order.fingerprint()
        differing = [
            f"{name} {theirs.get(name)}, here {value}" for name, value in ours.items() if theirs.get(name) != value
        ]
        if differing:
            raise DataError(
                f"state: it is of other data or another order: {'; '.join(differing)}. Give the files and settings "
                "that it was saved with."
            )


def _read_state(state: dict[str, Any]) -> Place:
    parts = [[Interval(*map(int, each)) for each in part] for part in state["parts"]]
    if state["format"] != STATE_FORMAT:
        raise ValueError(f"format {state['format']}")
    if len(parts) != state["world_size"] or not all(parts):
        raise ValueError(f"{len(parts)} parts")
    for first, last in (interval for part in parts for interval in part):
        if first >= last:
            raise ValueError(f"rows [{first}, {last})")
    return Place(int(state["epoch"]), parts)
