# SPDX-License-Identifier: BSD-3-Clause
"""How long it takes to see and to plan a batch, and what the slot map takes of memory; on one core, without a model.

    OMP_NUM_THREADS=1 python examples/benchmark/plan_speed.py --num_batches_seen_ahead 200

26 tables of 1 M rows, a slot for every twentieth row, batches of 26 x 4,096 ids by a Zipf law.
"""

import argparse
import statistics
import time
from collections import deque

import numpy as np
import torch

from torchrec_scratchpipe.core.slot_map import PoolIds, SlotMap
from torchrec_scratchpipe.core.slot_ops import FeatureIds, FeatureRows
from torchrec_scratchpipe.core.torch_ops import TorchOps

NUM_TABLES, NUM_ROWS, BATCH_SIZE, EXPONENT, LOAD_FACTOR = 26, 1_000_000, 4096, 1.05, 0.05
LOOKAHEAD, NUM_WARMUP_BATCHES = 2, 60


def make_batch(generator: np.random.Generator) -> PoolIds:
    uniform = generator.random((NUM_TABLES, BATCH_SIZE))
    ranks = ((uniform * (NUM_ROWS ** (1 - EXPONENT) - 1) + 1) ** (1 / (1 - EXPONENT))).astype(np.int64)
    ids = torch.from_numpy((np.minimum(ranks, NUM_ROWS - 1) * 618_033 + 7) % NUM_ROWS)
    bounds = torch.arange(NUM_TABLES + 1, dtype=torch.int64) * BATCH_SIZE
    table = torch.arange(NUM_TABLES, dtype=torch.int32)
    rows = torch.full((NUM_TABLES,), NUM_ROWS, dtype=torch.int64)
    return PoolIds(FeatureIds(ids.reshape(-1), bounds), FeatureRows(table.long() * NUM_ROWS, rows, table))


def main() -> None:
    """Print the mean and the median of a batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_batches_seen_ahead", type=int, default=16, help="before they are planned")
    parser.add_argument("--num_batches", type=int, default=60, help="that are timed, after as many to warm up")
    args = parser.parse_args()
    generator, num_rows = np.random.default_rng(0), NUM_TABLES * NUM_ROWS
    num_ahead = args.num_batches_seen_ahead
    batches = [make_batch(generator) for _ in range(NUM_WARMUP_BATCHES + args.num_batches + num_ahead + 1)]
    offsets = [table * NUM_ROWS for table in range(NUM_TABLES + 1)]
    slot_map = SlotMap(num_rows, int(LOAD_FACTOR * num_rows), offsets, TorchOps(), torch.device("cpu"))
    seen = deque(slot_map.see(batch) for batch in batches[:num_ahead])
    in_flight: deque[int] = deque()
    times_ms = []
    for index in range(NUM_WARMUP_BATCHES + args.num_batches):
        start_s = time.perf_counter()
        if num_ahead:
            seen.append(slot_map.see(batches[index + num_ahead]))
        slot_map.take_in_releases()
        plan = slot_map.plan(batches[index], seen.popleft() if num_ahead else None)
        assert slot_map.confirm(plan)
        times_ms.append(1e3 * (time.perf_counter() - start_s))
        in_flight.append(plan.batch_index)
        if len(in_flight) > LOOKAHEAD:
            slot_map.release(in_flight.popleft())
    timed = times_ms[NUM_WARMUP_BATCHES:]
    print(
        f"{num_ahead} batches seen ahead: {statistics.mean(timed):.2f} ms a batch in the mean, "
        f"{statistics.median(timed):.2f} in the median; {slot_map.metadata_bytes / 1e6:.1f} MB of maps and buffers"
    )


if __name__ == "__main__":
    main()
