# SPDX-License-Identifier: BSD-3-Clause
"""Swaps stock sharding of collections for one whose `fused_uvm_caching` tables use the scratchpad."""

from typing import Any, Literal

import torch
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import ParameterSharding, QuantizedCommCodecs, ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from torchrec_scratchpipe.core.disk import DEFAULT_RAM_GIB
from torchrec_scratchpipe.core.slot_ops import HALF_LIFE
from torchrec_scratchpipe.sharding.collection import (
    ShardedScratchPipeEmbeddingBagCollection,
    ShardedScratchPipeEmbeddingCollection,
)
from torchrec_scratchpipe.sharding.options import ScratchpadBudget, ScratchpadOptions, make_ram_budget

__all__ = [
    "ScratchPipeEmbeddingBagCollectionSharder",
    "ScratchPipeEmbeddingCollectionSharder",
    "serves_scratchpads",
]


class ScratchPipeEmbeddingBagCollectionSharder(EmbeddingBagCollectionSharder):
    """Shards an EmbeddingBagCollection; tables planned as `fused_uvm_caching` get the scratchpad.

    All other tables, and all sharding types and kernels offered to a planner, are stock.

    Args:
        fused_params: As stock; also the place for `cache_load_factor` where a plan gives none.
        qcomm_codecs_registry: As stock.
        sharded_module_order_overwrite: As stock.
        table_dir: Existing directory for memory-mapped tables; None keeps them in RAM.
        overlap: Run the stages beside Train. False runs them on the training thread: slower, same bits.
        host_access: How a CUDA device reaches tables in RAM. ``"direct"``: its kernels read and write page-locked
            tables in place. ``"staged"``: rows are gathered on the host and copied, as they always are for
            memory-mapped tables.
        on_full: What happens if one batch alone needs more slots than there are, or than others will ever let go of.
            ``"grow"``: its pool gets a quarter more than the batch needs, with a warning, counted as `num_growths`.
            ``"error"``: :class:`ScratchpadFullError`.
        max_scratchpad_bytes: What all scratchpads of this sharder may take on a rank when they grow; None for as much
            as there is. (Beyond the budget of the sharding plan, if it has one, a warning says by how much.)
        half_life: After so many batches a use counts half, when victims are chosen.
        out_of_range_ids: ``"error"``: an id that is not in its table is an :class:`IdOutOfRangeError`, in a table that
            is kept whole too (on a CUDA device, only in scratchpad tables). ``"fbgemm"``: what FBGEMM does by its
            `bounds_check_mode`; by default it warns and takes row 0.
        ram_budget_gb: RAM, in GiB, in which tables of `table_dir` keep the rows that left the scratchpad
            last. More of it saves reads of the disk. All tables of this sharder on a rank share it.
    """

    def __init__(
        self,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        sharded_module_order_overwrite: list[str] | None = None,
        *,
        table_dir: str | None = None,
        overlap: bool = True,
        host_access: Literal["direct", "staged"] = "direct",
        on_full: Literal["grow", "error"] = "grow",
        max_scratchpad_bytes: int | None = None,
        half_life: float = HALF_LIFE,
        out_of_range_ids: Literal["error", "fbgemm"] = "error",
        ram_budget_gb: float = DEFAULT_RAM_GIB,
    ) -> None:
        super().__init__(fused_params, qcomm_codecs_registry, sharded_module_order_overwrite)
        budget = ScratchpadBudget(max_scratchpad_bytes)
        ram = make_ram_budget(ram_budget_gb)
        self._options = ScratchpadOptions(
            table_dir, overlap, host_access, on_full, budget, half_life, out_of_range_ids, ram
        )

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedScratchPipeEmbeddingBagCollection:
        """Shard a collection as planned.

        Args:
            module: The unsharded collection, on meta or with weights.
            params: The sharding plan of its tables.
            env: The process group.
            device: Where features arrive and scratchpads live.
            module_fqn: As stock.

        Returns:
            The sharded collection.

        Raises:
            ConfigError: A scratchpad table's sharding type, data type, optimizer or load factor cannot be served.
            TableStorageError: A table cannot be placed where it should be.
        """
        return ShardedScratchPipeEmbeddingBagCollection(
            module=module,
            table_name_to_parameter_sharding=params,
            env=env,
            fused_params=self.fused_params,
            device=device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
            sharded_module_order_overwrite=self._sharded_module_order_overwrite,
            options=self._options,
        )

    @property
    def sharded_module_type(self) -> type[ShardedScratchPipeEmbeddingBagCollection]:
        """What :meth:`shard` makes."""
        return ShardedScratchPipeEmbeddingBagCollection


