# SPDX-License-Identifier: BSD-3-Clause
"""Runs the stages of batch after batch, in an order in which no row is lost.

Shapes: ``I`` ids.

One batch runs its four stages as a unit, and batches run one at a time. :class:`StageRunner` runs them on the caller's
thread: it is the oracle. :class:`OverlappedStageRunner` runs the same code on a worker
thread (and, for a CUDA device, on a stream of its own) while earlier batches train.

Where the device moves rows itself, writebacks and fills have a stream each, and a batch's writeback runs beside the fill of the batch
before it; see :mod:`torchrec_scratchpipe.device_batch`.

Hazards and guards; the numbers are those of docs/design.md:

1.  Collect(N) must not read a victim that Train(M), M < N, has not updated yet: M holds its slots.
2.  Collect(N+1) must not read a row from the table before Insert(N) has written it back: batches run their stages
    one after another, never interleaved.
3.  Insert(N) must not overwrite a slot that Train(M), M < N, still reads: M holds its slots.
4.  Train(N) must not start before Insert(N) has ended: :meth:`PlannedBatch.wait`.
5.  A table must not be read while rows are newer in the scratchpad: :meth:`Pool.flush`, between two batches' stages.
6.  Rows that a planned batch relies on must not stay old when their table is overwritten: no stage runs meanwhile
    (:meth:`StageRunner.suspend`), then :meth:`Pool.refresh`.
"""

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from torchrec_scratchpipe.fork import prepare_for_forks
from torchrec_scratchpipe.lent_memory import LentMemories
from torchrec_scratchpipe.planned_batch import PlannedBatch
from torchrec_scratchpipe.streams import StageStreams

__all__ = ["OverlappedStageRunner", "StageRunner"]


class StageRunner:
    """Runs the stages of one batch after another on the caller's thread: the sequential twin and oracle.

    Args:
        device: Where the scratchpads are.
        streams: For tests; by default, the caller's stream alone.
    """

    def __init__(self, device: torch.device, streams: StageStreams | None = None) -> None:
        self.device = device
        self.streams = streams or StageStreams(device, is_overlapped=False)
        self.lent = LentMemories()
        self.is_only_read = False  # whoever takes tables now only reads them, at once
        self._submitted: list[weakref.ref[PlannedBatch]] = []  # a batch that nobody will look up leaves
        self._lock = threading.RLock()

    def submit(self, batch: PlannedBatch) -> None:
        """Take a batch; its stages run now, or, while batches in flight hold too many slots, later.

        Args:
            batch: A new batch.
        """
        with self._lock:
            self._submitted.append(weakref.ref(batch))
            self._run_submitted()

    def allow(self, batch: PlannedBatch) -> None:
        """Let a batch be planned that was submitted to be seen only; nothing if it may be already.

        Args:
            batch: A batch that was submitted.
        """
        with self._lock:
            batch.may_plan = True
            self._run_submitted()

    def finish(self, batch: PlannedBatch) -> None:
        """Make sure that a submitted batch is done, ahead of others if it must be.

        Args:
            batch: A batch that was submitted.
        """
        with self._lock:
            self._submitted = [ref for ref in self._submitted if ref() is not batch]
            self._run(batch, is_last_chance=True)

    def current_stream(self) -> torch.Stream | None:
        """The caller's stream on the device; None on a CPU."""
        return self.streams.current()

    def record_train(self, stream: torch.Stream | None) -> None:
        """Train of a batch has been issued, its slots are about to be released; called from any thread.

        Args:
            stream: Where Train runs; None on a CPU, or if it never started.
        """

    def slots_released(self) -> None:
        """A batch has let go of slots; called from any thread."""

    def order_after_trains(self) -> None:
        """Order the stages' device work after every Train whose release Plan has seen; a CPU has nothing to order."""

    @contextmanager
    def between_batches(self) -> Iterator[None]:
        """While entered, no stage of any batch runs (hazards 5 and 6)."""
        with self._lock:
            yield

    def settle(self) -> None:
        """Wait until no stage will run before the caller submits, finishes or releases a batch."""

    def suspend(self) -> None:
        """Wait until no stage runs; none will before the caller submits or finishes a batch."""

    def record_refresh(self) -> None:
        """Rows in the scratchpad have just been read anew; a CPU has nothing to order."""

    def let_current_stream_wait(self, batch: PlannedBatch) -> None:
        """Order the caller's device work after Insert of a batch; a CPU has nothing to order.

        Args:
            batch: A batch that is done.
        """

    def _run_submitted(self) -> None:
        batches = [batch for ref in self._submitted if (batch := ref()) is not None and not batch.hold.is_released]
        while batches and batches[0].may_plan and self._run(batches[0], is_last_chance=False):
            batches.pop(0)
        self._submitted = [weakref.ref(batch) for batch in batches]
        for batch in batches:  # what cannot be planned yet guides the choice of victims
            if not batch.is_seen:
                batch.see()

    def _run(self, batch: PlannedBatch, is_last_chance: bool) -> bool:
        self.wait_for_device()
        is_done = batch.try_stages(is_last_chance)
        self.wait_for_device()
        if is_done:
            batch.done.set()
        return is_done

    def wait_for_device(self) -> None:
        """Wait until the device has done all that it was given; a CPU always has."""
        # The oracle has no overlap to lose, and Train may run on another stream than the caller's.
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)


