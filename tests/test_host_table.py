# SPDX-License-Identifier: BSD-3-Clause
"""Host tables keep what is written, in RAM and memory-mapped, and say why they cannot be made."""

import ctypes
import functools
import gc
import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from core_helpers import CPU, LAYOUT, expected_parts, make_pool, max_diff, random_rows, run
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_scratchpipe.core import storage as storage_module
from torchrec_scratchpipe.core import write_buffer
from torchrec_scratchpipe.core.host_table import HostTable
from torchrec_scratchpipe.core.rows import RowLayout, StateSpec, TableSpec, write_rows
from torchrec_scratchpipe.core.runner import OverlappedStageRunner
from torchrec_scratchpipe.core.storage import MappedStorage, PageLockedStorage, RamStorage, TableStorage
from torchrec_scratchpipe.core.write_buffer import WriteBuffer
from torchrec_scratchpipe.errors import TableStorageError

TABLES = [TableSpec("a", 5, 0.5), TableSpec("b", 7, 0.5)]


def test_tables_lie_behind_each_other_and_views_share_memory() -> None:
    layout = RowLayout(8, torch.float32, (StateSpec("m", is_rowwise=False), StateSpec("v", is_rowwise=True)))
    table = HostTable(TABLES, layout, RamStorage())
    assert layout.row_bytes == 8 * 4 + 8 * 4 + 4
    assert table.num_bytes == 12 * 68
    weights, m, v = table.table_parts(1)
    assert (weights.shape, m.shape, v.shape) == ((7, 8), (7, 8), (7,))
    weights.fill_(2.0)
    assert float(table.parts[0].sum()) == 7 * 8 * 2
    assert all(part.is_contiguous() for part in (weights, m, v))


@pytest.mark.parametrize("is_mapped", [False, True])
def test_new_tables_are_zero(is_mapped: bool, tmp_path: Path) -> None:
    storage: TableStorage = MappedStorage(tmp_path) if is_mapped else RamStorage()
    assert all(float(part.abs().sum()) == 0 for part in HostTable(TABLES, LAYOUT, storage).parts)


