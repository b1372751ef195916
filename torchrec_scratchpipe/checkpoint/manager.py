# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints of a sharded model and its optimizer, in the format of torch.distributed.checkpoint."""

import io
import logging
import os
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from torchrec_scratchpipe.checkpoint.delta_chain import LOG_DIRECTORY, Chain, digest_of
from torchrec_scratchpipe.checkpoint.delta_export import export_delta
from torchrec_scratchpipe.checkpoint.delta_files import Schema
from torchrec_scratchpipe.checkpoint.delta_log import DeltaLog, pool_schemas, take_state
from torchrec_scratchpipe.checkpoint.files import (
    ChecksummedWriter,
    FileChecksums,
    Manifest,
    RowBlockSavePlanner,
    base_path,
    base_steps,
    complete,
    sync_directory,
    write_durably,
)
from torchrec_scratchpipe.checkpoint.folding import Folder
from torchrec_scratchpipe.checkpoint.loading import brief, is_saved, mismatch_error, pending_text, reasons
from torchrec_scratchpipe.checkpoint.optimizer_states import fit_states, load_wrapper_states, wrapper_states
from torchrec_scratchpipe.checkpoint.pieces import pieces_of
from torchrec_scratchpipe.checkpoint.private_rows import PRIVACY, pending_pieces, pending_state, private_steps
from torchrec_scratchpipe.checkpoint.ranks import Ranks
from torchrec_scratchpipe.checkpoint.retention import delete_old, remove
from torchrec_scratchpipe.checkpoint.source import find_source, open_source
from torchrec_scratchpipe.core.disk import MappedStorage
from torchrec_scratchpipe.core.pool import Pool
from torchrec_scratchpipe.core.snapshot import TableSnapshot
from torchrec_scratchpipe.errors import CheckpointSaveError, ConfigError, PrivacyError, ScratchPipeError
from torchrec_scratchpipe.sharding.model import only_located, only_read, scratchpad_collections
from torchrec_scratchpipe.sharding.table_view import shown

__all__ = ["Checkpoint", "CheckpointManager"]

logger: logging.Logger = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """What was loaded beside the model and its optimizer."""

    step: int
    extra: Any  # what this rank saved; rank 0's, if there were other ranks
    world_size: int  # of the job that saved it


class _Taken(NamedTuple):
    """What a checkpoint is to hold."""

    state: dict[str, Any]
    extra_bytes: bytes
    is_noise_pending: bool  # rows of a private model have not got all their noise


class _Loaded(NamedTuple):
    """What a delta log may go on from."""

    step: int
    digest: str


