# SPDX-License-Identifier: BSD-3-Clause
"""docs/symptoms.md quotes what the package says, and names settings that exist."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import CacheParams

import torchrec_scratchpipe
from torchrec_scratchpipe import CheckpointManager, PoolStats, measure_working_set
from torchrec_scratchpipe.monitoring.window import PoolWindow

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "symptoms.md").read_text()
GAP = "\0"  # where a message has a value

# Words in code type that are not ours and not settings, as the column of settings uses them.
OTHERS = {
    "PlannerError": "TorchRec's",
    "ParameterConstraints": "TorchRec's",
    "get_default_sharders": "TorchRec's",
    "sharders": "an argument of TorchRec's planner and DistributedModelParallel",
    "model": "of model.eval(), PyTorch's",
    "num_embeddings": "of EmbeddingBagConfig",
    "backward": "PyTorch's",
    "retain_graph": "of backward",
    "state_dict": "PyTorch's",
    "load_state_dict": "PyTorch's",
    "torch": "PyTorch",
    "weight": "a table of the reader's",
    "ulimit": "a command",
    "spawn": "a way to start a process, of Python's multiprocessing",
}


def string_of(node: ast.expr) -> str:
    """A string of a program, or an f-string with gaps for its values."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def said_by_the_package() -> str:
    """All its strings but docstrings, one a line."""
    said = []
    for path in sorted((ROOT / "torchrec_scratchpipe").rglob("*.py")):
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        said += [
            string_of(node) for node in ast.walk(tree) if isinstance(node, ast.expr) and id(node) not in docstrings
        ]
    return "\n".join(said)


def settings() -> set[str]:
    """Arguments of what a reader calls."""
    public = [getattr(torchrec_scratchpipe, name) for name in torchrec_scratchpipe.__all__ if name != "__version__"]
    called = [
        *(each for each in public if callable(each) and not (isinstance(each, type) and issubclass(each, Exception))),
        EmbeddingShardingPlanner, Topology, ParameterConstraints, CacheParams,
        CheckpointManager.load, measure_working_set,
    ]  # fmt: skip
    topology = {"hbm_cap", "ddr_cap"}
    assert topology <= inspect.signature(Topology.__init__).parameters.keys()
    return {name for each in called for name in inspect.signature(each).parameters} | topology


def rows(page: str) -> list[list[str]]:
    lines = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| what you see")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def unknown_words(page: str) -> list[str]:
    """Words in code type that neither the package says nor a reader can set."""
    counters = {field.name for kind in (PoolStats, PoolWindow) for field in dataclasses.fields(kind)}
    names = {*torchrec_scratchpipe.__all__, *settings(), *OTHERS, *counters, "eval", "reset"}
    said = said_by_the_package()
    found = []
    for symptom, cause, setting, _ in rows(page):
        for words in code(symptom):
            is_name = re.fullmatch(r"\w+(\.\w+)?(\(.*\))?", words) and re.match(r"\w+", words)[0] in names
            found += [] if is_name or re.search(rf"(?<!\w){re.escape(words)}(?!\w)", said) else [words]
        for words in [*code(cause), *code(setting)]:
            name = re.match(r"\w+", words)
            found += [] if name and name[0] in names else [words]
    return found


def test_what_is_quoted_is_said_and_what_is_to_be_set_exists() -> None:
    assert unknown_words(PAGE) == []


def test_there_are_enough_rows_and_each_leads_on() -> None:
    assert len(rows(PAGE)) > 30
    for row in rows(PAGE):
        assert len(row) == 4, row
        assert all(row)
        assert re.fullmatch(r"\[[^]]+\]\([\w/]+\.md(#[\w-]+)?\)", row[3])


def test_every_kind_of_advice_and_most_errors_have_a_row() -> None:
    first_column = " ".join(row[0] for row in rows(PAGE))
    kinds = re.findall(
        r"^\| `(\w+)` \| .* \| .* \|$", (ROOT / "docs" / "monitoring.md").read_text(), flags=re.MULTILINE
    )
    assert len(kinds) == 7
    assert [kind for kind in kinds if f"`{kind}`" not in first_column] == []
    errors = [name for name in torchrec_scratchpipe.__all__ if name.endswith("Error")]
    without = {name for name in errors if f"`{name}`" not in first_column}
    # A setting or a file that cannot be used: the message is the whole answer.
    assert without == {
        "ScratchPipeError", "ConfigError", "MeasurementError", "DataError", "BatchesInFlightError", "TableStorageError",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "unknown"),
    [
        ("| `one batch needs many slots` | - | - | x |", "one batch needs many slots"),
        ("| `num_stals` grows | - | - | x |", "num_stals"),
        ("| - | - | `loadfactor=0.2` | x |", "loadfactor=0.2"),
    ],
)
def test_control_what_does_not_exist_is_noticed(row: str, unknown: str) -> None:
    assert unknown_words(row) == [unknown]
