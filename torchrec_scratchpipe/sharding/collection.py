# SPDX-License-Identifier: BSD-3-Clause
"""What sharded collections of bags and of unpooled embeddings share: batches that are planned ahead.

Shapes: ``I`` ids.
"""

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embedding_types import KJTList, ShardingType
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.fp_embeddingbag import ShardedFeatureProcessedEmbeddingBagCollection
from torchrec.distributed.types import ParameterSharding
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_scratchpipe.core.batch import Batch, check_ids
from torchrec_scratchpipe.core.pool import Pool
from torchrec_scratchpipe.core.rows import StageSpan
from torchrec_scratchpipe.core.runner import OverlappedStageRunner, StageRunner
from torchrec_scratchpipe.core.snapshot import SnapshotStorage, TableSnapshot
from torchrec_scratchpipe.core.stats import PoolStats
from torchrec_scratchpipe.errors import IdOutOfRangeError
from torchrec_scratchpipe.sharding.lookup import SCRATCHPAD_KERNEL, ScratchpadLookup
from torchrec_scratchpipe.sharding.options import ScratchpadOptions
from torchrec_scratchpipe.sharding.peers import PeerNotice

__all__ = [
    "PlannedBatches",
    "ScratchpadCollection",
    "collection_to_plan",
    "deferring_id_errors",
    "only_read",
    "scratchpad_collections",
    "scratchpad_stats",
    "stage_spans",
    "warn_of_missing_scratchpads",
    "warn_of_stock_sharder",
]

logger: logging.Logger = logging.getLogger(__name__)

# Shardings whose input distribution sends an id to the rank that holds its block of rows.
_ROW_WISE = (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value)


class PlannedBatches:
    """One batch's way through the stages, by lookup, until it is dropped; mixed into TorchRec's context."""

    id_error: IdOutOfRangeError | None = None  # found before distribution; the batch's own Train raises it
    planned_batches: dict[int, list[Batch]]  # by the lookup's position in the collection

    def __new__(cls, *_args: Any, **_kwargs: Any) -> "PlannedBatches":
        """Make a context without batches, whatever TorchRec's constructor takes."""
        # Not every context of TorchRec, in every version, is a dataclass that a field could be added to.
        context = super().__new__(cls)
        context.planned_batches = {}
        return context

    def release(self) -> None:
        """Let go of the batch's slots; it will not be looked up."""
        for batches in self.planned_batches.values():
            for batch in batches:
                batch.let_go(batch)
        self.planned_batches.clear()


