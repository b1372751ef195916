# SPDX-License-Identifier: BSD-3-Clause
"""Times a training step with each way to hold the tables, interleaved in one process, over a grid of settings.

    python examples/benchmark/train_step.py --quick --out DIR
    python examples/benchmark/train_step.py --model paper --zipf 0,0.8,1.05,1.2 --load_factor 0.01,0.02,0.05,0.1 \
        --optimizer sgd,rowwise_adagrad,adagrad,adam --lookahead 1,2,4 --out DIR
    python examples/benchmark/train_step.py --model offload --zipf 0 --load_factor 0.3 \
        --optimizer rowwise_adagrad --out DIR
    python examples/benchmark/train_step.py --caches fused,scratchpipe --num_tables 26 --num_embeddings 1000000 \
        --embedding_dim 64 --ids_per_bag 1 --batch_size 4096 --optimizer rowwise_adagrad --load_factor 0.05 --steps 30

`--caches` chooses among the ways of rivals.py; by default all that exist on this machine's device. All train on the
same samples. Blocks of steps alternate, whoever went first goes last in the next round; a block ends when all of its
work is done, the stages of coming batches included. Slots are filled before the first step, so that every measured
batch evicts. Batches are made before the clock starts. `--out` gets results.json, after every point, and results.md and
plots in the end; `--json` one file by contender, with a list of `points` where the grid has several.

A contender that fails is named and left out, and the exit status is 1. `--seconds` ends the run after the point at
which so many have passed.
"""

import argparse
import dataclasses
import gc
import itertools
import math
import os
import shlex
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bandwidth import measure_bandwidth
from results import Figures, Report, machine, write_by_contender
from rivals import CPU_OPTIMIZERS, OPTIMIZERS, RIVALS, Contender, Shape
from torch._C._profiler import _ExperimentalConfig
from tqdm import tqdm
from trace_plot import plot_trace, stage_times
from workloads import WORKLOADS, Workload, describe

from torchrec_scratchpipe import PoolStats, scratchpad_stats, stage_spans

NUM_WARMUP_STEPS = 5
NUM_PROFILED_STEPS = 4
PIPELINE_DEPTH = 8  # batches that a pipeline may draw ahead of the one that trains
BLOCK_STEPS = {"cpu": 3, "cuda": 10}  # a block begins and ends with an idle device, and a GPU's steps are short

# Less than 4 minutes on 2 cores of a CPU, about 2 minutes on an H200. The unique rows of three batches must fit into
# the slots.
QUICK_ON_CPU = [
    "--model paper --num_embeddings 400000 --batch_size 256 --zipf 0.8,1.05,1.2 --load_factor 0.05 "
    "--optimizer sgd --lookahead 2 --steps 60",
    "--model paper --num_embeddings 200000 --batch_size 256 --zipf 1.05 --load_factor 0.1 --optimizer adagrad "
    "--lookahead 2 --steps 60",
    "--model criteo --num_embeddings 200000 --embedding_dim 64 --batch_size 2048 --zipf 0,1.05 --load_factor 0.05 "
    "--optimizer rowwise_adagrad --lookahead 1,2 --steps 60",
]
QUICK_ON_GPU = [
    "--model paper --num_embeddings 1000000 --zipf 0.8,1.05 --load_factor 0.1 --optimizer sgd --lookahead 2 --steps 60",
    "--model criteo --num_embeddings 1000000 --zipf 1.05 --load_factor 0.1 --optimizer rowwise_adagrad --lookahead 2 "
    "--steps 40",
    "--model paper --num_embeddings 1000000 --zipf 0.8,1.05 --load_factor 0.1 --optimizer adam --lookahead 2 "
    "--steps 60",
]


