# SPDX-License-Identifier: BSD-3-Clause
"""Folds deltas in the background of a job, when it is asked to, or when they have grown."""

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torchrec_scratchpipe.checkpoint.compaction import compact, growth

__all__ = ["Folder"]

logger: logging.Logger = logging.getLogger(__name__)

NICENESS = 10  # of the thread: training comes first


class Folder:
    """One fold at a time, in a thread of its own of low priority.

    Args:
        directory: Of the checkpoints.
        keep_last: As :func:`compact`.
        compact_at: To how many times the checkpoint's bytes deltas may grow before :meth:`look` has them folded; None:
            however much.
    """

    def __init__(self, directory: Path, keep_last: int | None, compact_at: float | None) -> None:
        self._directory = directory
        self._keep_last = keep_last
        self._compact_at = compact_at
        self._tries_at = compact_at or 0.0  # more than that after a try that failed
        self._executor = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="scratchpipe-fold", initializer=_lower_priority
        )
        self._done: Future[int | None] | None = None

    def fold(self) -> "Future[int | None]":
        """Fold now, or after the fold that is under way; its `result()` is that of :func:`compact`."""
        return self._submit(lambda: compact(self._directory, self._keep_last))

    def look(self) -> None:
        """Look in the background whether deltas have grown, and fold them if they have; at once if nothing is done."""
        if self._compact_at is not None and (self._done is None or self._done.done()):
            self._submit(self._fold_if_grown)

    def wait(self) -> None:
        """Wait until nothing is being folded."""
        if self._done is not None:
            self._done.exception()
            self._done = None

    def _submit(self, do: Callable[[], int | None]) -> "Future[int | None]":
        done: Future[int | None] = Future()
        done.set_running_or_notify_cancel()  # nobody can cancel it, so that whoever waits need not expect that

        def run() -> None:
            try:
                done.set_result(do())
            except BaseException as error:
                logger.error("deltas in %s were not folded: %s", self._directory, error)
                done.set_exception(error)

        self._executor.submit(run)
        self._done = done
        return done

    def _fold_if_grown(self) -> int | None:
        found = growth(self._directory, at_least=self._tries_at)
        if found == 0.0 or found < self._tries_at:
            return None
        assert self._compact_at is not None
        self._tries_at = found + self._compact_at
        step = compact(self._directory, self._keep_last)
        self._tries_at = self._compact_at
        return step


def _lower_priority() -> None:
    if hasattr(os, "setpriority"):
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)  # on Linux, of a thread
        except OSError as error:
            logger.info("deltas are folded at the priority of training (%s)", error)
