# SPDX-License-Identifier: BSD-3-Clause
"""Lookahead scratchpad for TorchRec: tables in host memory, the rows of coming batches on the device, the same bits."""

from torchrec_scratchpipe._version import __version__
from torchrec_scratchpipe.checkpoint.delta_tracker import ScratchPipeDeltaTracker
from torchrec_scratchpipe.checkpoint.export import to_stock
from torchrec_scratchpipe.checkpoint.follow import Follower, Lag, follow
from torchrec_scratchpipe.checkpoint.loading import load_checkpoint
from torchrec_scratchpipe.checkpoint.manager import Checkpoint, CheckpointManager
from torchrec_scratchpipe.checkpoint.warm_start import warm_start
from torchrec_scratchpipe.core.rows import Stage, StageSpan
from torchrec_scratchpipe.core.stats import PoolStats, TableStats
from torchrec_scratchpipe.errors import (
    BackwardTwiceError,
    BatchesInFlightError,
    CheckpointMismatchError,
    CheckpointSaveError,
    ConfigError,
    DataError,
    IdOutOfRangeError,
    MeasurementError,
    PeerFailedError,
    PrivacyError,
    ScratchpadFullError,
    ScratchPipeError,
    StageFailedError,
    TableOverwrittenError,
    TableStorageError,
)
from torchrec_scratchpipe.monitoring.advice import Advice
from torchrec_scratchpipe.monitoring.monitor import ScratchPipeMonitor
from torchrec_scratchpipe.planning.planner import ScratchPipeShardingPlanner
from torchrec_scratchpipe.planning.plot import plot_plan
from torchrec_scratchpipe.planning.report import PlanReport
from torchrec_scratchpipe.planning.working_set import WorkingSet, WorkingSets, measure_working_set, zipf_working_sets
from torchrec_scratchpipe.privacy.lazy_dp import LazyDP
from torchrec_scratchpipe.privacy.sampling import PoissonSampler
from torchrec_scratchpipe.sharding.collection import (
    ShardedScratchPipeEmbeddingBagCollection,
    ShardedScratchPipeEmbeddingCollection,
)
from torchrec_scratchpipe.sharding.model import scratchpad_stats, stage_spans
from torchrec_scratchpipe.sharding.pipeline import ScratchPipeTrainPipeline
from torchrec_scratchpipe.sharding.sharder import (
    ScratchPipeEmbeddingBagCollectionSharder,
    ScratchPipeEmbeddingCollectionSharder,
)

__all__ = [
    "Advice",
    "BackwardTwiceError",
    "BatchesInFlightError",
    "Checkpoint",
    "CheckpointManager",
    "CheckpointMismatchError",
    "CheckpointSaveError",
    "ConfigError",
    "DataError",
    "Follower",
    "IdOutOfRangeError",
    "Lag",
    "LazyDP",
    "MeasurementError",
    "PeerFailedError",
    "PlanReport",
    "PoissonSampler",
    "PoolStats",
    "PrivacyError",
    "ScratchPipeDeltaTracker",
    "ScratchPipeEmbeddingBagCollectionSharder",
    "ScratchPipeEmbeddingCollectionSharder",
    "ScratchPipeError",
    "ScratchPipeMonitor",
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
    "follow",
    "load_checkpoint",
    "measure_working_set",
    "plot_plan",
    "scratchpad_stats",
    "stage_spans",
    "to_stock",
    "warm_start",
    "zipf_working_sets",
]
