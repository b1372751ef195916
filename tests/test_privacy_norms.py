# SPDX-License-Identifier: BSD-3-Clause
"""Norms of examples in the tables are those that autograd gives, one example at a time, in float64."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from opacus import GradSampleModule
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe.errors import ConfigError
from torchrec_scratchpipe.privacy.norms import FeatureTable, pooled_square_norms, unpooled_square_norms

NUM_ROWS = 7


@dataclass(frozen=True)
class Case:
    """Features, as ``{feature: (table, is_mean, width)}``, and how many ids a bag may have."""

    features: Mapping[str, tuple[str, bool, int]]
    max_length: int = 5
    num_examples: int = 40
    is_weighted: bool = False
    scale: int = 1  # ids are multiples of this

    @property
    def tables(self) -> list[FeatureTable]:
        return [FeatureTable(table, is_mean) for table, is_mean, _ in self.features.values()]

    @property
    def dims(self) -> list[int]:
        return [dim for *_, dim in self.features.values()]


def make_features(case: Case, seed: int = 0) -> KeyedJaggedTensor:
    generator = torch.Generator().manual_seed(seed)
    num_bags = len(case.features) * case.num_examples
    lengths = torch.randint(0, case.max_length + 1, (num_bags,), generator=generator)
    num_ids = int(lengths.sum())
    return KeyedJaggedTensor(
        keys=list(case.features),
        values=torch.randint(0, NUM_ROWS, (num_ids,), generator=generator) * case.scale,
        lengths=lengths,
        weights=torch.randn(num_ids, generator=generator) if case.is_weighted else None,
    )


def make_gradient(case: Case, seed: int = 0) -> Tensor:
    return torch.randn(case.num_examples, sum(case.dims), generator=torch.Generator().manual_seed(seed))


def one_example(features: KeyedJaggedTensor, example: int) -> tuple[list[Tensor], KeyedJaggedTensor]:
    """Ids of each feature, and the same as a batch of one."""
    each = [ids for ids, _ in bags(features, example)]
    lengths = torch.tensor([len(ids) for ids in each])
    return each, KeyedJaggedTensor(keys=features.keys(), values=torch.cat(each), lengths=lengths)


def bags(features: KeyedJaggedTensor, example: int) -> list[tuple[Tensor, Tensor]]:
    """Ids and weights of one example, feature by feature."""
    offsets, num_examples = features.offsets().tolist(), features.stride()
    found = []
    for index in range(len(features.keys())):
        first, last = offsets[index * num_examples + example : index * num_examples + example + 2]
        weights = features.weights_or_none()
        each = torch.ones(last - first) if weights is None else weights[first:last]
        found.append((features.values()[first:last], each.double()))
    return found


def by_autograd(case: Case, features: KeyedJaggedTensor, gradient: Tensor) -> Tensor:
    """One backward for every example, through float64 tables."""
    norms = []
    for example in range(case.num_examples):
        tables = {
            table: torch.randn(NUM_ROWS, dim, dtype=torch.float64, requires_grad=True)
            for table, _, dim in case.features.values()
        }
        pooled = []
        for (table, is_mean, _), (ids, weights) in zip(case.features.values(), bags(features, example), strict=True):
            rows = (tables[table][ids // case.scale] * weights[:, None]).sum(dim=0)
            pooled.append(rows / max(1, len(ids)) if is_mean else rows)
        loss = (torch.cat(pooled) * gradient[example].double()).sum()
        grads = torch.autograd.grad(loss, list(tables.values()), allow_unused=True)
        norms.append(sum(each.square().sum() for each in grads if each is not None))
    return torch.stack(norms)


def assert_norms_of_examples(expected: Tensor, actual: Tensor) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=1e-7)


CASES = {
    "sum": Case({"f0": ("t0", False, 4), "f1": ("t1", False, 8)}),
    "mean": Case({"f0": ("t0", True, 4), "f1": ("t1", False, 4), "f2": ("t2", True, 4)}),
    "weighted": Case({"f0": ("t0", False, 4), "f1": ("t1", False, 4)}, is_weighted=True),
    "shared": Case({"f0": ("t0", False, 4), "f1": ("t1", False, 8), "f2": ("t0", False, 4), "f3": ("t0", False, 4)}),
    "shared, mean": Case({"f0": ("t0", True, 4), "f1": ("t0", True, 4), "f2": ("t1", False, 3)}),
    "shared, weighted": Case({"f0": ("t0", False, 4), "f1": ("t0", False, 4)}, is_weighted=True),
    "two that share": Case({f"f{i}": (f"t{i % 2}", i % 2 == 0, 4 + i % 2) for i in range(5)}),
    "two ids": Case({"f0": ("t0", False, 4), "f1": ("t1", True, 4)}, max_length=2),
    "one id": Case({"f0": ("t0", False, 4), "f1": ("t1", True, 4)}, max_length=1),
    "one id, weighted": Case({"f0": ("t0", False, 4), "f1": ("t1", False, 4)}, max_length=1, is_weighted=True),
    "one id, shared": Case({"f0": ("t0", False, 4), "f1": ("t0", False, 4)}, max_length=1),
    "no ids": Case({"f0": ("t0", False, 4), "f1": ("t1", True, 4)}, max_length=0),
    "no ids, shared": Case({"f0": ("t0", False, 4), "f1": ("t0", False, 4)}, max_length=0),
    "ids of 64 bits": Case({"f0": ("t0", False, 4), "f1": ("t0", False, 4)}, scale=2**60),
    "one example": Case({"f0": ("t0", False, 4), "f1": ("t0", False, 4)}, num_examples=1, max_length=9),
}


@pytest.mark.parametrize("name", CASES)
def test_pooled_norms_are_those_of_autograd(name: str) -> None:
    case = CASES[name]
    for seed in range(3):
        features, gradient = make_features(case, seed), make_gradient(case, seed)
        expected = by_autograd(case, features, gradient)
        assert_norms_of_examples(expected, pooled_square_norms(features, gradient, case.dims, case.tables))


@pytest.mark.parametrize("case", [CASES["sum"], CASES["shared"], CASES["weighted"], CASES["one id"]])
def test_a_batch_of_no_examples(case: Case) -> None:
    none = Case(case.features, num_examples=0, is_weighted=case.is_weighted)
    norms = pooled_square_norms(make_features(none), make_gradient(none), none.dims, none.tables)
    assert norms.shape == (0,)
    assert norms.dtype == torch.float32


def test_ids_of_64_bits_whose_keys_would_overflow() -> None:
    num_examples = 12
    features = KeyedJaggedTensor(
        keys=["f"], values=torch.tensor([0, 2**62 - 1] * num_examples), lengths=torch.full((num_examples,), 2)
    )
    norms = pooled_square_norms(features, torch.ones(num_examples, 3), [3], [FeatureTable("t", False)])
    assert norms.tolist() == [6.0] * num_examples


def test_cross_terms_count() -> None:
    """Two features that name one row with opposite gradients: the row's gradient is zero."""
    features = KeyedJaggedTensor(keys=["a", "b"], values=torch.tensor([3, 3]), lengths=torch.tensor([1, 1]))
    gradient = torch.tensor([[1.0, 2.0, -1.0, -2.0]])
    shared = [FeatureTable("t", False)] * 2
    apart = [FeatureTable("t", False), FeatureTable("u", False)]
    assert pooled_square_norms(features, gradient, [2, 2], shared).tolist() == [0.0]
    assert pooled_square_norms(features, gradient, [2, 2], apart).tolist() == [10.0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pooled_norms_are_those_of_a_collection(dtype: torch.dtype) -> None:
    """TorchRec's own collection, an example at a time."""
    case = CASES["two that share"]
    features, gradient = make_features(case), make_gradient(case)
    configs = [
        EmbeddingBagConfig(
            name=table, embedding_dim=dim, num_embeddings=NUM_ROWS,
            feature_names=[key for key, (other, *_) in case.features.items() if other == table],
            pooling=PoolingType.MEAN if is_mean else PoolingType.SUM,
        )
        for table, is_mean, dim in dict.fromkeys(case.features.values())
    ]  # fmt: skip
    collection = EmbeddingBagCollection(tables=configs).double()
    expected = []
    for example in range(case.num_examples):
        _, alone = one_example(features, example)
        collection.zero_grad()
        pooled = collection(alone)
        output = torch.cat([pooled[key] for key in case.features], dim=1)
        (output * gradient[example].double()).sum().backward()
        expected.append(sum(each.grad.square().sum() for each in collection.parameters()))
    features = KeyedJaggedTensor(
        keys=features.keys(), values=features.values().to(dtype), lengths=features.lengths().to(dtype)
    )
    actual = pooled_square_norms(features, gradient, case.dims, case.tables)
    assert_norms_of_examples(torch.stack(expected), actual)


def test_norms_are_those_of_opacus() -> None:
    """One table; Opacus's own gradient of nn.Embedding for every example, of bags of one length."""
    num_examples, length, dim = 30, 4, 6
    ids = torch.randint(0, NUM_ROWS, (num_examples, length))
    gradient = torch.randn(num_examples, dim)
    model = GradSampleModule(nn.Embedding(NUM_ROWS, dim), loss_reduction="sum")
    (model(ids).sum(dim=1) * gradient).sum().backward()
    expected = model._module.weight.grad_sample.double().square().sum(dim=(1, 2))
    features = KeyedJaggedTensor(keys=["f"], values=ids.flatten(), lengths=torch.full((num_examples,), length))
    assert_norms_of_examples(expected, pooled_square_norms(features, gradient, [dim], [FeatureTable("t", False)]))
    rows = gradient.repeat_interleave(length, dim=0)
    assert_norms_of_examples(expected, unpooled_square_norms(features, {"f": rows}, {"f": "t"}))


def test_pooled_gradient_in_half_precision() -> None:
    case = CASES["shared"]
    features, gradient = make_features(case), make_gradient(case).bfloat16()
    expected = by_autograd(case, features, gradient)
    assert_norms_of_examples(expected, pooled_square_norms(features, gradient, case.dims, case.tables))


def test_accuracy_of_long_bags() -> None:
    case = Case({"f0": ("t0", False, 4), "f1": ("t0", False, 4)}, max_length=2000, num_examples=3)
    for is_weighted in (False, True):
        case = Case(case.features, 2000, 3, is_weighted)
        features, gradient = make_features(case), make_gradient(case)
        expected = by_autograd(case, features, gradient)
        actual = pooled_square_norms(features, gradient, case.dims, case.tables)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0.0)


