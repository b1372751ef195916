# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints of a sharded model and its optimizer, in the format of torch.distributed.checkpoint."""

import io
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from torchrec_scratchpipe.checkpoint_files import (
    CHECKSUM_BYTES,
    MANIFEST_FILE,
    METADATA_FILE,
    ChecksummedWriter,
    FileChecksums,
    Manifest,
    RowBlockSavePlanner,
    SafeLoadPlanner,
    SafeReader,
    checksums_of,
)
from torchrec_scratchpipe.collection import scratchpad_collections
from torchrec_scratchpipe.errors import CheckpointMismatchError, CheckpointSaveError, ConfigError
from torchrec_scratchpipe.host_table import MappedStorage
from torchrec_scratchpipe.optimizer_states import create_states, load_wrapper_states, wrapper_states
from torchrec_scratchpipe.pool import Pool
from torchrec_scratchpipe.snapshot import TableSnapshot

__all__ = ["Checkpoint", "CheckpointManager", "load_checkpoint"]

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")


class Checkpoint(NamedTuple):
    """What was loaded beside the model and its optimizer."""

    step: int
    extra: Any  # what this rank saved; rank 0's, if there were other ranks
    world_size: int  # of the job that saved it


class CheckpointManager:
    """Saves and loads whole training states in a directory that all ranks share.

    What TorchRec leaves out of an optimizer's state_dict, how far a WarmupOptimizer around a CombinedOptimizer is, is saved too.

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
        self._directory = Path(directory)
        self._keep_last = keep_last
        self._ranks = _Ranks(process_group)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scratchpipe-checkpoint")
        self._pending: Future[None] | None = None
        self._ranks.each_or_fail(
            lambda: self._directory.mkdir(parents=True, exist_ok=True), f"{self._directory} cannot be made"
        )

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        paths = self._directory.glob("step_*")
        return sorted(int(p.name[5:]) for p in paths if p.name[5:].isdigit() and (p / MANIFEST_FILE).is_file())

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
            extra: Anything else, by rank: numbers, strings, tensors, lists and dicts of them; e.g. the data loader's
                ``state_dict()``.

        Returns:
            The checkpoint's directory.

        Raises:
            CheckpointSaveError: The disk is full, or anything else went wrong on any rank; earlier checkpoints are untouched,
                and training can go on.
            ConfigError: `extra` is not plain data.
        """
        self.wait()
        extra_bytes = self._ranks.each_or_fail(lambda: _plain_bytes(extra, optimizer), "extra", ConfigError)
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

        Tables in host memory are not copied: old values of rows that are written back meanwhile are kept in files in the
        checkpoint's directory, and 4 bytes per row. Everything else, dense parameters and tables that are kept
        whole, is copied first. An earlier save that is under way is awaited.

        Args:
            step: As :meth:`save`.
            model: As :meth:`save`.
            optimizer: As :meth:`save`.
            extra: As :meth:`save`.

        Returns:
            Done when the checkpoint is complete; its `result()` raises what :meth:`save` would. A failure is logged too.

        Raises:
            CheckpointSaveError: There is no room to begin.
            ConfigError: `extra` is not plain data.
        """
        self.wait()
        extra_bytes = self._ranks.each_or_fail(lambda: _plain_bytes(extra, optimizer), "extra", ConfigError)
        state = _state_of(model, optimizer)
        taken: list[tuple[Pool, TableSnapshot]] = []

        def read(pool: int, part: int, first: int, out: Tensor) -> None:
            table, snapshot = taken[pool][0].host_table, taken[pool][1]
            table.read_snapshot(snapshot, part, first, out)

        def take() -> None:
            storage = MappedStorage(self._directory)
            for collection in scratchpad_collections(model):
                taken.extend(collection.snapshot(storage))

        try:
            self._ranks.each_or_fail(take, f"step {step} cannot be saved to {self._directory}")
            planner = _planner([pool for pool, _ in taken], read)
            planner.detach(state)
        except BaseException:
            _close(taken)
            raise

        def write() -> None:
            try:
                self._write(step, state, planner, extra_bytes)
            except BaseException as error:
                logger.error("checkpoint of step %s was not saved: %s", step, error)
                raise
            finally:
                _close(taken)

        self._pending = self._executor.submit(write)
        return self._pending

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
        step = self._ranks.from_first(lambda: step if step is not None else max(self.steps(), default=None))
        if step is None:
            return None
        directory = self.path(step)
        manifest, metadata = self._ranks.each_or_fail(
            lambda: self._check_files(step, directory), f"step {step} cannot be loaded", CheckpointMismatchError
        )
        is_with_optimizer = any(name.startswith("optimizer.") for name in metadata.state_dict_metadata)
        created = create_states(optimizer) if optimizer is not None and is_with_optimizer else []
        state = _state_of(model, optimizer)
        names = self._ranks.gather(set(flatten_state_dict(state)[0]))

        def check() -> tuple[Any, Any]:
            _check_fits(state, metadata, set().union(*names), directory)
            return self._read_extra(directory, manifest)

        try:
            extra, wrappers = self._ranks.each_or_fail(check, f"step {step} cannot be loaded", CheckpointMismatchError)
        except BaseException:
            for part in created:
                part.state.clear()
            raise
        load_checkpoint(directory, state, self._ranks.group)
        model.load_state_dict(state["model"])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
            load_wrapper_states(optimizer, wrappers)
        return Checkpoint(step, extra, manifest.world_size)

    def _write(self, step: int, state: dict[str, Any], planner: RowBlockSavePlanner, extra_bytes: bytes) -> None:
        temporary = self._directory / f".step_{step:012d}.unfinished"
        what = f"step {step} cannot be saved to {self._directory}"
        writer = ChecksummedWriter(temporary)
        try:
            self._ranks.first_or_fail(lambda: self._make_room(temporary, step), what)
            try:
                save(state, storage_writer=writer, planner=planner, process_group=self._ranks.group)
            except CheckpointException as error:
                raise _save_error(
                    what, "; ".join(f"rank {r}: {_brief(e)}" for r, (e, _) in _failures(error))
                ) from error
            extra_name = f"extra_{self._ranks.rank}.pt"
            writer.files[extra_name] = self._ranks.each_or_fail(
                lambda: _write_durably(temporary / extra_name, extra_bytes), what
            )
            files: dict[str, FileChecksums] = {}
            for some in self._ranks.gather(writer.files):
                files.update(some)
            self._ranks.first_or_fail(
                lambda: self._complete(temporary, Manifest(step, self._ranks.world_size, files)), what
            )
        except BaseException:
            if self._ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _make_room(self, temporary: Path, step: int) -> None:
        if self.path(step).exists():
            raise FileExistsError(f"{self.path(step)} exists. Save under another step, or delete it")
        for leftover in self._directory.glob(".step_*.unfinished"):  # of a job that was killed
            shutil.rmtree(leftover)
        temporary.mkdir()

    def _complete(self, temporary: Path, manifest: Manifest) -> None:
        manifest.files[METADATA_FILE] = checksums_of(temporary / METADATA_FILE)
        _write_durably(temporary / MANIFEST_FILE, manifest.to_json().encode())
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
                    shutil.rmtree(doomed)
                except OSError as error:
                    logger.warning("checkpoint of step %s could not be deleted: %s", old, error)

    def _check_files(self, step: int, directory: Path) -> tuple[Manifest, Metadata]:
        if not directory.is_dir():
            raise CheckpointMismatchError(
                f"{directory} does not exist. Steps that were saved: {', '.join(map(str, self.steps())) or 'none'}."
            )
        manifest = Manifest.read(directory)
        names = sorted(manifest.files)
        own = names[self._ranks.rank :: self._ranks.world_size]
        if METADATA_FILE in names:  # all ranks read it
            _check_file(directory, METADATA_FILE, manifest.files[METADATA_FILE], None)
        metadata = SafeReader(directory).read_metadata()
        for name in own:
            _check_file(directory, name, manifest.files[name], metadata)
        return manifest, metadata

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

    Args:
        directory: Written by stock or by :class:`CheckpointManager`.
        state: As for `torch.distributed.checkpoint.load`: tensors are written, other values replaced.
        process_group: Of the ranks that load.
    """
    load(state, storage_reader=SafeReader(directory), planner=SafeLoadPlanner(), process_group=process_group)


