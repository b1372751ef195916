# SPDX-License-Identifier: BSD-3-Clause
"""Ids as managed collision will remap them, for measurements of what a job looks up.

Shapes: ``I`` ids.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrec.modules.mc_embedding_modules import BaseManagedCollisionEmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe.errors import MeasurementError
from torchrec_scratchpipe.planning.checks import few

__all__ = ["Remapping", "remappings_of"]


class Remapping:
    """A copy of one unsharded collection's collision modules, which goes from batch to batch as training would.

    On several ranks, each remaps ids into its own rows of a table. Here one remaps those of all ranks, so that the
    rows differ and their numbers do not.
    """

    def __init__(self, module: BaseManagedCollisionEmbeddingCollection) -> None:
        self._collisions = copy.deepcopy(module._managed_collision_collection).train()
        configs = self._collisions.embedding_configs()
        self._names = [name for config in configs for name in config.feature_names]
        modules = self._collisions._managed_collision_modules
        self._device = next(iter(modules.children()))._device
        if self._device.type == "meta":  # they get their memory when they are sharded, and so here
            self._device = torch.device("cpu")
            for config in configs:
                size = config.num_embeddings
                modules[config.name] = modules[config.name].rebuild_with_output_id_range(
                    (0, size), [0, size], self._device
                )

    @torch.no_grad()
    def apply(self, ids_of_features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The ids of its features, remapped, and those of others as they are; a batch without a feature stays so.

        Shapes: [I] int64 each. Raises MeasurementError.
        """
        remapped = dict(ids_of_features)
        if all(name in ids_of_features for name in self._names):
            ids = [ids_of_features[name].long() for name in self._names]
            lengths = torch.tensor([some.numel() for some in ids], dtype=torch.int64)
            features = KeyedJaggedTensor(self._names, torch.cat(ids), lengths=lengths).to(self._device)
            try:
                features = self._collisions(features)
            except RuntimeError as error:  # FBGEMM's hash kernel trains on CUDA alone
                raise MeasurementError(
                    f"features {few(self._names)}: their managed collision cannot run on {self._device} ({error}). "
                    "Make it on the device that trains, or give get_features, which returns ids that are remapped "
                    "already, and the tables' configs in place of the model."
                ) from error
            self._collisions.evict()
            remapped.update({name: features[name].values() for name in self._names})
        return remapped


def remappings_of(module_or_tables: object) -> list[Remapping]:
    """One for each collection with managed collision in a model; none for tables' configs."""
    if not isinstance(module_or_tables, nn.Module):
        return []
    parts = module_or_tables.modules()
    return [Remapping(part) for part in parts if isinstance(part, BaseManagedCollisionEmbeddingCollection)]
