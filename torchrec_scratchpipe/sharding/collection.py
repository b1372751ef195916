# SPDX-License-Identifier: BSD-3-Clause
"""Sharded collections whose batches are planned ahead: TorchRec's, with what a scratchpad needs mixed in.

Shapes: ``I`` ids.
"""

import copy
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionContext, ShardedEmbeddingCollection
from torchrec.distributed.embedding_types import KJTList, ShardingType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionContext, ShardedEmbeddingBagCollection
from torchrec.distributed.fp_embeddingbag import ShardedFeatureProcessedEmbeddingBagCollection
from torchrec.distributed.mc_embedding_modules import BaseShardedManagedCollisionEmbeddingCollection
from torchrec.distributed.types import Awaitable, LazyAwaitable, ParameterSharding, QuantizedCommCodecs, ShardingEnv
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_scratchpipe.core.batch import Batch, check_ids
from torchrec_scratchpipe.core.pool import Pool
from torchrec_scratchpipe.core.runner import OverlappedStageRunner, StageRunner
from torchrec_scratchpipe.core.snapshot import SnapshotStorage, TableSnapshot
from torchrec_scratchpipe.errors import BatchesInFlightError, ConfigError, IdOutOfRangeError
from torchrec_scratchpipe.sharding.kernel import ScratchpadKernel
from torchrec_scratchpipe.sharding.lookup import ScratchpadLookup, create_pooled_lookup, create_sequence_lookup
from torchrec_scratchpipe.sharding.options import ScratchpadOptions
from torchrec_scratchpipe.sharding.peers import PeerNotice
from torchrec_scratchpipe.sharding.private import PrivateSteps
from torchrec_scratchpipe.sharding.serving import (
    EMBEDDING_BAG_SHARDING_TYPES,
    EMBEDDING_SHARDING_TYPES,
    serve,
    serve_tables,
)

__all__ = [
    "PlannedBatches",
    "ScratchpadCollection",
    "ShardedScratchPipeEmbeddingBagCollection",
    "ShardedScratchPipeEmbeddingCollection",
    "collection_to_plan",
    "deferring_id_errors",
]

logger: logging.Logger = logging.getLogger(__name__)

# Shardings whose input distribution sends an id to the rank that holds its block of rows.
_ROW_WISE = (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value)


class PlannedBatches:
    """One batch's way through the stages, by lookup, until it is dropped; mixed into TorchRec's context."""

    id_error: IdOutOfRangeError | None = None  # found before distribution; the batch's own Train raises it
    given_features: KeyedJaggedTensor | None = None  # before distribution; of private training
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


class ScratchPipeEmbeddingBagCollectionContext(PlannedBatches, EmbeddingBagCollectionContext):
    """TorchRec's context of one batch, and the batch's way through the stages."""


class ScratchPipeEmbeddingCollectionContext(PlannedBatches, EmbeddingCollectionContext):
    """TorchRec's context of one batch, and the batch's way through the stages."""


