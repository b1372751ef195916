# SPDX-License-Identifier: BSD-3-Clause
"""What becomes of locks and threads in a forked child: the locks may be held for ever, the threads are not there.

A data loader's workers are forked children, and a job may fork one to evaluate.
"""

import os
from typing import Protocol
from weakref import WeakSet

__all__ = ["ForkAware", "prepare_for_forks"]


class ForkAware(Protocol):
    """Something that can go on in a forked child."""

    def before_fork(self) -> None:
        """Wait until nothing is half done, and keep it so."""

    def after_fork_in_parent(self) -> None:
        """Go on."""

    def after_fork_in_child(self) -> None:
        """Go on, without the parent's threads."""


# Per process, as forks are. Who works takes the locks of what is worked on, so that workers have to stand still first:
# else a worker that holds its own lock waits for one that is held here, while its own is waited for.
_WORKERS: "WeakSet[ForkAware]" = WeakSet()
_OTHERS: "WeakSet[ForkAware]" = WeakSet()
_PREPARED: list[ForkAware] = []


def prepare_for_forks(part: ForkAware, *, is_worker: bool) -> None:
    """Have it told of every fork, as long as it lives."""
    (_WORKERS if is_worker else _OTHERS).add(part)


def _before() -> None:
    _PREPARED[:] = [*_WORKERS, *_OTHERS]
    for part in _PREPARED:
        part.before_fork()


def _after_in_parent() -> None:
    for part in _PREPARED:
        part.after_fork_in_parent()
    _PREPARED.clear()


def _after_in_child() -> None:
    for part in _PREPARED:
        part.after_fork_in_child()
    _PREPARED.clear()


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
