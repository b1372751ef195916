# SPDX-License-Identifier: BSD-3-Clause
"""Host tables keep what is written, in RAM and memory-mapped, and say why they cannot be made."""

import gc
from pathlib import Path

import pytest
import torch
from core_helpers import LAYOUT

from torchrec_scratchpipe.core import storage as storage_module
from torchrec_scratchpipe.core.disk import MappedStorage
from torchrec_scratchpipe.core.host_table import HostTable
from torchrec_scratchpipe.core.rows import RowLayout, StateSpec, TableSpec
from torchrec_scratchpipe.core.storage import PageLockedStorage, RamStorage, TableStorage
from torchrec_scratchpipe.errors import TableStorageError

pytestmark = pytest.mark.any_torchrec

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