@dataclass
class Course:
    """How far a run is, and what has gone wrong."""

    report: Report
    seconds: float
    has_failures: bool = False
    start_s: float = field(default_factory=time.perf_counter)

    @property
    def num_seconds(self) -> float:
        """Since the run began."""
        return time.perf_counter() - self.start_s

    def note(self, text: str) -> None:
        """Say it now, and in the report."""
        print(f"NOTE {text}", flush=True)
        self.report.notes.append(text)

    @contextmanager
    def noting_failures(self, what: str) -> Iterator[None]:
        """While entered, an exception is noted, and goes no further."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.has_failures = True
            self.note(f"{what}: {type(error).__name__}: {str(error)[:300]}")


def run_grid(args: argparse.Namespace, device: torch.device, course: Course) -> Iterator[list[Figures]]:
    """Measure every point of the grid; contenders are built once per optimizer and load factor."""
    workload = workload_of(args)
    caches = args.caches or [name for name, rival in RIVALS.items() if device.type == "cuda" or not rival.is_cuda_only]
    for optimizer, load_factor in itertools.product(args.optimizer, args.load_factor):
        shape = Shape(workload, optimizer, load_factor, max(args.lookahead))
        check_host_memory(shape, caches, device, args.host_memory_gb)
        contenders = build(caches, shape, device, args, course)
        for point, (exponent, lookahead) in enumerate(itertools.product(args.zipf, args.lookahead)):
            where = f"{workload.name}, {optimizer}, {load_factor:.0%}, Zipf {exponent:g}, lookahead {lookahead}"
            if course.num_seconds > course.seconds:
                course.note(f"{where}: left out, {course.seconds:.0f} seconds are over")
                continue
            contenders = start(contenders, exponent, lookahead, args.seed + 1 + point, args, course, where)
            if contenders:
                yield measure(contenders, exponent, lookahead, course.report.gb_per_s, args)
        while contenders:  # each lets go of its tables
            contenders.pop().finish()
        gc.collect()


def build(
    caches: Sequence[str], shape: Shape, device: torch.device, args: argparse.Namespace, course: Course
) -> list[Contender]:
    """The contenders, filled; without those that cannot be built."""
    contenders = []
    for name in caches:
        start_s = time.perf_counter()
        with course.noting_failures(f"{shape.workload.name}, {shape.optimizer}: {name} cannot be built"):
            contender = Contender(name, shape, device, args.table_dir, args.seed, not args.no_overlap)
            contender.fill(args.zipf[0], args.seed)
            contenders.append(contender)
            print(f"  {name}: built and filled in {time.perf_counter() - start_s:.1f} s", flush=True)
    return contenders


def start(
    contenders: Sequence[Contender],
    exponent: float,
    lookahead: int,
    seed: int,
    args: argparse.Namespace,
    course: Course,
    where: str,
) -> list[Contender]:
    """Those that have trained their first steps at a point of the grid."""
    num_batches = NUM_WARMUP_STEPS + args.steps + PIPELINE_DEPTH + (NUM_PROFILED_STEPS if args.profile_trace else 0)
    started = []
    for contender in contenders:
        with course.noting_failures(f"{where}: {contender.name} cannot train"):
            contender.start(exponent, lookahead, seed, num_batches)
            contender.run(NUM_WARMUP_STEPS)
            started.append(contender)
    return started


def check_host_memory(shape: Shape, caches: Sequence[str], device: torch.device, memory_gb: float | None) -> None:
    """All contenders are there at once; stop before the system does."""
    needed = sum(shape.host_bytes(RIVALS[name]) for name in caches)
    if device.type == "cpu":
        needed = len(caches) * shape.workload.num_rows * shape.row_bytes
    installed = 1e9 * memory_gb if memory_gb else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > 0.85 * installed:
        raise SystemExit(
            f"{shape.workload.name} with {shape.optimizer}: the tables of {len(caches)} contenders take "
            f"{needed / 1e9:.0f} GB of host memory, there are {installed / 1e9:.0f} GB. Give fewer --caches, or a "
            "smaller --num_embeddings; or --host_memory_gb, on a machine whose memory grows with use."
        )


def measure(
    contenders: Sequence[Contender],
    exponent: float,
    lookahead: int,
    bandwidth: dict[str, Any],
    args: argparse.Namespace,
) -> list[Figures]:
    """One point of the grid: blocks of steps, interleaved."""
    block_ms: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    peak_bytes = dict.fromkeys(block_ms, 0)
    stats_before = {contender.name: scratchpad_stats(contender.model) for contender in contenders}
    order = list(contenders)
    shape = contenders[0].shape
    name = f"{shape.workload.name} zipf {exponent:g}, {shape.load_factor:.0%}, {shape.optimizer}, lookahead {lookahead}"
    for _ in tqdm(range(max(1, args.steps // args.block_steps)), desc=name):
        for contender in order:
            assert contender.batches is not None
            contender.batches.prepare(args.block_steps + PIPELINE_DEPTH)
            if contender.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated() if contender.device.type == "cuda" else 0
            start = time.perf_counter()
            contender.run(args.block_steps)
            block_ms[contender.name].append(1e3 * (time.perf_counter() - start) / args.block_steps)
            if contender.device.type == "cuda":
                peak = contender.built_bytes + torch.cuda.max_memory_allocated() - held
                peak_bytes[contender.name] = max(peak_bytes[contender.name], peak)
        order.reverse()
    fused_ms = statistics.median(block_ms["fused"]) if "fused" in block_ms else None
    return [
        figures_of(
            contender,
            exponent,
            lookahead,
            block_ms[contender.name],
            fused_ms,
            stats_before[contender.name],
            bandwidth,
            peak_bytes[contender.name],
            args,
        )
        for contender in contenders
    ]


def figures_of(
    contender: Contender,
    exponent: float,
    lookahead: int,
    block_ms: list[float],
    fused_ms: float | None,
    stats_before: list[PoolStats],
    bandwidth: dict[str, Any],
    peak_bytes: int,
    args: argparse.Namespace,
) -> Figures:
    """What is reported of one contender at one point of the grid."""
    median = statistics.median(block_ms)
    figures = Figures(
        cache=contender.name,
        title=contender.rival.title,
        workload=describe(contender.shape.workload),
        zipf=exponent,
        load_factor=contender.shape.load_factor,
        optimizer=contender.shape.optimizer,
        lookahead=lookahead if contender.rival.is_scratchpad else None,
        step_ms=median,
        step_ms_of_blocks=block_ms,
        ratio_to_fused=median / fused_ms if fused_ms else None,
        last_loss=contender.last_loss.item(),
        peak_device_bytes=peak_bytes or None,
    )
    if contender.rival.is_scratchpad:
        stats = scratchpad_stats(contender.model)
        num_batches = stats[0].num_batches - stats_before[0].num_batches

        def per_batch(name: str) -> float:
            counts = (getattr(now, name) - getattr(then, name) for now, then in zip(stats, stats_before, strict=True))
            return sum(counts) / num_batches

        figures.unique_rows, figures.misses = per_batch("num_unique_ids"), per_batch("num_unique_misses")
        figures.fill_bytes, figures.writeback_bytes = per_batch("fill_bytes"), per_batch("writeback_bytes")
        figures.victims = per_batch("num_victims")
        figures.misses_at_train = sum(pool.num_misses_at_train for pool in stats)
        figures.stalls = per_batch("num_stalls")
        figures.stage_ms = median_stage_ms(contender)
        figures.scratchpad = [dataclasses.asdict(pool) for pool in stats]
        bus = min(
            speed
            for way, speed in bandwidth.items()
            if way in ("plain copy", "plain copy to device", "plain copy to host")
        )
        figures.bus_ms = 1e3 * max(figures.fill_bytes, figures.writeback_bytes) / (bus * 1e9)
        figures.floor_ms = max(fused_ms, figures.bus_ms) if fused_ms else None
    if args.profile_trace:
        shape = contender.shape
        point = f"{shape.workload.name}_{shape.optimizer}_{shape.load_factor:g}_zipf_{exponent:g}_lookahead_{lookahead}"
        trace = Path(args.profile_trace) / f"{contender.name}_{point}.json"
        profile(contender, trace)
        figures.traced_ms = stage_times(trace)
        plot_trace(trace, trace.with_suffix(".png"))
    return figures


def median_stage_ms(contender: Contender) -> dict[str, float]:
    """By the host's clock, of the first pool's last 50 batches; on a GPU the time to enqueue, not to run."""
    times: dict[str, list[float]] = {}
    for span in stage_spans(contender.model)[0]:
        times.setdefault(span.stage.value, []).append(1e3 * (span.end_s - span.start_s))
    return {stage: statistics.median(values[-50:]) for stage, values in times.items()}


def profile(contender: Contender, path: Path) -> None:
    """A trace of a few steady steps, for Perfetto."""
    path.parent.mkdir(parents=True, exist_ok=True)
    all_threads = _ExperimentalConfig(profile_all_threads=True)  # the stages have one of their own
    with torch.profiler.profile(experimental_config=all_threads) as profiler:
        contender.run(NUM_PROFILED_STEPS)
    profiler.export_chrome_trace(str(path))


def workload_of(args: argparse.Namespace) -> Workload:
    """The model's shape, with what the command line changes."""
    changes = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(Workload)
        if getattr(args, field.name, None) is not None
    }
    return dataclasses.replace(WORKLOADS[args.model], **changes)


