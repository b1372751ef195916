# SPDX-License-Identifier: BSD-3-Clause
"""What is asked of a whole model: its scratchpads, their counts, and whether all tables that should have one do."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.itep_embeddingbag import (
    ShardedITEPEmbeddingBagCollection,
    ShardedITEPEmbeddingCollection,
)
from torchrec.modules.itep_embedding_modules import ITEPEmbeddingBagCollection, ITEPEmbeddingCollection

from torchrec_scratchpipe.core.rows import StageSpan
from torchrec_scratchpipe.core.stats import PoolStats
from torchrec_scratchpipe.errors import ConfigError
from torchrec_scratchpipe.sharding.collection import ScratchpadCollection
from torchrec_scratchpipe.sharding.lookup import SCRATCHPAD_KERNEL

__all__ = [
    "only_located",
    "only_read",
    "refuse_pruning",
    "scratchpad_collections",
    "scratchpad_stats",
    "stage_spans",
    "warn_of_missing_scratchpads",
    "warn_of_stock_sharder",
]

logger: logging.Logger = logging.getLogger(__name__)

_PRUNED = (
    ITEPEmbeddingBagCollection,
    ITEPEmbeddingCollection,
    ShardedITEPEmbeddingBagCollection,
    ShardedITEPEmbeddingCollection,
)


def scratchpad_stats(module: nn.Module) -> list[PoolStats]:
    """Count what the scratchpads of a model did on this rank; waits for the device.

    Args:
        module: A sharded model, or any part of one.

    Returns:
        One per pool; empty where no table uses a scratchpad.
    """
    stats: list[PoolStats] = []
    for collection in scratchpad_collections(module):
        with collection._runner.between_batches():
            stats.extend(pool.stats() for pool in collection.pools)
    return stats


def only_read(module: nn.Module) -> AbstractContextManager[None]:
    """While entered, whoever takes a state_dict only reads it: resident rows need not be read anew afterwards."""
    return _with_runners(module, "is_only_read")


def only_located(module: nn.Module) -> AbstractContextManager[None]:
    """While entered, a state_dict says where tables are, and does not bring them up to date."""
    return _with_runners(module, "is_only_located")


@contextmanager
def _with_runners(module: nn.Module, flag: str) -> Iterator[None]:
    runners = [collection._runner for collection in scratchpad_collections(module)]
    for runner in runners:
        setattr(runner, flag, True)
    try:
        yield
    finally:
        for runner in runners:
            setattr(runner, flag, False)


def stage_spans(module: nn.Module) -> list[list[StageSpan]]:
    """When the latest stages ran on this rank, for plots; a bounded number is kept.

    Args:
        module: A sharded model, or any part of one.

    Returns:
        Per pool, in the order of :func:`scratchpad_stats`.
    """
    return [list(pool.counters.spans) for collection in scratchpad_collections(module) for pool in collection.pools]


def refuse_pruning(module: nn.Module, table_names: Sequence[str], where: str) -> None:
    """Refuse scratchpad tables in a collection that is pruned in training. Raises ConfigError."""
    if table_names and isinstance(module, _PRUNED):
        raise ConfigError(
            f"{where}: tables {', '.join(table_names)} are planned for a scratchpad, and in-training pruning (ITEP) "
            "remaps their ids in the middle of forward, when rows should have come already. Use compute kernel fused "
            "for them, or managed collision, which is planned ahead."
        )


def warn_of_missing_scratchpads(module: nn.Module, lookahead: int) -> None:
    """Say which tables should have a scratchpad and have none, and whether the plan has room for the lookahead."""
    for name, part in module.named_modules():
        if isinstance(part, _PRUNED):
            inner = scratchpad_collections(part)
            refuse_pruning(part, [table for one in inner for table in one._options.load_factors], f"collection {name}")
        if isinstance(part, ScratchpadCollection):
            planned = part._options.lookahead
            if planned is not None and lookahead > planned:
                logger.warning(
                    "collection %s: lookahead is %d, the sharding plan was made for %d. Its scratchpads may be too "
                    "small: Plan will wait for Train, and evaluation beside it will make them grow. Set "
                    "lookahead=planner.lookahead, or plan for more.",
                    name,
                    lookahead,
                    planned,
                )
        elif isinstance(part, ShardedEmbeddingBagCollection | ShardedEmbeddingCollection):
            plan = part.module_sharding_plan
            warn_of_stock_sharder(
                [table for table, sharding in plan.items() if sharding.compute_kernel == SCRATCHPAD_KERNEL.value],
                f"collection {name}",
            )


def warn_of_stock_sharder(table_names: Sequence[str], where: str) -> None:
    """Say that tables which are planned for a scratchpad get none."""
    if table_names:
        logger.warning(
            "%s: tables %s are planned as %s, and no scratchpad serves them: another sharder than ScratchPipe's takes "
            "their collection. Of several sharders for one type of module the last in the list counts. Put ours last, "
            "or leave TorchRec's (such as those of get_default_sharders()) out.",
            where,
            ", ".join(table_names),
            SCRATCHPAD_KERNEL.value,
        )


def scratchpad_collections(module: nn.Module) -> list[ScratchpadCollection]:
    """All collections with a scratchpad."""
    return [part for part in module.modules() if isinstance(part, ScratchpadCollection)]
