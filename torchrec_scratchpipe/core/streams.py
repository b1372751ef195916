# SPDX-License-Identifier: BSD-3-Clause
"""The streams on which stages run beside Train; a CPU has none.

Three, so that rows travel in both directions at once and integers do not wait for rows: Plan; writeback, from the
scratchpad to the tables; fill, from the tables to the scratchpad.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["StageStreams"]


class StageStreams:
    """Streams of one device, and the few things that are done with them.

    None stands for the stream of the caller, and for an event that has happened. A CPU has no others.
    """

    plan: torch.Stream | None = None
    writeback: torch.Stream | None = None
    fill: torch.Stream | None = None
    asking: torch.Stream | None = None  # looks up ids for whoever reads rows from a disk; no other stream waits for it

    def __init__(self, device: torch.device, *, is_overlapped: bool) -> None:
        self._module = torch.get_device_module(device) if device.type == "cuda" else None
        if self._module is not None and device.index is None:
            device = torch.device(device.type, self._module.current_device())
        self.device = device
        # Of batches whose slots were released, and which Plan has not been ordered after.
        self._trains: deque[torch.Event] = deque()
        if self._module is not None and is_overlapped:
            # Before Train's: its kernels fill the device, and these are small.
            self.plan, self.writeback, self.fill = (self._module.Stream(device, priority=-1) for _ in range(3))
            self.asking = self._module.Stream(device)

    @property
    def own(self) -> list[torch.Stream]:
        """Plan, writeback and fill; empty if everything runs on the caller's stream."""
        return [stream for stream in (self.plan, self.writeback, self.fill) if stream is not None]

    def current(self) -> torch.Stream | None:
        """The caller's stream; None on a CPU."""
        return None if self._module is None else self._module.current_stream(self.device)

    def use_device(self) -> None:
        """Make the device the calling thread's own; a new thread's is the first, whose memory it would take."""
        if self._module is not None:
            self._module.set_device(self.device)

    @contextmanager
    def on(self, stream: torch.Stream | None) -> Iterator[None]:
        """Enqueue on this stream."""
        if stream is None or self._module is None:
            yield
        else:
            with self._module.stream(stream):
                yield

    def record(self, stream: torch.Stream | None) -> torch.Event | None:
        """An event that comes after all that has been enqueued on a stream."""
        if self._module is None:
            return None
        event: torch.Event = self._module.Event()
        event.record(stream or self.current())
        return event

    def wait(self, stream: torch.Stream | None, event: torch.Event | None) -> None:
        """Let what is enqueued on a stream from now on come after an event."""
        stream = stream or self.current()
        if event is not None and stream is not None:
            stream.wait_event(event)

    # Hazards 1 and 3: Collect(N) reads, and Insert(N) overwrites, a slot that Train(M), M < N, used on the model's
    # stream.

    def note_train(self, stream: torch.Stream | None) -> None:
        """Train of a batch has been enqueued, and its slots are about to be released.

        Whoever sees the release finds the event.
        """
        event = None if stream is None or self.plan is None else self.record(stream)
        if event is not None:
            self._trains.append(event)

    def order_after_trains(self) -> None:
        """Let Plan come after every Train whose release it has seen."""
        while self._trains:
            self.wait(self.plan, self._trains.popleft())

    def record_use(self, tensor: Tensor) -> None:
        """Tell the allocator that a tensor is used on all these streams."""
        if tensor.device.type != "cpu":
            for stream in self.own:
                tensor.record_stream(stream)

    def record_use_by_caller(self, tensor: Tensor) -> None:
        """Tell the allocator that a tensor is used on the caller's stream."""
        stream = self.current()
        if tensor.device.type != "cpu" and stream is not None:
            tensor.record_stream(stream)

    def synchronize(self) -> None:
        """Wait until these streams have done all that was enqueued."""
        for stream in self.own:
            stream.synchronize()