class CheckpointManager:
    """Saves and loads whole training states in a directory that all ranks share.

    What TorchRec leaves out of an optimizer's state_dict, how far a WarmupOptimizer around a CombinedOptimizer is, is
    saved too.

    A checkpoint is a directory `step_000000001000` in the format of :mod:`torch.distributed.checkpoint`, of the state
    ``{"model": model.state_dict(), "optimizer": optimizer.state_dict()}``: full tables under stock names, so stock
    TorchRec can load it, on other numbers of ranks and with other sharding too, and the other way round.
    It is written beside and renamed when it is whole, so a half-written one is never loaded. Names, shapes and dtypes
    are compared before anything is loaded, and checksums then or on the way; see :meth:`load`.

    Args:
        directory: Made if it is missing.
        keep_last: Delete all but so many, after each save; None keeps all.
        process_group: Of the ranks that train; a gloo group of the same ranks is made from it. Default: all ranks.
        delta_every: How many batches lie between two deltas of the delta log; see :meth:`trained`. None: there is no
            log.
        state_every: How many batches lie between two deltas that a job can be resumed from, because they have
            everything else than tables behind a scratchpad, too. A multiple of `delta_every`, which is the default.
        compact_at: When deltas have grown to so many times the bytes of the newest checkpoint, :meth:`trained` has them
            folded as :meth:`compact` does. None: only :meth:`compact` folds.

    Raises:
        ConfigError: `keep_last`, `delta_every`, `state_every` or `compact_at` is not positive, or they do not fit each
            other.
        CheckpointSaveError: The directory cannot be made.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep_last: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        *,
        delta_every: int | None = None,
        state_every: int | None = None,
        compact_at: float | None = None,
    ) -> None:
        if keep_last is not None and keep_last < 1:
            raise ConfigError(f"keep_last is {keep_last}, it must be at least 1, or None to keep all checkpoints.")
        if delta_every is not None and delta_every < 1:
            raise ConfigError(f"delta_every is {delta_every}, it must be at least 1 batch, or None for no delta log.")
        if state_every is not None and (delta_every is None or state_every < 1 or state_every % delta_every):
            raise ConfigError(
                f"state_every is {state_every}, delta_every is {delta_every}: it must be a multiple of it. Leave it "
                "out to have everything in each delta."
            )
        if compact_at is not None and not compact_at > 0:
            raise ConfigError(f"compact_at is {compact_at}, it must be above 0, or None to fold no deltas by itself.")
        self._directory = Path(directory).absolute()  # the job may change its working directory
        self._keep_last = keep_last
        self._delta_every = delta_every
        self._state_every = state_every or delta_every
        self._log: DeltaLog | None = None
        self._first_save: Future[None] | None = (
            None  # of the checkpoint that the log goes on from, until it is complete
        )
        self._is_to_begin_anew = False  # because that failed
        self._loaded: weakref.WeakKeyDictionary[nn.Module, _Loaded] = weakref.WeakKeyDictionary()
        self._ranks = Ranks(process_group)
        # Beside those of a save that is under way, which `trained` does not wait for.
        self._training_ranks = self._ranks if delta_every is None else Ranks(process_group)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scratchpipe-checkpoint")
        self._pending: Future[None] | None = None
        self._folder = Folder(self._directory, keep_last, compact_at)
        self._ranks.each_or_fail(
            lambda: self._directory.mkdir(parents=True, exist_ok=True), _save_error(f"{self._directory} cannot be made")
        )

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending; those of deltas are not among them."""
        return base_steps(self._directory)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, for `torch.distributed.checkpoint.load(..., checkpoint_id=)`."""
        return base_path(self._directory, step)

    def trained(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, extra: Any = None
    ) -> "Future[None] | None":
        """Say that a batch has trained; every `delta_every` batches, a delta is logged. All ranks call it, each time.

        A delta has the rows that were trained or reset since the last one, with their optimizer states, once each, and
        every `state_every` batches everything that is in no scratchpad's table. It is of one moment, and is written
        while training goes on: a row that is about to change before it was written is kept first. Tables are not
        flushed, copied or scanned.

        A delta has one batch of training to be written in: the call after that which took it waits until its file has
        it whole. So if a job is killed, at most `delta_every` of the batches for which this has returned are lost. The
        disk itself may have it later, so that more may be lost if the system goes down; wait for what is returned, if
        that matters.

        The first call saves a checkpoint by :meth:`async_save` for the deltas to go on from, unless :meth:`load` has
        found one. If that fails, it is logged, and the next call begins anew: its checkpoint is of its own batch.

        Args:
            step: Batches trained.
            model: As :meth:`save`; always the same.
            optimizer: As :meth:`save`.
            extra: As :meth:`save`.

        Returns:
            If a delta was taken: done when it is on the disk. Its `result()` raises CheckpointSaveError if it cannot be
            written; that is logged too, and the next delta has what it was to have. Else None.

        Raises:
            CheckpointSaveError: There is no room to begin, or this directory has later deltas of another run.
            ConfigError: There is no `delta_every`, or `extra` is not plain data.
        """
        if self._delta_every is None or self._state_every is None:
            raise ConfigError(
                "trained(): the CheckpointManager has no delta_every. Give it one, or leave this call out."
            )
        if private_steps(model) is not None:
            raise ConfigError(
                "trained(): the model is trained in private, and a delta log has rows without their noise, which "
                "follow() would publish. Leave delta_every out, and save checkpoints."
            )
        log = self._log
        if log is None or log.model is not model or self._has_first_save_failed():
            try:
                log = self._log = self._begin_log(step, model, optimizer, extra)
            except CheckpointSaveError as error:
                if not self._is_to_begin_anew:
                    raise
                logger.error("%s The next batch is tried.", error)  # a job that trains does not end for it
                return None
            self._is_to_begin_anew = False
        log.wait_until_written()
        if step - log.step < self._delta_every:
            return None
        done = self._take_delta(log, step, optimizer, extra, has_state=step - log.step_with_state >= self._state_every)
        if self._ranks.rank == 0:
            self._folder.look()
        return done

    def compact(self) -> "Future[int | None]":
        """Fold the deltas since the newest checkpoint into a new one, in the background, while training goes on.

        Rank 0 folds what all ranks have logged, as :command:`torchrec-scratchpipe compact` does for a directory that no
        job uses. It needs a few blocks of 32 MiB, and what one rank has beside its tables, whatever their size. The new
        checkpoint is of the last step that deltas lead to, and appears when it is complete. Then `keep_last` counts
        checkpoints, and deltas that lead to none of the rest are deleted. One fold at a time; another waits.

        Returns:
            The step, when it is done, or None if there was nothing to fold, or a later checkpoint was saved meanwhile;
            on ranks other than 0 None at once. Its `result()` raises CheckpointMismatchError if a file is damaged and
            CheckpointSaveError if the new checkpoint cannot be written; that is logged too, and nothing was changed.
        """
        if self._ranks.rank == 0:
            return self._folder.fold()
        nothing: Future[int | None] = Future()
        nothing.set_result(None)
        return nothing

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        extra: Any = None,
        *,
        for_release: bool = False,
    ) -> Path:
        """Save; needs some blocks of 32 MiB beyond the tables, whatever their size. All ranks call it.

        Args:
            step: A number that grows, such as batches trained.
            model: Sharded by DistributedModelParallel.
            optimizer: Its optimizers, combined.
            extra: Anything else, by rank: numbers, strings, tensors, lists and dicts of them; e.g. the state of a
                learning rate schedule. A data loader's own state is ahead of training by the batches in flight.
            for_release: Of a model that is trained in private: have all rows get their noise first, which reads and
                writes whole tables. Without, the checkpoint is not private, and says so; it is for resuming.

        Returns:
            The checkpoint's directory.

        Raises:
            CheckpointSaveError: The disk is full, or anything else went wrong on any rank; earlier checkpoints are
                untouched, and training can go on.
            ConfigError: `extra` is not plain data.
        """
        whole = self._take(step, model, optimizer, extra, for_release=for_release)
        pools = _pools(model)

        def read(pool: int, part: int, first: int, out: Tensor) -> None:
            out.copy_(pools[pool].host_table.parts[part][first : first + out.shape[0]])

        self._write(step, whole, _planner(pools, read))
        return self.path(step)

    def async_save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        extra: Any = None,
        *,
        for_release: bool = False,
    ) -> "Future[None]":
        """Save the state as it is now while training goes on. All ranks call it.

        Tables in host memory are not copied: old values of rows that are written back meanwhile are kept in files in
        the checkpoint's directory, and 4 bytes per row. Everything else, dense parameters and tables that are kept
        whole, is copied first. An earlier save that is under way is awaited; and this one, if memory of a table is in
        the hands of NumPy, DLPack or the like.

        Args:
            step: As :meth:`save`.
            model: As :meth:`save`.
            optimizer: As :meth:`save`.
            extra: As :meth:`save`.
            for_release: As :meth:`save`.

        Returns:
            Done when the checkpoint is complete; its `result()` raises what :meth:`save` would. A failure is logged
            too.

        Raises:
            CheckpointSaveError: There is no room to begin.
            ConfigError: `extra` is not plain data.
        """
        whole = self._take(step, model, optimizer, extra, for_release=for_release)
        taken: list[tuple[Pool, TableSnapshot]] = []

        def read(pool: int, part: int, first: int, out: Tensor) -> None:
            table, snapshot = taken[pool][0].host_table, taken[pool][1]
            table.read_snapshot(snapshot, part, first, out)

        def take() -> RowBlockSavePlanner:
            storage = MappedStorage(self._directory, keeps_files=False)
            for collection in scratchpad_collections(model):
                taken.extend(collection.snapshot(storage))
            planner = _planner([pool for pool, _ in taken], read)
            planner.detach(whole.state)
            return planner

        def write() -> None:
            failure: BaseException | None = None
            try:
                self._write(step, whole, planner, when_read=lambda: _close(taken))
            except BaseException as error:
                logger.error("checkpoint of step %s was not saved: %s", step, error)
                failure = error
            _close(taken)
            if failure is None:
                done.set_result(None)
            else:
                done.set_exception(failure)

        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # nobody can cancel it: tables would be kept as they are for ever
        try:
            planner = self._ranks.each_or_fail(take, _save_error(f"step {step} cannot be saved to {self._directory}"))
            self._executor.submit(write)
        except BaseException:
            _close(taken)
            raise
        self._pending = done
        if any(pool.host_table.lent.is_any_lent for pool, _ in taken):
            done.exception()  # whoever has memory of a table may write it unseen: nothing could be kept of it before
        return done

    def wait(self) -> None:
        """Wait until no save or fold is under way and all deltas are written, well or badly; the futures say which."""
        self._wait_for_saves()
        self._folder.wait()

    def _wait_for_saves(self) -> None:
        if self._pending is not None:
            self._pending.exception()
            self._pending = None
        if self._log is not None:
            self._log.wait()

    def load(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        step: int | None = None,
        *,
        check_first: bool = False,
    ) -> Checkpoint | None:
        """Load into a model that may be sharded otherwise than the one that was saved. All ranks call it.

        Where there are deltas of the same run, tables are brought up to date with them.

        Args:
            model: Sharded by DistributedModelParallel.
            optimizer: Its optimizers, combined.
            step: Which, of a checkpoint or of a delta that has everything; default: the latest.
            check_first: Read all files once to compare checksums before anything is loaded, which takes twice the
                time, so that a load that fails changes nothing. Else checksums are compared while it loads, each before
                or right after what it is of is written; the model of a load that fails then refuses to train and to be
                read, until a load succeeds.

        Returns:
            None if there is no checkpoint at all.

        Raises:
            CheckpointMismatchError: Files are missing or damaged, or the tables or optimizers are others; names them.
                Nothing was loaded, with `check_first`. Without, tables behind a scratchpad raise StageFailedError from
                now on, if any of it was loaded.
        """
        self.wait()
        for pool in _pools(model):  # another manager may be saving this model
            pool.host_table.wait_for_snapshots()
        make_error = mismatch_error(f"step {step} cannot be loaded" if step is not None else "the latest step")
        is_first = self._ranks.rank == 0
        found = self._ranks.each_or_fail(lambda: find_source(self._directory, step) if is_first else None, make_error)
        found = self._ranks.gather(found)[0]
        if found is None:
            return None
        base, step = found
        # 1. Everything is looked at before anything is changed: names, shapes, values, and files if they are to be.
        make_error = mismatch_error(f"step {step} cannot be loaded")
        with open_source(self._directory, base, step, self._ranks, make_error, check_first=check_first) as source:
            undo = fit_states(optimizer, is_saved(source.names)) if optimizer is not None else None
            with only_located(model):  # tables may be loaded in part, and must not be read
                state = _state_of(model, optimizer)
            steps, is_pending = private_steps(model), source.manifest.is_noise_pending
            if is_pending and steps is None:
                raise PrivacyError(pending_text(source.directory))
            if is_pending:
                state[PRIVACY] = pending_state(state["model"], _pools(model))
            flat, places = flatten_state_dict(state)
            names: set[str] = set().union(*self._ranks.gather(set(flat)))
            pieces = {name: pieces_of(value) or [] for name, value in flat.items()}
            if is_pending:
                of_model = pending_pieces(state["model"], _pools(model))
                pieces |= {f"{PRIVACY}.{name}": some for name, some in of_model.items()}
            rank = self._ranks.rank if source.world_size == self._ranks.world_size else 0

            def check() -> tuple[Any, Any, Any]:
                source.check(state, flat, names, pieces)
                beside = source.beside(rank)
                if steps is not None and beside[2] is not None:
                    steps.check_state(beside[2])
                return beside

            try:
                extra, wrappers, privacy = self._ranks.each_or_fail(check, make_error)
            except BaseException:
                if undo is not None:
                    undo()
                raise
            # 2. Tables are written where they are; load_state_dict takes in the rest.
            with _whole_or_unusable(_pools(model)):
                self._ranks.each_or_fail(
                    lambda: source.load(pieces, lambda name, value: set_element(state, places[name], value)), make_error
                )
                model.load_state_dict(state["model"])
                if optimizer is not None:
                    optimizer.load_state_dict(state["optimizer"])
                    load_wrapper_states(optimizer, wrappers)
                if steps is not None and privacy is not None:
                    steps.load_state_dict(privacy, is_pending=is_pending)
                elif steps is not None:
                    steps.note_loaded()
        if self._delta_every is not None:
            for collection in scratchpad_collections(model):
                collection.watch_changes()
            if self._log is not None and self._log.model is model:
                self._log.close()
                self._log = self._first_save = None
                self._is_to_begin_anew = False
            self._loaded[model] = _Loaded(step, source.digest)
        return Checkpoint(step, extra, source.world_size)

    def export_delta(self, since: int, path: str | os.PathLike[str] | None = None) -> Path:
        """Write the rows that were trained or reset after a batch into safetensors files. All ranks call it.

        Rank 0 reads the log, up to the last batch that is complete there, and holds the changed rows of one table at a
        time. The others wait for it. Each table gets a file `<table>.safetensors` with `rows` [N] int64, ascending ids
        in the whole table, `weight` [N, D], and each optimizer state under its own name, [N, D], or [N] for one value
        per row (one per column shard: [N, shards]). `delta.json` says `since`, `step`, and how many rows of each table
        there are. A table that is in no scratchpad has no file: its rows are not logged one by one.

        Args:
            since: A step of the log or of the checkpoint that it begins with.
            path: A directory that is not there yet; default: `delta_<since>_<step>` beside the checkpoints.

        Returns:
            The directory.

        Raises:
            CheckpointMismatchError: The log does not lead on from `since`, and the message says from where it does; or
                it is damaged.
            CheckpointSaveError: The files cannot be written, or the directory is there already.
            ConfigError: safetensors is not installed.
        """
        if self._log is not None:
            self._log.wait()
        self._ranks.gather(None)  # what all of them have taken is on the disk

        def export() -> Path | ScratchPipeError:
            try:
                return export_delta(self._directory, since, path)
            except ScratchPipeError as error:
                return error
            except Exception as error:  # whatever it is, the other ranks must not wait for it
                return _save_error(f"the delta since {since} cannot be written")(brief(error))

        found = self._ranks.from_first(export)
        if isinstance(found, ScratchPipeError):
            raise found
        return found

    def _take(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None, extra: Any, *, for_release: bool
    ) -> "_Taken":
        """All that a checkpoint is to hold; tables are not copied."""
        self._wait_for_saves()
        privacy = _private_state(model, for_release=for_release)
        extra_bytes = self._ranks.each_or_fail(lambda: _prepare(step, extra, optimizer, privacy), ConfigError)
        self._take_delta_beside(step, model, optimizer, extra)
        with only_read(model):
            state = _state_of(model, optimizer)
        is_noise_pending = privacy is not None and not for_release
        if is_noise_pending:
            state[PRIVACY] = pending_state(state["model"], _pools(model))
        return _Taken(state, extra_bytes, is_noise_pending)

    def _write(
        self,
        step: int,
        whole: "_Taken",
        planner: RowBlockSavePlanner,
        when_read: Callable[[], object] = lambda: None,
    ) -> None:
        temporary = self._directory / f".step_{step:012d}.unfinished"
        make_error = _save_error(f"step {step} cannot be saved to {self._directory}")
        writer = ChecksummedWriter(temporary)
        try:
            # 1. A directory that no load looks at.
            self._ranks.first_or_fail(lambda: self._make_room(temporary, step), make_error)
            # 2. Tables and states, then what torch.distributed.checkpoint does not know of; every rank its own file.
            try:
                save(whole.state, storage_writer=writer, planner=planner, process_group=self._ranks.group)
            except CheckpointException as error:
                raise make_error(reasons(error)) from error
            # Now, before deltas are waited for: who is to write tables waits for snapshots, and deltas wait for that.
            when_read()
            extra_name = f"extra_{self._ranks.rank}.pt"
            writer.files[extra_name] = self._ranks.each_or_fail(
                lambda: write_durably(temporary / extra_name, whole.extra_bytes), make_error
            )
            # 3. The manifest last: only then is the checkpoint complete, under its name.
            files: dict[str, FileChecksums] = {}
            for some in self._ranks.gather(writer.files):
                files.update(some)
            manifest = Manifest(
                step, self._ranks.world_size, files, *self._run_and_digest(step), whole.is_noise_pending
            )
            self._ranks.first_or_fail(lambda: self._complete(temporary, manifest), make_error)
        except BaseException:
            if self._ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _make_room(self, temporary: Path, step: int) -> None:
        later = [other for other in self.steps() if other >= step]
        if later or self.path(step).exists():
            raise FileExistsError(
                f"there is step {max([step, *later])} already, of a run that went as far or further. Delete it, save a "
                "later step, or use another directory"
            )
        for leftover in self._directory.glob(".step_*.unfinished"):  # of a job that was killed
            remove(leftover)
        temporary.mkdir()

    def _complete(self, temporary: Path, manifest: Manifest) -> None:
        complete(temporary, self._directory, manifest)
        delete_old(self._directory, self._keep_last, manifest.step)

    def _begin_log(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None, extra: Any) -> DeltaLog:
        self.wait()
        failed_since = -1
        if self._log is not None:
            failed_since = self._log.schema.since if self._is_to_begin_anew else -1
            self._log.close()
            self._log = self._first_save = None
        loaded = self._loaded.pop(model, None)
        since, follows = (step, "") if loaded is None else loaded
        if loaded is None:
            for collection in scratchpad_collections(model):
                collection.watch_changes()
        run = self._ranks.from_first(lambda: uuid.uuid4().hex)
        with only_located(model):
            state = _state_of(model, optimizer)
        self._names_of_first = self._ranks.from_first(lambda: set(flatten_state_dict(state)[0]))
        make_error = _save_error(f"a delta log cannot begin in {self._directory}")
        self._ranks.first_or_fail(lambda: self._make_room_for_log(since, loaded is None, failed_since), make_error)

        def begin() -> DeltaLog:
            schema = Schema(
                run,
                since,
                follows,
                self._ranks.rank,
                self._ranks.world_size,
                since,
                follows,
                pool_schemas(state, _pools(model)),
            )
            return DeltaLog(self._directory / LOG_DIRECTORY, model, schema)

        log = self._ranks.each_or_fail(begin, make_error)
        if loaded is None:
            self._log = log  # whose run the checkpoint is of
            try:
                self._first_save = self.async_save(step, model, optimizer, extra)
            except BaseException:
                self._log.close()
                self._log = None
                raise
        return log

    def _has_first_save_failed(self) -> bool:
        """Whether the checkpoint that the log was to go on from was given up; the same on all ranks."""
        if self._first_save is None:
            return False
        is_done = self._first_save.done()
        found = self._training_ranks.gather((is_done, is_done and self._first_save.exception() is not None))
        if not all(is_done for is_done, _ in found):
            return False
        self._first_save = None
        self._is_to_begin_anew = any(has_failed for _, has_failed in found)
        return self._is_to_begin_anew

    def _make_room_for_log(self, since: int, is_new: bool, failed_since: int) -> None:
        """Leave out, for good, what was recorded after the batch that this run goes on from.

        What was recorded after `failed_since` goes on from a checkpoint that was given up.
        """
        log = self._directory / LOG_DIRECTORY
        log.mkdir(exist_ok=True)
        chain = Chain.read(self._directory)
        try:
            if failed_since >= 0:
                chain.cut(failed_since)
                chain.update()
            if chain.sets and not self.steps():
                aside = Path(tempfile.mkdtemp(prefix=f"{LOG_DIRECTORY}_without_checkpoint_", dir=self._directory))
                logger.warning(
                    "%s: deltas up to batch %s go on from a checkpoint that is not there, perhaps because the job that "
                    "logged them ended before its first checkpoint was complete. They are put aside, to %s. Delete "
                    "that, or put it back together with the checkpoint.",
                    log,
                    chain.sets[-1].step,
                    aside,
                )
                log.rename(aside)  # an empty directory is replaced
                log.mkdir()
                chain.update()
            elif not self.steps():
                chain.cut(-1)
                chain.update()
            later = [one.step for one in chain.sets if one.has_state and one.step > since] + [
                step for step in self.steps() if step > since or (step == since and is_new)
            ]
            if later:
                raise FileExistsError(
                    f"there is step {max(later)} already, of a run that went as far or further. Load it, or use "
                    "another directory"
                )
            chain.cut(since)
        finally:
            chain.close()
        sync_directory(log)

    def _take_delta(
        self, log: DeltaLog, step: int, optimizer: torch.optim.Optimizer | None, extra: Any, *, has_state: bool
    ) -> "Future[None]":
        if not has_state:
            return log.take(step, None)
        _prepare(step, extra, optimizer)
        wrappers = [] if optimizer is None else wrapper_states(optimizer)
        with only_located(log.model):
            state = _state_of(log.model, optimizer)
        elsewhere = self._names_of_first if self._ranks.rank else set()
        beside = {"extra": extra, "optimizer_wrappers": wrappers}
        return log.take(step, take_state(state, _pools(log.model), beside, elsewhere))

    def _take_delta_beside(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None, extra: Any
    ) -> None:
        """At a checkpoint's moment a delta, so that older checkpoints lead on to younger deltas, too."""
        log = self._log
        if log is not None and log.model is model and step > log.step:
            self._take_delta(log, step, optimizer, extra, has_state=True)

    def _run_and_digest(self, step: int) -> tuple[str, str]:
        """Which run logs beside a checkpoint, and the digest of its delta set of that step; on all ranks."""
        log = self._log
        mine = ("", "")
        if log is not None:
            log.wait()
            mine = (log.schema.run, log.digests.get(step, ""))
        found = self._ranks.gather(mine)
        is_whole = all(digest for _, digest in found)
        return found[0][0], digest_of([digest for _, digest in found]) if is_whole else ""


