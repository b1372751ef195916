# SPDX-License-Identifier: BSD-3-Clause
"""TorchRec's ModelDeltaTracker, served by what pools note of rows before they train."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchrec.distributed.model_tracker.model_delta_tracker import ModelDeltaTracker
from torchrec.distributed.model_tracker.types import TrackingMode, UniqueRows

from torchrec_scratchpipe.core.changes import TrainedRows
from torchrec_scratchpipe.core.pool import Pool
from torchrec_scratchpipe.errors import ConfigError
from torchrec_scratchpipe.sharding.collection import ScratchpadCollection

__all__ = ["ScratchPipeDeltaTracker"]

_FROM_FIRST = (TrackingMode.EMBEDDING, TrackingMode.MOMENTUM_DIFF, TrackingMode.ROWWISE_ADAGRAD)
_DIFFERENCES = (TrackingMode.MOMENTUM_DIFF, TrackingMode.ROWWISE_ADAGRAD)


class _Watched(NamedTuple):
    collection: ScratchpadCollection
    pool: Pool
    names: list[str]  # of its tables, in the state_dict, without `.weight`
    trained: TrainedRows


class ScratchPipeDeltaTracker(ModelDeltaTracker):
    """Which rows of scratchpad tables were trained since a consumer last asked, with what TorchRec tells of them.

    TorchRec's own tracker keeps the ids, and a copy of states, of every lookup until they are asked for. This one marks
    rows, 1 byte each, and keeps a state once per row. Answers are equal for what is trained; rows that are only looked
    up, in evaluation, are not among ours.

    Args:
        model: Sharded by DistributedModelParallel.
        consumers: Who asks; each has all rows since it last asked. Default: one, "default".
        mode: What is told of a row, as of TorchRec's `DeltaTrackerConfig.tracking_mode`. ID_ONLY: nothing. EMBEDDING:
            its weights before its first Train since then, of bags too. MOMENTUM_DIFF and ROWWISE_ADAGRAD: how much its
            first optimizer state, one number per row, has grown since then. MOMENTUM_LAST: the norm of its first
            optimizer state before its last Train.

    Raises:
        ConfigError: A table has no optimizer state of the kind that is asked for, or there is no scratchpad.

    Source:
        torchrec ModelDeltaTrackerTrec (1.6.1 to 1.9.2).
    """

    def __init__(
        self,
        model: nn.Module,
        consumers: Sequence[str] | None = None,
        mode: TrackingMode = TrackingMode.ID_ONLY,
    ) -> None:
        self._mode = mode
        self._modules = {
            _cleaned(name): part for name, part in model.named_modules() if isinstance(part, ScratchpadCollection)
        }
        if not any(collection.pools for collection in self._modules.values()):
            raise ConfigError("ScratchPipeDeltaTracker: no table of the model has a scratchpad on this rank.")
        self._watched = {
            consumer: [
                self._watch(name, collection, pool)
                for name, collection in self._modules.items()
                for pool in collection.pools
            ]
            for consumer in consumers or [self.DEFAULT_CONSUMER]
        }

    def get_unique_ids(self, consumer: str | None = None) -> dict[str, Tensor]:
        """Rows that were trained since this consumer last asked; by table, as TorchRec's. Waits for the device.

        Args:
            consumer: Who asks; default: "default".

        Returns:
            By name in the state_dict without `.weight`, row ids [N] int64 of this rank's part, ascending.

        Raises:
            ConfigError: There is no such consumer.
        """
        return {name: rows.ids for name, rows in self.get_unique(consumer).items()}

    def get_unique(
        self,
        consumer: str | None = None,
        top_percentage: float | None = 1.0,
        per_table_percentage: dict[str, tuple[float, str]] | None = None,
        sorted_by_indices: bool | None = True,
    ) -> dict[str, UniqueRows]:
        """As :meth:`get_unique_ids`, with what the mode tells of each row.

        Args:
            consumer: Who asks; default: "default".
            top_percentage: Accepted as by TorchRec's tracker, which does not use it.
            per_table_percentage: As `top_percentage`.
            sorted_by_indices: As `top_percentage`; rows are always ascending.

        Returns:
            By name in the state_dict without `.weight`: `ids` [N] int64, `states` [N, D], [N] or None.

        Raises:
            ConfigError: There is no such consumer.
        """
        found: dict[str, UniqueRows] = {}
        for watched in self._of(consumer):
            with watched.collection.between_batches():
                rows, values = watched.trained.take()
                if self._mode in _DIFFERENCES and values is not None:
                    values = watched.pool.read_some(rows.cpu())[1].to(values.device) - values
            offsets = watched.pool.host_table.row_offsets
            bounds = torch.searchsorted(rows, torch.tensor(offsets, dtype=torch.int64, device=rows.device)).tolist()
            for name, offset, first, last in zip(watched.names, offsets, bounds, bounds[1:], strict=False):
                # Column-wise shards of one table have the same rows; TorchRec's tells of the first.
                if first < last and name not in found:
                    some = None if values is None else values[first:last]
                    found[name] = UniqueRows(rows[first:last] - offset, some)
        return found

    def clear(self, consumer: str | None = None) -> None:
        """Forget what was trained.

        Args:
            consumer: For whom; default: for all.

        Raises:
            ConfigError: There is no such consumer.
        """
        for name in self._watched if consumer is None else [consumer]:
            for watched in self._of(name):
                watched.trained.take()

    def record_lookup(self, kjt: Any, states: Any, emb_module: Any = None, raw_ids: Any = None) -> None:
        """Nothing: pools note what is trained; TorchRec's collections need not call this.

        Args:
            kjt: As TorchRec's.
            states: As TorchRec's.
            emb_module: As TorchRec's.
            raw_ids: As TorchRec's.
        """

    def get_tracked_modules(self) -> dict[str, nn.Module]:
        """Collections with a scratchpad, by name; as TorchRec's."""
        return dict(self._modules)  # type: ignore[arg-type]  # they are modules, too

    def _of(self, consumer: str | None) -> list[_Watched]:
        name = consumer or self.DEFAULT_CONSUMER
        if name not in self._watched:
            raise ConfigError(f"consumer {name!r} is not known. Name one of {', '.join(self._watched)}.")
        return self._watched[name]

    def _watch(self, module_name: str, collection: ScratchpadCollection, pool: Pool) -> _Watched:
        layout, table = pool.host_table.layout, pool.host_table
        if self._mode in (*_DIFFERENCES, TrackingMode.MOMENTUM_LAST):
            is_there = layout.states and (self._mode is TrackingMode.MOMENTUM_LAST or layout.states[0].is_rowwise)
            if not is_there:
                names = ", ".join(spec.name for spec in table.tables)
                raise ConfigError(
                    f"tables {names}: mode {self._mode.value} needs an optimizer state"
                    f"{' of one number per row' if layout.states else ''}. Use another optimizer or mode."
                )
        trained = TrainedRows(
            table.num_rows, pool.slot_map.device, _REMEMBERED[self._mode], is_first=self._mode in _FROM_FIRST
        )
        with collection.between_batches():
            pool.watchers.append(trained)
        kind = "embedding_bags" if hasattr(collection, "embedding_bags") else "embeddings"
        names_of_tables = [f"{module_name}.{kind}.{spec.name}".lstrip(".") for spec in table.tables]
        return _Watched(collection, pool, names_of_tables, trained)


def _first_state(parts: Sequence[Tensor], slots: Tensor) -> Tensor:
    return parts[1].index_select(0, slots)


def _norm_of_first_state(parts: Sequence[Tensor], slots: Tensor) -> Tensor:
    return parts[1].index_select(0, slots).view(slots.numel(), -1).norm(dim=1)


_REMEMBERED: dict[TrackingMode, Callable[[Sequence[Tensor], Tensor], Tensor] | None] = {
    TrackingMode.ID_ONLY: None,
    TrackingMode.EMBEDDING: lambda parts, slots: parts[0].index_select(0, slots),
    TrackingMode.MOMENTUM_DIFF: _first_state,
    TrackingMode.ROWWISE_ADAGRAD: _first_state,
    TrackingMode.MOMENTUM_LAST: _norm_of_first_state,
}


def _cleaned(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("_dmp_wrapped_module", "module"))
