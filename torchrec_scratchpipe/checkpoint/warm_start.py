# SPDX-License-Identifier: BSD-3-Clause
"""Fills tables of a sharded model from files or tensors, some rows at a time."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from torchrec_scratchpipe.checkpoint.ranks import Ranks
from torchrec_scratchpipe.checkpoint.table_names import few, match_of, open_npy, table_of
from torchrec_scratchpipe.errors import ConfigError
from torchrec_scratchpipe.sharding.model import scratchpad_collections

__all__ = ["warm_start"]

COPY_BYTES = 32 * 1024 * 1024  # read at a time

Rows = Any  # what slices by [rows, columns]: Tensor, NumPy array (also memory-mapped), slice of a safetensors file


def warm_start(
    model: nn.Module,
    source: Mapping[str, "Tensor | np.ndarray[Any, Any] | str | os.PathLike[str]"] | str | os.PathLike[str],
) -> list[str]:
    """Overwrite weights of tables; each rank reads its own rows and columns, 32 MiB at a time. Optimizer states stay.

    All ranks call it.

    Args:
        model: A model of DistributedModelParallel, or a sharded collection; tables may use any kernel.
        source: Weights [num_embeddings, embedding_dim] by table name, or by a name that ends in `<table>.weight`, as in
            a stock `state_dict()`: tensors, arrays or `.npy` files. Or a file of such: `.safetensors`, or `.pt` with
            tensors alone.

    Returns:
        The tables that were filled; others keep their weights.

    Raises:
        ConfigError: No table has a match, several tensors match one, or a shape or a file is wrong; nothing was
            written.
    """
    for collection in scratchpad_collections(model):
        for pool in collection.pools:
            pool.host_table.wait_for_snapshots()
    tables = {name: value for name, value in model.state_dict().items() if table_of(name) is not None}
    with ExitStack() as files:
        rows = Ranks().each_or_fail(lambda: _find_rows(source, tables, files), ConfigError)
        for name, value in rows.items():
            for target, first_row, first_column in _local_parts(tables[name]):
                _copy(value, target, first_row, first_column)
    return sorted(str(table_of(name)) for name in rows)


def _find_rows(source: Any, tables: dict[str, Any], files: ExitStack) -> dict[str, Rows]:
    """By the name of the table's weights in the state_dict."""
    found = _open(source, files) if isinstance(source, str | os.PathLike) else dict(source)
    matches = {
        name: match for name in tables if (match := match_of(str(table_of(name)), found, "warm_start")) is not None
    }
    if not matches:
        known = ", ".join(sorted(str(table_of(name)) for name in tables)[:5])
        raise ConfigError(
            f"warm_start: none of {few(found)} is a table. Name them like tables ({known}) or like a stock state_dict."
        )
    rows = {name: _rows(str(table_of(name)), found[match]) for name, match in matches.items()}
    for name, value in rows.items():
        shape = tuple(value.get_shape() if hasattr(value, "get_shape") else value.shape)
        if shape != tuple(tables[name].shape):
            raise ConfigError(
                f"warm_start: table {table_of(name)} is {tuple(tables[name].shape)}, {matches[name]!r} is {shape}. "
                "Give weights of the whole table, [num_embeddings, embedding_dim]."
            )
        list(_local_parts(tables[name]))  # or it raises
    return rows


def _open(path: str | os.PathLike[str], files: ExitStack) -> dict[str, Rows]:
    suffix = Path(path).suffix
    try:
        if suffix == ".safetensors":
            try:
                from safetensors import safe_open
            except ImportError as error:
                raise ConfigError(f"warm_start: {path} needs safetensors. pip install safetensors.") from error
            opened = files.enter_context(safe_open(path, framework="pt"))
            return {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        if suffix in {".pt", ".pth"}:
            loaded = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
            if isinstance(loaded, dict):
                return {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    except ConfigError:
        raise
    except Exception as error:  # each library has errors of its own for what is missing or damaged
        raise ConfigError(f"warm_start: {path} cannot be read ({type(error).__name__}: {error}).") from error
    raise ConfigError(
        f"warm_start: {path} is no .safetensors file and no .pt file with a dict of tensors. Give a .npy file by "
        "table: {'t0': 't0.npy'}."
    )


def _rows(table: str, value: Any) -> Rows:
    if isinstance(value, str | os.PathLike):
        value = open_npy(value, table, "warm_start")
    value = value.detach() if isinstance(value, Tensor) else value
    dtype = str(getattr(value, "dtype", "")) or (value.get_dtype() if hasattr(value, "get_dtype") else "")
    if not dtype or "complex" in dtype:
        raise ConfigError(
            f"warm_start: {dtype or type(value).__name__} for table {table}. Give real numbers: a tensor, a NumPy "
            "array, or the path of a .npy file."
        )
    return value


def _local_parts(value: Any) -> Iterator[tuple[Tensor, int, int]]:
    """Parts of a table on this rank, and the row and column where each begins."""
    if isinstance(value, ShardedTensor):
        for shard in value.local_shards():
            yield shard.tensor, shard.metadata.shard_offsets[0], shard.metadata.shard_offsets[1]
    elif type(value) in (Tensor, nn.Parameter):
        yield value.detach(), 0, 0
    else:
        raise ConfigError(f"warm_start: a table is sharded as {type(value).__name__}, which is not supported.")


def _copy(source: Rows, target: Tensor, first_row: int, first_column: int) -> None:
    num_rows, num_columns = target.shape
    step = max(1, COPY_BYTES // max(1, num_columns * 8))
    for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        block = source[first_row + first : first_row + last, first_column : first_column + num_columns]
        target[first:last].copy_(torch.from_numpy(np.array(block)) if isinstance(block, np.ndarray) else block)
