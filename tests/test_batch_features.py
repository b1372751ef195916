# SPDX-License-Identifier: BSD-3-Clause
"""Ids are found by the names of features, whatever a batch is made of."""

from collections import namedtuple
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe import MeasurementError, WorkingSets, measure_working_set

TABLES = [
    EmbeddingBagConfig(name="t0", num_embeddings=100, embedding_dim=4, feature_names=["clicked", "bought"]),
    EmbeddingBagConfig(name="t1", num_embeddings=50, embedding_dim=4, feature_names=["word"]),
]
LABELS = torch.zeros(2)


def ids(*keys: str, weights: bool = False, num_samples: int = 2) -> KeyedJaggedTensor:
    """One id per sample and feature: the feature's own number, and 7."""
    number = {"clicked": 1, "bought": 2, "word": 3, "other": 4}
    values = torch.tensor([value for key in keys for value in (number[key], *[7] * (num_samples - 1))])
    lengths = torch.ones(num_samples * len(keys), dtype=torch.int64)
    return KeyedJaggedTensor(
        keys=list(keys), values=values, lengths=lengths, weights=torch.ones(len(values)) if weights else None
    )


def all_ids() -> KeyedJaggedTensor:
    return ids("clicked", "bought", "word")


class Attributes:
    def __init__(self, **kwargs: Any) -> None:
        vars(self).update(kwargs)


@dataclass
class Fields:
    labels: torch.Tensor
    sparse: KeyedJaggedTensor
    weighted: KeyedJaggedTensor | None = None


@dataclass(slots=True)
class SlottedFields:
    labels: torch.Tensor
    data: dict[str, Any] = field(default_factory=dict)


class Slotted:
    __slots__ = ("features", "never_set")

    def __init__(self, features: KeyedJaggedTensor) -> None:
        self.features = features


class Named(NamedTuple):
    features: KeyedJaggedTensor
    labels: torch.Tensor


class Property:
    __slots__ = ("_columns",)

    @property
    def sparse_features(self) -> KeyedJaggedTensor:
        return all_ids()


PlainNamed = namedtuple("PlainNamed", ["a", "b"])


def cyclic() -> Attributes:
    batch = Attributes(features=all_ids())
    batch.itself = [batch]  # type: ignore[attr-defined]
    return batch


def twice_the_same() -> dict[str, Any]:
    features = all_ids()
    return {"sparse_features": features, "model_input": [features]}


BATCHES = {
    "itself": all_ids(),
    "another name": Attributes(id_list_features=all_ids(), labels=LABELS),
    "fields": Fields(LABELS, all_ids()),
    "weighted and not": Fields(LABELS, ids("clicked", "bought"), ids("word", weights=True)),
    "slotted fields": SlottedFields(LABELS, {"user": ids("clicked"), "item": ids("word", "bought")}),
    "slots": Slotted(all_ids()),
    "tuple": (all_ids(), LABELS),
    "list": [LABELS, None, ids("word"), ids("bought"), ids("clicked")],
    "named tuple": Named(all_ids(), LABELS),
    "plain named tuple": PlainNamed(1, (ids("word", "clicked"), {"deep": [ids("bought")]})),
    "dictionary": {"label": LABELS, "sparse": all_ids(), 7: "text"},
    "nested": {"inputs": (Attributes(groups={"a": [ids("clicked"), ids("bought")]}), Fields(LABELS, ids("word")))},
    "property": Property(),
    "cycle": cyclic(),
    "twice the same object": twice_the_same(),
    "a feature that no table has, twice": [all_ids(), ids("other"), ids("other")],
}


def counts(working_sets: WorkingSets) -> dict[str, tuple[float, int]]:
    return {name: (it.reuse.num_ids, it.reuse.num_distinct) for name, it in working_sets.items()}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_ids_are_found(batch: Any) -> None:
    measured = measure_working_set([batch] * 4, TABLES)
    assert counts(measured) == {"t0": (4, 3), "t1": (2, 2)}
    assert measured.batch_size == 2


def test_a_feature_in_two_tensors_is_ambiguous() -> None:
    batch = {"user": ids("clicked", "word"), "item": [ids("word", "bought")]}
    with pytest.raises(
        MeasurementError, match=r"feature word is in batch\['user'\] and in batch\['item'\]\[0\],.*Give get_features"
    ):
        measure_working_set([batch] * 4, TABLES)
    measured = measure_working_set([batch] * 4, TABLES, get_features=lambda it: [ids("clicked"), *it["item"]])
    assert counts(measured) == {"t0": (4, 3), "t1": (2, 2)}


def test_a_feature_that_no_tensor_has_is_named_with_where_it_was_looked_for() -> None:
    tables = [EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=["wrd"])]
    with pytest.raises(
        MeasurementError,
        match=r"table t: a batch has no feature wrd, it has bought, clicked, word in batch\.sparse, batch\.weighted\. "
        r"Did you mean word for wrd\?",
    ):
        measure_working_set([BATCHES["weighted and not"]], tables)


@pytest.mark.parametrize("batch", [LABELS, (LABELS, "text"), {"a": [1, 2]}, None, Fields])
def test_a_batch_without_ids_is_refused(batch: Any) -> None:
    with pytest.raises(MeasurementError, match=f"a batch is a {type(batch).__name__} without .*Give get_features"):
        measure_working_set([batch], TABLES)
    with pytest.raises(MeasurementError, match="get_features gave a Tensor"):
        measure_working_set([batch], TABLES, get_features=lambda _: LABELS)


def test_the_batch_size_is_not_known_where_tensors_have_different_ones() -> None:
    batch = (ids("clicked", "bought"), ids("word", num_samples=6))
    assert measure_working_set([batch] * 4, TABLES).batch_size is None
    of_no_table = (all_ids(), ids("other", num_samples=6))
    assert measure_working_set([of_no_table] * 4, TABLES).batch_size == 2


def test_a_model_takes_batches_as_they_are() -> None:
    model = EmbeddingBagCollection(tables=TABLES, device=torch.device("meta"))
    assert counts(measure_working_set([BATCHES["nested"]] * 4, model)) == {"t0": (4, 3), "t1": (2, 2)}
