# SPDX-License-Identifier: BSD-3-Clause
"""The laws of the slot map, over random streams of batches and releases."""

from collections import OrderedDict

import pytest
import torch
from core_helpers import DeviceSlotMapOfRows, MostRecentlyUsed, RandomOrder, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchrec_scratchpipe.eviction import (
    SAMPLE_SIZE,
    WINDOW_BITS,
    EvictionOrder,
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
)
from torchrec_scratchpipe.slot_map import SlotMap, SlotsHeldError
from torchrec_scratchpipe.torch_ops import TorchOps
from torchrec_scratchpipe.triton_ops import TritonOps
from torchrec_scratchpipe.types import CachePlan

NUM_ROWS, NUM_SLOTS = 30, 12
ORDERS = [LeastFrequentlyUsed, LeastRecentlyUsed, RandomOrder, MostRecentlyUsed]


@st.composite
def streams(draw: st.DrawFn) -> list[tuple[str, list[int]]]:
    """Steps: see or plan some rows, release the oldest or the newest batch, undo the newest plan, purge, forget, ..."""
    releases = ["release", "release", "release newest", "undo", "purge"]
    kinds = st.sampled_from(["plan", "plan", "see", "see", "plan seen", "plan seen", "forget", *releases])
    rows = st.lists(st.integers(0, NUM_ROWS - 1), max_size=7) | st.lists(st.integers(0, NUM_ROWS - 1), max_size=16)
    return draw(st.lists(st.tuples(kinds, rows), max_size=40))


@pytest.mark.parametrize("order", ORDERS)
@settings(max_examples=150, deadline=None)
@given(stream=streams())
def test_laws(order: type[EvictionOrder], stream: list[tuple[str, list[int]]]) -> None:
    check_laws(SlotMap(NUM_ROWS, NUM_SLOTS, order(NUM_SLOTS)), stream)


@settings(max_examples=150, deadline=None)
@given(stream=streams())
def test_laws_of_device_slot_map(stream: list[tuple[str, list[int]]]) -> None:
    check_laws(DeviceSlotMapOfRows(NUM_ROWS, NUM_SLOTS, TorchOps()), stream)


@settings(max_examples=15, deadline=None)
@given(stream=streams())
def test_laws_of_device_slot_map_in_triton(stream: list[tuple[str, list[int]]]) -> None:
    check_laws(DeviceSlotMapOfRows(NUM_ROWS, NUM_SLOTS, TritonOps()), stream)


def check_laws(slot_map: SlotMap | DeviceSlotMapOfRows, stream: list[tuple[str, list[int]]]) -> None:
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
            slot_map.forget(seen, torch.tensor(rows, dtype=torch.int64))
            slot_map._forget()  # as the next see() or plan() would
        elif kind.startswith("plan"):
            ids = torch.tensor(rows, dtype=torch.int64)
            row_to_slot = slot_map._row_to_slot.clone()
            held = {slot for slots in in_flight.values() for slot in slots.values()}
            cache_plan = _plan_or_none(slot_map, ids, seen)
            if cache_plan is None:  # refused, and rightly so: no row has moved, and there was no room
                assert torch.equal(row_to_slot, slot_map._row_to_slot)
                assert len(set(rows).union(*in_flight.values())) > NUM_SLOTS
                continue
            newest_plan, before = cache_plan, row_to_slot
            ahead.pop(seen, None)
            assert torch.equal(slot_map.rows_in(newest_plan.slots), ids)
            assert not held & set(newest_plan.victim_slots.tolist())
            assert len(set(newest_plan.miss_slots.tolist())) == newest_plan.miss_slots.numel()
            assert set(newest_plan.unique_slots.tolist()) == set(newest_plan.slots.tolist())
            assert set(newest_plan.victim_slots.tolist()) <= set(newest_plan.miss_slots.tolist())
            in_flight[newest_plan.batch_index] = dict(zip(rows, newest_plan.slots.tolist(), strict=True))
        elif kind == "release" and in_flight:
            slot_map.release(in_flight.popitem(last=False)[0])
        elif kind == "release newest" and in_flight:
            slot_map.release(in_flight.popitem(last=True)[0])
        elif kind == "undo" and newest_plan is not None and newest_plan.batch_index in in_flight:
            slot_map.undo(newest_plan)
            assert torch.equal(before.clamp(min=-1), slot_map._row_to_slot.clamp(min=-1))
            del in_flight[newest_plan.batch_index]
            newest_plan = None
        elif kind == "purge" and not in_flight:
            slot_map.purge()
            assert slot_map.count_resident_rows() == 0
            newest_plan = None
        slot_map.check_integrity()
        if isinstance(slot_map, SlotMap):
            check_uses(slot_map)
        check_uses_ahead(slot_map, ahead)
        for slots in in_flight.values():  # held rows stay where they were promised to be
            for row, slot in slots.items():
                assert int(slot_map.rows_in(torch.tensor([slot]))) == row
    assert (slot_map.num_batches_in_flight == 0) == (len(in_flight) == 0)


def check_uses(slot_map: SlotMap) -> None:
    """Every occupied slot is on the list of its newest batch, once: else it would never be a victim, or be two rows' slot."""
    order = slot_map._eviction_order
    if isinstance(order, LeastRecentlyUsed):
        last_use = slot_map._last_use
        live = [slots[last_use[slots] == batch_index] for batch_index, slots in order._uses]
        occupied = (slot_map._slot_to_row >= 0).nonzero().view(-1).tolist()
        assert sorted(torch.cat(live).tolist() if live else []) == occupied


