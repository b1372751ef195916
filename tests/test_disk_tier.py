# SPDX-License-Identifier: BSD-3-Clause
"""Tables on a disk: rows of them that wait in RAM and in a log, pages that are asked for, and disks that fail."""

import contextlib
import ctypes
import errno
import hashlib
import itertools
import json
import mmap
import os
import random
import re
import runpy
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from core_helpers import CPU, LAYOUT, expected_parts, make_pool, max_diff, planned, random_rows, run, train
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import end, start
from torch import Tensor

from torchrec_scratchpipe.core import disk, disk_reads, disk_rows, row_log, row_tier, stages
from torchrec_scratchpipe.core.disk import LogFile, MappedStorage, RamBudget, page_ranges
from torchrec_scratchpipe.core.disk_reads import DiskReader, Pieces, ReadFile
from torchrec_scratchpipe.core.disk_rows import DiskRows, RowsAhead
from torchrec_scratchpipe.core.host_table import HostTable
from torchrec_scratchpipe.core.pool import Pool
from torchrec_scratchpipe.core.row_log import Records, RowLog
from torchrec_scratchpipe.core.row_tier import HOME, LOG, PLACE_BYTES, RowTier
from torchrec_scratchpipe.core.rows import RowLayout, StateSpec, TableSpec, write_rows
from torchrec_scratchpipe.core.runner import OverlappedStageRunner
from torchrec_scratchpipe.errors import TableStorageError
from torchrec_scratchpipe.planning import disk_speed

pytestmark = pytest.mark.any_torchrec

TABLES = [TableSpec("a", 5, 0.5), TableSpec("b", 7, 0.5)]
LAYOUTS = [
    LAYOUT,
    RowLayout(4, torch.float16),
    RowLayout(
        4, torch.float16, (StateSpec("m", is_rowwise=True, dtype=torch.float16), StateSpec("v", is_rowwise=False))
    ),
    RowLayout(8, torch.float32, (StateSpec("m", is_rowwise=False), StateSpec("v", is_rowwise=True))),
]


def ram_of(num_rows: int) -> RamBudget:
    """A budget in which so many rows of :data:`LAYOUT` find room."""
    return RamBudget(num_rows * (Records(LAYOUT).num_bytes + PLACE_BYTES))


