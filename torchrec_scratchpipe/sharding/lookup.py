# SPDX-License-Identifier: BSD-3-Clause
"""The grouped lookup of one sharding: scratchpad kernels for scratchpad tables, stock kernels for the rest."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embedding_kernel import BaseEmbedding
from torchrec.distributed.embedding_lookup import GroupedEmbeddingsLookup, GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_sharding import EmbeddingSharding
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, GroupedEmbeddingConfig, ShardingType
from torchrec.distributed.sharding.grid_sharding import GridPooledEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding
from torchrec.distributed.sharding.twrw_sharding import TwRwPooledEmbeddingSharding
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe.core.runner import StageRunner
from torchrec_scratchpipe.sharding.kernel import ScratchpadKernel, ScratchPipeEmbedding, ScratchPipeEmbeddingBag
from torchrec_scratchpipe.sharding.options import ScratchpadOptions

__all__ = [
    "SCRATCHPAD_KERNEL",
    "ScratchPipePooledLookup",
    "ScratchPipeSequenceLookup",
    "ScratchpadLookup",
    "create_pooled_lookup",
    "create_sequence_lookup",
]

SCRATCHPAD_KERNEL = EmbeddingComputeKernel.FUSED_UVM_CACHING


class ScratchpadLookup:
    """What pooled and unpooled lookups share: scratchpad groups can be planned ahead; mixed into TorchRec's class."""

    # From TorchRec's grouped lookups.
    _emb_modules: nn.ModuleList
    _feature_splits: list[int]

    def __init__(self, *args: Any, options: ScratchpadOptions, runner: StageRunner, **kwargs: Any) -> None:
        # The base constructor makes the kernels, so what they need must be there before it.
        self._options = options
        self._runner = runner
        super().__init__(*args, **kwargs)

    def register_optim_state_tracker_fn(self, record_fn: Callable[[KeyedJaggedTensor, Tensor, Any], None]) -> None:
        """As stock; of scratchpad tables, the states are on the host, and so are the ids that find them."""

        def record(features: KeyedJaggedTensor, output: Tensor, kernel: Any) -> None:
            if isinstance(kernel, ScratchpadKernel):
                features, kernel = features.to(torch.device("cpu")), _TrackedKernel(kernel)
            record_fn(features, output, kernel)

        super().register_optim_state_tracker_fn(record)  # type: ignore[misc]


class _TrackedKernel:
    """What TorchRec's ModelDeltaTracker asks of a kernel, and of its TBE, answered by tables instead of slots."""

    def __init__(self, kernel: ScratchpadKernel) -> None:
        self._config = kernel._config
        self._emb_module = self.emb_module = self
        self.split_optimizer_states = kernel.emb_module.split_optimizer_states

    @property
    def momentum1_dev(self) -> Tensor:
        return torch.cat([states[0].reshape(-1) for states in self.split_optimizer_states()])


class ScratchPipePooledLookup(ScratchpadLookup, GroupedPooledEmbeddingsLookup):
    """TorchRec's pooled lookup, with scratchpad kernels. Source: torchrec GroupedPooledEmbeddingsLookup (1.8.0)."""

    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        device: torch.device | None,
        pg: dist.ProcessGroup | None,
        sharding_type: ShardingType | None,
        *env: Any,
    ) -> BaseEmbedding:
        if _is_scratchpad_group(config, self._options):
            return ScratchPipeEmbeddingBag(
                config, pg, device, sharding_type, options=self._options, runner=self._runner
            )
        return super()._create_embedding_kernel(config, device, pg, sharding_type, *env)

    def _forward_with_vbe_merging(self, features_by_group: list[KeyedJaggedTensor], device: torch.device) -> Tensor:
        # FBGEMM's CPU kernels cannot write into the output that stock shares among several groups.
        if device.type == "cpu":
            return self._merge_variable_batch_embeddings(
                self._forward(features_by_group), self._vbe_splits(features_by_group)
            )
        return super()._forward_with_vbe_merging(features_by_group, device)


class ScratchPipeSequenceLookup(ScratchpadLookup, GroupedEmbeddingsLookup):
    """TorchRec's unpooled lookup, with scratchpad kernels. Source: torchrec GroupedEmbeddingsLookup (1.8.0)."""

    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        pg: dist.ProcessGroup | None,
        device: torch.device | None,
        *env: Any,
    ) -> BaseEmbedding:
        if _is_scratchpad_group(config, self._options):
            return ScratchPipeEmbedding(config, pg, device, options=self._options, runner=self._runner)
        return super()._create_embedding_kernel(config, pg, device, *env)


def create_pooled_lookup(
    sharding: EmbeddingSharding[Any, Any, Any, Any], options: ScratchpadOptions, runner: StageRunner
) -> nn.Module:
    """Make the lookup of one sharding of bags; a sharding without local scratchpad tables gets the stock one.

    Source: `create_lookup` of torchrec's pooled shardings (1.8.0).
    """
    return _create_lookup(
        ScratchPipePooledLookup, sharding, options, runner, sharding_type=_kernel_sharding_type(sharding)
    )


def create_sequence_lookup(
    sharding: EmbeddingSharding[Any, Any, Any, Any], options: ScratchpadOptions, runner: StageRunner
) -> nn.Module:
    """Make the lookup of one sharding of unpooled embeddings; as :func:`create_pooled_lookup`.

    Source: `create_lookup` of torchrec's sequence shardings (1.8.0).
    """
    return _create_lookup(ScratchPipeSequenceLookup, sharding, options, runner)


def _create_lookup(
    lookup_class: type[Any],
    sharding: EmbeddingSharding[Any, Any, Any, Any],
    options: ScratchpadOptions,
    runner: StageRunner,
    **kwargs: Any,
) -> nn.Module:
    groups = _local_groups(sharding)
    if not any(_is_scratchpad_group(group, options) for group in groups):
        return sharding.create_lookup()
    return lookup_class(
        options=options,
        runner=runner,
        grouped_configs=groups,
        pg=sharding._pg,
        device=sharding._device,
        env=sharding._env,
        **kwargs,
    )


def _local_groups(sharding: EmbeddingSharding[Any, Any, Any, Any]) -> list[GroupedEmbeddingConfig]:
    """The kernel groups of this rank."""
    if isinstance(sharding, TwRwPooledEmbeddingSharding | GridPooledEmbeddingSharding):
        groups: list[GroupedEmbeddingConfig] = sharding._grouped_embedding_configs_per_rank[sharding._rank]
        return groups
    return getattr(sharding, "_grouped_embedding_configs", [])


def _kernel_sharding_type(sharding: EmbeddingSharding[Any, Any, Any, Any]) -> ShardingType | None:
    """What the sharding tells its kernels: row-wise kernels must sum, MEAN is divided after the reduction."""
    if isinstance(sharding, RwPooledEmbeddingSharding):
        return ShardingType.ROW_WISE
    if isinstance(sharding, TwRwPooledEmbeddingSharding | GridPooledEmbeddingSharding):
        return ShardingType.TABLE_ROW_WISE
    return None


def _is_scratchpad_group(config: GroupedEmbeddingConfig, options: ScratchpadOptions) -> bool:
    return any(table.name in options.load_factors for table in config.embedding_tables)
