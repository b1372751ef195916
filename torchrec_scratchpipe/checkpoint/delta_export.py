# SPDX-License-Identifier: BSD-3-Clause
"""Writes the rows that a delta log has since a batch into one safetensors file per table.

Shapes: ``N`` rows that have changed, ``D`` row width.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchrec_scratchpipe.checkpoint.delta_chain import LOG_DIRECTORY, Chain, DeltaSet, RankRecord
from torchrec_scratchpipe.checkpoint.delta_files import Block, Entry, PoolSchema
from torchrec_scratchpipe.checkpoint.delta_load import logged_names
from torchrec_scratchpipe.checkpoint.table_names import table_of
from torchrec_scratchpipe.errors import CheckpointMismatchError, CheckpointSaveError, ConfigError

__all__ = ["export_delta"]

STEPS_NAMED = 12  # in a message


def export_delta(directory: Path, since: int, path: str | os.PathLike[str] | None = None) -> Path:
    """Write the rows that were trained or reset after a batch, by this process alone.

    Args:
        directory: Of the checkpoints.
        since: A step that the log leads on from.
        path: A directory that is not there yet; default: beside the checkpoints.

    Returns:
        The directory.

    Raises:
        CheckpointMismatchError: The log does not lead on from `since`, or is damaged.
        CheckpointSaveError: The files cannot be written, or the directory is there already.
        ConfigError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ConfigError("export_delta: needs safetensors. pip install safetensors.") from error
    chain = Chain.read(directory)
    try:
        sets = _sets_since(chain, since)
        for delta_set in sets:
            for reader, record in delta_set.records:
                reader.check(record)
        step = sets[-1].step if sets else since
        target = Path(path).absolute() if path is not None else directory / f"delta_{since:012d}_{step:012d}"
        if target.exists():
            raise CheckpointSaveError(f"{target}: is there already. Delete it, or give another path.")
        temporary = target.with_name(f".{target.name}.unfinished")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            tables = {}
            for name, file_name in _file_names(sets).items():
                table = _Table.of(name, sets)
                tensors = table.read(sets)
                save_file(tensors, temporary / f"{file_name}.safetensors")
                tables[file_name] = {"rows": tensors["rows"].numel(), "num_embeddings": table.size[0]}
            facts = {"since": since, "step": step, "tables": tables}
            (temporary / "delta.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
            temporary.rename(target)
        except OSError as error:
            raise CheckpointSaveError(
                f"{target}: cannot be written ({error}). Free space, or give another path."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target
    finally:
        chain.close()


def _sets_since(chain: Chain, since: int) -> list[DeltaSet]:
    sets: list[DeltaSet] = []
    for delta_set in reversed(chain.sets):
        if sets and sets[-1].since > delta_set.step:
            break  # what was between is deleted
        sets.append(delta_set)
    sets.reverse()
    steps = [*([sets[0].since] if sets else chain.begins), *(delta_set.step for delta_set in sets)]
    if since in steps:
        return [delta_set for delta_set in sets if delta_set.step > since]
    named = [str(step) for step in steps]
    if len(named) > STEPS_NAMED:
        named[STEPS_NAMED // 2 : -STEPS_NAMED // 2] = ["..."]
    raise CheckpointMismatchError(
        f"{chain.directory / LOG_DIRECTORY}: does not lead on from step {since}. Steps that it leads on from: "
        f"{', '.join(named) or 'none'}. Give one of them."
    )


def _file_names(sets: Sequence[DeltaSet]) -> dict[str, str]:
    """By the name of a table's weights in the flat state."""
    names = sorted(name for name in logged_names(sets) if name.startswith("model.") and table_of(name))
    counts = Counter(map(table_of, names))  # two collections may have a table of the same name
    return {
        name: str(table_of(name)) if counts[table_of(name)] == 1 else name.removesuffix(".weight") for name in names
    }


class _Place(NamedTuple):
    """Rows of a pool that are rows of a table."""

    entry: Entry  # of the weights
    parts: dict[str, int]  # of the weights, and of each optimizer state

    def rows(self, ids: Tensor) -> tuple[slice, Tensor]:
        """Which of a block's rows these are, and their ids in the table, int64."""
        first = self.entry.first_row
        bounds = torch.tensor([first, first + self.entry.num_rows], dtype=ids.dtype)
        begin, end = torch.searchsorted(ids, bounds).tolist()
        return slice(begin, end), ids[begin:end].long() + (self.entry.offsets[0] - first)


class _Table(NamedTuple):
    """A table, whatever ranks and sharding it was trained on."""

    name: str  # of the weights in the flat state
    size: tuple[int, ...]
    places: dict[PoolSchema, list[_Place]]

    @classmethod
    def of(cls, name: str, sets: Sequence[DeltaSet]) -> "_Table":
        """By the name of its weights in the flat state."""
        places: dict[PoolSchema, list[_Place]] = {}
        size: tuple[int, ...] = ()
        prefix = f"optimizer.state.{name.removeprefix('model.')}."
        schemas = {record.segment.schema for delta_set in sets for record in delta_set.records}
        for pool in {pool for schema in schemas for pool in schema.pools}:
            for entry in pool.entries:
                if entry.name == name:
                    size = entry.size
                    states = {
                        other.name.removeprefix(prefix).removeprefix(f"{table_of(name)}."): other.part
                        for other in pool.entries
                        if other.name.startswith(prefix) and other.first_row == entry.first_row
                    }
                    parts = {"weight": entry.part, **states}
                    places.setdefault(pool, []).append(_Place(entry, parts))
        return cls(name, size, places)

    def read(self, sets: Sequence[DeltaSet]) -> dict[str, Tensor]:
        """The rows that have changed, each once, with their newest values. Raises CheckpointMismatchError."""
        # 1. Which they are.
        found = [
            place.rows(reader.row_ids(block))[1] for reader, block, places in self._blocks(sets) for place in places
        ]
        rows = torch.cat(found).unique() if found else torch.empty(0, dtype=torch.int64)
        # 2. Their values; later ones over earlier ones.
        columns = sorted({place.entry.offsets[1] for places in self.places.values() for place in places})
        tensors = self._empty(len(rows), len(columns))
        is_there = torch.zeros(len(rows), self.size[1] if len(columns) > 1 else 0, dtype=torch.bool)
        for reader, block, places in self._blocks(sets):
            ids, values = reader.rows(block, is_checked=True)
            for place in places:
                some, table_rows = place.rows(ids)
                index = torch.searchsorted(rows, table_rows)
                first = place.entry.offsets[1]
                for name, part in place.parts.items():
                    value, out = values[part][some], tensors[name]
                    if value.dim() == 2:
                        out = out[:, first : first + value.shape[1]]
                    elif len(columns) > 1:
                        out = out[:, columns.index(first)]
                    out.index_copy_(0, index, value)
                is_there[:, first : first + values[place.entry.part].shape[1]].index_fill_(0, index, True)
        if not is_there.all():
            raise CheckpointMismatchError(
                f"{self.name}: row {int(rows[~is_there.all(1)][0])} has changed in some of its columns only, because "
                "one shard of it was written by hand. Export from a step before that, or save a checkpoint."
            )
        return {"rows": rows, **tensors}

    def _empty(self, num_rows: int, num_column_shards: int) -> dict[str, Tensor]:
        made = {}
        for pool, places in self.places.items():
            for name, part in places[0].parts.items():
                dtype, num_columns = pool.parts[part]
                width = (self.size[1],) if num_columns else (num_column_shards,) * (num_column_shards > 1)
                made[name] = torch.zeros(num_rows, *width, dtype=getattr(torch, dtype))
        return made

    def _blocks(self, sets: Sequence[DeltaSet]) -> Iterator[tuple[Any, Block, list[_Place]]]:
        for delta_set in sets:
            for of_rank in delta_set.records:
                yield from self._blocks_of(of_rank)

    def _blocks_of(self, of_rank: RankRecord) -> Iterator[tuple[Any, Block, list[_Place]]]:
        for block in of_rank.record.row_blocks:
            places = self.places.get(of_rank.segment.schema.pools[block.pool])
            if places:
                yield of_rank.reader, block, places
