# SPDX-License-Identifier: BSD-3-Clause
"""Layers import downward only, and the public names are what they are meant to be."""

import ast
import importlib
from pathlib import Path

import pytest

import torchrec_scratchpipe

PACKAGE = Path(torchrec_scratchpipe.__file__).parent
# Top to bottom; a module may import from its own layer's left neighbours and from the layers below.
LAYERS = [
    ["__init__", "plan"],
    ["pipeline"],
    ["sharding_planner", "plan_plot"],
    ["sharder"],
    ["working_set", "plan_report", "trace", "enumerator"],
    ["checkpoint", "stock"],
    ["checkpoint_files", "table_sources", "optimizer_states"],
    ["collection", "ranks"],
    ["peers"],
    ["lookup"],
    ["kernel"],
    ["tbe", "table_view"],
    ["options"],
    ["compat", "batch_features"],
    # ---- below this line nothing imports torchrec ----
    ["sizing"],
    ["popularity"],
    ["reuse", "memory"],
    ["runner"],
    ["stages"],
    ["batch"],
    ["pool"],
    ["stats", "slot_map"],
    ["streams", "triton_ops", "torch_ops"],
    ["slot_ops"],
    ["scratchpad", "host_table"],
    ["snapshot"],
    ["row_parts", "lent_memory", "fork"],
    ["types"],
    ["errors", "_version", "spelling", "random_states"],
]
CORE_STARTS_AT = 14


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def layer_of(module: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if module in layer)


def test_every_module_has_a_layer() -> None:
    assert sorted(path.stem for path in PACKAGE.glob("*.py")) == sorted(name for layer in LAYERS for name in layer)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_point_downward(path: Path) -> None:
    own_layer = layer_of(path.stem)
    for name in imported_modules(path):
        package, _, module = name.partition(".")
        if package == "torchrec_scratchpipe" and module:
            assert layer_of(module) > own_layer, f"{path.stem} imports {module}, which is not below it"
        if own_layer >= CORE_STARTS_AT:
            assert package not in {"torchrec", "fbgemm_gpu"}, f"{path.stem} imports {name}"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_public_names_exist_and_files_are_licensed(path: Path) -> None:
    assert path.read_text().startswith("# SPDX-License-Identifier: BSD-3-Clause\n")
    name = "torchrec_scratchpipe" if path.stem == "__init__" else f"torchrec_scratchpipe.{path.stem}"
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", []):
        assert hasattr(module, public), f"{name}.__all__ names {public}"


def test_public_surface() -> None:
    assert set(torchrec_scratchpipe.__all__) == {
        "BackwardTwiceError",
        "BatchesInFlightError",
        "Checkpoint",
        "CheckpointManager",
        "CheckpointMismatchError",
        "CheckpointSaveError",
        "load_checkpoint",
        "to_stock",
        "warm_start",
        "ConfigError",
        "IdOutOfRangeError",
        "MeasurementError",
        "PeerFailedError",
        "PlanReport",
        "PoolStats",
        "ScratchPipeEmbeddingBagCollectionSharder",
        "ScratchPipeEmbeddingCollectionSharder",
        "ScratchPipeError",
        "ScratchPipeShardingPlanner",
        "ScratchPipeTrainPipeline",
        "ScratchpadFullError",
        "ShardedScratchPipeEmbeddingBagCollection",
        "ShardedScratchPipeEmbeddingCollection",
        "Stage",
        "StageFailedError",
        "StageSpan",
        "TableOverwrittenError",
        "TableStats",
        "TableStorageError",
        "WorkingSet",
        "WorkingSets",
        "__version__",
        "measure_working_set",
        "plot_plan",
        "scratchpad_stats",
        "stage_spans",
        "zipf_working_sets",
    }
