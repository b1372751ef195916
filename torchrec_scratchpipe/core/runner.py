# SPDX-License-Identifier: BSD-3-Clause
"""Runs the stages of batch after batch, in an order in which no row is lost.

Shapes: ``I`` ids.

A batch is data; a runner alone acts on it. One batch runs its stages as a unit, and batches run one at a time.
:class:`StageRunner` runs them on the caller's thread: it is the oracle. :class:`OverlappedStageRunner` runs the same
code on a worker thread, and on a CUDA device on streams of its own, while earlier batches train.

Hazards and guards; the numbers are those of docs/how_it_works.md:

1.  Collect(N) must not read a victim that Train(M), M < N, has not updated yet: M holds its slots.
2.  Collect(N+1) must not read a row from the table before Insert(N) has written it back: batches run their stages
    one after another, never interleaved.
3.  Insert(N) must not overwrite a slot that Train(M), M < N, still reads: M holds its slots.
4.  Train(N) must not start before Insert(N) has ended: :meth:`StageRunner.wait`.
5.  A table must not be read while rows are newer in the scratchpad: :meth:`Pool.flush`, between two batches' stages.
6.  Rows that a planned batch relies on must not stay old when their table is overwritten: no stage runs meanwhile
    (:meth:`StageRunner.pause`), then :meth:`Pool.refresh`.
7.  Collect(N) must not use a row that was read ahead from a disk and has been written since: :meth:`DiskRows.read`.
8.  A row that is reset between two Trains must be new for every later one, planned already or not, and old in no copy:
    no stage runs meanwhile (:meth:`StageRunner.between_batches`), then :meth:`Pool.write_some`.
9.  A row of a delta must be read as it was at the delta's moment, while later Trains change it: :class:`Changes`.
10. A row that gets updates late must have them before it is looked up: :meth:`StageRunner.wait`; and before somebody
    outside sees it: :meth:`Pool.catch_up_all`.

What stops the world, and how far:

*   :meth:`StageRunner.between_batches`: while entered, no stage runs.
*   :meth:`StageRunner.wait_until_idle`: no stage will run before the caller submits, awaits or releases a batch.
*   :meth:`StageRunner.pause`: the same, and released slots wake nobody.
"""

import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_scratchpipe.core.batch import Batch, BatchState
from torchrec_scratchpipe.core.disk_rows import RowsAhead
from torchrec_scratchpipe.core.fork import prepare_for_forks
from torchrec_scratchpipe.core.host_table import LentMemories
from torchrec_scratchpipe.core.pool import Pool
from torchrec_scratchpipe.core.slot_map import CachePlan, PoolIds, SlotsHeldError
from torchrec_scratchpipe.core.slot_ops import Count
from torchrec_scratchpipe.core.stages import run_stages
from torchrec_scratchpipe.core.streams import StageStreams
from torchrec_scratchpipe.core.torch_ops import rows_of_ids
from torchrec_scratchpipe.errors import ScratchPipeError

__all__ = ["OverlappedStageRunner", "StageRunner"]

# Rows on a disk are read when their batch is seen, and are in RAM until it is planned. Batches that are seen from
# farther away are read when they are submitted.
MAX_BATCHES_READ_AHEAD = 20


class _Waiting:
    """A batch whose stages have not run. It is not owned: a batch that nobody is going to look up any more leaves."""

    def __init__(self, batch: Batch) -> None:
        self.batch = weakref.ref(batch)
        self.may_plan = False  # else it may only be seen
        self.is_awaited = False  # Train waits for it


