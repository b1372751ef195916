# SPDX-License-Identifier: BSD-3-Clause
"""Makes the rows of README's table "Results" that come from this example.

    python examples/criteo_dlrm/figures.py --criteo_tsv FILE

`FILE` has the first 10,000 rows of Criteo Kaggle. The first row is of `make demo` beside a stock twin, the second of
benchmark/miss_rates.py's training runs.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent.parent
sys.path.insert(0, str(EXAMPLES / "benchmark"))

from miss_rates import compare_with_training  # noqa: E402


def demo_flags() -> list[str]:
    """Those of `make demo`, without what it writes."""
    makefile = (EXAMPLES.parent / "Makefile").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^DEMO_ARGS := (.*)$", makefile, flags=re.MULTILINE)
    return shlex.split(re.sub(r"--(json|plot) \S+", "", line))


def verified_run(flags: list[str]) -> dict[str, Any]:
    """Figures of one run of the example beside its stock twin."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "figures.json"
        command = [sys.executable, str(EXAMPLES / "criteo_dlrm" / "main.py"), *flags, "--verify", "--json", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def equality_row(figures: dict[str, Any], num_samples: int) -> str:
    verify = figures["verify"]
    num_victims = sum(pool["num_victims"] for pool in figures["scratchpad"])
    return (
        f"| {num_samples:,} real Criteo rows beside a stock twin | largest difference {verify['max_abs_diff']} over "
        f"{verify['num_weights'] / 1e6:.1f} M weights and {verify['num_optimizer_states'] / 1e6:.1f} M optimizer "
        f"states, {num_victims:,} evictions |"
    )


def planning_row(trained: list[dict[str, Any]]) -> str:
    ratios = [result["planned"] / result["counted"] for result in trained]
    num_budgets = len({result["budget_mb"] for result in trained})
    return (
        f"| misses per batch, as planned and as counted, at {num_budgets} budgets, real and generated rows | planned "
        f"is {_difference(min(ratios))} to {_difference(max(ratios))} |"
    )


def _difference(ratio: float) -> str:
    return f"{abs(100 * (ratio - 1)):.1f} % {'less' if ratio < 1 else 'more'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--criteo_tsv", required=True, help="raw Criteo TSV")
    parser.add_argument("--budgets_mb", default="5,7,10,14", help="of the training runs")
    parser.add_argument(
        "--limit_train_batches", type=int, help="of every run, for a quick look; default: as README says"
    )
    args = parser.parse_args()
    limit = [] if args.limit_train_batches is None else ["--limit_train_batches", str(args.limit_train_batches)]
    with open(args.criteo_tsv, "rb") as file:
        num_samples = sum(1 for _ in file)
    print(equality_row(verified_run([*demo_flags(), "--criteo_tsv", args.criteo_tsv, *limit]), num_samples))
    budgets = [float(budget) for budget in args.budgets_mb.split(",")]
    print(planning_row(compare_with_training(args.criteo_tsv, budgets, args.limit_train_batches or 300)))


if __name__ == "__main__":
    main()
