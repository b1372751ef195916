# SPDX-License-Identifier: BSD-3-Clause
"""Times training with tables in files while a memory limit keeps most of them out of RAM; beside tables in RAM.

    sudo python examples/benchmark/disk_tier.py --table_dir DIR --cap_gb 3 --json out.json

Each way is a process of its own: *RAM*, tables in RAM, without a limit; *files*, tables in files of DIR, in a control
group whose memory is limited; *files, one by one*, the same, but each row is waited for before the next is asked for,
and none is read ahead. All train on the same ids. `--rounds` repeats them in turns.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rivals import Contender

WAYS = ("RAM", "files", "files, one by one")
CGROUPS = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def memory_limit(num_bytes: int) -> Iterator[Path]:
    """A control group whose processes get so much memory, page cache included."""
    is_v1 = (CGROUPS / "memory").is_dir()
    group = (CGROUPS / "memory" if is_v1 else CGROUPS) / f"scratchpipe_{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if is_v1 else "memory.max")).write_text(str(num_bytes))
    except OSError as error:
        raise SystemExit(f"{group}: memory cannot be limited ({error.strerror}). Run as root, with cgroups.") from error
    try:
        yield group
    finally:
        group.rmdir()


def train(args: argparse.Namespace) -> None:
    """In a process of its own: build, warm up, time every step; print a line of JSON."""
    if args.group:
        (Path(args.group) / "cgroup.procs").write_text(str(os.getpid()))
    import torch
    import torch.distributed as dist
    from rivals import RIVALS, Contender, Shape
    from workloads import Workload

    from torchrec_scratchpipe import scratchpad_stats
    from torchrec_scratchpipe.core import disk_reads
    from torchrec_scratchpipe.core.runner import OverlappedStageRunner

    if args.way == "files, one by one":
        disk_reads.MAX_DEPTH = 1
        OverlappedStageRunner._ask_ahead = lambda self, batch: None  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as directory:
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
        workload = Workload("disk", args.num_tables, args.num_embeddings, args.embedding_dim, 1, args.batch_size)
        shape = Shape(workload, "rowwise_adagrad", args.load_factor, 2)
        table_dir = None if args.way == "RAM" else args.table_dir
        RIVALS["scratchpipe"] = dataclasses.replace(
            RIVALS["scratchpipe"],
            sharder_kwargs={"ram_budget_gb": args.ram_budget_gb},
            pipeline_kwargs={"num_batches_seen_ahead": args.num_batches_seen_ahead},
        )
        contender = Contender("scratchpipe", shape, torch.device("cpu"), table_dir)
        contender.fill(args.zipf, seed=0)
        contender.start(args.zipf, 2, seed=1, num_batches=args.warmup + args.steps + 8)
        assert contender.batches is not None
        step_ms = []
        before = counts(contender)
        for step in range(args.warmup + args.steps):
            if step == args.warmup:
                before = counts(contender)
            contender.batches.prepare(1)
            start = time.perf_counter()
            contender.run(1)
            step_ms.append(1e3 * (time.perf_counter() - start))
        after = counts(contender)
        (stats,) = scratchpad_stats(contender.model)
        step_ms = sorted(step_ms[args.warmup :])
        figures = {
            "step_ms_p50": statistics.median(step_ms),
            "step_ms_p99": step_ms[min(len(step_ms) - 1, int(0.99 * len(step_ms)))],
            "misses": stats.num_unique_misses / stats.num_batches,
            **{name: (after[name] - before[name]) / args.steps for name in after},  # a batch
            "anonymous_gb": memory_bytes("RssAnon") / 1e9,
            "last_loss": contender.last_loss.item(),
        }
        print(json.dumps(figures), flush=True)
        os._exit(0)  # whoever frees 7 GB under a limit takes his time


def memory_bytes(field: str) -> int:
    """A field of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def counts(contender: "Contender") -> dict[str, float]:
    """What the system and the package have counted so far."""
    from torchrec_scratchpipe import scratchpad_stats

    (stats,) = scratchpad_stats(contender.model)
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {
        "faults_that_waited": resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
        "read_mb": int(io["read_bytes"]) / 1e6,
        "written_mb": int(io["write_bytes"]) / 1e6,
        "rows_from_disk": stats.num_disk_rows_read,
        "pages_from_disk": stats.num_disk_pages_read,
        "pages_waited_for": stats.num_cold_pages_at_collect,
        "tier_written_mb": stats.disk_bytes_written / 1e6,
    }


def run(way: str, args: argparse.Namespace, group: Path | None) -> dict[str, Any]:
    """One way, once."""
    command = [sys.executable, __file__, *sys.argv[1:], "--way", way, *(["--group", str(group)] if group else [])]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{way}: {result.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table_dir", required=True, help="on the disk that is to be measured")
    parser.add_argument("--cap_gb", type=float, default=3.0, help="memory of the limited processes")
    parser.add_argument("--ram_budget_gb", type=float, default=1.3, help="GiB of it for rows that left the scratchpad")
    parser.add_argument("--num_tables", type=int, default=26)
    parser.add_argument("--num_embeddings", type=int, default=1_000_000)
    parser.add_argument("--embedding_dim", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=4096)
    parser.add_argument("--num_batches_seen_ahead", type=int, default=1, help="beyond the lookahead, of 2")
    parser.add_argument("--zipf", type=float, default=1.05)
    parser.add_argument("--load_factor", type=float, default=0.05)
    parser.add_argument("--warmup", type=int, default=420, help="steps that are not timed; the RAM is full after 400")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--ways", type=lambda text: text.split("/"), default=WAYS, help=f"some of: {'/'.join(WAYS)}")
    parser.add_argument("--json", help="where the figures go")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--group", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        train(args)
    rounds = []
    for number in range(args.rounds):
        for way in args.ways if number % 2 == 0 else args.ways[::-1]:
            with contextlib.ExitStack() as stack:
                group = None if way == "RAM" else stack.enter_context(memory_limit(int(1e9 * args.cap_gb)))
                rounds.append({"way": way, **run(way, args, group)})
            figures = "  ".join(f"{name} {value:,.4g}" for name, value in rounds[-1].items() if name != "way")
            print(f"{way:18s} {figures}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"args": vars(args), "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
