# SPDX-License-Identifier: BSD-3-Clause
"""Test modules that are marked `any_torchrec` reach no TorchRec: no version of it can change what they find."""

import functools
import re
from pathlib import Path

import pytest
from test_imports import MODULES, imported_modules

import torchrec_scratchpipe

pytestmark = pytest.mark.any_torchrec

TESTS = Path(__file__).parent
OTHERS = {"torchrec", "fbgemm_gpu"}
PUBLIC = {f"torchrec_scratchpipe.{name}" for name in torchrec_scratchpipe.__all__}
MARKED = [
    path.stem
    for path in sorted(TESTS.glob("test_*.py"))
    if re.search(r"^pytestmark = .*\bany_torchrec\b", path.read_text(), flags=re.MULTILINE)
]


names_of = functools.cache(imported_modules)


def torchrec_of(path: Path) -> set[str]:
    """What a test module imports of TorchRec: itself, by what the tests share, or by modules of the package.

    `import torchrec_scratchpipe` is for names to look at. What is taken from there by name may do anything.
    """
    found: set[str] = set()
    files, seen = [path], set()
    while files:
        file = files.pop()
        seen.add(file)
        found |= {name for name in names_of(file) if name.partition(".")[0] in OTHERS} | (names_of(file) & PUBLIC)
        for name in names_of(file):
            imported = MODULES.get(name.removeprefix("torchrec_scratchpipe."), TESTS / f"{name}.py")
            if imported.exists() and imported not in seen:
                files.append(imported)
    return found


@pytest.mark.parametrize("module", MARKED)
def test_a_marked_module_reaches_no_torchrec(module: str) -> None:
    assert torchrec_of(TESTS / f"{module}.py") == set()


def test_control_what_reaches_torchrec_is_noticed(tmp_path: Path) -> None:
    for module in ("test_equivalence", "test_parquet", "test_privacy_norms", "test_plan", "test_follow"):
        assert torchrec_of(TESTS / f"{module}.py"), module
    for number, line in enumerate(
        (
            "from torchrec_scratchpipe.planning.planner import ScratchPipeShardingPlanner",
            "def test() -> None:\n    import helpers",
            "from torchrec_scratchpipe import load_checkpoint",
            "import torchrec.distributed",
        )
    ):
        path = tmp_path / f"test_{number}.py"
        path.write_text(line)
        assert torchrec_of(path), line
    path = tmp_path / "test_core.py"
    path.write_text("import core_helpers\nimport torchrec_scratchpipe")
    assert torchrec_of(path) == set()


def test_modules_that_take_long_are_marked() -> None:
    assert {"test_slot_map", "test_device_batch", "test_disk_tier", "test_triton_ops", "test_reuse"} <= set(MARKED)