class Disk:
    """Files that fail when they are told to."""

    def __init__(self) -> None:
        self.code = 0

    def open(self, num_bytes: int) -> LogFile:
        fail = self.fail

        class File(LogFile):
            def reserve(self, first: int, num_bytes: int) -> None:
                fail((errno.ENOSPC,))
                super().reserve(first, num_bytes)

            def write(self, first: int, values: Tensor) -> None:
                super().write(first, values[: len(values) // 2])
                fail((errno.ENOSPC, errno.EIO))
                super().write(first, values)

            def read(self, first: int, num_bytes: int) -> Tensor:
                fail((errno.EIO, errno.ENXIO))
                return super().read(first, num_bytes)

        return File(Path("/tmp"), num_bytes)

    def fail(self, codes: tuple[int, ...]) -> None:
        if self.code in codes:
            raise OSError(self.code, os.strerror(self.code))


NUM_ROWS = 30
ROWS = st.sets(st.integers(0, NUM_ROWS - 1), min_size=1)
STEPS = st.one_of(
    st.tuples(st.sampled_from(["write", "write", "write", "read"]), ROWS),
    st.tuples(st.sampled_from(["drain", "break", "break reads", "fill up", "mend"]), st.just({0})),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(STEPS, max_size=40),
    st.integers(1, NUM_ROWS),
    st.integers(1, 6),
    st.integers(1, 12),
    st.sampled_from(LAYOUTS),
)
def test_row_tier_law(
    steps: list[tuple[str, set[int]]], num_places: int, segment_rows: int, together: int, layout: RowLayout
) -> None:
    """Whatever is written is what is read, and after a drain it is in the table; whatever the disk does meanwhile."""
    records, device = Records(layout), Disk()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_log, "SEGMENT_BYTES", segment_rows * records.num_bytes)
        patch.setattr(row_log, "NUM_SPARE_SEGMENTS", 1)
        patch.setattr(row_tier, "DRAIN_BYTES", together * records.num_bytes)
        for name in ("MIN_SWEEP", "SCAN_ROWS", "PAGED_ROWS"):
            patch.setattr(row_tier, name, together)
        parts = [torch.zeros(shape, dtype=dtype) for shape, dtype, _ in layout.part_shapes(NUM_ROWS)]
        expected = [part.clone() for part in parts]

        def write_home(rows: Tensor, values: list[Tensor]) -> None:
            device.fail((errno.EIO,))
            write_rows(parts, rows, values)

        tier = RowTier(
            write_home,
            DiskReader(),
            layout,
            NUM_ROWS,
            lambda: num_places * (records.num_bytes + PLACE_BYTES),
            device.open,
        )
        for step, (kind, chosen) in enumerate(steps, start=1):
            rows = torch.tensor(sorted(chosen))
            device.code = {"break": errno.EIO, "break reads": errno.ENXIO, "fill up": errno.ENOSPC, "mend": 0}.get(
                kind, device.code
            )
            if kind == "write":
                values = [torch.full_like(part[rows], float(step)) for part in parts]
                try:
                    tier.write(rows, values)
                except OSError:  # some may have been taken in, and no older row is lost
                    assert device.code in (errno.EIO, errno.ENXIO)
                    device.code = 0
                    tier.write(rows, values)
                write_rows(expected, rows, values)
            elif kind == "read":
                check_read(tier, parts, expected, rows)
            elif kind == "drain":
                drain(tier, device)
                assert max_diff(expected, parts) == 0.0
            check_books(tier)
            check_read(tier, parts, expected, torch.arange(NUM_ROWS))
        device.code = 0
        tier.drain()
        check_books(tier)
        assert tier.is_empty
        assert max_diff(expected, parts) == 0.0


def drain(tier: RowTier, device: Disk) -> None:
    try:
        tier.drain()
    except OSError:
        device.code = 0
        tier.drain()


def check_read(tier: RowTier, parts: list[Tensor], expected: list[Tensor], rows: Tensor) -> None:
    out = [part[rows] for part in parts]
    for part in out:
        part.fill_(-1.0)
    where = tier.where(rows)
    places = [(chosen.nonzero().view(-1)) for chosen in (where >= 0, where == HOME, where <= LOG)]
    in_ram, at_home, in_log = places
    assert sum(map(len, places)) == len(rows)
    write_rows(out, in_ram, tier.read_ram(where[in_ram]))
    write_rows(out, at_home, [part[rows[at_home]] for part in parts])
    if len(in_log):
        (pieces,), _ = tier._reader.read([tier.pieces_of_log(where[in_log])])
        write_rows(out, in_log, tier.unpack(pieces))
    assert max_diff([part[rows] for part in expected], out) == 0.0


def check_books(tier: RowTier) -> None:
    """Each place and each record has one row or none, and what counts them is right."""
    where = tier._where
    places = where[where >= 0].tolist()
    free = tier._free_places[: tier._num_free]
    assert sorted([*places, *free.tolist()]) == list(range(len(tier._records)))
    assert (tier._states[places] > 0).all()
    assert tier._num_newer == int((~tier._is_copy[places]).sum())
    assert (tier._states[free.long()] == 0).all()
    if tier._log is not None:
        log, positions = tier._log, LOG - where[where <= LOG].long()
        assert len(set(positions.tolist())) == len(positions) == log.num_live
        counted = torch.bincount(positions // log._segment, minlength=len(log._num_live))
        assert counted.tolist() == log._num_live.tolist()
        segments = [*log._free, *log._closed, *([] if log._open is None else [log._open])]
        assert sorted(segments) == list(range(log._num_taken))
    assert bool(((where == HOME) | (where >= 0) | (where <= LOG)).all())


def test_a_write_that_fails_half_way_takes_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records(LAYOUT)
    log = RowLog(records, NUM_ROWS, MappedStorage(tmp_path).open_log)
    rows = records.pack(torch.arange(40), [torch.ones(40, 4), torch.ones(40)])  # more than a segment of 30
    write = LogFile.write

    def fail_in_second_segment(self: LogFile, first: int, values: Tensor) -> None:
        if first >= NUM_ROWS * records.num_bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write(self, first, values)

    with monkeypatch.context() as patch:
        patch.setattr(LogFile, "write", fail_in_second_segment)
        for _ in range(20):
            with pytest.raises(OSError, match="Input/output error"):
                log.append(rows)
    assert log.append(rows).tolist() == list(range(40))


def test_a_log_writes_few_more_bytes_than_rows_and_keeps_to_its_size(tmp_path: Path) -> None:
    num_rows, num_places = 4000, 400
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_log, "SEGMENT_BYTES", 64 * Records(LAYOUT).num_bytes)
        table = HostTable([TableSpec("t0", num_rows, 0.1)], LAYOUT, MappedStorage(tmp_path, ram_of(num_places)))
        tier = table._disk_rows.tier
        assert tier is not None
        generator = torch.Generator().manual_seed(0)
        for _ in range(1000):
            rows = (torch.rand(100, generator=generator) * num_rows).long().unique()
            table.write(rows, [torch.rand(len(rows), 4), torch.rand(len(rows))])
            assert tier._log is None or tier._log._num_taken * 64 <= 2 * num_rows + 8 * 64
    assert tier.num_passed_on > 50_000
    assert tier.num_log_bytes_written <= 1.5 * tier.num_passed_on * Records(LAYOUT).num_bytes


def train_through(pool: Pool, batches: list[Tensor], mend: Callable[[], None]) -> list[str]:
    """Train all batches, and again those that a disk has failed, after it is mended; returns the errors."""
    runner, errors = OverlappedStageRunner(CPU), []
    for rows in batches:
        is_trained = False
        while not is_trained:
            batch = planned(pool, rows, runner)
            runner.submit(batch)
            try:
                slots = runner.wait(batch)
            except TableStorageError as error:
                errors.append(str(error))
                mend()
                continue
            train(pool.scratchpad.parts, slots)
            runner.release(batch, is_updated=True)
            is_trained = True
    is_flushed = False
    while not is_flushed:
        try:
            with runner.between_batches():
                pool.flush()
            is_flushed = True
        except TableStorageError as error:
            errors.append(str(error))
            mend()
    return errors


@pytest.mark.parametrize(("call", "share"), [("write", 0.1), ("read", 0.5)])
def test_a_disk_that_fails_is_an_error_that_names_tables_and_nothing_is_lost(
    call: str, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_log, "SEGMENT_BYTES", 4 * Records(LAYOUT).num_bytes)
    original, die = getattr(LogFile, call), random.Random(0)

    def fail_sometimes(self: LogFile, *args: Any) -> Any:
        if die.random() < share:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(self, *args)

    monkeypatch.setattr(LogFile, call, fail_sometimes)
    pool = make_pool(storage=MappedStorage(tmp_path, ram_of(8)))
    batches = random_rows(num_batches=150, ids_per_batch=6)
    expected = expected_parts(pool, batches)
    errors = train_through(pool, batches, lambda: None)
    assert max_diff(expected, pool.host_table.parts) == 0.0
    assert len(errors) >= 2
    assert all(re.match(r"tables t0: rows cannot be moved .* \(Input/output error\)", error) for error in errors)
    assert all(str(tmp_path) in error for error in errors)


def test_a_disk_without_room_for_a_log_costs_time_and_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: LogFile, first: int, num_bytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LogFile, "reserve", refuse)
    pool = make_pool(storage=MappedStorage(tmp_path, ram_of(8)))
    batches = random_rows(num_batches=100, ids_per_batch=6)
    expected = expected_parts(pool, batches)
    assert train_through(pool, batches, lambda: None) == []
    assert max_diff(expected, pool.host_table.parts) == 0.0
    stats = pool.stats()
    assert stats.num_disk_rows_read > 100
    assert stats.disk_bytes_written > 100 * LAYOUT.row_bytes
    assert sum("no space for a log of rows" in record.getMessage() for record in caplog.records) == 1


