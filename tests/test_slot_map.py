# SPDX-License-Identifier: BSD-3-Clause
"""The laws of the slot map, over random streams of batches and releases."""

from collections import OrderedDict

import pytest
import torch
from core_helpers import MostRecentlyUsed, RandomOrder, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchrec_scratchpipe.slot_map import EvictionOrder, LeastRecentlyUsed, SlotMap, SlotsHeldError
from torchrec_scratchpipe.types import CachePlan

NUM_ROWS, NUM_SLOTS = 30, 12
ORDERS = [LeastRecentlyUsed, RandomOrder, MostRecentlyUsed]


@st.composite
def streams(draw: st.DrawFn) -> list[tuple[str, list[int]]]:
    """Steps: plan some rows, release the oldest or the newest batch, undo the newest plan, purge."""
    kinds = st.sampled_from(["plan", "plan", "plan", "release", "release", "release newest", "undo", "purge"])
    rows = st.lists(st.integers(0, NUM_ROWS - 1), max_size=7) | st.lists(st.integers(0, NUM_ROWS - 1), max_size=16)
    return draw(st.lists(st.tuples(kinds, rows), max_size=40))


@pytest.mark.parametrize("order", ORDERS)
@settings(max_examples=150, deadline=None)
@given(stream=streams())
def test_laws(order: type[EvictionOrder], stream: list[tuple[str, list[int]]]) -> None:
    slot_map = SlotMap(NUM_ROWS, NUM_SLOTS, order(NUM_SLOTS))
    in_flight: OrderedDict[int, dict[int, int]] = OrderedDict()
    newest_plan = None
    for kind, rows in stream:
        if kind == "plan":
            ids = torch.tensor(rows, dtype=torch.int64)
            row_to_slot = slot_map._row_to_slot.clone()
            held = {slot for slots in in_flight.values() for slot in slots.values()}
            cache_plan = _plan_or_none(slot_map, ids)
            if cache_plan is None:  # refused, and rightly so: no row has moved, and there was no room
                assert torch.equal(row_to_slot, slot_map._row_to_slot)
                assert len(set(rows).union(*in_flight.values())) > NUM_SLOTS
                continue
            newest_plan, before = cache_plan, row_to_slot
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
            assert torch.equal(before, slot_map._row_to_slot)
            del in_flight[newest_plan.batch_index]
            newest_plan = None
        elif kind == "purge" and not in_flight:
            slot_map.purge()
            assert slot_map.num_resident_rows == 0
            newest_plan = None
        slot_map.check_integrity()
        check_uses(slot_map)
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
    slot_map = SlotMap(100, 6)
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


def _plan_or_none(slot_map: SlotMap, ids: Tensor) -> CachePlan | None:
    try:
        return slot_map.plan(ids)
    except SlotsHeldError:
        return None


def test_least_recently_used_is_exact() -> None:
    slot_map = SlotMap(60, 20)
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
