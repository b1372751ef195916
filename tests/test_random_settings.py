# SPDX-License-Identifier: BSD-3-Clause
"""Bit equality with stock TorchRec for whole configurations drawn at random.

What fails is shrunk and printed as a `Config(...)` that can be pasted into :func:`check`. `make test` draws a few, on
one rank and on two; `make fuzz` draws for as long as it is told, see CONTRIBUTING.md.
"""

import os
import queue
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import (
    CPU,
    Setting,
    Trainer,
    assert_same_bits,
    assert_same_outputs,
    drain,
    is_embedding,
    local_tensors,
    make_batches,
    max_abs_diff,
    run_rank,
    scratchpad_constraints,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchrec import PoolingType
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import CacheParams
from torchrec.modules.embedding_configs import DataType
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_scratchpipe import scratchpad_stats
from torchrec_scratchpipe.core import stages

NUM_EXAMPLES = int(os.environ.get("SCRATCHPIPE_FUZZ_EXAMPLES", "15"))  # per test
RANK_TIMEOUT_S = 60.0

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
}
BAG_SHARDINGS = ["table_wise", "row_wise", "column_wise", "table_column_wise", "table_row_wise", "grid_shard"]
SEQUENCE_SHARDINGS = ["table_wise", "row_wise", "column_wise"]
COLUMN_WISE = ("column_wise", "table_column_wise", "grid_shard")
FUZZ = settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


@dataclass(frozen=True)
class Table:
    """One table of a drawn configuration."""

    num_rows: int
    dim: int
    sharding_type: str
    compute_kernel: str
    load_factor: float
    min_partition: int | None
    num_features: int


@dataclass(frozen=True)
class Config:
    """A drawn configuration, in words whose repr is Python."""

    tables: tuple[Table, ...]
    is_pooled: bool
    pooling: str
    optimizer: str
    data_type: str
    index_dtype: str
    batch_size: int
    max_ids_per_bag: int
    num_batches: int
    is_weighted: bool
    is_vbe: bool
    lookahead: int
    num_batches_seen_ahead: int
    overlap: bool
    event: str  # what somebody else does to the model in mid-training
    default_dtype: str
    seed: int

    def setting(self) -> Setting:
        is_sgd = self.optimizer == "sgd"
        return Setting(
            num_rows=tuple(table.num_rows for table in self.tables),
            dims=tuple(table.dim for table in self.tables),
            pooling=PoolingType(self.pooling),
            optimizer=OPTIMIZERS[self.optimizer],
            optimizer_kwargs=(("lr", 0.1),) if is_sgd else (("lr", 0.1), ("eps", 1e-8)),
            batch_size=self.batch_size,
            max_ids_per_bag=self.max_ids_per_bag,
            num_batches=self.num_batches,
            is_weighted=self.is_weighted,
            is_vbe=self.is_vbe,
            is_pooled=self.is_pooled,
            data_type=DataType(self.data_type),
            index_dtype=getattr(torch, self.index_dtype),
            seed=self.seed,
            features_per_table={
                i: tuple(f"f{i}_{j}" for j in range(table.num_features)) for i, table in enumerate(self.tables)
            },
        )

    def constraints(self) -> dict[str, ParameterConstraints]:
        constraints = scratchpad_constraints(self.setting())
        for table, constraint in zip(self.tables, constraints.values(), strict=True):
            constraint.sharding_types = [table.sharding_type]
            constraint.compute_kernels = [table.compute_kernel]
            constraint.cache_params = CacheParams(load_factor=table.load_factor)
            constraint.min_partition = table.min_partition
        return constraints


