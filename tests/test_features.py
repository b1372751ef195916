# SPDX-License-Identifier: BSD-3-Clause
"""Bit equality with stock TorchRec for every kind of input, table, optimizer setting and collection that it takes."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from helpers import (
    CPU,
    NUM_DENSE,
    Setting,
    ShortSetting,
    TinyModel,
    Trainer,
    assert_same_bits,
    assert_same_outputs,
    check_equal,
    drain,
    make_bags,
    make_batches,
    make_embeddings,
    max_abs_diff,
    scratchpad_constraints,
    with_optimizer,
)
from torch import nn
from torchrec import PoolingType
from torchrec.datasets.utils import Batch
from torchrec.distributed.planner import ParameterConstraints
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.feature_processor_ import PositionWeightedModuleCollection
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe import ScratchPipeError, scratchpad_stats
from torchrec_scratchpipe.sharding.options import CPU_OPTIMIZERS, IGNORED_ON_CPU, OPTIMIZER_STATES

OPTIMIZERS = [torch.optim.SGD, torch.optim.Adagrad, RowWiseAdagrad]
VBE = with_optimizer(ShortSetting(is_vbe=True, batch_size=12), RowWiseAdagrad)  # stock's VBE has no Adagrad on a CPU


def with_features(batch: Batch, features: KeyedJaggedTensor) -> Batch:
    return Batch(batch.dense_features, features, batch.labels)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("sharding_type", ["table_wise", "row_wise", "column_wise"])
@pytest.mark.parametrize("is_pooled", [True, False], ids=["bags", "sequences"])
def test_half_precision_tables(is_pooled: bool, sharding_type: str, optimizer: type[torch.optim.Optimizer]) -> None:
    setting = with_optimizer(ShortSetting(data_type=DataType.FP16, is_pooled=is_pooled), optimizer)
    min_partition = 4 if sharding_type == "column_wise" else None
    ours = check_equal(replace(setting, sharding_type=sharding_type, min_partition=min_partition))
    assert ours.num_victims > 100
    (pool, *_) = (part for module in ours.model.modules() for part in getattr(module, "pools", []))
    assert pool.host_table.parts[0].dtype is torch.float16
    assert pool.scratchpad.parts[0].dtype is torch.float16


def test_half_precision_tables_memory_mapped(tmp_path: Path) -> None:
    assert (
        check_equal(ShortSetting(data_type=DataType.FP16, dims=(4, 8, 16)), table_dir=str(tmp_path)).num_victims > 100
    )


@pytest.mark.parametrize("dims", [(4, 8, 16), (12, 12, 12)])
def test_half_precision_rows_of_any_width(dims: tuple[int, ...]) -> None:
    assert check_equal(ShortSetting(data_type=DataType.FP16, dims=dims)).num_victims > 100


@pytest.mark.parametrize("is_pooled", [True, False], ids=["bags", "sequences"])
def test_int32_ids(is_pooled: bool) -> None:
    assert check_equal(ShortSetting(index_dtype=torch.int32, is_pooled=is_pooled)).num_victims > 100


@pytest.mark.parametrize("form", ["lengths", "offsets", "both"])
def test_keyed_jagged_tensor_with_and_without_offsets(form: str) -> None:
    setting = ShortSetting()
    batches = []
    for batch in make_batches(setting):
        features = batch.sparse_features
        parts: dict[str, Any] = {}
        if form != "offsets":
            parts["lengths"] = features.lengths()
        if form != "lengths":
            parts["offsets"] = features.offsets()
        batches.append(with_features(batch, KeyedJaggedTensor(features.keys(), features.values(), **parts)))
    assert check_equal(setting, batches=batches).num_victims > 100


def test_batches_of_different_size_and_of_none() -> None:
    setting = ShortSetting()
    sizes = [6, 1, 0, 11, 3, 0, 0, 8]
    batches = [
        make_batches(replace(setting, batch_size=sizes[i % len(sizes)], seed=i), num_batches=1)[0] for i in range(96)
    ]
    assert any(batch.labels.numel() == 0 for batch in batches)
    assert check_equal(setting, batches=batches).num_victims > 100


@pytest.mark.parametrize(
    "setting",
    [
        VBE,
        replace(VBE, sharding_type="row_wise"),
        replace(VBE, sharding_type="column_wise", min_partition=4),
        replace(VBE, dims=(4, 16, 8), pooling=PoolingType.MEAN),
        replace(VBE, is_weighted=True),
        # Two kernel groups in one lookup, which stock cannot merge on a CPU; its own twin here has one group.
        replace(VBE, fused_tables=("t1",)),
        with_optimizer(VBE, torch.optim.SGD),
        replace(VBE, is_pooled=False),
        replace(VBE, is_pooled=False, sharding_type="row_wise"),
    ],
    ids=[
        *("table_wise", "row_wise", "column_wise", "mean", "weighted", "two_groups", "sgd"),
        *("sequences_table_wise", "sequences_row_wise"),
    ],
)
def test_variable_batch_per_feature(setting: Setting) -> None:
    assert check_equal(setting).num_victims > 50


def test_one_feature_in_two_tables() -> None:
    setting = ShortSetting(features_per_table={0: ("f0", "shared"), 1: ("f1", "shared"), 2: ("f2",)})

    class SharedFeature(TinyModel):
        """A feature that is looked up in two tables has one name per table in the output."""

        def __init__(self, setting: Setting) -> None:
            super().__init__(setting)
            self.names = ["f0", "shared@t0", "f1", "shared@t1", "f2"]

    batches = []
    for batch in make_batches(setting):
        jagged = batch.sparse_features.to_dict()
        batches.append(with_features(batch, KeyedJaggedTensor.from_jt_dict(jagged)))
    assert check_equal(setting, batches=batches, make_model=SharedFeature).num_victims > 100


def fused(**fused_params: Any) -> Setting:
    return ShortSetting(optimizer=None, fused_params={"learning_rate": 0.1, "eps": 1e-8, **fused_params})


@pytest.mark.parametrize("optimizer", [kind for kind in OPTIMIZER_STATES if kind in CPU_OPTIMIZERS])
def test_gradient_clipping_in_the_fused_optimizer(optimizer: EmbOptimType) -> None:
    clipped = fused(optimizer=optimizer, gradient_clipping=True, max_gradient=1e-4)
    assert check_equal(clipped).num_victims > 100
    plain = fused(optimizer=optimizer)
    trained = [Trainer(setting) for setting in (clipped, plain)]
    for trainer in trained:
        trainer.train_plain(make_batches(plain)[:5])
    assert max_abs_diff(*trained) > 0.0  # else nothing was compared


@pytest.mark.parametrize("name", IGNORED_ON_CPU)
@pytest.mark.parametrize("optimizer", CPU_OPTIMIZERS)
def test_what_fbgemm_ignores_on_a_cpu_is_ignored_and_named(
    optimizer: EmbOptimType, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """FBGEMM takes these and does nothing; the day it does something, this must be bit-compared like the rest."""
    plain, given = fused(optimizer=optimizer), fused(optimizer=optimizer, **{name: 0.05})
    with caplog.at_level(logging.WARNING, logger="torchrec_scratchpipe"):
        ours = check_equal(replace(given, num_batches=20))
    assert f"FBGEMM's CPU kernels ignore {name}" in caplog.text
    stock = Trainer(plain)
    stock.train_plain(make_batches(plain, num_batches=20))
    assert max_abs_diff(stock, ours) == 0.0


def unique_ids_on_cpu(
    hash_size_cumsum: torch.Tensor, hash_size_offsets: torch.Tensor, offsets: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What fbgemm::jagged_unique_indices computes, which FBGEMM has for CUDA only."""
    num_features = hash_size_cumsum.numel() - 1
    batch_size = (offsets.numel() - 1) // num_features
    features = torch.arange(num_features).repeat_interleave(batch_size).repeat_interleave(offsets.diff())
    unique, inverse = (ids + hash_size_cumsum[features]).unique(return_inverse=True)
    owners = torch.bucketize(unique, hash_size_cumsum, right=True) - 1
    lengths = torch.zeros(num_features * batch_size, dtype=ids.dtype)
    for first, last in zip(hash_size_offsets[:-1].tolist(), hash_size_offsets[1:].tolist(), strict=True):
        is_own = (unique >= hash_size_cumsum[first]) & (unique < hash_size_cumsum[last])
        num_bags = (last - first) * batch_size
        if num_bags:
            each, rest = divmod(int(is_own.sum()), num_bags)
            lengths[first * batch_size : last * batch_size] = each + (torch.arange(num_bags) < rest).long()
    bounds = torch.cat([torch.zeros(1, dtype=ids.dtype), lengths.cumsum(0)])
    return lengths, bounds, unique - hash_size_cumsum[owners], inverse


