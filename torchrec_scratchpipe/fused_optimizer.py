# SPDX-License-Identifier: BSD-3-Clause
"""TorchRec's fused optimizer over host tables."""

from collections.abc import Callable
from typing import Any, Protocol

from torchrec.distributed.batched_embedding_kernel import EmbeddingFusedOptimizer

__all__ = ["FlushingFusedOptimizer", "HostTableKernel"]


class HostTableKernel(Protocol):
    """What the optimizer needs of its kernel."""

    def flush_to_write(self) -> None:
        """Bring the tables up to date; they are read now, and may be written before the next batch."""


class _SharedState(dict[str, Any]):
    """One parameter's optimizer states, as views of the tables: up to date when read, and free to be written.

    CombinedOptimizer and the wrappers (warm-up, clipping) keep these very objects. They call no hook before they read
    them, to save or to load into them, and not all of them call one afterwards.
    """

    def __init__(self, states: dict[str, Any], flush: Callable[[], None]) -> None:
        super().__init__(states)
        self._flush = flush

    def __getitem__(self, name: str) -> Any:
        self._flush()
        return super().__getitem__(name)

    def items(self) -> Any:
        """All states by name; flushes."""
        self._flush()
        return super().items()

    def values(self) -> Any:
        """All states; flushes."""
        self._flush()
        return super().values()


class FlushingFusedOptimizer(EmbeddingFusedOptimizer):
    """TorchRec's fused optimizer, whose states are up to date whenever they are read."""

    state: dict[Any, Any]

    def __init__(self, *args: Any, kernel: HostTableKernel, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for parameter, states in self.state.items():
            self.state[parameter] = _SharedState(states, kernel.flush_to_write)
