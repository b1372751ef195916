# SPDX-License-Identifier: BSD-3-Clause
"""Predicts a training step on a GPU that is not there, and says what binds it.

    python examples/benchmark/predict.py                        # this package beside `fused`, on four GPUs
    python examples/benchmark/predict.py --machine H200         # and its rivals, on one of them
    python examples/benchmark/predict.py --measured docs/benchmarks/h200/results.json

A step is simulated: threads, Python's lock, streams and the bus take tasks in turn, each task after those that it waits
for. Times come from bytes and operations, over what machines.json says of a machine; misses are the planner's. What
was measured on an H200 (docs/benchmarks/h200.md), and what is assumed, stands beside each constant.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rivals import Shape
from workloads import NUM_DENSE, WORKLOADS, Workload

from torchrec_scratchpipe.planning.reuse import Reuse, misses_of_pool
from torchrec_scratchpipe.planning.zipf import zipf_reuse

MACHINES = Path(__file__).with_name("machines.json")
NUM_BATCHES, NUM_SETTLING = 40, 20

# Measured on the H200.
STEP_HOST_MS = 6.6  # to enqueue a step of the paper's model, tables in device memory: 6.4 and 6.9
ORDERED_SHARE, ANY_ORDER_SHARE = 38 / 51.5, 17 / 51.5  # of a plain copy's speed: rows by address, rows in any order
BOTH_WAYS_SHARE = 86 / 103  # of the bus, if both directions are used at once
PLAN_MS, PLAN_MS_PER_ID = 0.094, 0.57e-6  # 0.28 ms for 327,680 ids, 1.06 ms for 1.7 million
TRAIN_LOST_TO_PLAN = 0.7 / 1.06  # of Plan's time, which Train is longer: 21.8 beside 21.1 ms
TRAIN_LOST_TO_MOVES = 1.0 / 3.3  # of the rows' time on the bus: 22.8 beside 21.8 ms, 127 MB each way at 38 GB/s
FLOPS_SHARE = 0.28  # of the data sheet's, that the dense part reaches: 21.1 ms a step of Criteo's model
PREFETCH_HOST_MS = 1.5  # FBGEMM's prefetch beside the paper's model: 8.42 beside 6.87 ms

# Measured with the driver left out (host_cost.py).
TRAINING_THREAD_MS, WORKER_MS = 0.036, 0.082

# Assumed.
GRAPH_LAUNCH_MS = 0.010  # three for each batch
FORWARD_SHARE = 0.5  # of the host's time for a step; Python's lock is free during the rest
MEMORY_SHARE = 0.6  # of the data sheet's bandwidth, that gathers and scatters of rows reach
LRU_MISSES = 1.18  # FBGEMM's cache, for one row of ours: ours / LRU is 0.85 in the mean (docs/planning.md)
# While FBGEMM's cache moves rows, Train stands still: its kernels fill the device.
TRAIN_LOST_TO_CACHE = 1.0

# Upstream's own offloading benchmark (torchrec #4099): the step of all tables in device memory was measured there.
OFFLOAD = WORKLOADS["offload"]
OFFLOAD_STEP_MS = 285.5


class Machine(NamedTuple):
    """What a prediction needs to know of a machine."""

    memory_gb_per_s: float
    fp32_tflops: float
    bus_gb_per_s: float  # each way
    host_slowness: float  # beside the H200's
    source: str

    def bus_ms(self, num_bytes: float, share: float) -> float:
        """One way, while the other way is busy too."""
        return num_bytes / (self.bus_gb_per_s * share * 1e6)

    def memory_ms(self, num_bytes: float) -> float:
        """Rows read or written on the device."""
        return num_bytes / (self.memory_gb_per_s * MEMORY_SHARE * 1e6)


@dataclasses.dataclass
class Task:
    """Work that needs some resources for itself, after other work."""

    ms: float
    resources: tuple[str, ...]
    after: Sequence["Task | None"] = ()
    end_ms: float = 0.0


class Simulation:
    """Resources that take tasks in the order in which these are added."""

    def __init__(self) -> None:
        self._free_at: dict[str, float] = {}
        self.busy_ms: dict[str, float] = {}

    def add(self, ms: float, resources: str, *after: Task | None) -> Task:
        """Add a task; names of resources are separated by spaces."""
        task = Task(ms, tuple(resources.split()), after)
        starts = [self._free_at.get(name, 0.0) for name in task.resources]
        starts += [before.end_ms for before in after if before is not None]
        task.end_ms = max(starts, default=0.0) + ms
        for name in task.resources:
            self._free_at[name] = task.end_ms
            self.busy_ms[name] = self.busy_ms.get(name, 0.0) + ms
        return task


@functools.cache
def reuse_of(num_rows: int, num_ids: int, exponent: float, lookahead: int) -> Reuse:
    """Of a table, by the planner."""
    return zipf_reuse(num_rows, num_ids, exponent, lookahead, 0)


@functools.cache
def expected(num_rows: int, num_ids: int, exponent: float, first_rank: int) -> tuple[float, float]:
    """Unique rows of a batch, and the share of its lookups, of all but the hottest rows of a table."""
    weights = np.arange(1, num_rows + 1, dtype=np.float64) ** -exponent
    shares = weights[first_rank:] / weights.sum()
    return float(-np.expm1(num_ids * np.log1p(-shares)).sum()), float(shares.sum())


class Point(NamedTuple):
    """What is predicted: a model, a machine, ids, and what caches get."""

    machine: Machine
    shape: Shape
    exponent: float

    @property
    def ids_per_table(self) -> int:
        """Lookups of a batch."""
        return self.shape.workload.batch_size * self.shape.workload.ids_per_bag

    def misses(self, load_factor: float) -> float:
        """Unique rows of a batch that are not in so many slots, when they are full."""
        workload = self.shape.workload
        reuse = reuse_of(workload.num_embeddings, self.ids_per_table, self.exponent, self.shape.lookahead)
        slots = load_factor * workload.num_embeddings
        return workload.num_tables * float(misses_of_pool([reuse], slots)[0].sum())

    def fits(self) -> bool:
        """Whether the rows of all batches in flight have slots."""
        workload = self.shape.workload
        reuse = reuse_of(workload.num_embeddings, self.ids_per_table, self.exponent, self.shape.lookahead)
        return reuse.window(self.shape.lookahead + 1).mean <= self.shape.load_factor * workload.num_embeddings

    def unique(self, first_rank: int = 0) -> float:
        """Unique rows of a batch, of all but the hottest of each table."""
        workload = self.shape.workload
        used, _ = expected(workload.num_embeddings, self.ids_per_table, self.exponent, first_rank)
        return workload.num_tables * used

    def cold_lookups(self, num_hot: int) -> float:
        """Lookups of rows that are not among the hottest of their table."""
        workload = self.shape.workload
        _, share = expected(workload.num_embeddings, self.ids_per_table, self.exponent, num_hot)
        return workload.ids_per_batch * share

    def train_ms(self) -> float:
        """The device's time for forward, backward and update, all rows in its memory."""
        workload = self.shape.workload
        if workload.name == OFFLOAD.name:
            return OFFLOAD_STEP_MS
        vectors = workload.num_tables + 1
        widths = [NUM_DENSE, 512, 256, workload.embedding_dim]
        over = [workload.embedding_dim + vectors * (vectors - 1) // 2, 512, 512, 256, 1]
        products = sum(a * b for layers in (widths, over) for a, b in itertools.pairwise(layers))
        products += vectors * vectors * workload.embedding_dim
        flops = 2 * 3 * products * workload.batch_size  # backward costs twice as much as forward
        row = 4 * workload.embedding_dim
        pooled = workload.num_tables * workload.batch_size * row
        rows = workload.ids_per_batch * row + 2 * self.unique() * self.shape.row_bytes
        # Rows are read, then updated. Bags are written, read by the model, and so are their gradients.
        return flops / (self.machine.fp32_tflops * FLOPS_SHARE * 1e9) + self.machine.memory_ms(rows + 4 * pooled)

    def host_ms(self) -> float:
        """The training thread's time to enqueue a step of stock."""
        return STEP_HOST_MS * self.machine.host_slowness


class Prediction(NamedTuple):
    """Of a step."""

    ms: float
    binds: str


def predict(point: Point, cache: str) -> Prediction:
    """Simulate some steps of one way to hold the tables."""
    simulation = Simulation()
    step = STEPS[cache](point, simulation)
    ends = [step(number).end_ms for number in range(NUM_BATCHES)]
    gaps = [after - before for before, after in itertools.pairwise(ends)]
    kinds = {"training_thread": "host", "worker": "host", "train": "device"}
    busiest = max(simulation.busy_ms, key=lambda name: simulation.busy_ms[name])
    return Prediction(statistics.median(gaps[NUM_SETTLING:]), kinds.get(busiest, "bus"))


Step = Callable[[int], Task]  # adds a step's tasks; the last one is the end of its Train


def fused(point: Point, simulation: Simulation) -> Step:
    """All tables in device memory."""
    train, host = point.train_ms(), point.host_ms()

    def step(_: int) -> Task:
        forward = simulation.add(FORWARD_SHARE * host, "training_thread python")
        simulation.add(train / 3, "train", forward)
        backward = simulation.add((1 - FORWARD_SHARE) * host, "training_thread", forward)
        return simulation.add(train * 2 / 3, "train", backward)

    return step


def scratchpipe(point: Point, simulation: Simulation) -> Step:
    """The scratchpad: Plan and moves on streams of their own, `lookahead` batches ahead."""
    machine, workload, lookahead = point.machine, point.shape.workload, point.shape.lookahead
    plan = PLAN_MS + PLAN_MS_PER_ID * workload.ids_per_batch
    moved = point.misses(point.shape.load_factor) * point.shape.row_bytes
    move = machine.bus_ms(moved, ORDERED_SHARE)
    train = point.train_ms() + TRAIN_LOST_TO_PLAN * plan + TRAIN_LOST_TO_MOVES * move
    host = point.host_ms()
    extra, work = (part * machine.host_slowness for part in (TRAINING_THREAD_MS, WORKER_MS + 3 * GRAPH_LAUNCH_MS))
    fills: dict[int, Task] = {}
    trained: list[Task | None] = [None]

    def step(number: int) -> Task:
        forward = simulation.add(FORWARD_SHARE * host + extra, "training_thread python")
        # Held back until forward is enqueued; then after the Train of the batch that was released last.
        worked = simulation.add(work, "worker python", forward)
        planned = simulation.add(plan, "plan", worked, trained[-1])
        written_back = simulation.add(move, "writeback bus_out", planned)
        fills[number + lookahead] = simulation.add(move, "fill bus_in", written_back)
        simulation.add(train / 3, "train", forward, fills.get(number))
        backward = simulation.add((1 - FORWARD_SHARE) * host, "training_thread", forward)
        trained.append(simulation.add(train * 2 / 3, "train", backward))
        return trained[-1]  # type: ignore[return-value]

    return step


def uvm_caching(point: Point, simulation: Simulation, prefetches: bool = False) -> Step:
    """FBGEMM's cache of weights; optimizer states of several values stay on the host, and are updated there."""
    machine, workload = point.machine, point.shape.workload
    row = 4 * workload.embedding_dim
    missed = LRU_MISSES * point.misses(point.shape.fbgemm_load_factor) * row
    move = 2 * machine.bus_ms(missed, ANY_ORDER_SHARE)  # rows leave, then rows come
    states = point.unique() * (point.shape.row_bytes - row) if point.shape.row_bytes > row + 4 else 0.0
    update = machine.bus_ms(states, ORDERED_SHARE)  # backward goes by row
    train, host = point.train_ms() + update, point.host_ms()
    fetched: list[Task | None] = [None]

    def step(_: int) -> Task:
        waits = fetched[-1]
        forward = simulation.add(
            FORWARD_SHARE * host + (PREFETCH_HOST_MS * machine.host_slowness if prefetches else 0.0),
            "training_thread python",
        )
        # A prefetch has a stream of its own, and takes the device all the same.
        fetched.append(simulation.add(TRAIN_LOST_TO_CACHE * move, "train bus_in bus_out", forward))
        simulation.add(train / 3, "train", forward, waits)
        backward = simulation.add((1 - FORWARD_SHARE) * host, "training_thread", forward)
        return simulation.add(train * 2 / 3, "train", backward)

    return step


def static(point: Point, simulation: Simulation) -> Step:
    """The hottest rows in device memory; the others are read for every lookup, and updated, over the bus."""
    machine, shape, num_hot = point.machine, point.shape, point.shape.num_hot
    read = point.cold_lookups(num_hot) * 4 * shape.workload.embedding_dim
    updated = point.unique(num_hot) * shape.row_bytes
    bus = machine.bus_ms(read, ANY_ORDER_SHARE) + machine.bus_ms(updated, ORDERED_SHARE)
    train, host = point.train_ms(), point.host_ms()

    def step(_: int) -> Task:
        forward = simulation.add(FORWARD_SHARE * host, "training_thread python")
        simulation.add(bus, "train bus_in bus_out", forward)
        simulation.add(train / 3, "train", forward)
        backward = simulation.add((1 - FORWARD_SHARE) * host, "training_thread", forward)
        return simulation.add(train * 2 / 3, "train", backward)

    return step


STEPS: dict[str, Callable[[Point, Simulation], Step]] = {
    "fused": fused,
    "scratchpipe": scratchpipe,
    "uvm_caching_prefetch": lambda point, simulation: uvm_caching(point, simulation, prefetches=True),
    "uvm_caching": uvm_caching,
    "static": static,
}


def points(machine: Machine) -> Iterable[Point]:
    """The benchmark's models, and upstream's."""
    paper, criteo = WORKLOADS["paper"], WORKLOADS["criteo"]
    for workload, optimizer in ((paper, "sgd"), (paper, "adam"), (criteo, "rowwise_adagrad")):
        for exponent in (0.8, 1.05):
            for load_factor in (0.02, 0.05, 0.1):
                yield Point(machine, Shape(workload, optimizer, load_factor, 2), exponent)
    for load_factor in (0.3, 0.4):
        yield Point(machine, Shape(OFFLOAD, "rowwise_adagrad", load_factor, 2), 0.0)


def head_of(point: Point) -> list[str]:
    """The first cells of a row."""
    shape = point.shape
    return [f"{shape.workload.name}, {shape.optimizer}", f"{point.exponent:g}", f"{shape.load_factor:.0%}"]


def print_row(cells: Iterable[str]) -> None:
    print(f"| {' | '.join(cells)} |")


def print_machines(machines: dict[str, Machine]) -> None:
    """Ratios of this package to `fused`, by machine."""
    print_row(["model", "Zipf", "slots", *machines])
    print_row(["---"] * (3 + len(machines)))
    for of_machines in zip(*(points(machine) for machine in machines.values()), strict=True):
        if not of_machines[0].fits():
            continue
        cells = []
        for point in of_machines:
            ours = predict(point, "scratchpipe")
            cells.append(f"{ours.ms / predict(point, 'fused').ms:.2f} ({ours.binds})")
        print_row([*head_of(of_machines[0]), *cells])


def print_rivals(machine: Machine) -> None:
    """Milliseconds of `fused`, and ratios of the others."""
    print_row(["model", "Zipf", "slots", "fused (ms)", *list(STEPS)[1:]])
    print_row(["---"] * (3 + len(STEPS)))
    for point in points(machine):
        if point.fits():
            ceiling = predict(point, "fused")
            ratios = [f"{predict(point, cache).ms / ceiling.ms:.2f}" for cache in list(STEPS)[1:]]
            print_row([*head_of(point), f"{ceiling.ms:.1f} ({ceiling.binds})", *ratios])


def print_beside(results: dict[str, Any], machines: dict[str, Machine]) -> None:
    """Prediction beside measurement."""
    name = next(name for name in machines if name in results["machine"]["device"])
    fields = [field.name for field in dataclasses.fields(Workload)]
    print_row(["model", "Zipf", "slots", "cache", "predicted (ms)", "measured (ms)", "predicted / measured"])
    print_row(["---"] * 7)
    lookaheads = [row["lookahead"] for row in results["rows"] if row["lookahead"]]
    for row in results["rows"]:
        workload = Workload(**{field: row["workload"][field] for field in fields if field in row["workload"]})
        shape = Shape(workload, row["optimizer"], row["load_factor"], row["lookahead"] or max(lookaheads))
        point = Point(machines[name], shape, row["zipf"])
        predicted, measured = predict(point, row["cache"]).ms, row["step_ms"]
        cells = [row["cache"], f"{predicted:.2f}", f"{measured:.2f}", f"{predicted / measured:.2f}"]
        print_row([*head_of(point), *cells])


def main() -> None:
    machines = {name: Machine(**figures) for name, figures in json.loads(MACHINES.read_text()).items()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", choices=machines, help="one of them, and its rivals")
    parser.add_argument("--measured", help="a results.json of train_step.py, to be predicted row by row")
    args = parser.parse_args()
    if args.measured:
        print_beside(json.loads(Path(args.measured).read_text()), machines)
    elif args.machine:
        print_rivals(machines[args.machine])
    else:
        print_machines(machines)


if __name__ == "__main__":
    main()
