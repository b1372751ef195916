# SPDX-License-Identifier: BSD-3-Clause
"""Moves rows: Plan, Collect, Exchange and Insert of one batch, in this order, before its Train.

Shapes: ``I`` ids, ``M`` misses, ``V`` victims, ``S`` slots, ``R`` rows, ``D`` row width.

Plan asks :class:`SlotMap` which row sits where; the other stages do as the plan says. One
batch runs its four stages as a unit, and batches run one at a time. :class:`StageRunner` runs them on the caller's
thread: it is the oracle. :class:`OverlappedStageRunner` runs the same code on a worker
thread (and, for a CUDA device, on a stream of its own) while earlier batches train.

Hazards and guards; the numbers are those of docs/design.md:

1.  Collect(N) must not read a victim that Train(M), M < N, has not updated yet: M holds its slots.
2.  Collect(N+1) must not read a row from the table before Insert(N) has written it back: batches run their stages
    one after another, never interleaved.
3.  Insert(N) must not overwrite a slot that Train(M), M < N, still reads: M holds its slots.
4.  Train(N) must not start before Insert(N) has ended: :meth:`PlannedBatch.wait`.
5.  A table must not be read while rows are newer in the scratchpad: :meth:`Pool.flush`, between two batches' stages.
6.  A table must not be overwritten while a planned batch relies on its rows: :meth:`Pool.purge` refuses.
"""

import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from torchrec_scratchpipe.errors import (
    BatchesInFlightError,
    IdOutOfRangeError,
    ScratchpadFullError,
    ScratchPipeError,
    StageFailedError,
)
from torchrec_scratchpipe.host_table import HostTable
from torchrec_scratchpipe.row_parts import read_rows, write_rows
from torchrec_scratchpipe.scratchpad import Scratchpad
from torchrec_scratchpipe.slot_map import SlotMap, SlotsHeldError
from torchrec_scratchpipe.stats import PoolCounters, PoolStats
from torchrec_scratchpipe.types import CachePlan, RowLayout, Stage, StagedRows, StageSpan

__all__ = [
    "FeatureSource",
    "Hold",
    "OverlappedStageRunner",
    "PlannedBatch",
    "Pool",
    "StageRunner",
    "collect",
    "exchange",
    "insert",
    "plan",
]

FLUSH_CHUNK_ROWS = 65536  # bounds what a flush needs beyond the tables: 16 MiB for rows of 64 floats


class FeatureSource(NamedTuple):
    """Where the ids of one feature look up their rows."""

    feature_name: str
    pool_index: int
    table_index: int


