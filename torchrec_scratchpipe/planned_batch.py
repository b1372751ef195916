# SPDX-License-Identifier: BSD-3-Clause
"""One batch on its way through the stages, and the hold that keeps its rows in place until it has trained.

Shapes: ``I`` ids.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from torchrec_scratchpipe import stages
from torchrec_scratchpipe.errors import IdOutOfRangeError, ScratchpadFullError, ScratchPipeError
from torchrec_scratchpipe.pool import Pool
from torchrec_scratchpipe.slot_map import SlotsHeldError
from torchrec_scratchpipe.streams import StageStreams
from torchrec_scratchpipe.types import CachePlan, Stage, StagedRows, StageSpan

__all__ = ["BatchRunner", "FeatureSource", "Hold", "PlannedBatch", "check_ids"]


class FeatureSource(NamedTuple):
    """Where the ids of one feature look up their rows."""

    feature_name: str
    pool_index: int | None  # None if its table is kept whole: rows are where their ids say
    table_index: int


class BatchRunner(Protocol):
    """What a batch needs of whoever runs its stages; see :mod:`torchrec_scratchpipe.runner`."""

    streams: StageStreams

    def finish(self, batch: "PlannedBatch") -> None:
        """Make sure that a submitted batch is done."""

    def current_stream(self) -> torch.Stream | None:
        """The caller's stream on the device; None on a CPU."""

    def record_train(self, stream: torch.Stream | None) -> None:
        """Train of a batch has been issued on a stream, its slots are about to be released."""

    def slots_released(self) -> None:
        """A batch has let go of slots."""

    def order_after_trains(self) -> None:
        """Order the stages' device work after every Train whose release Plan has seen."""

    def record_refresh(self) -> None:
        """Rows in the scratchpad have just been read anew."""

    def let_current_stream_wait(self, batch: "PlannedBatch") -> None:
        """Order the caller's device work after Insert of a batch, and after rows were last read anew."""

    def between_batches(self) -> AbstractContextManager[None]:
        """While entered, no stage of any batch runs."""


class _PlannedIds(NamedTuple):
    """What Train needs of a cache plan; the rest is let go once rows have moved."""

    rows: Tensor  # [I] int64
    slots: Tensor  # [I] int64


class Hold:
    """What keeps one batch's slots from becoming victims, until Train has updated them.

    Release it when the batch's backward has run, or when the batch will never train. A hold
    that nobody owns any more releases itself.
    """

    def __init__(self, runner: BatchRunner) -> None:
        self._runner = runner
        self._held: deque[tuple[Pool, int]] = deque()
        self._seen: list[tuple[Pool, int, Any]] = []
        self._train_start_s: float | None = None
        self._train_stream: torch.Stream | None = None
        self.is_released = False

    def add(self, pool: Pool, batch_index: int) -> None:
        """Take responsibility for a planned batch.

        Args:
            pool: Whose slots are held.
            batch_index: As :class:`CachePlan` says.
        """
        self._held.append((pool, batch_index))
        if self.is_released:
            self.release()

    def add_seen(self, pool: Pool, seen: int, ids: Any) -> None:
        """Take responsibility for a batch that was seen and may never be planned.

        Args:
            pool: Whose slot map has seen it.
            seen: As :meth:`SlotMap.see` says.
            ids: What it has seen.
        """
        self._seen.append((pool, seen, ids))
        if self.is_released:
            self.release()

    def start_train(self) -> None:
        """Train reads the slots from now on, on the caller's stream."""
        self._train_stream = self._runner.current_stream()
        self._train_start_s = time.perf_counter()

    def release(self, *, is_updated: bool = False) -> None:
        """Let go of the slots; later calls do nothing.

        Args:
            is_updated: Whether Train has changed the rows.
        """
        self.is_released = True
        updated = []
        while self._held:
            try:
                pool, batch_index = self._held.popleft()
            except IndexError:  # another thread released the last one
                break
            if is_updated:
                pool.note_update()
                updated.append(pool)
            if self._train_start_s is not None:
                pool.counters.spans.append(
                    StageSpan(batch_index, Stage.TRAIN, self._train_start_s, time.perf_counter(), 0)
                )
            # The stream that Train ran on: the thread that releases may be on another, or on none.
            self._runner.record_train(self._train_stream)
            pool.slot_map.release(batch_index)
        for pool, seen, ids in self._seen:
            pool.slot_map.forget(seen, ids)
        self._seen = []
        self._runner.slots_released()
        for pool in updated:
            if pool.host_table.lent.is_any_lent:  # somebody may look at any time
                with self._runner.between_batches():
                    pool.flush()

    def __del__(self) -> None:
        self.release()