def test_a_file_that_is_cut_is_an_error_and_does_not_end_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[int] = []
    original = disk._map
    monkeypatch.setattr(disk, "_map", lambda file, size: (files.append(os.dup(file)), original(file, size))[1])
    storage = MappedStorage(tmp_path)
    can_bring_in = has_populate(storage)
    files.clear()
    table = HostTable([TableSpec("t0", 4000, 0.5)], LAYOUT, storage)
    for part in table.parts:
        part.fill_(1.0)
    size = os.fstat(files[0]).st_size
    os.ftruncate(files[0], mmap.PAGESIZE)
    out = LAYOUT.empty(2)
    with pytest.raises(
        TableStorageError, match=r"tables t0: rows cannot be moved .* \(the disk failed, or a file was cut"
    ):
        table.read(torch.tensor([5, 3999]), out)
    if not can_bring_in:
        pytest.skip("this system cannot bring pages in, and ends a process that writes to a file which was cut")
    table.write(torch.tensor([5, 3999]), [torch.zeros(2, 4), torch.zeros(2)])
    with pytest.raises(TableStorageError, match=r"tables t0: rows cannot be moved"):
        table.drain()
    os.ftruncate(files[0], size)
    table.drain()
    table.read(torch.tensor([3999]), [part[:1] for part in out])
    assert float(out[0][0].sum()) == 0.0
    for file in files:
        os.close(file)


