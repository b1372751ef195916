# SPDX-License-Identifier: BSD-3-Clause
"""What only a CUDA device shows: stock's bits there, with kernels that run at any time, and no wait for the host."""

import os
import random
import shutil
import subprocess
import sys
import threading
import warnings
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from core_helpers import LAYOUT, RandomVictims, expected_parts, max_diff, random_rows
from device_path import WrappedOps
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from helpers import Setting, Trainer, check_equal, drain, make_batches, max_abs_diff, run_ranks, with_optimizer
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.modules.embedding_configs import DataType
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_scratchpipe import scratchpad_stats
from torchrec_scratchpipe.core.batch import Batch, FeatureSource, feature_rows
from torchrec_scratchpipe.core.cuda_graph import CudaGraph
from torchrec_scratchpipe.core.host_table import HostTable
from torchrec_scratchpipe.core.pool import Pool
from torchrec_scratchpipe.core.rows import TableSpec
from torchrec_scratchpipe.core.runner import OverlappedStageRunner, StageRunner
from torchrec_scratchpipe.core.scratchpad import allocate_scratchpads
from torchrec_scratchpipe.core.slot_map import SlotMap, _make_buffers
from torchrec_scratchpipe.core.slot_ops import Count, FeatureIds, SlotOps
from torchrec_scratchpipe.core.storage import PageLockedStorage
from torchrec_scratchpipe.core.streams import StageStreams
from torchrec_scratchpipe.core.triton_ops import TritonOps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, there is none"),
]

CUDA = torch.device("cuda", 0)
OPTIMIZERS = [torch.optim.SGD, torch.optim.Adagrad, RowWiseAdagrad, torch.optim.Adam]
# Not LARS_SGD, whose states FBGEMM does not show: stock cannot be built with it.
FBGEMM_OPTIMIZERS = [EmbOptimType.PARTIAL_ROWWISE_ADAM, EmbOptimType.LAMB]


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "DEVICE", CUDA)


def check_as_equal_as_stock(setting: Setting, **kwargs: Any) -> Trainer:
    """No further from stock than stock is from itself in a second run; where FBGEMM is deterministic, that is 0.0."""
    batches = make_batches(setting)
    first, second = Trainer(setting), Trainer(setting)
    second.copy_from(first)
    ours = Trainer.scratchpipe(setting, **kwargs)
    ours.copy_from(first)
    for stock in (first, second):
        stock.train_plain(batches)
    drain(ours.pipeline(), batches)
    assert max_abs_diff(first, ours) <= max_abs_diff(first, second)
    assert all(pool.num_misses_at_train == 0 for pool in scratchpad_stats(ours.model))
    assert ours.num_victims > 100
    return ours


