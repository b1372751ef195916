# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints of a sharded model and its optimizer, in the format of torch.distributed.checkpoint."""

import io
import logging
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from torchrec_scratchpipe.checkpoint.files import (
    CHECKSUM_BYTES,
    MANIFEST_FILE,
    METADATA_FILE,
    ChecksummedWriter,
    FileChecksums,
    Manifest,
    RowBlockSavePlanner,
    SafeLoadPlanner,
    SafeReader,
    check_values,
    checksums_of,
)
from torchrec_scratchpipe.checkpoint.optimizer_states import fit_states, load_wrapper_states, wrapper_states
from torchrec_scratchpipe.checkpoint.ranks import Ranks
from torchrec_scratchpipe.core.disk import MappedStorage
from torchrec_scratchpipe.core.pool import Pool
from torchrec_scratchpipe.core.snapshot import TableSnapshot
from torchrec_scratchpipe.errors import CheckpointMismatchError, CheckpointSaveError, ConfigError
from torchrec_scratchpipe.sharding.model import only_read, scratchpad_collections
from torchrec_scratchpipe.sharding.table_view import shown

__all__ = ["Checkpoint", "CheckpointManager", "load_checkpoint"]

logger: logging.Logger = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """What was loaded beside the model and its optimizer."""

    step: int
    extra: Any  # what this rank saved; rank 0's, if there were other ranks
    world_size: int  # of the job that saved it


