# SPDX-License-Identifier: BSD-3-Clause
"""The settings that a user gives to a pipeline for private training."""

from dataclasses import dataclass

import torch
from torch import nn

from torchrec_scratchpipe.privacy.settings import PrivacySettings
from torchrec_scratchpipe.privacy.training import PrivateTraining

__all__ = ["LazyDP"]


@dataclass(frozen=True)
class LazyDP(PrivacySettings):
    """DP-SGD whose noise reaches a row of a table when the row is next used.

    A step clips the gradient of each example, in tables and dense layers together, to the norm `clip`, adds them up,
    adds normal noise of standard deviation `noise_multiplier * clip` to every weight, used or not, and divides by the
    expected batch size. Released weights are as if all that happened in each step.

    Tables must be behind a scratchpad, in FP32, with SGD. The dense optimizer may be any.

    Args:
        clip: Largest norm of an example's gradient.
        noise_multiplier: Standard deviation of the noise, in units of `clip`.
        sample_rate: With what probability an example is in a batch. It is used for :meth:`epsilon` alone, and that
            holds for batches of :class:`PoissonSampler`, which have this rate; not for batches of fixed size.
        seed: Of the noise, in [0, 2^64). Whoever knows or guesses it can take the noise away: draw it
            (`secrets.randbits(64)`), and keep it as a secret. A job that is resumed needs it again. Default: drawn when
            training begins, and told to nobody.
        expected_batch_size: What sums are divided by: `sample_rate` times the number of examples, over all ranks.
            Default: the size of the first batch.
        loss_reduction: How the model's loss is made of those of examples. "sum": sums are not divided either, unless
            `expected_batch_size` is given.
        accountant: "prv" or "rdp" by Opacus, "pld" by dp_accounting.

    Raises:
        ConfigError: A value is out of its range.

    Source:
        LazyDP (ASPLOS 2024); DP-SGD (CCS 2016), as Opacus does it.
    """

    def start(self, model: nn.Module, device: torch.device) -> PrivateTraining:
        """Begin, or go on with, the private training of a sharded model; a pipeline calls it.

        Args:
            model: Of DistributedModelParallel.
            device: Where it trains.

        Returns:
            What takes the steps.

        Raises:
            ConfigError: A part of the model cannot be trained in private; names it.
        """
        return PrivateTraining.start(self, model, device)