@pytest.fixture
def index_dedup_on_cpu() -> Iterator[None]:
    library = torch.library.Library("fbgemm", "IMPL", "CPU")
    library.impl("jagged_unique_indices", unique_ids_on_cpu)
    yield
    library._destroy()


@pytest.mark.parametrize("sharding_type", ["table_wise", "row_wise", "column_wise"])
def test_index_dedup(sharding_type: str, index_dedup_on_cpu: None) -> None:
    min_partition = 4 if sharding_type == "column_wise" else None
    setting = ShortSetting(
        is_pooled=False, use_index_dedup=True, sharding_type=sharding_type, min_partition=min_partition
    )
    setting = replace(setting, max_ids_per_bag=8, features_per_table={0: ("a", "b"), 1: ("c",), 2: ("d",)})
    ours = check_equal(setting)
    (pool,) = scratchpad_stats(ours.model)
    assert pool.num_victims > 100
    assert pool.num_ids == pool.num_unique_ids


def test_learning_rate_set_in_the_kernels() -> None:
    setting = ShortSetting(num_batches=60)
    batches = make_batches(setting)
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting)
    pipeline, iterator = ours.pipeline(), iter(batches)
    for index, batch in enumerate(batches):
        for trainer in (stock, ours):
            for _, fused_optimizer in trainer.model.fused_optimizer._optims:
                for group in fused_optimizer.param_groups:
                    group["lr"] = 0.0  # what the kernels are told must count, not what the groups say
            for part in trainer.model.modules():
                for kernel in getattr(part, "_emb_modules", []):
                    kernel.emb_module.set_learning_rate(0.3 / (1 + index))
        assert torch.equal(stock.step(batch), pipeline.progress(iterator))
    assert_same_bits(stock, ours)
    assert ours.num_victims > 50


