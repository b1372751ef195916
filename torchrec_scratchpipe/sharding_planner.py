# SPDX-License-Identifier: BSD-3-Clause
"""TorchRec's planner, able to place `fused_uvm_caching` tables on a CPU too."""

from typing import Any

from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ParameterConstraints, ShardingOption

from torchrec_scratchpipe.errors import ConfigError
from torchrec_scratchpipe.lookup import SCRATCHPAD_KERNEL
from torchrec_scratchpipe.options import check_load_factor

__all__ = ["ScratchPipeShardingPlanner"]


class ScratchPipeShardingPlanner(EmbeddingShardingPlanner):
    """Stock planner that also knows scratchpad tables on a CPU.

    A table is a scratchpad table when its constraints name the compute kernel `fused_uvm_caching`; `cache_params`
    gives its load factor. On CUDA this is stock TorchRec. On a CPU, where stock offers `fused` alone, such tables are
    planned as if they were `fused` and then renamed, so every table gets the sharding type that stock would choose;
    row-wise and its kin are considered only where a scratchpad table's constraints ask for them, and a table with load factor 1 stays
    `fused`, since it fits.

    Args:
        topology: As stock.
        batch_size: As stock.
        constraints: As stock.
        callbacks: As stock; they run before scratchpad tables get their final kernel name.
        **kwargs: Everything else stock takes, except `enumerator` on a CPU.
    """

    def __init__(
        self,
        topology: Topology | None = None,
        batch_size: int | None = None,
        *,
        constraints: dict[str, ParameterConstraints] | None = None,
        callbacks: list[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        scratchpad_tables = {
            name
            for name, constraint in (constraints or {}).items()
            if constraint.compute_kernels and SCRATCHPAD_KERNEL.value in constraint.compute_kernels
        }
        for name in scratchpad_tables:
            cache_params = (constraints or {})[name].cache_params
            if cache_params is not None and cache_params.load_factor is not None:
                check_load_factor(name, cache_params.load_factor)
        super().__init__(
            topology=topology,
            batch_size=batch_size,
            constraints=constraints,
            callbacks=[*(callbacks or []), self._name_scratchpad_tables],
            **kwargs,
        )
        is_cpu = self._topology.compute_device == "cpu"
        self._cpu_scratchpad_tables = scratchpad_tables if is_cpu else set()
        if is_cpu:
            if kwargs.get("enumerator") is not None:
                raise ConfigError(
                    "enumerator cannot be given on a CPU: ScratchPipeShardingPlanner needs its own to place "
                    "fused_uvm_caching tables there. Leave it out."
                )
            self._enumerator = _CpuEnumerator(
                scratchpad_tables,
                topology=self._topology,
                batch_size=self._batch_size,
                constraints=constraints,
            )

    def _name_scratchpad_tables(self, options: list[ShardingOption]) -> list[ShardingOption]:
        for option in options:
            is_alias = option.compute_kernel == EmbeddingComputeKernel.FUSED.value
            # With a load factor of 1 the table needs no scratchpad, and TorchRec's validation wants less.
            is_partial = option.cache_params is None or option.cache_params.load_factor != 1.0
            if is_alias and is_partial and option.name in self._cpu_scratchpad_tables:
                option.compute_kernel = SCRATCHPAD_KERNEL.value
        return options


class _CpuEnumerator(EmbeddingEnumerator):
    """Offers `fused`, which stock can estimate on a CPU, to scratchpad tables."""

    def __init__(self, scratchpad_tables: set[str], **kwargs: Any) -> None:
        self._scratchpad_tables = scratchpad_tables
        super().__init__(**kwargs)

    def _filter_sharding_types(self, name: str, allowed_sharding_types: list[str], *args: Any) -> list[str]:
        allowed = list(allowed_sharding_types)
        if name in self._scratchpad_tables:
            asked = (self._constraints or {})[name].sharding_types or []
            allowed += [kind.value for kind in ShardingType if kind.value in asked]
        return super()._filter_sharding_types(name, list(dict.fromkeys(allowed)), *args)

    def _filter_compute_kernels(self, name: str, allowed_compute_kernels: list[str], sharding_type: str) -> list[str]:
        if name in self._scratchpad_tables:
            is_supported = sharding_type != ShardingType.DATA_PARALLEL.value
            return [EmbeddingComputeKernel.FUSED.value] if is_supported else []
        return super()._filter_compute_kernels(name, allowed_compute_kernels, sharding_type)