class OverlappedStageRunner(StageRunner):
    """Runs the stages on a worker thread while earlier batches train; same stages, same bits.

    Batches run in the order submitted. Where the next one must wait for slots, a batch that Train
    already waits for goes ahead of it. On a CUDA device the worker issues to streams of its own: Plan waits for the
    events of all Trains whose release it has seen (hazards 1 and 3), Train waits for the event of Insert (hazard 4).

    Args:
        device: Where the scratchpads are.
        streams: For tests; by default, three of the device's.
    """

    def __init__(self, device: torch.device, streams: StageStreams | None = None) -> None:
        super().__init__(device, streams or StageStreams(device, is_overlapped=True))
        self._queue = _WorkQueue(self.lent)
        self._thread: threading.Thread | None = None
        self._train_events: deque[torch.Event] = deque()
        self._refreshed: torch.Event | None = None
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
        self._thread = None
        self._queue.after_fork_in_child()

    def submit(self, batch: PlannedBatch) -> None:
        """Take a batch; its stages run on the worker thread.

        Args:
            batch: A new batch.
        """
        self.streams.wait(self.streams.plan, self.streams.record(None))
        batch.record_stages_streams(self.streams)
        self._ensure_started()
        self._queue.put(batch)

    def allow(self, batch: PlannedBatch) -> None:
        """Let a batch be planned that was submitted to be seen only; nothing if it may be already.

        Args:
            batch: A batch that was submitted.
        """
        if not batch.may_plan:
            self._ensure_started()
            self._queue.allow(batch)

    def finish(self, batch: PlannedBatch) -> None:
        """Wait for the worker to finish a batch, ahead of others if it must be.

        Args:
            batch: A batch that was submitted.
        """
        self._ensure_started()
        self._queue.mark_awaited(batch)
        batch.done.wait()

    def settle(self) -> None:
        """Wait until the worker has nothing to do, or waits for slots."""
        self._queue.wait_until_idle()

    def suspend(self) -> None:
        """Wait until the worker stands still; released slots do not wake it, a batch that is submitted or awaited does."""
        self._queue.suspend()

    def record_train(self, stream: torch.Stream | None) -> None:
        """Record the event that a later Collect has to wait for.

        Args:
            stream: Where Train runs; None if it never started.

        Hazards 1 and 3: Collect(N) reads, and Insert(N) overwrites, a slot that Train(M), M < N, used on the stream of
        the model. The event is recorded before the slot is released, so that whoever sees the release finds the event.
        """
        event = None if stream is None else self.streams.record(stream)
        if event is not None:
            self._train_events.append(event)

    def slots_released(self) -> None:
        """Wake the worker, which may be waiting for slots."""
        self._queue.slots_released()

    def order_after_trains(self) -> None:
        """Let Plan, and with it all later stages, wait for the events of :meth:`record_train`."""
        while self._train_events:
            self.streams.wait(self.streams.plan, self._train_events.popleft())

    def record_refresh(self) -> None:
        """Record the event that a batch which was ready before has to wait for (hazard 6)."""
        self._refreshed = self.streams.record(self.streams.plan)

    def let_current_stream_wait(self, batch: PlannedBatch) -> None:
        """Order the caller's device work after Insert of a batch (hazard 4), and after rows were last read anew.

        Args:
            batch: A batch that is done.
        """
        self.streams.wait(None, batch.inserted)
        self.streams.wait(None, self._refreshed)
        batch.record_train_stream(self.streams)

    @contextmanager
    def between_batches(self) -> Iterator[None]:
        """While entered, no stage runs, and the caller's device work comes after all stages and before the next."""
        with self._lock:
            self.streams.wait(self.streams.plan, self.streams.record(None))
            self.streams.synchronize()  # kernels may be writing tables that the caller is about to read
            with self.streams.on(self.streams.plan):
                yield
            if self.streams.plan is not None:
                self.streams.wait(None, self.streams.record(self.streams.plan))

    def _see(self, batch: PlannedBatch) -> None:
        with self._lock, self.streams.on(self.streams.plan):
            batch.see()

    def _run(self, batch: PlannedBatch, is_last_chance: bool) -> bool:
        with self._lock, self.streams.on(self.streams.plan):
            is_done = batch.try_stages(is_last_chance)
            # Rows are filled on one stream, or, where they pass through staging, on that of Plan.
            self.streams.wait(self.streams.fill, self.streams.record(self.streams.plan))
            batch.inserted = self.streams.record(self.streams.fill)
        if is_done:
            batch.done.set()  # last: whoever sees it finds the event of Insert recorded (hazard 4)
        return is_done

    def _ensure_started(self) -> None:
        if self._thread is not None:
            return
        # The thread sees the queue, and the runner only while it works, so that a runner that nobody needs and that
        # has no batch left is collected, and its thread ends. Batches that were dropped leave the queue unrun.
        self._thread = threading.Thread(
            target=_work, args=(self._queue, weakref.ref(self)), name="scratchpipe-stages", daemon=True
        )
        self._thread.start()
        weakref.finalize(self, _stop, self._queue, self._thread)


