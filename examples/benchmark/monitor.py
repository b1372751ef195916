# SPDX-License-Identifier: BSD-3-Clause
"""What the monitor costs a step, and whether its advice comes true.

    python examples/benchmark/monitor.py cost
    python examples/benchmark/monitor.py advice

*cost*: one job of 26 tables x 1 M rows x 64, blocks of steps with a monitor and without one in turn. The time that is
spent in the monitor's own functions is added up, too: it says more than the ratio of steps, which is noisy.

*advice*: jobs whose settings are not good. Each is run, told what to set, and run anew with that, over the same
batches. What was predicted stands beside what was counted.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from rivals import Contender, Shape
from workloads import WORKLOADS, Workload

from torchrec_scratchpipe import Advice, ScratchPipeMonitor
from torchrec_scratchpipe.monitoring.looks import PoolWatch
from torchrec_scratchpipe.monitoring.window import PoolWindow

EXPONENT, SEED = 1.05, 1
BLOCK_STEPS, NUM_WARMUP_STEPS = 50, 10
WINDOW_STEPS = 300
SMALL = replace(WORKLOADS["criteo"], num_embeddings=100_000, embedding_dim=16, batch_size=1024)


@dataclass
class Clock:
    """Adds up the time that is spent in functions."""

    seconds: float = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any) -> Any:
            start_s = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds += time.perf_counter() - start_s

        return timed


def measure_cost(device: torch.device, num_blocks: int) -> None:
    """Print what the monitor adds to a step."""
    workload = replace(WORKLOADS["criteo"], num_embeddings=1_000_000, embedding_dim=64, batch_size=4096)
    shape = Shape(workload, "rowwise_adagrad", 0.05, lookahead=2)
    contender = Contender("scratchpipe", shape, device)
    contender.fill(EXPONENT, SEED)
    contender.start(EXPONENT, 2, SEED, NUM_WARMUP_STEPS + 2 * num_blocks * BLOCK_STEPS + 8)
    contender.run(NUM_WARMUP_STEPS)
    training, planning = Clock(), Clock()
    PoolWatch.look = planning.around(PoolWatch.look)  # type: ignore[method-assign]
    ScratchPipeMonitor.step = training.around(ScratchPipeMonitor.step)  # type: ignore[method-assign]
    step_ms: dict[bool, list[float]] = {True: [], False: []}
    for block in range(2 * num_blocks):
        is_watched = block % 2 == 0
        monitor = ScratchPipeMonitor(contender.model, contender.pipeline, every=BLOCK_STEPS) if is_watched else None
        assert contender.batches is not None
        contender.batches.prepare(BLOCK_STEPS + 8)
        start_s = time.perf_counter()
        contender.run(BLOCK_STEPS)
        step_ms[is_watched].append(1e3 * (time.perf_counter() - start_s) / BLOCK_STEPS)
        if monitor is not None:
            monitor.close()
    with_it, without = (statistics.median(step_ms[is_watched]) for is_watched in (True, False))
    print(f"step with a monitor {with_it:.2f} ms, without {without:.2f} ms: {with_it / without:.4f}")
    num_steps = num_blocks * BLOCK_STEPS
    for name, clock in (("training thread", training), ("thread that plans", planning)):
        ms = 1e3 * clock.seconds / num_steps
        print(f"{name}: {1e3 * ms:.1f} us a step in the monitor, {ms / without:.3%} of a step")


@dataclass(frozen=True)
class Job:
    """One run whose advice is asked for."""

    kind: str
    workload: Workload
    load_factor: float
    exponent: float = EXPONENT
    lookahead: int = 2


JOBS = [
    Job("smaller_scratchpad", SMALL, 0.9, exponent=1.2),
    Job("larger_scratchpad", SMALL, 0.05, exponent=0.8),
    Job("larger_scratchpad", SMALL, 0.1),
    Job("slot_waits", SMALL, 0.01, exponent=0.6, lookahead=4),
    Job("growths", SMALL, 0.002),
]


def run(job: Job, device: torch.device) -> tuple[PoolWindow, Sequence[Advice]]:
    """The last window of two, and what it advises; Train is taken to be stalled, so that advice is asked for."""
    shape = Shape(job.workload, "rowwise_adagrad", job.load_factor, job.lookahead)
    contender = Contender("scratchpipe", shape, device)
    contender.start(job.exponent, job.lookahead, SEED, 2 * WINDOW_STEPS + 8)
    with ScratchPipeMonitor(contender.model, contender.pipeline, every=WINDOW_STEPS) as monitor:
        contender.run(2 * WINDOW_STEPS)
        windows = list(monitor.windows)
        window = windows[0 if job.kind == "growths" else -1]
        stall_share = 0.5 if job.kind == "larger_scratchpad" else 0.0
        advice = monitor.advise(replace(window, stall_share=stall_share))
    contender.finish()
    return window.pools[0], advice


def counts_of(pool: PoolWindow) -> dict[str, float]:
    """What advice may foretell, by its names there."""
    return {
        "misses_per_batch": pool.misses_per_batch,
        "slot_wait_share": pool.num_slot_waits / pool.num_batches,
        "num_growths": float(pool.num_growths),
    }


def count_after(advice: Advice, job: Job, device: torch.device) -> dict[str, float]:
    """What the same job counts with the settings that it was told."""
    pool, _ = run(replace(job, load_factor=advice.settings["load_factor"]), device)
    counted = counts_of(pool)
    return {name: counted[name] for name in advice.predicted}


def check_advice(device: torch.device) -> None:
    """Print a table: advice, predicted, counted after following it."""
    print("| advice | before | predicted | counted after following it |")
    print("|---|---|---|---|")
    for job in JOBS:
        pool, all_advice = run(job, device)
        before = counts_of(pool)
        for advice in all_advice:
            if advice.kind == job.kind:
                for name, counted in count_after(advice, job, device).items():
                    predicted = advice.predicted[name]
                    off = f" ({predicted / counted - 1:+.1%})" if counted else ""
                    print(
                        f"| {advice.kind}: {advice.text} | {name} {before[name]:,.2f} | {predicted:,.2f}{off} | "
                        f"{counted:,.2f} |",
                        flush=True,
                    )


def main() -> None:
    """Run one of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "advice"], help="what is measured")
    parser.add_argument("--blocks", type=int, default=4, help="of either kind, for cost")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as directory:
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
        if args.what == "cost":
            measure_cost(device, args.blocks)
        else:
            check_advice(device)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