def test_mapped_table_leaves_no_file_name(tmp_path: Path) -> None:
    table = HostTable(TABLES, LAYOUT, MappedStorage(tmp_path))
    assert list(tmp_path.iterdir()) == []
    table.parts[0].fill_(1.0)
    table.persist()
    assert float(table.parts[0].sum()) == 12 * 4


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.sets(st.integers(0, 29), min_size=1)),
            st.tuples(st.just("read"), st.sets(st.integers(0, 29), min_size=1)),
            st.tuples(st.just("drain"), st.just({0})),
        ),
        max_size=25,
    ),
    st.integers(1, 30),
    st.integers(1, 12),
)
def test_write_buffer_law(steps: list[tuple[str, set[int]]], capacity: int, sweep_rows: int) -> None:
    """Whatever is written is what is read, and after a drain it is in the table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write_buffer, "WRITE_BUFFER_BYTES", capacity * LAYOUT.row_bytes)
        patch.setattr(write_buffer, "SWEEP_ROWS", sweep_rows)
        parts = [torch.zeros(30, 4), torch.zeros(30)]
        expected = [part.clone() for part in parts]
        buffer = WriteBuffer(functools.partial(write_rows, parts), lambda rows: None, parts[0].shape[0], LAYOUT)
        for step, (kind, chosen) in enumerate(steps, start=1):
            rows = torch.tensor(sorted(chosen))
            if kind == "write":
                values = [torch.full((rows.numel(), 4), float(step)), torch.full((rows.numel(),), float(step))]
                buffer.write(rows, values)
                for part, value in zip(expected, values, strict=True):
                    part[rows] = value
            elif kind == "read":
                out = [part[rows] for part in parts]
                buffer.read_over(rows, out)
                assert max_diff([part[rows] for part in expected], out) == 0.0
            else:
                buffer.drain()
                assert max_diff(expected, parts) == 0.0
        buffer.drain()
        assert max_diff(expected, parts) == 0.0


@pytest.mark.parametrize("capacity", [1, 4, 1000])
def test_training_over_a_mapped_table_is_exact(capacity: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_buffer, "WRITE_BUFFER_BYTES", capacity * LAYOUT.row_bytes)
    pool = make_pool(storage=MappedStorage(tmp_path))
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


def test_page_locked_memory_is_exact_zero_and_unlocked_when_nobody_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[int] = []
    unlocked: list[int] = []
    monkeypatch.setattr(storage_module, "_lock_pages", lambda tensor: locked.append(tensor.data_ptr()) or "")
    monkeypatch.setattr(storage_module, "_unlock", lambda tensors: unlocked.extend(t.data_ptr() for t in tensors))
    storage = PageLockedStorage()
    table = HostTable([TableSpec("t0", 1000, 0.1)], LAYOUT, storage)
    assert table.is_device_accessible
    assert [part.data_ptr() for part in table.parts] == locked
    assert all(float(part.abs().sum()) == 0.0 and part.data_ptr() % 4096 == 0 for part in table.parts)
    weights = table.table_parts(0)[0]
    table.write(torch.tensor([5]), [torch.ones(1, 4), torch.ones(1)])
    assert not unlocked
    del storage, table
    gc.collect()
    assert unlocked == locked
    assert float(weights.sum()) == 4.0  # a view outlives its table


def test_memory_that_cannot_be_page_locked_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "_lock_pages", lambda tensor: "out of memory")
    message = r"16,000 bytes cannot be page-locked \(out of memory\)\. .* host_access='staged'"
    with pytest.raises(TableStorageError, match=message):
        HostTable([TableSpec("t0", 1000, 0.1)], LAYOUT, PageLockedStorage())


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(0, 3000), min_size=1), st.sampled_from([4, 256, 260, 4096, 9000]))
def test_ranges_of_pages_are_those_of_the_rows_each_once(rows: set[int], row_bytes: int) -> None:
    page = storage_module.mmap.PAGESIZE
    addresses = 16 * page + 8 + np.array(sorted(rows), dtype=np.int64) * row_bytes
    ranges = storage_module._page_ranges(addresses, row_bytes)
    covered = [int(begin) + at for begin, length in ranges for at in range(0, int(length), page)]
    expected = {at // page * page for first in addresses.tolist() for at in range(first, first + row_bytes)}
    assert covered == sorted(expected)
    assert all(int(a[0] + a[1]) < int(b[0]) for a, b in itertools.pairwise(ranges))


def resident_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Which pages of a mapped tensor are in RAM."""
    num_pages = -(-tensor.nbytes // storage_module.mmap.PAGESIZE)
    state = torch.zeros(num_pages, dtype=torch.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    length = ctypes.c_size_t(tensor.nbytes)
    assert libc.mincore(ctypes.c_void_p(tensor.data_ptr()), length, ctypes.c_void_p(state.data_ptr())) == 0
    return (state & 1).bool()


MADV_PAGEOUT = 21  # of Linux; the mmap module has no name for it


def test_rows_that_were_asked_for_come_into_ram(tmp_path: Path) -> None:
    storage = MappedStorage(tmp_path)
    table = HostTable([TableSpec("t0", 100_000, 0.5)], RowLayout(64, torch.float32), storage)
    (part,) = table.parts
    part.fill_(1.0)
    table.persist()
    try:
        storage._mappings[0].madvise(MADV_PAGEOUT)
    except OSError:
        pytest.skip("the system writes out no pages when asked to")
    if int(resident_pages(part).sum()) > 100:
        pytest.skip(f"{tmp_path} is no disk, or pages stay in RAM")
    rows = torch.arange(8, 100_000, 1600)
    table.ask_for(rows)
    pages = rows * 256 // storage_module.mmap.PAGESIZE
    end_s = time.monotonic() + 20
    while not bool(resident_pages(part)[pages].all()):
        assert time.monotonic() < end_s, "pages were asked for, and have not come"
        time.sleep(0.01)
    assert int(resident_pages(part).sum()) < 3 * pages.numel() + 100  # those, and few others


def test_a_system_that_takes_no_advice_is_told_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storage_module, "SYS_PROCESS_MADVISE", 100_000)
    table = HostTable(TABLES, LAYOUT, MappedStorage(tmp_path))
    with caplog.at_level("INFO", logger="torchrec_scratchpipe"):
        for _ in range(3):
            table.ask_for(torch.arange(12))
    assert [record.getMessage() for record in caplog.records] == [
        "rows are read from the disk one after another (Function not implemented)"
    ]


@pytest.mark.parametrize("is_broken", [False, True])
def test_rows_are_asked_for_ahead_and_training_is_exact_whatever_comes_of_it(
    is_broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, set[int]] = {}

    def ask(self: HostTable, rows: torch.Tensor) -> None:
        asked.setdefault(threading.current_thread().name.rstrip("_0123456789"), set()).update(rows.tolist())
        if is_broken and threading.current_thread().name.startswith("scratchpipe-asking"):
            raise RuntimeError("no advice today")

    monkeypatch.setattr(HostTable, "ask_for", ask)
    monkeypatch.setattr(write_buffer, "WRITE_BUFFER_BYTES", 4 * LAYOUT.row_bytes)
    pool = make_pool(storage=MappedStorage(tmp_path))
    batches = random_rows(num_batches=100, ids_per_batch=6)
    expected = expected_parts(pool, batches)
    run(pool, batches, OverlappedStageRunner(CPU), lookahead=2)
    assert max_diff(expected, pool.host_table.parts) == 0.0
    rows = set(torch.cat(batches).tolist())  # each was absent once
    assert asked["scratchpipe-asking"] <= rows
    assert len(asked["scratchpipe-asking"]) > len(rows) / 2  # a quick worker may have placed the others
    assert asked["scratchpipe-stages"] >= rows  # by Collect, and before victims are written
