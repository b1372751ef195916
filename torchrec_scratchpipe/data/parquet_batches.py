# SPDX-License-Identifier: BSD-3-Clause
"""Batches for training from Parquet files: one order on any number of readers and ranks, and a state to go on from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

from torchrec.datasets.utils import Batch

from torchrec_scratchpipe.data.batches import cut, to_batch
from torchrec_scratchpipe.data.columns import TRANSFORMS, Columns
from torchrec_scratchpipe.data.files import Paths, find_files
from torchrec_scratchpipe.data.readers import in_order
from torchrec_scratchpipe.data.row_groups import RowGroups, Rows
from torchrec_scratchpipe.data.row_ranges import Interval, Place, RowOrder, Schedule, batch_sizes, num_rows_of
from torchrec_scratchpipe.errors import DataError

Made = TypeVar("Made")


class ParquetBatches:
    """Batches of TorchRec from Parquet files, ids hashed in columns while they are read.

    Iterating over it gives one epoch. The next ``iter()`` gives the next epoch. Each rank gets a contiguous part of the
    epoch's rows, and reads only the row groups of this part. Every row comes once. All ranks get equally many batches,
    none of them empty; the last batch of an epoch has 1 to ``batch_size`` + 1 rows.

    The order depends on nothing but the files, ``rows``, ``seed``, ``shuffle_row_groups``, ``batch_size`` and
    ``world_size``. In particular, it is the same for any ``num_readers``.

    At most ``num_readers`` + 1 row groups are in memory.

    Args:
        paths: Files, directories, globs, or URLs of fsspec. Files of a directory or a glob come in the order of names.
        label: Column of labels. Batches have them as float32 if the column is floating, otherwise as int32.
        dense: Columns of integers or floats. A missing value is 0.
        sparse: Columns of integers, strings or bytes, or of lists of these. These are the keys of the features. What is
            missing, be it a value, a list or an element, has no id.
        batch_size: B, samples of a rank.
        hash_sizes: Rows of each feature's table, or of all. An id is the value modulo these, never negative; the value
            of a string or of bytes is their 64-bit FNV-1a. None, and features that are not in it: ids as they are.
        shuffle_row_groups: A new order of row groups in every epoch; otherwise that of the files. Rows of a row group
            stay together and in order.
        seed: Of these orders.
        rank: Of this process.
        world_size: Number of processes.
        num_readers: Threads that read and hash row groups ahead.
        dense_transform: ``"log1p"``: log(1 + max(value, 0)), in double precision before it becomes float32.
        storage_options: For fsspec.
        fill_missing: Stands for a missing value of a sparse column without lists, before it is hashed.
        rows: Read only this range of rows, first and last + 1, counted over all files in order.

    Raises:
        DataError: A setting, a file or a column cannot be used.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        label: str,
        dense: Sequence[str],
        sparse: Sequence[str],
        batch_size: int,
        hash_sizes: Mapping[str, int] | int | None = None,
        shuffle_row_groups: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_readers: int = 1,
        dense_transform: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
        fill_missing: int | None = None,
        rows: tuple[int, int] | None = None,
    ) -> None:
        _check_numbers(batch_size=batch_size, world_size=world_size, num_readers=num_readers)
        if not 0 <= rank < world_size:
            raise DataError(f"rank is {rank}, needs to be in [0, {world_size}), world_size. Change it.")
        if dense_transform not in TRANSFORMS:
            raise DataError(f"dense_transform is {dense_transform!r}, needs one of {TRANSFORMS}. Change it.")
        sizes = _sizes_by_feature(sparse, hash_sizes)
        columns = Columns(label, tuple(dense), tuple(sparse), sizes, dense_transform, fill_missing)
        self._row_groups = RowGroups(find_files(paths, columns, storage_options), columns)
        self._keys, self._rank, self._num_readers = list(sparse), rank, num_readers
        order = _order(self._row_groups.sizes(), rows, shuffle_row_groups, seed, world_size)
        self._schedule = Schedule(order, batch_size, world_size)
        self._start = self._next = self._schedule.start(0)
        self._running = (self._start, 0)  # the epoch of the last iteration, and how many of its batches were given

    def __len__(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        return self._schedule.num_batches_left(self._schedule.start(0))

    @property
    def num_rows(self) -> int:
        """Rows of a whole epoch, of all ranks."""
        return self._schedule.order.num_rows

    def __iter__(self) -> Iterator[Batch]:
        """The rest of this epoch; the next call gives the next epoch."""
        place = self._next
        self._next = self._schedule.start(place.epoch + 1)
        self._running = (place, 0)
        return self._count(place, self._batches(place, self._row_groups, to_batch))

    def ids_ahead(self, num_skipped: int = 0) -> Iterator[Batch]:
        """The ids of coming batches, to the end of the epoch; labels and dense features are not read.

        Changes nothing: the iteration over batches goes on as if this had not been.

        Args:
            num_skipped: Batches to leave out first, counted from the one that iteration gives next.

        Returns:
            Batches with the same sparse features; their dense features are [B, 0], their labels [0]. For
            :meth:`ScratchPipeTrainPipeline.see_ahead`.

        Raises:
            DataError: `num_skipped` is negative.
        """
        if num_skipped < 0:
            raise DataError(f"num_skipped is {num_skipped}, needs to be at least 0. Change it.")
        place, num_given = self._running
        num_left = self._schedule.num_batches_left(place)
        num_skipped += num_given
        if num_given == num_left:  # the epoch is over: the next one is next
            place, num_skipped = self._next, num_skipped - num_given
            num_left = self._schedule.num_batches_left(place)
        if num_skipped >= num_left:
            return iter(())
        place = self._schedule.after(place, num_skipped)
        return self._batches(place, self._row_groups.only_sparse(), to_batch)

    def state_dict(self, num_batches_trained: int) -> dict[str, Any]:
        """Where training stands, for :meth:`load_state_dict`; reads no data.

        Pipelines load batches ahead, so the reader cannot know which have trained.

        Args:
            num_batches_trained: Of each rank, since construction or the last :meth:`load_state_dict`.

        Returns:
            The state, the same on every rank. JSON can hold it.

        Raises:
            DataError: `num_batches_trained` is negative.
        """
        if num_batches_trained < 0:
            raise DataError(f"num_batches_trained is {num_batches_trained}, needs to be at least 0. Change it.")
        return self._schedule.state_of(self._schedule.after(self._start, num_batches_trained))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where a state was taken: the next iteration gives what was left of its epoch.

        With the batch size and the number of ranks that it was saved with, the same batches come as without a stop.
        With others, all rows that are left are divided anew, and each still comes once.

        Args:
            state: What :meth:`state_dict` returned, of any rank.

        Raises:
            DataError: It is a state of other files or of another order, or leaves too few rows for all ranks.
        """
        self._start = self._next = self._schedule.place_of(state)
        self._running = (self._start, 0)

    def _count(self, place: Place, batches: Iterator[Batch]) -> Iterator[Batch]:
        for index, batch in enumerate(batches):
            if self._running[0] is place:
                self._running = (place, index + 1)
            yield batch

    def _batches(
        self, place: Place, row_groups: RowGroups, make: Callable[[Sequence[str], Sequence[Rows]], Made]
    ) -> Iterator[Made]:
        part, schedule = place.parts[self._rank], self._schedule
        sizes = batch_sizes(num_rows_of(part), schedule.num_batches_left(place), schedule.batch_size)
        pieces = in_order(row_groups.read, schedule.order.pieces(place.epoch, part), self._num_readers)
        with closing(pieces):  # where making a batch fails, too
            yield from map(partial(make, self._keys), cut(pieces, sizes))  # map holds no rows while it waits for more


def _check_numbers(**settings: int) -> None:
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DataError(f"{name} is {value!r}, needs a whole number of at least 1. Change it.")


def _sizes_by_feature(sparse: Sequence[str], hash_sizes: Mapping[str, int] | int | None) -> dict[str, int]:
    if not sparse or len(set(sparse)) < len(sparse):
        raise DataError(f"sparse is {list(sparse)}, needs at least one column, and each once. Change it.")
    if hash_sizes is None:
        return {}
    sizes = dict(hash_sizes) if isinstance(hash_sizes, Mapping) else dict.fromkeys(sparse, int(hash_sizes))
    if unknown := sorted(set(sizes) - set(sparse)):
        raise DataError(f"hash_sizes names {', '.join(unknown)}, sparse has {', '.join(sparse)}. Leave out the others.")
    for name, size in sizes.items():
        if not 1 <= size < 1 << 63:
            raise DataError(f"hash_sizes of {name} is {size}, needs to be at least 1 and below 2^63. Change it.")
    return sizes


def _order(
    sizes: tuple[int, ...], rows: tuple[int, int] | None, shuffle_row_groups: bool, seed: int, world_size: int
) -> RowOrder:
    num_rows = sum(sizes)
    taken = Interval(0, num_rows) if rows is None else Interval(*rows)
    if not 0 <= taken.first <= taken.last <= num_rows:
        raise DataError(f"rows is [{taken.first}, {taken.last}), the files have [0, {num_rows}). Stay within these.")
    if taken.last - taken.first < world_size:
        raise DataError(
            f"{taken.last - taken.first} rows, {world_size} ranks need at least one each. Give more rows, or use fewer "
            "ranks."
        )
    return RowOrder(sizes, taken, shuffle_row_groups, seed)