class CheckpointManager:
    """Saves and loads whole training states in a directory that all ranks share.

    What TorchRec leaves out of an optimizer's state_dict, how far a WarmupOptimizer around a CombinedOptimizer is, is
    saved too.

    A checkpoint is a directory `step_000000001000` in the format of :mod:`torch.distributed.checkpoint`, of the state
    ``{"model": model.state_dict(), "optimizer": optimizer.state_dict()}``: full tables under stock names, so stock
    TorchRec can load it, on other numbers of ranks and with other sharding too, and the other way round.
    It is written beside and renamed when it is whole, so a half-written one is never loaded. Checksums are verified,
    and names, shapes and dtypes compared, before anything is loaded.

    Args:
        directory: Made if it is missing.
        keep_last: Delete all but so many, after each save; None keeps all.
        process_group: Of the ranks that train; a gloo group of the same ranks is made from it. Default: all ranks.

    Raises:
        ConfigError: `keep_last` is not positive.
        CheckpointSaveError: The directory cannot be made.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep_last: int | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if keep_last is not None and keep_last < 1:
            raise ConfigError(f"keep_last is {keep_last}, it must be at least 1, or None to keep all checkpoints.")
        self._directory = Path(directory).absolute()  # the job may change its working directory
        self._keep_last = keep_last
        self._ranks = Ranks(process_group)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scratchpipe-checkpoint")
        self._pending: Future[None] | None = None
        self._ranks.each_or_fail(
            lambda: self._directory.mkdir(parents=True, exist_ok=True), _save_error(f"{self._directory} cannot be made")
        )

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        names = [path.name for path in self._directory.glob("step_*") if (path / MANIFEST_FILE).is_file()]
        steps = sorted(int(name[5:]) for name in names if re.fullmatch(r"step_[0-9]{12,}", name))
        return [step for step in steps if self.path(step).name in names]

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, for `torch.distributed.checkpoint.load(..., checkpoint_id=)`."""
        return self._directory / f"step_{step:012d}"

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, extra: Any = None
    ) -> Path:
        """Save; needs some blocks of 32 MiB beyond the tables, whatever their size. All ranks call it.

        Args:
            step: A number that grows, such as batches trained.
            model: Sharded by DistributedModelParallel.
            optimizer: Its optimizers, combined.
            extra: Anything else, by rank: numbers, strings, tensors, lists and dicts of them; e.g. the state of a
                learning rate schedule. A data loader's own state is ahead of training by the batches in flight.

        Returns:
            The checkpoint's directory.

        Raises:
            CheckpointSaveError: The disk is full, or anything else went wrong on any rank; earlier checkpoints are
                untouched, and training can go on.
            ConfigError: `extra` is not plain data.
        """
        self.wait()
        extra_bytes = self._ranks.each_or_fail(lambda: _prepare(step, extra, optimizer), ConfigError)
        with only_read(model):
            state = _state_of(model, optimizer)
        pools = _pools(model)

        def read(pool: int, part: int, first: int, out: Tensor) -> None:
            out.copy_(pools[pool].host_table.parts[part][first : first + out.shape[0]])

        planner = _planner(pools, read)
        self._write(step, state, planner, extra_bytes)
        return self.path(step)

    def async_save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, extra: Any = None
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

        Returns:
            Done when the checkpoint is complete; its `result()` raises what :meth:`save` would. A failure is logged
            too.

        Raises:
            CheckpointSaveError: There is no room to begin.
            ConfigError: `extra` is not plain data.
        """
        self.wait()
        extra_bytes = self._ranks.each_or_fail(lambda: _prepare(step, extra, optimizer), ConfigError)
        with only_read(model):
            state = _state_of(model, optimizer)
        taken: list[tuple[Pool, TableSnapshot]] = []

        def read(pool: int, part: int, first: int, out: Tensor) -> None:
            table, snapshot = taken[pool][0].host_table, taken[pool][1]
            table.read_snapshot(snapshot, part, first, out)

        def take() -> RowBlockSavePlanner:
            storage = MappedStorage(self._directory, keeps_files=False)
            for collection in scratchpad_collections(model):
                taken.extend(collection.snapshot(storage))
            planner = _planner([pool for pool, _ in taken], read)
            planner.detach(state)
            return planner

        def write() -> None:
            failure: BaseException | None = None
            try:
                self._write(step, state, planner, extra_bytes)
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
        """Wait until no save is under way, well or badly; what :meth:`async_save` returned says which."""
        if self._pending is not None:
            self._pending.exception()
            self._pending = None

    def load(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, step: int | None = None
    ) -> Checkpoint | None:
        """Load into a model that may be sharded otherwise than the one that was saved. All ranks call it.

        Args:
            model: Sharded by DistributedModelParallel.
            optimizer: Its optimizers, combined.
            step: Which; default: the latest.

        Returns:
            None if there is no checkpoint at all.

        Raises:
            CheckpointMismatchError: Files are missing or damaged, or the tables or optimizers are others; names them.
                Nothing was loaded.
        """
        self.wait()
        for pool in _pools(model):  # another manager may be saving this model
            pool.host_table.wait_for_snapshots()
        step = self._ranks.from_first(lambda: step if step is not None else max(self.steps(), default=None))
        if step is None:
            return None
        # 1. Everything is looked at before anything is changed: files, names, shapes, values.
        directory = self.path(step)
        make_error = _mismatch_error(f"step {step} cannot be loaded")
        manifest, metadata = self._ranks.each_or_fail(lambda: self._check_files(step, directory), make_error)
        undo = fit_states(optimizer, _is_saved(metadata)) if optimizer is not None else None
        state = _state_of(model, optimizer)
        names: set[str] = set().union(*self._ranks.gather(set(flatten_state_dict(state)[0])))

        def check() -> tuple[Any, Any]:
            _check_fits(state, metadata, names, directory)
            check_values(directory, metadata, flatten_state_dict(state)[0])
            return self._read_extra(directory, manifest)

        try:
            extra, wrappers = self._ranks.each_or_fail(check, make_error)
        except BaseException:
            if undo is not None:
                undo()
            raise
        # 2. Tables are written where they are; load_state_dict takes in the rest.
        _load(directory, state, self._ranks.group)
        model.load_state_dict(state["model"])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
            load_wrapper_states(optimizer, wrappers)
        return Checkpoint(step, extra, manifest.world_size)

    def _write(self, step: int, state: dict[str, Any], planner: RowBlockSavePlanner, extra_bytes: bytes) -> None:
        temporary = self._directory / f".step_{step:012d}.unfinished"
        make_error = _save_error(f"step {step} cannot be saved to {self._directory}")
        writer = ChecksummedWriter(temporary)
        try:
            # 1. A directory that no load looks at.
            self._ranks.first_or_fail(lambda: self._make_room(temporary, step), make_error)
            # 2. Tables and states, then what torch.distributed.checkpoint does not know of; every rank its own file.
            try:
                save(state, storage_writer=writer, planner=planner, process_group=self._ranks.group)
            except CheckpointException as error:
                raise make_error(_reasons(error)) from error
            extra_name = f"extra_{self._ranks.rank}.pt"
            writer.files[extra_name] = self._ranks.each_or_fail(
                lambda: _write_durably(temporary / extra_name, extra_bytes), make_error
            )
            # 3. The manifest last: only then is the checkpoint complete, under its name.
            files: dict[str, FileChecksums] = {}
            for some in self._ranks.gather(writer.files):
                files.update(some)
            manifest = Manifest(step, self._ranks.world_size, files)
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
            _remove(leftover)
        temporary.mkdir()

    def _complete(self, temporary: Path, manifest: Manifest) -> None:
        manifest.files[METADATA_FILE] = checksums_of(temporary / METADATA_FILE)
        _write_durably(temporary / MANIFEST_FILE, manifest.to_json().encode())
        # The files' names must be on the disk before the directory's new one, and this one before older steps go.
        _sync_directory(temporary)
        temporary.rename(self.path(manifest.step))
        _sync_directory(self._directory)
        self._delete_old(manifest.step)

    def _delete_old(self, newest: int) -> None:
        for old in self.steps()[: -self._keep_last] if self._keep_last else []:
            if old != newest:
                doomed = self._directory / f".step_{old:012d}.unfinished"
                try:
                    self.path(old).rename(doomed)  # what is half deleted must not be loaded
                    _remove(doomed)
                except OSError as error:
                    logger.warning("checkpoint of step %s could not be deleted: %s", old, error)

    def _check_files(self, step: int, directory: Path) -> tuple[Manifest, Metadata]:
        if not directory.is_dir():
            raise CheckpointMismatchError(
                f"{directory} does not exist. Steps that were saved: {', '.join(map(str, self.steps())) or 'none'}."
            )
        manifest = Manifest.read(directory)
        if manifest.step != step:
            raise CheckpointMismatchError(
                f"{directory} holds step {manifest.step}. It was renamed; give it its name back."
            )
        return manifest, _check_all_files(directory, manifest, self._ranks)

    def _read_extra(self, directory: Path, manifest: Manifest) -> tuple[Any, Any]:
        rank = self._ranks.rank if manifest.world_size == self._ranks.world_size else 0
        path = directory / f"extra_{rank}.pt"
        try:
            content = torch.load(path, weights_only=True)
            return content["extra"], content["optimizer_wrappers"]
        except Exception as error:
            raise CheckpointMismatchError(
                f"{path}: is not plain data ({_brief(error)}), and reading it might run code. Load another step."
            ) from error


def load_checkpoint(
    directory: str | os.PathLike[str], state: dict[str, Any], process_group: dist.ProcessGroup | None = None
) -> None:
    """Load any directory of torch.distributed.checkpoint in place, without running code that its files might name.

    Shapes and dtypes are compared first, and checksums where there are any. All ranks call it.

    Args:
        directory: Written by stock or by :class:`CheckpointManager`.
        state: As for `torch.distributed.checkpoint.load`: tensors are written, other values replaced. What else the
            directory holds is left out.
        process_group: Of the ranks that load; default: all of them.

    Raises:
        CheckpointMismatchError: Files are missing or damaged, or of something else than `state`; nothing was loaded.
    """
    path, ranks = Path(directory), Ranks(process_group)

    def check() -> None:
        manifest = Manifest.read(path) if (path / MANIFEST_FILE).exists() else None
        metadata = _check_all_files(path, manifest, ranks) if manifest else SafeReader(path).read_metadata()
        _check_fits(state, metadata, None, path)
        check_values(path, metadata, flatten_state_dict(state)[0])

    ranks.each_or_fail(check, _mismatch_error(f"{path} cannot be loaded"))
    _load(path, state, ranks.group)


def _load(directory: Path, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    try:
        load(state, storage_reader=SafeReader(directory), planner=SafeLoadPlanner(), process_group=group)
    except CheckpointException as error:
        raise CheckpointMismatchError(
            f"{directory}: {_reasons(error)}. It changed while it was being loaded, and some of it was; load another."
        ) from error


def _check_all_files(directory: Path, manifest: Manifest, ranks: Ranks) -> Metadata:
    """Read the metadata, and this rank's share of the files."""
    names = sorted(manifest.files)
    if METADATA_FILE in names:  # all ranks read it
        _check_file(directory, METADATA_FILE, manifest.files[METADATA_FILE], None)
    metadata = SafeReader(directory).read_metadata()
    stray = {place.relative_path for place in (metadata.storage_data or {}).values()} - set(names)
    if stray:
        raise CheckpointMismatchError(f"{directory}: {min(stray)} has no checksum. Load another step.")
    for name in names[ranks.rank :: ranks.world_size]:
        _check_file(directory, name, manifest.files[name], metadata)
    return metadata