class StageRunner:
    """Runs the stages of one batch after another on the caller's thread: the sequential twin and oracle."""

    def __init__(self, device: torch.device, streams: StageStreams | None = None) -> None:
        self.device = device
        self.streams = streams or StageStreams(device, is_overlapped=False)
        self.lent = LentMemories()
        self.is_only_read = False  # whoever takes tables now only reads them, at once
        self.is_only_located = False  # whoever takes tables now only asks where they are
        self._queue = _Queue(self.lent)
        self._lock = threading.RLock()  # whoever runs stages, or must not have them run, has it

    def see(self, batch: Batch) -> None:
        """Let a batch's ids guide the choice of victims; it holds no slots, and no row moves."""
        if not batch.is_only_seen and self._queue.num_waiting < MAX_BATCHES_READ_AHEAD:
            self._ask_ahead(batch)
        self._admit(batch)
        self._run_waiting()

    def submit(self, batch: Batch) -> None:
        """Run a batch's stages; now, or, while batches in flight hold too many slots, later."""
        if batch.is_pending:
            self._ask_ahead(batch)
            if not self._queue.has(batch):
                self._admit(batch)
        if self._queue.allow(batch):
            self._run_waiting()

    def wait(self, batch: Batch) -> Tensor:
        """Wait until every row of a batch is in its slot (hazard 4), and count the wait if there was one.

        Train begins now.

        Shapes: returns [I] int64. Raises ScratchPipeError.
        """
        if batch.is_pending:
            start_s = time.perf_counter()
            self._finish(batch)
            # One wait, whatever the number of pools: the first one counts it, so that sums are right.
            batch.pools[0].counters.add_stall(1e3 * (time.perf_counter() - start_s))
        if batch.error is None:
            batch.error = self._take_in_counts(batch) or self._find_change(batch)
        if batch.error is not None:
            self.release(batch)
            raise batch.error
        self.refresh(batch)
        self._let_current_stream_wait(batch)
        for pool, plan in zip(batch.pools, batch.plans, strict=True):
            pool.slot_map.count_misses(plan)
            pool.catch_up(plan)
        batch.train_stream, batch.train_start_s = self.streams.current(), time.perf_counter()
        self._queue.advance(batch, BatchState.TRAINING)
        return batch.slots

    def refresh(self, batch: Batch) -> None:
        """Read resident rows anew if tables have been overwritten (hazard 6), before Train reads and updates them.

        Raises TableOverwrittenError.
        """
        if any(pool.is_overwritten for pool in batch.pools):
            with self.between_batches():
                for pool in batch.pools:
                    self.refresh_pool(pool)

    def begin_update(self, batch: Batch) -> None:
        """Train of a batch is about to update its rows: they must be current, and what they were may be wanted.

        Hazards 6, 9 and 10. Raises TableOverwrittenError.
        """
        self.refresh(batch)
        for pool, plan in tuple(batch.held):
            pool.will_update(plan)

    def release(self, batch: Batch, *, is_updated: bool = False) -> None:
        """Let go of a batch's slots; from any thread; later calls do nothing.

        Call it when the batch's backward has run, or when the batch will never train. A batch that nobody owns any more
        is released too.
        """
        # A batch of which nothing is held wakes nobody: to wake the worker costs Train time.
        had_anything = not batch.is_released or bool(batch.held)
        self._queue.advance(batch, BatchState.RELEASED)
        # Several threads may release one batch, the collector among them. Each takes what is left.
        updated = []
        while batch.held:
            try:
                pool, plan = batch.held.popleft()
            except IndexError:  # another thread released the last one
                break
            if is_updated:
                pool.note_update()
                updated.append(pool)
            if batch.train_start_s is not None:
                pool.counters.add_train(plan.batch_index, batch.train_start_s)
            # The stream that Train ran on: the thread that releases may be on another, or on none.
            self.streams.note_train(batch.train_stream)
            pool.slot_map.release(plan.batch_index)
        # What the batch was seen to use is not ahead any more.
        for index, ticket in enumerate(batch.tickets):
            if ticket is not None:
                batch.tickets[index] = None
                batch.pools[index].slot_map.unsee(ticket)
        if had_anything:
            self._queue.note_change()
        for pool in updated:
            if pool.host_table.lent.is_any_lent:  # somebody may look at any time
                with self.between_batches():
                    pool.flush()

    @contextmanager
    def between_batches(self) -> Iterator[None]:
        """While entered, no stage of any batch runs (hazards 5 and 6)."""
        with self._lock:
            yield

    @contextmanager
    def holding_back(self) -> Iterator[None]:
        """While entered, stages that only cost the host's time wait, but for those that Train waits for."""
        yield

    def wait_until_idle(self) -> None:
        """Wait until no stage will run before the caller submits, awaits or releases a batch."""

    def pause(self) -> None:
        """Wait until no stage runs; none will before the caller submits or awaits a batch."""

    def wait_for_device(self) -> None:
        """Wait until the device has done all that it was given; a CPU always has."""
        # The oracle has no overlap to lose, and Train may run on another stream than the caller's.
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)

    def _run_waiting(self) -> None:
        with self._lock:
            # 1. Whatever finds its slots runs, in the order in which it came.
            waiting = self._queue.waiting()
            while waiting and waiting[0].may_plan:
                batch = waiting[0].batch()
                if batch is not None and not self._run(batch, is_last_chance=False):
                    break
                waiting.pop(0)
            # 2. What cannot be planned yet guides the choice of victims.
            for entry in waiting:
                self._see(entry.batch())

    def _finish(self, batch: Batch) -> None:
        """Have a batch's stages run, ahead of others if they must."""
        with self._lock:
            self._run(batch, is_last_chance=True)

    def _run(self, batch: Batch, *, is_last_chance: bool) -> bool:
        """Whether the batch is done, well or badly; else it waits for slots."""
        # Train may have run on any stream, and whoever looks next may be on any.
        self.wait_for_device()
        is_done = self._try_stages(batch, is_last_chance)
        self.wait_for_device()
        if is_done:
            self._queue.finish(batch)
        return is_done

    def _see(self, batch: Batch | None) -> None:
        """Tell each pool's slot map what a batch will use; only between the stages of two batches."""
        if batch is not None:
            batch.take_over()
        if batch is None or batch.state is not BatchState.SUBMITTED:
            return
        self._queue.advance(batch, BatchState.SEEN)
        for index, (pool, ids) in enumerate(zip(batch.pools, batch.pool_ids, strict=True)):
            batch.tickets[index] = pool.slot_map.see(ids)
        if batch.is_only_seen:
            batch.forget_ids()
            self._queue.leave(batch)  # it must not stand before those that are to be planned
        if batch.is_released:  # meanwhile
            self.release(batch)

    def _try_stages(self, batch: Batch, is_last_chance: bool) -> bool:
        """Run the stages of every pool that has not run them."""
        batch.take_over()
        try:
            while len(batch.plans) < len(batch.pools) and not batch.is_released:
                pool = batch.pools[len(batch.plans)]
                pool.check_usable()
                self.refresh_pool(pool)  # hits must be as their table is (hazard 6)
                try:
                    run_stages(batch, self.streams)
                except SlotsHeldError as held:
                    # Slots come with the next release, unless Train waits for this batch, or it is larger than all.
                    is_hopeless = held.num_needed > pool.scratchpad.num_slots and not pool.can_grow
                    if not is_last_chance and not is_hopeless:
                        pool.counters.num_slot_waits += not batch.waits_for_slots
                        batch.waits_for_slots = True
                        return False
                    pool.grow(held)
        except Exception as error:  # whatever stops a stage belongs to this batch's Train, on another thread
            batch.error = error
        if batch.is_released:  # meanwhile
            self.release(batch)
        return True

    def refresh_pool(self, pool: Pool) -> None:
        """Hazard 6; only between the stages of two batches."""
        if pool.is_overwritten:
            self.streams.synchronize()  # kernels may be at the tables that are read now
            pool.refresh()
            self._record_refresh()
            # Last: Train of a batch that is ready asks, while the worker may be at it.
            pool.host_table.accept_overwrite()

    def reread_pool(self, pool: Pool) -> None:
        """Have resident rows as others have written them; only between the stages of two batches.

        Raises TableOverwrittenError.
        """
        if pool.may_be_written:
            self.streams.synchronize()
            pool.reread()
            self._record_refresh()

    def _take_in_counts(self, batch: Batch) -> BaseException | None:
        """Take in what Plan has counted; why Train cannot begin, if it cannot.

        Plan has long counted it, unless the host is further ahead than the lookahead.
        """
        if len(batch.plans) < len(batch.pools):
            return ScratchPipeError("the batch was dropped before its rows were fetched")
        for index, (pool, plan) in enumerate(zip(batch.pools, batch.plans, strict=True)):
            counts = plan.wait()
            pool.counters.add_spans(plan.batch_index, plan.stages, counts)
            if counts[Count.IS_REFUSED]:
                ticket = batch.tickets[index]
                if ticket is not None:
                    pool.slot_map.unsee_failed(ticket)
                return _refused_error(batch, pool, plan, counts[Count.BAD_POSITION])
        return None

    def _find_change(self, batch: Batch) -> BaseException | None:
        """An error if ids on the host are not those that were planned: somebody has used their memory again."""
        if batch.ids.ids.device.type != "cpu":  # the device has a copy of the batch
            return None
        for ids, plan in zip(batch.pool_ids, batch.plans, strict=True):
            if not torch.equal(rows_of_ids(*ids), plan.buffers.rows[: plan.num_ids]):
                return ScratchPipeError(
                    "the ids of a batch have changed between Plan and Train: the memory of a batch in flight was "
                    "written. A data loader that reuses its buffers needs lookahead + num_batches_seen_ahead + 3 of "
                    "them; or give each batch memory of its own."
                )
        return None

    # What has to be ordered where stages run on streams of their own; nothing here.

    def _admit(self, batch: Batch) -> None:
        """Put a new batch into the queue."""
        self._queue.put(batch)

    def _ask_ahead(self, batch: Batch) -> None:
        """Have rows on a disk read, if that has not been asked for."""

    def _record_refresh(self) -> None:
        """Rows in the scratchpad have just been read anew."""

    def _let_current_stream_wait(self, batch: Batch) -> None:
        """Order the caller's device work after Insert of a batch, and after rows were last read anew."""


