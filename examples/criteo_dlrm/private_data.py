# SPDX-License-Identifier: BSD-3-Clause
"""Poisson samples of the Criteo DLRM example's training rows, which epsilon is known of; rows are kept in memory.

Shapes: ``N`` training samples of this rank.
"""

import math
from collections.abc import Iterator

import numpy as np
from data import NUM_DENSE, NUM_SPARSE, BatchSource, make_batch
from torchrec.datasets.utils import Batch

from torchrec_scratchpipe import PoissonSampler

SAMPLE_BYTES = 4 * NUM_DENSE + 8 * NUM_SPARSE + 4


class PoissonBatches:
    """Batches that have each training sample with one probability, whatever the others; validation as it was.

    Batches go on from epoch to epoch: :meth:`train` takes the number of the step in the whole training.

    Args:
        source: Where samples come from.
        sample_rate: Probability of each sample.
        num_epochs: Of as many batches as the source has.
        seed: Of the samples; to be kept as secret as that of the noise. Ranks need their own.
    """

    def __init__(self, source: BatchSource, sample_rate: float, num_epochs: int, seed: int) -> None:
        self.num_train_batches = source.num_train_batches
        self.num_val_batches = source.num_val_batches
        self._source = source
        batches = list(source.train())
        self._dense = np.concatenate([batch.dense_features.numpy() for batch in batches])
        self._labels = np.concatenate([batch.labels.numpy() for batch in batches])
        ids = [batch.sparse_features.values().numpy().reshape(NUM_SPARSE, -1) for batch in batches]
        self._ids = np.concatenate(ids, axis=1)
        self._sampler = PoissonSampler(len(self._labels), sample_rate, num_epochs * self.num_train_batches, seed)

    def __len__(self) -> int:
        """N."""
        return len(self._labels)

    def train(self, first_batch: int = 0) -> Iterator[Batch]:
        """The rank's batches from a step on; some may be empty."""
        for step in range(first_batch, self._sampler.num_steps):
            rows = self._sampler.sample(step)
            yield make_batch(self._dense[rows], self._ids[:, rows], self._labels[rows])

    def validate(self) -> Iterator[Batch]:
        """The rank's validation batches, in time order."""
        return self._source.validate()


def default_delta(num_samples: int) -> float:
    """A tenth of one over the number of samples, rounded to one digit."""
    exact = 0.1 / num_samples
    digit = 10.0 ** math.floor(math.log10(exact))
    return float(f"{math.floor(exact / digit) * digit:.0e}")