def test_hits_are_noted_once_when_slots_of_released_batches_are_let_go() -> None:
    slot_map = SlotMap(100, 6, LeastRecentlyUsed(6))
    slot_map.plan(torch.tensor([0, 1]))  # stays in flight while later ones are released
    for rows in ([2, 3], [4, 5]):
        slot_map.release(slot_map.plan(torch.tensor(rows)).batch_index)
    plan = slot_map.plan(torch.tensor([4, 10, 11]))  # a hit, and misses that need what the released ones held
    check_uses(slot_map)
    slot_map.release(1)
    slot_map.release(plan.batch_index)
    slots = slot_map.plan(torch.arange(20, 26)).miss_slots
    assert sorted(slots.tolist()) == list(range(6))
    slot_map.check_integrity()


def check_uses_ahead(slot_map: SlotMap, ahead: dict[int, list[int]]) -> None:
    """Every row, resident or not, knows the batches seen ahead that will use it, and no others."""
    row_to_slot = slot_map._row_to_slot
    slots = row_to_slot.clamp(min=0).long()
    uses = torch.where(row_to_slot < 0, (-1 - row_to_slot) % (1 << WINDOW_BITS), slot_map._uses_ahead[slots])
    expected = [
        sum(1 << (seen % WINDOW_BITS) for seen, rows in ahead.items() if row in rows) for row in range(NUM_ROWS)
    ]
    assert expected == uses.tolist()


def _plan_or_none(slot_map: SlotMap, ids: Tensor, seen: int | None) -> CachePlan | None:
    try:
        return slot_map.plan(ids, seen)
    except SlotsHeldError:
        return None


def test_least_recently_used_is_exact() -> None:
    slot_map = SlotMap(60, 20, LeastRecentlyUsed(20))
    used_at: dict[int, int] = {}  # of resident rows
    num_victims = 0
    for rows in random_rows(num_batches=300, ids_per_batch=9):
        plan = slot_map.plan(rows)
        victims = plan.victim_rows.tolist()
        ages = sorted(batch for row, batch in used_at.items() if row not in rows.tolist())
        assert sorted(used_at[row] for row in victims) == ages[: len(victims)]
        for row in victims:
            del used_at[row]
        used_at |= dict.fromkeys(rows.tolist(), plan.batch_index)
        num_victims += len(victims)
        slot_map.release(plan.batch_index)
    assert num_victims > 500


def test_rows_seen_ahead_stay_and_the_least_often_used_go() -> None:
    slot_map = SlotMap(100, 4)
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
    order = LeastFrequentlyUsed(4, half_life=4)
    slot_map = SlotMap(100, 4, order)
    for _ in range(20):
        slot_map.release(slot_map.plan(torch.tensor([0, 1])).batch_index)
    for _ in range(200):  # float32 would not hold 2 ** 200 / 4 half lives
        slot_map.release(slot_map.plan(torch.tensor([2, 3])).batch_index)
    assert {0, 1} == set(slot_map.plan(torch.tensor([4, 5])).victim_rows.tolist())
    assert order._origin > 0


def test_no_more_batches_are_seen_than_a_row_can_note() -> None:
    slot_map = SlotMap(60, 20)
    rows = torch.tensor([1, 2])
    seen = [slot_map.see(rows) for _ in range(WINDOW_BITS + 2)]
    assert seen[WINDOW_BITS:] == [None, None]
    slot_map.plan(rows, seen[0])
    assert slot_map.see(rows) is not None
    slot_map.check_integrity()


def test_victims_from_a_threshold_are_among_the_least_often_used() -> None:
    num_slots = 4 * SAMPLE_SIZE
    slot_map = SlotMap(2 * num_slots, num_slots)
    rows = torch.randperm(2 * num_slots, generator=torch.Generator().manual_seed(3))
    resident, absent = rows.split(num_slots)
    for num_used in (num_slots, num_slots // 2, num_slots // 4):  # three quarters are used once or twice
        slot_map.release(slot_map.plan(resident[:num_used]).batch_index)
    victims = torch.cat([slot_map.plan(some).victim_rows for some in absent[: num_slots // 2].split(1000)])
    assert set(resident[num_slots // 2 :].tolist()) == set(victims.tolist())


def test_uses_of_long_runs_do_not_pile_up() -> None:
    order = LeastRecentlyUsed(20)
    slot_map = SlotMap(60, 20, order)
    for rows in random_rows(num_batches=500, ids_per_batch=6):
        slot_map.release(slot_map.plan(rows).batch_index)
        assert order._num_uses <= 2 * 20 + 6
    assert sum(slots.numel() for _, slots in order._uses) == order._num_uses
    for _ in range(1000):
        slot_map.release(slot_map.plan(torch.empty(0, dtype=torch.int64)).batch_index)
    assert len(order._uses) < 100


def test_release_is_idempotent_and_takes_any_order() -> None:
    slot_map = SlotMap(60, 20)
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
def test_the_device_chooses_victims_as_well_as_the_host(exponent: float, num_seen_ahead: int) -> None:
    generator = torch.Generator().manual_seed(0)
    num_rows, num_slots, num_batches = 20_000, 3_000, 400
    weights = torch.arange(1, num_rows + 1).float() ** -exponent
    rows = torch.randperm(num_rows, generator=generator)
    batches = [rows[torch.multinomial(weights, 500, replacement=True, generator=generator)] for _ in range(num_batches)]
    num_misses = []
    for slot_map in (SlotMap(num_rows, num_slots), DeviceSlotMapOfRows(num_rows, num_slots, TorchOps())):
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
