# SPDX-License-Identifier: BSD-3-Clause
"""Poisson samples: each example by a toss of its own, the same for any number of ranks, and from any step on."""

import math
import pickle
import time
from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from opacus.data_loader import wrap_collate_with_empty
from scipy import stats
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_scratchpipe.errors import ConfigError
from torchrec_scratchpipe.privacy.sampling import PoissonSampler, collate_with_empty, sample_indices, without_examples


@pytest.mark.parametrize(
    ("num_examples", "rate"), [(1000, 0.05), (1000, 0.5), (400, 0.97), (50, 0.002), (10**6, 1e-5), (3, 0.4)]
)
def test_sizes_have_the_binomial_distribution(num_examples: int, rate: float) -> None:
    num_steps = 4000
    sampler = PoissonSampler(num_examples, rate, num_steps, seed=1)
    sizes = np.array([len(batch) for batch in sampler])
    binomial = stats.binom(num_examples, rate)
    assert abs(sizes.mean() - binomial.mean()) < 4 * binomial.std() / num_steps**0.5
    # The variance of a variance follows from the fourth moment.
    fourth = binomial.stats("k") + 2
    assert abs(sizes.var() - binomial.var()) < 4 * binomial.var() * (fourth / num_steps) ** 0.5
    assert sampler.expected_batch_size == num_examples * rate
    values = np.arange(sizes.max() + 2)
    seen = np.array([(sizes <= value).mean() for value in values])
    assert np.abs(seen - binomial.cdf(values)).max() < 2 / num_steps**0.5


def test_each_example_and_each_pair_is_as_likely_as_it_should_be() -> None:
    num_examples, rate, num_steps = 12, 0.3, 20_000
    taken = np.zeros((num_steps, num_examples))
    for step, batch in enumerate(PoissonSampler(num_examples, rate, num_steps, seed=2)):
        assert batch == sorted(set(batch))
        taken[step, batch] = 1
    for expected, actual in ((rate, taken.mean(axis=0)), (rate**2, _pairs(taken.T @ taken / num_steps))):
        assert np.abs(actual - expected).max() < 4.5 * (expected * (1 - expected) / num_steps) ** 0.5
    assert np.abs(_pairs(taken[1:].T @ taken[:-1] / num_steps) - rate**2).max() < 4.5 * (0.09 * 0.91 / num_steps) ** 0.5


def _pairs(products: Any) -> Any:
    return products[~np.eye(len(products), dtype=bool)]


def test_empty_batches_come_and_full_ones() -> None:
    sizes = [len(batch) for batch in PoissonSampler(100, 0.001, 500, seed=0)]
    assert sizes.count(0) > 400
    assert max(sizes) > 0
    assert list(PoissonSampler(5, 1.0, 2, seed=0)) == [[0, 1, 2, 3, 4]] * 2
    assert list(PoissonSampler(5, 0.0, 2, seed=0)) == list(PoissonSampler(0, 0.5, 2, seed=0)) == [[], []]
    assert [len(batch) for batch in PoissonSampler(10**12, 1e-300, 50, seed=0)] == [0] * 50


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
@pytest.mark.parametrize(("num_examples", "rate"), [(1000, 0.05), (10, 0.5), (5, 0.01)])
def test_ranks_divide_what_one_rank_would_sample(num_examples: int, rate: float, num_ranks: int) -> None:
    whole = list(PoissonSampler(num_examples, rate, 50, seed=3))
    parts = [
        list(PoissonSampler(num_examples, rate, 50, 3, rank=rank, num_ranks=num_ranks)) for rank in range(num_ranks)
    ]
    assert [sorted(chain.from_iterable(batches)) for batches in zip(*parts, strict=True)] == whole
    if num_examples == 1000:
        assert min(sum(map(len, part)) for part in parts) > 0.8 * 1000 * 0.05 * 50 / num_ranks


def test_a_step_is_the_same_after_a_restart() -> None:
    whole = list(PoissonSampler(1000, 0.05, 20, seed=4))
    resumed = PoissonSampler(1000, 0.05, 20, seed=4, start_step=13)
    assert len(resumed) == 7
    assert list(resumed) == list(resumed) == whole[13:]
    resumed.start_step = 5
    assert list(resumed) == whole[5:]
    longer = PoissonSampler(1000, 0.05, 30, seed=4)
    assert list(longer)[:20] == whole
    assert len({tuple(batch) for batch in longer}) == 30
    assert list(PoissonSampler(1000, 0.05, 20, seed=5)) != whole
    assert longer.sample(13).tolist() == whole[13]
    assert longer.sample(13).dtype == np.int64