def unpooled_by_autograd(case: Case, features: KeyedJaggedTensor, gradients: Mapping[str, Tensor]) -> Tensor:
    norms = []
    starts = dict.fromkeys(gradients, 0)
    for example in range(case.num_examples):
        tables = {
            table: torch.zeros(NUM_ROWS, dim, dtype=torch.float64, requires_grad=True)
            for table, _, dim in case.features.values()
        }
        loss = torch.zeros((), dtype=torch.float64)
        for (key, (table, *_)), (ids, _) in zip(case.features.items(), bags(features, example), strict=True):
            if key in gradients:
                rows = gradients[key][starts[key] : starts[key] + len(ids)].double()
                loss = loss + (tables[table][ids // case.scale] * rows).sum()
                starts[key] += len(ids)
        norm = torch.zeros((), dtype=torch.float64)
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, list(tables.values()), allow_unused=True)
            norm = norm + sum(each.square().sum() for each in grads if each is not None)
        norms.append(norm)
    return torch.stack(norms)


def make_gradients(case: Case, features: KeyedJaggedTensor, keys: Sequence[str]) -> dict[str, Tensor]:
    sizes = dict(zip(features.keys(), features.length_per_key(), strict=True))
    generator = torch.Generator().manual_seed(1)
    return {key: torch.randn(sizes[key], case.features[key][2], generator=generator) for key in keys}


@pytest.mark.parametrize(
    "name",
    ["sum", "shared", "two that share", "one id", "one id, shared", "no ids", "ids of 64 bits", "one example"],
)
def test_unpooled_norms_are_those_of_autograd(name: str) -> None:
    case = CASES[name]
    for seed in range(3):
        features = make_features(case, seed)
        tables = {key: table for key, (table, *_) in case.features.items()}
        for keys in (list(case.features), list(case.features)[1:], []):
            gradients = make_gradients(case, features, keys)
            expected = unpooled_by_autograd(case, features, gradients)
            assert_norms_of_examples(expected, unpooled_square_norms(features, gradients, tables))


def test_unpooled_norms_are_those_of_a_collection() -> None:
    case = Case({f"f{i}": (f"t{i % 2}", False, 4) for i in range(5)})
    features = make_features(case)
    configs = [
        EmbeddingConfig(
            name=table, embedding_dim=dim, num_embeddings=NUM_ROWS,
            feature_names=[key for key, (other, *_) in case.features.items() if other == table],
        )
        for table, _, dim in dict.fromkeys(case.features.values())
    ]  # fmt: skip
    gradients = make_gradients(case, features, list(case.features))
    collection = EmbeddingCollection(tables=configs).double()
    starts = dict.fromkeys(gradients, 0)
    expected = []
    for example in range(case.num_examples):
        each, alone = one_example(features, example)
        collection.zero_grad()
        outputs = collection(alone)
        loss = torch.zeros((), dtype=torch.float64)
        for key, ids in zip(features.keys(), each, strict=True):
            rows = gradients[key][starts[key] : starts[key] + len(ids)]
            loss = loss + (outputs[key].values() * rows).sum()
            starts[key] += len(ids)
        loss.backward()
        expected.append(sum(each.grad.square().sum() for each in collection.parameters()))
    tables = {key: table for key, (table, *_) in case.features.items()}
    assert_norms_of_examples(torch.stack(expected), unpooled_square_norms(features, gradients, tables))


def test_unpooled_batch_of_no_examples() -> None:
    case = Case(CASES["shared"].features, num_examples=0)
    features = make_features(case)
    gradients = make_gradients(case, features, list(case.features))
    tables = {key: table for key, (table, *_) in case.features.items()}
    assert unpooled_square_norms(features, gradients, tables).shape == (0,)


def test_what_does_not_fit_is_refused() -> None:
    case = CASES["shared"]
    features, gradient = make_features(case), make_gradient(case)
    with pytest.raises(ConfigError, match="3 dims and 4 tables"):
        pooled_square_norms(features, gradient, case.dims[1:], case.tables)
    with pytest.raises(ConfigError, match=r"shape \(39, 20\), needs \(40, 20\)"):
        pooled_square_norms(features, gradient[1:], case.dims, case.tables)
    with pytest.raises(ConfigError, match="f2: table t0 has rows of width 4, got 5"):
        pooled_square_norms(features, torch.zeros(40, 21), [4, 8, 5, 4], case.tables)
    weighted = Case({"f0": ("t0", True, 4)}, is_weighted=True)
    with pytest.raises(ConfigError, match="f0: table t0 pools by the mean and its ids have weights"):
        pooled_square_norms(make_features(weighted), make_gradient(weighted), weighted.dims, weighted.tables)
    several = KeyedJaggedTensor(
        keys=["a", "b"], values=torch.tensor([1, 2, 3]), lengths=torch.tensor([1, 1, 1]),
        stride_per_key_per_rank=[[2], [1]],
    )  # fmt: skip
    with pytest.raises(ConfigError, match="batch sizes of features differ"):
        pooled_square_norms(several, torch.zeros(2, 4), [2, 2], [FeatureTable("t", False)] * 2)
    tables = {key: table for key, (table, *_) in case.features.items()}
    gradients = make_gradients(case, features, list(case.features))
    with pytest.raises(ConfigError, match="f1: the gradient has shape"):
        unpooled_square_norms(features, {**gradients, "f1": gradients["f1"][1:]}, tables)
    with pytest.raises(ConfigError, match="feature f9 has a gradient but no ids"):
        unpooled_square_norms(features, {**gradients, "f9": gradients["f1"]}, tables)
    with pytest.raises(ConfigError, match="feature f1 has a gradient but no table"):
        unpooled_square_norms(features, gradients, {key: table for key, table in tables.items() if key != "f1"})
    with pytest.raises(ConfigError, match="f3: table t0 has rows of width 4, got 3"):
        unpooled_square_norms(features, {**gradients, "f3": gradients["f3"][:, 1:]}, tables)
