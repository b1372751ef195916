# SPDX-License-Identifier: BSD-3-Clause
"""What a row consists of, and the words that the stages hand to each other.

Reads and writes whole rows, whose parts lie in several tensors.

Shapes: ``M`` misses, ``V`` victims, ``N`` rows moved, ``D`` row width.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "RowLayout",
    "Stage",
    "StageSpan",
    "StagedRows",
    "StateSpec",
    "TableSpec",
    "TimedStage",
    "read_rows",
    "write_rows",
]


class Stage(enum.StrEnum):
    """The paper's stages, in order; the value is the name in profiler traces and reports."""

    PLAN = "plan"
    COLLECT = "collect"
    EXCHANGE = "exchange"
    INSERT = "insert"
    TRAIN = "train"


@dataclass(frozen=True)
class TableSpec:
    """One table's local shard, as a pool sees it."""

    name: str
    num_rows: int
    load_factor: float


@dataclass(frozen=True)
class StateSpec:
    """One optimizer state that travels with its row: a scalar per row, or one value per weight."""

    name: str
    is_rowwise: bool
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class RowLayout:
    """What one row consists of: the embedding vector, then its optimizer states."""

    dim: int
    dtype: torch.dtype
    states: tuple[StateSpec, ...] = ()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, optimizer states included."""
        return self.dim * self.dtype.itemsize + sum(
            (1 if state.is_rowwise else self.dim) * state.dtype.itemsize for state in self.states
        )

    def part_shapes(self, num_rows: int) -> list[tuple[tuple[int, ...], torch.dtype, str]]:
        """Shape, dtype and name of each part of `num_rows` rows, weights first."""
        parts: list[tuple[tuple[int, ...], torch.dtype, str]] = [((num_rows, self.dim), self.dtype, "weights")]
        for state in self.states:
            shape = (num_rows,) if state.is_rowwise else (num_rows, self.dim)
            parts.append((shape, state.dtype, state.name))
        return parts

    def empty(self, num_rows: int, *, pin_memory: bool = False) -> list[Tensor]:
        """Uninitialised host memory for `num_rows` rows, one tensor per part."""
        return [
            torch.empty(shape, dtype=dtype, pin_memory=pin_memory) for shape, dtype, _ in self.part_shapes(num_rows)
        ]


class StagedRows(NamedTuple):
    """Rows on their way between table and scratchpad; one tensor per part of a row."""

    fill: list[Tensor]  # [M, ...] from the table to the scratchpad
    writeback: list[Tensor]  # [V, ...] from the scratchpad to the table


class TimedStage(NamedTuple):
    """When one stage of a batch ran, by the host's clock, before it is known how many rows it moved."""

    stage: Stage
    start_s: float  # time.perf_counter()
    end_s: float
    moved: tuple[int, ...]  # which of the plan's counts say how many


class StageSpan(NamedTuple):
    """When one stage of one batch ran, by the host's clock, and how much it moved.

    On a CUDA device all are timed as they are issued, not as they run. Where it moves rows in place, COLLECT is the
    whole way of the victims and INSERT that of the misses, each with its own bytes. Elsewhere bytes are those of both
    directions. The spans of a batch are there once its Train has begun.
    """

    batch_index: int  # the pool's own count, which evaluation advances too
    stage: Stage
    start_s: float  # time.perf_counter()
    end_s: float
    num_bytes: int


def read_rows(parts: Sequence[Tensor], index: Tensor, out: Sequence[Tensor]) -> None:
    """Copy rows out of a table or scratchpad; `out` may be on another device than `parts` and `index`.

    Shapes: `parts` [R, D] or [R], `index` [N] int64, `out` [N, D] or [N].
    """
    for part, target in zip(parts, out, strict=True):
        if part.device == target.device:
            torch.index_select(_wide(part), 0, index, out=_wide(target))
        else:
            target.copy_(part.index_select(0, index))


def write_rows(parts: Sequence[Tensor], index: Tensor, values: Sequence[Tensor]) -> None:
    """Copy rows into a table or scratchpad.

    Shapes: `parts` [R, D] or [R], `index` [N] int64, `values` [N, D] or [N].
    """
    for part, source in zip(parts, values, strict=True):
        _wide(part).index_copy_(0, index, _wide(source))


def _wide(part: Tensor) -> Tensor:
    # Eight bytes at a time: index_copy_ of 20,000 rows of 64 floats took 1.85 ms instead of 2.43 ms (one core of
    # an AMD EPYC, torch 2.13).
    if part.device.type == "cpu" and part.dim() == 2 and part.shape[1] * part.dtype.itemsize % 8 == 0:
        return part.view(torch.float64)
    return part