class PlannedBatch:
    """One kernel group's share of a batch, on its way through Plan, Collect, Exchange and Insert.

    Args:
        pools: The pools that the ids may look up.
        features: Where each feature looks up, in the order of `ids`.
        ids: [I] int32 or int64, the ids of all features behind each other.
        feature_bounds: Feature `f` owns ``ids[feature_bounds[f] : feature_bounds[f + 1]]``.
        runner: Who runs the stages.
        may_plan: False if it is to be seen only, for now: it tells the eviction order what is coming, and holds no slots.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        features: Sequence[FeatureSource],
        ids: Tensor,
        feature_bounds: Sequence[int],
        runner: BatchRunner,
        *,
        may_plan: bool = True,
    ) -> None:
        self.hold = Hold(runner)
        self.may_plan = may_plan
        self.is_awaited = False
        self.is_seen = False
        self.done = threading.Event()
        self._runner = runner
        self._pools = pools
        self._features = features
        self._ids = ids
        self._feature_bounds = feature_bounds
        self._planned: list[_PlannedIds] = []
        self._pool_ids: list[Any] | None = None  # what each pool's slot map takes
        self._seen_by_pool: dict[int, int] = {}
        self._error: BaseException | None = None
        self.inserted: torch.Event | None = None

    def wait(self) -> Tensor:
        """Wait until every row of the batch is in its slot (hazard 4), and count the wait if there was one.

        Returns:
            [I] int64, the slot of each id.

        Raises:
            ScratchPipeError: What stopped a stage; no slot stays held.
        """
        if not self.done.is_set():
            start_s = time.perf_counter()
            self._runner.finish(self)
            # One wait, whatever the number of pools: the first one counts it, so that sums are right.
            self._pools[0].counters.add_stall(1e3 * (time.perf_counter() - start_s))
        if self._error is not None:
            self.hold.release()
            raise self._error
        self._check_planned()
        self._check_unchanged()
        self.refresh()
        self._runner.let_current_stream_wait(self)
        self._count_misses_at_train()
        self.hold.start_train()
        return self._slots_of_ids()

    def refresh(self) -> None:
        """Read resident rows anew if tables have been overwritten (hazard 6); before Train reads them, and updates them.

        Raises:
            TableOverwrittenError: See :meth:`Pool.refresh`.
        """
        if any(pool.is_overwritten for pool in self._pools):
            with self._runner.between_batches():
                for pool in self._pools:
                    self._refresh(pool)

    def record_stages_streams(self, streams: StageStreams) -> None:
        """Tell the allocator that the stages read the ids on streams of their own.

        Args:
            streams: Those.
        """
        streams.record_use(self._ids)

    def record_train_stream(self, streams: StageStreams) -> None:
        """Tell the allocator that Train, on the caller's stream, reads what Plan made; once the batch is done.

        Args:
            streams: The stages'.
        """
        for cache_plan in self._planned:
            streams.record_use_by_caller(cache_plan.rows)
            streams.record_use_by_caller(cache_plan.slots)

    @property
    def num_ids(self) -> int:
        """I."""
        return self._ids.numel()

    def fail(self, error: BaseException) -> None:
        """Let the batch's Train raise.

        Args:
            error: What stopped a stage.
        """
        self._error = error

    def after_fork_in_child(self) -> None:
        """Have an event whose lock no thread of the parent holds."""
        is_done, self.done = self.done.is_set(), threading.Event()
        if is_done:
            self.done.set()

    def see(self) -> None:
        """Tell each pool's eviction order what the batch will use; only between the stages of two batches."""
        self.is_seen = True
        if self.hold.is_released:
            return
        try:
            self._pool_ids = self._ids_of_pools()
        except Exception:  # its Plan will meet it again, and tell its Train
            return
        for pool_index, (pool, ids) in enumerate(zip(self._pools, self._pool_ids, strict=True)):
            seen = pool.slot_map.see(ids)
            if seen is not None:
                self._seen_by_pool[pool_index] = seen
                self.hold.add_seen(pool, seen, ids)

    def try_stages(self, is_last_chance: bool) -> bool:
        """Run the stages of every pool that has not run them.

        Args:
            is_last_chance: No slot will be released before this batch trains, so that waiting would not help.

        Returns:
            False if batches in flight hold too many slots for now; else the batch is ready, or has failed.
        """
        if self.hold.is_released:
            self.fail(ScratchPipeError("the batch was dropped before its rows were fetched"))
            return True
        plan_start_s = time.perf_counter()
        try:
            if self._pool_ids is None:
                self._pool_ids = self._ids_of_pools()
            while self._num_pools_planned < len(self._pools):
                try:
                    self._run_stages(self._num_pools_planned, plan_start_s)
                except SlotsHeldError as held:
                    pool = self._pools[self._num_pools_planned]
                    is_hopeless = held.num_needed > pool.scratchpad.num_slots and not pool.can_grow
                    if not is_last_chance and not is_hopeless:
                        return False
                    _grow(pool, held)
                plan_start_s = time.perf_counter()
        except Exception as error:  # whatever stops a stage belongs to this batch's Train, on another thread
            self.fail(error)
        return True

    @property
    def _num_pools_planned(self) -> int:
        return len(self._planned)

    def _run_stages(self, pool_index: int, plan_start_s: float) -> None:
        """Run all stages of one pool."""
        pool = self._pools[pool_index]
        pool.check_usable()
        self._refresh(pool)
        with record_function(f"## scratchpipe plan {pool.slot_map.next_batch} ##"):
            cache_plan = stages.plan(
                pool,
                self._ids_of_pool(pool_index),
                self._num_ids_per_table(pool_index),
                self._seen_by_pool.get(pool_index),
            )
        pool.counters.spans.append(
            StageSpan(cache_plan.batch_index, Stage.PLAN, plan_start_s, time.perf_counter(), num_bytes=0)
        )
        self.hold.add(pool, cache_plan.batch_index)
        self._runner.order_after_trains()
        try:
            staged = self._collect_and_exchange(pool, cache_plan)
        except BaseException:
            pool.slot_map.undo(cache_plan)
            pool.counters.undo_plan(cache_plan)
            raise
        self._insert(pool, cache_plan, staged)
        self._planned.append(_PlannedIds(cache_plan.rows, cache_plan.slots))

    def _collect_and_exchange(self, pool: Pool, cache_plan: CachePlan) -> StagedRows:
        with _span(pool, cache_plan, Stage.COLLECT):
            staged = stages.collect(pool, cache_plan)
        with _span(pool, cache_plan, Stage.EXCHANGE):
            return stages.exchange(pool, staged)

    def _insert(self, pool: Pool, cache_plan: CachePlan, staged: StagedRows) -> None:
        try:
            with _span(pool, cache_plan, Stage.INSERT):
                stages.insert(pool, cache_plan, staged)
        except BaseException as error:
            pool.failure = f"Insert of batch {cache_plan.batch_index} failed ({error!r})"
            raise pool.failure_error() from error

    def _refresh(self, pool: Pool) -> None:
        """Hazard 6; only between the stages of two batches."""
        if pool.is_overwritten:
            pool.refresh()
            self._runner.record_refresh()
            # Last: Train of a batch that is ready asks, while the worker may be at it.
            pool.host_table.accept_overwrite()

    def _segments(self, pool_index: int) -> Iterator[tuple[FeatureSource, int, int]]:
        bounds = self._feature_bounds
        for feature, first, last in zip(self._features, bounds[:-1], bounds[1:], strict=True):
            if feature.pool_index == pool_index:
                yield feature, first, last

    def _num_ids_per_table(self, pool_index: int) -> list[int]:
        counts = [0] * len(self._pools[pool_index].host_table.tables)
        for feature, first, last in self._segments(pool_index):
            counts[feature.table_index] += last - first
        return counts

    def _check_planned(self) -> None:
        """Raise what has come out since the stages were enqueued; nothing here, where the host has waited for them."""

    def _check_unchanged(self) -> None:
        """Raise if ids on the host are not those that were planned: somebody has used their memory again.

        Raises:
            ScratchPipeError: Says how many batches are in flight.
        """
        for pool_index, planned in enumerate(self._planned):
            if not torch.equal(self._rows_of_pool(pool_index), planned.rows):
                self.hold.release()
                raise ScratchPipeError(
                    "the ids of a batch have changed between Plan and Train: the memory of a batch in flight was written. A data loader that "
                    "reuses its buffers needs lookahead + num_batches_seen_ahead + 3 of them; or give each batch memory of its own."
                )

    def _count_misses_at_train(self) -> None:
        for pool, cache_plan in zip(self._pools, self._planned, strict=True):
            pool.counters.add_misses_at_train(pool.slot_map.count_mismatches(cache_plan.rows, cache_plan.slots))

    def _ids_of_pools(self) -> list[Any]:
        """Row ids of each pool, [I of the pool] int64; checks every id before anything is planned."""
        for pool_index, pool in enumerate(self._pools):
            for feature, first, last in self._segments(pool_index):
                table = pool.host_table.tables[feature.table_index]
                check_ids(table.name, feature.feature_name, self._ids[first:last], table.num_rows)
        return [self._rows_of_pool(pool_index) for pool_index in range(len(self._pools))]

    def _rows_of_pool(self, pool_index: int) -> Tensor:
        segments = list(self._segments(pool_index))
        offsets = self._pools[pool_index].host_table.row_offsets
        rows = torch.empty(sum(last - first for _, first, last in segments), dtype=torch.int64, device=self._ids.device)
        position = 0
        for feature, first, last in segments:
            torch.add(
                self._ids[first:last].long(), offsets[feature.table_index], out=rows[position : position + last - first]
            )
            position += last - first
        return rows

    def _ids_of_pool(self, pool_index: int) -> Any:
        assert self._pool_ids is not None
        return self._pool_ids[pool_index]

    def _slots_of_ids(self) -> Tensor:
        has_whole_tables = any(feature.pool_index is None for feature in self._features)
        if len(self._pools) == 1 and not has_whole_tables:
            return self._planned[0].slots
        slots = self._ids.to(torch.int64, copy=True)
        for pool_index, cache_plan in enumerate(self._planned):
            position = 0
            for _, first, last in self._segments(pool_index):
                slots[first:last] = cache_plan.slots[position : position + last - first]
                position += last - first
        return slots


