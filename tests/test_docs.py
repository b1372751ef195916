# SPDX-License-Identifier: BSD-3-Clause
"""What the documents name exists."""

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from processes import run_script

TESTS = Path(__file__).parent
ROOT = TESTS.parent
COMPATIBILITY = (ROOT / "docs" / "compatibility.md").read_text()


@pytest.mark.parametrize("reference", sorted(set(re.findall(r"`(test_\w+\.py::test_\w+)`", COMPATIBILITY))))
def test_every_test_that_the_table_names_exists(reference: str) -> None:
    file_name, test_name = reference.split("::")
    assert f"\ndef {test_name}(" in (TESTS / file_name).read_text()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make ([a-z-]+)", COMPATIBILITY))))
def test_every_make_target_that_is_named_exists(target: str) -> None:
    assert re.search(rf"^([\w-]+ )*{target}( [\w-]+)*:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_every_version_that_is_tested_is_admitted_named_and_run() -> None:
    makefile = (ROOT / "Makefile").read_text()
    tested = set(re.findall(r"torchrec==([\d.]+)|TORCHREC := ([\d.]+)", makefile))
    versions = {version for pair in tested for version in pair if version}
    assert versions == {"1.6.1", "1.8.0", "1.9.2"}
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (admitted,) = [Requirement(each).specifier for each in dependencies if Requirement(each).name == "torchrec"]
    assert all(version in admitted for version in versions)
    assert "1.6.0" not in admitted
    assert "1.10.0" not in admitted
    for version in versions:
        assert version in COMPATIBILITY
    for target in ("test", "test-oldest", "test-newest"):
        assert re.search(rf"^make {target}( |$)", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("document", [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")], ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", ["README.md", "docs/planning.md"])
def test_the_first_snippet_names_only_what_it_has_or_what_a_job_has(document: str) -> None:
    (snippet, *_) = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), flags=re.DOTALL)
    of_a_job = {
        "train_loader",
        "model",
        "topology",
        "B",
        "pg",
        "device",
        "optimizer",
        "DistributedModelParallel",
        "print",
    }
    tree = ast.parse(snippet)
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    known = of_a_job | {alias.name for node in imports for alias in node.names}
    for statement in tree.body:
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        assert {name.id for name in names if isinstance(name.ctx, ast.Load)} <= known
        known |= {name.id for name in names if isinstance(name.ctx, ast.Store)}
    for node in imports:
        assert {alias.name for alias in node.names} <= set(dir(importlib.import_module(str(node.module))))
    assert snippet.index("= DistributedModelParallel(") < snippet.index("= ScratchPipeTrainPipeline(")


# What a side of the smallest job leaves behind, for the comparison.
SAVE_STATE = """
from torch.distributed._shard.sharded_tensor import ShardedTensor

def plain(value):
    return value.local_shards()[0].tensor.detach().clone() if isinstance(value, ShardedTensor) else value

parameter = "model.sparse_arch.embedding_bag_collection.embedding_bags.t_item.weight"
state = {"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()["state"][parameter]}
state = {kind: {name: plain(value) for name, value in values.items()} for kind, values in state.items()}
torch.save(state, sys.argv[1])
"""


def run_side(side: str, path: Path, *, is_forked: bool) -> tuple[dict[str, dict[str, Any]], str]:
    """Run one side of README's diff as it stands, and read what it has trained and printed."""
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    job = "".join(line[1:] or "\n" for line in diff.splitlines(keepends=True) if line[:1] in (side, " ", "\n"))
    (before_end, end) = job.split("dist.destroy_process_group()")
    script = path.with_suffix(".py")
    script.write_text(f"import sys\n{before_end}{SAVE_STATE}\ndist.destroy_process_group(){end}")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [str(script), str(path)]
    run = (
        run_script(*command)
        if is_forked
        else subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    )
    assert run.returncode == 0, run.stderr
    return torch.load(path), run.stdout


def test_both_sides_of_the_smallest_job_train_the_same_bits(tmp_path: Path) -> None:
    expected, stock_output = run_side("-", tmp_path / "stock.pt", is_forked=True)
    actual, our_output = run_side("+", tmp_path / "ours.pt", is_forked=False)
    assert expected["model"].keys() == actual["model"].keys()
    assert expected["optimizer"].keys() == actual["optimizer"].keys()
    assert len(expected["model"]) > 5
    assert len(expected["optimizer"]) > 0
    for kind, values in expected.items():
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(actual[kind][name])), name
    assert our_output.startswith(stock_output)  # the loss, then what the scratchpad did
    assert re.search(r"[1-9][\d,]* evicted\n0 rows missing at Train", our_output)


def test_the_description_on_an_index_shows_the_picture_and_the_job_of_the_readme() -> None:
    texts = [(ROOT / name).read_text() for name in ("README.md", "docs/package_index.md")]
    for fence in ("diff", ""):
        in_readme, in_description = (re.findall(rf"```{fence}\n(.*?)```", text, flags=re.DOTALL)[0] for text in texts)
        assert in_description == in_readme


def test_what_has_run_where_is_said_in_the_first_ten_lines() -> None:
    first_lines = "\n".join((ROOT / "README.md").read_text().splitlines()[:10])
    assert "On one GPU" in first_lines
    assert "**Several GPUs have not been tried.**" in first_lines
