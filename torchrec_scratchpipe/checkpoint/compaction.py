# SPDX-License-Identifier: BSD-3-Clause
"""Folds a checkpoint and the deltas that lead on from it into a new checkpoint, from files alone.

Needs no model and no process group, and a few blocks of 32 MiB of memory.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchrec_scratchpipe.checkpoint.delta_chain import Chain, DeltaSet
from torchrec_scratchpipe.checkpoint.files import Manifest, base_path, base_steps, complete
from torchrec_scratchpipe.checkpoint.fold_files import Fold, write_fold
from torchrec_scratchpipe.checkpoint.loading import brief, check_files
from torchrec_scratchpipe.checkpoint.retention import delete_old, remove
from torchrec_scratchpipe.errors import CheckpointMismatchError, CheckpointSaveError, ConfigError

__all__ = ["compact", "growth"]


def compact(directory: str | os.PathLike[str], keep_last: int | None = None) -> int | None:
    """Write a checkpoint of the last step that deltas lead to; nothing else is touched until it is complete.

    Then checkpoints beyond `keep_last` are deleted, and deltas that lead to none of the rest. Everything is verified
    before it is folded. A job may train, log and save meanwhile.

    Args:
        directory: Of a :class:`CheckpointManager`.
        keep_last: Delete all checkpoints but so many, the new one included; None keeps all, and all deltas.

    Returns:
        The step; None if there is nothing to fold, or if a later checkpoint was saved meanwhile.

    Raises:
        CheckpointMismatchError: A file is missing or damaged, or the directory is; nothing was changed.
        CheckpointSaveError: The disk is full, or another process folds here; nothing was changed.
        ConfigError: `keep_last` is not positive.
    """
    if keep_last is not None and keep_last < 1:
        raise ConfigError(f"keep_last is {keep_last}, it must be at least 1, or None to keep all checkpoints.")
    path = Path(directory).absolute()
    if not path.is_dir():
        raise CheckpointMismatchError(f"{path} does not exist. Name the directory of a CheckpointManager.")
    base: int | None = None
    try:
        with _alone(path):
            for leftover in path.glob(".fold_*.unfinished"):  # of a fold that was killed
                remove(leftover)
            base = max(base_steps(path), default=None)
            step = None if base is None else _fold(path, base)
            if step is not None:
                delete_old(path, keep_last, step)
            return step
    except (CheckpointMismatchError, OSError) as error:
        if base is not None and max(base_steps(path), default=base) > base:  # files that were not needed are gone
            return None
        if isinstance(error, CheckpointMismatchError | CheckpointSaveError):
            raise
        raise CheckpointSaveError(
            f"{path}: deltas cannot be folded: {brief(error)}. Nothing was changed; free space, and fold again."
        ) from error


def growth(directory: Path, *, at_least: float = 0.0) -> float:
    """How many times the bytes of the newest checkpoint the deltas have that a fold would take in.

    Args:
        directory: Of the checkpoints.
        at_least: Where file sizes alone show that it is less than this, nothing is read.

    Returns:
        0 where there is nothing to fold, or where it is less than `at_least`.

    Raises:
        OSError: The directory cannot be read.
        CheckpointMismatchError: Files are missing or damaged.
    """
    chain = Chain(directory)
    base = max(base_steps(directory), default=None)
    if base is None:
        return 0.0
    base_bytes = max(1, sum(path.stat().st_size for path in base_path(directory, base).iterdir()))
    if chain.file_bytes() < at_least * base_bytes:
        return 0.0
    try:
        chain.update()
        sets = _to_fold(chain, Manifest.read_base(directory, base))
        records = [record for delta_set in sets for _, record in delta_set.records]
        return sum(block.num_bytes for record in records for block in record.blocks) / base_bytes
    finally:
        chain.close()


def _to_fold(chain: Chain, base: Manifest) -> list[DeltaSet]:
    sets = chain.after(base, base_path(chain.directory, base.step))
    while sets and not sets[-1].has_state:
        sets = sets[:-1]
    return sets


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keeps other folds of a directory away, of other processes too."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointSaveError(
                f"{directory}: deltas are being folded already. Wait until that is done."
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def _fold(directory: Path, base: int) -> int | None:
    chain = Chain.read(directory)
    try:
        manifest = Manifest.read_base(directory, base)
        sets = _to_fold(chain, manifest)
        if not sets:
            return None
        # 1. All that is read is verified.
        path = base_path(directory, base)
        metadata = check_files(path, manifest, 0, 1)
        for reader, record in [record for delta_set in sets for record in delta_set.records]:
            reader.check(record)
        # 2. A directory that no load looks at.
        step = sets[-1].step
        temporary = directory / f".fold_{step:012d}.unfinished"
        temporary.mkdir()
        try:
            folded = write_fold(temporary, Fold(path, metadata, sets))
            # 3. It is complete under its name, unless nobody needs it any more.
            if max(base_steps(directory)) > base:
                return None
            complete(temporary, directory, folded)
        finally:
            if temporary.exists():
                shutil.rmtree(temporary, ignore_errors=True)
        return step
    finally:
        chain.close()
