# SPDX-License-Identifier: BSD-3-Clause
"""Decides which checkpoints and which deltas nobody needs any more, and deletes them."""

import logging
import shutil
from contextlib import suppress
from pathlib import Path

from torchrec_scratchpipe.checkpoint.delta_chain import LOG_DIRECTORY, Chain
from torchrec_scratchpipe.checkpoint.files import base_path, base_steps
from torchrec_scratchpipe.errors import CheckpointMismatchError

__all__ = ["delete_old", "remove"]

logger: logging.Logger = logging.getLogger(__name__)


def delete_old(directory: Path, keep_last: int | None, newest: int) -> None:
    """Delete all checkpoints but the last, and the segments of a delta log that lead to none of these.

    What cannot be deleted is left, with a warning.

    Args:
        directory: Of the checkpoints.
        keep_last: How many are kept; None: all, and all deltas.
        newest: A step that is kept, whatever else there is.
    """
    if not keep_last:
        return
    steps = base_steps(directory)
    # Deltas before the checkpoints that they lead on from, so that a job that stops here leaves nothing without.
    if steps and (directory / LOG_DIRECTORY).is_dir():
        _delete_deltas(directory, min(newest, *steps[-keep_last:]))
    for old in steps[:-keep_last]:
        if old != newest:
            doomed = directory / f".step_{old:012d}.unfinished"
            try:
                base_path(directory, old).rename(doomed)  # what is half deleted must not be loaded
                remove(doomed)
            except FileNotFoundError:  # another thread was faster
                continue
            except OSError as error:
                logger.warning("checkpoint of step %s could not be deleted: %s", old, error)


def _delete_deltas(directory: Path, oldest: int) -> None:
    try:
        chain = Chain.read(directory)
        chain.delete_before(oldest)
        chain.close()
    except (OSError, CheckpointMismatchError) as error:
        logger.warning("deltas before step %s could not be deleted: %s", oldest, error)


def remove(path: Path) -> None:
    """Delete a directory, or a link to one, while another thread may be deleting it, too. Raises OSError."""
    if path.is_symlink():
        path.unlink()
        return
    while path.exists():
        with suppress(FileNotFoundError):
            shutil.rmtree(path)
