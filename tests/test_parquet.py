# SPDX-License-Identifier: BSD-3-Clause
"""Batches from Parquet: the order of rows, ranks, resuming, values against plain Python, and errors."""

import itertools
import json
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe.data import ParquetBatches, arrow, files, parquet_batches
from torchrec_scratchpipe.data.row_ranges import Interval, RowOrder, Schedule, batch_sizes, num_rows_of
from torchrec_scratchpipe.errors import DataError

SIZES = [7, 1, 12, 3, 9]  # of row groups
NUM_ROWS = sum(SIZES)


def write(path: Path, columns: dict[str, Any], sizes: list[int] | None = None) -> Path:
    table = pyarrow.table(columns)
    with parquet.ParquetWriter(path, table.schema, write_page_checksum=True) as writer:
        first = 0
        for size in sizes or [table.num_rows]:
            writer.write_table(table.slice(first, size))
            first += size
    return path


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """A file whose label, dense value and id are the number of the row; another feature has lists."""
    numbers = list(range(NUM_ROWS))
    lists = [[row] * (row % 3) for row in numbers]
    columns = {"label": numbers, "x": [float(row) for row in numbers], "id": numbers, "lists": lists}
    return write(tmp_path / "numbered.parquet", columns, SIZES)


def reader(path: Any, **settings: Any) -> ParquetBatches:
    defaults: dict[str, Any] = {"label": "label", "dense": ["x"], "sparse": ["id", "lists"], "batch_size": 4}
    return ParquetBatches(path, **(defaults | settings))


def rows_of(batch: Batch) -> list[int]:
    """The numbers of a batch's rows; that all its parts are of these rows is checked."""
    rows: list[int] = batch.labels.tolist()
    assert batch.dense_features.tolist() == [[float(row)] for row in rows]
    check_features(rows, batch.sparse_features)
    return rows


def check_features(rows: list[int], features: KeyedJaggedTensor) -> None:
    assert features["id"].values().tolist() == rows
    assert features["id"].lengths().tolist() == [1] * len(rows)
    assert features["lists"].lengths().tolist() == [row % 3 for row in rows]
    assert features["lists"].values().tolist() == [row for row in rows for _ in range(row % 3)]


def epoch(batches: ParquetBatches) -> list[list[int]]:
    return [rows_of(batch) for batch in batches]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("parquet_reader")]


# Order and readers


def test_batches_have_the_shapes_and_dtypes_of_torchrec(numbered: Path) -> None:
    batch = next(iter(reader(numbered)))
    assert batch.dense_features.dtype == torch.float32
    assert batch.dense_features.shape == (4, 1)
    assert batch.labels.dtype == torch.int32
    assert batch.sparse_features.keys() == ["id", "lists"]
    assert batch.sparse_features.values().dtype == torch.int64
    assert batch.sparse_features.lengths().dtype == torch.int32


def test_without_shuffling_the_order_is_that_of_the_file(numbered: Path) -> None:
    batches = reader(numbered)
    assert epoch(batches) == [list(range(first, first + 4)) for first in range(0, NUM_ROWS, 4)]
    assert len(batches) == 8


@pytest.mark.parametrize("num_readers", [2, 4, 9])
def test_the_order_is_the_same_for_any_number_of_readers(numbered: Path, num_readers: int) -> None:
    one, several = (reader(numbered, num_readers=n, shuffle_row_groups=True) for n in (1, num_readers))
    for _ in range(3):
        assert epoch(one) == epoch(several)


def test_shuffled_epochs_differ_and_seeds_decide(numbered: Path) -> None:
    batches, same, other = (reader(numbered, shuffle_row_groups=True, seed=seed) for seed in (1, 1, 2))
    first, second = epoch(batches), epoch(batches)
    assert first != second
    assert [first, second] == [epoch(same), epoch(same)]
    assert epoch(other) != first
    for each in (first, second):
        assert sorted(itertools.chain(*each)) == list(range(NUM_ROWS))


