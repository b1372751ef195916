# SPDX-License-Identifier: BSD-3-Clause
"""What one pass over the batches predicts, against what the slot map then does."""

import numpy as np
import pytest
import torch
from core_helpers import SlotMapOfRows

from torchrec_scratchpipe.core.slot_map import SlotsHeldError
from torchrec_scratchpipe.core.slot_ops import HALF_LIFE
from torchrec_scratchpipe.planning.reuse import GAPS, Reuse, ReuseMeter, misses_of_pool
from torchrec_scratchpipe.planning.zipf import zipf_reuse

pytestmark = pytest.mark.any_torchrec

NUM_ROWS, NUM_IDS = 20_000, 600


def zipf_batches(exponent: float, num_batches: int = 160, num_rows: int = NUM_ROWS, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    cumulative = np.cumsum(np.arange(1, num_rows + 1) ** -exponent)
    row_of_rank = rng.permutation(num_rows)
    ranks = np.searchsorted(cumulative / cumulative[-1], rng.random((num_batches, NUM_IDS)))
    return list(row_of_rank[np.minimum(ranks, num_rows - 1)])


def drifting_batches(num_batches: int) -> list[np.ndarray]:
    """One popularity passes into another."""
    before, after = zipf_batches(1.05, num_batches, seed=1), zipf_batches(1.05, num_batches, seed=2)
    ends = np.linspace(NUM_IDS, 0, num_batches).astype(int)
    return [np.concatenate([a[:end], b[end:]]) for a, b, end in zip(before, after, ends, strict=True)]


def measure(batches: list[np.ndarray], lookahead: int = 2, ahead: int = 0, num_rows: int = NUM_ROWS) -> Reuse:
    meter = ReuseMeter(num_rows, lookahead, ahead)
    for ids in batches:
        meter.add(ids)
    return meter.result()


def count_misses(
    batches: list[np.ndarray],
    num_slots: int,
    lookahead: int,
    ahead: int,
    num_rows: int = NUM_ROWS,
    half_life: float = HALF_LIFE,
) -> np.ndarray:
    """Misses of each batch when a pipeline plans and sees so far ahead."""
    slot_map = SlotMapOfRows(num_rows, num_slots, half_life=half_life)
    rows = [torch.from_numpy(ids) for ids in batches]
    seen: list[int | None] = []
    in_flight: list[int] = []
    misses = []
    for index, ids in enumerate(rows):
        while len(seen) < min(len(rows), index + 1 + ahead):
            seen.append(slot_map.see(rows[len(seen)]) if ahead else None)
        while len(in_flight) > lookahead:
            slot_map.release(in_flight.pop(0))
        while True:
            try:
                plan = slot_map.plan(ids, seen[index])
                break
            except SlotsHeldError:  # it waits for Train
                slot_map.release(in_flight.pop(0))
        in_flight.append(plan.batch_index)
        misses.append(plan.miss_rows.numel())
    return np.array(misses)


def count_lru(batches: list[np.ndarray], num_slots: int, num_rows: int = NUM_ROWS) -> np.ndarray:
    """Misses when those rows go whose last use is longest ago."""
    last_use = np.full(num_rows, -1)  # of resident rows
    misses = []
    for now, ids in enumerate(batches):
        rows = np.unique(ids)
        misses.append(int((last_use[rows] < 0).sum()))
        last_use[rows] = now
        resident = np.flatnonzero(last_use >= 0)
        oldest_first = resident[np.argsort(last_use[resident], kind="stable")]
        last_use[oldest_first[: max(0, resident.size - num_slots)]] = -1
    return np.array(misses)


def count_belady(batches: list[np.ndarray], num_slots: int, num_rows: int = NUM_ROWS) -> np.ndarray:
    """Misses of Belady's optimum: of all rows that the batch does not use, those go whose next use is farthest."""
    unique = [np.unique(ids) for ids in batches]
    next_use = np.full(num_rows, 1 << 30)
    next_uses = []
    for index in reversed(range(len(unique))):
        next_uses.append(next_use[unique[index]])
        next_use[unique[index]] = index
    next_use[:] = 1 << 30
    is_resident = np.zeros(num_rows, dtype=bool)
    misses = []
    for rows, uses in zip(unique, reversed(next_uses), strict=True):
        is_miss = ~is_resident[rows]
        next_use[rows] = uses
        num_victims = int(is_resident.sum() + is_miss.sum()) - num_slots
        if num_victims > 0:
            candidates = np.setdiff1d(np.flatnonzero(is_resident), rows)
            is_resident[candidates[np.argsort(-next_use[candidates], kind="stable")[:num_victims]]] = False
        is_resident[rows] = True
        misses.append(int(is_miss.sum()))
    return np.array(misses)


def second_half(reuse: Reuse, misses: np.ndarray) -> float:
    half = len(reuse.bin_sizes) // 2
    return float(np.average(misses[half:], weights=reuse.bin_sizes[half:]))


@pytest.mark.parametrize("exponent", [0.8, 1.05, 1.2])
@pytest.mark.parametrize(("lookahead", "ahead"), [(0, 0), (2, 0), (1, 5), (2, 14)])
def test_misses_are_predicted_within_5_percent_for_any_size(exponent: float, lookahead: int, ahead: int) -> None:
    batches = zipf_batches(exponent, num_batches=200 if ahead > 10 else 160)
    reuse = measure(batches, lookahead, ahead)
    num_sizes = 0
    for load_factor in (0.02, 0.05, 0.1, 0.2, 0.4):
        num_slots = int(load_factor * NUM_ROWS)
        if num_slots < reuse.window(lookahead + 1).max:  # where Plan waits for Train, fewer batches are in flight
            continue
        misses = count_misses(batches, num_slots, lookahead, ahead)
        (predicted,) = misses_of_pool([reuse], num_slots)
        assert misses.mean() == pytest.approx(np.average(predicted, weights=reuse.bin_sizes), rel=0.05)
        late = misses[int(reuse.bin_sizes[: len(reuse.bin_sizes) // 2].sum()) :].mean()
        assert late == pytest.approx(second_half(reuse, predicted), rel=0.05)
        lru = count_lru(batches, num_slots)
        (predicted,) = misses_of_pool([reuse], num_slots, "lru")
        assert lru.mean() == pytest.approx(np.average(predicted, weights=reuse.bin_sizes), rel=0.05)
        assert misses.mean() <= lru.mean()
        num_sizes += 1
    assert num_sizes >= 3


@pytest.mark.parametrize(
    ("exponent", "ahead", "num_batches", "scale"),
    [
        (0.8, 100, 320, 1),
        (1.2, 100, 240, 1),
        ("drift", 100, 320, 1),
        (1.05, 200, 1000, 1),
        (1.2, 200, 450, 1),
        (1.05, 500, 1000, 4),
    ],
)
def test_hundreds_of_batches_seen_ahead_are_predicted_within_5_percent(
    exponent: float | str, ahead: int, num_batches: int, scale: int
) -> None:
    # Several times as many batches as are seen: when a scratchpad has just filled, it has rows from before.
    num_rows = NUM_ROWS // scale
    batches = (
        drifting_batches(num_batches)
        if isinstance(exponent, str)
        else [ids[: NUM_IDS // scale] for ids in zipf_batches(exponent, num_batches, num_rows)]
    )
    reuse = measure(batches, 1, ahead, num_rows)
    half = int(reuse.bin_sizes[: len(reuse.bin_sizes) // 2].sum())
    for load_factor in (0.1, 0.2, 0.4)[1 if ahead == 500 else 0 :]:
        num_slots = int(load_factor * num_rows)
        (predicted,) = misses_of_pool([reuse], num_slots)
        counted = count_misses(batches, num_slots, 1, ahead, num_rows)[half:].mean()
        assert counted == pytest.approx(second_half(reuse, predicted), rel=0.05)


def test_where_all_is_seen_ahead_much_less_is_missed() -> None:
    batches = zipf_batches(1.05, num_batches=420)
    reuse = measure(batches, 1, 400)
    half = int(reuse.bin_sizes[: len(reuse.bin_sizes) // 2].sum())
    for load_factor in (0.05, 0.1, 0.2):
        num_slots = int(load_factor * NUM_ROWS)
        (predicted,) = misses_of_pool([reuse], num_slots)
        counted = count_misses(batches, num_slots, 1, 400)[half:].mean()
        assert counted == pytest.approx(second_half(reuse, predicted), rel=0.05)
        assert counted < 0.9 * count_misses(batches, num_slots, 1, 0)[half:].mean()


@pytest.mark.parametrize("ahead", [0, 2, 19])
def test_all_that_can_be_seen_ahead_of_a_small_scratchpad_is_predicted(ahead: int) -> None:
    rng = np.random.default_rng(0)
    batches = list(rng.integers(0, NUM_ROWS, (200, 256)))
    reuse = measure(batches, 1, ahead)
    (predicted,) = misses_of_pool([reuse], 4086)
    half = int(reuse.bin_sizes[: len(reuse.bin_sizes) // 2].sum())
    counted = count_misses(batches, 4086, 1, ahead)[half:].mean()
    assert counted == pytest.approx(second_half(reuse, predicted), rel=0.05)
    unseen = count_misses(batches, 4086, 1, 0)[half:].mean()
    assert ahead < 19 or unseen > 1.15 * counted


def test_tables_that_share_slots_are_predicted_together() -> None:
    small, large = zipf_batches(1.2, num_rows=3000), zipf_batches(0.8, seed=1)
    together = [np.concatenate([a, b + 3000]) for a, b in zip(small, large, strict=True)]
    misses = count_misses(together, 4000, 2, 0, num_rows=3000 + NUM_ROWS)
    reuses = [measure(small, num_rows=3000), measure(large)]
    predicted = np.sum(misses_of_pool(reuses, 4000), axis=0)
    assert misses.mean() == pytest.approx(np.average(predicted, weights=reuses[0].bin_sizes), rel=0.05)


def test_a_popularity_shift_is_followed() -> None:
    before, after = zipf_batches(1.05, 400, seed=1), zipf_batches(1.05, 400, seed=2)
    misses = {}
    for name, half_life in {"aged": 50.0, "never aged": 1e9}.items():
        misses[name] = count_misses(before + after, 1000, 2, 0, half_life=half_life)[450:].mean()
    misses["lru"] = count_lru(before + after, 1000)[450:].mean()
    assert misses["aged"] < misses["lru"]
    assert misses["aged"] < 0.97 * misses["never aged"], misses


@pytest.mark.parametrize("exponent", [0.8, 1.05, 1.2])
def test_zipf_by_calculation_is_zipf_by_measurement(exponent: float) -> None:
    batches = zipf_batches(exponent, num_batches=400)
    measured, expected = measure(batches, 2, 4), zipf_reuse(NUM_ROWS, NUM_IDS, exponent, 2, 4)
    for num_batches in (1, 3, 10):
        assert expected.window(num_batches).mean == pytest.approx(measured.window(num_batches).mean, rel=0.03)
    for num_slots in (2500, 5000):
        for order in ("ours", "lru"):
            (by_bin,) = misses_of_pool([measured], num_slots, order)
            (calculated,) = misses_of_pool([expected], num_slots, order)
            assert calculated[0] == pytest.approx(by_bin[-1], rel=0.2)
        belady = count_belady(batches, num_slots)[200:].mean()
        assert misses_of_pool([expected], num_slots, "optimum")[0][0] == pytest.approx(belady, rel=0.12)


@pytest.mark.parametrize(("exponent", "ahead"), [(0.8, 100), (1.05, 50), (1.05, 200), (1.2, 100)])
def test_zipf_by_calculation_foretells_what_hundreds_seen_ahead_save(exponent: float, ahead: int) -> None:
    measured = measure(zipf_batches(exponent, num_batches=1000), 1, ahead)
    expected = zipf_reuse(NUM_ROWS, NUM_IDS, exponent, 1, ahead)
    for num_slots in (1000, 2000, 4000):
        ((calculated,),) = misses_of_pool([expected], num_slots)
        assert calculated == pytest.approx(misses_of_pool([measured], num_slots)[0][-2], rel=0.08)
    assert (np.diff(expected.curves["ours"].kept) <= 1e-6).all()


def test_the_optimum_is_no_worse_than_belady_and_belady_no_worse_than_ours() -> None:
    batches = zipf_batches(1.05)
    reuse = measure(batches, 0, 0)
    for num_slots in (1000, 4000):
        belady = count_belady(batches, num_slots).mean()
        assert np.average(misses_of_pool([reuse], num_slots, "optimum")[0], weights=reuse.bin_sizes) < 1.02 * belady
        assert belady < count_misses(batches, num_slots, 0, 14).mean()


def test_windows_are_counted_exactly() -> None:
    batches = zipf_batches(1.05, num_batches=40)
    windows = {window.num_batches: window for window in measure(batches).windows}
    for size in (1, 2, 3, 17):
        counts = [np.unique(np.concatenate(batches[i - size : i])).size for i in range(size, len(batches) + 1)]
        assert (np.mean(counts), np.max(counts)) == pytest.approx((windows[size].mean, windows[size].max))
        assert np.percentile(counts, 99) == pytest.approx(windows[size].p99)
    assert max(windows) <= 40
    assert set(windows) <= set(GAPS.tolist())


def test_memory_of_a_meter_grows_with_distinct_rows_not_with_lookups() -> None:
    ids = np.arange(1000)
    meter = ReuseMeter(10**9, 2, 0)  # 4 GB of addresses; pages that are not touched are not there
    for _ in range(100):
        meter.add(ids)
    assert meter._last_use.size <= 2048
    assert meter.result().num_distinct == 1000


@pytest.mark.parametrize("num_batches", [1, 2, 3])
def test_few_batches_are_enough_for_a_result(num_batches: int) -> None:
    reuse = measure(zipf_batches(1.05, num_batches), 2, 4)
    assert num_batches == reuse.num_batches
    assert misses_of_pool([reuse], 5000)[0].shape == reuse.bin_sizes.shape
    assert reuse.window(9).max >= reuse.window(3).max >= reuse.window(1).max > 0


def test_scaled_to_more_ranks_and_to_a_share_of_the_rows() -> None:
    batches = zipf_batches(1.05, num_batches=320)
    pairs = [np.concatenate(pair) for pair in zip(batches[::2], batches[1::2], strict=True)]
    scaled, measured = measure(batches).scaled(num_steps=2.0), measure(pairs)
    assert scaled.num_ids == measured.num_ids == 2 * NUM_IDS
    assert scaled.window(1).mean == pytest.approx(measured.window(1).mean, rel=0.02)
    for num_slots in (3000, 6000):
        assert second_half(scaled, misses_of_pool([scaled], num_slots)[0]) == pytest.approx(
            second_half(measured, misses_of_pool([measured], num_slots)[0]), rel=0.1
        )
    half = measured.scaled(share=0.5)
    assert misses_of_pool([half], 1500)[0] == pytest.approx(0.5 * misses_of_pool([measured], 3000)[0])
