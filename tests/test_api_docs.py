# SPDX-License-Identifier: BSD-3-Clause
"""docs/api.md names what is public, all of it and nothing else."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

import torchrec_scratchpipe
import torchrec_scratchpipe.data
from torchrec_scratchpipe import Advice, PoolStats, ScratchPipeError, Stage, StageSpan, TableStats
from torchrec_scratchpipe.monitoring.window import PoolWindow, StepWindow, TableWindow

ROOT = Path(__file__).parent.parent
PUBLIC = [*torchrec_scratchpipe.__all__, *torchrec_scratchpipe.data.__all__]
PAGE = (ROOT / "docs" / "api.md").read_text()


def first_column(page: str) -> list[str]:
    """The names that the tables of a page begin their rows with."""
    return re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)


def section(title: str) -> str:
    """The text between a heading and the next one of its kind or above."""
    (level,) = re.findall(rf"^(#+) {title}$", PAGE, flags=re.MULTILINE)
    after = PAGE.split(f"\n{level} {title}\n")[1]
    return re.split(rf"^#{{2,{len(level)}}} ", after, flags=re.MULTILINE)[0]


def check_names(expected: Iterable[str], actual: list[str]) -> None:
    assert len(actual) == len(set(actual)), "a name stands twice"
    assert sorted(set(expected) - set(actual)) == [], "names that the page lacks"
    assert sorted(set(actual) - set(expected)) == [], "names that do not exist"


def public_names_of_page(page: str) -> list[str]:
    """All names but the fields, which have sections of their own."""
    return first_column(re.sub(r"^### Fields of .*?(?=^##? |^### |\Z)", "", page, flags=re.MULTILINE | re.DOTALL))


def test_every_public_name_is_there_and_nothing_else() -> None:
    check_names(PUBLIC, public_names_of_page(PAGE))


def test_control_a_name_that_is_missing_or_made_up_is_noticed() -> None:
    without = re.sub(r"^\| `PoolStats` \|.*\n", "", PAGE, flags=re.MULTILINE)
    with pytest.raises(AssertionError, match="names that the page lacks"):
        check_names(PUBLIC, public_names_of_page(without))
    with pytest.raises(AssertionError, match="names that do not exist"):
        check_names(PUBLIC, public_names_of_page(f"{PAGE}| `Invented` | nothing |\n"))


def test_every_field_of_the_statistics_is_there_and_nothing_else() -> None:
    for kind in (PoolStats, TableStats):
        names = [field.name for field in dataclasses.fields(kind)]
        assert first_column(section(f"Fields of `{kind.__name__}`")) == names
    assert first_column(section("Fields of `StageSpan`")) == list(StageSpan._fields)


def test_every_figure_of_the_monitor_is_explained() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text()
    for kind in (StepWindow, PoolWindow, TableWindow, Advice):
        (part,) = re.findall(rf"^### Fields of `{kind.__name__}`$(.*?)(?=^### |\Z)", page, re.MULTILINE | re.DOTALL)
        names = [field.name for field in dataclasses.fields(kind) if field.name != "looks"]
        assert first_column(part) == names, kind.__name__


def test_every_stage_is_there_and_nothing_else() -> None:
    (line,) = [line for line in PAGE.splitlines() if line.startswith("| `Stage` |")]
    assert re.findall(r"`([A-Z]+)`", line) == list(Stage.__members__)


def test_every_error_is_there_with_its_base() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", section("Errors"), flags=re.MULTILINE))
    public = {name: getattr(torchrec_scratchpipe, name) for name in torchrec_scratchpipe.__all__}
    errors = {name: value for name, value in public.items() if isinstance(value, type) and issubclass(value, Exception)}
    check_names(errors, list(rows))
    for name, error in errors.items():
        bases = [base for base in error.__bases__ if base is not ScratchPipeError]
        assert [base.__name__ for base in bases] == [rows[name]]


INTERNALS = (ROOT / "docs" / "internals.md").read_text()


def files_of_internals() -> list[str]:
    """The files that the rooms' tables name, and those of the newcomer's minute."""
    files = re.findall(r"`((?:core|sharding|planning|checkpoint|data|privacy)/\w+\.py)`", INTERNALS)
    for room, text in re.findall(r"^### (\w+)/: (.*?)(?=^##)", INTERNALS, flags=re.MULTILINE | re.DOTALL):
        cells = re.findall(r"^\|([^|]+)\|", text, flags=re.MULTILINE)
        files += [f"{room}/{name}" for cell in cells for name in re.findall(r"`(\w+\.py)`", cell)]
    return sorted(set(files))


@pytest.mark.parametrize("file", files_of_internals())
def test_every_file_that_internals_names_exists(file: str) -> None:
    assert (ROOT / "torchrec_scratchpipe" / file).exists()


@pytest.mark.parametrize("room", ["core", "sharding", "planning", "checkpoint", "data", "privacy"])
def test_internals_names_every_file_of_a_room(room: str) -> None:
    files = {f"{room}/{path.name}" for path in (ROOT / "torchrec_scratchpipe" / room).glob("[a-z]*.py")}
    assert files <= set(files_of_internals())


def test_the_lines_of_a_newcomers_minute_are_where_the_page_says() -> None:
    rows = re.findall(r"^\| [^|]+ \| `([^`]+)`[^|]* \| `([^`]+)`, `([^`]+)` \|$", INTERNALS, flags=re.MULTILINE)
    assert len(rows) == 5
    for line, file, function in rows:
        code = (ROOT / "torchrec_scratchpipe" / file).read_text()
        body = code.split(f"def {function.split('.')[-1]}(")[1].split("\n    def ")[0].split("\ndef ")[0]
        assert line.removesuffix("...)") in body, (line, function)