class _HostTableModule(nn.Module):
    """Has the parameter of a table that stays on the host, wherever its model is moved.

    DistributedModelParallel moves what it wraps to the device. A copy of the table would be made there, and whoever
    loads or reads the parameter would have that copy instead of the table.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> "_HostTableModule":
        return self


class _ServedLookup(NamedTuple):
    """The scratchpad kernels of one lookup."""

    lookup_index: int  # the lookup's position in the collection
    feature_splits: list[int]  # features of each of its kernel groups
    kernels: dict[int, ScratchpadKernel]  # by the position of their group


def _make_batches(served: _ServedLookup, dist_input: KJTList) -> list[Batch]:
    """What each scratchpad kernel of a lookup is to know of a distributed batch."""
    groups = dist_input[served.lookup_index].split(served.feature_splits)
    return [kernel.make_batch(groups[position]) for position, kernel in served.kernels.items()]


class ScratchpadCollection:
    """Planning ahead, for a sharded collection of TorchRec whose `fused_uvm_caching` tables use the scratchpad.

    Mixed into the stock class, whose distributions, parameters and state_dict stay as they are.
    """

    defers_id_errors = False  # until the batch trains; while a pipeline loads it
    private_steps: PrivateSteps | None = None  # if it is trained in private

    # From TorchRec's sharded collections.
    module_sharding_plan: Any
    _lookups: list[nn.Module]

    _served: list[_ServedLookup]

    def _set_up_stages(self, options: ScratchpadOptions, device: torch.device | None) -> None:
        """What a constructor does before TorchRec's, which makes the lookups."""
        self._options = options
        self._peers = PeerNotice()
        self._has_said_other_ids = False
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

    def _find_kernels(self) -> None:
        """Note which kernels of the lookups, which have just been made, have scratchpads."""
        self._served = [
            _ServedLookup(
                index,
                lookup._feature_splits,
                {
                    position: kernel
                    for position, kernel in enumerate(lookup._emb_modules)
                    if isinstance(kernel, ScratchpadKernel)
                },
            )
            for index, lookup in enumerate(self._lookups)
            if isinstance(lookup, ScratchpadLookup)
        ]

    @property
    def pools(self) -> list[Pool]:
        """All pools of this rank."""
        return [pool for kernel in self.kernels for pool in kernel.pools]

    @property
    def kernels(self) -> list[ScratchpadKernel]:
        """All lookups of this rank that have a scratchpad."""
        return [kernel for served in self._served for kernel in served.kernels.values()]

    def input_dist(self, ctx: Any, features: Any) -> Awaitable[Awaitable[KJTList]]:
        """As stock; on a CPU, ids that Plan does not see, or not in time, are checked before they are distributed."""
        with self._peers.told():
            if self.private_steps is not None:
                ctx.given_features = features
            features = self._check_ids(ctx, features)
            return self._peers.watch(super().input_dist(ctx, features))  # type: ignore[misc]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # threads, locks and holds are not for Dynamo
    def compute_and_output_dist(self, ctx: Any, input: KJTList) -> LazyAwaitable[Any]:
        """As stock, over planned batches where there are any. Raises IdOutOfRangeError."""
        with self._looking_up(ctx):
            output = self._peers.watch(super().compute_and_output_dist(ctx, input))  # type: ignore[misc]
        if self.private_steps is not None:
            output.callbacks.append(partial(self.private_steps.cut, self, ctx.given_features))
        return output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def compute(self, ctx: Any, dist_input: KJTList) -> Any:
        """As stock, which calls it after managed collision; over the batches that were foretold, if they were right."""
        forecast = getattr(ctx, "forecast", None)
        planned = PlannedBatches() if forecast is None else forecast if forecast.confirm(dist_input) else None
        with self._looking_up(planned):
            return super().compute(ctx, dist_input)  # type: ignore[misc]

    def prefetch(
        self, dist_input: KJTList, forward_stream: Any = None, ctx: Any = None, *, seen: PlannedBatches | None = None
    ) -> None:
        """Send a distributed batch through the stages; any number of batches may be ahead.

        `ctx` is the batch's own context, which will be passed to `compute_and_output_dist`. Without one nothing is
        sent, and the batch is fetched on the spot. Events order the streams, so that `forward_stream` is not used.
        `seen` is what :meth:`see_ids` was given for the same ids.
        """
        if not isinstance(ctx, PlannedBatches):
            return
        for served in self._served:
            if served.lookup_index not in ctx.planned_batches:
                batches = ctx.planned_batches[served.lookup_index] = _make_batches(served, dist_input)
                if seen is not None:
                    self._take_over(batches, seen.planned_batches.get(served.lookup_index, []))
            for batch in ctx.planned_batches[served.lookup_index]:
                self._runner.submit(batch)

    def see(self, dist_input: KJTList, ctx: PlannedBatches) -> None:
        """Show a distributed batch to the choice of victims before :meth:`prefetch`; no row moves, no slot is held."""
        for served in self._served:
            ctx.planned_batches[served.lookup_index] = _make_batches(served, dist_input)
            for batch in ctx.planned_batches[served.lookup_index]:
                self._runner.see(batch)

    def see_ids(self, dist_input: KJTList, ctx: PlannedBatches) -> None:
        """As :meth:`see`, of ids whose batch comes later; nothing is kept of them but what the slot maps note."""
        for served in self._served:
            ctx.planned_batches[served.lookup_index] = _make_batches(served, dist_input)
            for batch in ctx.planned_batches[served.lookup_index]:
                batch.is_only_seen = True
                self._runner.see(batch)

    def _take_over(self, batches: Sequence[Batch], seen: Sequence[Batch]) -> None:
        for batch, of_ids in zip(batches, seen, strict=True):
            batch.seen_as = of_ids
            if batch.num_ids != of_ids.num_ids and not self._has_said_other_ids:
                self._has_said_other_ids = True
                logger.warning(
                    "a batch has %d ids where %d were seen ahead of it: see_ahead() was given the ids of other "
                    "batches. Results are right, and more rows are evicted than need be. Give it the batches that "
                    "progress() will get, from the next one that is loaded on.",
                    batch.num_ids,
                    of_ids.num_ids,
                )

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

    def watch_changes(self) -> None:
        """Note which rows change from now on; before, or between, Trains. Raises TableOverwrittenError."""
        with self._runner.between_batches():
            for pool in self.pools:
                self._runner.refresh_pool(pool)
                pool.watch_changes(self._runner.streams)

    def cut_changes(self) -> None:
        """End the interval in which rows have changed, and begin another; between two Trains."""
        for pool in self.pools:
            assert pool.changes is not None, "nobody watches"
            if pool.may_be_written:  # rows in slots do not know yet
                with self._runner.between_batches():
                    self._runner.reread_pool(pool)
            pool.changes.cut()

    def catch_up(self) -> None:
        """Have all rows get the updates that they are to get late (hazard 10)."""
        self._runner.wait_until_idle()
        with self._runner.between_batches():
            for pool in self.pools:
                self._runner.refresh_pool(pool)
                pool.catch_up_all()

    @property
    def is_any_table_lent(self) -> bool:
        """Whether somebody has memory of a table, and may write it unseen."""
        return any(pool.host_table.lent.is_any_lent for pool in self.pools)

    def between_batches(self) -> AbstractContextManager[None]:
        """See :meth:`StageRunner.between_batches`."""
        return self._runner.between_batches()

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
            for served in self._served:
                for kernel, batch in zip(
                    served.kernels.values(), ctx.planned_batches.get(served.lookup_index, ()), strict=False
                ):
                    kernel.expect(batch)
        try:
            with self._peers.told():
                if isinstance(ctx, PlannedBatches) and ctx.id_error is not None:
                    raise ctx.id_error
                yield
        finally:
            # If one lookup raises, those after it have not taken their batch, and must not take it next time.
            for served in self._served:
                for kernel in served.kernels.values():
                    kernel.drop_expected()
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


