# SPDX-License-Identifier: BSD-3-Clause
"""What a follower writes to: a plain module, or weights of tables in files and arrays."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from torchrec_scratchpipe.checkpoint.table_names import few, match_of, open_npy, table_of
from torchrec_scratchpipe.errors import ConfigError

__all__ = ["Tables", "state_of"]

Tables = Mapping[str, "Tensor | np.ndarray[Any, Any] | str | os.PathLike[str]"]


def state_of(target: nn.Module | Tables, metadata: Metadata) -> dict[str, Any]:
    """The tensors to write, by name in the flat state of a checkpoint.

    Args:
        target: As :func:`follow`.
        metadata: Of a checkpoint. Files that are missing are made, of its shapes and dtypes.

    Returns:
        For a module, values that are no tensors, too.

    Raises:
        ConfigError: A tensor is not in host memory, or a table is unknown or of another shape or dtype; no file was
            made.
    """
    if isinstance(target, nn.Module):
        return _state_of_module(target)
    known = {
        name: of_tensor
        for name, of_tensor in metadata.state_dict_metadata.items()
        if name.startswith("model.") and table_of(name) and isinstance(of_tensor, TensorStorageMetadata)
    }
    keys = {name: key for name in known if (key := match_of(str(table_of(name)), target, "follow")) is not None}
    unknown = set(target) - set(keys.values())
    if unknown or not keys:
        raise ConfigError(
            f"follow: {few(unknown)} of the target is no table. Tables of the run: {few(map(table_of, known))}. "
            "Name them like these."
        )
    if len(set(keys.values())) < len(keys):
        raise ConfigError(
            f"follow: several tables are called like one of the target: {few(keys)}. Give a module as the target."
        )
    made = {name: _open(str(table_of(name)), target[key], known[name]) for name, key in keys.items()}
    return {
        name: _make(Path(given), known[name]) if given is not None else tensor for name, (tensor, given) in made.items()
    }


def _state_of_module(module: nn.Module) -> dict[str, Any]:
    state = flatten_state_dict({"model": module.state_dict()})[0]
    for name, value in state.items():
        if isinstance(value, ShardedTensor | DTensor):
            raise ConfigError(
                f"follow: {name} of the target is a {type(value).__name__}. Give a plain module, without "
                "DistributedModelParallel."
            )
        if isinstance(value, Tensor) and value.device.type != "cpu":
            raise ConfigError(
                f"follow: {name} of the target is on {value.device}. Give a module on the CPU, and copy from it."
            )
    return state


def _open(table: str, value: Any, of_tensor: TensorStorageMetadata) -> tuple[Tensor | None, Any]:
    """A tensor over the memory of a table's target, or where a file is to be made."""
    shape, dtype = tuple(of_tensor.size), of_tensor.properties.dtype
    if isinstance(value, str | os.PathLike):
        if not Path(value).exists():
            _numpy_dtype(table, dtype)
            return None, value
        value = open_npy(value, table, "follow", "r+")
    if isinstance(value, np.ndarray):
        if not value.flags.writeable:
            raise ConfigError(f"follow: the array for table {table} is read-only. Give one that can be written.")
        found = str(value.dtype)
        value = torch.from_numpy(value) if found == _numpy_dtype(table, dtype).name else value
    if not isinstance(value, Tensor | np.ndarray):
        raise ConfigError(
            f"follow: {type(value).__name__} for table {table}. Give the path of a .npy file, a NumPy array or a "
            "tensor."
        )
    if tuple(value.shape) != shape or value.dtype != dtype or not isinstance(value, Tensor):
        raise ConfigError(
            f"follow: table {table} is {shape} {dtype}, the target is {tuple(value.shape)} {value.dtype}. Give whole "
            "tables, [num_embeddings, embedding_dim], of the same dtype; or a .npy file that is not there yet."
        )
    if value.device.type != "cpu":
        raise ConfigError(f"follow: the tensor for table {table} is on {value.device}. Give one on the CPU.")
    return value.detach(), None


def _make(path: Path, of_tensor: TensorStorageMetadata) -> Tensor:
    dtype = _numpy_dtype(path.name, of_tensor.properties.dtype)
    try:
        made = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=tuple(of_tensor.size))
    except OSError as error:
        raise ConfigError(f"follow: {path} cannot be made ({error.strerror}). Name another place.") from error
    return torch.from_numpy(made)


def _numpy_dtype(table: str, dtype: torch.dtype) -> "np.dtype[Any]":
    try:
        return np.dtype(str(dtype).removeprefix("torch."))
    except TypeError:
        raise ConfigError(f"follow: table {table} is {dtype}, which NumPy does not have. Give a tensor.") from None
