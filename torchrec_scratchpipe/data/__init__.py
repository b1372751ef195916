# SPDX-License-Identifier: BSD-3-Clause
"""Training data from Parquet files."""

from torchrec_scratchpipe.data.parquet_batches import ParquetBatches

__all__ = ["ParquetBatches"]