class TwoCollections(nn.Module):
    """Bags and sequences, or bags twice, in one model."""

    def __init__(self, setting: Setting, is_second_pooled: bool) -> None:
        super().__init__()
        self.first = make_bags(setting)
        second = make_bags(setting) if is_second_pooled else make_embeddings(setting)
        self.second = second
        self.is_second_pooled = is_second_pooled
        self.names = [name for i in range(len(setting.num_rows)) for name in setting.feature_names(i)]
        self.over = nn.Linear(2 * sum(setting.dims) + NUM_DENSE, 1)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.first(batch.sparse_features)
        second = self.second(batch.sparse_features)
        columns = [first[name] for name in self.names]
        if self.is_second_pooled:
            columns += [second[name] for name in self.names]
        else:
            columns += [
                torch.segment_reduce(second[name].values(), "sum", lengths=second[name].lengths())
                for name in self.names
            ]
        logits = self.over(torch.cat([*columns, batch.dense_features], dim=1)).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels), logits.detach()


@pytest.mark.parametrize("is_second_pooled", [True, False], ids=["bags", "sequences"])
@pytest.mark.parametrize("lookahead", [1, 4])
def test_two_collections_in_one_model(is_second_pooled: bool, lookahead: int, was_planned: list[bool]) -> None:
    ours = check_equal(ShortSetting(), lookahead, make_model=lambda setting: TwoCollections(setting, is_second_pooled))
    assert len(scratchpad_stats(ours.model)) == 2
    assert all(pool.num_victims > 100 for pool in scratchpad_stats(ours.model))
    assert [True] * sum(pool.num_batches for pool in scratchpad_stats(ours.model)) == was_planned


class FeatureProcessed(nn.Module):
    """Bags whose weights are learnt by position."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        bags = make_bags(replace(setting, is_weighted=True))
        self.names = [name for i in range(len(setting.num_rows)) for name in setting.feature_names(i)]
        lengths = dict.fromkeys(self.names, setting.max_ids_per_bag + 1)
        self.fp_ebc = FeatureProcessedEmbeddingBagCollection(bags, PositionWeightedModuleCollection(lengths))
        self.over = nn.Linear(sum(setting.dims) + NUM_DENSE, 1)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        bags = self.fp_ebc(batch.sparse_features)
        columns = [bags[name] for name in self.names]
        logits = self.over(torch.cat([*columns, batch.dense_features], dim=1)).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels), logits.detach()


@pytest.mark.parametrize("sharding_type", ["table_wise", "row_wise"])
def test_feature_processed_collection(sharding_type: str, was_planned: list[bool]) -> None:
    setting = ShortSetting(sharding_type=sharding_type)
    ours = check_equal(setting, batches=make_batches(setting), make_model=FeatureProcessed)
    (pool,) = scratchpad_stats(ours.model)
    assert pool.num_victims > 100
    assert [True] * pool.num_batches == was_planned


def test_tables_of_one_collection_mix_shardings_and_kernels() -> None:
    setting = ShortSetting(num_rows=(200, 150, 120, 90, 60, 40), dims=(8, 8, 16, 8, 8, 4))
    constraints = scratchpad_constraints(replace(setting, fused_tables=("t4",)))
    for table, sharding_type in [("t1", "row_wise"), ("t2", "column_wise"), ("t3", "table_row_wise")]:
        constraints[table].sharding_types = [sharding_type]
    constraints["t5"] = ParameterConstraints(sharding_types=["data_parallel"], compute_kernels=["dense"])
    ours = check_equal(setting, constraints=constraints)
    assert all(pool.num_victims > 0 for pool in scratchpad_stats(ours.model))
    assert len(scratchpad_stats(ours.model)) == 4
    plan = ours.model.plan.plan["ebc"]
    assert [plan[name].compute_kernel for name in ("t4", "t5")] == ["fused", "dense"]


class Untraceable(TinyModel):
    """Decides in Python what it looks up, which torch.fx cannot follow."""

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        if float(batch.dense_features.sum()) > -1.0:
            return super().forward(batch)
        raise AssertionError


class ModifiedInput(TinyModel):
    """Computes its features inside forward, which the pipeline cannot do ahead."""

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        features = batch.sparse_features
        doubled = KeyedJaggedTensor(features.keys(), features.values() * 1, lengths=features.lengths())
        return super().forward(Batch(batch.dense_features, doubled, batch.labels))


@pytest.mark.parametrize("make_model", [Untraceable, ModifiedInput])
def test_collection_that_cannot_be_pipelined_is_fetched_on_the_spot(
    make_model: type[TinyModel], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="torchrec_scratchpipe"):
        ours = check_equal(ShortSetting(), make_model=make_model)
    assert ours.num_victims > 100
    (pool,) = scratchpad_stats(ours.model)
    assert 0 < pool.num_stalls <= pool.num_batches  # the worker may be quicker than the thread that asks it
    (record,) = [record for record in caplog.records if record.name == "torchrec_scratchpipe.sharding.pipeline"]
    assert "ebc cannot be planned ahead" in record.getMessage()


class PostProcessed(TinyModel):
    """Its features pass a module without parameters first, which TorchRec's pipeline can run ahead."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.postproc = Permute([2, 0, 1])

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        bags = self.ebc(self.postproc(batch.sparse_features))
        columns = [bags[name] for name in self.names]
        logits = self.over(torch.cat([*columns, batch.dense_features], dim=1)).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels), logits.detach()


