# SPDX-License-Identifier: BSD-3-Clause
"""Streams and events of a device that is not there, whose work runs in any order that events allow.

What is enqueued on a stream runs later, when a die says so: so a missing event shows as wrong numbers, which on a real
device it may do once in a thousand runs. A stream can be made slow, to provoke one particular order.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from core_helpers import CPU, WrappedOps
from torch import Tensor

from torchrec_scratchpipe.core.batch import Batch
from torchrec_scratchpipe.core.runner import OverlappedStageRunner, StageRunner
from torchrec_scratchpipe.core.slot_ops import SlotOps
from torchrec_scratchpipe.core.streams import StageStreams


class Event:
    def __init__(self, device: "Device", recorded_on: "Stream") -> None:
        self._device = device
        self.recorded_on = recorded_on
        self.is_done = False

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        self._device.run_until(lambda: self.is_done)


class Stream:
    def __init__(self, device: "Device", name: str) -> None:
        self.name = name
        self.device = device
        self.work: deque[Event | tuple[Event] | Callable[[], None]] = deque()  # in a tuple: an event to wait for

    @property
    def can_run(self) -> bool:
        head = self.work[0] if self.work else None
        return head is not None and not (isinstance(head, tuple) and not head[0].is_done)

    def run_one(self) -> None:
        head = self.work.popleft()
        if isinstance(head, Event):
            head.is_done = True
        elif not isinstance(head, tuple):
            head()


class Device:
    """All streams, and what runs next.

    Args:
        seed: Of the die.
        slow: Streams that run only when no other can.
    """

    def __init__(self, seed: int, slow: Sequence[str] = ()) -> None:
        self.streams = [Stream(self, name) for name in ("train", "plan", "writeback", "fill", "load")]
        self.train, self.load = self.streams[0], self.streams[-1]
        self.current = self.train
        self._random = random.Random(seed)
        self._slow = slow

    def run_some(self) -> None:
        for _ in range(self._random.randrange(12)):
            if not self._run_one():
                break

    def run_until(self, is_reached: Callable[[], bool]) -> None:
        while not is_reached():
            assert self._run_one(), "every stream waits for another"

    def drain(self) -> None:
        self.run_until(lambda: not any(stream.work for stream in self.streams))

    def _run_one(self) -> bool:
        ready = [stream for stream in self.streams if stream.can_run]
        if not ready:
            return False
        self._random.choice([stream for stream in ready if stream.name not in self._slow] or ready).run_one()
        return True


class SimulatedStreams(StageStreams):
    """Three of a device's streams.

    Args:
        device: Theirs.
        missing_edges: ``(recorded on, waiting)``: events that are not waited for.
    """

    def __init__(self, device: Device, missing_edges: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(CPU, is_overlapped=False)
        self._device = device
        self._missing_edges = missing_edges
        self.plan, self.writeback, self.fill = device.streams[1:4]  # type: ignore[assignment]

    def current(self) -> Any:
        return self._device.current

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self._device.current = self._device.current, stream or self._device.current
        try:
            yield
        finally:
            self._device.current = before

    def record(self, stream: Any) -> Any:
        stream = stream or self._device.current
        event = Event(self._device, stream)
        stream.work.append(event)
        return event

    def wait(self, stream: Any, event: Any) -> None:
        stream = stream or self._device.current
        if event is not None and (event.recorded_on.name, stream.name) not in self._missing_edges:
            stream.work.append((event,))

    def record_use(self, tensor: Tensor) -> None:
        pass

    def synchronize(self) -> None:
        self._device.run_until(lambda: not any(stream.work for stream in self._device.streams[1:4]))


class DeferredOps(WrappedOps):
    """Operations that run when their stream gets to them."""

    def __init__(self, ops: SlotOps, device: Device) -> None:
        super().__init__(ops)
        self._device = device

    def _run(self, name: str, args: tuple[Any, ...]) -> None:
        operation = getattr(self._ops, name)
        self._device.current.work.append(lambda: operation(*args))


class InlineRunner(OverlappedStageRunner):
    """Enqueues as the worker does, on the caller's thread: what happens depends on nothing but the die."""

    def _run_waiting(self) -> None:
        StageRunner._run_waiting(self)

    def _finish(self, batch: Batch) -> None:
        StageRunner._finish(self, batch)
