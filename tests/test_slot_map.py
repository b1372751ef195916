# SPDX-License-Identifier: BSD-3-Clause
"""The laws of the slot map, over random streams of batches and releases."""

from collections import OrderedDict

import pytest
import torch
from core_helpers import (
    LeastRecentlyUsed,
    MostRecentlyUsed,
    PlannedRows,
    RandomVictims,
    SlotMapOfRows,
    check_ahead,
    random_rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchrec_scratchpipe.core.slot_map import SlotsHeldError
from torchrec_scratchpipe.core.slot_ops import (
    MAX_SEEN,
    NUM_BINS,
    Count,
    PlanBuffers,
    PlanRequest,
    SlotMaps,
    SlotOps,
    State,
    use_of,
)
from torchrec_scratchpipe.core.torch_ops import TorchOps, distances
from torchrec_scratchpipe.core.triton_ops import TritonOps

pytestmark = pytest.mark.any_torchrec

NUM_ROWS, NUM_SLOTS = 30, 12
VICTIMS = [TorchOps, RandomVictims, MostRecentlyUsed, LeastRecentlyUsed]


@st.composite
def streams(draw: st.DrawFn) -> list[tuple[str, list[int]]]:
    """Steps: see or plan some rows, release the oldest or the newest batch, undo the newest plan, purge, forget, ..."""
    releases = ["release", "release", "release newest", "undo", "purge"]
    kinds = st.sampled_from(["plan", "plan", "see", "see", "plan seen", "plan seen", "forget", *releases])
    rows = st.lists(st.integers(0, NUM_ROWS - 1), max_size=7) | st.lists(st.integers(0, NUM_ROWS - 1), max_size=16)
    return draw(st.lists(st.tuples(kinds, rows), max_size=40))


@pytest.mark.parametrize("ops", VICTIMS)
@settings(max_examples=150, deadline=None)
@given(stream=streams())
def test_laws(ops: type[SlotOps], stream: list[tuple[str, list[int]]]) -> None:
    check_laws(SlotMapOfRows(NUM_ROWS, NUM_SLOTS, ops()), stream)


@settings(max_examples=15, deadline=None)
@given(stream=streams())
def test_laws_in_triton(stream: list[tuple[str, list[int]]]) -> None:
    check_laws(SlotMapOfRows(NUM_ROWS, NUM_SLOTS, TritonOps()), stream)


def check_laws(slot_map: SlotMapOfRows, stream: list[tuple[str, list[int]]]) -> None:
    in_flight: OrderedDict[int, dict[int, int]] = OrderedDict()
    newest_plan = None
    ahead: dict[int, list[int]] = {}
    for kind, rows in stream:
        seen = None
        if kind == "plan seen" and ahead:  # not always the oldest: a batch that Train waits for goes ahead
            seen = list(ahead)[len(rows) % len(ahead)]
            rows = ahead[seen]
        if kind == "see":
            seen = slot_map.see(torch.tensor(rows, dtype=torch.int64))
            if seen is not None:
                ahead[seen] = rows
        elif kind == "forget" and ahead:
            seen, rows = ahead.popitem()
            slot_map.unsee(seen)
            slot_map._take_back_sightings()  # as the next see() or plan() would
        elif kind.startswith("plan"):
            ids = torch.tensor(rows, dtype=torch.int64)
            row_to_slot = slot_map.maps.row_to_slot.clone()
            held = {slot for slots in in_flight.values() for slot in slots.values()}
            cache_plan = _plan_or_none(slot_map, ids, seen)
            if cache_plan is None:  # refused, and rightly so: no row has moved, and there was no room
                assert torch.equal(row_to_slot, slot_map.maps.row_to_slot)
                assert len(set(rows).union(*in_flight.values())) > NUM_SLOTS
                newest_plan = None
                continue
            newest_plan, before = cache_plan, row_to_slot
            ahead.pop(seen, None)
            assert torch.equal(slot_map.rows_in(newest_plan.slots), ids)
            assert not held & set(newest_plan.victim_slots.tolist())
            assert len(set(newest_plan.miss_slots.tolist())) == newest_plan.miss_slots.numel()
            assert set(newest_plan.victim_slots.tolist()) <= set(newest_plan.miss_slots.tolist())
            in_flight[newest_plan.batch_index] = dict(zip(rows, newest_plan.slots.tolist(), strict=True))
        elif kind == "release" and in_flight:
            slot_map.release(in_flight.popitem(last=False)[0])
        elif kind == "release newest" and in_flight:
            slot_map.release(in_flight.popitem(last=True)[0])
        elif kind == "undo" and newest_plan is not None and newest_plan.batch_index in in_flight:
            slot_map.undo(newest_plan)
            assert torch.equal(before.clamp(min=-1), slot_map.maps.row_to_slot.clamp(min=-1))
            del in_flight[newest_plan.batch_index]
            newest_plan = None
        elif kind == "purge" and not in_flight:
            slot_map.purge()
            assert slot_map.count_resident_rows() == 0
            newest_plan = None
        slot_map.check_integrity()
        for slots in in_flight.values():  # held rows stay where they were promised to be
            for row, slot in slots.items():
                assert int(slot_map.rows_in(torch.tensor([slot]))) == row
    assert (slot_map.num_batches_in_flight == 0) == (len(in_flight) == 0)


def test_slots_of_batches_released_out_of_order_are_given_away_once() -> None:
    slot_map = SlotMapOfRows(100, 6)
    slot_map.plan(torch.tensor([0, 1]))  # stays in flight while later ones are released
    for rows in ([2, 3], [4, 5]):
        slot_map.release(slot_map.plan(torch.tensor(rows)).batch_index)
    plan = slot_map.plan(torch.tensor([4, 10, 11]))  # a hit, and misses that need what the released ones held
    assert slot_map.num_early_frees == 1
    slot_map.release(1)
    slot_map.release(plan.batch_index)
    slots = slot_map.plan(torch.arange(20, 26)).miss_slots
    assert sorted(slots.tolist()) == list(range(6))
    slot_map.check_integrity()


@st.composite
def orderly_streams(draw: st.DrawFn) -> list[tuple[str, list[int]]]:
    """As a pipeline has them: batches are planned in the order in which they were seen."""
    kinds = st.sampled_from(["see", "see", "see", "plan seen", "plan seen", "release", "release", "purge"])
    rows = st.lists(st.integers(0, NUM_ROWS - 1), max_size=7) | st.lists(st.integers(0, NUM_ROWS - 1), max_size=11)
    return draw(st.lists(st.tuples(kinds, rows), max_size=60))


@pytest.mark.parametrize("ops", VICTIMS)
@settings(max_examples=100, deadline=None)
@given(stream=orderly_streams())
def test_all_uses_ahead_are_known(ops: type[SlotOps], stream: list[tuple[str, list[int]]]) -> None:
    check_knowledge(SlotMapOfRows(NUM_ROWS, NUM_SLOTS, ops()), stream)


@settings(max_examples=15, deadline=None)
@given(stream=orderly_streams())
def test_all_uses_ahead_are_known_in_triton(stream: list[tuple[str, list[int]]]) -> None:
    check_knowledge(SlotMapOfRows(NUM_ROWS, NUM_SLOTS, TritonOps()), stream)


def check_knowledge(slot_map: SlotMapOfRows, stream: list[tuple[str, list[int]]]) -> None:
    in_flight: list[int] = []
    ahead: OrderedDict[int, Tensor] = OrderedDict()
    for kind, some in stream:
        if kind == "see":
            rows = torch.tensor(some, dtype=torch.int64)
            seen = slot_map.see(rows)
            assert seen is not None
            ahead[seen] = rows
        elif kind == "plan seen" and ahead:
            seen = next(iter(ahead))
            plan = _plan_or_none(slot_map, ahead[seen], seen)
            if plan is not None:
                del ahead[seen]
                in_flight.append(plan.batch_index)
        elif kind == "release" and in_flight:
            slot_map.release(in_flight.pop(0))
        elif kind == "purge" and not in_flight:
            slot_map.purge()
        slot_map.check_integrity()
        check_ahead(slot_map.maps, [(rows, slot_map._sighting_of(seen)) for seen, rows in ahead.items()])


@pytest.mark.parametrize("ops", [TorchOps, TritonOps])
def test_hundreds_of_batches_are_known_ahead(ops: type[SlotOps]) -> None:
    num_rows, num_ahead = 400, 130
    num_batches = 160 if ops is TorchOps else 140  # interpreted, which is slow
    slot_map = SlotMapOfRows(num_rows, 60, ops())
    generator = torch.Generator().manual_seed(0)
    # The 70th is wider than what room was made for: all sightings move.
    batches = [
        torch.randint(0, num_rows, (12 if index != 70 else 1200,), generator=generator) for index in range(num_batches)
    ]
    batches[70] = batches[70] % 40
    seen, num_victims = [slot_map.see(rows) for rows in batches[:num_ahead]], 0
    for index, rows in enumerate(batches):
        if index + num_ahead < len(batches):
            seen.append(slot_map.see(batches[index + num_ahead]))
        plan = slot_map.plan(rows, seen[index])
        slot_map.release(plan.batch_index)
        num_victims += plan.victim_rows.numel()
        if index % 10 == 0:
            slot_map.check_integrity()
            ahead = zip(batches[index + 1 : len(seen)], seen[index + 1 :], strict=True)
            check_ahead(slot_map.maps, [(rows, slot_map._sighting_of(ticket)) for rows, ticket in ahead])
    assert num_victims > 500
    assert len(slot_map._first_places) == 1  # the last one, whose release has not been taken in
    slot_map.take_in_releases()
    assert not slot_map._first_places


def test_a_batch_that_goes_ahead_of_others_leaves_their_uses_known() -> None:
    slot_map = SlotMapOfRows(100, 4)
    slot_map.release(slot_map.plan(torch.tensor([0, 1, 2, 3])).batch_index)
    first, second = slot_map.see(torch.tensor([0, 1])), slot_map.see(torch.tensor([0, 2]))
    assert first is not None
    slot_map.release(slot_map.plan(torch.tensor([0, 2]), second).batch_index)
    slot_map.check_integrity()
    assert slot_map.maps.next_use[slot_map.maps.row_to_slot[:4].long()].tolist() == [use_of(first), use_of(first), 0, 0]
    assert set(slot_map.plan(torch.tensor([10, 11])).victim_rows.tolist()) == {2, 3}


def test_rows_of_a_batch_that_was_dropped_may_go() -> None:
    slot_map = SlotMapOfRows(100, 4)
    slot_map.release(slot_map.plan(torch.tensor([0, 1, 2, 3])).batch_index)
    slot_map.release(slot_map.plan(torch.tensor([2, 3])).batch_index)
    rows = torch.tensor([0, 1, 50])
    seen = slot_map.see(rows)
    assert seen is not None
    slot_map.unsee(seen)
    assert set(slot_map.plan(torch.tensor([10, 11])).victim_rows.tolist()) == {0, 1}
    slot_map.check_integrity()
    assert not slot_map._first_places


def _plan_or_none(slot_map: SlotMapOfRows, ids: Tensor, seen: int | None) -> PlannedRows | None:
    try:
        return slot_map.plan(ids, seen)
    except SlotsHeldError:
        return None


def test_rows_seen_ahead_stay_and_the_least_often_used_go() -> None:
    slot_map = SlotMapOfRows(100, 4)
    for rows in ([0, 1, 2, 3], [2, 3], [2, 3]):
        slot_map.release(slot_map.plan(torch.tensor(rows)).batch_index)
    assert slot_map.see(torch.tensor([0])) is not None
    assert slot_map.plan(torch.tensor([10])).victim_rows.tolist() == [1]
    assert slot_map.see(torch.tensor([2])) is not None
    assert slot_map.plan(torch.tensor([11])).victim_rows.tolist() == [3]
    for batch_index in (4, 5):
        slot_map.release(batch_index)
    # All are wanted, or were used once; of what is wanted, 2 is wanted last.
    assert slot_map.plan(torch.tensor([12, 13, 14])).victim_rows.tolist() == [10, 11, 2]


def test_frequencies_age() -> None:
    slot_map = SlotMapOfRows(100, 4, half_life=4)
    for _ in range(20):
        slot_map.release(slot_map.plan(torch.tensor([0, 1])).batch_index)
    for _ in range(200):  # float32 would not hold 2 ** 200 / 4 half lives
        slot_map.release(slot_map.plan(torch.tensor([2, 3])).batch_index)
    assert {0, 1} == set(slot_map.plan(torch.tensor([4, 5])).victim_rows.tolist())
    assert slot_map._origin > 0


def test_no_more_batches_are_seen_than_there_are_bins_for() -> None:
    slot_map = SlotMapOfRows(60, 20)
    rows = torch.tensor([1, 2])
    seen = [slot_map.see(rows) for _ in range(MAX_SEEN + 2)]
    assert seen[MAX_SEEN:] == [None, None]
    slot_map.plan(rows, seen[0])
    assert slot_map.see(rows) is not None
    slot_map.check_integrity()


def test_victims_are_among_the_least_often_used() -> None:
    num_slots = 32_768
    slot_map = SlotMapOfRows(2 * num_slots, num_slots)
    rows = torch.randperm(2 * num_slots, generator=torch.Generator().manual_seed(3))
    resident, absent = rows.split(num_slots)
    for num_used in (num_slots, num_slots // 2, num_slots // 4):  # three quarters are used once or twice
        slot_map.release(slot_map.plan(resident[:num_used]).batch_index)
    victims = torch.cat([slot_map.plan(some).victim_rows for some in absent[: num_slots // 2].split(1000)])
    assert set(resident[num_slots // 2 :].tolist()) == set(victims.tolist())


def test_a_list_that_is_spent_in_part_serves_the_next_batch() -> None:
    slot_map = SlotMapOfRows(10_000, 3200)
    slot_map.release(slot_map.plan(torch.arange(3200)).batch_index)
    victims = []
    for start in range(3200, 3800, 50):
        victims.append(slot_map.plan(torch.arange(start, start + 50)).victim_rows)
        slot_map.release(slot_map.next_batch - 1)
    state = slot_map.maps.state.tolist()
    assert torch.cat(victims).unique().numel() == 600
    assert 0 < state[State.LIST_HEAD] <= state[State.LIST_LENGTH]
    assert state[State.THRESHOLD] < NUM_BINS
    slot_map.check_integrity()


def test_release_is_idempotent_and_takes_any_order() -> None:
    slot_map = SlotMapOfRows(60, 20)
    plans = [slot_map.plan(rows) for rows in random_rows(num_batches=3, ids_per_batch=4)]
    slot_map.release(plans[1].batch_index)
    assert slot_map.num_batches_in_flight == 3
    slot_map.release(plans[0].batch_index)
    slot_map.release(plans[0].batch_index)
    assert slot_map.num_batches_in_flight == 1
    slot_map.release(plans[2].batch_index)
    assert slot_map.num_batches_in_flight == 0
    assert not slot_map._released_early


@pytest.mark.parametrize("num_seen_ahead", [0, 8])
@pytest.mark.parametrize("exponent", [0.8, 1.2])
def test_bins_choose_victims_as_well_as_an_exact_order_would(exponent: float, num_seen_ahead: int) -> None:
    generator = torch.Generator().manual_seed(0)
    num_rows, num_slots, num_batches = 20_000, 3_000, 400
    weights = torch.arange(1, num_rows + 1).float() ** -exponent
    rows = torch.randperm(num_rows, generator=generator)
    batches = [rows[torch.multinomial(weights, 500, replacement=True, generator=generator)] for _ in range(num_batches)]
    num_misses = []
    for ops in (ExactOrder(), TorchOps()):
        slot_map = SlotMapOfRows(num_rows, num_slots, ops)
        misses, seen = 0, [slot_map.see(ids) for ids in batches[:num_seen_ahead]]
        for index, ids in enumerate(batches):
            ahead = index + num_seen_ahead
            if num_seen_ahead and ahead < num_batches:
                seen.append(slot_map.see(batches[ahead]))
            plan = slot_map.plan(ids, seen[index] if num_seen_ahead else None)
            slot_map.release(plan.batch_index)
            misses += plan.miss_rows.numel() if index >= num_batches // 2 else 0
        num_misses.append(misses)
    assert num_misses[1] == pytest.approx(num_misses[0], rel=0.02)
    assert num_misses[0] > 5_000


class ExactOrder(TorchOps):
    """Lists as many slots as are wanted, in the exact order of their frequency or of their next use."""

    def scan(self, request: PlanRequest, maps: SlotMaps, buffers: PlanBuffers, num_wanted: int) -> None:
        first_held = request.first_held
        counts = buffers.counts.tolist()
        missing = counts[Count.MISSES] - counts[Count.FROM_FREE] - counts[Count.VICTIMS]
        if missing <= 0:
            return
        ahead = distances(maps.next_use, request.first_use)
        order = torch.where(ahead < MAX_SEEN, 1e30 / (1 + ahead).double(), maps.frequency.double())
        order[(maps.last_use < 0) | (maps.last_use >= first_held)] = torch.inf
        lowest, slots = order.sort(stable=True)
        slots = slots[: min(max(missing, num_wanted), int((lowest < torch.inf).sum()))]
        maps.listed[: slots.numel()] = slots.int()
        maps.listed_last_use[: slots.numel()] = maps.last_use[slots]
        maps.state[State.LIST_HEAD], maps.state[State.LIST_LENGTH] = 0, slots.numel()
