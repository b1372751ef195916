# SPDX-License-Identifier: BSD-3-Clause
"""Keeps a plain model, or weights in files, up to date with a run that logs deltas, from another process."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import set_element

from torchrec_scratchpipe.checkpoint.delta_chain import Chain, DeltaSet, Position, digest_of_base
from torchrec_scratchpipe.checkpoint.delta_files import SegmentReader
from torchrec_scratchpipe.checkpoint.delta_load import (
    RowWriter,
    check_fit,
    first_of_each,
    logged_names,
    read_state,
    write_state,
)
from torchrec_scratchpipe.checkpoint.files import MANIFEST_FILE, Manifest, base_path, base_steps, check_values
from torchrec_scratchpipe.checkpoint.follow_target import Tables, state_of
from torchrec_scratchpipe.checkpoint.loading import check_files, check_fits
from torchrec_scratchpipe.checkpoint.pieces import Piece
from torchrec_scratchpipe.checkpoint.reads import read_checkpoint
from torchrec_scratchpipe.errors import CheckpointMismatchError, ConfigError

__all__ = ["Follower", "Lag", "follow"]

POLL_S = 0.02  # between two looks at a directory: one stat of each file of the log
SETTLE_S = 0.5  # files of several ranks are made and deleted one after another; what is wrong for longer is damage

T = TypeVar("T")


class Lag(NamedTuple):
    """How far a target is behind the log of a run."""

    step: int  # batches trained that the target shows
    num_batches: int  # that are in the log, complete, and not in the target
    seconds: float  # since what the target shows was taken, by the clocks of both hosts


def follow(directory: str | os.PathLike[str], target: nn.Module | Tables, *, wait_s: float = 0.0) -> "Follower":
    """Load the latest checkpoint of a run into a target, and get ready to apply the deltas that the run logs.

    For a process that does not train, such as a server: it needs neither a process group nor the sharded model. Other
    ranks, if there are any, take no part. Changes nothing in `directory`.

    Args:
        directory: That a :class:`CheckpointManager` with `delta_every` saves into.
        target: An unsharded module on the CPU, of the training model's names. Or weights [num_embeddings,
            embedding_dim] in the dtype of the table, by table name or by a name that ends in `<table>.weight`: paths of
            `.npy` files, NumPy arrays or CPU tensors. A file that is missing is made; one that is there is written in
            place. Optimizer states are not followed.
        wait_s: How long to wait for a first checkpoint.

    Returns:
        At the step of the latest checkpoint; :meth:`Follower.update` brings it up to date.

    Raises:
        CheckpointMismatchError: There is no checkpoint, its files are damaged, or it is of another model. Nothing was
            written.
        ConfigError: The target has a table of another name, shape, dtype or device.
    """
    return Follower(directory, target, wait_s)


class Follower:
    """A target that goes along with a run; made by :func:`follow`. Use it in one thread at a time.

    A delta set is applied when all ranks have recorded it, and its checksums are verified before any of it is written.
    So the target always shows one moment of the run, except while :meth:`update` writes: a thread that reads rows
    meanwhile sees old rows and new ones, and of a row that is being copied, perhaps some new values and some old ones.
    Where that matters, let readers wait. What is in no scratchpad's table is as of the latest set that has it.

    Args:
        directory: See :func:`follow`.
        target: See :func:`follow`.
        wait_s: See :func:`follow`.
    """

    def __init__(self, directory: str | os.PathLike[str], target: nn.Module | Tables, wait_s: float = 0.0) -> None:
        self.num_reloads = 0  # how often a checkpoint had to be loaded anew
        self._directory = Path(directory).absolute()
        self._target = target
        self._state: dict[str, Any] = {}
        self._chain = Chain(self._directory)
        self._is_closed = False
        self._is_whole = False  # whether the target is of one moment
        self._position: Position | None = None  # None: that of the base
        self._step, self._time_s = 0, 0.0
        self._pending: list[DeltaSet] | None = []
        self._readers: set[SegmentReader] = set()  # that have memory for what they read
        self._seen_bases = (-1, -1)  # when the directory changed, and the latest step then
        self._wait_for_base(wait_s)
        self._load()

    def update(self) -> Lag:
        """Apply all complete delta sets that have come since.

        If the log does not lead on from what the target shows, because the run has gone back to an older step, or files
        that were not applied yet were deleted with their checkpoint, the latest checkpoint is loaded anew first.

        Returns:
            How far behind the target is now.

        Raises:
            CheckpointMismatchError: Files are damaged, or do not fit the target. The target shows the last set before;
                the next call tries again.
            ConfigError: The follower is closed.
        """
        self._go_on()
        return self._lag()

    def wait(self, timeout_s: float) -> Lag:
        """Wait until something was applied; looks every 20 ms, and reads nothing while no file has grown.

        Args:
            timeout_s: After so long, it returns all the same.

        Returns:
            As :meth:`update`.

        Raises:
            CheckpointMismatchError: As :meth:`update`.
            ConfigError: As :meth:`update`.
        """
        end = time.monotonic() + timeout_s
        while not self._go_on() and (left := end - time.monotonic()) > 0:
            time.sleep(min(POLL_S, left))
        return self._lag()

    def close(self) -> None:
        """Close all files of the log; the target stays as it is."""
        self._is_closed = True
        self._pending = []
        self._chain.close()

    def __enter__(self) -> "Follower":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _go_on(self) -> bool:
        """Whether the target has changed."""
        if self._is_closed:
            raise ConfigError("follow: this follower is closed. Make another one.")
        sets = _settled(self._look)
        must_reload = sets is None
        if must_reload:
            self._load()
            self.num_reloads += 1
            sets = _settled(self._look)
        for delta_set in sets or []:
            self._apply(delta_set)
        self._release(sets or [])
        return must_reload or bool(sets)

    def _look(self) -> list[DeltaSet] | None:
        """What is to be applied; None if a base is to be loaded first."""
        if not self._is_whole:
            return None
        newest = self._newest_base()
        has_changed = self._chain.update()
        if has_changed or self._pending is None:
            self._pending = None
            self._pending = self._sets_to_come()
        if self._pending is None or (not self._pending and newest > self._step):
            self._pending = None
            return None
        return list(self._pending)

    def _sets_to_come(self) -> list[DeltaSet] | None:
        if self._position is not None:
            return self._chain.after_set(self._position)
        path = base_path(self._directory, self._step)
        if digest_of_base(path) != self._base_digest:  # it is gone, or another
            return None
        return self._chain.after(self._manifest, path)

    def _apply(self, delta_set: DeltaSet) -> None:
        # 1. Nothing is written before all of it is known to be whole.
        for reader, record in delta_set.records:
            reader.check(record)
        state = None
        if delta_set.has_state and not self._state.keys() <= logged_names([delta_set]):
            state = first_of_each([read_state(record) for record in delta_set.newest])
        check_fit([delta_set], state, self._pieces)
        # 2. If it fails here, nobody knows what the target shows.
        self._is_whole = False
        self._writer.write(delta_set.records)
        if state is not None:
            write_state(state, self._pieces)
            self._set_values(state.values)
        self._is_whole = True
        self._position, self._step, self._time_s = delta_set.position, delta_set.step, delta_set.time_s
        if self._pending:
            self._pending.pop(0)

    def _lag(self) -> Lag:
        with contextlib.suppress(CheckpointMismatchError):  # the next update says it
            self._look()
        newest = max((delta_set.step for delta_set in self._pending or []), default=self._step)
        return Lag(self._step, newest - self._step, max(0.0, time.time() - self._time_s))

    def _wait_for_base(self, wait_s: float) -> None:
        end = time.monotonic() + wait_s
        while self._newest_base() < 0:
            if time.monotonic() >= end:
                raise CheckpointMismatchError(
                    f"{self._directory}: has no complete checkpoint. Begin to train with CheckpointManager(..., "
                    "delta_every=...).trained(), which saves one, or wait longer for it (wait_s)."
                )
            time.sleep(POLL_S)

    def _newest_base(self) -> int:
        """-1 if there is none; looks for it only if the directory has changed."""
        try:
            changed_ns = self._directory.stat().st_mtime_ns
        except OSError:
            return -1
        if (
            changed_ns != self._seen_bases[0] or time.time_ns() - changed_ns < 1_000_000_000
        ):  # clocks of files are coarse
            self._seen_bases = (changed_ns, max(base_steps(self._directory), default=-1))
        return self._seen_bases[1]

    def _load(self) -> None:
        while True:
            step = max(base_steps(self._directory), default=-1)
            if step < 0:
                raise CheckpointMismatchError(
                    f"{self._directory}: the checkpoint of step {self._step} is gone, and there is no other. Put it "
                    "back."
                )
            try:
                return self._load_base(step)
            except CheckpointMismatchError:
                if max(base_steps(self._directory), default=step) == step:
                    raise  # else it was deleted meanwhile, because there is a later one

    def _load_base(self, step: int) -> None:
        path = base_path(self._directory, step)
        manifest, digest = Manifest.read_base(self._directory, step), digest_of_base(path)
        metadata = check_files(path, manifest, 0, 1)
        state = self._state or state_of(self._target, metadata)
        check_fits(state, metadata, None, path)
        check_values(path, metadata, state)
        time_s = (path / MANIFEST_FILE).stat().st_mtime
        if not self._state:
            self._state = state
            self._pieces = {
                name: [Piece(value.detach(), (0,) * value.dim(), tuple(value.shape))]
                for name, value in state.items()
                if isinstance(value, Tensor)
            }
            self._writer = RowWriter(self._pieces, is_checked=True)
        self._is_whole = False
        self._set_values(read_checkpoint(path, metadata, None, {name: self._pieces.get(name, []) for name in state}))
        self._is_whole = True
        self._manifest, self._base_digest, self._pending = manifest, digest, None
        self._position, self._step, self._time_s = None, step, time_s

    def _set_values(self, values: dict[str, Any]) -> None:
        """Give a module what is no tensor."""
        names = [name for name in values if name in self._state and name not in self._pieces]
        if names and isinstance(self._target, nn.Module):
            state = {"model": self._target.state_dict()}
            places = flatten_state_dict(state)[1]
            for name in names:
                set_element(state, places[name], values[name])
            plain = {name: value for name, value in state["model"].items() if not isinstance(value, Tensor)}
            self._target.load_state_dict(plain, strict=False)

    def _release(self, applied: list[DeltaSet]) -> None:
        """Keep memory only for the files that grow."""
        if applied:
            used = self._readers.union(record.reader for delta_set in applied for record in delta_set.records)
            self._readers = {record.reader for record in applied[-1].newest}
            for reader in used - self._readers:
                reader.release()


def _settled(look: Callable[[], T]) -> T:
    """Look again for a while, where files do not go together. Raises CheckpointMismatchError."""
    end = time.monotonic() + SETTLE_S
    while True:
        try:
            return look()
        except CheckpointMismatchError:
            if time.monotonic() >= end:
                raise
            time.sleep(POLL_S)
