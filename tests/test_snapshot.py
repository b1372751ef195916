# SPDX-License-Identifier: BSD-3-Clause
"""A snapshot shows a table as it was, whatever is written meanwhile, and says so when it cannot."""

from pathlib import Path

import pytest
import torch
from core_helpers import LAYOUT, max_diff
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_scratchpipe.core import snapshot
from torchrec_scratchpipe.core.disk import MappedStorage, RamBudget
from torchrec_scratchpipe.core.host_table import HostTable
from torchrec_scratchpipe.core.rows import TableSpec
from torchrec_scratchpipe.core.snapshot import TableSnapshot
from torchrec_scratchpipe.core.storage import RamStorage
from torchrec_scratchpipe.errors import TableStorageError

pytestmark = pytest.mark.any_torchrec

NUM_ROWS = 30
TABLES = [TableSpec("a", 10, 0.5), TableSpec("b", 20, 0.5)]


def make_table(directory: Path | None = None) -> HostTable:
    table = HostTable(
        TABLES, LAYOUT, MappedStorage(directory, RamBudget(7 * LAYOUT.row_bytes)) if directory else RamStorage()
    )
    for number, part in enumerate(table.parts):
        part.copy_(torch.rand(part.shape) + number)
    table.accept_overwrite()
    return table


def write(table: HostTable, rows: set[int], value: float) -> None:
    index = torch.tensor(sorted(rows))
    table.write(index, [torch.full((len(rows), 4), value), torch.full((len(rows),), value)])


def read(table: HostTable, taken: TableSnapshot, part: int, first: int, last: int) -> torch.Tensor:
    rows = torch.empty_like(table.parts[part][first:last])
    table.read_snapshot(taken, part, first, rows)
    return rows


def read_all(table: HostTable, taken: TableSnapshot, between: list[set[int]], rows_per_read: int) -> list[torch.Tensor]:
    """Read the parts in turn, a few rows at a time, with a write between any two reads."""
    found: list[list[torch.Tensor]] = [[] for _ in table.parts]
    writes = iter(between)
    for first in range(0, NUM_ROWS, rows_per_read):
        for part in range(len(table.parts)):
            found[part].append(read(table, taken, part, first, min(first + rows_per_read, NUM_ROWS)))
            write(table, next(writes, {0}), -1.0 - first)
    return [torch.cat(pieces) for pieces in found]


ROWS = st.sets(st.integers(0, NUM_ROWS - 1), min_size=1)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(ROWS, max_size=5), st.lists(ROWS, max_size=30), st.integers(1, NUM_ROWS), st.integers(1, 40), st.booleans()
)
def test_snapshot_law(
    before: list[set[int]], between: list[set[int]], rows_per_read: int, segment_rows: int, is_mapped: bool
) -> None:
    """Rows read are those at the time of the snapshot; rows in the table are those written last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot, "SEGMENT_ROWS", segment_rows)
        table = make_table(Path("/tmp") if is_mapped else None)
        twin = [part.clone() for part in table.parts]
        expected = [part.clone() for part in twin]
        taken = table.snapshot(RamStorage())
        for number, rows in enumerate(before):
            write(table, rows, float(number))
        assert max_diff(expected, read_all(table, taken, between, rows_per_read)) == 0.0
        table.close_snapshot(taken)
        table.drain()
        for number, rows in enumerate(before):
            for part in twin:
                part[sorted(rows)] = float(number)
        writes = iter(between)
        for first in range(0, NUM_ROWS, rows_per_read):
            for _ in twin:
                rows = sorted(next(writes, {0}))
                for part in twin:
                    part[rows] = -1.0 - first
        assert max_diff(twin, table.parts) == 0.0


def test_without_keeping_rows_later_writes_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TableSnapshot, "keep", lambda self, rows: None)
    table = make_table()
    expected = [part.clone() for part in table.parts]
    taken = table.snapshot(RamStorage())
    write(table, {3, 17}, 5.0)
    assert max_diff(expected, read_all(table, taken, [], 10)) > 0.0


def test_rows_that_were_read_are_not_kept() -> None:
    table = make_table()
    taken = table.snapshot(RamStorage())
    for part in range(2):
        read(table, taken, part, 0, 20)
    write(table, {3, 4, 25}, 5.0)
    assert taken._num_kept == 1


def test_no_room_loses_the_snapshot_and_not_the_table() -> None:
    table = make_table()

    class FullStorage(RamStorage):
        def allocate(self, num_values: int, dtype: torch.dtype, label: str) -> torch.Tensor:
            if "kept" in label:
                raise TableStorageError("no space left")
            return super().allocate(num_values, dtype, label)

    taken = table.snapshot(FullStorage())
    write(table, {3}, 5.0)
    assert float(table.parts[0][3, 0]) == 5.0
    with pytest.raises(TableStorageError, match="no space left"):
        read(table, taken, 0, 0, 10)


def test_writing_in_place_loses_the_snapshot() -> None:
    table = make_table()
    taken = table.snapshot(RamStorage())
    table.parts[0].add_(1.0)
    with pytest.raises(TableStorageError, match=r"tables a, b were written in place while they were being saved"):
        read(table, taken, 0, 0, 10)
    table.close_snapshot(taken)


def test_writing_in_place_is_noticed_though_the_pool_has_accepted_it() -> None:
    table = make_table()
    taken = table.snapshot(RamStorage())
    table.parts[1].add_(1.0)
    table.accept_overwrite()
    with pytest.raises(TableStorageError, match="written in place"):
        read(table, taken, 0, 0, 10)


def test_views_are_located() -> None:
    table = make_table()
    weights, state = table.table_parts(1)
    assert table.locate(weights) == (0, 10)
    assert table.locate(weights[5:8]) == (0, 15)
    assert table.locate(state[2:]) == (1, 12)
    assert table.locate(torch.zeros(3)) is None
    assert table.locate(weights[:0]) is None
