# SPDX-License-Identifier: BSD-3-Clause
"""What cannot be trained in private, by name."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType as OptimType
from torch import nn
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_configs import PoolingType

from torchrec_scratchpipe.errors import ConfigError
from torchrec_scratchpipe.sharding.collection import ScratchpadCollection

__all__ = ["check_model"]

# Settings of an embedding's optimizer that change rows in another way than by rate times gradient.
_OTHER_CHANGES = ("weight_decay", "gradient_clipping", "max_gradient", "max_norm", "weight_norm_coefficient")


def check_model(model: nn.Module, collections: Sequence[ScratchpadCollection]) -> None:
    """Refuse a model of which a part would get no noise, or more than its gradient tells. Raises ConfigError."""
    if not collections:
        raise ConfigError(
            "privacy: the model has no table behind a scratchpad. Plan its tables as fused_uvm_caching, and give "
            "DistributedModelParallel ScratchPipe's sharders."
        )
    for reason in _reasons(model, collections):
        raise ConfigError(f"privacy: {reason}")


def _reasons(model: nn.Module, collections: Sequence[ScratchpadCollection]) -> Iterator[str]:
    for path, module in model.named_modules():
        if isinstance(module, ShardedModule) and not isinstance(module, ScratchpadCollection):
            yield (
                f"module {path} is a {type(module).__name__}, whose rows change in other ways than by clipped "
                "gradients. Use an EmbeddingBagCollection or EmbeddingCollection with ScratchPipe's sharder."
            )
    for collection in collections:
        behind = collection._options.load_factors
        for table, sharding in collection.module_sharding_plan.items():
            if table not in behind:
                kind = f"{sharding.sharding_type}, {sharding.compute_kernel}"
                yield (
                    f"table {table} is planned as {kind}: no noise reaches its rows. Plan it as fused_uvm_caching; "
                    "with load_factor 1.0 all of it is on the device."
                )
        if getattr(collection, "_qcomm_codecs_registry", None):
            yield (
                f"tables {', '.join(behind)}: their gradients are quantised between ranks, after they were clipped. "
                "Leave qcomm_codecs_registry out."
            )
        configs = getattr(collection, "_embedding_bag_configs", [])
        means = [config.name for config in configs if config.pooling is PoolingType.MEAN]
        if means and getattr(collection, "_is_weighted", False):
            yield (
                f"tables {', '.join(means)} pool by the mean, and ids have weights: FBGEMM's gradient is not that of "
                "its output then. Pool by the sum, with weights that are divided by the number of ids."
            )
        for kernel in collection.kernels:
            yield from _reasons_of_kernel(kernel)


def _reasons_of_kernel(kernel: Any) -> Iterator[str]:
    names = ", ".join(table.name for table in kernel._config.embedding_tables)
    optimizer = kernel.emb_module.optimizer
    if optimizer not in (OptimType.EXACT_SGD, OptimType.SGD):
        yield (
            f"tables {names} are trained by {optimizer}: noise that comes late cannot go through its states. Use SGD "
            "for tables; the dense layers may have any optimizer."
        )
    settings = kernel._config.fused_params or {}
    for name in _OTHER_CHANGES:
        if settings.get(name):
            yield (
                f"tables {names} have {name}={settings[name]}, which changes rows beside their gradient. Leave it out."
            )
    for pool in kernel.pools:
        if pool.host_table.layout.dtype is not torch.float32:
            yield (
                f"tables {names} are {pool.host_table.layout.dtype}, in which small noise is rounded away. Use "
                "DataType.FP32."
            )
