# SPDX-License-Identifier: BSD-3-Clause
"""What a delta log costs: time of a step, and bytes.

    python examples/benchmark/delta_log.py cost --interval 1,10,100 --dir DIR
    python examples/benchmark/delta_log.py load --interval 1 --gb 10 --deltas 100 --dir DIR

*cost*: one job of 26 tables x 1 M rows x 64 with row-wise Adagrad, blocks of steps with a log and without one in turn.
A block with a log begins and ends right after a delta was taken, so that it has the background work of as many deltas
as it takes. DIR is where the log goes; take a disk of the speed that a job would have. Then the same job runs on, and
the rows that trained in each interval are counted from the batches' ids, by nobody that the log asks.

*load*: the same job with tables of so many GB logs so many deltas. Then, in turn, all files are read from beginning to
end, and a job of the same kind loads them, with checksums compared first and on the way. Before each, the page cache is
dropped (this needs root). Memory is anonymous memory (RssAnon) beyond what there was before loading.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from checkpoint_memory import measure as measure_memory
from rivals import Contender, Shape
from workloads import WORKLOADS

from torchrec_scratchpipe import CheckpointManager
from torchrec_scratchpipe.core.pool import Pool
from torchrec_scratchpipe.core.slot_map import CachePlan
from torchrec_scratchpipe.sharding.model import scratchpad_collections

EXPONENT, SEED = 1.05, 1
NUM_WARMUP_STEPS, BLOCK_STEPS = 10, 40
READ_BYTES = 8 * 1024 * 1024


@dataclass
class Job:
    """One job whose log is switched on and off."""

    contender: Contender
    manager: CheckpointManager
    num_steps: int = 0

    def run(self, num_steps: int, *, is_logged: bool) -> float:
        """Seconds of so many steps."""
        assert self.contender.batches is not None
        self.contender.batches.prepare(num_steps + 8)
        start_s = time.perf_counter()
        for _ in range(num_steps):
            self.contender.run(1)
            self.num_steps += 1
            if is_logged:
                self.manager.trained(self.num_steps, self.contender.model, self.contender.optimizer)
        return time.perf_counter() - start_s

    def run_to_delta(self, interval: int) -> None:
        """Until a delta has just been taken."""
        log = self.manager._log
        assert log is not None
        self.run(interval, is_logged=True)
        while log.step != self.num_steps:
            self.run(1, is_logged=True)


def pools_of(job: Job) -> list[Pool]:
    """Whose rows are logged."""
    return [pool for collection in scratchpad_collections(job.contender.model) for pool in collection.pools]


def measure(directory: Path, interval: int, num_blocks: int, device: torch.device) -> None:
    """Print what a log of one interval costs."""
    workload = replace(WORKLOADS["criteo"], num_embeddings=1_000_000, embedding_dim=64, batch_size=4096)
    shape = Shape(workload, "rowwise_adagrad", 0.05, lookahead=2)
    contender = Contender("scratchpipe", shape, device)
    contender.fill(EXPONENT, SEED)
    block_steps = interval * max(1, BLOCK_STEPS // interval)
    contender.start(EXPONENT, 2, SEED, 10**6)
    job = Job(contender, CheckpointManager(directory, delta_every=interval))
    job.run(NUM_WARMUP_STEPS, is_logged=True)  # the first step saves a checkpoint: all tables
    job.manager.wait()
    os.sync()  # or the system would write it to the disk beside the first blocks
    pools = pools_of(job)
    watches = [pool.changes for pool in pools]
    step_ms: dict[bool, list[float]] = {True: [], False: []}
    for block in range(2 * num_blocks):
        is_logged = block % 4 in (0, 3)
        for pool, changes in zip(pools, watches, strict=True):
            pool.changes = changes if is_logged else None
        if is_logged:
            job.run_to_delta(interval)
        step_ms[is_logged].append(1e3 * job.run(block_steps, is_logged=is_logged) / block_steps)
        job.manager.wait()
    with_it, without = (statistics.median(step_ms[is_logged]) for is_logged in (True, False))
    for pool, changes in zip(pools, watches, strict=True):
        pool.changes = changes
    log_bytes, row_bytes = count_bytes(job, interval)
    print(
        f"interval {interval}: step with a log {with_it:.2f} ms, without {without:.2f} ms: {with_it / without:.4f}; "
        f"{log_bytes / interval / 1e6:.2f} MB of log a batch, {log_bytes / row_bytes:.4f} of the distinct rows' bytes",
        flush=True,
    )


def count_bytes(job: Job, interval: int) -> tuple[int, int]:
    """Bytes of the log for one interval, and of the distinct rows that were trained in it."""
    job.run_to_delta(interval)
    job.manager.wait()
    rows: list[torch.Tensor] = []
    original = Pool.will_update

    def noted(pool: Pool, plan: CachePlan) -> None:
        rows.append(plan.buffers.rows[: plan.num_ids].unique().cpu())
        original(pool, plan)

    Pool.will_update = noted  # type: ignore[method-assign]
    log = job.manager._log
    assert log is not None
    before = log.num_bytes
    job.run(interval, is_logged=True)
    job.manager.wait()
    Pool.will_update = original  # type: ignore[method-assign]
    num_rows = torch.cat(rows).unique().numel()
    return log.num_bytes - before, num_rows * pools_of(job)[0].host_table.layout.row_bytes


def make(gb: float) -> Contender:
    """The job, with tables of so many GB."""
    workload = replace(WORKLOADS["criteo"], num_embeddings=1_000_000, embedding_dim=64, batch_size=4096)
    num_rows = int(gb * 1e9 / workload.num_tables / Shape(workload, "rowwise_adagrad", 0.05, 2).row_bytes)
    workload = replace(workload, num_embeddings=num_rows)
    return Contender("scratchpipe", Shape(workload, "rowwise_adagrad", 0.05, 2), torch.device("cpu"))


def write(directory: Path, gb: float, interval: int, num_deltas: int) -> None:
    """A checkpoint and deltas."""
    contender = make(gb)
    contender.start(EXPONENT, 2, SEED, 10**6)
    job = Job(contender, CheckpointManager(directory, delta_every=interval))
    job.run(1 + interval * num_deltas, is_logged=True)
    job.manager.wait()


def read_all(directory: Path) -> int:
    """Read every file, and say how many bytes there are."""
    buffer = memoryview(bytearray(READ_BYTES))
    num_bytes = 0
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    num_bytes += count
    return num_bytes


def drop_page_cache() -> None:
    """As far as it may be."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def load(directory: Path, gb: float, num_rounds: int) -> None:
    """Print how long it takes to read the files, and to load them."""
    contender = make(gb)
    manager = CheckpointManager(directory)
    manager.load(contender.model, contender.optimizer)  # tables have their memory now
    for _ in range(num_rounds):
        drop_page_cache()
        start_s = time.perf_counter()
        num_bytes = read_all(directory)
        read_s = time.perf_counter() - start_s
        print(f"{num_bytes / 1e9:.2f} GB: read in {read_s:.2f} s ({num_bytes / read_s / 1e9:.2f} GB/s)", flush=True)
        for check_first in (False, True):
            drop_page_cache()
            found = measure_memory(lambda: manager.load(contender.model, contender.optimizer, check_first=check_first))  # noqa: B023
            print(
                f"  loaded with {check_first=} in {found['seconds']:.2f} s: {found['seconds'] / read_s:.2f}; "
                f"{found['peak_mb']:.0f} MB beyond the tables",
                flush=True,
            )


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "load", "write_only", "load_only"], help="what is measured")
    parser.add_argument("--interval", default="1,10,100", help="batches between deltas; for cost, several by comma")
    parser.add_argument("--blocks", type=int, default=8, help="of either kind, for cost")
    parser.add_argument("--gb", type=float, default=10.0, help="of tables, for load")
    parser.add_argument("--deltas", type=int, default=100, help="for load")
    parser.add_argument("--rounds", type=int, default=3, help="for load")
    parser.add_argument("--dir", type=Path, required=True, help="where logs go; emptied afterwards")
    args = parser.parse_args()
    intervals = [int(interval) for interval in args.interval.split(",")]
    own = args.dir / "delta_log"
    parts = [["write_only"], ["load_only"]] if args.what == "load" else []
    if args.what == "cost" and len(intervals) > 1:
        parts = [["cost", "--interval", str(interval)] for interval in intervals]
    try:
        for part in parts:  # in processes of their own, for the sake of memory
            what = sys.argv.index(args.what)
            subprocess.run([sys.executable, *sys.argv[:what], *sys.argv[what + 1 :], *part], check=True)
        if not parts:
            run(args, own, intervals[0])
    finally:
        if args.what in ("cost", "load"):
            shutil.rmtree(own, ignore_errors=True)


def run(args: argparse.Namespace, own: Path, interval: int) -> None:
    """One part, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as directory:
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
        if args.what == "write_only":
            write(own, args.gb, interval, args.deltas)
        elif args.what == "load_only":
            load(own, args.gb, args.rounds)
        else:
            measure(own, interval, args.blocks, device)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