def has_populate(storage: MappedStorage) -> bool:
    part = storage.allocate(1024, torch.float32, "a test")
    storage.bring_in(page_ranges(part.view(-1, 1), torch.arange(1024)))
    return bool(storage._bring_in._ways)


def test_insert_touches_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch whose victims had found no room would fail half-way."""
    in_insert = False
    original = stages.insert

    def insert(*args: Any) -> None:
        nonlocal in_insert
        in_insert = True
        original(*args)
        in_insert = False

    def write(self: LogFile, first: int, values: Tensor, write: Any = LogFile.write) -> None:
        assert not in_insert
        write(self, first, values)

    monkeypatch.setattr(stages, "insert", insert)
    monkeypatch.setattr(LogFile, "write", write)
    pool = make_pool(storage=MappedStorage(tmp_path, ram_of(8)))
    run(pool, random_rows(num_batches=100, ids_per_batch=6), OverlappedStageRunner(CPU), lookahead=2)
    assert pool.stats().disk_bytes_written > 0


LARGE_ROWS, LARGE_LAYOUT = 1_400_000, RowLayout(64, torch.float32, (StateSpec("sum", is_rowwise=True),))
MEMORY_BYTES = 230_000_000


def train_large_table(table_dir: str | None, group: str | None, result: str) -> None:
    """A table of 364 MB, in memory for less than two thirds of it if there is a group; in a process of its own."""
    if group is not None:
        (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
    torch.set_num_threads(1)
    storage = None if table_dir is None else MappedStorage(table_dir, RamBudget(16_000_000))
    pool = make_pool(LARGE_ROWS, 30_000, storage=storage, layout=LARGE_LAYOUT)
    runner, peak = OverlappedStageRunner(CPU), 0
    for number, rows in enumerate(random_rows(num_batches=24, ids_per_batch=8_000, num_rows=LARGE_ROWS)):
        batch = planned(pool, rows, runner)
        runner.submit(batch)
        if number == 12 and storage is not None:
            storage.forget_pages()
        train(pool.scratchpad.parts, runner.wait(batch))
        runner.release(batch, is_updated=True)
    stats = pool.stats()
    with runner.between_batches():
        pool.flush()
    digest = hashlib.sha256()
    for part in pool.host_table.parts:
        for some in part.split(1 << 16):
            digest.update(some.numpy().tobytes())
    if group is not None:  # of both kinds of control groups
        names = ("memory.max_usage_in_bytes", "memory.peak")
        peak = next(int((Path(group) / name).read_text()) for name in names if (Path(group) / name).exists())
    counts = [stats.num_disk_rows_read, stats.disk_bytes_written, stats.num_victims, peak]
    Path(result).write_text(json.dumps({"digest": digest.hexdigest(), "counts": counts}))


def test_a_table_larger_than_memory_has_the_same_bits(tmp_path: Path) -> None:
    benchmark = Path(__file__).parent.parent / "examples" / "benchmark" / "disk_tier.py"
    memory_limit = runpy.run_path(str(benchmark))["memory_limit"]
    found = []
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(memory_limit(MEMORY_BYTES))
        except SystemExit as reason:
            pytest.skip(str(reason))
        for directory, in_group in ((None, None), (str(tmp_path), str(group))):
            result = tmp_path / f"{directory is None}.json"
            assert end(start(train_large_table, directory, in_group, str(result)), 300) == 0
            found.append(json.loads(result.read_text()))
    in_ram, on_disk = found
    assert in_ram["digest"] == on_disk["digest"]
    num_rows_read, num_bytes_written, num_victims, peak = on_disk["counts"]
    assert num_victims == in_ram["counts"][2] > 100_000
    assert num_rows_read > 100_000
    assert num_bytes_written > 20_000_000
    assert 0 < peak <= MEMORY_BYTES < LARGE_ROWS * LARGE_LAYOUT.row_bytes / 1.5


def test_several_tables_share_the_ram(tmp_path: Path) -> None:
    storage = MappedStorage(tmp_path, ram_of(40))
    small, large = (HostTable([TableSpec("t", num_rows, 0.1)], LAYOUT, storage) for num_rows in (100, 300))
    for table in (small, large):
        rows = torch.arange(80)
        table.write(rows, [torch.zeros(80, 4), torch.zeros(80)])
    assert [len(table._disk_rows.tier._records) for table in (small, large) if table._disk_rows.tier] == [10, 30]


def test_the_disk_is_measured_and_the_file_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    arguments = [str(tmp_path), "--seconds", "0.4", "--file_gb", "0.04", "--json", str(figures)]
    if disk_speed.main(arguments):
        pytest.skip(f"{tmp_path} is no disk: {capsys.readouterr().err}")
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    speed = json.loads(figures.read_text())
    assert speed["file_bytes"] == int(0.04 * 1024**3) // mmap.PAGESIZE * mmap.PAGESIZE
    assert min(speed["reads_per_s"].values()) > 0
    assert f"--disk_reads_per_s {max(speed['reads_per_s'].values()):.0f}" in capsys.readouterr().out


def test_a_directory_that_is_no_disk_is_said_to_be_none(capsys: pytest.CaptureFixture[str]) -> None:
    if not os.path.isdir("/dev/shm"):
        pytest.skip("this system has no /dev/shm")
    assert disk_speed.main(["/dev/shm", "--seconds", "0.1", "--file_gb", "0.005"]) == 1
    assert "the file did not leave RAM" in capsys.readouterr().err
    assert disk_speed.main(["/none"]) == 1
    assert "'/none' is not an existing directory" in capsys.readouterr().err


def test_mapped_table_leaves_no_file_name(tmp_path: Path) -> None:
    table = HostTable(TABLES, LAYOUT, MappedStorage(tmp_path))
    assert list(tmp_path.iterdir()) == []
    table.parts[0].fill_(1.0)
    table.persist()
    assert float(table.parts[0].sum()) == 12 * 4


@pytest.mark.parametrize("capacity", [1, 4, 1000])
def test_training_over_a_mapped_table_is_exact(capacity: int, tmp_path: Path) -> None:
    pool = make_pool(storage=MappedStorage(tmp_path, ram_of(capacity)))
    batches = random_rows(num_batches=100, ids_per_batch=6)
    expected = expected_parts(pool, batches)
    run(pool, batches, OverlappedStageRunner(CPU), lookahead=2)
    assert max_diff(expected, pool.host_table.parts) == 0.0
    assert pool.stats().num_victims > 150


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(TableStorageError, match="is not an existing directory"):
        MappedStorage(tmp_path / "missing")


def test_directory_that_takes_no_files() -> None:
    with pytest.raises(TableStorageError, match=r"'/proc' is not writable"):
        MappedStorage("/proc")


def test_disk_without_room_names_table_and_numbers(tmp_path: Path) -> None:
    storage = MappedStorage(tmp_path)
    with pytest.raises(
        TableStorageError, match=r"cannot hold weights of big: it needs 16,000,000,000,000 bytes, .* free"
    ):
        HostTable([TableSpec("big", 10**12, 0.5)], LAYOUT, storage)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(0, 3000), min_size=1), st.sampled_from([4, 256, 260, 4096, 9000]))
def test_ranges_of_pages_are_those_of_the_rows_each_once(rows: set[int], row_bytes: int) -> None:
    page = mmap.PAGESIZE
    part = torch.empty(3001, row_bytes, dtype=torch.uint8)
    ranges = page_ranges(part, torch.tensor(sorted(rows)))
    covered = [int(begin) + at for begin, length in ranges for at in range(0, int(length), page)]
    firsts = [part.data_ptr() + row * row_bytes for row in rows]
    expected = {at // page * page for first in firsts for at in range(first, first + row_bytes)}
    assert covered == sorted(expected)
    assert all(int(a[0] + a[1]) < int(b[0]) for a, b in itertools.pairwise(ranges))


FILE_BYTES = 70_001  # the last block is not whole
WAYS_TO_READ = ("direct", "blocks of 4096", "one by one")


def make_file(path: Path, way: str, patch: pytest.MonkeyPatch) -> tuple[ReadFile, bytes]:
    """A file of random bytes, as a disk of one kind has it."""
    content = random.Random(0).randbytes(FILE_BYTES)
    path.write_bytes(content)
    if way == "one by one":
        patch.setattr(disk_reads, "SYSTEM_CALLS", {})
    if way == "blocks of 4096":
        patch.setattr(disk_reads, "BLOCK_BYTES", (4096,))
    with path.open("rb") as file:
        return ReadFile(file.fileno(), FILE_BYTES), content


@pytest.mark.parametrize("way", WAYS_TO_READ)
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([2, 8, 24, 256, 272, 512, 1000, 9000]), st.lists(st.integers(0), max_size=40)))
)
def test_pieces_of_files_are_what_is_there(way: str, wanted: list[tuple[int, list[int]]]) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        patch.setattr(disk_reads, "MAX_DEPTH", 8)
        file, content = make_file(Path(directory) / "file", way, patch)
        pieces = [
            Pieces(file, torch.tensor([number % (FILE_BYTES // size) * size for number in numbers]).long(), size)
            for size, numbers in wanted
        ]
        found, num_reads = DiskReader().read(pieces)
        for some, values in zip(pieces, found, strict=True):
            expected = [content[begin : begin + some.num_bytes] for begin in some.begins.tolist()]
            assert [bytes(value.tolist()) for value in values] == expected
        assert num_reads <= sum(len(some.begins) for some in pieces)


def test_neighbours_are_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = make_file(tmp_path / "file", "direct", monkeypatch)
    size = file.block_bytes
    begins = torch.tensor([0, 8, size, 2 * size, 20 * size, 20 * size + 8])
    assert DiskReader().read([Pieces(file, begins, 8)])[1] == 2


@pytest.mark.parametrize("way", WAYS_TO_READ)
def test_a_file_that_is_shorter_than_it_was_is_an_error(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, content = make_file(tmp_path / "file", way, monkeypatch)
    os.truncate(tmp_path / "file", 10_000)
    begins = torch.tensor([0, 20_000])
    with pytest.raises(OSError, match="the file was cut"):
        DiskReader().read([Pieces(file, begins, 8)])
    (values,), _ = DiskReader().read([Pieces(file, begins[:1], 8)])
    assert bytes(values[0].tolist()) == content[:8]


def test_an_error_of_the_disk_is_an_error_of_the_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = make_file(tmp_path / "file", "direct", monkeypatch)
    if not file.is_direct:
        pytest.skip("this file system does not read past the page cache")
    run_requests = disk_reads._Queue._run

    def fail(self: Any, requests: Any) -> Any:
        found = run_requests(self, requests)
        found[-1] = -errno.EIO
        return found

    monkeypatch.setattr(disk_reads._Queue, "_run", fail)
    with pytest.raises(OSError, match="Input/output error"):
        DiskReader().read([Pieces(file, torch.tensor([0, 9000]), 8)])


def test_threads_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, content = make_file(tmp_path / "file", "direct", monkeypatch)
    reader = DiskReader()

    def read(seed: int) -> bool:
        begins = torch.randint(FILE_BYTES // 8, (500,), generator=torch.Generator().manual_seed(seed)) * 8
        (values,), _ = reader.read([Pieces(file, begins, 8)])
        return [bytes(value.tolist()) for value in values] == [content[at : at + 8] for at in begins.tolist()]

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(40)))


AHEAD_STEPS = st.one_of(
    st.tuples(st.sampled_from(["write", "write", "leave", "ask", "ask", "read", "collect", "collect"]), ROWS),
    st.tuples(st.sampled_from(["drain", "overwrite", "purge"]), ROWS),
)


@settings(max_examples=250, deadline=None)
@given(st.lists(AHEAD_STEPS, max_size=50), st.integers(1, 10), st.integers(1, 4))
def test_rows_that_were_read_ahead_are_used_only_if_they_are_as_they_were(
    steps: list[tuple[str, set[int]]], num_places: int, segment_rows: int
) -> None:
    check_reading_ahead(steps, num_places, segment_rows)


def check_reading_ahead(steps: list[tuple[str, set[int]]], num_places: int, segment_rows: int) -> None:
    """Whatever happens between asking for rows and needing them, what is read is what was written last."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        patch.setattr(row_log, "SEGMENT_BYTES", segment_rows * Records(LAYOUT).num_bytes)
        patch.setattr(row_log, "NUM_SPARE_SEGMENTS", 1)
        patch.setattr(row_tier, "MIN_SWEEP", 1)
        table = HostTable([TableSpec("t0", NUM_ROWS, 0.5)], LAYOUT, MappedStorage(directory, ram_of(num_places)))
        expected = [part.clone() for part in table.parts]
        asked: list[RowsAhead] = []
        in_scratchpad: set[int] = set()
        is_trained = False  # since all was brought home

        def flush() -> None:
            nonlocal is_trained
            is_trained = False
            resident = torch.tensor(sorted(in_scratchpad)).long()
            table.write(resident, [part[resident] for part in expected])
            table.drain()
            assert max_diff(expected, table.parts) == 0.0

        for step, (kind, chosen) in enumerate(steps, start=1):
            rows = torch.tensor(sorted(chosen))
            values = [torch.full_like(part[rows], float(step)) for part in expected]
            if kind == "ask":
                asked.append(table.read_ahead(rows))
            elif kind == "drain":
                flush()
            elif kind == "write":
                in_scratchpad -= chosen
                is_trained = True
                table.write(rows, values)
                write_rows(expected, rows, values)
            elif kind == "overwrite":
                flush()
                write_rows(table.parts, rows, values)
                write_rows(expected, rows, values)
                assert table.is_overwritten
            if kind in ("read", "overwrite", "collect"):
                absent = set(range(NUM_ROWS)) if kind == "overwrite" else chosen - in_scratchpad
                if not absent:
                    continue
                rows = torch.tensor(sorted(absent)).long()
                ahead = asked.pop(0) if asked else None
                out = [torch.full_like(part[rows], -1.0) for part in expected]
                table.read(rows, out, ahead)
                assert max_diff([part[rows] for part in expected], out) == 0.0
            if kind == "leave":  # as victims that were only looked up
                rows = torch.tensor(sorted(chosen & in_scratchpad)).long()
                table.write(rows, [part[rows] for part in expected])
                in_scratchpad -= chosen
            if kind == "purge" and not is_trained:  # then a pool drops its rows unwritten
                table.drain()
                in_scratchpad.clear()
            if kind == "collect":
                table.hand_over(rows)
                in_scratchpad |= absent
            if kind == "overwrite":
                table.accept_overwrite()


