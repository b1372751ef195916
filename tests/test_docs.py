# SPDX-License-Identifier: BSD-3-Clause
"""What the documents name exists."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
COMPATIBILITY = (ROOT / "docs" / "compatibility.md").read_text()


@pytest.mark.parametrize("reference", sorted(set(re.findall(r"`(test_\w+\.py::test_\w+)`", COMPATIBILITY))))
def test_every_test_that_the_table_names_exists(reference: str) -> None:
    file_name, test_name = reference.split("::")
    assert f"\ndef {test_name}(" in (TESTS / file_name).read_text()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`make ([a-z-]+)", COMPATIBILITY))))
def test_every_make_target_that_is_named_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("document", [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")], ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target