class Pool:
    """All scratchpad tables of one kernel group that share a row layout, and their scratchpad.

    Args:
        host_table: Every row.
        scratchpad: The rows that sit in a slot.
        slot_map: Which row sits in which slot.
    """

    def __init__(self, host_table: HostTable, scratchpad: Scratchpad, slot_map: SlotMap) -> None:
        self.host_table = host_table
        self.scratchpad = scratchpad
        self.slot_map = slot_map
        self.counters = PoolCounters(host_table, slot_map.device)
        self.failure: str | None = None
        self.staging = Staging(host_table.layout, pin_memory=slot_map.device.type == "cuda")
        self._num_updates = 0
        self._num_updates_flushed = 0
        self._flushed_below = 0

    @property
    def name(self) -> str:
        """The pool, as error messages call it."""
        tables = self.host_table.tables
        what = f"table {tables[0].name}" if len(tables) == 1 else f"{len(tables)} tables"
        return f"pool of {what} (dim {self.host_table.layout.dim})"

    def note_update(self) -> None:
        """A batch has trained: its rows are newer in the scratchpad than in the table."""
        self._num_updates += 1

    def flush(self) -> None:
        """Copy every row that may be newer in the scratchpad back to its table; rows stay resident.

        Waits for the device. Does nothing when no batch has trained since the last flush.

        Raises:
            StageFailedError: An earlier stage failed half-way.
        """
        self.check_usable()
        if self._num_updates == self._num_updates_flushed:
            self.host_table.flush()
            return
        with record_function("## scratchpipe flush ##"):
            slots, rows = self.slot_map.resident_since(self._flushed_below)
            for some_slots, some_rows in zip(
                slots.split(FLUSH_CHUNK_ROWS), rows.cpu().split(FLUSH_CHUNK_ROWS), strict=True
            ):
                values = [part.index_select(0, some_slots).cpu() for part in self.scratchpad.parts]
                self.host_table.write(some_rows, values)
            self.host_table.flush()
        self._num_updates_flushed = self._num_updates
        self._flushed_below = self.slot_map.first_held

    def purge(self) -> None:
        """Flush, then empty the scratchpad; hazard 6.

        Raises:
            BatchesInFlightError: Planned batches rely on rows of this pool.
        """
        num_in_flight = self.slot_map.num_batches_in_flight
        if num_in_flight > 0:
            raise BatchesInFlightError(
                f"{self.name}: {num_in_flight} planned batches still need their rows, the tables cannot be "
                "overwritten now. Let the pipeline train them, or call its reset(), before load_state_dict()."
            )
        self.flush()
        self.slot_map.purge()

    def check_usable(self) -> None:
        """Raise if an earlier stage failed half-way.

        Raises:
            StageFailedError: With the first failure.
        """
        if self.failure is not None:
            raise StageFailedError(
                f"{self.name}: {self.failure}. Its rows are incomplete; build the model anew and load a checkpoint."
            )

    def stats(self) -> PoolStats:
        """All counts of this pool; waits for the device."""
        return self.counters.stats(self.scratchpad.num_slots, self.slot_map.num_resident_rows)