class ShardedScratchPipeEmbeddingBagCollection(ScratchpadCollection, ShardedEmbeddingBagCollection):
    """Stock sharded collection whose `fused_uvm_caching` tables live on the host behind a scratchpad.

    Input and output distribution, parameters and state_dict are stock. :meth:`prefetch` sends a batch through Plan,
    Collect, Exchange and Insert ahead of time; a batch that nobody sent is fetched on the spot. The sharder makes it.

    Args:
        module: As stock.
        table_name_to_parameter_sharding: As stock.
        env: As stock.
        fused_params: As stock.
        device: Where features arrive and scratchpads live.
        qcomm_codecs_registry: As stock.
        module_fqn: As stock.
        sharded_module_order_overwrite: As stock.
        options: What all scratchpad tables share; None is all defaults.

    Raises:
        ConfigError: A scratchpad table's sharding type, data type, optimizer or load factor cannot be served.
        TableStorageError: A table cannot be placed where it should be.
    """

    def __init__(
        self,
        module: EmbeddingBagCollectionInterface,
        table_name_to_parameter_sharding: dict[str, ParameterSharding],
        env: ShardingEnv,
        fused_params: dict[str, Any] | None = None,
        device: torch.device | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        module_fqn: str | None = None,
        sharded_module_order_overwrite: list[str] | None = None,
        *,
        options: ScratchpadOptions | None = None,
    ) -> None:
        name = module_fqn or "EmbeddingBagCollection"
        plan = table_name_to_parameter_sharding
        served, options = serve(
            name,
            module.embedding_bag_configs(),
            plan,
            env,
            device,
            EMBEDDING_BAG_SHARDING_TYPES,
            options or ScratchpadOptions(),
            fused_params or {},
        )
        self._set_up_stages(options, device)
        super().__init__(
            module,
            served,
            env,
            fused_params,
            device,
            qcomm_codecs_registry,
            module_fqn,
            sharded_module_order_overwrite,
        )
        self._set_up_checks(self._embedding_bag_configs)

    def create_context(self) -> ScratchPipeEmbeddingBagCollectionContext:
        """A context that can carry planned batches."""
        return ScratchPipeEmbeddingBagCollectionContext()

    def update_shards(
        self,
        changed_sharding_params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None,
    ) -> None:
        """As stock: move tables to other ranks, with their optimizer state; call it between batches.

        Args:
            changed_sharding_params: As stock.
            env: As stock.
            device: As stock.

        Raises:
            BatchesInFlightError: Batches in flight have been planned for the scratchpads as they are.
            ConfigError: A scratchpad table's new sharding cannot be served.
        """
        if self.private_steps is not None:
            raise ConfigError(
                "update_shards(): the model is trained in private, and which noise its rows have got does not move "
                "with them. Save a checkpoint, and load it in a job with the new sharding."
            )
        self.wait_until_idle()  # the worker may not have planned all of them yet
        num_batches = max((pool.slot_map.num_batches_in_flight for pool in self.pools), default=0)
        if num_batches > 0:
            raise BatchesInFlightError(
                f"update_shards(): {num_batches} batches in flight were planned for the present sharding. Let the "
                "pipeline train them, or call its reset(), first."
            )
        configs = [config for config in self._embedding_bag_configs if config.name in changed_sharding_params]
        served, load_factors = serve_tables(configs, changed_sharding_params, EMBEDDING_BAG_SHARDING_TYPES, {})
        kept = {
            name: value for name, value in self._options.load_factors.items() if name not in changed_sharding_params
        }
        self._options = dataclasses.replace(self._options, load_factors=kept | load_factors)
        super().update_shards(served, env, device)
        self._set_up_checks(self._embedding_bag_configs)

    def _create_lookups(self) -> None:
        for sharding in self._embedding_shardings:
            self._lookups.append(create_pooled_lookup(sharding, self._options, self._runner))
        self._find_kernels()


