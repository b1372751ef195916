# SPDX-License-Identifier: BSD-3-Clause
"""Tells the other ranks of a job why this one stopped, so that they can say more than that a connection was lost."""

import functools
import logging
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from torchrec.distributed.types import Awaitable

from torchrec_scratchpipe.errors import PeerFailedError

__all__ = ["PeerNotice"]

logger: logging.Logger = logging.getLogger(__name__)

_KEY = "torchrec_scratchpipe/failure"
_NO_WORD = ""

T = TypeVar("T")


class PeerNotice:
    """One word that the ranks of a job share: why the first of them stopped.

    A rank that waits in a collective wakes when the connection to the rank that failed ends, at the latest after the
    process group's timeout; nothing can wake it earlier. Then it finds the word. Does nothing where there is one rank.
    """

    def __init__(self) -> None:
        self._left = _NO_WORD
        self._has_peers = _has_peers()  # asked for every batch, and it takes its time

    @contextmanager
    def told(self) -> Iterator[None]:
        """While entered, an error is told to the other ranks; or is theirs, and raised as such.

        Raises PeerFailedError.
        """
        try:
            yield
        except (StopIteration, PeerFailedError):
            raise
        except BaseException as error:
            failure = _peer_failure(error)
            if failure is not None:
                raise failure from error
            self._leave(error)
            raise

    def watch(self, awaitable: T) -> T:
        """Have an awaitable of TorchRec, and those that it results in, wait inside :meth:`told`.

        It is changed in place, and becomes of a subclass of its class, so that TorchRec takes it for what it is.
        """
        if self._has_peers and isinstance(awaitable, Awaitable) and "_peer_notice" not in vars(awaitable):
            kind: Any = type(awaitable)
            awaitable.__class__ = _watched(kind)
            awaitable._peer_notice = self
        return awaitable

    def forget(self) -> None:
        """Take back what this rank has left, if it has; it goes on."""
        if self._left != _NO_WORD:
            left, self._left = self._left, _NO_WORD
            _replace_word(left, _NO_WORD)

    def _leave(self, error: BaseException) -> None:
        if _has_peers():
            text = str(error).splitlines()
            self._left = f"{_own_name()} {type(error).__name__}: {text[0] if text else ''}"
            _replace_word(_NO_WORD, self._left)  # the first one counts


@functools.cache
def _watched(kind: Any) -> type[Any]:
    """A subclass of an awaitable's class, for :meth:`PeerNotice.watch`.

    Of that base alone, or its objects could not change over.
    """

    def wait_impl(self: Any) -> Any:
        with self._peer_notice.told():
            result = kind._wait_impl(self)
        return self._peer_notice.watch(result)

    return types.new_class(kind.__name__, (kind,), exec_body=lambda names: names.update(_wait_impl=wait_impl))


def _peer_failure(error: BaseException) -> PeerFailedError | None:
    """The error to raise instead; None if this rank is itself the reason, or has no peers."""
    # NCCL's errors have a type; gloo's are known by where they say they come from, or by its word for a connection.
    is_of_gloo = isinstance(error, RuntimeError) and ("gloo/" in str(error) or "pair closure" in str(error))
    is_lost = isinstance(error, dist.DistError) or is_of_gloo
    if not is_lost or not _has_peers():
        return None
    reason = _NO_WORD
    try:
        store = _get_default_store()
        reason = store.get(_KEY).decode() if store.check([_KEY]) else _NO_WORD
    except Exception:
        logger.debug("the other ranks' word could not be read", exc_info=True)
    if reason.startswith(_own_name()):
        return None
    if reason != _NO_WORD:
        return PeerFailedError(f"another rank has failed. {reason}")
    first_line = str(error).splitlines()[0]
    return PeerFailedError(
        f"another rank has ended or stands still without a word ({first_line}). Look for how it ended; the job has to "
        "be started again, from its latest checkpoint."
    )


def _replace_word(expected: str, word: str) -> None:
    try:
        _get_default_store().compare_set(_KEY, expected, word)
    except Exception:  # the store may be gone with the rank that held it
        logger.debug("the other ranks could not be told", exc_info=True)


def _own_name() -> str:
    return f"rank {dist.get_rank()}:"


def _has_peers() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
