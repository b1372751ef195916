# SPDX-License-Identifier: BSD-3-Clause
"""TorchRec's train pipeline, with the scratchpad's stages ahead of Train."""

import inspect
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Generic, cast

import torch
from torch.profiler import record_function
from torch.utils.hooks import RemovableHandle
from torchrec.distributed.embedding_sharding import FusedKJTListSplitsAwaitable, KJTListSplitsAwaitable
from torchrec.distributed.mc_embedding_modules import BaseShardedManagedCollisionEmbeddingCollection
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.pipeline_context import TrainPipelineContext
from torchrec.distributed.train_pipeline.runtime_forwards import PipelinedForward
from torchrec.distributed.train_pipeline.utils import _to_device
from torchrec.distributed.types import Awaitable
from torchrec.streamable import Pipelineable
from typing_extensions import TypeVar

from torchrec_scratchpipe.core.memory import NUM_BATCHES_IN_DIST
from torchrec_scratchpipe.core.slot_ops import MAX_BATCHES_SEEN_AHEAD
from torchrec_scratchpipe.errors import BatchesInFlightError, ConfigError, ScratchPipeError
from torchrec_scratchpipe.sharding.collection import (
    PlannedBatches,
    ScratchpadCollection,
    collection_to_plan,
    deferring_id_errors,
)
from torchrec_scratchpipe.sharding.forecast import Forecast, Forecaster
from torchrec_scratchpipe.sharding.model import scratchpad_collections, warn_of_missing_scratchpads
from torchrec_scratchpipe.sharding.peers import PeerNotice
from torchrec_scratchpipe.sharding.private import Privacy, PrivateSteps

__all__ = ["ScratchPipeTrainPipeline"]

logger: logging.Logger = logging.getLogger(__name__)

# With defaults, a type checker asks for no annotation where only the model, which is untyped, could tell.
In = TypeVar("In", bound=Pipelineable, default=Any)
Out = TypeVar("Out", default=Any)

# Batches on their way to a device, beyond those that are being distributed; no larger than the rank's own share.
NUM_BATCHES_IN_COPY = 1
# TrainPipelineSparseDist(execute_all_batches=False) leaves this many batches untrained when the data ends.
NUM_BATCHES_LEFT_BY_STOCK = 2


@dataclass
class ScratchPipeTrainPipelineContext(TrainPipelineContext):
    """TorchRec's context of one batch; `planned_inputs` holds distributed features of planned batches, by module."""

    planned_inputs: dict[str, Any] = field(default_factory=dict, kw_only=True)
    forecasts: dict[str, Forecast] = field(default_factory=dict, kw_only=True)  # of modules with managed collision
    seen: dict[ScratchpadCollection, PlannedBatches] = field(default_factory=dict, kw_only=True)  # its ids, before it
    is_distributed: bool = field(default=False, kw_only=True)  # or on its way
    is_seen: bool = field(default=False, kw_only=True)
    is_planned: bool = field(default=False, kw_only=True)
    is_started: bool = field(default=False, kw_only=True)
    is_in_forward: bool = field(default=False, kw_only=True)


