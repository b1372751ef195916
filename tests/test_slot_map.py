# SPDX-License-Identifier: BSD-3-Clause
"""The laws of the slot map, over random streams of batches and releases."""

from collections import OrderedDict

import pytest
import torch
from core_helpers import LeastRecentlyUsed, MostRecentlyUsed, PlannedRows, RandomVictims, SlotMapOfRows, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchrec_scratchpipe.core.slot_map import SlotsHeldError
from torchrec_scratchpipe.core.slot_ops import (
    NUM_BINS,
    WINDOW_BITS,
    WINDOW_MASK,
    Count,
    PlanBuffers,
    PlanRequest,
    SlotMaps,
    SlotOps,
    State,
)
from torchrec_scratchpipe.core.torch_ops import TorchOps
from torchrec_scratchpipe.core.triton_ops import TritonOps

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
            slot_map.unsee(seen, torch.tensor(rows, dtype=torch.int64))
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
        check_uses_ahead(slot_map, ahead)
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


def check_uses_ahead(slot_map: SlotMapOfRows, ahead: dict[int, list[int]]) -> None:
    """Every row, resident or not, knows the batches seen ahead that will use it, and no others."""
    row_to_slot = slot_map.maps.row_to_slot
    slots = row_to_slot.clamp(min=0).long()
    uses = torch.where(row_to_slot < 0, (-1 - row_to_slot) % (1 << WINDOW_BITS), slot_map.maps.uses_ahead[slots])
    expected = [
        sum(1 << (seen % WINDOW_BITS) for seen, rows in ahead.items() if row in rows) for row in range(NUM_ROWS)
    ]
    assert expected == uses.tolist()


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


def test_no_more_batches_are_seen_than_a_row_can_note() -> None:
    slot_map = SlotMapOfRows(60, 20)
    rows = torch.tensor([1, 2])
    seen = [slot_map.see(rows) for _ in range(WINDOW_BITS + 2)]
    assert seen[WINDOW_BITS:] == [None, None]
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
        first_held, next_bit = request.first_held, request.next_bit
        counts = buffers.counts.tolist()
        missing = counts[Count.MISSES] - counts[Count.FROM_FREE] - counts[Count.VICTIMS]
        if missing <= 0:
            return
        uses = maps.uses_ahead[:-1].long()
        in_order = ((uses >> next_bit) | (uses << (WINDOW_BITS - next_bit))) & WINDOW_MASK
        next_use = (in_order & -in_order).double()
        order = torch.where(next_use > 0, 1e30 / next_use.clamp(min=1), maps.frequency.double())
        order[(maps.last_use < 0) | (maps.last_use >= first_held)] = torch.inf
        lowest, slots = order.sort(stable=True)
        slots = slots[: min(max(missing, num_wanted), int((lowest < torch.inf).sum()))]
        maps.listed[: slots.numel()] = slots.int()
        maps.listed_last_use[: slots.numel()] = maps.last_use[slots]
        maps.state[State.LIST_HEAD], maps.state[State.LIST_LENGTH] = 0, slots.numel()