class ScratchPipeEmbeddingCollectionSharder(EmbeddingCollectionSharder):
    """Shards an EmbeddingCollection; tables planned as `fused_uvm_caching` get the scratchpad.

    All other tables, and all sharding types and kernels offered to a planner, are stock.

    Args:
        fused_params: As stock; also the place for `cache_load_factor` where a plan gives none.
        qcomm_codecs_registry: As stock.
        use_index_dedup: As stock.
        table_dir: Existing directory for memory-mapped tables; None keeps them in RAM.
        overlap: Run the stages beside Train. False runs them on the training thread: slower, same bits.
        host_access: How a CUDA device reaches tables in RAM. ``"direct"``: its kernels read and write page-locked
            tables in place. ``"staged"``: rows are gathered on the host and copied, as they always are for
            memory-mapped tables.
        on_full: What happens if one batch alone needs more slots than there are, or than others will ever let go of.
            ``"grow"``: its pool gets a quarter more than the batch needs, with a warning, counted as `num_growths`.
            ``"error"``: :class:`ScratchpadFullError`.
        max_scratchpad_bytes: What all scratchpads of this sharder may take on a rank when they grow; None for as much
            as there is. (Beyond the budget of the sharding plan, if it has one, a warning says by how much.)
        half_life: After so many batches a use counts half, when victims are chosen.
        out_of_range_ids: ``"error"``: an id that is not in its table is an :class:`IdOutOfRangeError`, in a table that
            is kept whole too (on a CUDA device, only in scratchpad tables). ``"fbgemm"``: what FBGEMM does by its
            `bounds_check_mode`; by default it warns and takes row 0.
        ram_budget_gb: RAM, in GiB, in which tables of `table_dir` keep the rows that left the scratchpad
            last. More of it saves reads of the disk. All tables of this sharder on a rank share it.
    """

    def __init__(
        self,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        use_index_dedup: bool = False,
        *,
        table_dir: str | None = None,
        overlap: bool = True,
        host_access: Literal["direct", "staged"] = "direct",
        on_full: Literal["grow", "error"] = "grow",
        max_scratchpad_bytes: int | None = None,
        half_life: float = HALF_LIFE,
        out_of_range_ids: Literal["error", "fbgemm"] = "error",
        ram_budget_gb: float = DEFAULT_RAM_GIB,
    ) -> None:
        super().__init__(fused_params, qcomm_codecs_registry, use_index_dedup)
        budget = ScratchpadBudget(max_scratchpad_bytes)
        ram = make_ram_budget(ram_budget_gb)
        self._options = ScratchpadOptions(
            table_dir, overlap, host_access, on_full, budget, half_life, out_of_range_ids, ram
        )

    def shard(
        self,
        module: EmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedScratchPipeEmbeddingCollection:
        """Shard a collection as planned.

        Args:
            module: The unsharded collection, on meta or with weights.
            params: The sharding plan of its tables.
            env: The process group.
            device: Where features arrive and scratchpads live.
            module_fqn: As stock.

        Returns:
            The sharded collection.

        Raises:
            ConfigError: A scratchpad table's sharding type, data type, optimizer or load factor cannot be served.
            TableStorageError: A table cannot be placed where it should be.
        """
        return ShardedScratchPipeEmbeddingCollection(
            module=module,
            table_name_to_parameter_sharding=params,
            env=env,
            fused_params=self.fused_params,
            device=device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            use_index_dedup=self._use_index_dedup,
            module_fqn=module_fqn,
            options=self._options,
        )

    @property
    def sharded_module_type(self) -> type[ShardedScratchPipeEmbeddingCollection]:
        """What :meth:`shard` makes."""
        return ShardedScratchPipeEmbeddingCollection


def serves_scratchpads(sharder: object) -> bool:
    """Whether tables that are planned as `fused_uvm_caching` get a scratchpad from this sharder."""
    for inner in ("_ebc_sharder", "_e_sharder"):  # of feature processing and of managed collision
        sharder = getattr(sharder, inner, sharder)
    return isinstance(sharder, ScratchPipeEmbeddingBagCollectionSharder | ScratchPipeEmbeddingCollectionSharder)
