# SPDX-License-Identifier: BSD-3-Clause
"""The grouped lookup of one sharding: scratchpad kernels for scratchpad tables, stock kernels for the rest."""

from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.embedding_kernel import BaseEmbedding
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_sharding import EmbeddingSharding
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, GroupedEmbeddingConfig, ShardingType
from torchrec.distributed.sharding.cw_sharding import CwPooledEmbeddingSharding
from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingSharding
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingSharding
from torchrec.distributed.sharding.twcw_sharding import TwCwPooledEmbeddingSharding
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe.kernel import ScratchPipeEmbeddingBag
from torchrec_scratchpipe.options import ScratchpadOptions
from torchrec_scratchpipe.planned_batch import PlannedBatch
from torchrec_scratchpipe.pool import Pool
from torchrec_scratchpipe.runner import StageRunner

__all__ = ["SCRATCHPAD_KERNEL", "SUPPORTED_SHARDING_TYPES", "ScratchPipePooledLookup", "create_pooled_lookup"]

SCRATCHPAD_KERNEL = EmbeddingComputeKernel.FUSED_UVM_CACHING

SUPPORTED_SHARDING_TYPES = (
    ShardingType.TABLE_WISE,
    ShardingType.ROW_WISE,
    ShardingType.COLUMN_WISE,
    ShardingType.TABLE_COLUMN_WISE,
)

# What each sharding tells its kernels; row-wise kernels must sum, because MEAN is divided after the reduction.
_KERNEL_SHARDING_TYPE: dict[type, ShardingType | None] = {
    TwPooledEmbeddingSharding: None,
    CwPooledEmbeddingSharding: None,
    TwCwPooledEmbeddingSharding: None,
    RwPooledEmbeddingSharding: ShardingType.ROW_WISE,
}


class ScratchPipePooledLookup(GroupedPooledEmbeddingsLookup):
    """TorchRec's grouped lookup, whose scratchpad groups can be planned ahead.

    Source:
        torchrec GroupedPooledEmbeddingsLookup (1.8.0).
    """

    def __init__(self, options: ScratchpadOptions, runner: StageRunner, **kwargs: Any) -> None:
        # The base constructor makes the kernels, so what they need must be there before it.
        self._options = options
        self._runner = runner
        super().__init__(**kwargs)

    @property
    def pools(self) -> list[Pool]:
        """All pools of this lookup."""
        return [pool for kernel in self._scratchpad_kernels() for pool in kernel.pools]

    def submit(self, features: KeyedJaggedTensor) -> list[PlannedBatch]:
        """Send one batch through the stages, ahead of its lookup.

        Args:
            features: This sharding's rank-local features, as :meth:`forward` will get them.

        Returns:
            One planned batch per scratchpad group, for :meth:`expect`.
        """
        groups = features.split(self._feature_splits)
        return [
            kernel.submit(group)
            for kernel, group in zip(self._emb_modules, groups, strict=True)
            if isinstance(kernel, ScratchPipeEmbeddingBag)
        ]

    def expect(self, batches: list[PlannedBatch]) -> None:
        """Say which planned batches the next :meth:`forward` looks up.

        Args:
            batches: From :meth:`submit`.
        """
        for kernel, batch in zip(self._scratchpad_kernels(), batches, strict=True):
            kernel.expect(batch)

    def forget(self) -> None:
        """Drop batches that were expected and not looked up."""
        for kernel in self._scratchpad_kernels():
            kernel.forget()

    def _scratchpad_kernels(self) -> list[ScratchPipeEmbeddingBag]:
        return [kernel for kernel in self._emb_modules if isinstance(kernel, ScratchPipeEmbeddingBag)]

    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        device: torch.device | None,
        pg: dist.ProcessGroup | None,
        sharding_type: ShardingType | None,
        *env: Any,
    ) -> BaseEmbedding:
        # group_tables files fused_uvm_caching under FUSED, so the tables have to be asked.
        if config.embedding_tables[0].compute_kernel is SCRATCHPAD_KERNEL:
            return ScratchPipeEmbeddingBag(config, pg, device, sharding_type, self._options, self._runner)
        return super()._create_embedding_kernel(config, device, pg, sharding_type, *env)


def create_pooled_lookup(
    sharding: EmbeddingSharding[Any, Any, Any, Any], options: ScratchpadOptions, runner: StageRunner
) -> torch.nn.Module:
    """Make the lookup of one sharding; a sharding without local scratchpad tables gets the stock one.

    Args:
        sharding: A pooled sharding of TorchRec.
        options: What the sharder was given.
        runner: Runs the stages.

    Returns:
        The lookup.

    Source:
        `create_lookup` of torchrec's pooled shardings (1.8.0).
    """
    configs: list[GroupedEmbeddingConfig] = getattr(sharding, "_grouped_embedding_configs", [])
    tables = [table for config in configs for table in config.embedding_tables]
    if not any(table.compute_kernel is SCRATCHPAD_KERNEL for table in tables):
        return sharding.create_lookup()
    return ScratchPipePooledLookup(
        options,
        runner,
        grouped_configs=configs,
        pg=sharding._pg,
        device=sharding._device,
        sharding_type=_KERNEL_SHARDING_TYPE[type(sharding)],
        env=sharding._env,
    )
