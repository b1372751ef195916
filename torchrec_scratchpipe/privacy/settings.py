# SPDX-License-Identifier: BSD-3-Clause
"""What a user says of private training."""

import hashlib
import math
import os
from dataclasses import dataclass, field
from typing import Literal, get_args

from torchrec_scratchpipe.errors import ConfigError
from torchrec_scratchpipe.privacy.accounting import Accountant
from torchrec_scratchpipe.privacy.delayed_noise import NoiseOf, NormalNoise

__all__ = ["PrivacySettings", "draw_seed"]


def draw_seed() -> int:
    """From the system: nobody can guess it."""
    return int.from_bytes(os.urandom(8), "little")


@dataclass(frozen=True)
class PrivacySettings:
    """Settings, and what follows from them alone; see :class:`LazyDP`."""

    clip: float
    noise_multiplier: float
    sample_rate: float
    seed: int | None = field(default=None, repr=False)
    expected_batch_size: float | None = None
    loss_reduction: Literal["mean", "sum"] = "mean"
    accountant: Accountant = "prv"

    def __post_init__(self) -> None:
        is_good = {
            "clip": 0 < self.clip < math.inf,
            "noise_multiplier": 0 <= self.noise_multiplier < math.inf,
            "sample_rate": 0 < self.sample_rate <= 1,
            "seed": self.seed is None or (isinstance(self.seed, int) and 0 <= self.seed < 2**64),
            "expected_batch_size": self.expected_batch_size is None or 0 < self.expected_batch_size < math.inf,
            "loss_reduction": self.loss_reduction in ("mean", "sum"),
            "accountant": self.accountant in get_args(Accountant),
        }
        ranges = {
            "clip": "above 0",
            "noise_multiplier": "0 or more",
            "sample_rate": "above 0 and at most 1",
            "seed": "a whole number in [0, 2^64), or None to have one drawn",
            "expected_batch_size": "above 0, or None for the size of the first batch",
            "loss_reduction": '"mean" or "sum"',
            "accountant": '"prv", "rdp" or "pld"',
        }
        for name, is_in_range in is_good.items():
            if not is_in_range:
                got = "another value" if name == "seed" else repr(getattr(self, name))
                raise ConfigError(f"LazyDP: {name} is {got}, it must be {ranges[name]}.")

    @property
    def known_seed(self) -> int:
        """The seed, once it was drawn."""
        assert self.seed is not None, "it is drawn when training begins"
        return self.seed

    @property
    def seed_check(self) -> str:
        """Tells whether two seeds are the same, and does not tell the seed: a checkpoint has it."""
        return hashlib.scrypt(self.known_seed.to_bytes(8, "little"), salt=b"scratchpipe", n=2**14, r=8, p=1).hex()

    def noise(self, batch_size: float) -> NoiseOf:
        """What draws the noise of rows, where sums of gradients are divided by `batch_size`."""
        return NormalNoise(self.noise_scale(batch_size), self.known_seed)

    def noise_scale(self, batch_size: float) -> float:
        """Standard deviation of the noise in a sum of gradients that was divided by `batch_size`."""
        return self.noise_multiplier * self.clip / batch_size
