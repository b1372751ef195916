# SPDX-License-Identifier: BSD-3-Clause
"""The edges of the pipeline: short data, draining, new iterators, evaluation, detaching, errors."""

import copy
import gc
import inspect
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    CPU,
    Setting,
    Trainer,
    assert_same_bits,
    assert_same_outputs,
    check_equal,
    drain,
    make_bags,
    make_batches,
    scratchpad_constraints,
)
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline import EvalPipelineSparseDist, TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.pipeline_context import TrainPipelineContext
from torchrec.distributed.train_pipeline.utils import FutureDeque
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe import (
    BatchesInFlightError,
    ConfigError,
    IdOutOfRangeError,
    ScratchpadFullError,
    ScratchPipeError,
    ScratchPipeTrainPipeline,
    scratchpad_stats,
)
from torchrec_scratchpipe.core.slot_map import CachePlan, SlotMap

SETTING = Setting(num_batches=30)


class OtherContext(TrainPipelineContext):
    pass


def twins(setting: Setting = SETTING, **kwargs: Any) -> tuple[Trainer, Trainer]:
    return Trainer(setting), Trainer.scratchpipe(setting, **kwargs)


def num_in_flight(trainer: Trainer) -> int:
    return sum(pool.slot_map.num_batches_in_flight for pool in trainer.model.module.ebc.pools)


@pytest.mark.parametrize("num_batches", [0, 1, 2, 3, 4, 7])
@pytest.mark.parametrize("lookahead", [1, 4])
def test_short_data_is_drained(num_batches: int, lookahead: int) -> None:
    stock, ours = twins()
    batches = make_batches(SETTING)[:num_batches]
    expected = stock.train_plain(batches)
    pipeline = ours.pipeline(lookahead)
    assert_same_outputs(expected, drain(pipeline, batches))
    with pytest.raises(StopIteration):
        pipeline.progress(iter([]))
    assert_same_bits(stock, ours)
    assert num_in_flight(ours) == 0


