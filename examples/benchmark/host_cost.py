# SPDX-License-Identifier: BSD-3-Clause
"""What a batch costs the host on a CUDA device, measured without one: CPU time of Python; the driver does nothing.

    python examples/benchmark/host_cost.py

Kernels are compiled for a GPU of compute capability 9.0 and not launched. What is missing is the driver's own time: 2
to 5 us a launch, 10 to 40 us a graph. Figures are the best of several rounds, so that other load hardly shows.

* *one by one*: enqueue one plan, both moves and the count of misses, each launch by Triton.
* *recorded*: the same, replayed as recordings.
* *training thread*: submit, wait and release of a batch, and the counters.
* *worker*: everything else that a batch needs: the queue, Plan, both moves, events.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from torchrec_scratchpipe.core import triton_ops
from torchrec_scratchpipe.core.batch import Batch, FeatureSource, feature_rows
from torchrec_scratchpipe.core.cuda_graph import CudaGraph
from torchrec_scratchpipe.core.host_table import HostTable
from torchrec_scratchpipe.core.pool import Pool
from torchrec_scratchpipe.core.rows import RowLayout, TableSpec
from torchrec_scratchpipe.core.runner import OverlappedStageRunner
from torchrec_scratchpipe.core.scratchpad import allocate_scratchpads
from torchrec_scratchpipe.core.slot_map import SlotMap
from torchrec_scratchpipe.core.slot_ops import FeatureIds
from torchrec_scratchpipe.core.stages import fill, write_back
from torchrec_scratchpipe.core.storage import RamStorage

CPU = torch.device("cpu")
NUM_TABLES, NUM_ROWS, NUM_SLOTS, NUM_IDS, DIM = 8, 1000, 3000, 1000, 128
CALLS, ROUNDS = 300, 7
DRIVER_CALLS = ("cuGraphCreate", "cuGraphInstantiateWithFlags", "cuGraphLaunch", "cuGraphExecDestroy", "cuGraphDestroy")


class NoDriver:
    """What Triton asks of a driver, for a GPU that is not there."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {
            "max_shared_mem": 232448,
            "multiprocessor_count": 132,
            "warpSize": 32,
            "max_num_regs": 65536,
        },
        load_binary=lambda *args: (1, 1, 32, 0, 1024),
    )

    @staticmethod
    def launcher_cls(*args: Any) -> Callable[..., None]:
        """Launches nothing."""
        return lambda *args: None

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_active_torch_device = staticmethod(lambda: CPU)
    is_active = staticmethod(lambda: True)


class ReachableRam(RamStorage):
    """Memory that kernels would reach."""

    is_device_accessible = True


class DeviceRunner(OverlappedStageRunner):
    """Takes the worker for one that enqueues on a device."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.streams.plan = SimpleNamespace(synchronize=lambda: None)  # type: ignore[assignment]

    def _find_change(self, batch: Batch) -> None:
        """A device has a copy of the ids."""


class EmptyGraph(CudaGraph):
    """A recording whose replay is all of Python's part, and nothing of the driver's."""

    def __init__(self) -> None:
        super().__init__(SimpleNamespace(**dict.fromkeys(DRIVER_CALLS, lambda *args: 0)))

    def add(self, *args: Any) -> None:
        """The driver would."""


def make_pool(ops: triton_ops.TritonOps) -> Pool:
    """8 tables, SGD, on no device."""
    layout = RowLayout(DIM, torch.float32, ())
    tables = [TableSpec(f"t{index}", NUM_ROWS, NUM_SLOTS / NUM_ROWS / NUM_TABLES) for index in range(NUM_TABLES)]
    host_table = HostTable(tables, layout, ReachableRam())
    memory = allocate_scratchpads([layout], [NUM_SLOTS], CPU)
    slot_map = SlotMap(NUM_TABLES * NUM_ROWS, NUM_SLOTS, host_table.row_offsets, ops, CPU)
    slot_map._is_certain = lambda num_ids: True  # type: ignore[method-assign]  # nothing counts
    return Pool(host_table, memory.scratchpads[0], slot_map)


def make_batch(pool: Pool, runner: OverlappedStageRunner) -> Callable[[], Batch]:
    """What makes batches of one id of each table, over and over."""
    features = [FeatureSource(f"f{index}", 0, index) for index in range(NUM_TABLES)]
    rows = feature_rows([pool], features, CPU)
    bounds = torch.arange(0, NUM_IDS + 1, NUM_IDS // NUM_TABLES, dtype=torch.int64)
    ids = FeatureIds(torch.zeros(NUM_IDS, dtype=torch.int64), bounds)
    return lambda: Batch([pool], features, ids, rows, runner.release)


def best_us(run: Callable[[], object]) -> float:
    """CPU time of one call."""
    for _ in range(50):
        run()
    rounds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(CALLS):
            run()
        rounds.append((time.process_time() - start) / CALLS)
    return 1e6 * min(rounds)


def enqueue_us(make_graph: type[CudaGraph] | None) -> float:
    """One plan, both moves, and the count of misses."""
    pool = make_pool(triton_ops.TritonOps(make_graph))
    batch = make_batch(pool, DeviceRunner())()

    def run() -> None:
        slot_map = pool.slot_map
        slot_map.take_in_releases()
        plan = slot_map.plan(batch.pool_ids[0])
        write_back(pool, plan)
        fill(pool, plan)
        slot_map.confirm(plan)
        slot_map.count_misses(plan)
        slot_map.release(plan.batch_index)

    return best_us(run)


def thread_us() -> tuple[float, float]:
    """Of the training thread, and of the worker; for each batch, lookahead 2."""
    runner = DeviceRunner()
    pool = make_pool(triton_ops.TritonOps(EmptyGraph))
    new_batch = make_batch(pool, runner)
    in_flight = deque(new_batch() for _ in range(2))
    for batch in in_flight:
        runner.submit(batch)
    runner.wait_until_idle()

    def step() -> float:
        start = time.thread_time()
        with runner.holding_back():
            batch = new_batch()
            runner.submit(batch)
            in_flight.append(batch)
            oldest = in_flight.popleft()
            runner.wait(oldest)
        used = time.thread_time() - start
        runner.wait_until_idle()  # backward
        start = time.thread_time()
        runner.release(oldest, is_updated=True)
        return used + time.thread_time() - start

    (worker,) = (thread for thread in threading.enumerate() if thread.name == "scratchpipe-stages")
    assert worker.ident is not None
    clock = time.pthread_getcpuclockid(worker.ident)
    for _ in range(50):
        step()
    rounds = []
    for _ in range(ROUNDS):
        start = time.clock_gettime(clock)
        used = sum(step() for _ in range(CALLS))
        rounds.append((used / CALLS, (time.clock_gettime(clock) - start) / CALLS))
    return 1e6 * min(train for train, _ in rounds), 1e6 * min(work for _, work in rounds)


def main() -> None:
    triton.runtime.driver.set_active(NoDriver())
    print(f"one by one       {enqueue_us(None):6.0f} us")
    print(f"recorded         {enqueue_us(EmptyGraph):6.0f} us")
    train, worker = thread_us()
    print(f"training thread  {train:6.0f} us")
    print(f"worker           {worker:6.0f} us")


if __name__ == "__main__":
    main()