@pytest.mark.parametrize("host_access", ["direct", "staged"])
@pytest.mark.parametrize("overlap", [False, True], ids=["sequential", "overlapped"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(optimizer: type[torch.optim.Optimizer], overlap: bool, host_access: str) -> None:
    ours = check_as_equal_as_stock(with_optimizer(Setting(), optimizer), overlap=overlap, host_access=host_access)
    pools = ours.model.module.ebc.pools
    for pool in pools:
        assert isinstance(pool.slot_map.ops, TritonOps)
        recordings = [recording for some in pool.slot_map.ops._recordings.values() for recording in some.values()]
        assert sum(recording is not None for recording in recordings) > 3
    assert all(pool.host_table.is_device_accessible == (host_access == "direct") for pool in pools)


@pytest.mark.parametrize("optimizer", FBGEMM_OPTIMIZERS)
def test_optimizers_of_fbgemm(optimizer: EmbOptimType) -> None:
    check_as_equal_as_stock(Setting(optimizer=None, fused_params={"optimizer": optimizer, "learning_rate": 0.1}))


@pytest.mark.parametrize(
    "setting",
    [
        Setting(dims=(4, 16, 8)),
        Setting(features_per_table={0: ("a", "b"), 1: ("c",), 2: ("d",)}),
        Setting(fused_tables=("t1",)),
        Setting(is_weighted=True),
        with_optimizer(Setting(is_vbe=True), RowWiseAdagrad),  # one of the three that FBGEMM has for it
        Setting(is_pooled=False),
        # By default FBGEMM rounds at random there, by position in the sorted batch, which slots change.
        Setting(data_type=DataType.FP16, fused_params={"stochastic_rounding": False}),
        Setting(sharding_type="row_wise"),
        Setting(sharding_type="column_wise", min_partition=4),
        Setting(index_dtype=torch.int32),
    ],
    ids=lambda setting: "",
)
def test_features_tables_and_shardings(setting: Setting) -> None:
    check_as_equal_as_stock(setting)


@pytest.mark.parametrize("ram_budget_gb", [0.5, 2e-6])
def test_memory_mapped_tables(ram_budget_gb: float, tmp_path: Path) -> None:
    check_as_equal_as_stock(Setting(), table_dir=str(tmp_path), ram_budget_gb=ram_budget_gb)


def test_where_fbgemm_is_deterministic_the_difference_is_zero() -> None:
    check_equal(with_optimizer(Setting(max_ids_per_bag=1), torch.optim.SGD))


class LateOps(WrappedOps):
    """Operations before which their stream sleeps for a random time; victims are random, and listed anew each time."""

    def __init__(self, ops: SlotOps, seed: int, max_cycles: int = 2_000_000) -> None:
        super().__init__(ops)
        self._random = random.Random(seed)
        self._max_cycles = max_cycles

    def _run(self, name: str, args: tuple[Any, ...]) -> None:
        if self._max_cycles and self._random.random() < 0.5:
            torch.cuda._sleep(self._random.randrange(self._max_cycles))
        if name == "take" and args[-1]:
            self._ops.clear_victim_list(args[1])
        if name == "scan":
            args[1].frequency.exponential_()
        super()._run(name, args)


def make_gpu_pool(ops: SlotOps, runner: StageRunner, num_rows: int = 60, num_slots: int = 30) -> Pool:
    host_table = HostTable([TableSpec("t0", num_rows, num_slots / num_rows)], LAYOUT, PageLockedStorage())
    for part in host_table.parts:
        part.copy_(torch.rand(part.shape, generator=torch.Generator().manual_seed(7)))
    host_table.accept_overwrite()
    memory = allocate_scratchpads([LAYOUT], [num_slots], CUDA)
    offsets = host_table.row_offsets
    slot_map = SlotMap(num_rows, num_slots, offsets, ops, CUDA, runner.streams)
    return Pool(host_table, memory.scratchpads[0], slot_map)


class Lookups:
    """Makes batches of a pool without waiting for the device."""

    def __init__(self, pool: Pool, runner: StageRunner, ids_per_batch: int) -> None:
        self._pool = pool
        self._runner = runner
        self._features = [FeatureSource("f0", 0, 0)]
        self._rows_of_features = feature_rows([pool], self._features, CUDA)
        self._bounds = torch.tensor([0, ids_per_batch], device=CUDA)

    def batch(self, rows: torch.Tensor) -> Batch:
        ids = FeatureIds(rows, self._bounds)
        return Batch([self._pool], self._features, ids, self._rows_of_features, self._runner.release)


def train_without_waiting(parts: Sequence[torch.Tensor], slots: torch.Tensor, firsts: torch.Tensor) -> None:
    """As `train`, told where each distinct row first occurs."""
    weights, state = parts
    index = slots[firsts]
    state[index] += weights[index].sum(dim=1) * 0.01 + 1.0
    weights[index] = weights[index] * 0.9 + 0.1 / state[index, None]


def run_on_gpu(pool: Pool, batches: list[torch.Tensor], runner: StageRunner, lookahead: int, delay: int = 0) -> None:
    lookups = Lookups(pool, runner, batches[0].numel())
    firsts = [torch.from_numpy(np.unique(rows.numpy(), return_index=True)[1]).to(CUDA) for rows in batches]
    in_flight: deque[Batch] = deque()
    remaining = deque(rows.to(CUDA) for rows in batches)
    loading = torch.cuda.Stream()  # as a pipeline's: not ordered after Train
    torch.cuda.synchronize()
    for batch_firsts in firsts:
        while remaining and len(in_flight) <= lookahead:
            batch = lookups.batch(remaining.popleft())
            with torch.cuda.stream(loading):
                runner.submit(batch)
            in_flight.append(batch)
        batch = in_flight.popleft()
        slots = runner.wait(batch)
        if delay:
            torch.cuda._sleep(random.randrange(delay))
        train_without_waiting(pool.scratchpad.parts, slots, batch_firsts)
        runner.release(batch, is_updated=True)
    with runner.between_batches():
        pool.flush()


@pytest.mark.parametrize("lookahead", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_random_victims_and_delays_on_every_stream(seed: int, lookahead: int) -> None:
    random.seed(seed)
    runner = OverlappedStageRunner(CUDA)
    pool = make_gpu_pool(LateOps(TritonOps(), seed), runner)
    batches = random_rows(num_batches=150, ids_per_batch=6, seed=seed)
    expected = expected_parts(pool, batches)
    run_on_gpu(pool, batches, runner, lookahead, delay=2_000_000)
    # Train runs on the device here and on the host there.
    assert max_diff(expected, pool.host_table.parts) < 1e-5
    stats = pool.stats()
    assert stats.num_victims > 200  # at random, of about 300
    assert stats.num_misses_at_train == 0
    pool.slot_map.check_integrity()


@pytest.mark.parametrize(
    ("owner", "name", "stage_cycles", "train_cycles"),
    [
        (OverlappedStageRunner, "_let_current_stream_wait", 20_000_000, 0),
        (StageStreams, "order_after_trains", 0, 20_000_000),
    ],
)
def test_control_without_an_event_rows_are_lost(
    owner: type, name: str, stage_cycles: int, train_cycles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, lambda *_: None)
    runner = OverlappedStageRunner(CUDA)
    num_wrong = 0
    for seed in range(4):
        random.seed(seed)
        pool = make_gpu_pool(LateOps(TritonOps(), seed, stage_cycles), runner)
        pool.slot_map._is_certain = lambda num_ids: True
        batches = random_rows(num_batches=150, ids_per_batch=6, seed=seed)
        expected = expected_parts(pool, batches)
        run_on_gpu(pool, batches, runner, lookahead=3, delay=train_cycles)
        num_wrong += max_diff(expected, pool.host_table.parts) > 1e-3 or pool.stats().num_misses_at_train > 0
    assert num_wrong > 0


def test_twin_on_the_gpu_gives_the_same_tables() -> None:
    tables = []
    batches = random_rows(num_batches=100, ids_per_batch=6)
    for ops in (TritonOps(), RandomVictims(0)):
        runner = StageRunner(CUDA)
        is_random = isinstance(ops, RandomVictims)
        if is_random:
            ops._generator = torch.Generator(CUDA).manual_seed(0)
        pool = make_gpu_pool(ops, runner)
        run_on_gpu(pool, batches, runner, lookahead=2)
        tables.append(pool.host_table.parts)
    assert max_diff(*tables) == 0.0


def count_waits(run: Any) -> int:
    """How often the host waited for the device, as torch counts it: operations, but not events."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


class CountedEvents:
    """Counts waits of the host for events that had not happened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_waits = 0
        synchronize = torch.cuda.Event.synchronize

        def count(event: torch.cuda.Event) -> None:
            self.num_waits += not event.query()
            synchronize(event)

        monkeypatch.setattr(torch.cuda.Event, "synchronize", count)


def test_stages_never_wait_for_the_device() -> None:
    runner = OverlappedStageRunner(CUDA)
    pool = make_gpu_pool(TritonOps(), runner, num_rows=50_000, num_slots=5_000)
    batches = [rows.to(CUDA) for rows in random_rows(num_batches=40, ids_per_batch=500, num_rows=50_000)]
    lookups = Lookups(pool, runner, 500)
    ones = torch.ones(500, 4, device=CUDA)
    in_flight: deque[Batch] = deque()

    def run(some: list[torch.Tensor]) -> None:
        for rows in some:
            batch = lookups.batch(rows)
            runner.submit(batch)
            in_flight.append(batch)
            if len(in_flight) > 2:
                oldest = in_flight.popleft()
                pool.scratchpad.parts[0].index_add_(0, runner.wait(oldest), ones)
                runner.release(oldest, is_updated=True)

    run(batches[:20])
    runner.wait_until_idle()
    assert count_waits(lambda: (run(batches[20:]), runner.wait_until_idle())) == 0
    assert pool.slot_map.num_waits == 0
    assert pool.stats().num_victims > 1000


def test_training_waits_no_more_often_than_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(num_rows=(20_000, 10_000, 300), batch_size=64, num_batches=60, load_factor=0.2)
    batches = make_batches(setting)
    waits = []
    for trainer in (Trainer(setting), Trainer.scratchpipe(setting)):
        is_stock = not scratchpad_stats(trainer.model)
        pipeline = (
            TrainPipelineSparseDist(trainer.model, trainer.optimizer, CUDA)
            if is_stock
            else trainer.pipeline(lookahead=2)
        )
        iterator = iter(batches)
        for _ in range(20):
            pipeline.progress(iterator)
        events = CountedEvents(monkeypatch)
        waits.append(
            count_waits(lambda pipeline=pipeline, iterator=iterator: [pipeline.progress(iterator) for _ in range(20)])
        )
    assert waits[1] <= waits[0]
    # Of 20 batches, some may find the host a whole lookahead ahead of the device, and their plan not run yet.
    assert events.num_waits <= 20


def test_stages_allocate_nothing_per_batch() -> None:
    runner = StageRunner(CUDA)
    pool = make_gpu_pool(TritonOps(), runner, num_rows=50_000, num_slots=5_000)
    rows = [rows.to(CUDA) for rows in random_rows(num_batches=30, ids_per_batch=500, num_rows=50_000)]
    lookups = Lookups(pool, runner, 500)
    batches = [lookups.batch(some) for some in rows]

    def run(some: list[Batch]) -> None:
        for batch in some:
            runner.submit(batch)
            runner.wait(batch)
            runner.release(batch, is_updated=True)

    run(batches[:10])
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    run(batches[10:])
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert pool.stats().num_victims > 1000


def test_training_grows_no_memory() -> None:
    setting = Setting(num_rows=(20_000, 10_000, 300), batch_size=64, num_batches=80, load_factor=0.2)
    batches = make_batches(setting)
    ours = Trainer.scratchpipe(setting)
    pipeline, iterator = ours.pipeline(lookahead=2), iter(batches)
    for _ in range(30):
        pipeline.progress(iterator)
    torch.cuda.synchronize()
    segments = torch.cuda.memory_stats()["segment.all.allocated"]
    for _ in range(40):
        pipeline.progress(iterator)
    torch.cuda.synchronize()
    # Batches differ in size, on five streams: the allocator may still find that a block is too small. It must not go on
    # so.
    assert torch.cuda.memory_stats()["segment.all.allocated"] - segments <= 3


def test_page_locked_tables_are_as_large_as_asked_for_and_reached_by_kernels() -> None:
    storage = PageLockedStorage()
    table = storage.allocate(3 * 1000 * 1000, torch.float32, "table").view(-1, 4)
    assert table.is_pinned()
    assert not table.is_cuda
    assert table.untyped_storage().nbytes() == table.nbytes
    assert float(table.abs().max()) == 0.0
    slots = torch.arange(40.0, device=CUDA).view(10, 4)
    counts = torch.full((8,), 10, dtype=torch.int64, device=CUDA)
    index = torch.arange(10, device=CUDA)
    TritonOps().move(slots, index, table, index * 70_000, counts, 0)  # type: ignore[arg-type]
    torch.cuda.synchronize()
    assert torch.equal(table[torch.arange(10) * 70_000], slots.cpu())


def test_memcheck() -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer is not installed")
    test = f"{__file__}::test_random_victims_and_delays_on_every_stream[0-2]"
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", test]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "ERROR SUMMARY: 0 errors" in result.stdout


@pytest.mark.dist
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("sharding_type", ["table_wise", "row_wise"])
def test_two_ranks(sharding_type: str) -> None:
    run_ranks(2, _train_on_rank, Setting(sharding_type=sharding_type))


def _train_on_rank(rank: int, setting: Setting) -> None:
    torch.cuda.set_device(rank)
    helpers.DEVICE = torch.device("cuda", rank)
    check_as_equal_as_stock(setting)


def test_recordings_disturb_nobody() -> None:
    """While torch captures a stream, others may neither draw random numbers nor wait for the device."""
    ops, buffers, is_done = TritonOps(CudaGraph), _make_buffers(64, CUDA), threading.Event()
    errors: list[Exception] = []

    def draw_and_wait() -> None:
        torch.cuda.set_device(CUDA)
        try:
            while not is_done.is_set():
                torch.rand(1000, device=CUDA)
                torch.cuda.synchronize()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=draw_and_wait)
    thread.start()
    try:
        for index in range(300):
            buffers.counts.fill_(index)
            with ops.recorded(buffers, index // 3) as is_enqueued:  # launched, recorded, replayed
                if not is_enqueued:
                    ops.report(buffers)
            torch.cuda.synchronize()
            assert buffers.host_counts.tolist() == [index] * len(Count)
    finally:
        is_done.set()
        thread.join()
    assert errors == []
    assert ops._make_graph is not None  # nothing was refused
