# SPDX-License-Identifier: BSD-3-Clause
"""Reads checkpoints: everything is looked at before anything is changed."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from torchrec_scratchpipe.checkpoint.files import (
    CHECKSUM_BYTES,
    MANIFEST_FILE,
    METADATA_FILE,
    FileChecksums,
    Manifest,
    SafeLoadPlanner,
    SafeReader,
    check_values,
    checksums_of,
)
from torchrec_scratchpipe.checkpoint.ranks import Ranks
from torchrec_scratchpipe.errors import CheckpointMismatchError, PrivacyError

__all__ = [
    "brief",
    "check_file",
    "check_files",
    "check_fits",
    "is_saved",
    "load_checkpoint",
    "mismatch_error",
    "pending_text",
    "reasons",
]


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
        PrivacyError: Rows of the checkpoint have not got all noise of private training.
    """
    path, ranks = Path(directory), Ranks(process_group)

    def check() -> bool:
        manifest = Manifest.read(path) if (path / MANIFEST_FILE).exists() else None
        metadata = (
            check_files(path, manifest, ranks.rank, ranks.world_size) if manifest else SafeReader(path).read_metadata()
        )
        check_fits(state, metadata, None, path)
        check_values(path, metadata, flatten_state_dict(state)[0])
        return manifest is not None and manifest.is_noise_pending

    if ranks.each_or_fail(check, mismatch_error(f"{path} cannot be loaded")):
        raise PrivacyError(pending_text(path))
    _load_files(path, state, ranks.group)


def _load_files(directory: Path, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    try:
        load(state, storage_reader=SafeReader(directory), planner=SafeLoadPlanner(), process_group=group)
    except CheckpointException as error:
        raise CheckpointMismatchError(
            f"{directory}: {reasons(error)}. It changed while it was being loaded, and some of it was; load another."
        ) from error


def check_files(directory: Path, manifest: Manifest, rank: int, world_size: int) -> Metadata:
    """Read the metadata, and this rank's share of the files. Raises CheckpointMismatchError."""
    metadata = check_metadata(directory, manifest)
    for name in sorted(manifest.files.keys() - {METADATA_FILE})[rank::world_size]:
        check_file(directory, name, manifest.files[name], metadata)
    return metadata


def check_metadata(directory: Path, manifest: Manifest) -> Metadata:
    """Read the metadata. Raises CheckpointMismatchError."""
    if METADATA_FILE in manifest.files:
        check_file(directory, METADATA_FILE, manifest.files[METADATA_FILE], None)
    metadata = SafeReader(directory).read_metadata()
    stray = {place.relative_path for place in (metadata.storage_data or {}).values()} - manifest.files.keys()
    if stray:
        raise CheckpointMismatchError(f"{directory}: {min(stray)} has no checksum. Load another step.")
    return metadata


def is_saved(names: Iterable[str]) -> Callable[[str], bool]:
    """Whether there are optimizer states of a parameter, by all names of a state."""
    names = list(names)
    return lambda name: any(other.startswith(f"optimizer.state.{name}.") for other in names)


def pending_text(path: Path) -> str:
    """What a checkpoint that is not private may not be used for."""
    return (
        f"{path}: rows of this checkpoint have not got all noise of private training, so that it is not private. Load "
        "it with CheckpointManager into a model whose pipeline has privacy; and to release it, save it from there with "
        "for_release=True."
    )


def mismatch_error(what: str) -> Callable[[str], CheckpointMismatchError]:
    """Makes errors that begin with what was to be done."""
    return lambda reason: CheckpointMismatchError(f"{what}: {reason}")


def reasons(error: CheckpointException) -> str:
    """What torch.distributed.checkpoint says of all ranks, in one line."""
    return "; ".join(f"rank {rank}: {brief(failure)}" for rank, (failure, _) in sorted(error.failures.items()))


def check_file(directory: Path, name: str, expected: FileChecksums, metadata: Metadata | None) -> None:
    """Read a file, and compare its checksums; say which tables are damaged. Raises CheckpointMismatchError."""
    path = directory / name
    try:
        found = checksums_of(path)
    except OSError as error:
        raise CheckpointMismatchError(
            f"{path}: cannot be read ({error.strerror}). It holds {_tables_in(name, metadata, 0)}. Load another step."
        ) from error
    if found == expected:
        return
    # Where the first damage is: at a checksum that differs, or where the shorter one of the two ends.
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


def check_fits(state: dict[str, Any], metadata: Metadata, names: set[str] | None, directory: Path) -> None:
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
    # What is there and was not asked for would be lost without a word.
    left = [] if names is None else [name for name in saved if name not in names and name.partition(".")[0] in state]
    if left:
        raise CheckpointMismatchError(f"{directory}: has {min(left)}, which is not there here. {_advice(min(left))}")


def _advice(name: str) -> str:
    if name.startswith("optimizer."):
        return "It was saved with another optimizer or other tables; build those, or load without optimizer."
    return "It was saved from another model; build the model with the same tables, or load the step that belongs to it."


def brief(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