@pytest.mark.parametrize("num_batches", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("lookahead", [1, 4])
def test_execute_all_batches_false_trains_what_stock_trains(num_batches: int, lookahead: int) -> None:
    stock, ours = twins()
    batches = make_batches(SETTING)[:num_batches]
    expected = drain(TrainPipelineSparseDist(stock.model, stock.optimizer, CPU, execute_all_batches=False), batches)
    assert_same_outputs(expected, drain(ours.pipeline(lookahead, execute_all_batches=False), batches))
    assert len(expected) == max(0, num_batches - 2)
    assert_same_bits(stock, ours)


def test_new_iterator_in_mid_life_goes_behind_batches_in_flight() -> None:
    stock, ours = twins()
    batches = make_batches(SETTING)
    pipeline = ours.pipeline(lookahead=2)
    first, second = iter(batches[:10]), iter(batches[10:])
    actual = [pipeline.progress(first) for _ in range(4)]
    num_loaded = 10 - len(list(first))  # the rest of the first iterator is given up
    actual += drain(pipeline, second)
    assert_same_outputs(stock.train_plain(batches[:num_loaded] + batches[10:]), actual)
    assert_same_bits(stock, ours)


def test_train_evaluate_train() -> None:
    stock, ours = twins()
    batches = make_batches(SETTING)
    pipeline = ours.pipeline()
    for part in (batches[:10], batches[10:]):
        assert_same_outputs(stock.train_plain(part), drain(pipeline, part))
        stock.model.eval()
        ours.model.eval()
        with torch.no_grad():
            expected = [stock.model(batch)[1] for batch in batches[5:15]]
            assert_same_outputs(expected, drain(pipeline, batches[5:15]))
        stock.model.train()
        ours.model.train()
    assert_same_bits(stock, ours)
    assert num_in_flight(ours) == 0


def test_detach_evaluate_attach() -> None:
    stock, ours = twins()
    batches = make_batches(SETTING)
    pipeline, iterator = ours.pipeline(), iter(batches)
    expected = [stock.step(batch) for batch in batches[:5]]
    actual = [pipeline.progress(iterator) for _ in range(5)]
    pipeline.detach()
    with torch.no_grad():
        for batch in batches[20:23]:
            assert torch.equal(stock.model(batch)[1], ours.model(batch)[1])
    pipeline.attach()
    expected += [stock.step(batch) for batch in batches[5:15]]
    actual += [pipeline.progress(iterator) for _ in range(10)]
    pipeline.detach()  # and forgets to attach
    expected += stock.train_plain(batches[15:])
    actual += drain(pipeline, iterator)
    assert_same_outputs(expected, actual)
    assert_same_bits(stock, ours)
    assert num_in_flight(ours) == 0


@pytest.mark.parametrize("overlap", [False, True], ids=["sequential", "overlapped"])
def test_plain_forward_while_attached_answers_for_its_own_batch(overlap: bool) -> None:
    stock, ours = twins(overlap=overlap)
    batches = make_batches(SETTING)
    pipeline, iterator = ours.pipeline(), iter(batches)
    for index, batch in enumerate(batches):
        assert torch.equal(stock.step(batch), pipeline.progress(iterator))
        with torch.no_grad():
            other = batches[(index * 7) % len(batches)]
            assert torch.equal(stock.model(other)[1], ours.model(other)[1])
    assert_same_bits(stock, ours)


class FailingOnce(torch.nn.Module):
    """Raises in one forward, after the embeddings were looked up."""

    def __init__(self, model: torch.nn.Module, fail_at: int) -> None:
        super().__init__()
        self.model = model
        self._remaining = fail_at

    def forward(self, batch: Batch) -> Any:
        result = self.model(batch)
        self._remaining -= 1
        if self._remaining == 0:
            raise RuntimeError("bad batch")
        return result


@pytest.mark.fault("an exception in the model's forward")
def test_exception_in_forward_then_reset() -> None:
    stock, ours = twins()
    batches = make_batches(SETTING)
    failing = FailingOnce(ours.model, fail_at=6)
    pipeline = ours.pipeline(custom_model_fwd=failing)
    iterator = iter(batches[:12])
    actual = [pipeline.progress(iterator) for _ in range(5)]
    with pytest.raises(RuntimeError, match="bad batch"):
        pipeline.progress(iterator)
    with pytest.raises(ScratchPipeError, match=r"Call reset\(\)"):
        pipeline.progress(iterator)
    pipeline.reset()
    assert num_in_flight(ours) == 0
    actual += drain(pipeline, batches[12:])
    assert_same_outputs(stock.train_plain(batches[:5] + batches[12:]), actual)
    assert_same_bits(stock, ours)


def test_reset_releases_a_batch_whose_exception_is_kept() -> None:
    stock, ours = twins()
    batches = make_batches(SETTING)
    pipeline = ours.pipeline(custom_model_fwd=FailingOnce(ours.model, fail_at=3))
    iterator = iter(batches[:8])
    actual = [pipeline.progress(iterator) for _ in range(2)]
    with pytest.raises(RuntimeError, match="bad batch") as kept:  # its traceback keeps the autograd graph alive
        pipeline.progress(iterator)
    pipeline.reset()
    assert num_in_flight(ours) == 0
    actual += drain(pipeline, batches[8:])
    assert kept.value is not None
    assert_same_outputs(stock.train_plain(batches[:2] + batches[8:]), actual)
    assert_same_bits(stock, ours)


def with_values(batch: Batch, values: torch.Tensor, lengths: torch.Tensor | None = None) -> Batch:
    features = batch.sparse_features
    lengths = features.lengths() if lengths is None else lengths
    return Batch(
        batch.dense_features, KeyedJaggedTensor.from_lengths_sync(features.keys(), values, lengths), batch.labels
    )


@pytest.mark.parametrize("bad_id", [-1, 10_000])
def test_bad_id_then_reset(bad_id: int) -> None:
    stock, ours = twins()
    batches = make_batches(SETTING)
    values = batches[6].sparse_features.values().clone()
    values[0] = bad_id
    pipeline = ours.pipeline()
    iterator = iter([*batches[:6], with_values(batches[6], values), *batches[7:12]])
    actual = [pipeline.progress(iterator) for _ in range(6)]
    with pytest.raises(IdOutOfRangeError, match=rf"table t0: feature f0 has id {bad_id}, there are rows \[0, 200\)"):
        pipeline.progress(iterator)
    pipeline.reset()
    assert num_in_flight(ours) == 0
    actual += drain(pipeline, batches[12:])
    assert_same_outputs(stock.train_plain(batches[:6] + batches[12:]), actual)
    assert_same_bits(stock, ours)


def test_batch_that_alone_is_too_large_then_reset() -> None:
    setting = Setting(num_batches=20, num_rows=(400, 300, 3), load_factor=0.1)
    stock, ours = twins(setting, on_full="error")
    batches = make_batches(setting)
    large = with_values(batches[0], torch.arange(40).repeat(2), torch.tensor([40, *[0] * 5, 40, *[0] * 11]))
    pipeline = ours.pipeline()
    iterator = iter([*batches[:6], large, *batches[7:10]])
    actual = [pipeline.progress(iterator) for _ in range(6)]
    with pytest.raises(ScratchpadFullError, match=r"pool of 3 tables \(dim 8\): one batch needs 80 slots, .* has 75"):
        pipeline.progress(iterator)
    pipeline.reset()
    actual += drain(pipeline, batches[10:])
    assert_same_outputs(stock.train_plain(batches[:6] + batches[10:]), actual)
    assert_same_bits(stock, ours)


@pytest.mark.parametrize("overlap", [False, True], ids=["sequential", "overlapped"])
def test_tight_scratchpad_waits_for_train(overlap: bool) -> None:
    setting = Setting(num_batches=60, load_factor=0.1, batch_size=12)
    stock, ours = twins(setting, overlap=overlap)
    batches = make_batches(setting)
    assert_same_outputs(stock.train_plain(batches), drain(ours.pipeline(lookahead=8), batches))
    assert_same_bits(stock, ours)
    (stats,) = scratchpad_stats(ours.model)
    assert stats.num_misses_at_train == 0
    assert overlap or stats.num_stalls > 0  # a worker may be quick enough to hide every wait


def test_empty_batches_empty_features_and_a_smaller_last_batch() -> None:
    stock, ours = twins()
    batches = make_batches(SETTING)
    no_ids = with_values(batches[0], torch.empty(0, dtype=torch.int64), torch.zeros(18, dtype=torch.int64))
    one_feature = with_values(batches[0], torch.arange(6), torch.tensor([1] * 6 + [0] * 12))
    (last,) = make_batches(Setting(batch_size=2), num_batches=1)
    stream = [batches[0], no_ids, batches[1], one_feature, no_ids, no_ids, *batches[2:8], last]
    assert_same_outputs(stock.train_plain(stream), drain(ours.pipeline(), stream))
    assert_same_bits(stock, ours)


@pytest.mark.fault("an exception in the data loader")
def test_exception_in_the_data_loader_leaves_batches_in_flight_alone() -> None:
    stock, ours = twins()
    batches = make_batches(SETTING)

    def broken() -> Iterator[Batch]:
        yield from batches[:6]
        raise OSError("lost the file")

    pipeline, iterator = ours.pipeline(), broken()
    actual = [pipeline.progress(iterator) for _ in range(2)]  # lookahead 2 and two in distribution: 6 are loaded
    with pytest.raises(OSError, match="lost the file"):
        pipeline.progress(iterator)
    actual += drain(pipeline, batches[6:])
    assert_same_outputs(stock.train_plain(batches), actual)
    assert_same_bits(stock, ours)


@pytest.mark.parametrize("lookahead", [0, -1])
def test_lookahead_below_one_is_refused(lookahead: int) -> None:
    _, ours = twins()
    with pytest.raises(ConfigError, match=f"lookahead is {lookahead}"):
        ours.pipeline(lookahead)


@pytest.mark.parametrize(
    "option",
    [{"clear_data_dist_inputs": True}, {"enqueue_batch_after_forward": True}, {"context_type": OtherContext}],
    ids=lambda option: next(iter(option)),
)
def test_options_that_cannot_be_honoured_are_refused(option: dict[str, Any]) -> None:
    _, ours = twins()
    with pytest.raises(ConfigError, match=next(iter(option))):
        ScratchPipeTrainPipeline(ours.model, ours.optimizer, CPU, **option)


def test_option_of_a_newer_torchrec_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = twins()
    signature = inspect.signature(TrainPipelineSparseDist.__init__)
    known = [parameter for parameter in signature.parameters.values() if parameter.name != "async_inplace_copy"]

    def older(*args: Any, **kwargs: Any) -> None:
        signature.replace(parameters=known).bind(*args, **kwargs)

    older.__signature__ = signature.replace(parameters=known)  # type: ignore[attr-defined]
    monkeypatch.setattr(TrainPipelineSparseDist, "__init__", older)
    with pytest.raises(ConfigError, match="async_inplace_copy=True needs a newer TorchRec than"):
        ScratchPipeTrainPipeline(ours.model, ours.optimizer, CPU, async_inplace_copy=True)
    ScratchPipeTrainPipeline(ours.model, ours.optimizer, CPU, async_inplace_copy=False)


def test_stock_arguments_may_be_given_by_position() -> None:
    """As TorchEasyRec does; all of stock's defaults are accepted, in the installed version's order."""
    stock, ours = twins()
    batches = make_batches(SETTING)
    options = [parameter.default for parameter in inspect.signature(TrainPipelineSparseDist).parameters.values()][3:]
    for count in range(len(options) + 1):
        pipeline: Any = ScratchPipeTrainPipeline(ours.model, ours.optimizer, CPU, *options[:count])
    assert_same_outputs(stock.train_plain(batches), drain(pipeline, batches))
    leaves_two = ScratchPipeTrainPipeline(ours.model, ours.optimizer, CPU, False, lookahead=1)
    pipeline.detach()
    assert len(drain(leaves_two, batches)) == len(batches) - 2


@pytest.mark.parametrize(
    "names",
    [
        ("apply_jit",),
        ("enable_inplace_copy_batch",),
        ("free_features_storage_early",),
        ("async_inplace_copy",),
        ("enable_inplace_copy_batch", "async_inplace_copy"),
    ],
    ids="+".join,
)
def test_stock_options_change_no_bit(names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in inspect.signature(TrainPipelineSparseDist).parameters]
    if missing:
        pytest.skip(f"the installed TorchRec has no {missing[0]}")
    stock, ours = twins()
    batches = make_batches(SETTING)
    actual = drain(ours.pipeline(**dict.fromkeys(names, True)), copy.deepcopy(batches))  # may clear what it was given
    assert_same_outputs(stock.train_plain(batches), actual)
    assert_same_bits(stock, ours)


def test_batches_that_another_thread_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """What async_inplace_copy does on a device; on a CPU TorchRec switches it off."""
    if "async_inplace_copy" not in inspect.signature(TrainPipelineSparseDist).parameters:
        pytest.skip("the installed TorchRec has no async_inplace_copy")
    copied = []

    def set_up(pipeline: Any, enabled: bool, device: torch.device) -> None:
        pipeline._async_inplace_copy, pipeline.batches = enabled, FutureDeque()
        pipeline._inplace_copy_executor = ThreadPoolExecutor(max_workers=1)

    def submit(pipeline: Any, batch: Batch, *_: Any) -> Future[Batch]:
        copied.append(batch)
        return pipeline._inplace_copy_executor.submit(copy.deepcopy, batch)

    monkeypatch.setattr(TrainPipelineSparseDist, "_setup_async_inplace_copy", set_up)
    monkeypatch.setattr(TrainPipelineSparseDist, "_submit_inplace_copy", submit)
    stock, ours = twins()
    batches = make_batches(SETTING)
    actual = drain(ours.pipeline(enable_inplace_copy_batch=True, async_inplace_copy=True), batches)
    assert len(copied) == len(batches)
    assert_same_outputs(stock.train_plain(batches), actual)
    assert_same_bits(stock, ours)


def test_two_sharded_models_in_turn() -> None:
    """Two pipelines over two models do not see each other."""
    stock, ours = twins()
    stock_2, ours_2 = twins(Setting(num_batches=30, seed=5))
    batches = make_batches(SETTING)
    first, second = ours.pipeline(), ours_2.pipeline()
    iterator, iterator_2 = iter(batches), iter(batches)
    for batch in batches:
        assert torch.equal(stock.step(batch), first.progress(iterator))
        assert torch.equal(stock_2.step(batch), second.progress(iterator_2))
    assert_same_bits(stock, ours)
    assert_same_bits(stock_2, ours_2)


def test_failed_lookup_leaves_nothing_behind_for_the_next_forward() -> None:
    """Two lookups, the first one fails: the second must not answer a later batch with this one's slots."""
    setting = Setting(num_batches=20)
    constraints = scratchpad_constraints(setting)
    constraints["t1"].sharding_types = ["row_wise"]
    stock = Trainer(setting, constraints=constraints)
    ours = Trainer.scratchpipe(setting, constraints)
    batches = make_batches(setting)
    values = batches[3].sparse_features.values().clone()
    values[0] = 10_000  # t0 is table-wise, in the lookup that comes first
    pipeline = ours.pipeline()
    iterator = iter([*batches[:3], with_values(batches[3], values), *batches[4:8]])
    actual = [pipeline.progress(iterator) for _ in range(3)]
    with pytest.raises(IdOutOfRangeError):
        pipeline.progress(iterator)
    pipeline.reset()
    assert num_in_flight(ours) == 0
    pipeline.detach()
    actual += ours.train_plain(batches[8:12])
    actual += drain(pipeline, batches[12:])
    assert_same_outputs(stock.train_plain(batches[:3] + batches[8:]), actual)
    assert_same_bits(stock, ours)


@pytest.mark.parametrize("is_detached", [False, True])
def test_reset_waits_for_a_batch_that_is_being_planned(is_detached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between Plan and the moment at which the batch has its plan, a batch is in flight and nobody's."""
    _, ours = twins()
    is_planned = threading.Event()
    confirm = SlotMap.confirm

    def return_late(slot_map: SlotMap, plan: CachePlan) -> bool:
        is_confirmed = confirm(slot_map, plan)
        if plan.batch_index == 4:
            is_planned.set()
            time.sleep(0.2)
        return is_confirmed

    monkeypatch.setattr(SlotMap, "confirm", return_late)
    pipeline = ours.pipeline(lookahead=3)
    pipeline.progress(iter(make_batches(SETTING)))
    is_planned.wait()
    if is_detached:
        pipeline.detach()
    pipeline.reset()
    assert num_in_flight(ours) == 0


def test_attaching_another_model_with_batches_in_flight_is_refused() -> None:
    _, ours = twins()
    stock, other = twins(Setting(num_batches=30, seed=5))
    pipeline = ours.pipeline()
    pipeline.progress(iter(make_batches(SETTING)))
    pipeline.detach()
    with pytest.raises(BatchesInFlightError, match="planned for another model"):
        pipeline.attach(other.model)
    pipeline.reset()
    pipeline.attach(other.model)
    pipeline._optimizer = other.optimizer
    expected = stock.train_plain(make_batches(SETTING)[:5])
    assert_same_outputs(expected, drain(pipeline, make_batches(SETTING)[:5]))
    assert_same_bits(stock, other)


def test_batch_that_fails_while_it_is_loaded_asks_for_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(sharding_type="row_wise", num_batches=12)
    stock, ours = twins(setting)
    batches = make_batches(setting)
    collection = ours.model.module.ebc
    distribute = collection.input_dist

    def distribute_or_fail(ctx: Any, features: KeyedJaggedTensor) -> Any:
        if features.values() is batches[5].sparse_features.values():
            raise ValueError("batch 5")
        return distribute(ctx, features)

    monkeypatch.setattr(collection, "input_dist", distribute_or_fail)
    pipeline = ours.pipeline()
    iterator = iter(batches[:8])
    actual = [pipeline.progress(iterator)]
    with pytest.raises(ValueError, match="batch 5"):
        pipeline.progress(iterator)
    for _ in range(2):
        with pytest.raises(ScratchPipeError, match=r"batch 5 has failed in an earlier progress\(\). Call reset\(\)"):
            pipeline.progress(iterator)
    pipeline.reset()
    actual += drain(pipeline, batches[8:])
    assert_same_outputs(stock.train_plain([*batches[:1], *batches[8:]]), actual)
    assert_same_bits(stock, ours)


def test_dropped_batches_are_not_fetched() -> None:
    setting = Setting(num_batches=20, load_factor=0.1, batch_size=12)
    _, ours = twins(setting)
    pipeline = ours.pipeline(lookahead=8)
    pipeline.progress(iter(make_batches(setting)))
    pipeline.reset()
    queue = ours.model.module.ebc._runner._queue
    ours.train_plain(make_batches(setting)[:1])
    assert not queue.waiting()
    assert num_in_flight(ours) == 0


@pytest.mark.parametrize("overlap", [True, False])
def test_batches_seen_ahead_save_misses_and_change_no_bit(overlap: bool) -> None:
    setting = Setting(num_batches=60)
    blind = check_equal(setting, lookahead=1, overlap=overlap)
    seeing = check_equal(setting, lookahead=1, overlap=overlap, pipeline_kwargs={"num_batches_seen_ahead": 12})
    assert seeing.num_victims > 100
    misses = [sum(pool.num_unique_misses for pool in scratchpad_stats(ours.model)) for ours in (blind, seeing)]
    assert misses[1] < 0.9 * misses[0], misses


def test_reset_forgets_batches_that_were_only_seen() -> None:
    setting = Setting()
    trainer = Trainer.scratchpipe(setting)
    pipeline = trainer.pipeline(lookahead=1, num_batches_seen_ahead=12)
    batches = make_batches(setting)
    for _ in range(5):  # more batches than can be noted at a time
        pipeline.progress(iter(batches))
        pipeline.reset()
    drain(trainer.pipeline(), batches[:1])
    for pool in trainer.model.module.ebc.pools:
        pool.slot_map.check_integrity()
        assert not pool.slot_map._seen


@pytest.mark.parametrize("num_batches", [-1, 501])
def test_seeing_too_far_ahead_is_refused(num_batches: int) -> None:
    with pytest.raises(ConfigError, match=f"num_batches_seen_ahead is {num_batches}"):
        Trainer.scratchpipe(Setting()).pipeline(num_batches_seen_ahead=num_batches)


@pytest.mark.parametrize("overlap", [True, False])
def test_reset_with_batches_seen_ahead_delays_none_of_those_that_follow(overlap: bool) -> None:
    ours = Trainer.scratchpipe(SETTING, overlap=overlap)
    batches = make_batches(SETTING, num_batches=60)
    for first in range(0, 30, 10):
        pipeline = ours.pipeline(lookahead=2, num_batches_seen_ahead=5)
        iterator = iter(batches[first:])
        for _ in range(5):
            pipeline.progress(iterator)
        pipeline.reset()
    was_stalled = scratchpad_stats(ours.model)[0].num_stalls
    drain(ours.pipeline(lookahead=2, num_batches_seen_ahead=5), batches[40:60])
    if not overlap:  # on the worker's thread, time decides
        assert scratchpad_stats(ours.model)[0].num_stalls == was_stalled
        assert not ours.model.module.ebc._runner._queue.waiting()
    for pool in ours.model.module.ebc.pools:
        assert not pool.slot_map._seen


def test_flush_finds_rows_that_gave_way_to_a_loss_that_is_kept() -> None:
    """Their slots were let go of though an older batch is in flight; they are as new as any."""
    setting = replace(SETTING, num_rows=(500,), dims=(8,), load_factor=0.13)
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting, overlap=False)
    ours.copy_from(stock)
    batches = make_batches(setting, num_batches=40)
    train_alike(stock, ours, batches[:5])
    kept = ours.model(batches[0])[0]
    train_alike(stock, ours, batches[5:7])
    assert ours.model.state_dict()
    train_alike(stock, ours, batches[7:])
    assert ours.model.module.ebc.pools[0].slot_map.num_early_frees > 0
    assert_same_bits(stock, ours)
    assert kept.requires_grad


def train_alike(stock: Trainer, ours: Trainer, batches: list[Batch]) -> None:
    for batch in batches:
        assert torch.equal(stock.step(batch), ours.step(batch))


def _validate_in_turns(trainer: Trainer, other: Any, *, detach: bool, in_flight: bool) -> list[torch.Tensor]:
    """Three times: some training, then a validation by another pipeline on the same model."""
    batches = make_batches(SETTING)
    validation = make_batches(replace(SETTING, seed=9), num_batches=5)
    is_stock = not any(scratchpad_stats(trainer.model))
    pipeline = (
        TrainPipelineSparseDist(trainer.model, trainer.optimizer, CPU) if is_stock else trainer.pipeline(lookahead=3)
    )
    validator = other(trainer)
    outputs, iterator = [], iter(batches)
    for turn in range(3):
        if in_flight:
            outputs += [pipeline.progress(iterator) for _ in range(8)]
        else:
            outputs += drain(pipeline, batches[10 * turn : 10 * turn + 10])
        if detach:
            pipeline.detach()
        trainer.model.eval()
        with torch.no_grad():
            outputs += [output.clone() for output in drain(validator, validation)]
        trainer.model.train()
        if detach:
            validator.detach()
    return outputs


VALIDATORS = {
    "own": lambda trainer: (
        trainer.pipeline()
        if any(scratchpad_stats(trainer.model))
        else TrainPipelineSparseDist(trainer.model, trainer.optimizer, CPU)
    ),
    "TrainPipelineSparseDist": lambda trainer: TrainPipelineSparseDist(trainer.model, trainer.optimizer, CPU),
    "EvalPipelineSparseDist": lambda trainer: EvalPipelineSparseDist(trainer.model, trainer.optimizer, CPU),
}


@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("other", VALIDATORS.values(), ids=VALIDATORS)
def test_another_pipeline_validates_the_model(other: Any, detach: bool, in_flight: bool) -> None:
    stock, ours = twins()
    ours.copy_from(stock)
    expected = _validate_in_turns(stock, other, detach=detach, in_flight=in_flight)
    assert_same_outputs(expected, _validate_in_turns(ours, other, detach=detach, in_flight=in_flight))
    assert_same_bits(stock, ours)
    assert ours.num_victims > 0


class CalledTwice(torch.nn.Module):
    """One collection, asked twice for the same batch in one forward."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.ebc = make_bags(setting)
        self.over = torch.nn.Linear(2 * sum(setting.dims) + 3, 1)
        self.names = [f"f{i}" for i in range(len(setting.dims))]

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        once, again = self.ebc(batch.sparse_features), self.ebc(batch.sparse_features)
        columns = [bags[name] for bags in (once, again) for name in self.names]
        logits = self.over(torch.cat([*columns, batch.dense_features], dim=1)).squeeze(1)
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels), logits.detach()


def test_a_collection_that_is_called_twice_says_so_and_trains_without_a_pipeline() -> None:
    stock, ours = Trainer(SETTING, make_model=CalledTwice), Trainer.scratchpipe(SETTING, make_model=CalledTwice)
    ours.copy_from(stock)
    batches = make_batches(SETTING)
    pipeline = ours.pipeline()
    for _ in range(2):
        with pytest.raises(ScratchPipeError, match="module ebc is called twice in one forward"):
            pipeline.progress(iter(batches))
        pipeline.reset()
        assert num_in_flight(ours) == 0
    pipeline.detach()
    assert_same_outputs(stock.train_plain(batches), ours.train_plain(batches))
    assert_same_bits(stock, ours)


@pytest.mark.parametrize("num_buffers", [1, 2, 3, 4])
def test_a_loader_that_reuses_its_buffers_too_early_is_noticed(num_buffers: int) -> None:
    """Other ids would be trained than were planned; lookahead + 3 buffers are enough."""
    setting = replace(SETTING, num_rows=(200, 200, 200))  # what is written over a batch is in range for it too
    batches = make_batches(setting, num_batches=20)
    size = max(batch.sparse_features.values().numel() for batch in batches)
    buffers = [torch.zeros(size, dtype=torch.int64) for _ in range(num_buffers)]

    def reusing() -> Iterator[Batch]:
        for index, batch in enumerate(batches):
            features = batch.sparse_features
            buffer = buffers[index % num_buffers][: features.values().numel()]
            buffer.copy_(features.values())
            reused = KeyedJaggedTensor(features.keys(), buffer, lengths=features.lengths())
            yield replace(batch, sparse_features=reused)

    ours = Trainer.scratchpipe(setting)
    with pytest.raises(ScratchPipeError, match="have changed between Plan and Train"):
        drain(ours.pipeline(lookahead=2), reusing())
    assert num_in_flight(ours) <= 5


def test_a_loader_with_as_many_buffers_as_batches_in_flight() -> None:
    stock, ours = twins()
    ours.copy_from(stock)
    batches = make_batches(SETTING)
    size = max(batch.sparse_features.values().numel() for batch in batches)
    buffers = [torch.zeros(size, dtype=torch.int64) for _ in range(2 + 3)]

    def reusing() -> Iterator[Batch]:
        for index, batch in enumerate(batches):
            features = batch.sparse_features
            buffer = buffers[index % len(buffers)][: features.values().numel()]
            buffer.copy_(features.values())
            reused = KeyedJaggedTensor(features.keys(), buffer, lengths=features.lengths())
            yield replace(batch, sparse_features=reused)

    assert_same_outputs(stock.train_plain(batches), drain(ours.pipeline(lookahead=2), reusing()))
    assert_same_bits(stock, ours)


def test_eval_begins_with_training_batches_in_flight_as_in_stock() -> None:
    """Stock hands out two of them, this pipeline as many as are in flight."""
    for lookahead in (1, 3):
        ours = Trainer.scratchpipe(SETTING)
        pipeline, iterator = ours.pipeline(lookahead), iter(make_batches(SETTING))
        for _ in range(4):
            pipeline.progress(iterator)
        ours.model.eval()
        validation = make_batches(replace(SETTING, seed=9), num_batches=5)
        outputs = drain(pipeline, validation)
        assert len(outputs) == len(validation) + lookahead + 2


def test_compiled_model_prints_nothing_about_holds(capfd: pytest.CaptureFixture[str]) -> None:
    stock, ours = twins()
    ours.copy_from(stock)
    batches = make_batches(SETTING)[:6]
    expected = stock.train_plain(batches)
    ours.model = torch.compile(ours.model, backend="eager")
    assert_same_outputs(expected, ours.train_plain(batches))
    gc.collect()
    assert "Exception ignored" not in capfd.readouterr().err


def test_without_our_pipeline_one_line_says_that_rows_are_fetched_on_the_spot(caplog: pytest.LogCaptureFixture) -> None:
    ours = Trainer.scratchpipe(SETTING)
    with caplog.at_level(logging.WARNING, logger="torchrec_scratchpipe"):
        drain(TrainPipelineSparseDist(ours.model, ours.optimizer, CPU), make_batches(SETTING)[:6])
    assert sum("fetched on the spot" in record.getMessage() for record in caplog.records) == 1
    caplog.clear()
    ours = Trainer.scratchpipe(SETTING)
    with caplog.at_level(logging.WARNING, logger="torchrec_scratchpipe"):
        drain(ours.pipeline(), make_batches(SETTING)[:6])
    assert not any("fetched on the spot" in record.getMessage() for record in caplog.records)


def test_lookahead_by_position_is_named() -> None:
    ours = Trainer.scratchpipe(SETTING)
    for given in (1, 3):
        with pytest.raises(ConfigError, match=rf"execute_all_batches is {given}.* lookahead={given}"):
            ScratchPipeTrainPipeline(ours.model, ours.optimizer, CPU, given)


@pytest.mark.parametrize("execute_all_batches", [True, False])
@pytest.mark.parametrize("num_in_copy", [0, 1])
def test_on_a_device_a_batch_is_distributed_a_step_after_its_copy_has_begun(
    num_in_copy: int, execute_all_batches: bool
) -> None:
    stock, ours = twins()
    ours.copy_from(stock)
    batches = make_batches(SETTING)
    pipeline = ours.pipeline(lookahead=2, execute_all_batches=execute_all_batches)
    pipeline._num_batches_in_copy = num_in_copy  # as on CUDA
    iterator, outputs, waiting = iter(batches), [], []
    while True:
        try:
            outputs.append(pipeline.progress(iterator))
        except StopIteration:
            break
        waiting.append([context.index for context in pipeline.contexts if not context.is_distributed])
    # From the first step to when the data ends, the newest batch waits for its copy.
    num_full = len(batches) - 2 - 2 - num_in_copy - 1
    newest = [[step + 2 + 2 + num_in_copy] if num_in_copy else [] for step in range(num_full)]
    assert waiting[:num_full] == newest
    num_trained = len(batches) if execute_all_batches else len(batches) - 2
    assert len(outputs) == num_trained
    assert_same_outputs(stock.train_plain(batches[:num_trained]), outputs)
    assert_same_bits(stock, ours)
