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

    def epsilon(self, delta: float) -> float:
        """What the steps so far have spent."""


class Privacy(Protocol):
    """Settings of private training."""

    def start(self, model: nn.Module, device: torch.device) -> PrivateSteps:
        """Begin, or go on with, the private training of a sharded model. Raises ConfigError."""
