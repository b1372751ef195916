# SPDX-License-Identifier: BSD-3-Clause
"""The HTML reports of a run and of a plan: they need nothing else, and fit a wide screen and a narrow one."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import Setting, Trainer, drain, make_batches

from torchrec_scratchpipe import ConfigError, ScratchPipeMonitor
from torchrec_scratchpipe.planning.command import main as plan
from torchrec_scratchpipe.planning.page import Page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SETTING = Setting(num_rows=(60, 90), dims=(4, 8), load_factor=0.5)
# What a reader's eye would see: does the page scroll sideways, is a picture broken, how many are shown.
LOOK = """<script>onload = () => { const shown = [...document.images].filter(one => one.offsetWidth > 0);
document.title = JSON.stringify({width: innerWidth, page: document.documentElement.scrollWidth, shown: shown.length,
broken: shown.filter(one => !one.complete || !one.naturalWidth).length}) }</script>"""


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    trainer, path = Trainer.scratchpipe(SETTING), tmp_path_factory.mktemp("run") / "run.html"
    pipeline = trainer.pipeline()
    with ScratchPipeMonitor(trainer.model, pipeline, every=20, log=False) as monitor:
        drain(pipeline, make_batches(SETTING))
        monitor.save_report(path)
    return path


@pytest.fixture(scope="module")
def plan_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    tables, path = folder / "tables.json", folder / "plan.html"
    table = {"num_embeddings": 20_000, "embedding_dim": 16}
    tables.write_text(json.dumps([{"name": f"t{index}", **table} for index in range(30)]))
    arguments = ["--zipf", "1.05", "--batch_size", "64", "--scratchpad_gb", "0.006"]
    assert plan(["--tables", str(tables), *arguments, "--html", str(path)]) == 0
    return path


@pytest.fixture(scope="module", params=["run", "plan"])
def page(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_page")


def test_nothing_comes_from_elsewhere(page: Path) -> None:
    text = page.read_text()
    addresses = re.findall(r'(?:src|href)="([^"]{,40})', text)
    assert addresses
    assert all(address.startswith("data:image/svg+xml;base64,") for address in addresses)
    assert "<script" not in text
    assert "@import" not in text
    assert "url(" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [375, 1280])
def test_it_fits_the_screen(page: Path, width: int) -> None:
    looked_at = page.with_name(f"looked_at_{width}.html")
    looked_at.write_text(page.read_text() + LOOK)
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--virtual-time-budget=5000",
        "--dump-dom",
    ]
    assert CHROMIUM is not None
    command = [CHROMIUM, *flags, f"--window-size={width},900", looked_at.as_uri()]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>({.*?})</title>", done.stdout)
    assert found is not None, done.stderr[-500:]
    seen = json.loads(found[1])
    assert seen["width"] <= max(width, 500)  # no window of this browser is narrower
    assert seen["page"] <= seen["width"]
    assert seen["broken"] == 0
    assert seen["shown"] == page.read_text().count("<figure>")  # one of two widths each


def test_the_run_is_told_in_full(run_page: Path) -> None:
    text = run_page.read_text()
    for part in ("Time of a step", "Pool of table t0", "Pool of table t1", "misses by load factor", "stages"):
        assert part in text
    assert text.count("<tr>") == 2 + 2


def test_the_plan_is_told_in_full(plan_page: Path) -> None:
    text = plan_page.read_text()
    for part in ("Sharding plan", "device memory by rank", "misses per unique id", "t29"):
        assert part in text
    assert text.count("<tr>") == 1 + 30


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with (
        ScratchPipeMonitor(Trainer.scratchpipe(SETTING).model) as monitor,
        pytest.raises(ConfigError, match="no window has ended"),
    ):
        monitor.save_report(tmp_path / "run.html")
    assert not (tmp_path / "run.html").exists()


def test_names_are_no_markup(tmp_path: Path) -> None:
    page = Page("<b>&")
    page.table(["<i>"], [["<script>"]])
    page.points(["a < b"])
    page.save(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script>" not in text
    assert "<i>" not in text
    assert "&lt;script&gt;" in text
    assert "<title>&lt;b&gt;&amp;</title>" in text