def check(config: Config) -> Trainer:
    """Train stock and ours from this configuration and compare every bit; returns ours."""
    setting = config.setting()
    batches = make_batches(setting, rank=dist.get_rank())
    stock = Trainer(setting, None, config.constraints())
    ours = Trainer.scratchpipe(setting, config.constraints(), overlap=config.overlap)
    ours.copy_from(stock)
    pipeline = ours.pipeline(config.lookahead, num_batches_seen_ahead=config.num_batches_seen_ahead)
    torch.set_default_dtype(getattr(torch, config.default_dtype))
    try:
        expected = _train(stock, None, batches, config)
        assert_same_outputs(expected, _train(ours, pipeline, batches, config))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(stock, ours)
    assert all(pool.num_misses_at_train == 0 for pool in scratchpad_stats(ours.model))
    return ours


def _train(trainer: Trainer, pipeline: Any, batches: list[Any], config: Config) -> list[torch.Tensor]:
    """Train, with the drawn event after a third of the batches and again after two thirds."""
    iterator = iter(batches)
    kept = EVENTS[config.event].take(trainer)
    outputs = []
    for index, batch in enumerate(batches):
        outputs.append(trainer.step(batch) if pipeline is None else pipeline.progress(iterator))
        if index in (len(batches) // 3, 2 * len(batches) // 3):
            outputs += EVENTS[config.event].happen(trainer, kept, pipeline, config)
    return outputs


def _tables_and_states(trainer: Trainer) -> list[torch.Tensor]:
    tables = [value for name, value in trainer.model.named_parameters() if is_embedding(name)]
    states = [value for states in trainer.optimizer.state_dict()["state"].values() for value in states.values()]
    return [tensor for value in [*tables, *states] for tensor in local_tensors(value) if tensor.dim() > 0]


class Event(NamedTuple):
    """What happens; `take` runs before training."""

    take: Callable[[Trainer], Any]
    happen: Callable[[Trainer, Any, Any, Config], list[torch.Tensor]]


def _halve(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    for tensor in tensors:
        tensor.data.mul_(0.5)
    return []


def _halve_by_numpy(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    for tensor in tensors:
        array = tensor.detach().numpy()
        array *= np.asarray(0.5, dtype=array.dtype)
    return []


def _evaluate(trainer: Trainer, _kept: Any, pipeline: Any, config: Config) -> list[torch.Tensor]:
    """By a pipeline of TorchRec's on the same model, batches in flight or not."""
    torch.set_default_dtype(torch.float32)  # of the data
    batches = make_batches(replace(config.setting(), seed=config.seed + 1), dist.get_rank(), 4)
    torch.set_default_dtype(getattr(torch, config.default_dtype))
    trainer.model.eval()
    with torch.no_grad():
        if pipeline is None:
            outputs = [trainer.model(batch)[1] for batch in batches]
        else:
            other = TrainPipelineSparseDist(trainer.model, trainer.optimizer, CPU)
            outputs = [output.clone() for output in drain(other, batches)]
    trainer.model.train()
    return outputs


EVENTS = {
    "nothing": Event(lambda trainer: None, lambda *_: []),
    "fresh tensors are written": Event(lambda trainer: None, lambda trainer, *_: _halve(_tables_and_states(trainer))),
    "kept tensors are written": Event(_tables_and_states, lambda trainer, kept, *_: _halve(kept)),
    "kept tensors are written by NumPy": Event(_tables_and_states, lambda trainer, kept, *_: _halve_by_numpy(kept)),
    "kept tensors are read": Event(
        _tables_and_states, lambda trainer, kept, *_: [tensor.detach().clone() for tensor in kept]
    ),
    "another pipeline evaluates": Event(lambda trainer: None, _evaluate),
}


@st.composite
def configs(draw: st.DrawFn, is_pooled: bool, num_ranks: int) -> Config:
    is_vbe = is_pooled and draw(st.booleans())
    pooling = draw(st.sampled_from(["SUM", "MEAN"])) if is_pooled else "SUM"
    shardings = BAG_SHARDINGS if is_pooled else SEQUENCE_SHARDINGS
    if pooling == "MEAN" or is_vbe:
        # MEAN is refused, because stock computes SUM; stock's own VBE fails beside other shardings or on several ranks.
        shardings = [kind for kind in shardings if kind != "grid_shard"]
    if pooling == "MEAN" and is_vbe:
        shardings = [kind for kind in shardings if kind not in ("row_wise", "table_row_wise")]  # IndexError in stock
    batch_size, max_ids_per_bag = draw(st.integers(4, 10)), draw(st.integers(1, 6))
    num_tables = draw(st.integers(1, 4))
    # TorchRec wants one width, and one column partition, for all tables of an EmbeddingCollection.
    widths = [draw(st.sampled_from([4, 8, 12, 16, 32])) for _ in range(num_tables if is_pooled else 1)]
    tables = [
        draw(tables_of(shardings, widths[i % len(widths)], num_ranks, batch_size * max_ids_per_bag))
        for i in range(num_tables)
    ]
    return Config(
        tables=tuple(tables),
        is_pooled=is_pooled,
        pooling=pooling,
        # FBGEMM has no VBE with Adagrad on a CPU.
        optimizer=draw(st.sampled_from(["sgd", "rowwise_adagrad"] if is_vbe else sorted(OPTIMIZERS))),
        data_type=draw(st.sampled_from(["FP32", "FP16"])),
        index_dtype=draw(st.sampled_from(["int64", "int32"])),
        batch_size=batch_size,
        max_ids_per_bag=max_ids_per_bag,
        num_batches=draw(st.sampled_from([30, 30, 20, 3])),
        is_weighted=is_pooled and draw(st.booleans()),
        is_vbe=is_vbe,
        lookahead=draw(st.sampled_from([1, 2, 3, 8, 16])),
        num_batches_seen_ahead=draw(st.sampled_from([0, 0, 1, 5, 19])),
        overlap=draw(st.booleans()),
        # Stock's own pipeline fails with VBE on several ranks.
        event=draw(st.sampled_from(["nothing", *(event for event in EVENTS if not is_vbe or "pipeline" not in event)])),
        # Stock divides by lengths of the default dtype, and cannot train then.
        default_dtype=draw(st.sampled_from(["float32", "float32", "float64", "bfloat16"]))
        if pooling == "SUM"
        else "float32",
        seed=draw(st.integers(0, 1000)),
    )


@st.composite
def tables_of(draw: st.DrawFn, shardings: list[str], dim: int, num_ranks: int, max_ids: int) -> Table:
    sharding_type = draw(st.sampled_from(shardings))
    # FBGEMM's row-wise Adagrad fails on a CPU where a rank has no row of a table.
    num_rows = draw(st.one_of(st.integers(300, 1000), st.integers(1 if num_ranks == 1 else 8, 1000)))
    num_features = draw(st.integers(1, 2))
    # What one batch may need, where all ranks' ids meet on one rank's share of the rows, and what is beyond; or a
    # tenth, and it grows.
    needed = min(1.0, num_ranks * num_features * max_ids / (num_rows / num_ranks))
    partitions = [4] if dim % 8 or shardings is SEQUENCE_SHARDINGS else [4, 8]
    # On a CPU, TorchRec plans row-wise and its kin for scratchpad tables only.
    kernels = ["fused_uvm_caching"] * 3 + (["fused"] if sharding_type == "table_wise" else [])
    return Table(
        num_rows=num_rows,
        dim=dim,
        sharding_type=sharding_type,
        compute_kernel=draw(st.sampled_from(kernels)),
        load_factor=max(
            0.001, draw(st.sampled_from([needed, needed, 0.95 * needed + 0.05, 0.7 * needed + 0.3, 0.1 * needed]))
        ),
        min_partition=draw(st.sampled_from(partitions)) if sharding_type in COLUMN_WISE else None,
        num_features=num_features,
    )


@FUZZ
@given(configs(is_pooled=True, num_ranks=1))
def test_bags(config: Config) -> None:
    check(config)


@FUZZ
@given(configs(is_pooled=False, num_ranks=1))
def test_sequences(config: Config) -> None:
    check(config)


class Ranks:
    """Processes joined by gloo that check one configuration after another."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._start()

    def check(self, config: Config) -> None:
        for request in self._requests:
            request.put(config)
        errors: list[str] = []
        for _ in self._processes:
            try:
                # A rank that has failed leaves the other one waiting.
                errors.append(self._answers.get(timeout=5.0 if any(errors) else RANK_TIMEOUT_S))
            except queue.Empty:
                errors.append("a rank did not answer")
                self.stop()
                self._start()
                break
        assert not any(errors), "\n".join(error for error in errors if error)

    def stop(self) -> None:
        for request in self._requests:
            request.put(None)
        for process in self._processes:
            process.join(timeout=5)
            process.kill()
        self._directory.cleanup()

    def _start(self) -> None:
        self._directory = tempfile.TemporaryDirectory()
        context = mp.get_context("forkserver")
        self._requests = [context.Queue() for _ in range(self._num_ranks)]
        self._answers = context.Queue()
        store = os.path.join(self._directory.name, "store")
        self._processes = [
            context.Process(
                target=run_rank,
                args=(rank, self._num_ranks, self._num_ranks, store, _serve, (request, self._answers)),
                daemon=True,
            )
            for rank, request in enumerate(self._requests)
        ]
        for process in self._processes:
            process.start()


def _serve(rank: int, requests: Any, answers: Any) -> None:
    while (config := requests.get()) is not None:
        try:
            check(config)
            answers.put("")
        except Exception:
            answers.put(f"rank {rank}: {traceback.format_exc()}")


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.mark.dist
@FUZZ
@given(config=configs(is_pooled=True, num_ranks=2))
def test_bags_on_two_ranks(config: Config, two_ranks: Ranks) -> None:
    two_ranks.check(config)


@pytest.mark.dist
@FUZZ
@given(config=configs(is_pooled=False, num_ranks=2))
def test_sequences_on_two_ranks(config: Config, two_ranks: Ranks) -> None:
    two_ranks.check(config)


EVICTING = Config(
    tables=(Table(100, 8, "table_wise", "fused_uvm_caching", 0.32, None, 1),),
    is_pooled=True,
    pooling="SUM",
    optimizer="adagrad",
    data_type="FP32",
    index_dtype="int64",
    batch_size=8,
    max_ids_per_bag=4,
    num_batches=40,
    is_weighted=False,
    is_vbe=False,
    lookahead=2,
    num_batches_seen_ahead=0,
    overlap=True,
    event="nothing",
    default_dtype="float32",
    seed=0,
)


@pytest.mark.host_path
def test_control_a_lost_writeback_is_found_by_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(EVICTING).num_victims > 50
    monkeypatch.setattr(
        stages, "insert", lambda pool, cache_plan, staged: _insert_without_writeback(pool, cache_plan, staged)
    )
    with pytest.raises(AssertionError, match="max diff"):
        check(EVICTING)


def _insert_without_writeback(pool: Any, cache_plan: Any, staged: Any) -> None:
    stages.write_rows(pool.scratchpad.parts, cache_plan.miss_slots, staged.fill)


def test_drawn_configurations_evict() -> None:
    """A search over configurations in which nothing is evicted would find nothing."""
    num_evicting = []

    @settings(FUZZ, max_examples=10, derandomize=True, database=None)
    @given(configs(is_pooled=True, num_ranks=1))
    def draw(config: Config) -> None:
        trainer = Trainer.scratchpipe(config.setting(), config.constraints())
        trainer.train_plain(make_batches(config.setting()))
        num_evicting.append(trainer.num_victims > 0)

    draw()
    assert sum(num_evicting) > len(num_evicting) / 2, num_evicting
    assert max_abs_diff(check(EVICTING), check(EVICTING)) == 0.0
