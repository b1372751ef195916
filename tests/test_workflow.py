# SPDX-License-Identifier: BSD-3-Clause
"""What a fork runs: only make targets that exist, only actions that cannot change under it, and no rights to write."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.any_torchrec

ROOT = Path(__file__).parent.parent
PATH = ROOT / ".github" / "workflows" / "ci.yml"
TEXT = PATH.read_text()
WORKFLOW: dict[str, Any] = yaml.load(TEXT, Loader=yaml.BaseLoader)  # which takes `on` for a word
STEPS = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]


def not_pinned(text: str) -> list[str]:
    """Actions that are not named by a full commit hash with its version beside."""
    lines = [line.strip() for line in text.splitlines() if re.match(r"\s*(- )?uses:", line)]
    return [line for line in lines if not re.fullmatch(r"(- )?uses: [\w./-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", line)]


def missing_targets(commands: list[str]) -> list[str]:
    """Targets and variables of make commands that the Makefile does not have."""
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    targets, variables = set(phony.split()), set(re.findall(r"^(\w+) +\?=", makefile, flags=re.MULTILINE))
    words = [word for command in commands for word in command.split()[1:]]
    return [word for word in words if word not in targets and word.partition("=")[0] not in variables]


def test_every_action_is_pinned() -> None:
    assert len(re.findall(r"uses:", TEXT)) == len([step for step in STEPS if "uses" in step]) > 5
    assert not_pinned(TEXT) == []


@pytest.mark.parametrize(
    "line", ["- uses: actions/checkout@v7", f"uses: a/b@{'0' * 39}  # v1.0.0", f"uses: a/b@{'0' * 40}"]
)
def test_control_an_action_that_can_change_is_noticed(line: str) -> None:
    assert not_pinned(f"      {line}") == [line]


def test_it_runs_make_targets_that_exist() -> None:
    commands = [step["run"] for step in STEPS if "run" in step]
    assert all(command.startswith("make ") for command in commands)
    assert missing_targets(commands) == []
    assert missing_targets(["make chek WORKRS=4"]) == ["chek", "WORKRS=4"]
    for target in ("check", "docs", "test"):
        assert any(command.split()[1] == target for command in commands)


def test_variables_of_its_environment_are_those_of_the_makefile() -> None:
    assert WORKFLOW["env"].keys() == {"TORCH_INDEX"}
    assert re.search(
        r"torch==[\d.]+ \$\(if \$\(TORCH_INDEX\),--index-url \$\(TORCH_INDEX\)\)", (ROOT / "Makefile").read_text()
    )


def test_it_may_only_read_and_ends() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert WORKFLOW["concurrency"]["cancel-in-progress"] == "true"
    assert "secrets." not in TEXT
    assert WORKFLOW["on"].keys() == {"push", "pull_request", "workflow_dispatch"}
    for job in WORKFLOW["jobs"].values():
        assert 0 < int(job["timeout-minutes"]) <= 180
        assert "permissions" not in job
        checkout, python = job["steps"][:2]
        assert checkout["with"] == {"persist-credentials": "false"}
        assert python["with"]["python-version"] == "3.11"