@contextmanager
def _span(pool: Pool, cache_plan: CachePlan, stage: Stage) -> Iterator[None]:
    num_rows = cache_plan.miss_rows.numel() + cache_plan.victim_rows.numel()
    num_bytes = num_rows * pool.host_table.layout.row_bytes
    start_s = time.perf_counter()
    with record_function(f"## scratchpipe {stage.value} {cache_plan.batch_index} ##"):
        yield
    pool.counters.spans.append(StageSpan(cache_plan.batch_index, stage, start_s, time.perf_counter(), num_bytes))


def check_ids(table_name: str, feature_name: str, ids: Tensor, num_rows: int) -> None:
    """Refuse ids that point outside a table.

    Args:
        table_name: For the message.
        feature_name: For the message.
        ids: [I] int32 or int64. On a CUDA device this waits for it.
        num_rows: Ids must lie in ``[0, num_rows)``.

    Raises:
        IdOutOfRangeError: Names the table, the id and the range.
    """
    if ids.numel() == 0:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= num_rows:
        raise IdOutOfRangeError(
            f"table {table_name}: feature {feature_name} has id {low if low < 0 else high}, there are rows "
            f"[0, {num_rows}). Hash the ids into the table's num_embeddings, or raise num_embeddings."
        )


def _grow(pool: Pool, held: SlotsHeldError) -> None:
    """Give a batch the slots that it needs and nobody will let go of; raises if there are none."""
    num_held = pool.scratchpad.num_slots - held.num_available
    reason = pool.grow(held.num_needed, num_held) if pool.can_grow else ""
    if reason or not pool.can_grow:
        raise _full_error(pool, held, reason)


def _full_error(pool: Pool, held: SlotsHeldError, why_not_more: str) -> ScratchPipeError:
    num_slots, num_rows = pool.scratchpad.num_slots, pool.host_table.num_rows
    why_not_more = why_not_more and f", and {why_not_more}"
    if held.num_needed > num_slots:
        return ScratchpadFullError(
            f"{pool.name}: one batch needs {held.num_needed:,} slots, the scratchpad has {num_slots:,}{why_not_more}. "
            f"Raise load_factor to at least {min(1.0, held.num_needed / num_rows + 5e-5):.4f}, or lower the batch size."
        )
    return ScratchpadFullError(
        f"{pool.name}: a batch needs {held.num_needed:,} slots, the scratchpad has {num_slots:,}, and all but "
        f"{held.num_available:,} are held by batches since the oldest one in flight{why_not_more}. Let those train first, lower "
        "lookahead, raise load_factor, or drop results whose backward will never run: they keep their batch in flight."
    )
