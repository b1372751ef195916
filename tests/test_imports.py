# SPDX-License-Identifier: BSD-3-Clause
"""Four laws of who may import whom, and the public names are what they are meant to be."""

import ast
import importlib
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import torchrec_scratchpipe

PACKAGE = Path(torchrec_scratchpipe.__file__).parent


def module_of(path: str | Path) -> str:
    """A file's module, without the package's name."""
    return ".".join(Path(path).relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"}
# Which rooms a room may look into. What lies in no room: errors and the version, which anybody may import, and
# commands.
MAY_IMPORT = {
    "core": set(),
    "sharding": {"core"},
    "planning": {"core", "sharding"},
    "checkpoint": {"core", "sharding"},
    "monitoring": {"core", "sharding", "planning"},
    "data": set(),
    "privacy": {"core", "sharding"},
}
FOR_ALL = {"errors", "_version"}


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def own_imports(path: Path) -> set[str]:
    """The modules of this package that a file imports, without the package's name."""
    names = {name.removeprefix("torchrec_scratchpipe.") for name in imported_modules(path)}
    return names & MODULES.keys()


def reached(modules: Iterable[str]) -> set[str]:
    """These modules, and all that they import, directly or not."""
    seen: set[str] = set()
    new = set(modules)
    while new:
        seen |= new
        new = {imported for module in new for imported in own_imports(MODULES[module])} - seen
    return seen


def room_of(module: str) -> str:
    return module.rpartition(".")[0]


def in_room(room: str) -> list[str]:
    return [module for module in MODULES if room_of(module) == room]


def test_rooms() -> None:
    assert {room_of(module) for module in MODULES} == {"", *MAY_IMPORT}
    assert in_room("") == ["__main__", "_version", "compact", "disk", "errors", "plan"]
    assert all(len(in_room(room)) >= 5 for room in MAY_IMPORT)


def test_law_1_the_core_knows_nothing_of_torchrec() -> None:
    for module in in_room("core"):
        packages = {name.partition(".")[0] for name in imported_modules(MODULES[module])}
        assert not packages & {"torchrec", "fbgemm_gpu"}, module


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_law_2_rooms_look_in_one_direction(room: str) -> None:
    for module in in_room(room):
        for imported in own_imports(MODULES[module]) - FOR_ALL:
            assert room_of(imported) in {room} | MAY_IMPORT[room], f"{module} imports {imported}"


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_law_3_no_cycle_inside_a_room(room: str) -> None:
    TopologicalSorter({module: own_imports(MODULES[module]) for module in in_room(room)}).prepare()


def test_law_4_planning_and_checkpoint_never_meet() -> None:
    for room, other in (("planning", "checkpoint"), ("checkpoint", "planning")):
        assert not {module for module in reached(in_room(room)) if room_of(module) == other}


@pytest.mark.parametrize("module", MODULES)
def test_public_names_exist_and_files_are_licensed(module: str) -> None:
    assert MODULES[module].read_text().startswith("# SPDX-License-Identifier: BSD-3-Clause\n")
    if module == "__main__":
        return  # runs when imported
    imported = importlib.import_module(f"torchrec_scratchpipe.{module}")
    for public in getattr(imported, "__all__", []):
        assert hasattr(imported, public), f"{module}.__all__ names {public}"


def test_public_surface() -> None:
    assert set(torchrec_scratchpipe.__all__) == {
        "Advice",
        "ScratchPipeMonitor",
        "BackwardTwiceError",
        "BatchesInFlightError",
        "Checkpoint",
        "CheckpointManager",
        "CheckpointMismatchError",
        "CheckpointSaveError",
        "Follower",
        "Lag",
        "follow",
        "load_checkpoint",
        "to_stock",
        "warm_start",
        "ConfigError",
        "DataError",
        "IdOutOfRangeError",
        "MeasurementError",
        "PeerFailedError",
        "LazyDP",
        "PoissonSampler",
        "PrivacyError",
        "PlanReport",
        "PoolStats",
        "ScratchPipeDeltaTracker",
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
