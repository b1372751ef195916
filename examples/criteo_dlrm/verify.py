# SPDX-License-Identifier: BSD-3-Clause
"""A stock TorchRec twin that trains on the same batches, so that every bit can be compared."""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder
from torchrec.distributed.types import ShardingPlan
from torchrec.models.dlrm import DLRMTrain
from torchrec.optim.keyed import KeyedOptimizer

from torchrec_scratchpipe import CheckpointManager


class Twin:
    """The same model with all tables in memory, sharded alike, started from the same weights.

    Args:
        args: The example's arguments.
        model: The model to compare with; its weights are copied.
        plan: Its sharding plan.
        make_model: Makes the unsharded model, its embedding optimizer set.
        make_optimizer: Makes the optimizers of a sharded model.
        device: Where it trains.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: DistributedModelParallel,
        plan: ShardingPlan,
        make_model: Callable[[argparse.Namespace], DLRMTrain],
        make_optimizer: Callable[[argparse.Namespace, DistributedModelParallel], KeyedOptimizer],
        device: torch.device,
    ) -> None:
        stock_plan = copy.deepcopy(plan)
        for module_plan in stock_plan.plan.values():
            for sharding in module_plan.values():
                if sharding.compute_kernel == "fused_uvm_caching":
                    sharding.compute_kernel, sharding.cache_params = "fused", None
        unsharded = make_model(args)
        sharders = [EmbeddingBagCollectionSharder(), ManagedCollisionEmbeddingBagCollectionSharder()]
        self._model = DistributedModelParallel(unsharded, device=device, plan=stock_plan, sharders=sharders)
        self._model.load_state_dict(model.state_dict())
        self._optimizer = make_optimizer(args, self._model)
        self._device = device
        self._max_loss_diff = 0.0
        self._num_batches = 0

    def load(self, checkpoints: CheckpointManager) -> None:
        """Start from the latest checkpoint.

        Args:
            checkpoints: Where it is.
        """
        checkpoints.load(self._model, self._optimizer)

    def step(self, batch: Batch, loss: Tensor, random_state: Tensor) -> None:
        """Train one batch the plain way.

        Args:
            batch: The batch that the pipeline has just trained.
            loss: The pipeline's loss for it.
            random_state: Before the pipeline's step: rows that change hands begin with random numbers.
        """
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(random_state)
            self._optimizer.zero_grad()
            own_loss, _ = self._model(batch.to(self._device))
            own_loss.backward()
            self._optimizer.step()
        self._max_loss_diff = max(self._max_loss_diff, float((own_loss.detach() - loss.detach()).abs()))
        self._num_batches += 1

    def compare(self, model: DistributedModelParallel, optimizer: KeyedOptimizer) -> dict[str, Any]:
        """Compare every weight and every optimizer state, over all ranks.

        Args:
            model: The model that used the scratchpad.
            optimizer: Its optimizers.

        Returns:
            The largest differences, and over how many values.
        """
        state_diff, num_states = _largest_difference(
            _tensors(self._optimizer.state_dict()["state"]), _tensors(optimizer.state_dict()["state"])
        )
        weight_diff, num_weights = _largest_difference(_tensors(self._model.state_dict()), _tensors(model.state_dict()))
        largest = torch.tensor([self._max_loss_diff, weight_diff, state_diff], dtype=torch.float64, device=self._device)
        counts = torch.tensor([num_weights, num_states], dtype=torch.int64, device=self._device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        dist.all_reduce(counts)
        loss_diff, weight_diff, state_diff = largest.tolist()
        return {
            "num_batches": self._num_batches,
            "num_weights": int(counts[0]),
            "num_optimizer_states": int(counts[1]),
            "max_loss_diff": loss_diff,
            "max_weight_diff": weight_diff,
            "max_optimizer_state_diff": state_diff,
            "max_abs_diff": max(loss_diff, weight_diff, state_diff),
        }


def _tensors(state: Any, path: str = "") -> dict[str, Tensor]:
    """Every local tensor of a state dict, by path."""
    if isinstance(state, ShardedTensor):
        return {f"{path}[{i}]": shard.tensor for i, shard in enumerate(state.local_shards())}
    if isinstance(state, Tensor):
        return {path: state}
    if isinstance(state, dict):
        found: dict[str, Tensor] = {}
        for key, value in state.items():
            found |= _tensors(value, f"{path}/{key}")
        return found
    return {}


def _largest_difference(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> tuple[float, int]:
    if expected.keys() != actual.keys():
        raise ValueError(f"state dicts differ in {sorted(expected.keys() ^ actual.keys())}")
    largest, num_values = 0.0, 0
    for name, tensor in expected.items():
        for ours, theirs in zip(
            tensor.reshape(-1).split(1 << 24), actual[name].reshape(-1).split(1 << 24), strict=True
        ):
            if ours.numel():
                difference = float((ours.double() - theirs.to(ours.device).double()).abs().max())
                largest = max(largest, difference if difference == difference else float("inf"))
        num_values += tensor.numel()
    return largest, num_values
