# SPDX-License-Identifier: BSD-3-Clause
"""Where FBGEMM keeps names that it does not export from one place; the one file to change when they move."""

from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, WeightDecayMode

__all__ = ["BoundsCheckMode", "ComputeDevice", "EmbeddingLocation", "PoolingMode", "WeightDecayMode"]