class Permute(nn.Module):
    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.order = order

    def forward(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        return features.permute(self.order)


def test_pipeline_postproc(caplog: pytest.LogCaptureFixture, was_planned: list[bool]) -> None:
    with caplog.at_level(logging.WARNING, logger="torchrec_scratchpipe"):
        ours = check_equal(ShortSetting(), make_model=PostProcessed, pipeline_kwargs={"pipeline_postproc": True})
    assert [True] * scratchpad_stats(ours.model)[0].num_batches == was_planned
    assert not [record for record in caplog.records if record.name.startswith("torchrec_scratchpipe")]


def test_plain_forward_while_postprocs_are_pipelined_is_refused() -> None:
    """They would hand out what they computed for the batch in flight, which stock takes for this one's."""
    setting = ShortSetting()
    ours = Trainer.scratchpipe(setting, make_model=PostProcessed)
    batches = make_batches(setting)
    pipeline = ours.pipeline(pipeline_postproc=True)
    pipeline.progress(iter(batches))
    with pytest.raises(ScratchPipeError, match=r"pipeline_postproc .* Call the pipeline's detach\(\) first"):
        ours.model(batches[20])
    pipeline.detach()
    ours.model(batches[20])


def test_custom_model_fwd() -> None:
    setting = ShortSetting()
    batches = make_batches(setting)
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting)

    def forward_with(trainer: Trainer) -> Any:
        def forward(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            loss, logits = trainer.model(batch)
            return 3.0 * loss, logits

        return forward

    expected = []
    for batch in batches:
        stock.optimizer.zero_grad()
        loss, logits = forward_with(stock)(batch)
        loss.backward()
        stock.optimizer.step()
        expected.append(logits)
    assert_same_outputs(expected, drain(ours.pipeline(custom_model_fwd=forward_with(ours)), batches))
    assert_same_bits(stock, ours)
    assert ours.num_victims > 100


def test_gradient_accumulation() -> None:
    """Tables move at every micro-batch, because the update is fused into backward; in stock too."""
    setting = ShortSetting()
    batches = make_batches(setting)
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting)

    def accumulate(trainer: Trainer, rows: Iterator[Batch]) -> None:
        for index, batch in enumerate(rows):
            if index % 2 == 0:
                trainer.optimizer.zero_grad()
            loss, _ = trainer.model(batch)
            loss.backward()
            if index % 2 == 1:
                trainer.optimizer.step()

    accumulate(stock, iter(batches))
    accumulate(ours, iter(batches))
    assert_same_bits(stock, ours)
    assert ours.num_victims > 100


def test_compiled_dense_part() -> None:
    class Compiled(TinyModel):
        def __init__(self, setting: Setting) -> None:
            super().__init__(setting)
            self.over.compile(backend="aot_eager")

    assert check_equal(ShortSetting(num_batches=40), make_model=Compiled).num_victims > 50


def test_setting_is_trained_on_the_device_that_it_names() -> None:
    assert all(parameter.device == CPU for parameter in Trainer(ShortSetting()).model.parameters())