def test_a_data_loader_takes_it() -> None:
    dataset = TensorDataset(torch.arange(40), torch.randn(40, 3))
    sampler = PoissonSampler(40, 0.02, 30, seed=0)
    collate = collate_with_empty(default_collate, dataset[0])
    for num_workers in (0, 1):
        batches = list(DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers))
        assert [batch[0].tolist() for batch in batches] == list(sampler)
        assert {len(batch[0]) for batch in batches} >= {0, 1}
        assert all(batch[1].shape == (len(batch[0]), 3) and batch[1].dtype == torch.float32 for batch in batches)


def test_control_the_default_collate_cannot_do_it() -> None:
    with pytest.raises(IndexError):
        default_collate([])


def test_empty_batches_are_those_of_opacus() -> None:
    example = (torch.randn(3), torch.tensor(1), {"x": torch.randn(2, 2)})
    theirs = wrap_collate_with_empty(collate_fn=default_collate)
    theirs([example])  # it learns from the first batch
    expected, actual = theirs([]), collate_with_empty(default_collate, example)([])
    for each, other in ((expected[0], actual[0]), (expected[1], actual[1]), (expected[2]["x"], actual[2]["x"])):
        assert (each.shape, each.dtype) == (other.shape, other.dtype)


def collate_features(examples: list[tuple[Tensor, list[int]]]) -> Batch:
    ids = [torch.tensor(each) for _, each in examples]
    return Batch(
        dense_features=torch.stack([dense for dense, _ in examples]),
        sparse_features=KeyedJaggedTensor(
            keys=["a", "b"], values=torch.cat(ids + ids), lengths=torch.tensor([len(each) for each in ids] * 2)
        ),
        labels=torch.ones(len(examples), dtype=torch.int32),
    )


def test_an_empty_batch_of_torchrec() -> None:
    collate = pickle.loads(pickle.dumps(collate_with_empty(collate_features, (torch.ones(4), [7, 8]))))
    batch = collate([])
    assert isinstance(batch, Batch)
    assert batch.dense_features.shape == (0, 4)
    assert (batch.labels.shape, batch.labels.dtype) == ((0,), torch.int32)
    features = batch.sparse_features
    assert (features.keys(), features.stride(), features.values().dtype) == (["a", "b"], 0, torch.int64)
    assert features.values().shape == features.lengths().shape == (0,)
    assert features.length_per_key() == [0, 0]
    some = collate([(torch.ones(4), [1])] * 3)
    assert some.sparse_features.stride() == 3


class Named(NamedTuple):
    """Two parts of a batch."""

    one: Any
    other: Any


def test_what_an_empty_batch_can_be_made_of() -> None:
    weighted = KeyedJaggedTensor(
        keys=["a"], values=torch.tensor([1, 2]), lengths=torch.tensor([2]), weights=torch.ones(2)
    )
    jagged = JaggedTensor(values=torch.ones(2, 3), lengths=torch.tensor([2]))
    batch = without_examples(Named({"x": [torch.ones(2, 3)], "n": None}, (weighted, jagged)))
    assert isinstance(batch, Named)
    assert isinstance(batch.one, Mapping)
    assert batch.one["x"][0].shape == (0, 3)
    assert batch.one["n"] is None
    assert batch.other[0].weights().shape == (0,)
    assert batch.other[1].values().shape == (0, 3)
    assert batch.other[1].lengths().shape == (0,)
    with pytest.raises(ConfigError, match="An empty batch: cannot be made of str"):
        without_examples([torch.ones(1), "text"])


def test_the_cost_is_that_of_the_sample() -> None:
    """4 million examples: far below what a toss for each would cost."""
    sampler = PoissonSampler(4_000_000, 0.001, 50, seed=0)
    best = math.inf
    for step in range(20):
        start = time.perf_counter()
        assert 3500 < len(sampler.sample(step)) < 4500
        best = min(best, time.perf_counter() - start)
    assert best < 0.005


def test_a_draw_that_is_too_short_goes_on() -> None:
    """A generator whose distances are all 1 needs far more of them than expected."""

    class Near:
        def geometric(self, rate: float, count: int) -> Any:
            return np.ones(count, dtype=np.int64)

    assert sample_indices(5000, 0.001, Near()).tolist() == list(range(5000))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_examples": -1}, "num_examples is -1, needs to be 0 or more"),
        ({"sample_rate": 1.1}, "sample_rate is 1.1, needs to be from 0 to 1"),
        ({"sample_rate": math.nan}, "sample_rate is nan"),
        ({"num_steps": -1}, "num_steps is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"num_ranks": 0}, "num_ranks is 0"),
        ({"rank": 2}, "rank is 2, needs to be from 0 to 1"),
        ({"start_step": 11}, "start_step is 11, needs to be from 0 to 10"),
    ],
)
def test_values_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    setting: dict[str, Any] = {"num_examples": 5, "sample_rate": 0.1, "num_steps": 10, "seed": 0, "num_ranks": 2}
    with pytest.raises(ConfigError, match=message):
        PoissonSampler(**setting | change)