class _HostTableModule(nn.Module):
    """Has the parameter of a table that stays on the host, wherever its model is moved.

    DistributedModelParallel moves what it wraps to the device. A copy of the table would be made there, and whoever
    loads or reads the parameter would have that copy instead of the table.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> "_HostTableModule":
        return self


class ScratchpadCollection:
    """Planning ahead, for a sharded collection of TorchRec whose `fused_uvm_caching` tables use the scratchpad.

    Mixed into the stock class, whose distributions, parameters and state_dict stay as they are.
    """

    defers_id_errors = False  # until the batch trains; while a pipeline loads it

    # From TorchRec's sharded collections.
    module_sharding_plan: Any
    _lookups: list[nn.Module]

    def _set_up_stages(self, options: ScratchpadOptions, device: torch.device | None) -> None:
        """What a constructor does before TorchRec's, which makes the lookups."""
        self._options = options
        self._peers = PeerNotice()
        make_runner = OverlappedStageRunner if options.overlap else StageRunner
        self._runner: StageRunner = make_runner(device or torch.device("cpu"))

    def _set_up_checks(self, configs: Iterable[BaseEmbeddingConfig]) -> None:
        """What a constructor does after TorchRec's."""
        self._has_said_on_the_spot = False
        self._checked_features: dict[str, list[BaseEmbeddingConfig]] = {}
        for config in configs if self._options.load_factors and self._options.out_of_range_ids == "error" else ():
            sharding: ParameterSharding = self.module_sharding_plan[config.name]
            if sharding.sharding_type in _ROW_WISE or config.name not in self._options.load_factors:
                for feature in config.feature_names:
                    self._checked_features.setdefault(feature, []).append(config)
        # Gigabytes of initial weights would otherwise be written out during the first minutes of training.
        for pool in self.pools:
            pool.host_table.persist()

    def _initialize_torch_state(self, *args: Any, **kwargs: Any) -> None:
        """As stock: make parameters and their names; those of host tables then stay on the host."""
        super()._initialize_torch_state(*args, **kwargs)  # type: ignore[misc]
        holders: dict[str, nn.Module] = dict(getattr(self, "embedding_bags", None) or getattr(self, "embeddings", {}))
        for name, holder in holders.items() if self.pools else ():
            if name in self._options.load_factors:
                holder.__class__ = _HostTableModule

    @property
    def pools(self) -> list[Pool]:
        """All pools of this rank."""
        return [pool for _, lookup in self._scratchpad_lookups() for pool in lookup.pools]

    def prefetch(self, dist_input: KJTList, forward_stream: Any = None, ctx: Any = None) -> None:
        """Send a distributed batch through the stages; any number of batches may be ahead.

        `ctx` is the batch's own context, which will be passed to `compute_and_output_dist`. Without one nothing is
        sent, and the batch is fetched on the spot. Events order the streams, so that `forward_stream` is not used.
        """
        if not isinstance(ctx, PlannedBatches):
            return
        for index, lookup in self._scratchpad_lookups():
            if index not in ctx.planned_batches:
                ctx.planned_batches[index] = lookup.make_batches(dist_input[index])
            for batch in ctx.planned_batches[index]:
                self._runner.submit(batch)

    def see(self, dist_input: KJTList, ctx: PlannedBatches) -> None:
        """Show a distributed batch to the choice of victims before :meth:`prefetch`; no row moves, no slot is held."""
        for index, lookup in self._scratchpad_lookups():
            ctx.planned_batches[index] = lookup.make_batches(dist_input[index])
            for batch in ctx.planned_batches[index]:
                self._runner.see(batch)

    def snapshot(self, storage: SnapshotStorage) -> list[tuple[Pool, TableSnapshot]]:
        """Flush, and keep all rows readable as they are now; training may go on. Raises TableStorageError."""
        taken: list[tuple[Pool, TableSnapshot]] = []
        self._runner.wait_until_idle()
        with self._runner.between_batches():
            try:
                taken.extend((pool, pool.snapshot(storage)) for pool in self.pools)
            except BaseException:
                for pool, snapshot in taken:
                    pool.host_table.close_snapshot(snapshot)
                raise
        return taken

    def holding_back(self) -> AbstractContextManager[None]:
        """See :meth:`StageRunner.holding_back`."""
        return self._runner.holding_back()

    def wait_until_idle(self) -> None:
        """Wait until no stage runs, nor will before the next batch is sent or looked up."""
        self._runner.wait_until_idle()

    def _check_ids(self, ctx: Any, features: Any) -> Any:
        """Find ids out of range that Plan does not see; on a CPU only.

        Those of tables that are kept whole, and those that stock's row-wise distribution would wrap onto rows of other
        ids. It is an error before anything is exchanged with other ranks. In a pipeline, batches in flight are good, so
        that the error waits until it is this one's turn; until then row 0 stands for such ids, on every rank.

        Raises IdOutOfRangeError.
        """
        try:
            self._check_features(features)
        except IdOutOfRangeError as error:
            if not self.defers_id_errors or not isinstance(features, KeyedJaggedTensor):
                raise
            ctx.id_error = error
            return self._within_tables(features)
        return features

    def _check_features(self, features: Any) -> None:
        for key, configs in self._checked_features.items():
            if key not in features.keys():  # noqa: SIM118 - a KeyedJaggedTensor is no mapping
                continue
            feature = features[key]
            ids = feature.values() if isinstance(feature, JaggedTensor | torch.Tensor) else None
            if ids is not None and ids.device.type == "cpu":
                for config in configs:
                    check_ids(config.name, key, ids, config.num_embeddings)

    def _within_tables(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        bounds = features.offset_per_key()
        ids = features.values().clone()
        for key, first, last in zip(features.keys(), bounds[:-1], bounds[1:], strict=True):
            for config in self._checked_features.get(key, ()):
                some = ids[first:last]
                some[(some < 0) | (some >= config.num_embeddings)] = 0
        within = copy.copy(features)
        within._values, within._jt_dict = ids, None
        return within

    @contextmanager
    def _looking_up(self, ctx: Any) -> Iterator[None]:
        """While entered, lookups are for the batches planned with this context, where there are any."""
        if isinstance(ctx, PlannedBatches):
            if not ctx.planned_batches:
                self._say_on_the_spot()
            for index, lookup in self._scratchpad_lookups():
                if index in ctx.planned_batches:
                    lookup.expect(ctx.planned_batches[index])
        try:
            with self._peers.told():
                if isinstance(ctx, PlannedBatches) and ctx.id_error is not None:
                    raise ctx.id_error
                yield
        finally:
            # If one lookup raises, those after it have not taken their batch, and must not take it next time.
            for _, lookup in self._scratchpad_lookups():
                lookup.drop_expected()
        self._peers.forget()

    def _say_on_the_spot(self) -> None:
        """Once, when a training step has to wait for rows because nobody has planned it."""
        is_training = torch.is_grad_enabled() and self.training  # type: ignore[attr-defined]
        is_waiting = is_training and bool(self._options.load_factors)
        if is_waiting and not self._has_said_on_the_spot:
            self._has_said_on_the_spot = True
            logger.warning(
                "rows of tables %s are fetched on the spot, while the training step waits: right, but slow. "
                "ScratchPipeTrainPipeline brings them ahead of time.",
                ", ".join(self._options.load_factors),
            )

    def _scratchpad_lookups(self) -> list[tuple[int, ScratchpadLookup]]:
        return [(index, lookup) for index, lookup in enumerate(self._lookups) if isinstance(lookup, ScratchpadLookup)]


def collection_to_plan(module: nn.Module) -> ScratchpadCollection | None:
    """The collection whose batches can be planned when this sharded module's input is known."""
    if isinstance(module, ShardedFeatureProcessedEmbeddingBagCollection):
        module = module._embedding_bag_collection
    return module if isinstance(module, ScratchpadCollection) else None


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


@contextmanager
def only_read(module: nn.Module) -> Iterator[None]:
    """While entered, whoever takes a state_dict only reads it: resident rows need not be read anew afterwards."""
    runners = [collection._runner for collection in scratchpad_collections(module)]
    for runner in runners:
        runner.is_only_read = True
    try:
        yield
    finally:
        for runner in runners:
            runner.is_only_read = False


def stage_spans(module: nn.Module) -> list[list[StageSpan]]:
    """When the latest stages ran on this rank, for plots; a bounded number is kept.

    Args:
        module: A sharded model, or any part of one.

    Returns:
        Per pool, in the order of :func:`scratchpad_stats`.
    """
    return [list(pool.counters.spans) for collection in scratchpad_collections(module) for pool in collection.pools]


@contextmanager
def deferring_id_errors(collections: Sequence[ScratchpadCollection]) -> Iterator[None]:
    """While entered, a batch with an id out of range is loaded, and raises when it trains."""
    for collection in collections:
        collection.defers_id_errors = True
    try:
        yield
    finally:
        for collection in collections:
            collection.defers_id_errors = False


def warn_of_missing_scratchpads(module: nn.Module, lookahead: int) -> None:
    """Say which tables should have a scratchpad and have none, and whether the plan has room for the lookahead."""
    for name, part in module.named_modules():
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
