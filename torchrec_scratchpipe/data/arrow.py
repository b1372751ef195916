# SPDX-License-Identifier: BSD-3-Clause
"""pyarrow and fsspec where they are installed: both belong to the extra ``parquet``."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_scratchpipe.errors import DataError

__all__ = ["check_installed", "compute", "empty", "fsspec", "parquet", "pyarrow"]

try:
    import pyarrow
    from pyarrow import compute, parquet
except ImportError:
    pyarrow = compute = parquet = None
try:
    import fsspec
except ImportError:
    fsspec = None


def check_installed(what: str) -> None:
    """Say what to install where pyarrow is missing.

    Args:
        what: Needs it.

    Raises:
        DataError: pyarrow is missing.
    """
    if pyarrow is None:
        raise DataError(f"{what} needs pyarrow, which is missing. Run: pip install torchrec-scratchpipe[parquet]")


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array in memory of Arrow's pool, which keeps what is given back; NumPy's goes to the system and comes anew."""
    count = math.prod(shape)
    buffer = pyarrow.allocate_buffer(max(count, 1) * np.dtype(dtype).itemsize)
    return np.frombuffer(buffer, dtype=dtype, count=count).reshape(shape)