def make_parser() -> argparse.ArgumentParser:
    def numbers(text: str) -> list[float]:
        return [float(number) for number in text.split(",")]

    def integers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    def names_of(known: Any) -> Any:
        def names(text: str) -> list[str]:
            unknown = [name for name in text.split(",") if name not in known]
            if unknown:
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(known)}")
            return text.split(",")

        return names

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small grid for this device; minutes")
    parser.add_argument("--caches", type=names_of(RIVALS), help=f"comma-separated: {', '.join(RIVALS)}")
    parser.add_argument("--model", choices=sorted(WORKLOADS), default="criteo")
    parser.add_argument("--num_tables", type=int, help="instead of the model's; so are the next five")
    parser.add_argument("--num_embeddings", type=int, help="rows of each table")
    parser.add_argument("--embedding_dim", type=int)
    parser.add_argument("--ids_per_bag", type=int)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--num_device_tables", type=int, help="small tables beside, kept in device memory by everybody")
    parser.add_argument("--zipf", type=numbers, default=[1.05], help="exponents of the ids' law; 0 is uniform")
    parser.add_argument("--load_factor", type=numbers, default=[0.05])
    parser.add_argument("--lookahead", type=integers, default=[2])
    parser.add_argument("--optimizer", type=names_of(OPTIMIZERS), default=["rowwise_adagrad"])
    parser.add_argument("--steps", type=int, default=30, help="measured steps of each contender")
    parser.add_argument("--block_steps", type=int, help="steps before it is another contender's turn; 3, on a GPU 10")
    parser.add_argument("--table_dir", help="existing directory for memory-mapped tables of scratchpads; default: RAM")
    parser.add_argument("--no_overlap", action="store_true", help="run the scratchpads' stages on the training thread")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no new point after so many")
    parser.add_argument("--host_memory_gb", type=float, help="what the tables may count on; default: what is installed")
    parser.add_argument("--profile_trace", help="write traces and their plots into this directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write results.json, results.md and plots into this directory")
    parser.add_argument("--json", help="write all figures there, by contender")
    return parser


