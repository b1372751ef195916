# SPDX-License-Identifier: BSD-3-Clause
"""Ids that are seen ahead of their batches: the same bits, fewer misses, and nothing kept but what slot maps note."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from helpers import Setting, Trainer, assert_same_bits, assert_same_outputs, drain, make_batches, run_ranks
from pyarrow import parquet
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe import ConfigError, scratchpad_stats
from torchrec_scratchpipe.core.runner import MAX_BATCHES_READ_AHEAD
from torchrec_scratchpipe.data import ParquetBatches

SETTING = Setting(num_rows=(60, 90), dims=(4, 8), load_factor=0.4, num_batches=60)


def ids_of(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Nothing but what embeddings look up."""
    for batch in batches:
        yield Batch(
            dense_features=torch.empty(0, dtype=torch.float32),
            sparse_features=batch.sparse_features,
            labels=torch.empty(0, dtype=torch.float32),
        )


def pair(setting: Setting, **sharder_kwargs: Any) -> tuple[Trainer, Trainer]:
    """Ours and stock, with the same weights."""
    ours, stock = Trainer.scratchpipe(setting, **sharder_kwargs), Trainer(setting)
    ours.copy_from(stock)
    return ours, stock


def train(
    trainer: Trainer, batches: Sequence[Batch], ids: Sequence[Batch] | None, num_ahead: int
) -> list[torch.Tensor]:
    pipeline = trainer.pipeline(num_batches_seen_ahead=num_ahead)
    if ids is not None:
        pipeline.see_ahead(ids_of(ids))
    return drain(pipeline, batches)


def check_maps(trainer: Trainer) -> None:
    """Nothing is ahead any more, and all is well."""
    for pool in trainer.model.module.ebc.pools:
        slot_map = pool.slot_map
        with trainer.model.module.ebc._runner.between_batches():
            slot_map.take_in_releases()
            slot_map._take_back_sightings()
            slot_map.check_integrity()
            assert not slot_map._seen
            assert not slot_map._first_places


def num_misses(trainer: Trainer) -> int:
    return sum(stats.num_unique_misses for stats in scratchpad_stats(trainer.model))


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("num_ahead", [1, 6, 40, 200])
def test_same_bits_with_fewer_misses(num_ahead: int, overlap: bool) -> None:
    batches = make_batches(SETTING)
    ours, by_batch, unseen = (Trainer.scratchpipe(SETTING, overlap=overlap) for _ in range(3))
    stock = Trainer(SETTING)
    for trainer in (ours, by_batch, unseen):
        trainer.copy_from(stock)
    expected = stock.train_plain(batches)
    outputs = train(ours, batches, batches, num_ahead)
    assert_same_outputs(expected, outputs)
    assert_same_bits(stock, ours)
    assert ours.num_victims > 0
    check_maps(ours)
    train(by_batch, batches, None, num_ahead)
    train(unseen, batches, None, 0)
    if num_ahead >= 6:
        assert num_misses(ours) < 0.95 * num_misses(unseen)
        assert num_misses(ours) == pytest.approx(num_misses(by_batch), rel=0.08)  # the first batches come unseen


@pytest.mark.parametrize("is_by_ids", [True, False])
def test_rows_on_a_disk_are_not_read_hundreds_of_batches_ahead(is_by_ids: bool, tmp_path: Path) -> None:
    batches = make_batches(SETTING, num_batches=100)
    ours, stock = pair(SETTING, table_dir=tmp_path)
    pipeline = ours.pipeline(num_batches_seen_ahead=80)
    if is_by_ids:
        pipeline.see_ahead(ids_of(batches))
    iterator = iter(batches)
    most_asked = 0
    for _ in batches:
        pipeline.progress(iterator)
        kept = [
            batch
            for context in pipeline.contexts
            for planned in context.module_contexts.values()
            for group in planned.planned_batches.values()
            for batch in group
        ]
        most_asked = max(most_asked, sum(batch.is_pending and any(batch.asked) for batch in kept))
    stock.train_plain(batches)
    assert_same_bits(stock, ours)
    assert ours.num_victims > 0
    assert most_asked <= MAX_BATCHES_READ_AHEAD + pipeline.lookahead
    check_maps(ours)


def test_epochs_follow_each_other() -> None:
    batches = make_batches(SETTING, num_batches=30)
    ours, stock = pair(SETTING)
    pipeline = ours.pipeline(num_batches_seen_ahead=10)
    for _ in range(3):
        pipeline.see_ahead(ids_of(batches))
        drain(pipeline, batches)
        stock.train_plain(batches)
        check_maps(ours)
    assert_same_bits(stock, ours)


def test_evaluation_in_between_leaves_what_was_seen(caplog: pytest.LogCaptureFixture) -> None:
    batches, others = make_batches(SETTING), make_batches(dataclasses.replace(SETTING, seed=5), num_batches=15)
    ours, stock = pair(SETTING)
    pipeline = ours.pipeline(num_batches_seen_ahead=30)
    pipeline.see_ahead(ids_of(batches))
    for first in range(0, len(batches), 20):
        drain(pipeline, batches[first : first + 20])
        ours.model.eval()
        with torch.no_grad():
            drain(pipeline, others)
        ours.model.train()
    stock.train_plain(batches)
    assert_same_bits(stock, ours)
    assert "were seen ahead of it" not in caplog.text
    check_maps(ours)


