# SPDX-License-Identifier: BSD-3-Clause
"""What the wheel says of itself is there."""

import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_commands_start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert PROJECT["scripts"]
    for command, target in PROJECT["scripts"].items():
        module, _, function = target.partition(":")
        monkeypatch.setattr(sys, "argv", [f"/somewhere/bin/{command}", "--help"])
        with pytest.raises(SystemExit) as end:
            getattr(importlib.import_module(module), function)()
        assert end.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: {command} ")


def test_an_index_can_show_who_made_it_and_where_to_read_on() -> None:
    assert all(author["name"] for author in PROJECT["authors"])
    assert PROJECT["keywords"] == sorted(PROJECT["keywords"])
    assert all(url.startswith("https://") for url in PROJECT["urls"].values())
    assert all(len(name) <= 32 for name in PROJECT["urls"])  # what an index takes


def test_the_description_on_an_index_has_no_links_into_the_repository() -> None:
    description = (ROOT / PROJECT["readme"]).read_text()
    targets = re.findall(r"\]\(([^)]+)\)", description)
    assert targets
    assert all(target.startswith("https://") for target in targets)
    for name in re.findall(r"\b\w+\.md\b", description):
        assert (ROOT / name).exists() or (ROOT / "docs" / name).exists(), name


def test_the_description_on_an_index_has_the_lines_of_the_readme() -> None:
    texts = [(ROOT / name).read_text() for name in ("README.md", PROJECT["readme"])]
    in_readme, in_description = (re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0] for text in texts)
    assert in_description == in_readme
    first = [text.split("\n\n")[:2] for text in texts]
    assert first[0] == first[1]