class Staging:
    """Host memory that rows pass through, grown to the largest batch and reused by every batch of a pool."""

    def __init__(self, layout: RowLayout, pin_memory: bool) -> None:
        self._layout = layout
        self._pin_memory = pin_memory
        self._buffers: dict[str, list[Tensor]] = {}

    def take(self, purpose: str, num_rows: int) -> list[Tensor]:
        """Room for `num_rows` rows, valid until the next call with the same purpose."""
        buffer = self._buffers.get(purpose)
        if buffer is None or buffer[0].shape[0] < num_rows:
            buffer = self._layout.empty(max(256, num_rows + num_rows // 4), pin_memory=self._pin_memory)
            self._buffers[purpose] = buffer
        return [part[:num_rows] for part in buffer]


def plan(pool: Pool, rows: Tensor, num_ids_per_table: Sequence[int]) -> CachePlan:
    """Stage 1: decide where the batch's rows go and which rows leave; moves nothing.

    Args:
        pool: The pool.
        rows: [I] int64 row ids on the planning device.
        num_ids_per_table: How many of them belong to each table; for statistics.

    Returns:
        The cache plan.

    Raises:
        SlotsHeldError: Batches in flight hold too many slots for now.
    """
    cache_plan = pool.slot_map.plan(rows)
    pool.counters.add_plan(cache_plan, num_ids_per_table, pool.slot_map.rows_in(cache_plan.unique_slots))
    return cache_plan


def collect(pool: Pool, cache_plan: CachePlan) -> StagedRows:
    """Stage 2: copy missing rows out of the table, and victims out of the scratchpad, into staging.

    Args:
        pool: The pool.
        cache_plan: What Plan decided.

    Returns:
        Staged rows: `fill` on the host, `writeback` on the device.
    """
    miss_rows = cache_plan.miss_rows.cpu()
    fill = pool.staging.take("fill", miss_rows.numel())
    pool.host_table.read(miss_rows, fill)
    if pool.slot_map.device.type == "cpu":
        writeback = pool.staging.take("writeback", cache_plan.victim_slots.numel())
        read_rows(pool.scratchpad.parts, cache_plan.victim_slots, writeback)
    else:
        writeback = [part.index_select(0, cache_plan.victim_slots) for part in pool.scratchpad.parts]
    return StagedRows(fill, writeback)


def exchange(pool: Pool, staged: StagedRows) -> StagedRows:
    """Stage 3: carry staged rows over the bus, both ways; on a CPU both sides are the same memory.

    Args:
        pool: The pool.
        staged: What Collect gave.

    Returns:
        Staged rows: `fill` on the device, `writeback` on the host.
    """
    device = pool.slot_map.device
    if device.type == "cpu":
        return staged
    fill = [part.to(device, non_blocking=True) for part in staged.fill]
    writeback = pool.staging.take("writeback", staged.writeback[0].shape[0])
    for source, target in zip(staged.writeback, writeback, strict=True):
        target.copy_(source, non_blocking=True)
    torch.get_device_module(device).current_stream().synchronize()
    return StagedRows(fill, writeback)


def insert(pool: Pool, cache_plan: CachePlan, staged: StagedRows) -> None:
    """Stage 4: write victims to their table and missing rows to their slots.

    Args:
        pool: The pool.
        cache_plan: What Plan decided.
        staged: What Exchange gave.
    """
    pool.host_table.write(cache_plan.victim_rows.cpu(), staged.writeback)
    write_rows(pool.scratchpad.parts, cache_plan.miss_slots, staged.fill)


class Hold:
    """What keeps one batch's slots from becoming victims, until Train has updated them.

    Release it when the batch's backward has run, or when the batch will never train. A hold
    that nobody owns any more releases itself.
    """

    def __init__(self, runner: "StageRunner") -> None:
        self._runner = runner
        self._held: deque[tuple[Pool, int]] = deque()
        self._train_start_s: float | None = None
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

    def start_train(self) -> None:
        """Train reads the slots from now on."""
        self._train_start_s = time.perf_counter()

    def release(self, *, is_updated: bool = False) -> None:
        """Let go of the slots; later calls do nothing.

        Args:
            is_updated: Whether Train has changed the rows.
        """
        self.is_released = True
        while self._held:
            try:
                pool, batch_index = self._held.popleft()
            except IndexError:  # another thread released the last one
                break
            if is_updated:
                pool.note_update()
            if self._train_start_s is not None:
                pool.counters.spans.append(
                    StageSpan(batch_index, Stage.TRAIN, self._train_start_s, time.perf_counter(), 0)
                )
            self._runner.record_train()
            pool.slot_map.release(batch_index)
            self._runner.slots_released()

    def __del__(self) -> None:
        self.release()


class PlannedBatch:
    """One batch of ids on its way through Plan, Collect, Exchange and Insert.

    Args:
        pools: The pools that the ids may look up.
        features: Where each feature looks up, in the order of `ids`.
        ids: [I] int32 or int64, the ids of all features behind each other.
        feature_bounds: Feature `f` owns ``ids[feature_bounds[f] : feature_bounds[f + 1]]``.
        runner: Who runs the stages.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        features: Sequence[FeatureSource],
        ids: Tensor,
        feature_bounds: Sequence[int],
        runner: "StageRunner",
    ) -> None:
        self.hold = Hold(runner)
        self.is_awaited = False
        self.done = threading.Event()
        self._runner = runner
        self._pools = pools
        self._features = features
        self._ids = ids
        self._feature_bounds = feature_bounds
        self._plans: list[CachePlan] = []
        self._row_ids: list[Tensor] | None = None
        self._error: Exception | None = None
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
            for pool in self._pools:
                pool.counters.add_stall(1e3 * (time.perf_counter() - start_s))
        if self._error is not None:
            self.hold.release()
            raise self._error
        self._runner.let_current_stream_wait(self)
        for pool, cache_plan in zip(self._pools, self._plans, strict=True):
            pool.counters.add_misses_at_train(pool.slot_map.count_mismatches(cache_plan.rows, cache_plan.slots))
        self.hold.start_train()
        return self._slots_of_ids()

    def try_stages(self, is_last_chance: bool) -> None:
        """Run the stages of every pool that has not run them; sets `done` unless slots are held for now.

        Args:
            is_last_chance: No slot will be released before this batch trains, so that waiting would not help.
        """
        try:
            if self._row_ids is None:
                self._row_ids = self._rows_of_ids()
            while len(self._plans) < len(self._pools):
                self._run_stages(len(self._plans))
        except SlotsHeldError as held:
            pool = self._pools[len(self._plans)]
            if held.num_needed <= pool.scratchpad.num_slots and not is_last_chance:
                return
            self._error = _full_error(pool, held)
        except Exception as error:  # whatever stops a stage belongs to this batch's Train, on another thread
            self._error = error
        self.done.set()

    def _run_stages(self, pool_index: int) -> None:
        pool = self._pools[pool_index]
        pool.check_usable()
        start_s = time.perf_counter()
        with record_function("## scratchpipe plan ##"):
            cache_plan = plan(pool, self._rows_of_pool(pool_index), self._num_ids_per_table(pool_index))
        pool.counters.spans.append(
            StageSpan(cache_plan.batch_index, Stage.PLAN, start_s, time.perf_counter(), num_bytes=0)
        )
        self.hold.add(pool, cache_plan.batch_index)
        self._runner.order_after_trains()
        try:
            with _span(pool, cache_plan, Stage.COLLECT):
                staged = collect(pool, cache_plan)
            with _span(pool, cache_plan, Stage.EXCHANGE):
                staged = exchange(pool, staged)
        except BaseException:
            pool.slot_map.undo(cache_plan)
            raise
        try:
            with _span(pool, cache_plan, Stage.INSERT):
                insert(pool, cache_plan, staged)
        except BaseException as error:
            pool.failure = f"Insert of batch {cache_plan.batch_index} failed ({error!r})"
            raise StageFailedError(f"{pool.name}: {pool.failure}") from error
        self._plans.append(cache_plan)

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

    def _rows_of_ids(self) -> list[Tensor]:
        """Row ids of each pool, [I of the pool] int64; checks every id before anything is planned."""
        row_ids = []
        for pool_index, pool in enumerate(self._pools):
            segments = list(self._segments(pool_index))
            _check_ids(pool, segments, self._ids)
            rows = torch.empty(
                sum(last - first for _, first, last in segments), dtype=torch.int64, device=self._ids.device
            )
            position = 0
            for feature, first, last in segments:
                offset = pool.host_table.row_offsets[feature.table_index]
                torch.add(self._ids[first:last], offset, out=rows[position : position + last - first])
                position += last - first
            row_ids.append(rows)
        return row_ids

    def _rows_of_pool(self, pool_index: int) -> Tensor:
        assert self._row_ids is not None
        return self._row_ids[pool_index]

    def _slots_of_ids(self) -> Tensor:
        if len(self._pools) == 1:
            return self._plans[0].slots
        slots = torch.empty(self._ids.numel(), dtype=torch.int64, device=self._ids.device)
        for pool_index, cache_plan in enumerate(self._plans):
            position = 0
            for _, first, last in self._segments(pool_index):
                slots[first:last] = cache_plan.slots[position : position + last - first]
                position += last - first
        return slots


class StageRunner:
    """Runs the stages of one batch after another on the caller's thread: the sequential twin and oracle.

    Args:
        device: Where the scratchpads are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._submitted: deque[PlannedBatch] = deque()
        self._lock = threading.RLock()

    def submit(self, batch: PlannedBatch) -> None:
        """Take a batch; its stages run now, or, while batches in flight hold too many slots, later.

        Args:
            batch: A new batch.
        """
        with self._lock:
            self._submitted.append(batch)
            while self._submitted and self._run(self._submitted[0], is_last_chance=False):
                self._submitted.popleft()

    def finish(self, batch: PlannedBatch) -> None:
        """Make sure that a submitted batch is done, ahead of others if it must be.

        Args:
            batch: A batch that was submitted.
        """
        with self._lock:
            self._submitted.remove(batch)
            self._run(batch, is_last_chance=True)

    def record_train(self) -> None:
        """Train of a batch has been issued, its slots are about to be released; called from any thread."""

    def slots_released(self) -> None:
        """A batch has let go of slots; called from any thread."""

    def order_after_trains(self) -> None:
        """Order the stages' device work after every Train whose release Plan has seen; a CPU has nothing to order."""

    def between_batches(self) -> AbstractContextManager[object]:
        """While entered, no stage of any batch runs (hazards 5 and 6)."""
        return self._lock

    def let_current_stream_wait(self, batch: PlannedBatch) -> None:
        """Order the caller's device work after Insert of a batch; a CPU has nothing to order.

        Args:
            batch: A batch that is done.
        """

    def _run(self, batch: PlannedBatch, is_last_chance: bool) -> bool:
        batch.try_stages(is_last_chance)
        return batch.done.is_set()


class OverlappedStageRunner(StageRunner):
    """Runs the stages on a worker thread while earlier batches train; same stages, same order, same bits.

    Batches run in the order submitted. Where the next one must wait for slots, a batch that Train
    already waits for goes ahead of it. On a CUDA device the worker issues to its own stream: Plan waits for the
    event of the last Train that was released (hazards 1 and 3), Train waits for the event of Insert (hazard 4).
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._queue = _WorkQueue()
        self._thread: threading.Thread | None = None
        self._stream = torch.get_device_module(device).Stream() if device.type == "cuda" else None
        self._train_events: deque[torch.Event] = deque()

    def submit(self, batch: PlannedBatch) -> None:
        """Take a batch; its stages run on the worker thread.

        Args:
            batch: A new batch.
        """
        if self._stream is not None:
            self._stream.wait_stream(torch.get_device_module(self.device).current_stream())
        if self._thread is None:
            self._start()
        self._queue.put(batch)

    def finish(self, batch: PlannedBatch) -> None:
        """Wait for the worker to finish a batch, ahead of others if it must be.

        Args:
            batch: A batch that was submitted.
        """
        self._queue.mark_awaited(batch)
        batch.done.wait()

    def record_train(self) -> None:
        """Record the event that a later Collect has to wait for.

        Hazards 1 and 3: Collect(N) reads, and Insert(N) overwrites, a slot that Train(M), M < N, used on the stream of
        the model. The event is recorded before the slot is released, so that whoever sees the release finds the event.
        """
        if self._stream is not None:
            event = torch.get_device_module(self.device).Event()
            event.record()
            self._train_events.append(event)

    def slots_released(self) -> None:
        """Wake the worker, which may be waiting for slots."""
        self._queue.slots_released()

    def order_after_trains(self) -> None:
        """Let the worker's stream wait for the events of :meth:`record_train`; after Plan, see there."""
        while self._stream is not None and self._train_events:
            self._stream.wait_event(self._train_events.popleft())

    def let_current_stream_wait(self, batch: PlannedBatch) -> None:
        """Order the caller's device work after Insert of a batch (hazard 4).

        Args:
            batch: A batch that is done.
        """
        if batch.inserted is not None:
            torch.get_device_module(self.device).current_stream().wait_event(batch.inserted)

    @contextmanager
    def _on_stream(self, batch: PlannedBatch) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        with torch.get_device_module(self.device).stream(self._stream):
            yield
            batch.inserted = torch.get_device_module(self.device).Event()
            batch.inserted.record()

    def _run(self, batch: PlannedBatch, is_last_chance: bool) -> bool:
        with self._lock, self._on_stream(batch):
            return super()._run(batch, is_last_chance)

    def _start(self) -> None:
        # The thread must not keep the runner alive: it sees the queue, and the runner only while it works.
        self._thread = threading.Thread(
            target=_work, args=(self._queue, weakref.ref(self)), name="scratchpipe-stages", daemon=True
        )
        self._thread.start()
        weakref.finalize(self, _stop, self._queue, self._thread)


class _WorkQueue:
    """Batches that wait for the worker, and the reasons to look at them again."""

    def __init__(self) -> None:
        self._batches: deque[PlannedBatch] = deque()
        self._changed = threading.Condition()
        self._num_changes = 0
        self._is_closed = False

    def put(self, batch: PlannedBatch) -> None:
        with self._changed:
            self._batches.append(batch)
            self._note_change()

    def mark_awaited(self, batch: PlannedBatch) -> None:
        with self._changed:
            batch.is_awaited = True
            self._note_change()

    def slots_released(self) -> None:
        with self._changed:
            self._note_change()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._note_change()

    def next(self, num_changes_seen: int) -> tuple[PlannedBatch | None, int]:
        """The batch to try next: an awaited one, else the oldest; None when closed.

        Blocks while the queue is empty, or nothing has changed since `num_changes_seen`.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or (self._batches and self._num_changes != num_changes_seen))
            if self._is_closed:
                return None, self._num_changes
            awaited = next((batch for batch in self._batches if batch.is_awaited), None)
            return awaited or self._batches[0], self._num_changes

    def remove(self, batch: PlannedBatch) -> None:
        with self._changed:
            self._batches.remove(batch)

    def _note_change(self) -> None:
        self._num_changes += 1
        self._changed.notify_all()


def _work(queue: _WorkQueue, runner_ref: "weakref.ref[OverlappedStageRunner]") -> None:
    num_changes_seen = -1
    while True:
        batch, num_changes = queue.next(num_changes_seen)
        runner = runner_ref()
        if batch is None or runner is None:
            return
        is_done = runner._run(batch, is_last_chance=batch.is_awaited)
        if is_done:
            queue.remove(batch)
        num_changes_seen = -1 if is_done else num_changes
        del batch, runner


def _stop(queue: _WorkQueue, thread: threading.Thread) -> None:
    queue.close()
    if thread is not threading.current_thread():
        thread.join(timeout=10)


@contextmanager
def _span(pool: Pool, cache_plan: CachePlan, stage: Stage) -> Iterator[None]:
    num_rows = cache_plan.miss_rows.numel() + cache_plan.victim_rows.numel()
    num_bytes = num_rows * pool.host_table.layout.row_bytes
    start_s = time.perf_counter()
    with record_function(f"## scratchpipe {stage.value} {cache_plan.batch_index} ##"):
        yield
    pool.counters.spans.append(StageSpan(cache_plan.batch_index, stage, start_s, time.perf_counter(), num_bytes))


def _check_ids(pool: Pool, segments: Sequence[tuple[FeatureSource, int, int]], ids: Tensor) -> None:
    filled = [(feature, ids[first:last].aminmax()) for feature, first, last in segments if last > first]
    if not filled:
        return
    lows = torch.stack([bounds.min for _, bounds in filled]).tolist()
    highs = torch.stack([bounds.max for _, bounds in filled]).tolist()
    for (feature, _), low, high in zip(filled, lows, highs, strict=True):
        table = pool.host_table.tables[feature.table_index]
        if low < 0 or high >= table.num_rows:
            bad = low if low < 0 else high
            raise IdOutOfRangeError(
                f"table {table.name}: feature {feature.feature_name} has id {bad}, this rank's shard has rows "
                f"[0, {table.num_rows}). Hash the ids into the table's num_embeddings, or raise num_embeddings."
            )


def _full_error(pool: Pool, held: SlotsHeldError) -> ScratchPipeError:
    num_slots, num_rows = pool.scratchpad.num_slots, pool.host_table.num_rows
    if held.num_needed > num_slots:
        return ScratchpadFullError(
            f"{pool.name}: one batch needs {held.num_needed:,} slots, the scratchpad has {num_slots:,}. Raise "
            f"load_factor to at least {min(1.0, held.num_needed / num_rows + 5e-5):.4f}, or lower the batch size."
        )
    return ScratchpadFullError(
        f"{pool.name}: a batch needs {held.num_needed:,} slots, the scratchpad has {num_slots:,} and other batches in "
        f"flight hold all but {held.num_available:,}. Let them train first, lower lookahead, raise load_factor, or "
        "drop results whose backward will never run."
    )
