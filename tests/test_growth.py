# SPDX-License-Identifier: BSD-3-Clause
"""A batch that alone needs more slots than there are: its pool grows, and the bits stay."""

import gc
import io
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from device_path import device_path
from helpers import (
    Setting,
    Trainer,
    assert_same_bits,
    assert_same_outputs,
    drain,
    full_state,
    make_batches,
    make_sharders,
    run_ranks,
    with_optimizer,
)

from torchrec_scratchpipe import CheckpointManager, ConfigError, ScratchpadFullError, scratchpad_stats
from torchrec_scratchpipe.core import scratchpad as scratchpad_module
from torchrec_scratchpipe.sharding import kernel as kernel_module

SMALL = Setting(num_rows=(400, 300, 90), dims=(8, 16, 8), load_factor=0.08, batch_size=3)
LARGE = replace(SMALL, batch_size=60, seed=3)


def small_and_large_batches(setting: Setting = SMALL, rank: int = 0, large_rank: int | None = None) -> list[Any]:
    """Small ones, and large ones among them; with `large_rank`, large ones on that rank alone."""
    small = make_batches(setting, rank, 24)
    is_large = large_rank is None or rank == large_rank
    of_large = replace(setting, batch_size=LARGE.batch_size, seed=LARGE.seed) if is_large else setting
    large = make_batches(of_large, rank, 6)
    return [*small[:10], *large[:2], *small[10:16], *large[2:], *small[16:]]


def num_growths(trainer: Trainer) -> int:
    return sum(pool.num_growths for pool in scratchpad_stats(trainer.model))


def check_growth(setting: Setting = SMALL, rank: int = 0, lookahead: int = 3, **kwargs: Any) -> Trainer:
    batches = small_and_large_batches(setting, rank)
    stock, ours = Trainer(setting), Trainer.scratchpipe(setting, **kwargs)
    ours.copy_from(stock)
    slots_before = [pool.num_slots for pool in scratchpad_stats(ours.model)]
    pipeline, iterator = ours.pipeline(lookahead=lookahead), iter(batches)
    for index, batch in enumerate(batches):
        assert torch.equal(stock.step(batch), pipeline.progress(iterator))
        if index in (11, 18):  # in the midst of batches that wait for slots
            assert full_state(ours).keys() == full_state(stock).keys()
    assert_same_bits(stock, ours)
    stats = scratchpad_stats(ours.model)
    assert num_growths(ours) > 0
    assert [pool.num_slots for pool in stats] != slots_before
    assert all(pool.num_misses_at_train == 0 for pool in stats)
    assert ours.num_victims > 0
    for pool in (ours.model.module.ebc if setting.is_pooled else ours.model.module.ec).pools:
        pool.slot_map.check_integrity()
        assert pool.slot_map.num_slots == pool.scratchpad.num_slots == pool.scratchpad.parts[0].shape[0]
    return ours


SETTINGS = {
    "table-wise": SMALL,
    "row-wise": replace(SMALL, sharding_type="row_wise"),
    "column-wise": replace(SMALL, sharding_type="column_wise", min_partition=4),
    "sequences": replace(SMALL, is_pooled=False, dims=(8, 8, 8)),
    "one whole table": replace(SMALL, fused_tables=("t1",)),
    "SGD": with_optimizer(SMALL, torch.optim.SGD),
}


@pytest.mark.parametrize("overlap", [False, True], ids=["sequential", "overlapped"])
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_growth(setting: Setting, overlap: bool) -> None:
    check_growth(setting, overlap=overlap)


@pytest.mark.parametrize("kind", ["torch"])
def test_growth_where_the_device_plans(kind: str) -> None:
    with device_path(kind):
        check_growth()
        check_growth(replace(SMALL, fused_tables=("t1",)), lookahead=1)


def test_growth_of_a_memory_mapped_table(tmp_path: Any) -> None:
    check_growth(table_dir=str(tmp_path))