def check_outputs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Make what will be written, before minutes are spent on it."""
    try:
        if args.out:
            Path(args.out).mkdir(parents=True, exist_ok=True)
        if args.json:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            Path(args.json).open("a").close()
    except OSError as error:
        parser.error(f"{error.filename}: cannot be written ({error.strerror}). Give another name.")


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    grids = [args]
    if args.quick:
        quick = QUICK_ON_GPU if device.type == "cuda" else QUICK_ON_CPU
        rest = [arg for arg in sys.argv[1:] if arg != "--quick"]
        grids = [parser.parse_args([*grid.split(), *rest]) for grid in quick]
    for grid in grids:
        for optimizer in grid.optimizer if device.type == "cpu" else []:
            if optimizer not in CPU_OPTIMIZERS:
                parser.error(f"{optimizer} has no kernel on a CPU; choose from {', '.join(CPU_OPTIMIZERS)}")
        for name in grid.caches or [] if device.type == "cpu" else []:
            if RIVALS[name].is_cuda_only:
                parser.error(f"{name} exists on CUDA only")
    check_outputs(parser, args)
    command = shlex.join(["python", "examples/benchmark/train_step.py", *sys.argv[1:]])
    # Each contender has five streams of its own; those that share a hardware queue wait for each other.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    report = Report(machine(device), command, measure_bandwidth(device, 128, 100_000, 1_000_000))
    course = Course(report, args.seconds)
    with tempfile.TemporaryDirectory() as directory:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", init_method=f"file://{directory}/store", rank=0, world_size=1
        )
        for grid in grids:
            grid.block_steps = grid.block_steps or BLOCK_STEPS[device.type]
            for rows in run_grid(grid, device, course):
                for row in rows:
                    print(row.line(), flush=True)
                report.figures += rows
                if args.out:
                    report.write_results(Path(args.out))
        dist.destroy_process_group()
    report.where["minutes"] = round(course.num_seconds / 60, 1)
    print(f"{report.where['minutes']} minutes")
    if args.json:
        write_by_contender(Path(args.json), report.figures, vars(args))
    if args.out:
        report.write(Path(args.out))
        print(f"written: {', '.join(sorted(path.name for path in Path(args.out).iterdir()))}")
    sys.exit(course.has_failures)


if __name__ == "__main__":
    main()
