# SPDX-License-Identifier: BSD-3-Clause
"""Runs every test marked `fault`, with 50 kills, and prints a table: fault, tries, outcome, what was lost.

    python tests/faults.py [--kills 50]

A test passes only if the job goes on, or resumes, to the same bits, or if the error named what was wrong and nothing
was written; so "nothing" is what was lost unless a test fails. Exits with 1 then.
"""

import argparse
import os
import sys
from collections import defaultdict
from pathlib import Path

import pytest


class FaultTable:
    """Gathers outcomes by fault."""

    def __init__(self) -> None:
        self._fault_of: dict[str, str] = {}
        self._tries: dict[str, int] = defaultdict(int)
        self._notes: dict[str, list[str]] = defaultdict(list)
        self._failed: dict[str, list[str]] = defaultdict(list)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            marker = item.get_closest_marker("fault")
            if marker is not None:
                self._fault_of[item.nodeid] = marker.args[0]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" or report.nodeid not in self._fault_of:
            return
        fault = self._fault_of[report.nodeid]
        properties = dict(report.user_properties)
        self._tries[fault] += int(str(properties.get("tries", 1)))
        self._notes[fault] += [str(properties["note"])] if "note" in properties else []
        self._failed[fault] += [report.nodeid] if report.failed else []

    def print(self) -> None:
        print("| fault | tries | outcome | lost |")
        print("|---|---|---|---|")
        for fault, tries in self._tries.items():
            failed = self._failed[fault]
            notes = f" ({', '.join(self._notes[fault])})" if self._notes[fault] else ""
            outcome = f"failed: {', '.join(failed)}" if failed else "as it should be"
            print(f"| {fault} | {tries}{notes} | {outcome} | {'see there' if failed else 'nothing'} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="with tables in RAM, and as many memory-mapped")
    args = parser.parse_args()
    os.environ["SCRATCHPIPE_FAULT_TRIES"] = str(args.kills)
    table = FaultTable()
    status = pytest.main(["-m", "fault", "-q", str(Path(__file__).parent)], plugins=[table])
    table.print()
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