def cannot_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: memory that is there is taken, so that a scratchpad which grows has to move."""
    allocate = scratchpad_module.allocate_scratchpads

    def allocate_exactly(layouts: Any, nums_slots: Any, device: Any, max_slots: Any = None) -> Any:
        return allocate(layouts, nums_slots, device)

    monkeypatch.setattr(kernel_module, "allocate_scratchpads", allocate_exactly)


@pytest.mark.parametrize("kind", [None, "torch"])
def test_growth_that_moves_the_scratchpad(kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    cannot_reserve(monkeypatch)
    if kind is None:
        check_growth()
    else:
        with device_path(kind):
            check_growth()


def test_control_a_scratchpad_that_moves_without_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    cannot_reserve(monkeypatch)
    move = scratchpad_module._moved

    def move_and_lose(memory: Any, *args: Any) -> Any:
        larger = move(memory, *args)
        for part in larger.flat_parts:
            part.zero_()
        return larger

    monkeypatch.setattr(scratchpad_module, "_moved", move_and_lose)
    with pytest.raises(AssertionError):
        check_growth()


def test_a_system_that_reserves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(num_values: int, dtype: torch.dtype, device: torch.device) -> Any:
        if num_values > 3000:
            raise OSError(12, "Cannot allocate memory")
        return torch.zeros(num_values, dtype=dtype, device=device), None

    monkeypatch.setattr(scratchpad_module, "_zeros", refuse)
    memory = scratchpad_module.allocate_scratchpads(
        [kernel_module.RowLayout(8, torch.float32)], [10], torch.device("cpu"), [1000]
    )
    assert memory.capacities == [10]


@pytest.mark.parametrize("is_moved", [False, True])
def test_growth_while_an_earlier_forward_waits_for_its_backward(
    is_moved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_moved:
        cannot_reserve(monkeypatch)
    stock, ours = Trainer(SMALL), Trainer.scratchpipe(SMALL)
    ours.copy_from(stock)
    small, large = make_batches(SMALL, 0, 1)[0], make_batches(LARGE, 0, 1)[0]

    def train(trainer: Trainer) -> None:
        first, _ = trainer.model(small)
        second, _ = trainer.model(large)
        second.backward()
        first.backward()
        trainer.optimizer.step()

    if is_moved:
        with pytest.raises(ScratchpadFullError, match="cannot grow before the backward of an earlier forward"):
            train(ours)
        return
    train(stock)
    train(ours)
    assert num_growths(ours) > 0
    assert_same_bits(stock, ours)


def test_a_whole_table_does_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    cannot_reserve(monkeypatch)
    ours = Trainer.scratchpipe(replace(SMALL, fused_tables=("t1",)))
    with pytest.raises(ScratchpadFullError, match="beside tables that are kept whole"):
        ours.train_plain(make_batches(LARGE, 0, 1))


def test_async_save_in_the_midst(tmp_path: Any) -> None:
    batches = small_and_large_batches()
    stock, ours = Trainer(SMALL), Trainer.scratchpipe(SMALL)
    ours.copy_from(stock)
    pipeline, iterator = ours.pipeline(), iter(batches)
    manager = CheckpointManager(tmp_path)
    saving = None
    for index, batch in enumerate(batches):
        if index == 9:
            saving, at_save = manager.async_save(9, ours.model, ours.optimizer), full_state(stock)
        assert torch.equal(stock.step(batch), pipeline.progress(iterator))
    assert saving is not None
    saving.result()
    other = Trainer.scratchpipe(replace(SMALL, seed=7))
    manager.load(other.model, other.optimizer)
    for name, tensors in full_state(other).items():
        for expected, actual in zip(at_save[name], tensors, strict=True):
            assert torch.equal(expected, actual), name


@pytest.mark.parametrize("make_kwargs", [lambda: {"on_full": "error"}, lambda: {"max_scratchpad_bytes": 8000}])
def test_growth_that_is_not_wanted_is_the_error_it_was(make_kwargs: Callable[[], dict[str, Any]]) -> None:
    kwargs = make_kwargs()
    stock, ours = Trainer(SMALL), Trainer.scratchpipe(SMALL, **kwargs)
    ours.copy_from(stock)
    batches = small_and_large_batches()
    pipeline, iterator = ours.pipeline(), iter(batches)
    actual = [pipeline.progress(iterator) for _ in range(10)]
    reason = "max_scratchpad_bytes is 8,000" if "max_scratchpad_bytes" in kwargs else "Raise load_factor to at least"
    with pytest.raises(ScratchpadFullError, match=reason):
        pipeline.progress(iterator)
    pipeline.reset()
    small = make_batches(SMALL, 0, 5)
    assert_same_outputs(stock.train_plain(batches[:10] + small), actual + drain(pipeline, small))
    assert_same_bits(stock, ours)
    assert num_growths(ours) == 0


def test_growth_is_logged_with_the_load_factor_to_set(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="torchrec_scratchpipe"):
        ours = check_growth()
    messages = [record.getMessage() for record in caplog.records if "Set load_factor" in record.getMessage()]
    assert len(messages) == num_growths(ours)


def test_unknown_way_when_full() -> None:
    with pytest.raises(ConfigError, match="on_full is 'grew', it must be one of grow, error"):
        Trainer.scratchpipe(SMALL, on_full="grew")


def _check_on_two_ranks(rank: int) -> None:
    for sharding_type in ("row_wise", "table_wise"):
        setting = replace(SMALL, sharding_type=sharding_type, num_rows=(400, 300, 400), dims=(8, 8, 8))
        batches = small_and_large_batches(setting, rank)
        stock, ours = Trainer(setting), Trainer.scratchpipe(setting)
        ours.copy_from(stock)
        assert_same_outputs(stock.train_plain(batches), drain(ours.pipeline(), batches))
        assert_same_bits(stock, ours)
        assert num_growths(ours) > 0


@pytest.mark.dist
def test_growth_on_two_ranks() -> None:
    run_ranks(2, _check_on_two_ranks)


def test_a_model_that_is_gone_leaves_its_budget() -> None:
    sharders = make_sharders(SMALL, is_stock=False, max_scratchpad_bytes=30_000)
    for _ in range(3):
        ours = Trainer(SMALL, sharders)
        ours.train_plain(make_batches(LARGE, 0, 1))
        assert num_growths(ours) > 0
        del ours
        gc.collect()


def test_saved_tensors_do_not_carry_what_is_reserved() -> None:
    """torch.save writes whole storages: those of whole tables must not reach into the scratchpads beside them."""
    sizes = []
    for trainer in (Trainer(WITH_WHOLE), Trainer.scratchpipe(WITH_WHOLE)):
        for state in (trainer.model.state_dict(), trainer.model.module.ebc.embedding_bags.state_dict()):
            stream = io.BytesIO()
            torch.save(state, stream)
            sizes.append(stream.tell())
    stock_model, stock_bags, ours_model, ours_bags = sizes
    assert ours_model < 1.1 * stock_model
    assert ours_bags < 1.1 * stock_bags


WITH_WHOLE = replace(SMALL, num_rows=(40_000, 30_000, 900), load_factor=0.01, fused_tables=("t2",))