@pytest.mark.parametrize("num_ids", [0, 7, 50])
def test_ids_may_end_before_batches_and_after_them(num_ids: int) -> None:
    batches = make_batches(SETTING, num_batches=60)
    ours, stock = pair(SETTING)
    pipeline = ours.pipeline(num_batches_seen_ahead=10)
    pipeline.see_ahead(ids_of(batches[:num_ids]))
    drain(pipeline, batches[:30])
    stock.train_plain(batches[:30])
    assert_same_bits(stock, ours)
    pipeline.reset()  # those that are still ahead
    check_maps(ours)


def test_ids_of_other_batches_are_named_and_change_no_bit(caplog: pytest.LogCaptureFixture) -> None:
    batches = make_batches(SETTING)
    others = make_batches(dataclasses.replace(SETTING, seed=5))
    ours, stock = pair(SETTING)
    with caplog.at_level(logging.WARNING, "torchrec_scratchpipe"):
        train(ours, batches, others, 20)
    stock.train_plain(batches)
    assert_same_bits(stock, ours)
    assert caplog.text.count("were seen ahead of it") == 1
    assert ours.num_victims > 0


def test_as_many_ids_of_other_rows_change_no_bit() -> None:
    """What a slot map is told of the future may be wrong in any way."""
    setting = dataclasses.replace(SETTING, max_ids_per_bag=1, seed=1)
    batches = make_batches(setting)
    ids = []
    for batch in batches:
        lengths = torch.ones_like(batch.sparse_features.lengths())
        values = torch.arange(lengths.numel(), dtype=torch.int64) % 60
        features = batch.sparse_features
        same = KeyedJaggedTensor(keys=features.keys(), values=values, lengths=lengths)
        ids.append(dataclasses.replace(batch, sparse_features=same))
    batches = [
        dataclasses.replace(
            batch,
            sparse_features=KeyedJaggedTensor(
                keys=batch.sparse_features.keys(),
                values=torch.randint(0, 60, (other.sparse_features.values().numel(),)),
                lengths=other.sparse_features.lengths(),
            ),
        )
        for batch, other in zip(batches, ids, strict=True)
    ]
    ours, stock = pair(setting)
    train(ours, batches, ids, 20)
    stock.train_plain(batches)
    assert_same_bits(stock, ours)
    assert ours.num_victims > 0


def test_a_reset_in_between_drops_what_was_seen() -> None:
    batches = make_batches(SETTING)
    ours, stock = pair(SETTING)
    pipeline = ours.pipeline(num_batches_seen_ahead=25)
    pipeline.see_ahead(ids_of(batches))
    iterator = iter(batches)
    for _ in range(20):
        pipeline.progress(iterator)
    pipeline.reset()
    check_maps(ours)
    pipeline.see_ahead(ids_of(batches[20:]))
    drain(pipeline, batches[20:])
    stock.train_plain(batches)
    assert_same_bits(stock, ours)
    check_maps(ours)


def test_nothing_is_kept_of_ids_and_no_more_batches_are_loaded() -> None:
    batches = make_batches(SETTING)
    ours = Trainer.scratchpipe(SETTING)
    pipeline = ours.pipeline(num_batches_seen_ahead=50)
    pipeline.see_ahead(ids_of(batches))
    iterator = iter(batches)
    for _ in range(10):
        pipeline.progress(iterator)
    ours.model.module.ebc.wait_until_idle()
    assert len(pipeline.batches) <= pipeline.lookahead + 3
    assert len(pipeline._seen_ahead) > 40
    seen = [planned for each in pipeline._seen_ahead for planned in each.values()]
    kept = [batch for planned in seen for group in planned.planned_batches.values() for batch in group]
    assert kept
    assert all(batch.ids.ids.numel() == 0 and not batch.pool_ids for batch in kept)
    assert all(None not in batch.tickets for batch in kept)
    pipeline.reset()


def test_a_pipeline_that_sees_nothing_ahead_refuses_ids() -> None:
    with pytest.raises(ConfigError, match="num_batches_seen_ahead"):
        Trainer.scratchpipe(SETTING).pipeline().see_ahead(iter([]))


def check_rank(rank: int, setting: Setting) -> None:
    batches = make_batches(setting, rank)
    ours, stock = pair(setting)
    train(ours, batches, batches, 30)
    stock.train_plain(batches)
    assert_same_bits(stock, ours)
    assert ours.num_victims > 0
    check_maps(ours)


@pytest.mark.dist
def test_two_ranks() -> None:
    run_ranks(2, check_rank, SETTING)


def test_ids_of_parquet_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {f"f{index}": rng.integers(0, rows, 600) for index, rows in enumerate(SETTING.num_rows)}
    columns |= {"label": rng.integers(0, 2, 600).astype(np.float32), "x": rng.random(600), "y": rng.random(600)}
    parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet", row_group_size=100)
    dense = ["x", "y", "x"][: make_batches(SETTING, num_batches=1)[0].dense_features.shape[1]]
    settings: dict[str, Any] = {"label": "label", "dense": dense, "sparse": ["f0", "f1"], "batch_size": 6}
    ours, stock = pair(SETTING)
    batches = ParquetBatches(str(tmp_path / "rows.parquet"), shuffle_row_groups=True, **settings)
    pipeline = ours.pipeline(num_batches_seen_ahead=40)
    for _ in range(2):
        iterator = iter(batches)
        pipeline.see_ahead(batches.ids_ahead())
        drain(pipeline, iterator)
    twin = ParquetBatches(str(tmp_path / "rows.parquet"), shuffle_row_groups=True, **settings)
    for _ in range(2):
        stock.train_plain(list(twin))
    assert_same_bits(stock, ours)
    assert ours.num_victims > 0
