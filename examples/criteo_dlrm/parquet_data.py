# SPDX-License-Identifier: BSD-3-Clause
"""Batches for the Criteo DLRM example from Parquet files, as `torchrec-scratchpipe data criteo_to_parquet` writes them.

Shapes: ``B`` samples of a batch.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from data import FEATURE_NAMES, NUM_SPARSE, VALIDATION_SHARE, Share, hash_values, make_batch
from torchrec.datasets.utils import Batch

from torchrec_scratchpipe.data import ParquetBatches
from torchrec_scratchpipe.data.criteo import DENSE_NAMES, LABEL


class CriteoParquet:
    """Samples from Parquet files; on one rank, the batches of :class:`data.CriteoTsv` to the bit.

    The last tenth is for validation. With several ranks, each has a contiguous part of the samples, where the TSV gives
    each every so many batches; no sample is left out.

    Args:
        paths: Files, directories, globs or URLs.
        num_embeddings: Rows of each of the 26 tables.
        batch_size: B.
        share: This rank's part.
        num_readers: Threads that read ahead.
        is_raw: Values as they are, of 32 bits, in place of rows.

    Raises:
        DataError: A file is missing, damaged or has other columns, or there are too few samples.
    """

    def __init__(
        self,
        paths: Sequence[str],
        num_embeddings: Sequence[int],
        batch_size: int,
        share: Share,
        num_readers: int = 1,
        *,
        is_raw: bool = False,
    ) -> None:
        self._is_raw = is_raw
        self._num_embeddings = np.asarray(num_embeddings, dtype=np.uint64)[:, None]
        settings: dict[str, Any] = {
            "label": LABEL,
            "dense": DENSE_NAMES,
            "sparse": FEATURE_NAMES,
            "batch_size": batch_size,
            "rank": share.rank,
            "world_size": share.world_size,
            "num_readers": num_readers,
            "dense_transform": "log1p",
            "fill_missing": 0,  # as in the TSV, a missing value is 0 before it is hashed
        }
        num_samples = ParquetBatches(paths, **settings).num_rows
        num_train = num_samples - int(num_samples * VALIDATION_SHARE)
        self._train = ParquetBatches(paths, **settings, rows=(0, num_train))
        self._first = self._train.state_dict(0)
        self.num_train_batches, self.num_val_batches = len(self._train), 0
        if num_samples - num_train >= share.world_size:
            self._val = ParquetBatches(paths, **settings, rows=(num_train, num_samples))
            self._first_val = self._val.state_dict(0)
            self.num_val_batches = len(self._val)

    def train(self, first_batch: int = 0) -> Iterator[Batch]:
        """The rank's training batches, in time order; row groups before the first are not read."""
        self._train.load_state_dict(self._first)
        self._train.load_state_dict(self._train.state_dict(first_batch))
        return itertools.islice(map(self._hashed, self._train), self.num_train_batches - first_batch)

    def ids_ahead(self) -> Iterator[Batch]:
        """The ids of what :meth:`train` gives next, read without labels and dense features."""
        return map(self._hashed, self._train.ids_ahead())

    def validate(self) -> Iterator[Batch]:
        """The rank's validation batches, in time order."""
        if self.num_val_batches == 0:
            return iter(())
        self._val.load_state_dict(self._first_val)
        return itertools.islice(map(self._hashed, self._val), self.num_val_batches)

    def _hashed(self, batch: Batch) -> Batch:
        ids = batch.sparse_features.values().numpy().reshape(NUM_SPARSE, -1)
        if not self._is_raw:
            ids = hash_values(ids.astype(np.uint64), self._num_embeddings)
        return make_batch(batch.dense_features.numpy(), ids, batch.labels.numpy())
