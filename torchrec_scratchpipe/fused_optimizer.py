# SPDX-License-Identifier: BSD-3-Clause
"""TorchRec's fused-optimizer surface over host tables: state from the tables, settings from the TBE."""

from typing import Any, Protocol

from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor
from torchrec.distributed.batched_embedding_kernel import EmbeddingFusedOptimizer

__all__ = ["FlushingFusedOptimizer", "HostTableKernel", "TableSurface"]


class HostTableKernel(Protocol):
    """What the surface needs of a kernel."""

    @property
    def emb_module(self) -> SplitTableBatchedEmbeddingBagsCodegen:
        """The TBE that updates rows."""

    def split_embedding_weights(self) -> list[Tensor]:
        """Weights by table."""

    def split_optimizer_states(self) -> list[dict[str, Tensor]]:
        """States by table."""

    def flush(self) -> None:
        """Bring the tables up to date."""

    def purge(self) -> None:
        """Flush, then forget the rows in the scratchpad."""


class TableSurface:
    """The part of a TBE that EmbeddingFusedOptimizer uses: state from the host tables, settings from the TBE."""

    def __init__(self, kernel: HostTableKernel) -> None:
        self.split_embedding_weights = kernel.split_embedding_weights
        self.get_optimizer_state = kernel.split_optimizer_states
        tbe = kernel.emb_module
        self.get_learning_rate = tbe.get_learning_rate
        self.set_learning_rate = tbe.set_learning_rate
        self.set_optimizer_step = tbe.set_optimizer_step
        self.update_hyper_parameters = tbe.update_hyper_parameters


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
        """The tables' states were overwritten: forget the rows in the scratchpad."""
        self._kernel.purge()