class _Ranks:
    """What all ranks do together; an error on one of them is raised on all."""

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self.group: dist.ProcessGroup | None = None
        self.rank, self.world_size = 0, 1
        if dist.is_available() and dist.is_initialized():
            # A group of its own: its collectives run beside those of training, in another order.
            self.group = dist.new_group(
                None if process_group is None else dist.get_process_group_ranks(process_group), backend="gloo"
            )
            self.rank, self.world_size = dist.get_rank(self.group), dist.get_world_size(self.group)

    def gather(self, value: T) -> list[T]:
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        return self.gather(make() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def first_or_fail(self, do: Callable[[], object], what: str) -> None:
        self.each_or_fail(lambda: do() if self.rank == 0 else None, what)

    def each_or_fail(
        self, do: Callable[[], T], what: str, error_type: Callable[[str], Exception] = CheckpointSaveError
    ) -> T:
        """Do it on every rank; if it fails on any, all raise what the first of them said."""
        error: Exception | None = None
        try:
            result = do()
        except Exception as caught:  # whatever it is, the other ranks must not wait for this one
            error = caught
        reasons = self.gather(
            None if error is None else str(error) if self.world_size == 1 else f"rank {self.rank}: {error}"
        )
        reason = next((reason for reason in reasons if reason is not None), None)
        if reason is None:
            return result
        if error_type is CheckpointSaveError:
            raise _save_error(what, reason) from error
        raise error_type(f"{what}: {reason}") from error


def _save_error(what: str, reason: str) -> CheckpointSaveError:
    return CheckpointSaveError(
        f"{what}: {reason}. Earlier checkpoints are untouched; free space or name another directory, and save again."
    )


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
            place = pool.host_table.locate(tensor)
            if place is not None:
                return (index, *place)
        return None

    return RowBlockSavePlanner(locate, read, [pool.host_table.layout.row_bytes for pool in pools])


def _close(taken: list[tuple[Pool, TableSnapshot]]) -> None:
    for pool, snapshot in taken:
        pool.host_table.close_snapshot(snapshot)


def _plain_bytes(extra: Any, optimizer: torch.optim.Optimizer | None) -> bytes:
    stream = io.BytesIO()
    content = {"extra": extra, "optimizer_wrappers": [] if optimizer is None else wrapper_states(optimizer)}
    try:
        torch.save(content, stream)
        stream.seek(0)
        torch.load(stream, weights_only=True)
    except Exception as error:
        raise ConfigError(
            f"it cannot be saved as plain data ({_brief(error)}). Give numbers, strings, tensors, and lists and dicts "
            "of them."
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


def _check_fits(state: dict[str, Any], metadata: Metadata, names: set[str], directory: Path) -> None:
    """Compare names, sizes and dtypes with what a checkpoint holds."""
    saved = metadata.state_dict_metadata
    for name, value in flatten_state_dict(state)[0].items():
        found = saved.get(name)
        if found is None:
            raise CheckpointMismatchError(f"{directory}: has no {name}. {_advice(name)}")
        if isinstance(value, Tensor) and isinstance(found, TensorStorageMetadata):
            if tuple(found.size) != tuple(value.shape):
                raise CheckpointMismatchError(
                    f"{directory}: {name} has shape {tuple(found.size)} there and {tuple(value.shape)} here. {_advice(name)}"
                )
            if found.properties.dtype != value.dtype:
                raise CheckpointMismatchError(
                    f"{directory}: {name} is {found.properties.dtype} there and {value.dtype} here. {_advice(name)}"
                )
    left = sorted(name for name in saved if name not in names and name.partition(".")[0] in state)
    if left:
        raise CheckpointMismatchError(f"{directory}: has {left[0]}, which is not there here. {_advice(left[0])}")


def _advice(name: str) -> str:
    if name.startswith("optimizer."):
        return "It was saved with another optimizer or other tables; build those, or load without optimizer."
    return "It was saved from another model; build the model with the same tables, or load the step that belongs to it."


def _failures(error: CheckpointException) -> Iterator[tuple[int, tuple[BaseException, Any]]]:
    yield from sorted(error.failures.items())


def _brief(error: BaseException) -> str:
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