def test_the_shuffled_order_of_a_seed_does_not_change_with_versions() -> None:
    order = RowOrder((2,) * 8, Interval(0, 16), True, 5)
    assert [piece.row_group for piece in order.row_groups(3)] == [1, 0, 4, 6, 5, 7, 2, 3]


@pytest.mark.parametrize("end", ["exhausted", "closed", "dropped", "error"])
def test_no_thread_is_left(numbered: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    iterator = iter(reader(numbered, num_readers=3))
    assert threads() == []
    next(iterator)
    assert threads() != []
    if end == "exhausted":
        list(iterator)
    elif end == "closed":
        iterator.close()  # type: ignore[attr-defined]
    elif end == "dropped":
        del iterator
    else:
        monkeypatch.setattr("torchrec_scratchpipe.data.batches.to_features", None)
        with pytest.raises(TypeError):
            list(iterator)
    assert threads() == []


# Ranks


@pytest.mark.parametrize("batch_size", [1, 3, 4, 8, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_row_comes_once_and_ranks_have_equally_many_batches(
    numbered: Path, world_size: int, batch_size: int
) -> None:
    ranks = [
        reader(numbered, rank=rank, world_size=world_size, batch_size=batch_size, shuffle_row_groups=True)
        for rank in range(world_size)
    ]
    for _ in range(2):
        epochs = [epoch(each) for each in ranks]
        assert sorted(itertools.chain(*itertools.chain(*epochs))) == list(range(NUM_ROWS))
        assert {len(each) for each in epochs} == {len(ranks[0])}
        assert all(1 <= len(batch) <= batch_size + 1 for each in epochs for batch in each)


def test_a_batch_that_would_be_empty_on_one_rank_is_joined_to_the_one_before(numbered: Path) -> None:
    epochs = [
        epoch(reader(numbered, rank=rank, world_size=2, batch_size=4, rows=(0, 17))) for rank in range(2)
    ]  # 8 and 9 rows
    assert [[len(batch) for batch in each] for each in epochs] == [[4, 4], [4, 5]]


def test_a_rank_reads_only_its_row_groups(numbered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = []
    read = parquet_batches.RowGroups.read
    monkeypatch.setattr(
        parquet_batches.RowGroups, "read", lambda self, piece: (pieces.append(piece), read(self, piece))[1]
    )
    epoch(reader(numbered, rank=1, world_size=4))  # rows 8 to 15
    assert [tuple(piece) for piece in pieces] == [(2, 0, 8)]


def test_parts_and_batches_are_right_for_many_numbers() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        world_size, batch_size = rng.randint(1, 9), rng.randint(1, 9)
        num_rows = rng.randint(world_size, 200)
        schedule = Schedule(RowOrder((num_rows,), Interval(0, num_rows), False, 0), batch_size, world_size)
        place = schedule.start(0)
        sizes = [num_rows_of(part) for part in place.parts]
        assert sum(sizes) == num_rows
        assert max(sizes) - min(sizes) <= 1
        num_batches = schedule.num_batches_left(place)
        each = [list(batch_sizes(size, num_batches, batch_size)) for size in sizes]
        assert [sum(of_rank) for of_rank in each] == sizes
        assert all(1 <= size <= batch_size + 1 for of_rank in each for size in of_rank)
        assert all(size == batch_size for of_rank in each for size in of_rank[:-1])


# Resuming


def endless(batches: ParquetBatches) -> Iterator[list[int]]:
    while True:
        yield from epoch(batches)


def rest_of_epoch(ranks: list[ParquetBatches]) -> list[int]:
    return sorted(itertools.chain(*(itertools.chain(*epoch(each)) for each in ranks)))


def settings_of(rng: random.Random) -> dict[str, Any]:
    return {"world_size": rng.randint(1, 4), "batch_size": rng.randint(1, 9)}


@pytest.mark.parametrize("seed", range(10))
def test_ten_resumes_give_the_batches_of_a_run_without_a_stop(numbered: Path, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(10):
        settings = settings_of(rng) | {"shuffle_row_groups": rng.random() < 0.5, "seed": rng.randint(0, 99)}
        settings["rank"] = rng.randrange(settings["world_size"])
        whole, resumed = endless(reader(numbered, **settings)), reader(numbered, **settings)
        for _ in range(2):  # resume what was resumed
            stopped, num_trained = resumed, rng.randint(0, 20)
            list(itertools.islice(whole, num_trained))
            resumed = reader(numbered, **settings, num_readers=rng.randint(1, 3))
            resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict(num_trained))))
        expected = list(itertools.islice(whole, 12))
        assert expected == list(itertools.islice(endless(resumed), 12))


@pytest.mark.parametrize("seed", range(10))
def test_another_number_of_ranks_divides_the_rest_of_the_epoch(numbered: Path, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(5):
        common = {"shuffle_row_groups": True, "seed": rng.randint(0, 99)}
        settings = settings_of(rng)
        left = set(range(NUM_ROWS))
        ranks = [reader(numbered, **common, **settings, rank=rank) for rank in range(settings["world_size"])]
        for _ in range(2):
            num_trained = rng.randrange(len(list(ranks[0].ids_ahead())))
            for each in ranks:
                trained = [rows_of(batch) for batch in itertools.islice(each, num_trained)]
                left -= set(itertools.chain(*trained))
            states = [each.state_dict(num_trained) for each in ranks]
            assert all(state == states[0] for state in states)
            settings = settings_of(rng)
            if len(left) < settings["world_size"]:
                break
            ranks = [reader(numbered, **common, **settings, rank=rank) for rank in range(settings["world_size"])]
            for each in ranks:
                each.load_state_dict(states[0])
        else:
            assert sorted(left) == rest_of_epoch(ranks)
            assert list(range(NUM_ROWS)) == rest_of_epoch(ranks)  # the epoch after it is whole


def rows_by_arithmetic(schedule: Schedule, place: Any, rank: int) -> list[list[tuple[int, int]]]:
    part = place.parts[rank]
    pieces = schedule.order.pieces(place.epoch, part)
    rows = [(group, row) for group, first, last in pieces for row in range(first, last)]
    sizes = batch_sizes(len(rows), schedule.num_batches_left(place), schedule.batch_size)
    return [[rows.pop(0) for _ in range(size)] for size in sizes]


def test_a_thousand_random_resumes_by_arithmetic() -> None:
    rng = random.Random(1)
    num_redivided = 0
    for _ in range(1000):
        sizes = tuple(rng.randint(0, 20) for _ in range(rng.randint(1, 8)))
        num_rows = sum(sizes)
        first = rng.randint(0, num_rows // 3)
        rows = Interval(first, num_rows - rng.randint(0, num_rows // 3))
        settings = settings_of(rng)
        if rows.last - rows.first < 4:
            continue
        order = RowOrder(sizes, rows, rng.random() < 0.5, rng.randint(0, 99))
        schedule = Schedule(order, **settings)
        per_epoch = schedule.num_batches_left(schedule.start(0))
        num_trained = rng.randint(0, 3 * per_epoch)
        state = json.loads(json.dumps(schedule.state_of(schedule.after(schedule.start(0), num_trained))))
        again, other = Schedule(order, **settings), Schedule(order, **settings_of(rng))
        place = again.place_of(state)
        assert place.epoch == num_trained // per_epoch
        whole = schedule.start(place.epoch)
        for rank in range(settings["world_size"]):
            expected = rows_by_arithmetic(schedule, whole, rank)[num_trained % per_epoch :]
            assert expected == rows_by_arithmetic(again, place, rank)
            assert expected[0][0] == (state["next_row_groups"][rank], state["next_offsets"][rank])
        left = [
            row
            for rank in range(settings["world_size"])
            for batch in rows_by_arithmetic(again, place, rank)
            for row in batch
        ]
        if len(left) >= other.world_size:
            place = other.place_of(state)
            ranks = [rows_by_arithmetic(other, place, rank) for rank in range(other.world_size)]
            assert sorted(left) == sorted(row for batches in ranks for batch in batches for row in batch)
            assert len({len(batches) for batches in ranks}) == 1
            num_redivided += other != schedule
    assert num_redivided > 500


def test_a_state_of_other_data_is_refused_and_says_what_differs(numbered: Path, tmp_path: Path) -> None:
    state = reader(numbered, shuffle_row_groups=True).state_dict(3)
    columns = {"label": [0] * 6, "x": [0.0] * 6, "id": [0] * 6, "lists": [[0]] * 6}
    other = write(tmp_path / "other.parquet", columns, [3, 3])
    with pytest.raises(DataError, match="num_row_groups 5, here 2; row_group_sizes"):
        reader(other, shuffle_row_groups=True).load_state_dict(state)
    with pytest.raises(DataError, match=r"order: seed 0, here 1\. Give"):
        reader(numbered, shuffle_row_groups=True, seed=1).load_state_dict(state)
    with pytest.raises(DataError, match="shuffle_row_groups True, here False"):
        reader(numbered).load_state_dict(state)
    with pytest.raises(DataError, match=r"rows \[0, 32\], here \[0, 9\]"):
        reader(numbered, shuffle_row_groups=True, rows=(0, 9)).load_state_dict(state)


@pytest.mark.parametrize("state", [{}, {"epoch": 1}, {"epoch": "x", "parts": []}, {"epoch": 0, "parts": [[[1]]]}, 7])
def test_what_is_no_state_is_refused(numbered: Path, state: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="where a state of ParquetBatches was expected"):
        reader(numbered).load_state_dict(state)


def test_a_state_whose_rows_do_not_exist_is_refused(numbered: Path) -> None:
    for change in ([[[5, 3]]], [[]], [], [[[0, 3]], [[3, 5]]]):
        with pytest.raises(DataError, match="where a state of ParquetBatches was expected"):
            reader(numbered).load_state_dict(reader(numbered).state_dict(0) | {"parts": change})
    with pytest.raises(DataError, match=r"rows \[0, 33\) are left, an epoch has \[0, 32\)"):
        reader(numbered).load_state_dict(reader(numbered).state_dict(0) | {"parts": [[[0, 33]]]})
    with pytest.raises(DataError, match="format 2"):
        reader(numbered).load_state_dict(reader(numbered).state_dict(0) | {"format": 2})


def test_too_few_rows_left_for_more_ranks_are_refused(numbered: Path) -> None:
    state = reader(numbered, batch_size=10).state_dict(3)
    with pytest.raises(DataError, match="2 rows are left of epoch 0, 4 ranks need at least one each"):
        reader(numbered, world_size=4).load_state_dict(state)
    reader(numbered, world_size=2).load_state_dict(state)


# Ids ahead


def test_ids_ahead_are_those_of_the_batches_and_disturb_nothing(numbered: Path) -> None:
    batches, twin = reader(numbered, shuffle_row_groups=True), reader(numbered, shuffle_row_groups=True)
    expected, after = epoch(twin), epoch(twin)
    iterator = iter(batches)
    assert rows_of(next(iterator)) == expected[0]
    for num_skipped in range(9):
        ahead = list(batches.ids_ahead(num_skipped))
        for rows, batch in zip(expected[1 + num_skipped :], ahead, strict=True):
            check_features(rows, batch.sparse_features)
            assert batch.dense_features.shape == (len(rows), 0)
            assert batch.labels.shape == (0,)
    assert [rows_of(batch) for batch in iterator] == expected[1:]
    for rows, batch in zip(after, batches.ids_ahead(), strict=True):  # the next epoch is next
        check_features(rows, batch.sparse_features)
    assert epoch(batches) == after


def test_ids_ahead_read_no_labels_and_no_dense_features(numbered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = parquet.ParquetFile.read_row_group

    def noted(self: Any, index: int, columns: list[str], **settings: Any) -> Any:
        read.extend(columns)
        return real(self, index, columns=columns, **settings)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", noted)
    batches = reader(numbered)
    assert len(list(batches.ids_ahead())) == len(batches)
    assert set(read) == {"id", "lists"}
    epoch(batches)
    assert set(read) == {"id", "lists", "label", "x"}


def test_ids_ahead_begin_where_a_state_was_loaded(numbered: Path) -> None:
    batches = reader(numbered)
    expected = epoch(batches)
    batches.load_state_dict(batches.state_dict(5))
    for rows, batch in zip(expected[5:], batches.ids_ahead(), strict=True):
        check_features(rows, batch.sparse_features)


# Values, against plain Python


def fnv1a(text: str | bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in text.encode() if isinstance(text, str) else text:
        value = (value ^ byte) * 0x100000001B3 % (1 << 64)
    return value


def ids_by_python(cell: Any, rows: int | None, fill: int | None = None) -> list[int]:
    if not isinstance(cell, list):
        cell = [fill if cell is None else cell]
    numbers = [fnv1a(each) if isinstance(each, str | bytes) else each for each in cell if each is not None]
    return numbers if rows is None else [number % rows for number in numbers]


def random_texts(rng: random.Random) -> list[str]:
    return ["".join(rng.choices("abäß\0 ", k=rng.choice([0, 1, 7, 8, 9, 60]))) for _ in range(40)]


INTEGERS = [pyarrow.int8(), pyarrow.uint8(), pyarrow.int16(), pyarrow.uint16(), pyarrow.int32(), pyarrow.uint32(),
            pyarrow.int64(), pyarrow.uint64()]  # fmt: skip


@dataclass
class Kind:
    """A type of column, and what its cells are drawn from."""

    type: Any
    values: list[Any] = field(default_factory=list)


def kinds() -> Iterator[Any]:
    rng = random.Random(7)
    for kind in INTEGERS:
        bits, is_signed = kind.bit_width, pyarrow.types.is_signed_integer(kind)
        low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if is_signed else (0, (1 << bits) - 1)
        yield pytest.param(Kind(kind, [low, high, 0, 1, *(rng.randint(low, high) for _ in range(60))]), id=str(kind))
    texts = random_texts(rng)
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        yield pytest.param(Kind(kind, texts), id=str(kind)[:20])
    for kind in (pyarrow.binary(), pyarrow.large_binary()):
        yield pytest.param(Kind(kind, [text.encode() for text in texts]), id=str(kind))


@pytest.mark.parametrize("share_missing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [1, 7, 1000, 1 << 31, (1 << 40) + 7])
@pytest.mark.parametrize("kind", kinds())
def test_ids_are_those_of_plain_python(tmp_path: Path, kind: Kind, rows: int, share_missing: float) -> None:
    rng = random.Random(rows)

    def cell() -> Any:
        return None if rng.random() < share_missing else rng.choice(kind.values)

    def bag() -> Any:
        return None if rng.random() < share_missing / 2 else [cell() for _ in range(rng.randrange(4))]

    num_rows = 90
    cells = {"a": [cell() for _ in range(num_rows)], "b": [bag() for _ in range(num_rows)]}
    cells["c"], cells["d"], cells["e"] = cells["b"], [[cell(), cell()] for _ in range(num_rows)], cells["a"]
    listed = [
        kind.type,
        pyarrow.list_(kind.type),
        pyarrow.large_list(kind.type),
        pyarrow.list_(kind.type, 2),
        kind.type,
    ]
    columns = {
        name: pyarrow.array(values, type=each) for (name, values), each in zip(cells.items(), listed, strict=True)
    }
    label = pyarrow.array([1] * num_rows)
    path = write(tmp_path / "a.parquet", columns | {"label": label}, [40, 1, 49])
    for fill in (None, 3):
        batches = ParquetBatches(
            path, label="label", dense=[], sparse=list(cells), batch_size=13, hash_sizes=rows, fill_missing=fill
        )
        for first, batch in zip(range(0, num_rows, 13), batches, strict=True):
            for name, values in cells.items():
                expected = [ids_by_python(value, rows, fill) for value in values[first : first + 13]]
                expected = (
                    [
                        [] if value is None else ids
                        for value, ids in zip(values[first : first + 13], expected, strict=True)
                    ]
                    if name in "bcd"
                    else expected
                )
                assert [len(ids) for ids in expected] == batch.sparse_features[name].lengths().tolist()
                assert list(itertools.chain(*expected)) == batch.sparse_features[name].values().tolist()


def test_ids_as_they_are_may_be_anything_of_64_bits(tmp_path: Path) -> None:
    values = {"a": [-(1 << 63), -1, None, 5], "b": pyarrow.array([0, (1 << 63) - 1, 1, None], type=pyarrow.uint64())}
    path = write(tmp_path / "a.parquet", values | {"label": [0.5, 1.5, 0.0, -1.0]})
    (batch,) = ParquetBatches(path, label="label", dense=[], sparse=["a", "b"], batch_size=4, hash_sizes={})
    assert batch.sparse_features.values().tolist() == [-(1 << 63), -1, 5, 0, (1 << 63) - 1, 1]
    assert batch.sparse_features.lengths().tolist() == [1, 1, 0, 1, 1, 1, 1, 0]
    assert torch.equal(torch.tensor([0.5, 1.5, 0.0, -1.0], dtype=torch.float32), batch.labels)
    assert batch.dense_features.shape == (4, 0)


@pytest.mark.parametrize("kind", [*INTEGERS, pyarrow.float32(), pyarrow.float64()], ids=str)
def test_dense_values_are_those_of_numpy_to_the_bit(tmp_path: Path, kind: Any) -> None:
    rng = random.Random(0)
    high = (1 << min(kind.bit_width, 63) - 1) - 1 if pyarrow.types.is_integer(kind) else 1 << 20
    low = -high if not pyarrow.types.is_unsigned_integer(kind) else 0
    values = [0, 1, 2, high, low, *(rng.randint(low, high) >> rng.randint(0, 60) for _ in range(20_000))]
    missing = [None if rng.random() < 0.2 else value for value in values]
    columns = {"a": pyarrow.array(values, type=kind), "b": pyarrow.array(missing, type=kind)}
    path = write(tmp_path / "a.parquet", columns | {"label": [0] * len(values), "id": [0] * len(values)})
    read = {"label": "label", "dense": ["a", "b"], "sparse": ["id"], "batch_size": len(values)}
    (plain,) = ParquetBatches(path, **read)
    (logged,) = ParquetBatches(path, **read, dense_transform="log1p")
    for index, cells in enumerate((values, [value or 0 for value in missing])):
        as_read = np.array(cells, dtype=kind.to_pandas_dtype())
        assert np.array_equal(as_read.astype(np.float32), plain.dense_features[:, index].numpy())
        in_64_bits = as_read.astype(np.int64 if pyarrow.types.is_integer(kind) else np.float64)
        expected = np.log1p(np.maximum(in_64_bits, 0)).astype(np.float32)
        assert np.array_equal(expected, logged.dense_features[:, index].numpy())


# Files


def test_directories_globs_and_lists_of_files(tmp_path: Path) -> None:
    for number, name in enumerate(["b", "a", "c/d"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{name}.parquet", {"label": [number] * 2, "id": [number] * 2})
    (tmp_path / "_SUCCESS").touch()

    def labels(paths: Any) -> list[int]:
        batches = ParquetBatches(paths, label="label", dense=[], sparse=["id"], batch_size=2)
        return [int(batch.labels[0]) for batch in batches]

    assert labels(tmp_path) == [1, 0, 2]
    assert labels(str(tmp_path / "*.parquet")) == [1, 0]
    assert labels([tmp_path / "c", tmp_path / "b.parquet"]) == [2, 0]


def test_urls_of_fsspec(numbered: Path) -> None:
    system = fsspec.filesystem("memory")
    for name in ("b", "a"):
        system.pipe(f"/set/{name}.parquet", numbered.read_bytes())
    expected = epoch(reader([numbered, numbered]))
    try:
        for url in ("memory://set", "memory://set/*.parquet", ["memory://set/b.parquet", "memory://set/a.parquet"]):
            assert expected == epoch(reader(url, num_readers=2))
        with pytest.raises(DataError, match=r"memory://nothing: no Parquet file there"):
            reader("memory://nothing")
        with pytest.raises(DataError, match="storage_options"):
            reader("no_such_protocol://set")
    finally:
        system.rm("/set", recursive=True)


def test_storage_options_are_passed_on(numbered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    real = fsspec.core.url_to_fs
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, **options: (given.append(options), real(url))[1])
    reader(f"file://{numbered}", storage_options={"key": "value"})
    assert given == [{"key": "value"}]


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, needs a whole number of at least 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"world_size": 0}, "world_size is 0"),
        ({"num_readers": 0}, "num_readers is 0"),
        ({"rank": 1}, r"rank is 1, needs to be in \[0, 1\)"),
        ({"rank": -1}, "rank is -1"),
        ({"world_size": 33}, "32 rows, 33 ranks need at least one each"),
        ({"dense_transform": "sqrt"}, "dense_transform is 'sqrt', needs one of"),
        ({"sparse": []}, "needs at least one column"),
        ({"sparse": ["id", "id"]}, "each once"),
        ({"hash_sizes": {"other": 3}}, "hash_sizes names other, sparse has id, lists"),
        ({"hash_sizes": 0}, "hash_sizes of id is 0"),
        ({"hash_sizes": np.int64(-5)}, "hash_sizes of id is -5"),
        ({"rows": (3, 99)}, r"rows is \[3, 99\), the files have \[0, 32\)"),
        ({"label": "click"}, r"numbered.parquet: no column click, it has label, x, id, lists"),
        ({"dense": ["lists"]}, "column lists: its type is list<.*>, needs integers or floats"),
        ({"sparse": ["x"]}, "column x: its type is double, needs integers, strings, bytes or lists of these"),
        ({"label": "lists"}, "column lists: its type is"),
    ],
)
def test_settings_that_cannot_be_used(numbered: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        reader(numbered, **settings)


def test_counts_of_batches_below_zero_are_refused(numbered: Path) -> None:
    with pytest.raises(DataError, match="num_batches_trained is -1"):
        reader(numbered).state_dict(-1)
    with pytest.raises(DataError, match="num_skipped is -1"):
        reader(numbered).ids_ahead(-1)


def test_paths_without_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no.parquet", tmp_path / "*.parquet"):
        with pytest.raises(DataError, match=r"no Parquet file there"):
            reader(path)
    with pytest.raises(DataError, match="paths is empty"):
        reader([])


def test_files_that_differ_are_named(numbered: Path, tmp_path: Path) -> None:
    columns = {"label": [0], "x": [0.0], "id": pyarrow.array([0], type=pyarrow.int32()), "lists": [[0]]}
    other = write(tmp_path / "other.parquet", columns)
    with pytest.raises(DataError, match=r"other.parquet, column id: its type is int32, .*numbered.parquet has int64"):
        reader([numbered, other])
    reader([numbered, other], sparse=["lists"])  # a column that is not read may be anything


def test_a_file_cut_short_and_what_is_no_parquet(numbered: Path, tmp_path: Path) -> None:
    for name, content in {"short": numbered.read_bytes()[:-20], "text": b"label\n1\n", "empty": b""}.items():
        (tmp_path / f"{name}.parquet").write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}.parquet: cannot be read as Parquet .* Is it whole"):
            reader(tmp_path / f"{name}.parquet")


@pytest.mark.parametrize("num_readers", [1, 3])
def test_a_damaged_page_is_an_error_at_the_batch_that_needs_it(numbered: Path, num_readers: int) -> None:
    column = parquet.read_metadata(numbered).row_group(2).column(2)
    assert column.path_in_schema == "id"
    content = bytearray(numbered.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    for index in range(start + 30, start + column.total_compressed_size):
        content[index] ^= 0xFF
    numbered.write_bytes(content)
    batches = iter(reader(numbered, num_readers=num_readers))
    assert [rows_of(next(batches)) for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(DataError, match=r"numbered.parquet, row group 2, column id: cannot be read"):
        next(batches)
    assert threads() == []


def test_a_flipped_bit_is_noticed_where_the_file_has_checksums(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for has_checksums in (True, False):
        table = pyarrow.table({"label": [0] * 9, "id": [0x1234567890] * 9})
        plain: dict[str, Any] = {"use_dictionary": False, "compression": "none", "write_statistics": False}
        parquet.write_table(table, path, write_page_checksum=has_checksums, **plain)
        content = path.read_bytes()
        value = (0x1234567890).to_bytes(8, "little")
        path.write_bytes(content.replace(value, (0x1234567891).to_bytes(8, "little"), 1))
        batches = ParquetBatches(path, label="label", dense=[], sparse=["id"], batch_size=9)
        if has_checksums:
            with pytest.raises(DataError, match=r"a.parquet, row group 0, column id: cannot be read .*checksum"):
                list(batches)
        else:  # control: nothing else would notice
            assert len(list(batches)) == 1


def test_strings_need_a_hash_size(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"label": [0], "id": ["x"]})
    with pytest.raises(
        DataError, match=r"column id: it has string, which needs to be hashed\. Give its rows in hash_sizes"
    ):
        ParquetBatches(path, label="label", dense=[], sparse=["id"], batch_size=1, hash_sizes={})


def test_values_that_cannot_be_used_name_file_row_group_and_column(tmp_path: Path) -> None:
    def check(columns: dict[str, Any], message: str, **settings: Any) -> None:
        path = write(tmp_path / "a.parquet", columns, [1, 1])
        batches = ParquetBatches(path, label="label", dense=[], sparse=["id"], batch_size=1, **settings)
        with pytest.raises(DataError, match=rf"a.parquet, row group 1, column {message}"):
            list(batches)

    large = pyarrow.array([0, 1 << 63], type=pyarrow.uint64())
    check({"label": [0, 0], "id": large}, r"id: it has the id 9223372036854775808, above 2\^63 - 1. Give hash_sizes")
    check({"label": [0, None], "id": [0, 0]}, "label: 1 labels are missing")
    check({"label": [0, 1 << 40], "id": [0, 0]}, "label: a label does not fit int32")
    small = pyarrow.array([0, None], type=pyarrow.int8())
    check({"label": [0, 0], "id": small}, "id: fill_missing is 300, which int8 cannot hold", fill_missing=300)


def test_what_is_not_installed_is_named(numbered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "fsspec", None)
    with pytest.raises(
        DataError, match=r"needs fsspec, which is missing. Run: pip install torchrec-scratchpipe\[parquet\]"
    ):
        reader("memory://set")
    monkeypatch.setattr(arrow, "pyarrow", None)
    with pytest.raises(
        DataError, match=r"needs pyarrow, which is missing. Run: pip install torchrec-scratchpipe\[parquet\]"
    ):
        reader(numbered)


# Memory


@pytest.mark.parametrize("num_readers", [1, 2])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, num_readers: int) -> None:
    """Arrow's pool has both what is decoded and what is ready for batches."""
    rows_per_group, num_groups = 20_000, 30
    numbers = np.random.default_rng(0).integers(0, 1 << 60, rows_per_group * num_groups)
    columns: dict[str, Any] = {f"c{index}": numbers for index in range(8)}
    path = write(tmp_path / "a.parquet", columns | {"label": numbers % 2}, [rows_per_group] * num_groups)
    before = pyarrow.total_allocated_bytes()
    # Ids that are hashed: decoded beside their result, 8 bytes each.
    group_bytes = 2 * 8 * 9 * rows_per_group
    batches = ParquetBatches(
        path, label="label", dense=[], sparse=list(columns), batch_size=3000, hash_sizes=1000, num_readers=num_readers
    )
    peak = 0
    for _ in batches:
        peak = max(peak, pyarrow.total_allocated_bytes() - before)
    # Any of the pieces that are on their way may be one that Arrow is at: it takes up to 1.35 of what comes of it.
    assert group_bytes / 3 < peak <= 1.35 * (num_readers + 2) * group_bytes
    assert pyarrow.total_allocated_bytes() == before
