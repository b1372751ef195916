# SPDX-License-Identifier: BSD-3-Clause
"""Misses per batch: of several ways to choose victims for the same slots; as planned, and as a training run counted.

    python examples/benchmark/miss_rates.py --criteo_tsv train.txt

Orders run without a model, by the slot map that training uses: ours with lookahead 1 and 16 or 200 batches seen beyond,
LRU, a 32-way set-associative LRU of FBGEMM's shape, and Belady's optimum, which knows all batches to the end. All but
Belady's and "16 seen, none held" hold the rows of the batches in flight; while slots are too few for two batches, one
is in flight. Training runs are those of examples/criteo_dlrm/main.py at four budgets.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from torchrec_scratchpipe.core.slot_map import PoolIds, SlotMap, SlotsHeldError
from torchrec_scratchpipe.core.slot_ops import HALF_LIFE, FeatureIds, FeatureRows
from torchrec_scratchpipe.core.torch_ops import TorchOps

Ids = npt.NDArray[np.int64]
LOOKAHEAD, NUM_BATCHES_SEEN_AHEAD = 1, 16
NUM_WAYS = 32
EXAMPLE = Path(__file__).parents[1] / "criteo_dlrm" / "main.py"


class Trace(NamedTuple):
    """Batches of row ids, and how many rows there are."""

    name: str
    batches: list[Ids]
    num_rows: int


def zipf_trace(exponent: float, num_rows: int = 500_000, num_ids: int = 4096, num_batches: int = 400) -> Trace:
    rng = np.random.default_rng(int(100 * exponent))
    cumulative = np.cumsum(np.arange(1, num_rows + 1) ** -exponent)
    row_of_rank = rng.permutation(num_rows)
    ranks = np.searchsorted(cumulative / cumulative[-1], rng.random((num_batches, num_ids)))
    return Trace(f"Zipf {exponent}", list(row_of_rank[np.minimum(ranks, num_rows - 1)]), num_rows)


def criteo_trace(path: str, batch_size: int = 16) -> Trace:
    """Distinct (column, value) pairs are the rows; so few samples that a batch fits 1 % of them."""
    row_of: dict[tuple[int, str], int] = {}
    rows = []
    with open(path, encoding="ascii") as file:
        for line in file:
            values = line.rstrip("\n").split("\t")[14:]
            rows.append([row_of.setdefault(pair, len(row_of)) for pair in enumerate(values)])
    batches = [np.array(rows[i : i + batch_size]).ravel() for i in range(0, len(rows) - batch_size + 1, batch_size)]
    return Trace("Criteo rows", batches, len(row_of))


def count(
    trace: Trace, num_slots: int, num_seen_ahead: int, lookahead: int = LOOKAHEAD, half_life: float = HALF_LIFE
) -> Ids:
    """Misses per batch by the slot map, as a pipeline would drive it."""
    offsets = [0, trace.num_rows]
    slot_map = SlotMap(trace.num_rows, num_slots, offsets, TorchOps(), torch.device("cpu"), half_life=half_life)
    rows = [_ids_of_one_table(ids, trace.num_rows) for ids in trace.batches]
    seen: list[int | None] = []
    in_flight: list[int] = []
    misses = []
    for index, ids in enumerate(rows):
        while len(seen) < min(len(rows), index + 1 + num_seen_ahead):
            seen.append(slot_map.see(rows[len(seen)]) if num_seen_ahead else None)
        while len(in_flight) > lookahead:
            slot_map.release(in_flight.pop(0))
        while True:
            try:
                slot_map.take_in_releases()
                plan = slot_map.plan(ids, seen[index])
                if slot_map.confirm(plan):
                    break
            except SlotsHeldError:  # Plan waits for a batch in flight to train
                slot_map.release(in_flight.pop(0))
        in_flight.append(plan.batch_index)
        misses.append(plan.moves().miss_rows.numel())
    return np.array(misses)


def _ids_of_one_table(ids: Ids, num_rows: int) -> PoolIds:
    bounds, first, num, table = (
        torch.tensor(values, dtype=torch.int64) for values in ([0, ids.size], [0], [num_rows], [0])
    )
    return PoolIds(FeatureIds(torch.from_numpy(ids), bounds), FeatureRows(first, num, table.int()))


def count_lru(trace: Trace, num_slots: int) -> Ids:
    """Those rows leave whose last use is longest ago."""
    last_use = np.full(trace.num_rows, -1)  # of resident rows
    misses = []
    for batch, ids in enumerate(trace.batches):
        rows = np.unique(ids)
        misses.append(int((last_use[rows] < 0).sum()))
        last_use[rows] = batch
        resident = np.flatnonzero(last_use >= 0)
        if resident.size > num_slots:
            num_victims = resident.size - num_slots
            last_use[resident[np.argpartition(last_use[resident], num_victims - 1)[:num_victims]]] = -1
    return np.array(misses)


def count_set_associative(trace: Trace, num_slots: int) -> Ids:
    """Each row may be in one set of 32 slots; a row whose set is full of rows of this batch is not cached."""
    num_sets = num_slots // NUM_WAYS
    row_in = np.full((num_sets, NUM_WAYS), -1)
    last_use = np.full((num_sets, NUM_WAYS), -1)
    way_of = np.full(trace.num_rows, -1)
    misses = []
    for batch, ids in enumerate(trace.batches):
        rows = np.unique(ids)
        sets = (rows * 0x9E3779B1 % (1 << 32)) % num_sets
        is_hit = way_of[rows] >= 0
        last_use[sets[is_hit], way_of[rows[is_hit]]] = batch
        misses.append(int((~is_hit).sum()))
        by_set = np.argsort(sets[~is_hit], kind="stable")
        miss_rows, miss_sets = rows[~is_hit][by_set], sets[~is_hit][by_set]
        nth_of_set = np.arange(miss_sets.size) - np.searchsorted(miss_sets, miss_sets)
        has_way = nth_of_set < NUM_WAYS
        miss_rows, miss_sets, nth_of_set = miss_rows[has_way], miss_sets[has_way], nth_of_set[has_way]
        oldest_first = np.argsort(last_use, axis=1, kind="stable")
        ways = oldest_first[miss_sets, nth_of_set]
        is_free = last_use[miss_sets, ways] < batch
        miss_rows, miss_sets, ways = miss_rows[is_free], miss_sets[is_free], ways[is_free]
        victims = row_in[miss_sets, ways]
        way_of[victims[victims >= 0]] = -1
        row_in[miss_sets, ways] = miss_rows
        last_use[miss_sets, ways] = batch
        way_of[miss_rows] = ways
    return np.array(misses)


def count_belady(trace: Trace, num_slots: int) -> Ids:
    unique = [np.unique(ids) for ids in trace.batches]
    next_use = np.full(trace.num_rows, 1 << 30)
    next_uses = []
    for index in reversed(range(len(unique))):
        next_uses.append(next_use[unique[index]])
        next_use[unique[index]] = index
    next_use[:] = 1 << 30
    is_resident = np.zeros(trace.num_rows, dtype=bool)
    is_used = np.zeros(trace.num_rows, dtype=bool)
    num_resident = 0
    misses = []
    for rows, uses in zip(unique, reversed(next_uses), strict=True):
        is_miss = ~is_resident[rows]
        num_misses = int(is_miss.sum())
        next_use[rows] = uses
        is_used[rows] = True
        num_victims = num_resident + num_misses - num_slots
        if num_victims > 0:
            candidates = np.flatnonzero(is_resident & ~is_used)
            farthest = np.argpartition(-next_use[candidates], num_victims - 1)[:num_victims]
            is_resident[candidates[farthest]] = False
            num_resident -= num_victims
        is_used[rows] = False
        is_resident[rows] = True
        num_resident += num_misses
        misses.append(num_misses)
    return np.array(misses)


ORDERS: dict[str, Callable[[Trace, int], Ids]] = {
    "ours": lambda trace, n: count(trace, n, NUM_BATCHES_SEEN_AHEAD),
    "ours, 200 seen": lambda trace, n: count(trace, n, 200),
    "16 seen, none held": lambda trace, n: count(trace, n, NUM_BATCHES_SEEN_AHEAD, 0),
    "ours, nothing seen": lambda trace, n: count(trace, n, 0),
    "LRU": count_lru,
    "32-way LRU": count_set_associative,
    "Belady": count_belady,
}


def compare_orders(traces: Sequence[Trace], num_warm_up: int = 100) -> list[dict[str, object]]:
    results = []
    for trace in traces:
        for load_factor in (0.01, 0.02, 0.05, 0.10):
            num_slots = int(load_factor * trace.num_rows)
            misses = {name: float(order(trace, num_slots)[num_warm_up:].mean()) for name, order in ORDERS.items()}
            results.append({"trace": trace.name, "load_factor": load_factor, "num_slots": num_slots, "misses": misses})
            print(f"{trace.name} {load_factor:.0%}", file=sys.stderr)
    return results


def follow_a_shift(num_batches: int = 1500) -> list[dict[str, object]]:
    """All rows change their popularity in mid-run."""
    before, after = zipf_trace(1.05, 100_000, 2048, num_batches), zipf_trace(1.0501, 100_000, 2048, num_batches)
    generator = np.random.default_rng(7)
    new_row = generator.permutation(100_000)
    trace = Trace("shift", before.batches + [new_row[ids] for ids in after.batches], 100_000)
    num_slots = 5000
    runs = {
        "ours": count(trace, num_slots, 0),
        "ours, frequencies never age": count(trace, num_slots, 0, half_life=1e9),
        "LRU": count_lru(trace, num_slots),
    }
    phases = {
        "the last 500 before": slice(num_batches - 500, num_batches),
        "first 100 after": slice(num_batches, num_batches + 100),
        "100 to 500 after": slice(num_batches + 100, num_batches + 500),
        "500 to 1,500 after": slice(num_batches + 500, num_batches + 1500),
    }
    return [
        {"phase": phase, "misses": {name: float(misses[part].mean()) for name, misses in runs.items()}}
        for phase, part in phases.items()
    ]


def compare_with_training(
    criteo_tsv: str | None, budgets_mb: Sequence[float], num_batches: int = 300
) -> list[dict[str, Any]]:
    """Misses as planned and as the example's training counts them, over the later half of the batches."""
    sources: dict[str, list[str]] = {"generated": []}
    if criteo_tsv:
        sources["Criteo rows"] = ["--criteo_tsv", criteo_tsv]
    results = []
    for source, source_flags in sources.items():
        for budget_mb in budgets_mb:
            with tempfile.TemporaryDirectory() as directory:
                figures_path = Path(directory) / "figures.json"
                flags = {
                    "--batch_size": 128 if source == "generated" else 64,
                    "--limit_val_batches": 1,
                    "--max_num_embeddings": 100_000,
                    "--embedding_dim": 32,
                    "--limit_train_batches": num_batches,
                    "--num_measured_batches": num_batches,
                    "--scratchpad_budget_gb": budget_mb / 1024,
                    "--json": figures_path,
                }
                arguments = [str(word) for pair in flags.items() for word in pair]
                subprocess.run([sys.executable, EXAMPLE, *source_flags, *arguments], check=True, capture_output=True)
                figures = json.loads(figures_path.read_text())
            num_slots = sum(pool["num_slots"] for pool in figures["scratchpad"])
            misses = figures["misses_per_batch"]
            results.append({"rows": source, "budget_mb": budget_mb, "num_slots": num_slots, **misses})
            print(results[-1], file=sys.stderr)
    return results


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("| " + " | ".join(headings) + " |")
    print("|---" * len(headings) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--criteo_tsv", help="raw Criteo TSV; default: generated rows alone")
    parser.add_argument(
        "--budgets_mb", default="5,7,10,14", help="of the training runs; needs to hold batches in flight"
    )
    parser.add_argument("--skip_training", action="store_true")
    parser.add_argument("--json", help="write all figures there")
    args = parser.parse_args()
    traces = [zipf_trace(exponent) for exponent in (0.8, 1.05, 1.2)]
    if args.criteo_tsv:
        traces.append(criteo_trace(args.criteo_tsv))
    orders = compare_orders(traces)
    print_table(
        ["rows", "slots", *ORDERS, "ours / LRU", "ours / Belady", "200 seen / LRU", "200 seen / Belady"],
        [
            [
                str(result["trace"]),
                f"{result['num_slots']:,} ({result['load_factor']:.0%})",
                *(f"{result['misses'][name]:,.1f}" for name in ORDERS),
                *(
                    f"{result['misses'][name] / result['misses'][other]:.3f}"
                    for name in ("ours", "ours, 200 seen")
                    for other in ("LRU", "Belady")
                ),
            ]
            for result in orders
        ],
    )
    for name in ("ours", "ours, 200 seen", "16 seen, none held", "ours, nothing seen", "LRU", "32-way LRU"):
        mean = np.mean([result["misses"][name] / result["misses"]["Belady"] for result in orders])
        print(f"{name}: {mean:.3f} of Belady's misses, on average")
    print()
    shift = follow_a_shift()
    print_table(
        ["batches", *shift[0]["misses"]],
        [[phase["phase"], *(f"{misses:,.1f}" for misses in phase["misses"].values())] for phase in shift],
    )
    trained = []
    if not args.skip_training:
        trained = compare_with_training(args.criteo_tsv, [float(budget) for budget in args.budgets_mb.split(",")])
        print_table(
            ["rows", "budget (MB)", "slots", "misses per batch, as planned", "as counted", "ratio"],
            [
                [
                    result["rows"],
                    f"{result['budget_mb']:g}",
                    f"{result['num_slots']:,}",
                    f"{result['planned']:,.1f}",
                    f"{result['counted']:,.1f}",
                    f"{result['planned'] / max(result['counted'], 1e-9):.3f}",
                ]
                for result in trained
            ],
        )
    if args.json:
        Path(args.json).write_text(json.dumps({"orders": orders, "shift": shift, "trained": trained}, indent=2))


if __name__ == "__main__":
    main()