def _refused_error(batch: Batch, pool: Pool, plan: CachePlan, bad_position: int) -> BaseException:
    if bad_position == 0:
        return ScratchPipeError(
            f"{pool.name}: batch {plan.batch_index} found too few of {pool.scratchpad.num_slots:,} slots for up to "
            f"{plan.num_ids:,} ids, although there should have been enough. This is a fault of this package, please "
            "report it; a larger load_factor may avoid it."
        )
    return batch.find_bad_id(bad_position) or ScratchPipeError(
        f"{pool.name}: an id of batch {plan.batch_index} was out of range when it was planned, and is not now. Do not "
        "change the ids of a batch that was given to the pipeline."
    )


class OverlappedStageRunner(StageRunner):
    """Runs the stages on a worker thread while earlier batches train; same stages, same bits.

    Batches run in the order submitted. Where the next one must wait for slots, a batch that Train
    already waits for goes ahead of it. On a CUDA device the worker issues to streams of its own: Plan waits for the
    events of all Trains whose release it has seen (hazards 1 and 3), Train waits for the event of Insert (hazard 4).
    """

    def __init__(self, device: torch.device, streams: StageStreams | None = None) -> None:
        super().__init__(device, streams or StageStreams(device, is_overlapped=True))
        self._thread: threading.Thread | None = None
        self._refreshed: torch.Event | None = None
        self._asking: Executor | None = None
        prepare_for_forks(self, is_worker=True)

    def before_fork(self) -> None:
        """See :class:`ForkAware`."""
        self._lock.acquire()

    def after_fork_in_parent(self) -> None:
        """See :class:`ForkAware`."""
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """See :class:`ForkAware`: the child has a worker of its own, from when it first needs one."""
        self._lock = threading.RLock()
        self._thread = self._asking = None
        self._queue.after_fork_in_child()

    @contextmanager
    def between_batches(self) -> Iterator[None]:
        """While entered, no stage runs, and the caller's device work comes after all stages and before the next."""
        with self._lock:
            self.streams.wait(self.streams.plan, self.streams.record(None))
            self.streams.order_after_trains()  # the caller may be on another stream than Train
            self.streams.synchronize()  # kernels may be writing tables that the caller is about to read
            with self.streams.on(self.streams.plan):
                yield
            if self.streams.plan is not None:
                self.streams.wait(None, self.streams.record(self.streams.plan))

    @contextmanager
    def holding_back(self) -> Iterator[None]:
        """While entered, a worker that enqueues on a device waits; on a CPU it works.

        A batch that Train waits for goes ahead all the same.

        One interpreter runs one thread at a time: a worker that enqueues while Train's forward is issued costs Train
        more time than it takes. While backward is issued, by torch's own thread, the interpreter is free.
        """
        if self.streams.plan is None:
            yield
            return
        self._queue.hold_back()
        try:
            yield
        finally:
            self._queue.go_on()

    def wait_until_idle(self) -> None:
        """Wait until the worker has nothing to do, or waits for slots."""
        self._queue.wait_until_idle()

    def pause(self) -> None:
        """Wait until the worker stands still.

        Released slots do not wake it, a batch that is submitted or awaited does.
        """
        self._queue.pause()

    def _run_waiting(self) -> None:
        """The worker does."""
        self._ensure_started()

    def _finish(self, batch: Batch) -> None:
        self._ensure_started()
        self._queue.wait_for(batch)

    def _run(self, batch: Batch, *, is_last_chance: bool) -> bool:
        with self._lock, self.streams.on(self.streams.plan):
            is_done = self._try_stages(batch, is_last_chance)
            # Rows are filled on one stream, or, where they pass through staging, on that of Plan.
            self.streams.wait(self.streams.fill, self.streams.record(self.streams.plan))
            batch.inserted = self.streams.record(self.streams.fill)
        if is_done:
            self._queue.finish(batch)  # last: whoever sees it finds the event of Insert recorded (hazard 4)
        return is_done

    def _see(self, batch: Batch | None) -> None:
        with self._lock, self.streams.on(self.streams.plan):
            super()._see(batch)

    def _admit(self, batch: Batch) -> None:
        # The ids are the work of the caller's stream; and its allocator must not give them away while Plan reads them.
        self.streams.wait(self.streams.plan, self.streams.record(None))
        for tensor in batch.ids:
            self.streams.record_use(tensor)
        super()._admit(batch)

    def _ask_ahead(self, batch: Batch) -> None:
        """Have rows on a disk read while earlier batches run their stages; on a thread of its own."""
        for index, (pool, ids) in enumerate(zip(batch.pools, batch.pool_ids, strict=True)):
            if pool.host_table.is_on_disk and batch.asked[index] is None:
                if self._asking is None:
                    self._asking = ThreadPoolExecutor(1, "scratchpipe-asking", self.streams.use_device)
                batch.asked[index] = self._asking.submit(
                    _read_absent, pool, ids, self.streams, self.streams.record(None)
                )

    def _record_refresh(self) -> None:
        self._refreshed = self.streams.record(self.streams.plan)

    def _let_current_stream_wait(self, batch: Batch) -> None:
        # Hazards 4 and 6; and buffers of the worker's streams are read by Train's.
        self.streams.wait(None, batch.inserted)
        self.streams.wait(None, self._refreshed)
        for plan in batch.plans:
            self.streams.record_use_by_caller(plan.buffers.rows)
            self.streams.record_use_by_caller(plan.slots)

    def _ensure_started(self) -> None:
        if self._thread is not None:
            return
        # The thread sees the queue, and the runner only while it works, so that a runner that nobody needs and that
        # has no batch left is collected, and its thread ends. Batches that were dropped leave the queue unrun.
        self._thread = threading.Thread(
            target=_work, args=(self._queue, weakref.ref(self), self.streams), name="scratchpipe-stages", daemon=True
        )
        self._thread.start()
        weakref.finalize(self, _stop, self._queue, self._thread)


