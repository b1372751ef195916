# SPDX-License-Identifier: BSD-3-Clause
"""TorchRec's fused optimizer over host tables."""

from typing import Any, Protocol

from torchrec.distributed.batched_embedding_kernel import EmbeddingFusedOptimizer

from torchrec_scratchpipe.errors import BatchesInFlightError

__all__ = ["FlushingFusedOptimizer", "HostTableKernel"]


class HostTableKernel(Protocol):
    """What the optimizer needs of its kernel."""

    def flush(self) -> None:
        """Bring the tables up to date."""

    def purge(self) -> None:
        """Flush, then forget the rows in the scratchpad."""


class FlushingFusedOptimizer(EmbeddingFusedOptimizer):
    """TorchRec's fused optimizer, whose state is brought up to date whenever it is read.

    CombinedOptimizer reads `state` of its children and calls no hook of theirs, so the read itself has to flush.
    """

    def __init__(self, kernel: HostTableKernel, *args: Any, **kwargs: Any) -> None:
        self._kernel = kernel
        super().__init__(*args, **kwargs)

    @property
    def state(self) -> Any:
        """Optimizer state by parameter; flushes."""
        self._kernel.flush()
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        self._state = state

    def post_load_state_dict(self) -> None:
        """Forget the rows in the scratchpad, whose states in the tables have just been overwritten.

        `purge` flushes first; this writes nothing, because load_state_dict has read `state`, which flushed.

        Raises:
            BatchesInFlightError: Planned batches still rely on resident rows and their old states.
        """
        try:
            self._kernel.purge()
        except BatchesInFlightError as error:
            raise BatchesInFlightError(
                f"optimizer states were loaded while batches were planned ({error}). Rows of those batches still have "
                "their old states: call the pipeline's reset(), then load_state_dict() again."
            ) from error
