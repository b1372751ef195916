# SPDX-License-Identifier: BSD-3-Clause
"""Draws configurations and compares them with stock TorchRec, one seed after another, until the time is up.

    python tests/fuzz.py --minutes 30 --json fuzz.json

Prints each seed with its number of configurations and its outcome; a seed that fails prints the shrunk configuration.
Exits with 1 if any failed. `python -m pytest tests/test_random_settings.py --hypothesis-seed=SEED` repeats a seed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent / "test_random_settings.py"
NUM_DRAWING_TESTS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="no seed is begun after this many")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=50, help="configurations per test and seed")
    parser.add_argument("--json", type=Path, help="where the outcomes go")
    args = parser.parse_args()
    end_s = time.monotonic() + 60 * args.minutes
    outcomes = []
    seed = args.first_seed
    while time.monotonic() < end_s:
        outcomes.append(run_seed(seed, args.examples))
        print(
            "seed {seed}: {num_configurations} configurations, {outcome}, {seconds:.0f} s".format(**outcomes[-1]),
            flush=True,
        )
        seed += 1
    num_failed = sum(outcome["outcome"] != "passed" for outcome in outcomes)
    total = sum(int(outcome["num_configurations"]) for outcome in outcomes)
    print(f"{len(outcomes)} seeds, up to {total} configurations, {num_failed} seeds failed")
    if args.json is not None:
        args.json.write_text(json.dumps(outcomes, indent=1) + "\n")
    return int(num_failed > 0)


def run_seed(seed: int, num_examples: int) -> dict[str, str | int | float]:
    start_s = time.monotonic()
    command = [sys.executable, "-m", "pytest", str(TESTS), f"--hypothesis-seed={seed}", "-p", "no:cacheprovider"]
    environment = {**os.environ, "SCRATCHPIPE_FUZZ_EXAMPLES": str(num_examples)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        print(result.stdout, result.stderr, sep="\n", flush=True)
    return {
        "seed": seed,
        "num_configurations": NUM_DRAWING_TESTS * num_examples,
        "outcome": "passed" if result.returncode == 0 else "failed",
        "seconds": round(time.monotonic() - start_s, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