def _read_absent(pool: Pool, ids: PoolIds, streams: StageStreams, has_ids: torch.Event | None) -> RowsAhead:
    """Read the rows of a batch that sit in no slot now."""
    with streams.on(streams.asking):
        streams.wait(streams.asking, has_ids)
        rows = rows_of_ids(*ids)
        rows = rows[rows >= 0]
        # The worker may be at the map. What is read here is advice, and bad advice loses no row.
        absent = rows[pool.slot_map.maps.row_to_slot.index_select(0, rows) < 0].cpu()
    return pool.host_table.read_ahead(absent)


class _Work(NamedTuple):
    batch: Batch | None  # None: there is nothing to do
    is_plan: bool  # run its stages, or only see it
    is_awaited: bool
    num_changes: int  # of the queue, when this was found


class _Queue:
    """Batches whose stages have not run, the states of all batches, and the reasons for a worker to look again."""

    def __init__(self, lent: LentMemories) -> None:
        self._lent = lent
        self._waiting: list[_Waiting] = []
        self._changed = threading.Condition()
        self._num_changes = 0
        self._num_changes_seen = -1  # by the worker, when it last tried a batch in vain
        self._is_working = False
        self._is_paused = False
        self._is_held_back = False
        self.is_closed = False

    def after_fork_in_child(self) -> None:
        """Forget the parent's worker; nothing runs before a batch is submitted or awaited, as when paused."""
        self._changed = threading.Condition()
        self._is_working = False
        self._is_paused = True
        self._is_held_back = False
        self._num_changes_seen = -1

    def put(self, batch: Batch) -> None:
        with self._changed:
            self._waiting = [entry for entry in self._waiting if entry.batch() is not None]
            self._waiting.append(_Waiting(batch))
            self._is_paused = False
            self.note_change()

    @property
    def num_waiting(self) -> int:
        """Batches whose stages have not run; those that nobody owns any more may count."""
        return len(self._waiting)

    def waiting(self) -> list[_Waiting]:
        """Batches whose stages have not run, in the order in which they came."""
        with self._changed:
            self._waiting = [
                entry for entry in self._waiting if (batch := entry.batch()) is not None and batch.is_pending
            ]
            return list(self._waiting)

    def has(self, batch: Batch) -> bool:
        return any(entry.batch() is batch for entry in self._waiting)

    def allow(self, batch: Batch) -> bool:
        """Whether this is news."""
        with self._changed:
            for entry in self._waiting:
                if entry.batch() is batch and not entry.may_plan:
                    entry.may_plan = True
                    self._is_paused = False
                    self.note_change()
                    return True
            return False

    def wait_for(self, batch: Batch) -> None:
        """Have the worker finish a batch first."""
        with self._changed:
            for entry in self._waiting:
                if entry.batch() is batch:
                    entry.is_awaited = True
            self._is_paused = False
            # Also while held back: Train itself waits.
            self._num_changes += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: not batch.is_pending)

    def advance(self, batch: Batch, state: BatchState) -> None:
        """Change a batch's state; a batch that was released stays so."""
        with self._changed:
            if not batch.is_released:
                batch.state = state

    def finish(self, batch: Batch) -> None:
        """The stages of a batch have run, well or badly."""
        with self._changed:
            self.advance(batch, BatchState.READY if batch.error is None else BatchState.FAILED)
            self.leave(batch)
            self._changed.notify_all()

    def leave(self, batch: Batch) -> None:
        """Nothing more is to be done for a batch."""
        with self._changed:
            self._waiting = [entry for entry in self._waiting if entry.batch() is not batch]

    def note_change(self) -> None:
        with self._changed:
            self._num_changes += 1
            if not self._is_held_back:  # to wake the worker in vain costs Train time too
                self._changed.notify_all()

    def hold_back(self) -> None:
        """Begin nothing but what is awaited."""
        with self._changed:
            self._is_held_back = True

    def go_on(self) -> None:
        """Begin what was held back."""
        with self._changed:
            self._is_held_back = False
            self._changed.notify_all()

    def close(self) -> None:
        self.is_closed = True
        self.go_on()

    def next(self, num_changes_seen: int) -> _Work:
        """What to work on next; nothing when closed.

        Blocks while there is nothing: none is queued, the queue is paused, or what was tried in vain when
        `num_changes_seen` was current need not be tried again.
        """
        with self._changed:
            self._num_changes_seen = num_changes_seen
            # Whoever waits for an idle worker may go on.
            self._is_working = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.is_closed or self._find_work() is not None)
            work = None if self.is_closed else self._find_work()
            self._is_working = work is not None
            return work or _Work(None, False, False, self._num_changes)

    def wait_until_idle(self) -> None:
        with self._changed:
            self.go_on()  # whoever waits for the worker does not want it to be held back
            self._changed.wait_for(lambda: self.is_closed or not (self._is_working or self._find_work() is not None))

    def pause(self) -> None:
        with self._changed:
            self._is_paused = True
            self.wait_until_idle()

    def _find_work(self) -> _Work | None:
        """The worker's priorities.

        1. A batch that Train waits for is planned, whether the queue is paused or not.
        2. While the queue is paused or held back, or somebody has memory of a table, nothing is done.
        3. A batch that may only be seen, or that stands behind one that waits for slots, is seen, for it guides the
           choice of victims.
        4. The oldest batch is planned. If that was in vain, it is tried again when something has changed.
        """
        has_changed = self._num_changes != self._num_changes_seen
        # References are weak: a batch that nobody owns any more has left.
        waiting = [(entry, batch) for entry in self._waiting if (batch := entry.batch()) is not None]
        awaited = next((batch for entry, batch in waiting if entry.is_awaited), None)
        if awaited is not None:
            return _Work(awaited, True, True, self._num_changes) if has_changed else None
        if self._is_paused or self._is_held_back or not waiting or self._lent.is_any_lent:
            return None
        can_plan = waiting[0][0].may_plan and has_changed
        for position, (entry, batch) in enumerate(waiting):
            is_wanted = not entry.may_plan or (position > 0 and not can_plan)
            if is_wanted and batch.state is BatchState.SUBMITTED:
                return _Work(batch, False, False, self._num_changes)
        return _Work(waiting[0][1], True, False, self._num_changes) if can_plan else None


def _work(queue: _Queue, runner_ref: "weakref.ref[OverlappedStageRunner]", streams: StageStreams) -> None:
    streams.use_device()
    num_changes_seen = -1
    while not queue.is_closed:
        batch, is_plan, is_awaited, num_changes = queue.next(num_changes_seen)
        runner = runner_ref()
        if runner is None:
            return
        if batch is None:  # it was dropped just now
            num_changes_seen = num_changes
        elif is_plan:
            num_changes_seen = -1 if _plan(queue, runner, batch, is_awaited) else num_changes
        else:
            runner._see(batch)
        del batch, runner


def _plan(queue: _Queue, runner: OverlappedStageRunner, batch: Batch, is_awaited: bool) -> bool:
    """Whether the batch is done, well or badly."""
    try:
        return runner._run(batch, is_last_chance=is_awaited)
    except BaseException as error:  # the thread must outlive it, or Train would wait for ever
        batch.error = error
        queue.finish(batch)
        return True


def _stop(queue: _Queue, thread: threading.Thread) -> None:
    queue.close()
    if thread is not threading.current_thread():
        thread.join(timeout=10)
