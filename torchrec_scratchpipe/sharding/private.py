# SPDX-License-Identifier: BSD-3-Clause
"""What a pipeline and its collections ask of private training; :mod:`torchrec_scratchpipe.privacy` answers."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

__all__ = ["Privacy", "PrivateSteps"]


class PrivateSteps(Protocol):
    """Takes training steps whose gradients are clipped, example by example, and get noise."""

    def forward(self) -> AbstractContextManager[None]:
        """Entered around the forward of a step."""

    def cut(self, collection: Any, features: KeyedJaggedTensor, output: Any) -> Any:
        """What the model is to get in place of a collection's output: the same numbers, where backward stops."""

    def backward(self, losses: Tensor) -> None:
        """In place of `torch.sum(losses, dim=0).backward()`; ends the step for the tables."""

    def catch_up(self) -> None:
        """Have all rows of all tables get the noise of the steps so far; reads and writes whole tables."""

    def state_dict(self, *, for_release: bool) -> dict[str, Any]:
        """How far training is: plain data, the same on all ranks; without the seed. All ranks call it.

        `for_release`: with nothing that tells two seeds apart.
        """

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ConfigError if such a state is of other settings."""

    def load_state_dict(self, state: dict[str, Any], *, is_pending: bool) -> None:
        """Go on from such a state, after tables were loaded; `is_pending`: `updated_to` of all rows was loaded, too."""

    def note_loaded(self) -> None:
        """Tables were loaded from a state of training that was not private: no noise is due."""

    def epsilon(self, delta: float) -> float:
        """What the steps so far have spent."""


class Privacy(Protocol):
    """Settings of private training."""

    def start(self, model: nn.Module, device: torch.device) -> PrivateSteps:
        """Begin, or go on with, the private training of a sharded model. Raises ConfigError."""
