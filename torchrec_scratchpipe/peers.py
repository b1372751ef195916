# SPDX-License-Identifier: BSD-3-Clause
"""Tells the other ranks of a job why this one stopped, so that they can say more than that a connection was lost."""

import logging

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from torchrec_scratchpipe.errors import PeerFailedError

__all__ = ["forget_failure", "peer_failure", "tell_peers"]

logger: logging.Logger = logging.getLogger(__name__)

_KEY = "torchrec_scratchpipe/failure"


def tell_peers(error: BaseException) -> None:
    """Leave word of an error of this rank's own for the other ranks.

    Args:
        error: What stops this rank.
    """
    if not _has_peers():
        return
    try:
        text = str(error).splitlines()
        reason = f"rank {dist.get_rank()}: {type(error).__name__}: {text[0] if text else ''}"
        _get_default_store().compare_set(_KEY, "", reason)  # the first one counts
    except Exception:  # the store may be gone with the rank that held it
        logger.debug("the other ranks could not be told", exc_info=True)


def peer_failure(error: BaseException) -> PeerFailedError | None:
    """Find out whether another rank is the reason for an error.

    Args:
        error: What was raised here.

    Returns:
        The error to raise instead; None if this rank is itself the reason, or has no peers.
    """
    # NCCL's errors have a type; gloo's are known by where they say they come from, or by its word for a connection.
    is_of_gloo = isinstance(error, RuntimeError) and ("gloo/" in str(error) or "pair closure" in str(error))
    is_lost = isinstance(error, dist.DistError) or is_of_gloo
    if not is_lost or not _has_peers():
        return None
    reason = ""
    try:
        store = _get_default_store()
        reason = store.get(_KEY).decode() if store.check([_KEY]) else ""
    except Exception:
        logger.debug("the other ranks' word could not be read", exc_info=True)
    if reason.startswith(f"rank {dist.get_rank()}:"):
        return None
    if reason:
        return PeerFailedError(f"another rank has failed. {reason}")
    first_line = str(error).splitlines()[0]
    return PeerFailedError(
        f"another rank has ended or stands still without a word ({first_line}). Look for how it ended; the job has to be "
        "started again, from its latest checkpoint."
    )


def forget_failure() -> None:
    """Take back what :func:`tell_peers` left; this rank goes on."""
    if _has_peers():
        try:
            _get_default_store().delete_key(_KEY)
        except Exception:
            logger.debug("the other ranks could not be told", exc_info=True)


def _has_peers() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
