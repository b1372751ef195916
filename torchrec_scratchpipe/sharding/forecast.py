# SPDX-License-Identifier: BSD-3-Clause
"""Foretells the rows that TorchRec's managed collision will give to the ids of coming batches.

Managed collision gives ids rows while their batch trains, and takes rows from ids that have grown rare. Rows must be
on their way `lookahead` batches earlier. So a copy of the collision modules runs ahead, over the same batches in the
same order. The modules themselves run when stock's do, on the training thread: their state, their evictions and their
random numbers are stock's at any moment.

What they give is compared with what was foretold. It may differ: somebody has loaded a state_dict, ids are let in at
random, or the clock has ended an id's time. Then the batch is fetched on the spot, which is right and slow, and the
copy is made anew.
"""

import copy
import logging
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.mc_embedding_modules import BaseShardedManagedCollisionEmbeddingCollection
from torchrec.distributed.mc_modules import ShardedManagedCollisionCollection

from torchrec_scratchpipe.sharding.collection import PlannedBatches

__all__ = ["Forecast", "Forecaster"]

logger: logging.Logger = logging.getLogger(__name__)


class Forecast(PlannedBatches):
    """What one batch will look up, as it was foretold, and the batch's way through the stages."""

    def __init__(self, forecaster: "Forecaster", features: KJTList) -> None:
        self.features = features
        self._forecaster = forecaster

    def confirm(self, features: KJTList) -> bool:
        """Whether it was right; a wrong one lets go of its slots."""
        is_right = len(features) == len(self.features) and all(
            torch.equal(one.values(), other.values()) and torch.equal(one.lengths(), other.lengths())
            for one, other in zip(features, self.features, strict=True)
        )
        if not is_right:
            self._forecaster.is_wrong = True
            self.release()
        return is_right


class Forecaster:
    """A copy of one collection's collision modules, which runs ahead of them."""

    def __init__(self, module: BaseShardedManagedCollisionEmbeddingCollection[Any]) -> None:
        self._real: ShardedManagedCollisionCollection = module._managed_collision_collection
        self._ahead: ShardedManagedCollisionCollection | None = None
        self._can_copy = True
        self.is_wrong = False  # a batch was not as foretold, so that the next ones may not be either

    def start_anew(self) -> None:
        """Foretell from what the modules are now: the next forecast is of the batch that trains next."""
        self._ahead = None
        self.is_wrong = False

    @torch.no_grad()
    def forecast(self, context: Any, dist_input: KJTList) -> Forecast | None:
        """Foretell the batch after the last one; its Train finds the forecast in its context.

        None if the modules cannot be copied, which a warning says once.
        """
        if self._ahead is None and self._can_copy:
            try:
                self._ahead = _copied(self._real)
            except Exception as error:  # users write collision modules of their own
                self._can_copy = False
                logger.warning(
                    "managed collision of tables %s cannot be planned ahead, because its modules cannot be copied "
                    "(%s: %s). Rows are fetched on the spot: right, but slow. Make copy.deepcopy() of them work.",
                    ", ".join(self._real._managed_collision_modules),
                    type(error).__name__,
                    error,
                )
        if self._ahead is None:
            return None
        self._ahead._managed_collision_modules.train(self._real.training)
        device = self._real._device
        # Who draws random numbers draws other ones here than when the batch trains, and must not miss these then.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            features = self._ahead.compute(context, dist_input)
        self._ahead.evict()
        forecast = context.forecast = Forecast(self, features)
        return forecast


def _copied(real: ShardedManagedCollisionCollection) -> ShardedManagedCollisionCollection:
    """A collection whose collision modules are copies, and which shares all else."""
    ahead = copy.copy(real)
    modules: nn.ModuleDict = copy.deepcopy(real._managed_collision_modules)
    ahead._modules = {**real._modules, "_managed_collision_modules": modules}
    ahead.post_lookup_tracker_fn = None  # what is foretold is not looked up
    for module in modules.children():
        if getattr(module, "_scalar_logger", None) is not None:
            vars(module).update(_scalar_logger=None, _tb_logging_frequency=0)
    return ahead
