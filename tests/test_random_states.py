# SPDX-License-Identifier: BSD-3-Clause
"""Measuring leaves no trace: the same weights, and the same batches in the same order, as without it."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe import MeasurementError, measure_working_set

TABLES = [EmbeddingBagConfig(name="t0", num_embeddings=1000, embedding_dim=4, feature_names=["f0"])]
LENGTHS = torch.ones(1, dtype=torch.int64)


class Rows(Dataset[KeyedJaggedTensor]):
    """Draws from every generator that there is, as augmentation does."""

    def __init__(self, rng: Any = None) -> None:
        self.rng = rng

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> KeyedJaggedTensor:
        drawn = int(torch.randint(100, ())) + random.randrange(100) + int(np.random.randint(100))  # noqa: NPY002
        if self.rng is not None:
            drawn += int(self.rng.integers(100))
        return KeyedJaggedTensor(keys=["f0"], values=torch.tensor([index + 24 * drawn]) % 1000, lengths=LENGTHS)


class Wrapper:
    """As those who move batches to a device write it."""

    def __init__(self, loader: Any) -> None:
        self.loaders = [loader]

    def __iter__(self) -> Any:
        return iter(self.loaders[0])


def loader(**kwargs: Any) -> DataLoader[KeyedJaggedTensor]:
    return DataLoader(Rows(kwargs.pop("rng", None)), batch_size=None, **{"shuffle": True, **kwargs})


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LOADERS: dict[str, Callable[[], Any]] = {
    "plain": loader,
    "in order": lambda: loader(shuffle=False),
    "workers": lambda: loader(num_workers=1),
    "persistent workers": lambda: loader(num_workers=1, persistent_workers=True),
    "generator": lambda: loader(generator=seeded(1), num_workers=1),
    "sampler": lambda: loader(shuffle=False, sampler=RandomSampler(range(24), generator=seeded(2))),
    "batch sampler": lambda: DataLoader(
        Rows(), batch_size=4, generator=seeded(3), shuffle=True,
        collate_fn=lambda rows: KeyedJaggedTensor.concat([rows[0]])
    ),
    "dataset": lambda: loader(rng=np.random.default_rng(4)),
    "wrapper": lambda: Wrapper(loader(generator=seeded(5))),
}  # fmt: skip


def start(make_loader: Callable[[], Any], measure: Callable[[Any], None]) -> list[torch.Tensor]:
    """A job's start: the weights, and two passes over the data."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    batches = make_loader()
    measure(batches)
    model = EmbeddingBagCollection(tables=TABLES)
    passes = [batch.values() for _ in range(2) for batch in batches]
    return [*(parameter.detach() for parameter in model.parameters()), *passes, torch.get_rng_state()]


def assert_same(expected: list[torch.Tensor], actual: list[torch.Tensor]) -> None:
    assert len(expected) == len(actual)
    for one, other in zip(expected, actual, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("make_loader", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("max_batches", [5, 300])
def test_a_job_that_measures_first_has_the_bits_of_one_that_does_not(
    make_loader: Callable[[], Any], max_batches: int
) -> None:
    expected = start(make_loader, lambda _: None)
    actual = start(make_loader, lambda batches: measure_working_set(batches, TABLES, max_batches=max_batches) and None)
    assert_same(expected, actual)


def test_an_error_leaves_no_trace_either() -> None:
    def fail(batches: Any) -> None:
        other = [EmbeddingBagConfig(name="t0", num_embeddings=1000, embedding_dim=4, feature_names=["other"])]
        with pytest.raises(MeasurementError, match="a batch has no feature other"):
            measure_working_set(batches, other)

    assert_same(start(LOADERS["generator"], lambda _: None), start(LOADERS["generator"], fail))


def test_control_iterating_alone_changes_the_weights() -> None:
    def read(batches: Any) -> None:
        list(batches)

    with pytest.raises(AssertionError):
        assert_same(start(loader, lambda _: None), start(loader, read))


def test_generators_of_cuda_are_put_back_where_it_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    states, put_back = [torch.tensor([1, 2])], []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", put_back.append)
    measure_working_set(loader(), TABLES)
    assert put_back == [states]
