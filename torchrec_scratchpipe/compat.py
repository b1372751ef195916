# SPDX-License-Identifier: BSD-3-Clause
"""Names that FBGEMM has moved between the versions this package supports."""

from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, WeightDecayMode

__all__ = ["ComputeDevice", "EmbeddingLocation", "WeightDecayMode"]
