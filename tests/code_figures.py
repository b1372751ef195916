# SPDX-License-Identifier: BSD-3-Clause
"""What the code looks like, in figures: its size, its comments, and how far one batch walks through it.

    python tests/code_figures.py                       # this checkout
    python tests/code_figures.py --package OLD/torchrec_scratchpipe --no_walk      # another, without running it

A function counts from its `def` to its end. A call climbs if the called file imports, directly or not, the file that
calls.
"""

import argparse
import ast
import io
import statistics
import sys
import tempfile
import threading
import tokenize
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from test_imports import PACKAGE, module_of, own_imports, reached

LONGEST_LINE, LONG_FUNCTION = 120, 30


def figures_of(package: Path) -> dict[str, Any]:
    """Of all files of a package."""
    texts = {path: path.read_text() for path in sorted(package.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    lines = [len(text.splitlines()) for text in texts.values()]
    functions = [
        node.end_lineno - node.lineno + 1
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    ]
    return {
        "files": len(texts),
        "lines": sum(lines),
        "median file": round(statistics.median(lines)),
        "longest file": max(lines),
        "functions": len(functions),
        f"functions of at most {LONG_FUNCTION} lines (%)": percent(
            sum(n <= LONG_FUNCTION for n in functions), len(functions)
        ),
        "longest function": max(functions),
        "docstring lines (%)": percent(sum(map(docstring_lines, trees.values())), sum(lines)),
        "comment lines (%)": percent(sum(map(comment_lines, texts.values())), sum(lines)),
        f"lines over {LONGEST_LINE}": sum(
            len(line) > LONGEST_LINE for text in texts.values() for line in text.splitlines()
        ),
    }


def percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 1)


def docstring_lines(tree: ast.Module) -> int:
    total = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                assert first.end_lineno is not None
                total += first.end_lineno - first.lineno + 1
    return total


def comment_lines(text: str) -> int:
    """Lines that are, or end in, a comment; licences and words to tools do not count."""
    comments = (
        token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT
    )
    return sum(not token.string.startswith(("# SPDX", "# type:", "# noqa")) for token in comments)


class Walk:
    """The files of the package that a step enters, and the calls from one to another; of all threads."""

    def __init__(self, package: Path) -> None:
        self._package = str(package)
        self.calls: Counter[tuple[str, str]] = Counter()

    def _trace(self, frame: Any, event: str, _arg: Any) -> None:
        if event != "call":
            return
        callee = frame.f_code.co_filename
        if not callee.startswith(self._package):
            return
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(self._package):
            caller = caller.f_back
        name = "" if caller is None else caller.f_code.co_filename
        if name != callee:
            self.calls[(name, callee)] += 1

    def __enter__(self) -> "Walk":
        threading.setprofile_all_threads(self._trace) if sys.version_info >= (3, 12) else threading.setprofile(
            self._trace
        )
        sys.setprofile(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    @property
    def files(self) -> set[str]:
        return {Path(name).stem for call in self.calls for name in call if name}

    def climbs(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for (caller, callee), count in self.calls.items():
            if caller and module_of(caller) in reached(own_imports(Path(callee))):
                found[f"{Path(caller).stem} -> {Path(callee).stem}"] += count
        return found


def walk_of_one_batch(kind: str | None) -> Walk:
    """One steady `progress()` of a model of three tables, lookahead 2; the worker's part too."""
    import torch.distributed as dist
    from device_path import use_device_path
    from helpers import Setting, Trainer, make_batches

    end = use_device_path(kind) if kind else lambda: None
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
    setting = Setting(num_batches=30)
    with Walk(PACKAGE) as walk:  # before the worker's thread begins
        trainer = Trainer.scratchpipe(setting)
        pipeline, batches = trainer.pipeline(lookahead=2), iter(make_batches(setting))
        for _ in range(10):
            pipeline.progress(batches)
        trainer.model.module.ebc.wait_until_idle()
        walk.calls.clear()
        pipeline.progress(batches)
        trainer.model.module.ebc.wait_until_idle()
    end()
    return walk


def print_table(rows: Iterable[tuple[str, Any]]) -> None:
    for name, value in rows:
        print(f"{name:45s} {value:>12,}" if isinstance(value, int) else f"{name:45s} {value:>12}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=PACKAGE)
    parser.add_argument("--no_walk", action="store_true", help="count only")
    args = parser.parse_args()
    print_table(figures_of(args.package).items())
    for way, kind in (("staged", None), ("in place", "torch")) if not args.no_walk else ():
        walk = walk_of_one_batch(kind)
        climbs = walk.climbs()
        print_table(
            [(f"{way}: files that one batch enters", len(walk.files)), (f"{way}: calls that climb", climbs.total())]
        )
        print("   ", ", ".join(sorted(walk.files)))
        print("   ", ", ".join(f"{name} ({count})" for name, count in climbs.most_common()) or "none climbs")


if __name__ == "__main__":
    main()
