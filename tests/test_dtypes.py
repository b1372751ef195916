# SPDX-License-Identifier: BSD-3-Clause
"""Nothing depends on torch's default dtype, which a job may set to what its dense part wants."""

import ast
import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from device_path import KINDS, device_path
from helpers import (
    Setting,
    TinyModel,
    Trainer,
    assert_same_bits,
    assert_same_outputs,
    drain,
    make_batches,
    with_optimizer,
)
from torch import nn

from torchrec_scratchpipe import CheckpointManager, scratchpad_stats, warm_start

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    [
        *ROOT.glob("torchrec_scratchpipe/*.py"),
        *ROOT.glob("torchrec_scratchpipe/data/*.py"),
        *ROOT.glob("torchrec_scratchpipe/privacy/*.py"),
        *(ROOT / "examples").rglob("*.py"),
    ]
)
# What makes a tensor of torch's default dtype, or of one that depends on the values, unless it is told. All of them, so
# that nobody has to know which.
FACTORIES = [
    "arange",
    "empty",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "logspace",
    "normal",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "range",
    "scalar_tensor",
    "tensor",
    "zeros",
]
DTYPES = [torch.float64, torch.bfloat16, torch.float16]
SETTING = Setting(num_batches=40)


def calls_without_dtype(source: str) -> list[str]:
    """Where a tensor is made whose dtype is not said."""
    return [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (node.func.attr in FACTORIES and ast.unparse(node.func.value) == "torch")
        and not any(keyword.arg == "dtype" for keyword in node.keywords)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_tensor_is_made_with_its_dtype(path: Path) -> None:
    assert calls_without_dtype(path.read_text()) == []


def test_control_a_tensor_without_a_dtype_is_noticed() -> None:
    source = "torch.zeros(3, dtype=torch.int64)\nx = f(torch.empty((), device=cpu))\nnp.zeros(3)\nt.new_zeros(3)"
    assert calls_without_dtype(source) == ["2: torch.empty((), device=cpu)"]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Fp32Model(TinyModel):
    """With a dense part that takes what embeddings give, whatever the default is."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.over = nn.Linear(self.over.in_features, 1, dtype=torch.float32)


def counts(trainer: Trainer) -> list[tuple[int, int, int]]:
    return [(each.num_unique_misses, each.num_victims, each.fill_bytes) for each in scratchpad_stats(trainer.model)]


def trained(kind: str, dtype: torch.dtype) -> tuple[Trainer, list[torch.Tensor]]:
    setting = replace(SETTING, num_batches=14 if kind == "triton" else 40)  # interpreted, which is slow
    batches = make_batches(setting)
    with default_dtype(dtype), nullcontext() if kind == "host" else device_path(kind):
        ours = Trainer.scratchpipe(setting, make_model=Fp32Model, overlap=False)  # else victims depend on time
        return ours, drain(ours.pipeline(num_batches_seen_ahead=6), batches)


@functools.cache
def counts_as_usual(kind: str) -> list[tuple[int, int, int]]:
    return counts(trained(kind, torch.float32)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["host", *KINDS])
def test_bits_and_victims_are_the_same(kind: str, dtype: torch.dtype) -> None:
    ours, outputs = trained(kind, dtype)
    batches = make_batches(ours.setting)
    with default_dtype(dtype):
        stock = Trainer(ours.setting, make_model=Fp32Model)
        stock_outputs = stock.train_plain(batches)
    assert_same_outputs(stock_outputs, outputs)
    assert_same_bits(stock, ours)
    assert counts_as_usual(kind) == counts(ours)
    assert ours.num_victims > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "setting",
    [
        with_optimizer(replace(SETTING, is_vbe=True), torch.optim.SGD),
        replace(SETTING, is_pooled=False, index_dtype=torch.int32),
        replace(SETTING, is_weighted=True, sharding_type="row_wise"),
    ],
    ids=["vbe", "sequences", "weighted"],
)
@pytest.mark.parametrize("is_set_later", [False, True])
def test_other_input_is_the_same(is_set_later: bool, setting: Setting, dtype: torch.dtype) -> None:
    batches = make_batches(setting)
    outputs = []
    with default_dtype(torch.float32 if is_set_later else dtype):
        trainers = [Trainer(setting, make_model=Fp32Model), Trainer.scratchpipe(setting, make_model=Fp32Model)]
        ours = trainers[1]
        ours.copy_from(trainers[0])
    with default_dtype(dtype):
        outputs = [trainers[0].train_plain(batches), drain(ours.pipeline(), batches)]
    assert_same_outputs(*outputs)
    assert_same_bits(*trainers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tables_are_saved_loaded_and_started_warm(dtype: torch.dtype, tmp_path: Path) -> None:
    batches = make_batches(SETTING)
    rows = torch.arange(200 * 8, dtype=torch.float32).view(200, 8)
    options: dict[str, Any] = {"table_dir": str(tmp_path)}
    with default_dtype(dtype):
        stock, ours, again = (
            Trainer(SETTING, make_model=Fp32Model),
            Trainer.scratchpipe(SETTING, make_model=Fp32Model, **options),
            Trainer.scratchpipe(SETTING, make_model=Fp32Model),
        )
        warm_start(ours.model, {"t0": rows})
        stock.copy_from(ours)
        assert_same_outputs(stock.train_plain(batches[:20]), drain(ours.pipeline(), batches[:20]))
        checkpoints = CheckpointManager(tmp_path / "checkpoints")
        checkpoints.save(20, ours.model, ours.optimizer)
        assert checkpoints.load(again.model, again.optimizer) is not None
        assert_same_outputs(stock.train_plain(batches[20:]), drain(again.pipeline(), batches[20:]))
    assert_same_bits(stock, again)
