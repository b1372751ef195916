# SPDX-License-Identifier: BSD-3-Clause
"""The Criteo example on Parquet: the batches and the bits of the TSV."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_examples import (  # puts data on the path
    EXAMPLES,
    assert_same_checkpoints,
    run_example,
    run_script,
    small_run,
    write_tsv,
)
from torchrec.datasets.utils import Batch

from torchrec_scratchpipe.data.criteo import criteo_to_parquet

from data import CriteoTsv, Share  # isort: skip
from parquet_data import CriteoParquet  # isort: skip

NUM_EMBEDDINGS = [400 + index for index in range(26)]


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    """A TSV and its Parquet, of several row groups."""
    tsv, path = write_tsv(tmp_path / "criteo.tsv", 700), tmp_path / "criteo.parquet"
    criteo_to_parquet(tsv, path, rows_per_group=100)
    return tsv, path


def assert_same_batches(expected: Iterator[Batch], actual: Iterator[Batch], num_batches: int) -> None:
    pairs = list(zip(expected, actual, strict=True))
    assert len(pairs) == num_batches
    for left, right in pairs:
        assert torch.equal(left.dense_features, right.dense_features)
        assert torch.equal(left.labels, right.labels)
        assert left.labels.dtype == right.labels.dtype
        ids, same = left.sparse_features, right.sparse_features
        assert ids.keys() == same.keys()
        assert torch.equal(ids.values(), same.values())
        assert torch.equal(ids.lengths(), same.lengths())


@pytest.mark.parametrize("is_raw", [False, True])
@pytest.mark.parametrize("batch_size", [1, 16, 63, 1000])
def test_batches_are_those_of_the_tsv_to_the_bit(both: tuple[Path, Path], batch_size: int, is_raw: bool) -> None:
    tsv, path = both
    expected = CriteoTsv(str(tsv), NUM_EMBEDDINGS, batch_size, Share(), is_raw=is_raw)
    actual = CriteoParquet([str(path)], NUM_EMBEDDINGS, batch_size, Share(), 2, is_raw=is_raw)
    assert (expected.num_train_batches, expected.num_val_batches) == (actual.num_train_batches, actual.num_val_batches)
    for first_batch in {0, 1, expected.num_train_batches // 2, expected.num_train_batches}:
        num_batches = expected.num_train_batches - first_batch
        assert_same_batches(expected.train(first_batch), actual.train(first_batch), num_batches)
        assert_same_batches(expected.validate(), actual.validate(), expected.num_val_batches)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_all_samples(both: tuple[Path, Path], world_size: int) -> None:
    _, path = both
    whole, *ranks = (
        CriteoParquet([str(path)], NUM_EMBEDDINGS, 16, share, is_raw=True)
        for share in (Share(), *(Share(rank, world_size) for rank in range(world_size)))
    )
    assert len({(each.num_train_batches, each.num_val_batches) for each in ranks}) == 1
    for method in ("train", "validate"):
        expected = torch.cat([batch.dense_features for batch in getattr(whole, method)()])
        parts = itertools.chain(*(getattr(each, method)() for each in ranks))
        assert torch.equal(expected, torch.cat([batch.dense_features for batch in parts]))


def on_parquet(tsv: Path, path: Path, save_dir: Path, *args: str) -> list[str]:
    arguments = small_run(tsv, "--save_dir", str(save_dir), *args)
    at = arguments.index("--criteo_tsv")
    arguments[at : at + 2] = ["--parquet", str(path), "--num_readers", "2"]
    return arguments


@pytest.mark.dist
def test_two_ranks_are_resumed_to_the_same_bits(both: tuple[Path, Path], tmp_path: Path) -> None:
    tsv, path = both
    whole, part = tmp_path / "whole", tmp_path / "part"
    run_example(*on_parquet(tsv, path, whole), num_ranks=2)
    run_example(*on_parquet(tsv, path, part, "--limit_train_batches", "8"), num_ranks=2)
    run_example(*on_parquet(tsv, path, part, "--resume"), num_ranks=2)
    assert_same_checkpoints(whole, part, 20)


def test_the_same_bits_are_trained_and_resumed_in_mid_epoch(both: tuple[Path, Path], tmp_path: Path) -> None:
    tsv, path = both
    run_example(*small_run(tsv, "--save_dir", str(tmp_path / "tsv"), "--epochs", "2"))
    arguments = on_parquet(tsv, path, tmp_path / "parquet")
    run_example(*arguments, "--limit_train_batches", "23")
    # Ids are seen ahead of their batches, between validations, and where it goes on.
    ahead = ["--num_batches_seen_ahead", "30", "--validation_freq_within_epoch", "7"]
    out = run_example(*arguments, "--resume", "--epochs", "2", "--verify", *ahead)
    assert "epoch 1 of 2, batch 24 of 40 is next" in out
    assert_same_checkpoints(tmp_path / "tsv", tmp_path / "parquet", 80)


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    main = str(EXAMPLES / "criteo_dlrm" / "main.py")
    result = run_script(main, "--parquet", str(tmp_path), "--num_embeddings", "9")
    assert result.returncode == 1
    assert "no Parquet file there" in result.stderr.splitlines()[-1]
    result = run_script(main, "--num_readers", "2", "--num_embeddings", "9")
    assert result.returncode == 2
    assert "--num_readers is for --parquet" in result.stderr
