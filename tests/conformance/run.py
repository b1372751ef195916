# SPDX-License-Identifier: BSD-3-Clause
"""Runs the cases and prints what became of each."""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .case import Case, Result, Verdict
from .cases import CASES, QUICK
from .ranks import prepare
from .verdict import judge

__all__ = ["main"]

TIMEOUT_S = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for.

    Args:
        arguments: Of the command line.

    Returns:
        The exit status: 0 if there were cases and none failed.
    """
    options = _parse(arguments)
    cases = [case for case in CASES if _is_wanted(case, options)]
    if options.list:
        _say("\n".join(case.name for case in cases))
        return 0
    prepare()
    start_s = time.monotonic()
    results = [_show(judge(case, options.timeout, not options.no_controls)) for case in cases]
    summary = f"{_summary(results)} {time.monotonic() - start_s:.0f} s."
    _say(summary)
    if options.json:
        options.json.write_text(json.dumps(_as_json(results, summary), indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(_as_markdown(results, summary))
    return 1 if not results or any(result.verdict is Verdict.FAILED for result in results) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("-k", action="append", default=[], metavar="TEXT", help="only names with all these texts")
    parser.add_argument("--quick", action="store_true", help="a few cases of every kind")
    parser.add_argument("--list", action="store_true", help="print the names and run nothing")
    parser.add_argument("--no-controls", action="store_true", help="do not repeat cases with broken scratchpads")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, metavar="S", help="seconds for one run of one case")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--markdown", type=Path, metavar="PATH")
    return parser.parse_args(arguments)


def _is_wanted(case: Case, options: argparse.Namespace) -> bool:
    if options.quick and case.name not in QUICK:
        return False
    return all(text in case.name for text in options.k)


def _summary(results: list[Result]) -> str:
    counts = Counter(result.verdict for result in results)
    verdicts = ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in Verdict)
    victims = sum(result.num_victims for result in results)
    controls = sum(result.num_controls for result in results)
    return f"{len(results)} cases: {verdicts}. {victims:,} victims. {controls} broken scratchpads were noticed."


def _show(result: Result) -> Result:
    reason = f"  {result.reason}" if result.reason else ""
    stock = f"  [stock: {result.stock_error}]" if result.stock_error else ""
    _say(
        f"{result.verdict.value:18}  {result.name:60} {result.num_victims:7,} victims {result.seconds:5.1f} "
        f"s{reason}{stock}"
    )
    return result


def _as_json(results: list[Result], summary: str) -> dict[str, object]:
    cases = [{**asdict(result), "verdict": result.verdict.value} for result in results]
    return {"summary": summary, "cases": cases}


def _as_markdown(results: list[Result], summary: str) -> str:
    lines = [summary, "", "| case | verdict | victims | broken ones noticed | reason |", "|---|---|---|---|---|"]
    for result in results:
        reason = "; stock: ".join(text for text in (result.reason, result.stock_error) if text).replace("|", "\\|")
        lines.append(
            f"| `{result.name}` | {result.verdict.value} | {result.num_victims:,} | {result.num_controls} | {reason} |"
        )
    return "\n".join(lines) + "\n"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
