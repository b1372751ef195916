# SPDX-License-Identifier: BSD-3-Clause
"""Lookahead scratchpad for TorchRec: tables in host memory, the rows of coming batches on the device, the same bits."""

from torchrec_scratchpipe._version import __version__
from torchrec_scratchpipe.collection import scratchpad_stats, stage_spans
from torchrec_scratchpipe.errors import (
    BackwardTwiceError,
    BatchesInFlightError,
    ConfigError,
    IdOutOfRangeError,
    ScratchpadFullError,
    ScratchPipeError,
    StageFailedError,
    TableOverwrittenError,
    TableStorageError,
)
from torchrec_scratchpipe.pipeline import ScratchPipeTrainPipeline
from torchrec_scratchpipe.sharder import (
    ScratchPipeEmbeddingBagCollectionSharder,
    ScratchPipeEmbeddingCollectionSharder,
    ShardedScratchPipeEmbeddingBagCollection,
    ShardedScratchPipeEmbeddingCollection,
)
from torchrec_scratchpipe.sharding_planner import ScratchPipeShardingPlanner
from torchrec_scratchpipe.stats import PoolStats, TableStats
from torchrec_scratchpipe.types import Stage, StageSpan

__all__ = [
    "BackwardTwiceError",
    "BatchesInFlightError",
    "ConfigError",
    "IdOutOfRangeError",
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
    "__version__",
    "scratchpad_stats",
    "stage_spans",
]
