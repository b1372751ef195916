# SPDX-License-Identifier: BSD-3-Clause
"""What private training costs: steps whose noise comes late, beside steps without privacy, and steps of plain DP-SGD.

    python examples/benchmark/private_training.py --rows 10000,100000,1000000,10000000
    python examples/benchmark/private_training.py --rows 1000000 --ids_per_bag 1,10,50

8 tables of rows x 32 (10 GB at 10,000,000 rows), SGD, batches of 2,048, ids by a power law, and the dense layers of
workloads.py: 13-512-256-32 below, 512-512-256-1 above. Three ways train on the same batches, in one process:

*plain*: our pipeline without privacy. *lazy*: the same with `LazyDP`; a row gets its noise when it is next used.
*eager*: as lazy, and after each step all rows of all tables get their noise, by the same functions. That is DP-SGD.

Plain and lazy take turns in blocks, and whoever went first goes last in the next round. Both have tables of their own,
of all rows; if memory is too small for both, plain is timed before and after, and lazy and eager in between. Eager
trains the lazy model; it is slow, so that few of its steps are timed.
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from rivals import Contender, Shape
from workloads import WORKLOADS, Workload

from torchrec_scratchpipe import LazyDP, ScratchPipeTrainPipeline
from torchrec_scratchpipe.sharding.model import scratchpad_collections

SEED = 1
LOOKAHEAD = 2
NUM_WARMUP_STEPS, BLOCK_STEPS = 5, 5
NUM_SPARE_BATCHES = 8  # that a pipeline may draw ahead
CLIP, NOISE_MULTIPLIER, SAMPLE_RATE = 1.0, 1.1, 1e-4
MAX_LOAD_FACTOR = 0.5
SHARE_OF_MEMORY = 0.85


@dataclass
class Way:
    """A model that is trained in one way."""

    contender: Contender
    num_left: int

    def run(self, num_steps: int, *, is_eager: bool = False) -> float:
        """Milliseconds of a step."""
        assert self.contender.batches is not None
        assert num_steps <= self.num_left, f"{num_steps} steps, {self.num_left} batches"
        self.num_left -= num_steps
        self.contender.batches.prepare(num_steps + NUM_SPARE_BATCHES)
        pools = [pool for each in scratchpad_collections(self.contender.model) for pool in each.pools]
        start_s = time.perf_counter()
        for _ in range(num_steps):
            self.contender.run(1)
            for pool in pools if is_eager else []:
                pool.catch_up_all()
        return 1e3 * (time.perf_counter() - start_s) / num_steps


def make_way(workload: Workload, zipf: float, num_steps: int, device: torch.device, *, is_private: bool) -> Way:
    """Build it, and train its first steps."""
    num_ids = 1.25 * workload.ids_per_batch * (LOOKAHEAD + 2)  # of all batches in flight, if none were named twice
    shape = Shape(workload, "sgd", min(MAX_LOAD_FACTOR, num_ids / workload.num_rows), LOOKAHEAD)
    contender = Contender("scratchpipe", shape, device)
    num_batches = NUM_WARMUP_STEPS + num_steps + NUM_SPARE_BATCHES
    contender.start(zipf, LOOKAHEAD, SEED, num_batches)
    if is_private:
        privacy = LazyDP(CLIP, NOISE_MULTIPLIER, SAMPLE_RATE, expected_batch_size=workload.batch_size)
        contender.pipeline = ScratchPipeTrainPipeline(
            contender.model, contender.optimizer, device, lookahead=LOOKAHEAD, privacy=privacy
        )
    way = Way(contender, NUM_WARMUP_STEPS + num_steps)
    way.run(NUM_WARMUP_STEPS)
    return way


def measure(workload: Workload, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Milliseconds of a step, by way."""
    block_ms: dict[str, list[float]] = {"plain": [], "lazy": [], "eager": []}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    table_bytes = workload.num_rows * workload.embedding_dim * 4
    is_together = 2 * table_bytes < SHARE_OF_MEMORY * memory and not args.apart
    num_steps = args.rounds * BLOCK_STEPS
    if is_together:
        plain = make_way(workload, args.zipf, num_steps, device, is_private=False)
        lazy = make_way(workload, args.zipf, num_steps + args.eager_steps, device, is_private=True)
        for index in range(args.rounds):
            for name, way in [("plain", plain), ("lazy", lazy)][:: 1 if index % 2 else -1]:
                block_ms[name].append(way.run(BLOCK_STEPS))
        block_ms["eager"] += [lazy.run(1, is_eager=True) for _ in range(args.eager_steps)]
        plain.contender.finish()
        lazy.contender.finish()
        return {name: statistics.median(times) for name, times in block_ms.items()}
    for name in ("plain", "lazy", "plain"):
        num_eager = args.eager_steps if name == "lazy" else 0
        way = make_way(workload, args.zipf, num_steps + num_eager, device, is_private=name == "lazy")
        block_ms[name] += [way.run(BLOCK_STEPS) for _ in range(args.rounds)]
        block_ms["eager"] += [way.run(1, is_eager=True) for _ in range(num_eager)]
        way.contender.finish()
        del way
        gc.collect()
    return {name: statistics.median(times) for name, times in block_ms.items()}


def describe(workload: Workload, step_ms: dict[str, float]) -> str:
    """One line."""
    gb = workload.num_rows * workload.embedding_dim * 4 / 1e9
    return (
        f"{workload.num_tables} x {workload.num_embeddings:,} rows x {workload.embedding_dim} ({gb:.2f} GB), "
        f"{workload.ids_per_bag} ids a bag, batch {workload.batch_size:,}: plain {step_ms['plain']:.1f} ms, "
        f"lazy {step_ms['lazy']:.1f} ms, eager {step_ms['eager']:.0f} ms; "
        f"eager / lazy {step_ms['eager'] / step_ms['lazy']:.1f}, lazy / plain {step_ms['lazy'] / step_ms['plain']:.2f}"
    )


def main() -> None:
    """Measure."""

    def integers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=integers, default=[10_000_000], help="of each table; several by comma")
    parser.add_argument("--ids_per_bag", type=integers, default=[1], help="several by comma")
    parser.add_argument("--batch_size", type=int, default=2048)
    parser.add_argument("--num_tables", type=int, default=8)
    parser.add_argument("--embedding_dim", type=int, default=32)
    parser.add_argument("--zipf", type=float, default=1.05, help="exponent of the ids' law; 0 is uniform")
    parser.add_argument("--rounds", type=int, default=5, help=f"blocks of {BLOCK_STEPS} steps of plain and of lazy")
    parser.add_argument("--eager_steps", type=int, default=2, help="steps of eager")
    parser.add_argument("--apart", action="store_true", help="one model at a time, as if memory were too small for two")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as directory:
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
        for num_rows in args.rows:
            for ids_per_bag in args.ids_per_bag:
                workload = replace(
                    WORKLOADS["paper"],
                    num_tables=args.num_tables,
                    num_embeddings=num_rows,
                    embedding_dim=args.embedding_dim,
                    ids_per_bag=ids_per_bag,
                    batch_size=args.batch_size,
                )
                print(describe(workload, measure(workload, args, device)), flush=True)
                gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