def _save_error(what: str) -> Callable[[str], CheckpointSaveError]:
    return lambda reason: CheckpointSaveError(
        f"{what}: {reason}. Earlier checkpoints are untouched; free space or name another directory, and save again."
    )


def _state_of(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    state: dict[str, Any] = {"model": model.state_dict()}
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
    return state


def _pools(model: nn.Module) -> list[Pool]:
    return [pool for collection in scratchpad_collections(model) for pool in collection.pools]


@contextmanager
def _whole_or_unusable(pools: list[Pool]) -> Iterator[None]:
    """While entered, tables are loaded; after an exception, nobody trains or reads them until a load succeeds."""
    for pool in pools:
        pool.load_failure = None
    try:
        yield
    except BaseException as error:
        for pool in pools:
            pool.load_failure = brief(error)
        raise


def _planner(pools: list[Pool], read: Callable[[int, int, int, Tensor], None]) -> RowBlockSavePlanner:
    def locate(tensor: Tensor) -> tuple[int, int, int] | None:
        for index, pool in enumerate(pools):
            place = pool.host_table.locate(shown(tensor))
            if place is not None:
                return (index, *place)
        return None

    return RowBlockSavePlanner(locate, read, [pool.host_table.layout.row_bytes for pool in pools])


def _close(taken: list[tuple[Pool, TableSnapshot]]) -> None:
    for pool, snapshot in taken:
        pool.host_table.close_snapshot(snapshot)


def _private_state(model: nn.Module, *, for_release: bool) -> dict[str, Any] | None:
    steps = private_steps(model)
    if steps is None:
        return None
    if for_release:
        steps.catch_up()
    return steps.state_dict(for_release=for_release)


def _prepare(
    step: int, extra: Any, optimizer: torch.optim.Optimizer | None, privacy: dict[str, Any] | None = None
) -> bytes:
    if step < 0:
        raise ConfigError(f"step is {step}, it must not be negative. Give the number of batches trained.")
    stream = io.BytesIO()
    content = {
        "extra": extra,
        "optimizer_wrappers": [] if optimizer is None else wrapper_states(optimizer),
        PRIVACY: privacy,
    }
    try:
        torch.save(content, stream)
        stream.seek(0)
        torch.load(stream, weights_only=True)
    except Exception as error:
        raise ConfigError(
            f"extra: cannot be saved as plain data ({brief(error)}). Give numbers, strings, tensors, and lists and "
            "dicts of them."
        ) from error
    return stream.getvalue()
