# SPDX-License-Identifier: BSD-3-Clause
"""TorchRec's own distributed tests, run with this package's sharder and planner in place of stock's."""

import sys
import types
from pathlib import Path

# The suite imports a module that TorchRec's wheel leaves out; its tests of bags do not use it.
_left_out = types.ModuleType("torchrec.distributed.tests.test_sequence_model")
_left_out.TestEmbeddingCollectionSharder = type("TestEmbeddingCollectionSharder", (), {})  # type: ignore[attr-defined]
sys.modules.setdefault(_left_out.__name__, _left_out)

sys.path.append(str(Path(__file__).parents[1]))  # `python -m tests.conformance` has the repository's root only
import device_path  # noqa: E402, F401  acts when imported