class _Work(NamedTuple):
    batch: PlannedBatch | None  # None: there is nothing to do
    is_plan: bool  # run its stages, or only see it
    num_changes: int  # of the queue, when this was found


class _WorkQueue:
    """Batches that wait for the worker, and the reasons to look at them again.

    It does not own them: a batch that nobody is going to look up any more leaves it.

    Args:
        lent: While memory of a table is lent, no stage runs but while Train waits for it: whoever has the memory may write it.
    """

    def __init__(self, lent: LentMemories) -> None:
        self._lent = lent
        self._batches: list[weakref.ref[PlannedBatch]] = []
        self._changed = threading.Condition()
        self._num_changes = 0
        self._num_changes_seen = -1  # by the worker, when it last tried a batch in vain
        self._is_working = False
        self._is_suspended = False
        self.is_closed = False

    def after_fork_in_child(self) -> None:
        """Forget the parent's worker; nothing runs before a batch is submitted or awaited, as when suspended."""
        self._changed = threading.Condition()
        self._is_working = False
        self._is_suspended = True
        self._num_changes_seen = -1
        for batch in (batch for ref in self._batches if (batch := ref()) is not None):
            batch.after_fork_in_child()

    def put(self, batch: PlannedBatch) -> None:
        with self._changed:
            self._batches = [ref for ref in self._batches if ref() is not None]
            self._batches.append(weakref.ref(batch))
            self._is_suspended = False
            self._note_change()

    def allow(self, batch: PlannedBatch) -> None:
        with self._changed:
            batch.may_plan = True
            self._is_suspended = False
            self._note_change()

    def mark_awaited(self, batch: PlannedBatch) -> None:
        with self._changed:
            batch.is_awaited = True
            self._is_suspended = False
            self._note_change()

    def slots_released(self) -> None:
        with self._changed:
            self._note_change()

    def close(self) -> None:
        with self._changed:
            self.is_closed = True
            self._note_change()

    def next(self, num_changes_seen: int) -> _Work:
        """What to work on next; nothing when closed.

        Blocks while there is nothing: none is queued, the queue is suspended, or what was tried in vain when
        `num_changes_seen` was current need not be tried again.
        """
        with self._changed:
            self._num_changes_seen = num_changes_seen
            self._is_working = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.is_closed or self._find_work() is not None)
            work = None if self.is_closed else self._find_work()
            self._is_working = work is not None
            return work or _Work(None, False, self._num_changes)

    def wait_until_idle(self) -> None:
        with self._changed:
            self._wait_until_idle()

    def suspend(self) -> None:
        with self._changed:
            self._is_suspended = True
            self._wait_until_idle()

    def remove(self, batch: PlannedBatch) -> None:
        with self._changed:
            self._batches = [ref for ref in self._batches if ref() is not batch]

    def _wait_until_idle(self) -> None:
        self._changed.wait_for(lambda: self.is_closed or not (self._is_working or self._find_work() is not None))

    def _find_work(self) -> _Work | None:
        """A batch that Train waits for is planned at once, suspended or not.

        Else what may only be seen is seen, for it guides the choice of victims, and the oldest batch is planned; while it
        waits for slots, those behind it are seen.
        """
        has_changed = self._num_changes != self._num_changes_seen
        batches = [batch for ref in self._batches if (batch := ref()) is not None]
        awaited = next((batch for batch in batches if batch.is_awaited), None)
        if awaited is not None:
            return _Work(awaited, True, self._num_changes) if has_changed else None
        if self._is_suspended or not batches or self._lent.is_any_lent:
            return None
        oldest = batches[0]
        can_plan = oldest.may_plan and has_changed
        for batch in batches:
            is_wanted = not batch.may_plan or (batch is not oldest and not can_plan)
            if is_wanted and not batch.is_seen:
                return _Work(batch, False, self._num_changes)
        return _Work(oldest, True, self._num_changes) if can_plan else None

    def _note_change(self) -> None:
        self._num_changes += 1
        self._changed.notify_all()


def _work(queue: _WorkQueue, runner_ref: "weakref.ref[OverlappedStageRunner]") -> None:
    num_changes_seen = -1
    while not queue.is_closed:
        batch, is_plan, num_changes = queue.next(num_changes_seen)
        runner = runner_ref()
        if runner is None:
            return
        if batch is None:  # it was dropped just now
            num_changes_seen = num_changes
        elif is_plan:
            num_changes_seen = -1 if _plan(queue, runner, batch) else num_changes
        else:
            runner._see(batch)
        del batch, runner


def _plan(queue: _WorkQueue, runner: OverlappedStageRunner, batch: PlannedBatch) -> bool:
    """Whether the batch is done, well or badly."""
    try:
        is_done = runner._run(batch, is_last_chance=batch.is_awaited)
    except BaseException as error:  # the thread must outlive it, or Train would wait for ever
        batch.fail(error)
        batch.done.set()
        is_done = True
    if is_done:
        queue.remove(batch)
    return is_done


def _stop(queue: _WorkQueue, thread: threading.Thread) -> None:
    queue.close()
    if thread is not threading.current_thread():
        thread.join(timeout=10)