@pytest.mark.parametrize("guard", ["home", "log", "place", "copy"])
def test_hazard_7_a_row_that_was_read_ahead_and_has_changed_is_seen(
    guard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each guard, taken away, lets an old value through."""
    is_as_it_was = DiskRows._is_as_it_was

    def is_taken_for_same(self: DiskRows, ahead: RowsAhead, places: Tensor, where: Tensor) -> Tensor:
        if guard == "home":
            ahead.stamps = self._num_home_writes, ahead.stamps[1]
        elif guard == "log":
            ahead.stamps = ahead.stamps[0], 10**9
        else:
            return torch.ones_like(places, dtype=torch.bool)
        return is_as_it_was(self, ahead, places, where)

    def some_rows(seed: int) -> set[int]:
        die = random.Random(seed)
        return {die.randrange(NUM_ROWS) for _ in range(die.randrange(1, NUM_ROWS))}

    all_rows, half = set(range(NUM_ROWS)), set(range(NUM_ROWS // 2))
    fill = [("write", all_rows)]
    cases = {
        "copy": [[*fill, ("overwrite", all_rows)]],
        "home": [[("ask", all_rows), ("overwrite", half), ("read", all_rows)]],
        "place": [[("ask", all_rows), ("write", half), ("read", all_rows)]],
        # Some rows come back to the places in the log where they were.
        "log": [
            [*fill, ("ask", all_rows), *(("write", some_rows(seed)) for _ in range(seed)), ("read", all_rows)]
            for seed in range(20)
        ],
    }

    def check_all() -> None:
        for steps in cases[guard]:
            check_reading_ahead(steps, 1, 2)

    check_all()
    if guard == "copy":
        monkeypatch.setattr(RowTier, "forget_copies", lambda self: None)
    else:
        monkeypatch.setattr(DiskRows, "_is_as_it_was", is_taken_for_same)
    with pytest.raises(AssertionError):
        check_all()


def resident_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Which pages of a mapped tensor are in RAM."""
    num_pages = -(-tensor.nbytes // mmap.PAGESIZE)
    state = torch.zeros(num_pages, dtype=torch.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    length = ctypes.c_size_t(tensor.nbytes)
    assert libc.mincore(ctypes.c_void_p(tensor.data_ptr()), length, ctypes.c_void_p(state.data_ptr())) == 0
    return (state & 1).bool()


@pytest.mark.parametrize("step", [1, 3])
def test_a_piece_of_a_table_that_is_looked_at_is_read_as_one(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = MappedStorage(tmp_path)
    table = HostTable([TableSpec("t0", 100_000, 0.5)], LARGE_LAYOUT, storage)
    part, state = table.parts
    part.fill_(1.0)
    table.persist()
    storage.forget_pages()
    if int(resident_pages(part).sum()) > 100:
        pytest.skip(f"{tmp_path} is no disk, or pages stay in RAM")
    table.ask_for(state[:100])  # in RAM
    table.ask_for(part[32_000:64_000:step])
    pages = resident_pages(part)
    end_s = time.monotonic() + 20
    while not bool(pages[2000 : 3990 if step == 1 else 3980].all()):
        assert time.monotonic() < end_s, "pages were asked for, and have not come"
        time.sleep(0.01)
        pages = resident_pages(part)
    assert int(pages[4000:].sum()) == 0
    monkeypatch.setattr(disk_rows, "MAX_ASKED_BYTES", 1_000_000)
    table.ask_for(part[64_000:])  # would not fit
    assert int(resident_pages(part)[4000:].sum()) == 0


def test_a_system_that_takes_no_advice_is_told_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module, name in ((disk, "SYS_PROCESS_MADVISE"), (disk, "MADV_POPULATE_WRITE"), (mmap, "MADV_WILLNEED")):
        monkeypatch.setattr(module, name, 100_000)
    table = HostTable(TABLES, LAYOUT, MappedStorage(tmp_path))
    rows = torch.arange(12)
    with caplog.at_level("INFO", logger="torchrec_scratchpipe"):
        for step in (1.0, 2.0, 3.0):
            table.write(rows, [torch.full((12, 4), step), torch.full((12,), step)])
            table.drain()
    assert float(table.parts[0].sum()) == 12 * 4 * 3.0
    assert [record.getMessage() for record in caplog.records] == [
        "pages are read from the disk one after another (Invalid argument)",
        "the process ends if the disk fails (Invalid argument)",
    ]


@pytest.mark.parametrize("is_broken", [False, True])
def test_rows_are_asked_for_ahead_and_training_is_exact_whatever_comes_of_it(
    is_broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, asked = DiskRows.read_ahead, set()

    def read_ahead(self: DiskRows, rows: torch.Tensor) -> RowsAhead:
        assert threading.current_thread().name.startswith("scratchpipe-asking")
        asked.update(rows.tolist())
        if is_broken:
            raise RuntimeError("no advice today")
        return read(self, rows)

    monkeypatch.setattr(DiskRows, "read_ahead", read_ahead)
    pool = make_pool(storage=MappedStorage(tmp_path, ram_of(4)))
    batches = random_rows(num_batches=100, ids_per_batch=6)
    expected = expected_parts(pool, batches)
    run(pool, batches, OverlappedStageRunner(CPU), lookahead=2)
    assert max_diff(expected, pool.host_table.parts) == 0.0
    rows = set(torch.cat(batches).tolist())  # each was absent once
    assert asked <= rows
    assert len(asked) > len(rows) / 2  # a quick worker may have placed the others
    stats = pool.stats()
    assert stats.num_disk_rows_read > 100
    assert stats.num_disk_pages_read > 0
