# SPDX-License-Identifier: BSD-3-Clause
"""One kernel group's share of a batch: what it looks up, what was planned for it, and how far it is. Data only.

Shapes: ``I`` ids, ``F`` features.
"""

import enum
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_scratchpipe.core.disk_rows import RowsAhead
from torchrec_scratchpipe.core.pool import Pool
from torchrec_scratchpipe.core.slot_map import CachePlan, PoolIds
from torchrec_scratchpipe.core.slot_ops import FeatureIds, FeatureRows
from torchrec_scratchpipe.errors import IdOutOfRangeError

__all__ = ["Batch", "BatchState", "FeatureSource", "check_ids", "feature_rows"]


class BatchState(enum.Enum):
    """How far a batch is. It may be dropped, and so RELEASED, at any time."""

    SUBMITTED = "submitted"  # nothing is known of it
    SEEN = "seen"  # its ids guide the choice of victims, and it holds no slots
    READY = "ready"  # its rows are in their slots, or the device is bringing them
    TRAINING = "training"  # Train reads its slots
    RELEASED = "released"  # its slots may be given away
    FAILED = "failed"  # a stage failed: its Train raises the error


class FeatureSource(NamedTuple):
    """Where the ids of one feature look up their rows."""

    feature_name: str
    pool_index: int | None  # None if its table is kept whole: rows are where their ids say
    table_index: int


class Batch:
    """One batch, on which a :class:`~torchrec_scratchpipe.core.runner.StageRunner` acts; data, and no actions.

    It holds its slots until it is released. `let_go` releases a batch that nobody owns any more.
    """

    state = BatchState.RELEASED  # until it is whole: Ctrl-C may come before

    def __init__(
        self,
        pools: Sequence[Pool],
        features: Sequence[FeatureSource],
        ids: FeatureIds,
        rows_of_features: Sequence[FeatureRows],
        let_go: Callable[["Batch"], None],
    ) -> None:
        self.pools = pools
        self.features = features
        self.ids = ids
        self.num_ids = ids.ids.numel()  # I
        self.is_only_seen = False  # another batch, of the same ids, will be planned in its place
        self.seen_as: Batch | None = None  # in whose place this one will be planned
        self.error: BaseException | None = None
        self.pool_ids = [PoolIds(ids, rows) for rows in rows_of_features]
        self.tickets: list[int | None] = [None] * len(pools)  # from SlotMap.see
        self.asked: list[Future[RowsAhead] | None] = [None] * len(pools)  # rows on a disk, until Collect
        self.plans: list[CachePlan] = []  # of the first pools, in their order
        self.held: deque[tuple[Pool, CachePlan]] = deque()  # what is still to be released
        self.inserted: torch.Event | None = None
        self.waits_for_slots = False  # or has, once
        self.train_start_s: float | None = None
        self.train_stream: torch.Stream | None = None
        self.let_go = let_go
        self.state = BatchState.SUBMITTED

    @property
    def is_pending(self) -> bool:
        """Whether its stages have not run yet."""
        return self.state in (BatchState.SUBMITTED, BatchState.SEEN)

    @property
    def is_released(self) -> bool:
        """Whether it has let go of its slots, or will as soon as it gets some."""
        return self.state is BatchState.RELEASED

    @property
    def has_whole_tables(self) -> bool:
        """Whether a feature looks up a table that is kept whole."""
        return any(feature.pool_index is None for feature in self.features)

    @property
    def slots(self) -> Tensor:
        """[I] int64, the slot of each id, in the pool of its feature; for a table that is kept whole, the id."""
        return self.plans[0].slots[: self.num_ids]

    def forget_ids(self) -> None:
        """Nothing is needed any more of a batch that is only seen, but its tickets."""
        self.ids = FeatureIds(self.ids.ids.new_empty(0), self.ids.bounds.new_empty(0))
        self.pool_ids = []

    def take_over(self) -> None:
        """Be planned in the place of the batch of the same ids that was seen, if it was."""
        seen, self.seen_as = self.seen_as, None
        # Its ids are forgotten last of all, so that it is known by then.
        if seen is not None and not seen.pool_ids and seen.num_ids == self.num_ids and self.is_pending:
            self.tickets, seen.tickets = seen.tickets, [None] * len(seen.tickets)
            self.state = BatchState.SEEN

    def find_bad_id(self, position: int) -> IdOutOfRangeError | None:
        """The error for an id that is out of range."""
        bounds = self.ids.bounds.tolist()
        for feature, first, last in zip(self.features, bounds[:-1], bounds[1:], strict=True):
            if feature.pool_index is not None and first < position <= last:
                table = self.pools[feature.pool_index].host_table.tables[feature.table_index]
                try:
                    check_ids(table.name, feature.feature_name, self.ids.ids[first:last], table.num_rows)
                except IdOutOfRangeError as error:
                    return error
        return None

    def __del__(self) -> None:
        if not self.is_released:
            self.let_go(self)


def feature_rows(
    pools: Sequence[Pool], features: Sequence[FeatureSource], device: torch.device
) -> tuple[FeatureRows, ...]:
    """Where each feature of a kernel group looks up, as the device reads it."""
    rows = []
    for pool_index, pool in enumerate(pools):
        table = pool.host_table
        indices = [feature.table_index if feature.pool_index == pool_index else -1 for feature in features]
        first_rows = [table.row_offsets[max(0, index)] for index in indices]
        nums_rows = [table.tables[max(0, index)].num_rows for index in indices]
        rows.append(
            FeatureRows(
                torch.tensor(first_rows, dtype=torch.int64, device=device),
                torch.tensor(nums_rows, dtype=torch.int64, device=device),
                torch.tensor(indices, dtype=torch.int32, device=device),
            )
        )
    return tuple(rows)


def check_ids(table_name: str, feature_name: str, ids: Tensor, num_rows: int) -> None:
    """Refuse ids, [I] int32 or int64, that point outside a table. Waits for a device. Raises IdOutOfRangeError."""
    if ids.numel() == 0:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= num_rows:
        raise IdOutOfRangeError(
            f"table {table_name}: feature {feature_name} has id {low if low < 0 else high}, there are rows "
            f"[0, {num_rows}). Hash the ids into the table's num_embeddings, or raise num_embeddings."
        )
