# SPDX-License-Identifier: BSD-3-Clause
"""What the wheel says of itself is there, and the wheel works where the checkout is not."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import torchrec_scratchpipe

pytestmark = pytest.mark.any_torchrec

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


def run_elsewhere(folder: Path, *command: str) -> str:
    """Run a command from a folder that is not the checkout, and without the checkout on the path of modules."""
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    others = [path for path in others if not (Path(path) / "torchrec_scratchpipe").exists()]
    result = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": os.pathsep.join(others)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and what it needs. It sees torch and the like where the tests have them."""
    folder = tmp_path_factory.mktemp("clean")
    source, wheels, environment = folder / "source", folder / "wheels", folder / "environment"
    for name in ("torchrec_scratchpipe", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run_elsewhere(
        folder, *pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(wheels), str(source)
    )
    run_elsewhere(folder, sys.executable, "-m", "venv", "--without-pip", str(environment))
    (wheel,) = wheels.glob("*.whl")
    python = str(environment / "bin" / "python")
    run_elsewhere(folder, *pip, "--python", python, "install", "--no-deps", "--no-index", str(wheel))
    # A path in a .pth file is a place for modules; .pth files there, such as those of editable installs, are not read.
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return environment


def test_the_wheel_has_the_package_its_types_and_its_license_and_nothing_else(clean: Path) -> None:
    (wheel,) = (clean.parent / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    (information,) = {name.split("/")[0] for name in names} - {"torchrec_scratchpipe"}
    assert information.endswith(".dist-info")
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "torchrec_scratchpipe").rglob("*.py")}
    assert {name for name in names if not name.startswith(information)} == {*modules, "torchrec_scratchpipe/py.typed"}
    assert f"{information}/licenses/LICENSE" in names


def test_the_wheel_is_imported_in_a_clean_environment(clean: Path, tmp_path: Path) -> None:
    program = (
        "import torchrec_scratchpipe as package\n"
        "print(package.__file__, package.__version__, all(hasattr(package, name) for name in package.__all__))"
    )
    file, version, has_all = run_elsewhere(tmp_path, str(clean / "bin" / "python"), "-c", program).split()
    assert Path(file).is_relative_to(clean)
    assert version == torchrec_scratchpipe.__version__
    assert has_all == "True"


# Several scripts in one process: what takes time is to import.
ASK_ALL = """
import contextlib, io, json, runpy, sys
answers = []
for command in json.loads(sys.argv[1]):
    sys.argv, out = command, io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(out):
        runpy.run_path(command[0], run_name="__main__")
    answers.append(out.getvalue())
print(json.dumps(answers))
"""


def test_commands_of_the_wheel_run_in_a_clean_environment(clean: Path, tmp_path: Path) -> None:
    subcommands = ("disk", "compact", "plan")
    commands = [["torchrec-scratchpipe"], *(["torchrec-scratchpipe", name] for name in subcommands)]
    commands.append(["scratchpipe-plan"])
    python = str(clean / "bin" / "python")
    asked = [[str(clean / "bin" / command[0]), *command[1:], "--help"] for command in commands]
    answers = json.loads(run_elsewhere(tmp_path, python, "-c", ASK_ALL, json.dumps(asked)))
    for command, (script, *_), answer in zip(commands, asked, answers, strict=True):
        assert answer.startswith(f"usage: {' '.join(command)} ")
        assert os.access(script, os.X_OK)
        assert python in Path(script).read_text()  # which is run from a shell
    table = {"name": "t", "num_embeddings": 10_000, "embedding_dim": 16}
    (tmp_path / "tables.json").write_text(json.dumps([table]))
    plan = [str(clean / "bin" / "torchrec-scratchpipe"), "plan"]
    out = run_elsewhere(
        tmp_path, *plan, "--tables", "tables.json", "--zipf", "1", "--batch_size", "64", "--scratchpad_gb", "0.0005"
    )
    assert re.search(r"^t +table_wise +scratchpad +10,000 ", out, flags=re.MULTILINE)
