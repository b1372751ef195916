# SPDX-License-Identifier: BSD-3-Clause
"""The documents as a site: links lead somewhere, nothing comes from another host, public names are explained."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import torchrec_scratchpipe
import torchrec_scratchpipe.data

ROOT = Path(__file__).parent.parent
LOADED_BY = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}

pytestmark = [
    pytest.mark.any_torchrec,
    pytest.mark.skipif(
        importlib.util.find_spec("mkdocs") is None,
        reason="mkdocs is not installed: pip install -r requirements-docs.txt",
    ),
]


class Page(HTMLParser):
    """What a page of HTML links to, loads, and can be linked to at."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = {""}
        self.paragraphs: list[str] = []
        self._is_in_paragraph = False
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attributes if value is not None}
        if "id" in given:
            self.anchors.add(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in LOADED_BY and LOADED_BY[tag] in given:
            self.loads.append(given[LOADED_BY[tag]])
        if tag == "p":
            self.paragraphs.append("")
            self._is_in_paragraph = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "p":
            self._is_in_paragraph = False

    def handle_data(self, data: str) -> None:
        if self._is_in_paragraph:
            self.paragraphs[-1] += data


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build a site as `make docs` does. (With --quiet, MkDocs counts no warnings, and --strict does nothing.)"""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)],
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def pages_of(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def broken_links(site: Path, pages: dict[Path, Page]) -> list[str]:
    """Links and loads that lead nowhere inside the site, each with its page."""
    found = []
    for path, page in pages.items():
        for target in (*page.links, *page.loads):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            base = site if parts.path.startswith("/") else path.parent
            place = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            place = place / "index.html" if place.is_dir() else place
            is_there = place.is_file() and (place not in pages or unquote(parts.fragment) in pages[place].anchors)
            found += [] if is_there else [f"{path.relative_to(site)}: {target}"]
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    result = build(ROOT / "mkdocs.yml", folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WARNING" not in result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return pages_of(site)


def test_every_document_is_a_page(site: Path, pages: dict[Path, Page]) -> None:
    documents = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    expected = {path.with_suffix(".html") for path in documents if path.name != "package_index.md"}
    assert {path.relative_to(site) for path in pages} - {Path("404.html")} == expected
    for path in expected:
        assert f'href="{path.as_posix()}"' in (site / "index.html").read_text(), "not in the navigation"


def test_every_link_and_anchor_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    assert sum(len(page.links) for page in pages.values()) > 300
    assert broken_links(site, pages) == []


def test_control_a_broken_link_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "other.html").write_text('<h2 id="there"></h2><img src="gone.png">')
    (tmp_path / "page.html").write_text(
        '<a href="other.html#there"></a><a href="other.html#gone"></a><a href="gone.html"></a><a href="#gone"></a>'
    )
    expected = ["other.html: gone.png", "page.html: other.html#gone", "page.html: gone.html", "page.html: #gone"]
    assert broken_links(tmp_path, pages_of(tmp_path)) == expected


def test_control_the_build_fails_on_broken_links(tmp_path: Path) -> None:
    links = ["gone.md", "api.md#gone", "../README.md"]
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "torchrec_scratchpipe").symlink_to(ROOT / "torchrec_scratchpipe")
    with (tmp_path / "docs" / "symptoms.md").open("a") as page:
        page.writelines(f"\n[a link]({link})\n" for link in links)
    result = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert result.returncode == 1
    warnings = [line for line in (result.stdout + result.stderr).splitlines() if "WARNING" in line]
    assert len(warnings) == len(links)
    for link in links:
        assert any(f"'{link}'" in line for line in warnings), warnings


def test_nothing_comes_from_another_host(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        assert [target for target in page.loads if urlsplit(target).netloc] == [], path.name
        assert "mermaid" not in path.read_text()  # the theme would load it from a content network
    for path in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^\"')]*", path.read_text()) == [], path.name


def test_pictures_are_there(site: Path) -> None:
    for name in ("monitoring_pictures/report.png", "benchmarks/overlap_cpu.png"):
        assert (site / name).read_bytes()[1:4] == b"PNG"


def test_lists_are_lists(pages: dict[Path, Page]) -> None:
    """GitHub takes a list that follows a line of text without an empty line between; MkDocs does not."""
    for path, page in pages.items():
        for paragraph in page.paragraphs:
            assert not re.search(r"\n *(\*|-|\d+\.) |^\|", paragraph), f"{path.name}: {paragraph}"


def test_every_public_name_is_explained(site: Path, pages: dict[Path, Page]) -> None:
    anchors = pages[site / "reference.html"].anchors
    names = [f"torchrec_scratchpipe.{name}" for name in torchrec_scratchpipe.__all__]
    names += [f"torchrec_scratchpipe.data.{name}" for name in torchrec_scratchpipe.data.__all__]
    assert [name for name in names if name not in anchors] == []
    assert "torchrec_scratchpipe.CheckpointManager.async_save" in anchors
    text = (site / "reference.html").read_text()
    assert 'href="#torchrec_scratchpipe.IdOutOfRangeError"><code>' in text
    assert not re.search(r":(attr|class|func|meth|mod):", text)


def test_names_are_grouped_as_on_the_page_of_names() -> None:
    """Docstrings stand under the heading, and in the order, of docs/api.md."""
    names = re.sub(
        r"^### Fields of .*?(?=^##? |^### |\Z)", "", (ROOT / "docs" / "api.md").read_text(), flags=re.M | re.S
    )
    expected = re.findall(r"^## (.*)$|^\| `(\w+)` \|", names, flags=re.M)
    docstrings = (ROOT / "docs" / "reference.md").read_text()
    assert re.findall(r"^## (.*)$|^::: torchrec_scratchpipe\.(?:data\.)?(\w+)$", docstrings, flags=re.M) == expected


def test_what_is_searched_is_there(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())
    places = {entry["location"] for entry in index["docs"]}
    assert {"tutorial.html", "symptoms.html", "api.html#errors"} <= places
    assert any("scratchpad" in entry["text"] for entry in index["docs"])