class _ScratchPipeForward(PipelinedForward):
    """Stands in for a sharded module's forward while the pipeline is attached."""

    def __call__(self, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        context = self._context
        if not isinstance(context, ScratchPipeTrainPipelineContext):  # another pipeline uses the forward that we left
            return super().__call__(*args, **kwargs)
        if not context.is_in_forward:
            return self._forward_outside_pipeline(*args, **kwargs)
        if self._name not in context.planned_inputs:
            raise ScratchPipeError(
                f"module {self._name} is called twice in one forward; a pipelined module can be called once. "
                "Give the second call a module of its own, or use no pipeline."
            )
        dist_input = context.planned_inputs.pop(self._name)
        module_context = context.module_contexts[self._name]  # stays, so that reset() can release a failed batch
        if self._stream is not None:
            stream = torch.get_device_module(self._device).current_stream()
            stream.wait_stream(self._stream)
            dist_input.record_stream(stream)
            module_context.record_stream(stream)
        return self._module.compute_and_output_dist(module_context, dist_input)

    def _forward_outside_pipeline(self, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        """Answer a plain `model(batch)` on its own input, not on that of the batch in flight.

        The pipeline has fused the splits exchange of all input dists, so it is done here for this one call.
        """
        if self._context.postproc_fwd_results:
            raise ScratchPipeError(
                f"module {self._name} is called outside the pipeline, whose pipeline_postproc hands out what it "
                "computed for the batch in flight. Call the pipeline's detach() first, or have no postprocs pipelined."
            )
        module = self._module
        module_context = module.create_context()
        request = module.input_dist(module_context, *args, **kwargs)
        if isinstance(request, KJTListSplitsAwaitable):
            pg = next((awaitable.pg for awaitable in request.awaitables if hasattr(awaitable, "pg")), None)
            splits = FusedKJTListSplitsAwaitable([request], [module_context], pg)
            tensors = PeerNotice().watch(splits).wait()[0]
        else:
            tensors = request.wait()
        return module.compute_and_output_dist(module_context, tensors.wait())


class ScratchPipeTrainPipeline(TrainPipelineSparseDist[In, Out], Generic[In, Out]):
    """Trains one batch while the rows of the coming ones travel to the scratchpad.

    ====================  =========================================  ==========================================
    stage                 batches (0 trains, L is `lookahead`, F     where
                          is L + `num_batches_seen_ahead`)
    ====================  =========================================  ==========================================
    Load                  F + 3, only on CUDA: copy to device        memcpy stream of TorchRec
    Load                  F + 2: start input dist                    data_dist stream of TorchRec
    Load                  F + 1: input dist exchanges its tensors    data_dist stream
    (seen)                L + 1 .. F: their ids guide evictions      worker thread, on CUDA its own stream
    Plan ... Insert       1 .. L, one after another                  worker thread, on CUDA its own stream
    Train                 0: forward, backward, optimizer            default stream
    ====================  =========================================  ==========================================

    Sharded modules without scratchpad tables are pipelined as in TrainPipelineSparseDist. One pipeline may serve
    training and evaluation in turn, each with a new iterator.

    TorchRec has no types, so what :meth:`progress` returns is for the caller to say:
    ``ScratchPipeTrainPipeline[Batch, Tensor](...)``.

    Args:
        model: A model sharded by DistributedModelParallel.
        optimizer: Its dense optimizer, or all of them combined.
        device: Where it trains.
        execute_all_batches: As stock: False leaves the last two batches of the data untrained.
        apply_jit: As stock.
        context_type: Accepted for the order of stock's arguments; another than stock's default is refused.
        pipeline_postproc: As stock.
        custom_model_fwd: As stock.
        dmp_collection_sync_interval_batches: As stock; has no effect, because DMPCollection is refused.
        enqueue_batch_after_forward: Accepted for the order of stock's arguments; True is refused.
        enable_inplace_copy_batch: As stock.
        free_features_storage_early: As stock; needs TorchRec 1.8.
        clear_data_dist_inputs: Accepted for the order of stock's arguments; True is refused.
        async_inplace_copy: As stock; needs TorchRec 1.9.2. Batches are waited for when they are loaded, so that it
            saves no time here.
        lookahead: How many batches are planned ahead of Train, at least 1. What must fit in a scratchpad is the
            unique rows of `lookahead + 1` batches; where they do not fit, Plan waits for Train.
        num_batches_seen_ahead: How many batches beyond those are loaded and distributed, so that rows which they will
            use are not evicted now, at most 500. Fewer rows travel; the input of these batches takes device memory, no
            slots. With :meth:`see_ahead`, their ids alone are read.
        privacy: :class:`LazyDP`, to train with differential privacy.

    Raises:
        ConfigError: `lookahead` is below 1, too many batches are to be seen ahead, a stock option is asked for that
            cannot be honoured, or a part of the model cannot be trained in private.

    Source:
        torchrec TrainPipelineSparseDist (1.6.1 to 1.9.2, whose arguments differ in number).
    """

    _pipelined_forward_type = _ScratchPipeForward
    _model_fwd: Callable[[In | None], tuple[torch.Tensor, Out]]

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        execute_all_batches: bool = True,
        apply_jit: bool = False,
        context_type: type[TrainPipelineContext] = TrainPipelineContext,
        pipeline_postproc: bool = False,
        custom_model_fwd: Callable[[In | None], tuple[torch.Tensor, Out]] | None = None,
        dmp_collection_sync_interval_batches: int | None = 1,
        enqueue_batch_after_forward: bool = False,
        enable_inplace_copy_batch: bool = False,
        free_features_storage_early: bool = False,
        clear_data_dist_inputs: bool = False,
        async_inplace_copy: bool = False,
        *,
        lookahead: int = 2,
        num_batches_seen_ahead: int = 0,
        privacy: Privacy | None = None,
    ) -> None:
        if type(execute_all_batches) is int:
            raise ConfigError(
                f"execute_all_batches is {execute_all_batches}, it must be True or False. The lookahead is given by "
                f"name: lookahead={execute_all_batches}."
            )
        _check_distances(lookahead, num_batches_seen_ahead)
        self._lookahead = lookahead
        self._num_batches_known = lookahead + num_batches_seen_ahead
        # A dist waits for the copy of its batch; of one that was begun a step ago, it need not wait.
        self._num_batches_in_copy = NUM_BATCHES_IN_COPY if device.type == "cuda" else 0
        self._is_traced_in_vain = False
        self._failed_to_load: TrainPipelineContext | None = None
        self._collections_warned_of: set[str] = set()
        warn_of_missing_scratchpads(model, lookahead)
        self._collections = scratchpad_collections(model)
        self._privacy = privacy
        self._private_steps = _private_steps(privacy, model, device)
        self._own_forwards: list[Callable[..., Any]] = []
        self._forecasters: dict[str, Forecaster] = {}  # by module
        self._ids_ahead: Iterator[In] | None = None
        self._seen_ahead: deque[dict[ScratchpadCollection, PlannedBatches]] = deque()  # of batches not loaded yet
        self._peers = PeerNotice()
        self._progress_hooks: OrderedDict[int, Callable[[In], None]] = OrderedDict()
        super().__init__(
            model,
            optimizer,
            device,
            **_stock_options(
                execute_all_batches=execute_all_batches,
                apply_jit=apply_jit,
                context_type=context_type,
                pipeline_postproc=pipeline_postproc,
                custom_model_fwd=custom_model_fwd,
                dmp_collection_sync_interval_batches=dmp_collection_sync_interval_batches,
                enqueue_batch_after_forward=enqueue_batch_after_forward,
                enable_inplace_copy_batch=enable_inplace_copy_batch,
                free_features_storage_early=free_features_storage_early,
                clear_data_dist_inputs=clear_data_dist_inputs,
                async_inplace_copy=async_inplace_copy,
            ),
        )

    @property
    def lookahead(self) -> int:
        """How many batches are planned ahead of Train."""
        return self._lookahead

    def epsilon(self, delta: float) -> float:
        """What private training has spent so far, of (epsilon, delta)-differential privacy.

        It holds for batches whose examples were drawn one by one, as :class:`PoissonSampler` does it, and for all that
        :class:`LazyDP` says.

        Args:
            delta: The probability that the promise does not hold; well below one over the number of examples.

        Returns:
            Epsilon, by Opacus.

        Raises:
            ConfigError: The pipeline was given no privacy, or Opacus is missing.
        """
        if self._private_steps is None:
            raise ConfigError("epsilon(): the pipeline does not train in private. Give it privacy=LazyDP(...).")
        return self._private_steps.epsilon(delta)

    def progress(self, dataloader_iter: Iterator[In]) -> Out:
        """Train, or in eval mode only evaluate, the oldest batch in flight, and bring the coming ones forward.

        Args:
            dataloader_iter: Where the next batches come from; batches in flight from an earlier iterator go first.

        Returns:
            What the model returns beside its losses.

        Raises:
            StopIteration: All batches are done.
            ScratchPipeError: A batch cannot be served; :meth:`reset` makes the pipeline usable again.
            PeerFailedError: Another rank has failed, and left word of it, or ended.
        """
        with self._peers.told():
            output = self._progress(dataloader_iter)
        self._peers.forget()
        return output

    def _progress(self, dataloader_iter: Iterator[In]) -> Out:
        if not self._model_attached:
            self.attach(self._model)
        if self._failed_to_load is not None:
            raise self._failed_error(self._failed_to_load)
        for module, forward in zip(self._pipelined_modules, self._own_forwards, strict=True):
            module.forward = forward  # another pipeline may have left its own
        # Load, Plan ... Insert of coming batches, then forward of the oldest one.
        with self._stages_held_back():
            context, losses, output = self._forward(dataloader_iter)
        # Backward lets go of the slots. Where there is none, the graph would hold them until it is collected.
        if not self._model.training:
            _release(context)
        else:
            self._backward(losses)
            self.sync_embeddings(self._model, self._dmp_collection_sync_interval_batches, context)
            with record_function(f"## optimizer {context.index} ##"):
                self._optimizer.step()
        batch = cast(In, self.batches[0])
        self.dequeue_batch()
        for hook in tuple(self._progress_hooks.values()):
            hook(batch)
        return output

    def see_ahead(self, ids: Iterator[In]) -> None:
        """Take the ids of batches that are seen ahead from here, in place of the batches themselves.

        So `num_batches_seen_ahead` of them cost 2 bytes an id of device memory, and no other input is loaded before its
        turn. Call it before the first :meth:`progress` of an epoch. Collections with managed collision see nothing
        ahead then.

        Args:
            ids: Batches as those that :meth:`progress` will load next in training, one for one. Only what embeddings
                look up is used; the rest may be empty. :meth:`ParquetBatches.ids_ahead` gives such batches.

        Raises:
            ConfigError: `num_batches_seen_ahead` is 0.
        """
        if self._num_batches_known == self._lookahead:
            raise ConfigError(
                "see_ahead(): the pipeline sees nothing ahead. Give it num_batches_seen_ahead, how many batches."
            )
        self._forget_seen_ahead()
        self._ids_ahead = ids

    def register_progress_hook(self, hook: Callable[[In], None]) -> RemovableHandle:
        """Have a function called at the end of every :meth:`progress`.

        Args:
            hook: Takes the batch that was trained or evaluated. What it raises, :meth:`progress` raises; the batch has
                trained all the same.

        Returns:
            Its `remove()` ends that.

        Source:
            torch.nn.Module.register_forward_hook, whose handle it is.
        """
        handle = RemovableHandle(self._progress_hooks)
        self._progress_hooks[handle.id] = hook
        return handle

    def _forward(self, dataloader_iter: Iterator[In]) -> tuple["ScratchPipeTrainPipelineContext", torch.Tensor, Out]:
        self.fill_pipeline(dataloader_iter)
        if not self.batches or self._leave_rest_as_stock():
            raise StopIteration

        # A batch that has failed in forward or backward is not trained a second time.
        context = cast(ScratchPipeTrainPipelineContext, self.contexts[0])
        if context.is_started:
            raise self._failed_error(context)
        self._set_module_context(context)
        if self._model.training:
            with record_function("## zero_grad ##"):
                self._optimizer.zero_grad()
        self._wait_for_batch()
        context.is_started = context.is_in_forward = True
        try:
            with record_function(f"## forward {context.index} ##"), self._private_forward():
                losses, output = self._model_fwd(self.batches[0])
        finally:
            context.is_in_forward = False
        return context, losses, output

    def _private_forward(self) -> AbstractContextManager[None]:
        if self._private_steps is None or not self._model.training:
            return nullcontext()
        return self._private_steps.forward()

    def _backward(self, losses: torch.Tensor) -> None:
        if self._private_steps is None:
            super()._backward(losses)
        else:
            self._private_steps.backward(losses)

    @contextmanager
    def _stages_held_back(self) -> Iterator[None]:
        """Until backward; where there is time to plan the next batch but one, and where backward will come."""
        with ExitStack() as held_back:
            if self._lookahead > 1 and self._model.training:
                for collection in self._collections:
                    held_back.enter_context(collection.holding_back())
            yield

    def fill_pipeline(self, dataloader_iter: Iterator[In]) -> None:
        """Load batches until the pipeline is full or the data ends, and bring each to the stage its place asks for.

        Args:
            dataloader_iter: Where the next batches come from.
        """
        self._correct_forecasts()
        self._see_more()
        num_known = self._num_batches_known if self._ids_ahead is None else self._lookahead
        # A batch is planned as soon as it is distributed, so that the worker starts while the next one is loaded; the
        # loop below catches up with the last batches when the data has ended.
        num_unplanned = NUM_BATCHES_IN_DIST + self._num_batches_in_copy
        while len(self.batches) <= num_known + num_unplanned:
            # Before the next copy begins: a dist waits for all copies that have begun.
            if self._num_batches_in_copy:
                self._start_dists()
            if not self._load(dataloader_iter):
                break
            if not self._num_batches_in_copy:
                self._start_dists()
            if not self._seen_ahead:  # the first batch has just said where ids are
                self._see_more()
            if len(self.batches) > num_unplanned:
                self._bring_forward(len(self.batches) - 1 - num_unplanned)
        for position in range(min(num_known + 1, len(self.batches))):
            self._bring_forward(position)
        # One batch further, sizes are exchanged, so that the next step finds them.
        if len(self.batches) > num_known + 1:
            self.wait_sparse_data_dist(self.contexts[num_known + 1])

    def _see_more(self) -> None:
        """Show ids of coming batches to the choice of victims, as far ahead as is wanted."""
        if self._ids_ahead is None or not self._pipelined_modules:  # the first batch says where ids are
            return
        while len(self._seen_ahead) < self._num_batches_known - self._lookahead:
            with self._stream_context(self._memcpy_stream):
                batch = next(self._ids_ahead, None)
                if batch is None:
                    return
                batch = cast(In, _to_device(batch, self._device, non_blocking=True))
            context = ScratchPipeTrainPipelineContext(version=1)
            with deferring_id_errors(self._collections):
                self._init_pipelined_modules(batch, context, self._pipelined_forward_type)
            self._finish_dist(context)
            seen: dict[ScratchpadCollection, PlannedBatches] = {}
            for collection, features, _ in self._to_plan(context):
                seen[collection] = PlannedBatches()
                with self._stream_context(self._data_dist_stream):
                    collection.see_ids(features, seen[collection])
            self._seen_ahead.append(seen)

    def _forget_seen_ahead(self) -> None:
        for seen in self._seen_ahead:
            for planned in seen.values():
                planned.release()
        self._seen_ahead.clear()
        self._ids_ahead = None

    def attach(self, model: torch.nn.Module | None = None, sparse_dist: bool = True) -> None:
        """As stock, but batches in flight keep what was planned for them.

        Args:
            model: The model to attach, if another.
            sparse_dist: Accepted for compatibility: a batch in flight is never distributed a second time, because it
                has been planned already.

        Raises:
            BatchesInFlightError: Batches in flight were planned for the model attached before.
        """
        if model is not None and model is not self._model and self.contexts:
            raise BatchesInFlightError(
                f"attach(): {len(self.contexts)} batches in flight were planned for another model. Let the pipeline "
                "train them, or call reset(), first."
            )
        if model is not None and model is not self._model:
            self._private_steps = _private_steps(self._privacy, model, self._device)
        self._is_traced_in_vain = False
        self._own_forwards = []
        self._forecasters = {}
        self._collections = scratchpad_collections(model or self._model)
        if model is not None and self._model_fwd is self._model:  # stock would go on with the first model's forward
            self._model_fwd = model
        super().attach(model, sparse_dist=False)

    def reset(self) -> None:
        """Drop all batches in flight and let go of their slots; rows already moved stay where they are, correct."""
        for context in self.contexts:
            _release(context)
        for module in self._model.modules():
            if isinstance(module, ScratchpadCollection):
                module.wait_until_idle()  # the worker may just have planned a batch, and lets go of it in a moment
        self._forget_seen_ahead()
        super().reset()
        self._dataloader_iter = None
        self._failed_to_load = None
        self._forecasters = {}  # they have foreseen what was dropped
        self._peers.forget()

    def _pipeline_model(self, batch: In | None, context: TrainPipelineContext, *args: Any, **kwargs: Any) -> None:
        """As stock; collections that cannot be planned ahead are named once, and are fetched on the spot."""
        if self._is_traced_in_vain:  # stock would trace the model again for every batch
            return
        reason = "its input is computed inside forward"
        try:
            super()._pipeline_model(batch, context, *args, **kwargs)
        except Exception as error:
            # torch.fx raises whatever the model raises when it is given proxies. It changes nothing before that; if
            # modules have been rewritten, the error is not about tracing.
            if any(isinstance(module.forward, PipelinedForward) for module in self._model.modules()):
                raise
            reason = f"torch.fx cannot trace the model ({type(error).__name__}: {error})"
            logger.debug("tracing has failed", exc_info=True)
        self._is_traced_in_vain = not self._pipelined_modules
        self._own_forwards = [module.forward for module in self._pipelined_modules]
        planned = {id(collection_to_plan(module)) for module in self._pipelined_modules}
        for name, module in self._model.named_modules():
            is_missed = isinstance(module, ScratchpadCollection) and id(module) not in planned
            if is_missed and name not in self._collections_warned_of:
                self._collections_warned_of.add(name)
                logger.warning(
                    "collection %s cannot be planned ahead: %s. Its rows are fetched on the spot: right, but slow. "
                    "Take its KeyedJaggedTensor from the batch as it is, or give the pipeline pipeline_postproc=True.",
                    name,
                    reason,
                )

    def _load(self, dataloader_iter: Iterator[In]) -> bool:
        if self._dataloader_exhausted and dataloader_iter is self._dataloader_iter:
            return False
        try:
            if not self.enqueue_batch(dataloader_iter):
                return False
        except StopIteration:  # the data has ended and execute_all_batches is False
            return False
        if not self._model.training:  # batches to evaluate are not those whose ids were seen
            return True
        if self._seen_ahead:
            cast(ScratchPipeTrainPipelineContext, self.contexts[-1]).seen = self._seen_ahead.popleft()
        elif self._ids_ahead is not None:
            next(self._ids_ahead, None)  # those of this batch
        return True

    def _start_dists(self) -> None:
        """Start the input dist of every batch that was loaded since."""
        for position, some_context in enumerate(self.contexts):
            context = cast(ScratchPipeTrainPipelineContext, some_context)
            if context.is_distributed:
                continue
            context.is_distributed = True
            try:
                with deferring_id_errors(self._collections):  # indexed: another thread may still be copying the batch
                    self._init_pipelined_modules(self.batches[position], context, self._pipelined_forward_type)
            except BaseException:
                self._failed_to_load = context  # some of its modules may be distributed, others not
                raise

    def _failed_error(self, context: TrainPipelineContext) -> ScratchPipeError:
        return ScratchPipeError(
            f"batch {context.index} has failed in an earlier progress(). Call reset() to drop the batches in flight."
        )

    def _leave_rest_as_stock(self) -> bool:
        return (
            not self._execute_all_batches
            and self._dataloader_exhausted
            and len(self.batches) <= NUM_BATCHES_LEFT_BY_STOCK
        )

    def _bring_forward(self, position: int) -> None:
        """Finish a batch's input dist; plan it, or only have it seen, as its place among the batches asks for."""
        context = cast(ScratchPipeTrainPipelineContext, self.contexts[position])
        # 1. Its ids are here. If it is not to be planned yet, they guide the choice of victims.
        if not context.is_seen:
            context.is_seen = True
            self._finish_dist(context)
            self._forecast(context)
            if position > self._lookahead:
                for collection, features, planned in self._to_plan(context):
                    with self._stream_context(self._data_dist_stream):
                        collection.see(features, planned)
        # 2. From `lookahead` batches before its Train on, its rows are on their way.
        if position <= self._lookahead and not context.is_planned:
            context.is_planned = True
            for collection, features, planned in self._to_plan(context):
                with self._stream_context(self._data_dist_stream):
                    collection.prefetch(features, ctx=planned, seen=context.seen.pop(collection, None))

    def _finish_dist(self, context: ScratchPipeTrainPipelineContext) -> None:
        self.wait_sparse_data_dist(context)
        for module in dict.fromkeys(self._pipelined_modules):  # one that is called twice raises in forward
            name = module.forward.name
            request = context.input_dist_tensors_requests.pop(name)
            with self._stream_context(self._data_dist_stream):
                context.planned_inputs[name] = request.wait()

    def _forecast(self, context: ScratchPipeTrainPipelineContext) -> None:
        """Foretell the rows of a batch, after those of all batches before it, where managed collision gives them."""
        for module in dict.fromkeys(self._pipelined_modules):
            if _is_remapped(module) and collection_to_plan(module) is not None:
                name = module.forward.name
                forecaster = self._forecasters.setdefault(name, Forecaster(module))
                with self._stream_context(self._data_dist_stream):
                    forecast = forecaster.forecast(context.module_contexts[name], context.planned_inputs[name])
                if forecast is not None:
                    context.forecasts[name] = forecast

    def _correct_forecasts(self) -> None:
        """After a wrong forecast: drop those of all batches in flight, and make them anew."""
        if not any(forecaster.is_wrong for forecaster in self._forecasters.values()):
            return
        for forecaster in self._forecasters.values():
            forecaster.start_anew()
        for some_context in self.contexts:
            context = cast(ScratchPipeTrainPipelineContext, some_context)
            if context.is_seen:
                for forecast in context.forecasts.values():
                    forecast.release()
                self._forecast(context)
                context.is_planned = False  # what other collections have planned is submitted twice, which does nothing

    def _to_plan(
        self, context: ScratchPipeTrainPipelineContext
    ) -> Iterator[tuple[ScratchpadCollection, Any, PlannedBatches]]:
        """Each collection that is planned ahead, what the batch looks up in it, and what is to hold the plans."""
        for module in dict.fromkeys(self._pipelined_modules):
            collection, name = collection_to_plan(module), module.forward.name
            if collection is None:
                continue
            if not _is_remapped(module):
                yield collection, context.planned_inputs[name], context.module_contexts[name]
            elif name in context.forecasts:
                yield collection, context.forecasts[name].features, context.forecasts[name]


def _is_remapped(module: torch.nn.Module) -> bool:
    """Whether what it is given are ids that managed collision remaps in forward."""
    return isinstance(module, BaseShardedManagedCollisionEmbeddingCollection)


def _release(context: TrainPipelineContext) -> None:
    """Let go of the slots of one batch, wherever they are held."""
    seen = context.seen if isinstance(context, ScratchPipeTrainPipelineContext) else {}
    for planned in (*context.module_contexts.values(), *context.forecasts.values(), *seen.values()):
        if isinstance(planned, PlannedBatches):
            planned.release()


def _private_steps(privacy: Privacy | None, model: torch.nn.Module, device: torch.device) -> PrivateSteps | None:
    if privacy is not None:
        return privacy.start(model, device)
    if any(collection.private_steps is not None for collection in scratchpad_collections(model)):
        raise ConfigError(
            "the model has been trained in private, and this pipeline was given no privacy: its steps would be neither "
            "clipped nor counted. Give it the same privacy=LazyDP(...), with the same seed."
        )
    return None


def _check_distances(lookahead: int, num_batches_seen_ahead: int) -> None:
    if lookahead < 1:
        raise ConfigError(f"lookahead is {lookahead}, it must be at least 1: the batch after the one that trains.")
    if not 0 <= num_batches_seen_ahead <= MAX_BATCHES_SEEN_AHEAD:
        raise ConfigError(
            f"num_batches_seen_ahead is {num_batches_seen_ahead}, it must lie in [0, {MAX_BATCHES_SEEN_AHEAD}]. "
            "Rows that are used later than that are told by how often they were used."
        )


def _stock_options(**given: Any) -> dict[str, Any]:
    """What the installed TorchRec's pipeline is to be given; refuses what it or ours cannot honour."""
    for name in ("enqueue_batch_after_forward", "clear_data_dist_inputs"):
        if given[name]:
            raise ConfigError(
                f"{name}={given[name]!r} is not supported by ScratchPipeTrainPipeline, which loads batches before "
                "forward and keeps their input until they are planned. Leave it out."
            )
    if given["context_type"] not in (TrainPipelineContext, ScratchPipeTrainPipelineContext):
        raise ConfigError(
            f"context_type={given['context_type'].__name__} is not supported by ScratchPipeTrainPipeline, which needs "
            "contexts of its own. Leave it out."
        )
    known = inspect.signature(TrainPipelineSparseDist.__init__).parameters
    for name in given.keys() - known.keys():
        if given[name]:
            raise ConfigError(
                f"{name}={given[name]!r} needs a newer TorchRec than the installed {version('torchrec')}. Leave it "
                "out, or install one whose TrainPipelineSparseDist has it."
            )
    taken = {name: value for name, value in given.items() if name in known}
    return taken | {"context_type": ScratchPipeTrainPipelineContext}