class ShardedScratchPipeEmbeddingCollection(ScratchpadCollection, ShardedEmbeddingCollection):
    """Stock sharded collection of unpooled embeddings whose `fused_uvm_caching` tables live behind a scratchpad.

    As :class:`ShardedScratchPipeEmbeddingBagCollection`, in the same pipeline.

    Args:
        module: As stock.
        table_name_to_parameter_sharding: As stock.
        env: As stock.
        fused_params: As stock.
        device: Where features arrive and scratchpads live.
        qcomm_codecs_registry: As stock.
        use_index_dedup: As stock.
        module_fqn: As stock.
        options: What all scratchpad tables share; None is all defaults.

    Raises:
        ConfigError: A scratchpad table's sharding type, data type, optimizer or load factor cannot be served.
        TableStorageError: A table cannot be placed where it should be.
    """

    def __init__(
        self,
        module: EmbeddingCollection,
        table_name_to_parameter_sharding: dict[str, ParameterSharding],
        env: ShardingEnv,
        fused_params: dict[str, Any] | None = None,
        device: torch.device | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        use_index_dedup: bool = False,
        module_fqn: str | None = None,
        *,
        options: ScratchpadOptions | None = None,
    ) -> None:
        name = module_fqn or "EmbeddingCollection"
        plan = table_name_to_parameter_sharding
        served, options = serve(
            name,
            module.embedding_configs(),
            plan,
            env,
            device,
            EMBEDDING_SHARDING_TYPES,
            options or ScratchpadOptions(),
            fused_params or {},
        )
        self._set_up_stages(options, device)
        super().__init__(
            module,
            served,
            env,
            fused_params,
            device,
            qcomm_codecs_registry,
            use_index_dedup,
            module_fqn,
        )
        self._set_up_checks(self._embedding_configs)

    def create_context(self) -> ScratchPipeEmbeddingCollectionContext:
        """A context that can carry planned batches."""
        return ScratchPipeEmbeddingCollectionContext(sharding_contexts=[])

    def _create_lookups(self) -> None:
        for sharding in self._sharding_type_to_sharding.values():
            self._lookups.append(create_sequence_lookup(sharding, self._options, self._runner))
        self._find_kernels()


def collection_to_plan(module: nn.Module) -> ScratchpadCollection | None:
    """The collection whose batches can be planned when this sharded module's input is known."""
    if isinstance(module, ShardedFeatureProcessedEmbeddingBagCollection):
        module = module._embedding_bag_collection
    elif isinstance(module, BaseShardedManagedCollisionEmbeddingCollection):
        module = module._embedding_module
    return module if isinstance(module, ScratchpadCollection) else None


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
