# SPDX-License-Identifier: BSD-3-Clause
"""Lookahead scratchpad for TorchRec: tables in host memory, the rows of coming batches on the device, the same bits."""

from torchrec_scratchpipe._version import __version__
from torchrec_scratchpipe.checkpoint import Checkpoint, CheckpointManager, load_checkpoint
from torchrec_scratchpipe.collection import scratchpad_stats, stage_spans
from torchrec_scratchpipe.errors import (
    BackwardTwiceError,
    BatchesInFlightError,
    CheckpointMismatchError,
    CheckpointSaveError,
    ConfigError,
    IdOutOfRangeError,
    MeasurementError,
    PeerFailedError,
    ScratchpadFullError,
    ScratchPipeError,
    StageFailedError,
    TableOverwrittenError,
    TableStorageError,
)
from torchrec_scratchpipe.pipeline import ScratchPipeTrainPipeline
from torchrec_scratchpipe.plan_plot import plot_plan
from torchrec_scratchpipe.plan_report import PlanReport
from torchrec_scratchpipe.sharder import (
    ScratchPipeEmbeddingBagCollectionSharder,
    ScratchPipeEmbeddingCollectionSharder,
    ShardedScratchPipeEmbeddingBagCollection,
    ShardedScratchPipeEmbeddingCollection,
)
from torchrec_scratchpipe.sharding_planner import ScratchPipeShardingPlanner
from torchrec_scratchpipe.stats import PoolStats, TableStats
from torchrec_scratchpipe.stock import to_stock
from torchrec_scratchpipe.table_sources import warm_start
from torchrec_scratchpipe.types import Stage, StageSpan
from torchrec_scratchpipe.working_set import WorkingSet, WorkingSets, measure_working_set, zipf_working_sets

__all__ = [
    "BackwardTwiceError",
    "BatchesInFlightError",
    "Checkpoint",
    "CheckpointManager",
    "CheckpointMismatchError",
    "CheckpointSaveError",
    "ConfigError",
    "IdOutOfRangeError",
    "MeasurementError",
    "PeerFailedError",
    "PlanReport",
    "PoolStats",
    "ScratchPipeEmbeddingBagCollectionSharder",
    "ScratchPipeEmbeddingCollectionSharder",
    "ScratchPipeError",
    "ScratchPipeShardingPlanner",
    "ScratchPipeTrainPipeline",
    "ScratchpadFullError",
    "ShardedScratchPipeEmbeddingBagCollection",
    "ShardedScratchPipeEmbeddingCollection",
    "Stage",
    "StageFailedError",
    "StageSpan",
    "TableOverwrittenError",
    "TableStats",
    "TableStorageError",
    "WorkingSet",
    "WorkingSets",
    "__version__",
    "load_checkpoint",
    "measure_working_set",
    "plot_plan",
    "scratchpad_stats",
    "stage_spans",
    "to_stock",
    "warm_start",
    "zipf_working_sets",
]
