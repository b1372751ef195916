# SPDX-License-Identifier: BSD-3-Clause
"""A delta log brings back the bits of the run that wrote it; what is missing, moved or damaged is named or dropped."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Setting, Trainer, assert_same_bits, drain, full_state, make_batches, with_optimizer
from torchrec.datasets.utils import Batch
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_scratchpipe import CheckpointManager
from torchrec_scratchpipe.checkpoint import delta_log
from torchrec_scratchpipe.checkpoint.delta_chain import Chain, DeltaSet
from torchrec_scratchpipe.core import changes
from torchrec_scratchpipe.sharding.model import scratchpad_collections

SETTING = Setting(num_batches=60, load_factor=0.25)
OPTIMIZERS = [torch.optim.SGD, torch.optim.Adagrad, RowWiseAdagrad]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that deltas of these tests are read in several pieces, and fill several files."""
    monkeypatch.setattr(changes, "ROWS_READ_TOGETHER", 16)
    monkeypatch.setattr(delta_log, "SEGMENT_BYTES", 40_000)


def run(
    manager: CheckpointManager,
    trainer: Trainer,
    last: int,
    first: int = 0,
    after: Callable[[int], object] = lambda _: None,
    lookahead: int = 2,
    setting: Setting = SETTING,
) -> None:
    """Train batches `first` to `last`, and say so."""
    pipeline, batches = trainer.pipeline(lookahead), iter(make_batches(setting)[first:])
    for step in range(first + 1, last + 1):
        pipeline.progress(batches)
        manager.trained(step, trainer.model, trainer.optimizer, extra={"step": step})
        after(step)
    manager.wait()


def loaded(directory: Path, setting: Setting = SETTING, step: int | None = None, **kwargs: Any) -> tuple[int, Trainer]:
    other = Trainer.scratchpipe(replace(setting, seed=5), **kwargs)
    found = CheckpointManager(directory).load(other.model, other.optimizer, step)
    assert found is not None
    assert found.extra == {"step": found.step}
    return found.step, other


def trained(setting: Setting, num_batches: int) -> Trainer:
    trainer = Trainer.scratchpipe(setting)
    drain(trainer.pipeline(), make_batches(setting)[:num_batches])
    assert num_batches < 20 or trainer.num_victims > 0
    return trainer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("is_mapped", [False, True])
def test_a_job_goes_on_from_its_last_delta(
    optimizer: type[torch.optim.Optimizer], is_mapped: bool, tmp_path: Path
) -> None:
    setting = with_optimizer(SETTING, optimizer)
    kwargs = {"table_dir": str(tmp_path)} if is_mapped else {}
    part = Trainer.scratchpipe(setting, **kwargs)
    run(CheckpointManager(tmp_path / "c", delta_every=3, compact_at=None), part, 29, setting=setting)
    # 1. The last delta is of batch 28, because the first call saved the checkpoint, after batch 1.
    step, resumed = loaded(tmp_path / "c", replace(setting, load_factor=0.6))
    assert step == 28
    assert_same_bits(trained(setting, 28), resumed)
    # 2. It goes on, and logs on.
    manager = CheckpointManager(tmp_path / "c", delta_every=3, compact_at=None)
    resumed = Trainer.scratchpipe(replace(setting, seed=6))
    assert manager.load(resumed.model, resumed.optimizer).step == 28  # type: ignore[union-attr]
    run(manager, resumed, 60, 28, lookahead=4, setting=setting)
    step, again = loaded(tmp_path / "c", setting)
    assert step == 58
    assert_same_bits(trained(setting, 58), again)
    assert manager.steps() == [1]


BUSY = replace(SETTING, batch_size=12, load_factor=0.5)


@pytest.mark.parametrize("lookahead", [1, 4])
def test_every_delta_has_the_rows_that_were_trained_once_each_as_they_were(
    lookahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the background is slow, so that rows train again, and leave and come back, before they are read."""
    expected: dict[int, dict[str, list[torch.Tensor]]] = {}
    ours = Trainer.scratchpipe(BUSY)
    manager = CheckpointManager(tmp_path, delta_every=4, compact_at=None)
    pipeline, batches = ours.pipeline(lookahead), make_batches(BUSY)
    iterator = iter(batches)
    num_kept = note_kept(monkeypatch)
    slow = hold_reading(monkeypatch)
    for step in range(1, 42):
        pipeline.progress(iterator)
        if step % 4 == 1 and step > 1:
            slow.let_go()  # what was taken four batches ago is read to its end only now
        manager.trained(step, ours.model, ours.optimizer, extra={"step": step})
        if step % 4 == 1 and step > 1:
            expected[step] = full_state(trained(BUSY, step))
    slow.let_go()
    manager.wait()
    assert ours.num_victims > 0
    assert sum(num_kept) > 100
    for step in range(5, 42, 4):
        _, other = loaded(tmp_path, BUSY, step)
        found = full_state(other)
        for name, tensors in expected[step].items():
            for one, two in zip(tensors, found[name], strict=True):
                assert torch.equal(one, two), (step, name)
    chain = Chain.read(tmp_path)
    assert [delta_set.step for delta_set in chain.sets] == list(range(5, 42, 4))
    for delta_set in chain.sets:
        rows = rows_of(delta_set)
        assert rows == sorted(set(rows)), "a row is logged twice"
        assert set(rows) == trained_rows(ours, batches[delta_set.since : delta_set.step])


def note_kept(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were kept because they were about to change."""
    kept: list[int] = []
    original = changes.Changes._keep

    def keep(self: changes.Changes, rows: torch.Tensor, values: list[torch.Tensor]) -> None:
        kept.append(rows.numel())
        original(self, rows, values)

    monkeypatch.setattr(changes.Changes, "_keep", keep)
    return kept


class Gate:
    """Holds the background back."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def let_go(self) -> None:
        self.event.set()
        self.event = threading.Event()


def hold_reading(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Of each delta, a part of the first pool is read when it is taken, the rest when the gate is opened."""
    gate = Gate()
    original = changes.Changes.read
    pools: list[changes.Changes] = []

    def read(self: changes.Changes, between_batches: Any) -> Iterator[changes.ChangedRows]:
        opened = gate.event
        pools.append(self)
        for number, rows in enumerate(original(self, between_batches)):
            yield rows
            if number == 1 and self is pools[0]:
                assert opened.wait(60)

    monkeypatch.setattr(changes.Changes, "read", read)
    return gate


def rows_of(delta_set: DeltaSet) -> list[tuple[int, int]]:
    """Pool and row of each that it has, ascending."""
    rows = []
    for reader, record in delta_set.records:
        for block in record.row_blocks:
            ids = reader.rows(block).rows.tolist()
            assert ids == sorted(ids)
            rows += [(block.pool, row) for row in ids]
    return sorted(rows)


def trained_rows(trainer: Trainer, batches: Sequence[Batch]) -> set[tuple[int, int]]:
    """By the ids of the batches alone."""
    pools = [pool for collection in scratchpad_collections(trainer.model) for pool in collection.pools]
    rows = set()
    for index, pool in enumerate(pools):
        for table, first_row in zip(pool.host_table.tables, pool.host_table.row_offsets, strict=False):
            for feature in SETTING.feature_names(SETTING.table_names.index(table.name)):
                for batch in batches:
                    rows |= {(index, first_row + row) for row in batch.sparse_features[feature].values().tolist()}
    return rows