def _is_saved(metadata: Metadata) -> Callable[[str], bool]:
    """Whether there are optimizer states of a parameter."""
    names = list(metadata.state_dict_metadata)
    return lambda name: any(other.startswith(f"optimizer.state.{name}.") for other in names)


def _save_error(what: str) -> Callable[[str], CheckpointSaveError]:
    return lambda reason: CheckpointSaveError(
        f"{what}: {reason}. Earlier checkpoints are untouched; free space or name another directory, and save again."
    )


def _mismatch_error(what: str) -> Callable[[str], CheckpointMismatchError]:
    return lambda reason: CheckpointMismatchError(f"{what}: {reason}")


def _reasons(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {_brief(failure)}" for rank, (failure, _) in sorted(error.failures.items()))


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def _state_of(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    state: dict[str, Any] = {"model": model.state_dict()}
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
    return state


def _pools(model: nn.Module) -> list[Pool]:
    return [pool for collection in scratchpad_collections(model) for pool in collection.pools]


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


def _prepare(step: int, extra: Any, optimizer: torch.optim.Optimizer | None) -> bytes:
    if step < 0:
        raise ConfigError(f"step is {step}, it must not be negative. Give the number of batches trained.")
    stream = io.BytesIO()
    content = {"extra": extra, "optimizer_wrappers": [] if optimizer is None else wrapper_states(optimizer)}
    try:
        torch.save(content, stream)
        stream.seek(0)
        torch.load(stream, weights_only=True)
    except Exception as error:
        raise ConfigError(
            f"extra: cannot be saved as plain data ({_brief(error)}). Give numbers, strings, tensors, and lists and "
            "dicts of them."
        ) from error
    return stream.getvalue()


def _write_durably(path: Path, content: bytes) -> FileChecksums:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return checksums_of(path)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_file(directory: Path, name: str, expected: FileChecksums, metadata: Metadata | None) -> None:
    path = directory / name
    try:
        found = checksums_of(path)
    except OSError as error:
        raise CheckpointMismatchError(
            f"{path}: cannot be read ({error.strerror}). It holds {_tables_in(name, metadata, 0)}. Load another step."
        ) from error
    if found == expected:
        return
    if found.num_bytes != expected.num_bytes:
        what = f"has {found.num_bytes:,} bytes, {expected.num_bytes:,} were written"
        first_bad = min(len(found.crc32), len(expected.crc32)) - 1
    else:
        what = "is not what was written"
        first_bad = len(expected.crc32)
    pairs = zip(found.crc32, expected.crc32, strict=False)
    first_bad = next((index for index, (left, right) in enumerate(pairs) if left != right), max(0, first_bad))
    raise CheckpointMismatchError(
        f"{path}: {what}. The damage lies in {_tables_in(name, metadata, first_bad)}. Load another step."
    )


def _tables_in(name: str, metadata: Metadata | None, checksum_index: int) -> str:
    """What lies in a file from a checksum's block on."""
    first = checksum_index * CHECKSUM_BYTES
    found: list[str] = []
    for index, info in (metadata.storage_data or {}).items() if metadata is not None else ():
        is_behind = info.relative_path == name and info.offset + info.length > first
        if is_behind and info.offset < first + CHECKSUM_BYTES and index.fqn not in found:
            found.append(index.fqn)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "") if found else "no table"


def _check_fits(state: dict[str, Any], metadata: Metadata, names: set[str] | None, directory: Path) -> None:
    """Compare names, sizes and dtypes with what a checkpoint holds."""
    saved = metadata.state_dict_metadata
    for name, value in flatten_state_dict(state)[0].items():
        found = saved.get(name)
        if found is None:
            raise CheckpointMismatchError(f"{directory}: has no {name}. {_advice(name)}")
        if isinstance(value, Tensor) and isinstance(found, TensorStorageMetadata):
            if tuple(found.size) != tuple(value.shape):
                raise CheckpointMismatchError(
                    f"{directory}: {name} has shape {tuple(found.size)} there and {tuple(value.shape)} here. "
                    f"{_advice(name)}"
                )
            if found.properties.dtype != value.dtype:
                raise CheckpointMismatchError(
                    f"{directory}: {name} is {found.properties.dtype} there and {value.dtype} here. {_advice(name)}"
                )
    left = [] if names is None else [name for name in saved if name not in names and name.partition(".")[0] in state]
    if left:
        raise CheckpointMismatchError(f"{directory}: has {min(left)}, which is not there here. {_advice(min(left))}")


def _advice(name: str) -> str:
    if name.startswith("optimizer."):
        return "It was saved with another optimizer or other tables; build those, or load without optimizer."
    return "It was saved from another model; build the model with the same tables, or load the step that belongs to it."


def _brief(error: BaseException) -> str:
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
