# SPDX-License-Identifier: BSD-3-Clause
"""Watches a job while it trains: figures of every window of steps, and advice, to wherever they are wanted."""

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from torchrec_scratchpipe.errors import ConfigError, MeasurementError
from torchrec_scratchpipe.monitoring.advice import Advice, advice_of
from torchrec_scratchpipe.monitoring.looks import PoolWatch
from torchrec_scratchpipe.monitoring.run_page import save_run_page
from torchrec_scratchpipe.monitoring.window import Counts, PoolWindow, Speeds, StepWindow, as_json, pool_window, scalars
from torchrec_scratchpipe.sharding.batch_features import find_tensors
from torchrec_scratchpipe.sharding.model import scratchpad_collections
from torchrec_scratchpipe.sharding.pipeline import ScratchPipeTrainPipeline

__all__ = ["ScalarWriter", "ScratchPipeMonitor"]

logger: logging.Logger = logging.getLogger(__name__)

NUM_LOOKS = 10  # per window and pool
MAX_WINDOWS = 10_000  # kept for a report
COPY_BYTES = 32 << 20  # to measure the bus with


class ScalarWriter(Protocol):
    """What is asked of TensorBoard's `SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Take in one number."""


class ScratchPipeMonitor:
    """Counts what a job does, in windows of so many steps, and says what to set otherwise.

    It watches from when it is made to :meth:`close`, on the threads that are there, and changes no bit of training. A
    window ends after each `every`-th step. Its figures are those of this rank.

    Args:
        model: Sharded by DistributedModelParallel.
        pipeline: Tells of each step by itself. Without one (None), or with one of TorchRec's, call :meth:`step` after
            each step.
        every: Steps of a window.
        tensorboard: Gets every figure of every window; `torch.utils.tensorboard.SummaryWriter` is one. The caller
            closes it.
        json_lines: A file that gets one line of JSON per window; appended to, so that a resumed job goes on.
        log: Whether each window's main figures, and advice that is new, go to Python's `logging`, at level INFO.
        disk_reads_per_s: What `torchrec-scratchpipe disk` has measured, for the share of time of a disk.

    Raises:
        ConfigError: `every` is below 1, the model has no scratchpad, or another monitor watches it.
    """

    def __init__(
        self,
        model: nn.Module,
        pipeline: Any = None,
        every: int = 100,
        tensorboard: ScalarWriter | None = None,
        json_lines: str | os.PathLike[str] | None = None,
        log: bool = True,
        *,
        disk_reads_per_s: float | None = None,
    ) -> None:
        if type(every) is not int or every < 1:
            raise ConfigError(f"every is {every!r}, it must be a number of steps, at least 1.")
        collections = scratchpad_collections(model)
        if not collections:
            raise ConfigError(
                "the model has no scratchpad to watch. Give the monitor the sharded model, and plan a table as "
                "fused_uvm_caching with one of ScratchPipe's sharders."
            )
        self._device = collections[0]._runner.device
        pools = [pool for collection in collections for pool in collection.pools]
        if any(pool.slot_map.observer is not None for pool in pools):
            raise ConfigError("another monitor watches this model. Call its close() first.")
        self._every, self._tensorboard, self._log = every, tensorboard, log
        self._json_lines = None if json_lines is None else Path(json_lines).open("a", encoding="utf-8")  # noqa: SIM115
        self._lookahead = pipeline.lookahead if isinstance(pipeline, ScratchPipeTrainPipeline) else 1
        self._speeds = Speeds(_copy_bytes_per_s(self._device), disk_reads_per_s)
        self._watches: list[PoolWatch] = []
        self._counts: list[Counts] = []
        for collection in collections:
            with collection._runner.between_batches():
                for pool in collection.pools:
                    self._counts.append(Counts(pool))
                    self._watches.append(PoolWatch(pool, max(1, every // NUM_LOOKS)))
                    self._watches[-1].start()
        self.windows: deque[StepWindow] = deque(maxlen=MAX_WINDOWS)  # the newest last
        self.advice: list[Advice] = []  # of the latest window
        self._told: set[tuple[str, str]] = set()
        self._rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self._num_steps, self._num_samples, self._step_ms = 0, 0, list[float]()
        self._has_samples = True
        self._window_start_s = self._last_s = time.perf_counter()
        self._hook = None
        if isinstance(pipeline, ScratchPipeTrainPipeline):
            self._hook = pipeline.register_progress_hook(self.step)

    def step(self, batch: Any = None) -> None:
        """Take in that a step has ended; our pipeline does so itself.

        Args:
            batch: The step's, for samples per second.
        """
        now_s = time.perf_counter()
        self._step_ms.append(1e3 * (now_s - self._last_s))
        self._last_s = now_s
        self._num_steps += 1
        self._num_samples += self._samples_of(batch)
        if self._num_steps % self._every == 0:
            self._end_window()

    def advise(self, window: StepWindow) -> list[Advice]:
        """What to set otherwise, by the figures of a window.

        Args:
            window: One of :attr:`windows`.

        Returns:
            Advice pool by pool; none where all is well.
        """
        return advice_of(window, self._speeds, self._lookahead)

    def save_report(self, path: str | os.PathLike[str]) -> None:
        """Write one HTML file that needs nothing else: steps, misses, memory, stages, misses by slots, advice.

        Args:
            path: Of the file.

        Raises:
            ConfigError: No window has ended, or matplotlib is not installed.
        """
        spans = [list(watch.pool.counters.spans) for watch in self._watches]
        save_run_page(self.windows, self.advice, spans, path)

    def close(self) -> None:
        """Watch no more; what was counted stays. Closes the file of `json_lines`."""
        for watch in self._watches:
            watch.stop()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._json_lines is not None:
            self._json_lines.close()
            self._json_lines = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _end_window(self) -> None:
        pools = self._pool_windows(self._last_s)
        seconds = self._last_s - self._window_start_s
        if pools:
            p50, p99 = np.percentile(self._step_ms, [50, 99]).tolist()
            is_cuda = self._device.type == "cuda"
            window = StepWindow(
                rank=self._rank,
                last_step=self._num_steps,
                num_steps=len(self._step_ms),
                seconds=seconds,
                samples_per_s=self._num_samples / seconds if self._has_samples else None,
                step_p50_ms=p50,
                step_p99_ms=p99,
                stall_share=sum(pool.stall_ms for pool in pools) / 1e3 / seconds,
                host_memory_bytes=_resident_bytes(),
                device_memory_bytes=torch.cuda.memory_allocated(self._device) if is_cuda else None,
                pools=tuple(pools),
            )
            self.windows.append(window)
            self.advice = self.advise(window)
            self._tell(window)
        self._step_ms, self._num_samples = [], 0
        # What telling took belongs to the next window, so that the sum of all windows is the time that has passed.
        self._window_start_s = self._last_s

    def _pool_windows(self, end_s: float) -> list[PoolWindow]:
        found = []
        for watch, counts in zip(self._watches, self._counts, strict=True):
            looks = watch.take()
            if looks is not None:
                window = pool_window(watch.pool, counts, looks, self._speeds, self._window_start_s, end_s)
                found += [] if window is None else [window]
        return found

    def _tell(self, window: StepWindow) -> None:
        if self._tensorboard is not None:
            for tag, value in scalars(window).items():
                self._tensorboard.add_scalar(tag, value, window.last_step)
        if self._json_lines is not None:
            self._write_line(as_json(window) | {"advice": [as_json(advice) for advice in self.advice]})
        if self._log:
            logger.info("%s", _line(window))
            for advice in self.advice:
                if (advice.pool, advice.kind) not in self._told:
                    self._told.add((advice.pool, advice.kind))
                    logger.info("advice: %s: %s", advice.pool, advice.text)

    def _write_line(self, content: dict[str, Any]) -> None:
        assert self._json_lines is not None
        try:
            self._json_lines.write(json.dumps(content) + "\n")
            self._json_lines.flush()
        except OSError as error:  # a full disk stops no job
            logger.warning("%s: no more figures are written (%s)", self._json_lines.name, error)
            self._json_lines = None

    def _samples_of(self, batch: Any) -> int:
        if not self._has_samples or batch is None:
            self._has_samples = False
            return 0
        try:
            return next(iter(find_tensors(batch).values())).stride()
        except MeasurementError:  # whatever it is, it has no KeyedJaggedTensor
            self._has_samples = False
            return 0


def _line(window: StepWindow) -> str:
    parts = [f"step {window.last_step}: P50 {window.step_p50_ms:.1f} ms, P99 {window.step_p99_ms:.1f} ms"]
    if window.samples_per_s is not None:
        parts.append(f"{window.samples_per_s:,.0f} samples/s")
    parts.append(f"stalled {window.stall_share:.1%}")
    parts += [
        f"{pool.name}: {pool.misses_per_batch:,.0f} misses a batch ({pool.miss_share:.1%}), bus "
        f"{pool.fill_bus_share:.1%} in, {pool.writeback_bus_share:.1%} out, in flight "
        f"{pool.slots_in_flight_max / pool.num_slots:.0%} of {pool.num_slots:,} slots"
        for pool in window.pools
    ]
    return "; ".join(parts)


def _resident_bytes() -> int:
    """Memory of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def _copy_bytes_per_s(device: torch.device) -> float:
    """A plain copy from the host to the device; on a CPU, one in its memory."""
    host = torch.ones(COPY_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)

    def copy() -> float:
        start_s = time.perf_counter()
        target.copy_(host, non_blocking=True)
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)
        return time.perf_counter() - start_s

    return COPY_BYTES / _best(copy)


def _best(measure: Callable[[], float]) -> float:
    measure()
    return min(measure() for _ in range(3))
