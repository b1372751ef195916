# SPDX-License-Identifier: BSD-3-Clause
"""The place where backward stops in front of a collection, until each example's factor is known.

Shapes: ``B`` examples, ``I`` ids of a feature, ``D`` row width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_scratchpipe.privacy.norms import FeatureTable, pooled_square_norms, unpooled_square_norms
from torchrec_scratchpipe.sharding.collection import (
    ScratchpadCollection,
    ShardedScratchPipeEmbeddingBagCollection,
    ShardedScratchPipeEmbeddingCollection,
)

__all__ = ["Cut", "cut_output"]


@dataclass
class Cut:
    """One output of a collection: what the collection gave, and what the model was given in its place.

    Attributes:
        collection: Whose output it is.
        features: What was looked up, by the names of the output, in their order.
        tables: Where, in the same order.
        dims: Row widths of pooled embeddings, in the same order.
        roots: By name, or a single one for pooled embeddings: what the collection gave.
        leaves: What the model was given.
    """

    collection: ScratchpadCollection
    features: KeyedJaggedTensor
    tables: list[FeatureTable]
    dims: list[int]
    roots: dict[str, Tensor]
    leaves: dict[str, Tensor]

    @property
    def num_examples(self) -> int:
        """B."""
        return self.features.stride()

    def square_norms(self) -> Tensor:
        """[B] float32. Of each example's gradient in the tables of the collection."""
        if self._is_pooled:
            return pooled_square_norms(self.features, _gradient(self.leaves[""]), self.dims, self.tables)
        gradients = {name: leaf.grad for name, leaf in self.leaves.items() if leaf.grad is not None}
        tables = {name: table.table for name, table in zip(self.features.keys(), self.tables, strict=True)}
        return unpooled_square_norms(self.features, gradients, tables)

    def gradients(self, factors: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What backward is to go on with; of all, so that all ranks exchange the same. Shapes: `factors` [B]."""
        for name, root in self.roots.items():
            of_rows = factors if self._is_pooled else factors.repeat_interleave(self.features[name].lengths())
            # Not a product alone: of an example that counts as none, the gradient may be infinite.
            scaled = _gradient(self.leaves[name]) * of_rows[:, None]
            yield root, torch.where(of_rows[:, None] == 0, torch.zeros_like(scaled), scaled)

    @property
    def _is_pooled(self) -> bool:
        return isinstance(self.collection, ShardedScratchPipeEmbeddingBagCollection)


def _gradient(leaf: Tensor) -> Tensor:
    """What did not reach the loss has a gradient of zeros."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def cut_output(collection: ScratchpadCollection, features: KeyedJaggedTensor, output: Any) -> tuple[Cut, Any]:
    """Cut off an output of a collection from it.

    Args:
        collection: Whose output it is.
        features: What it was given, perhaps with features of others.
        output: A KeyedTensor, or a dictionary of JaggedTensors.

    Returns:
        The cut, and what the model is to be given.
    """
    names, keys = list(output.keys()), list(features.keys())
    places = _tables(collection)
    tables = [places[name][1] for name in names]
    looked_up = features.permute([keys.index(places[name][0]) for name in names])
    is_weighted = bool(getattr(collection, "_is_weighted", False))
    looked_up = KeyedJaggedTensor(
        names,
        looked_up.values(),
        looked_up.weights_or_none() if is_weighted else None,
        lengths=looked_up.lengths(),
        stride=features.stride(),
    )
    if isinstance(output, KeyedTensor):
        root = output.values()
        leaf = root.detach().requires_grad_()
        cut = Cut(collection, looked_up, tables, output.length_per_key(), {"": root}, {"": leaf})
        return cut, KeyedTensor(names, output.length_per_key(), leaf)
    roots = {name: value.values() for name, value in output.items()}
    leaves = {name: root.detach().requires_grad_() for name, root in roots.items()}
    cut = Cut(collection, looked_up, tables, [], roots, leaves)
    return cut, {
        name: JaggedTensor(leaves[name], weights=value.weights_or_none(), lengths=value.lengths())
        for name, value in output.items()
    }


def _tables(collection: ScratchpadCollection) -> dict[str, tuple[str, FeatureTable]]:
    """Name of an output to feature and table."""
    assert isinstance(collection, ShardedScratchPipeEmbeddingBagCollection | ShardedScratchPipeEmbeddingCollection), (
        "checked before"
    )
    is_pooled = isinstance(collection, ShardedScratchPipeEmbeddingBagCollection)
    configs: list[Any] = collection._embedding_bag_configs if is_pooled else collection._embedding_configs
    return {
        name: (feature, FeatureTable(config.name, is_pooled and config.pooling is PoolingType.MEAN))
        for config, names in zip(configs, get_embedding_names_by_table(configs), strict=True)
        for feature, name in zip(config.feature_names, names, strict=True)
    }
