# SPDX-License-Identifier: BSD-3-Clause
"""Each Triton kernel does what its torch twin does, on the same state; interpreted, unless there is a GPU."""

import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from core_helpers import LaunchList, check_ahead
from torch import Tensor

from torchrec_scratchpipe.core import triton_ops
from torchrec_scratchpipe.core.cuda_graph import CudaGraph
from torchrec_scratchpipe.core.slot_map import PoolIds, SlotMap, _make_buffers, _make_order_buffers, _make_scratch
from torchrec_scratchpipe.core.slot_ops import (
    BEING_PLACED,
    FREQUENCY_BINS,
    MAX_SEEN,
    NOT_SEEN,
    NUM_BINS,
    NUM_NOTES,
    NUM_USES,
    Aging,
    Count,
    FeatureIds,
    FeatureRows,
    PlanBuffers,
    PlanRequest,
    ScratchBuffers,
    Sighting,
    SlotMaps,
    SlotOps,
    State,
    TableCounts,
    make_maps,
    use_of,
)
from torchrec_scratchpipe.core.torch_ops import TorchOps, _bins, _notes, frequencies_of_notes, notes_of, rows_of_ids
from torchrec_scratchpipe.core.triton_ops import TritonOps

pytestmark = pytest.mark.any_torchrec

CPU = torch.device("cpu")
OF_AHEAD = ("next_use", "newest_sighting", "sightings")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TABLE_ROWS = [500, 1, 2000]
OTHER_POOL_ROWS = 50
NUM_SLOTS = 300
CAPACITY = 2048
NOW = 40  # the batch that is planned
FIRST_HELD = 38
SIGHTINGS = [Sighting(use_of(NUM_USES - 2 + index), index * CAPACITY) for index in range(4)]  # uses go round


@dataclasses.dataclass
class Case:
    """A scratchpad in mid-run, a batch, and room for its plan."""

    maps: SlotMaps
    buffers: PlanBuffers
    scratch: ScratchBuffers
    tables: TableCounts
    ids: FeatureIds
    features: FeatureRows
    seen: Tensor  # [batches ahead, ids] the rows of each, the batch itself first

    def clone(self) -> "Case":
        def copied(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.clone()
            if isinstance(value, tuple):
                return type(value)(*(part.clone() for part in value))
            return type(value)(**{name: part.clone() for name, part in vars(value).items()})

        return Case(**{name: copied(value) for name, value in vars(self).items()})


def make_case(
    seed: int,
    ids_per_feature: tuple[int, ...] = (300, 40, 0, 20, 500),
    num_resident: int = 280,
    num_listed: int = 60,
    id_dtype: torch.dtype = torch.int64,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    num_rows = sum(TABLE_ROWS)
    offsets = torch.tensor([0, *torch.tensor(TABLE_ROWS).cumsum(0).tolist()])

    def integers(low: int, high: int, size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(low, high, (size,), generator=generator).to(dtype)

    row_to_slot = -1 - integers(0, NUM_NOTES + 1, num_rows)
    slots = torch.randperm(NUM_SLOTS, generator=generator)
    resident = slots[:num_resident]
    rows = torch.randperm(num_rows, generator=generator)[:num_resident]
    row_to_slot[rows] = resident.int()
    maps = make_maps(row_to_slot, NUM_SLOTS, CAPACITY)
    maps.slot_to_row[resident] = rows
    maps.last_use[resident] = integers(1, NOW, num_resident)
    # In the middle of bins and of notes, where a rounding of the logarithm does not matter.
    maps.frequency[resident] = torch.exp2(integers(-40, 40, num_resident).float() / 2 + 0.03)
    free = slots[num_resident:]
    maps.free_slots[: free.numel()] = free.int()
    maps.state[State.NUM_FREE] = free.numel()
    listed = resident[torch.randperm(num_resident, generator=generator)[:num_listed]]
    maps.listed[:num_listed] = listed.int()
    maps.listed_last_use[:num_listed] = maps.last_use[listed]
    maps.state[State.LIST_LENGTH] = num_listed

    table = [0, 2, 1, -1, 2]  # of each feature; the fourth is another pool's
    sizes = [OTHER_POOL_ROWS if index < 0 else TABLE_ROWS[index] for index in table]
    ids = [integers(0, size, count, id_dtype) for size, count in zip(sizes, ids_per_feature, strict=True)]
    bounds = torch.tensor([0, *ids_per_feature]).cumsum(0).to(id_dtype)
    # The batch itself was seen, then others, of the same tables and of random rows.
    maps = dataclasses.replace(maps, sightings=torch.zeros(len(SIGHTINGS) * CAPACITY, dtype=torch.int16))
    features = FeatureRows(offsets[table], torch.tensor(sizes), torch.tensor(table, dtype=torch.int32))
    seen = [FeatureIds(torch.cat(ids), bounds)]
    for _ in SIGHTINGS[1:]:
        others = [integers(0, size, count, id_dtype) for size, count in zip(sizes, ids_per_feature, strict=True)]
        seen.append(FeatureIds(torch.cat(others), bounds))
    for some, sighting in zip(seen, SIGHTINGS, strict=True):
        TorchOps().mark(some, features, maps, sighting, SIGHTINGS[0].use)
    case = Case(
        maps=maps,
        buffers=_make_buffers(CAPACITY, torch.device("cpu")),
        scratch=_make_scratch(CAPACITY, torch.device("cpu")),
        tables=TableCounts(offsets, *torch.zeros(4, len(TABLE_ROWS), dtype=torch.int64), torch.zeros(1).long()),
        ids=FeatureIds(torch.cat(ids), bounds),
        features=features,
        seen=torch.stack([rows_of_ids(some, features) for some in seen]),
    )
    case.buffers.counts.random_(generator=generator)  # whatever an earlier batch left
    for buffer in (case.buffers.rows, case.buffers.slots, case.buffers.miss_rows, case.buffers.victim_rows):
        buffer.fill_(-7)
    return case


def both(case: Case, *operations: Callable[[SlotOps, Case], None]) -> tuple[Case, Case]:
    """What the twin makes of a case, and what the kernels make of it."""
    cases = case.clone(), case.clone()
    for ops, copy in zip((TorchOps(), TritonOps()), cases, strict=True):
        moved = Case(**{name: _to_device(value) for name, value in vars(copy).items()})
        for operation in operations:
            operation(ops, moved)
        for name, value in vars(moved).items():
            setattr(copy, name, _to_device(value, torch.device("cpu")))
    return cases


def _to_device(value: Any, device: torch.device = DEVICE) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return type(value)(*(part.to(device) for part in value))
    return type(value)(
        **{name: part if name.startswith("host_") else part.to(device) for name, part in vars(value).items()}
    )


def request(case: Case) -> PlanRequest:
    return PlanRequest(
        case.ids,
        case.features,
        case.buffers.slots,
        NOW,
        FIRST_HELD,
        SIGHTINGS[0].use,
        SIGHTINGS[0],
        Aging(2.0**1.5, 700.0),
    )


def find(ops: SlotOps, case: Case) -> None:
    ops.prepare(request(case), case.buffers)
    ops.find(request(case), case.maps, case.buffers, case.scratch)


def take(ops: SlotOps, case: Case) -> None:
    ops.take(request(case), case.maps, case.buffers, case.scratch, True)


def take_all(ops: SlotOps, case: Case) -> None:
    ops.take(request(case), case.maps, case.buffers, case.scratch, False)


def scan(ops: SlotOps, case: Case) -> None:
    ops.scan(request(case), case.maps, case.buffers, NUM_SLOTS // 16)


def commit(ops: SlotOps, case: Case) -> None:
    ops.commit(request(case), case.maps, case.buffers, case.scratch, case.tables)


def translate(ops: SlotOps, case: Case) -> None:
    ops.translate(request(case), case.maps, case.buffers, case.tables)


def pairs(*columns: Tensor) -> list[tuple[int, ...]]:
    return sorted(zip(*(column.tolist() for column in columns), strict=True))


def assert_same_maps(twin: SlotMaps, triton: SlotMaps, *names: str) -> None:
    for name in names:
        assert torch.equal(getattr(twin, name), getattr(triton, name)), name


@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("seed", range(3))
def test_find(seed: int, id_dtype: torch.dtype) -> None:
    twin, triton = both(make_case(seed, id_dtype=id_dtype), find)
    assert torch.equal(twin.buffers.counts, triton.buffers.counts)
    num_ids, counts = twin.ids.ids.numel(), twin.buffers.counts
    assert counts[Count.HITS] > 50
    assert counts[Count.MISSES] > 100
    assert torch.equal(twin.buffers.rows[:num_ids], triton.buffers.rows[:num_ids])
    assert int((twin.buffers.rows[:num_ids] == -1).sum()) == 20
    hits, misses = int(counts[Count.HITS]), int(counts[Count.MISSES])
    for case in (twin, triton):
        assert case.scratch.hit_slots[:hits].unique().numel() == hits
    assert pairs(twin.scratch.hit_slots[:hits], twin.scratch.hit_last_use[:hits]) == pairs(
        triton.scratch.hit_slots[:hits], triton.scratch.hit_last_use[:hits]
    )
    assert pairs(twin.buffers.miss_rows[:misses], twin.scratch.miss_known[:misses]) == pairs(
        triton.buffers.miss_rows[:misses], triton.scratch.miss_known[:misses]
    )
    assert_same_maps(twin.maps, triton.maps, "row_to_slot", "last_use", "slot_to_row", *OF_AHEAD)
    assert int((twin.maps.row_to_slot == BEING_PLACED).sum()) == misses


def test_find_names_an_id_out_of_range() -> None:
    for position, bad in ((5, -1), (320, 2000), (859, 1 << 40)):
        case = make_case(0)
        case.ids.ids[position] = bad
        twin, triton = both(case, find, take, scan, take_all, commit, translate)
        for outcome in (twin, triton):
            assert outcome.buffers.counts[Count.BAD_POSITION] == position + 1
            assert outcome.buffers.counts[Count.IS_REFUSED] == 1
            assert outcome.buffers.counts[Count.FILLS] == outcome.buffers.counts[Count.WRITEBACKS] == 0
            assert_same_maps(case.maps, outcome.maps, "row_to_slot", "slot_to_row", "last_use", *OF_AHEAD)
            assert torch.equal(case.maps.frequency, outcome.maps.frequency)
            assert int(outcome.tables.num_unique.sum()) == 0
    case.ids.ids[350] = 1 << 40  # another pool's feature: not ours to judge
    case.ids.ids[859] = 0
    assert both(case, find)[1].buffers.counts[Count.BAD_POSITION] == 0


@pytest.mark.parametrize("num_listed", [0, 60, 280])
@pytest.mark.parametrize("operation", [take, take_all])
def test_take(operation: Callable[[SlotOps, Case], None], num_listed: int) -> None:
    twin, triton = both(make_case(1, num_listed=num_listed), find, operation)
    assert torch.equal(twin.buffers.counts, triton.buffers.counts)
    assert_same_maps(twin.maps, triton.maps, "last_use", "state")
    victims = int(twin.buffers.counts[Count.VICTIMS])
    assert (victims > 0) == (num_listed > 0)
    assert torch.equal(twin.buffers.miss_slots[:victims], triton.buffers.miss_slots[:victims])
    assert torch.equal(twin.scratch.victim_last_use[:victims], triton.scratch.victim_last_use[:victims])


def test_take_in_many_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "LISTED_PER_ROUND", 16)
    case = make_case(1, ids_per_feature=(5, 40, 0, 20, 20), num_resident=300, num_listed=280)
    twin, triton = both(case, find, take)
    assert 16 < twin.maps.state[State.LIST_HEAD] < 280
    assert_same_maps(twin.maps, triton.maps, "last_use", "state")
    assert torch.equal(twin.buffers.counts, triton.buffers.counts)


@pytest.mark.parametrize("seed", range(3))
def test_scan(seed: int) -> None:
    case = make_case(seed, num_listed=0)
    twin, triton = both(case, find, take, scan)
    length = int(twin.maps.state[State.LIST_LENGTH])
    assert 0 < length < NUM_SLOTS
    fields = [State.LIST_HEAD, State.LIST_LENGTH, State.THRESHOLD, State.NUM_BELOW]
    assert torch.equal(twin.maps.state[fields], triton.maps.state[fields])
    assert pairs(twin.maps.listed[:length], twin.maps.listed_last_use[:length]) == pairs(
        triton.maps.listed[:length], triton.maps.listed_last_use[:length]
    )
    assert int(triton.maps.histogram.sum()) == 0  # ready for the next scan


def test_scan_lists_the_best_and_no_more_than_there_is_room_for() -> None:
    case = make_case(3, ids_per_feature=(5, 0, 0, 0, 20), num_resident=300, num_listed=0)
    case.maps.frequency.fill_(1.0)  # one bin
    case.maps.next_use.zero_()
    case.maps = dataclasses.replace(case.maps, listed=torch.zeros(40).int(), listed_last_use=torch.zeros(40).int())
    for outcome in both(case, find, take, scan):
        assert outcome.maps.state[State.LIST_LENGTH] == 40
        assert outcome.maps.listed.unique().numel() == 40
    case.maps.frequency[100:110] = 2.0**-8
    for outcome in both(case, find, take, scan):
        is_held = outcome.maps.last_use[100:110] >= FIRST_HELD
        first = outcome.maps.listed[: int((~is_held).sum())]
        assert set(first.tolist()) == {slot for slot in range(100, 110) if not is_held[slot - 100]}


def test_scan_does_nothing_where_no_slot_is_missing() -> None:
    case = make_case(4, ids_per_feature=(3, 0, 0, 0, 2), num_resident=200)
    for outcome in both(case, find, take, scan):
        assert_same_maps(case.maps, outcome.maps, "listed", "listed_last_use", "state", "histogram")


def test_rows_used_ahead_are_listed_last_and_the_nearest_last_of_all() -> None:
    maps = make_case(0).maps
    bins = _bins(maps, FIRST_HELD, SIGHTINGS[0].use)
    may_go = (maps.last_use >= 0) & (maps.last_use < FIRST_HELD)
    assert torch.equal(bins < NUM_BINS, may_go)
    maps = make_case(0).maps
    maps.last_use.fill_(1)
    for distance in (0, 1, 2, 3, 100, MAX_SEEN - 1):
        maps.next_use.fill_(use_of(NUM_USES - 2 + distance))
        assert set(_bins(maps, FIRST_HELD, use_of(NUM_USES - 2)).tolist()) == {FREQUENCY_BINS + MAX_SEEN - 1 - distance}
    for distance in (-1, -300, MAX_SEEN, 5000):  # uses that are over, and those of batches that are not ahead
        maps.next_use.fill_(use_of(NUM_USES - 2 + distance))
        assert int(_bins(maps, FIRST_HELD, use_of(NUM_USES - 2)).max()) < FREQUENCY_BINS


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("ids_per_feature", "is_refused"), [((60, 20, 0, 20, 50), False), ((300, 40, 0, 20, 500), True)]
)
def test_whole_plan(ids_per_feature: tuple[int, ...], is_refused: bool, seed: int) -> None:
    case = make_case(seed, ids_per_feature)
    case.buffers.counts.zero_()
    twin, triton = both(case, find, take, scan, take_all, commit, translate)
    assert torch.equal(twin.buffers.counts, triton.buffers.counts)
    assert bool(twin.buffers.counts[Count.IS_REFUSED]) == is_refused
    num_ids = case.ids.ids.numel()
    for outcome in (twin, triton):
        maps, counts, buffers = outcome.maps, outcome.buffers.counts, outcome.buffers
        if is_refused:
            assert_same_maps(case.maps, maps, "row_to_slot", "slot_to_row", "last_use", *OF_AHEAD)
            assert int(maps.state[State.NUM_FREE]) == int(case.maps.state[State.NUM_FREE])
            continue
        assert counts[Count.WRITEBACKS] > 0
        assert counts[Count.FROM_FREE] == 20
        rows = buffers.rows[:num_ids]
        is_mine = rows >= 0
        slots = buffers.slots[:num_ids]
        assert torch.equal(maps.slot_to_row[slots[is_mine]], rows[is_mine])
        assert set(slots[~is_mine].tolist()) == {-7}  # the other pool writes them
        resident = (maps.slot_to_row >= 0).nonzero().view(-1)
        assert torch.equal(maps.row_to_slot[maps.slot_to_row[resident]].long(), resident)
        assert int((maps.row_to_slot >= 0).sum()) == resident.numel()
        assert int((maps.row_to_slot == BEING_PLACED).sum()) == 0
        victims = buffers.victim_rows[: int(counts[Count.WRITEBACKS])]
        old_slots = case.maps.row_to_slot[victims].long()
        assert torch.equal(old_slots, buffers.miss_slots[: victims.numel()].long())
        assert int((case.maps.last_use[old_slots] >= FIRST_HELD).sum()) == 0
        known = notes_of(maps.row_to_slot[victims], maps)
        assert torch.equal(known.int(), _notes(case.maps.frequency[old_slots], 700.0))
        misses = buffers.miss_rows[: int(counts[Count.FILLS])]
        known = notes_of(case.maps.row_to_slot[misses], case.maps)
        new_slots = maps.row_to_slot[misses].long()
        expected = frequencies_of_notes(known, 700.0) + 2.0**1.5
        torch.testing.assert_close(maps.frequency[new_slots], expected)
        assert torch.equal(maps.last_use[slots[is_mine]], torch.full_like(slots[is_mine], NOW).int())
        check_ahead(maps, list(zip(case.seen, SIGHTINGS, strict=True))[1:])
    for name, counts in vars(twin.tables).items():
        assert torch.equal(counts, getattr(triton.tables, name)), name
    assert (int(twin.tables.num_ids.sum()) == 130) == (not is_refused)


def test_a_batch_that_was_not_seen_leaves_what_is_ahead() -> None:
    case = make_case(3, ids_per_feature=(60, 20, 0, 20, 50))
    unseen = request(case)._replace(sighting=NOT_SEEN)
    before = list(zip(case.seen, SIGHTINGS, strict=True))
    check_ahead(case.maps, before)

    def plan(ops: SlotOps, copy: Case) -> None:
        asked = unseen._replace(ids=copy.ids, features=copy.features, slots=copy.buffers.slots)
        ops.prepare(asked, copy.buffers)
        for operation in (ops.find, lambda *args: ops.take(*args, True)):
            operation(asked, copy.maps, copy.buffers, copy.scratch)
        ops.scan(asked, copy.maps, copy.buffers, NUM_SLOTS // 16)
        ops.take(asked, copy.maps, copy.buffers, copy.scratch, False)
        ops.commit(asked, copy.maps, copy.buffers, copy.scratch, copy.tables)
        ops.translate(asked, copy.maps, copy.buffers, copy.tables)

    for outcome in both(case, plan):
        maps, buffers = outcome.maps, outcome.buffers
        misses = buffers.miss_rows[: int(buffers.counts[Count.FILLS])]
        assert misses.numel() > 50
        slots = maps.row_to_slot[misses].long()
        is_ahead = torch.isin(misses, case.seen)
        assert is_ahead.all()  # the batch is the first that was seen, under another name
        assert set(maps.next_use[slots].tolist()) == {SIGHTINGS[0].use}
        assert (maps.newest_sighting[slots] >= 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_mark(seed: int) -> None:
    case, another = make_case(seed), make_case(seed + 10)
    another.ids.ids[3] = -5  # left alone
    sighting = Sighting(use_of(NUM_USES + 2), len(SIGHTINGS) * CAPACITY)
    more = torch.zeros(CAPACITY, dtype=torch.int16)
    case.maps = dataclasses.replace(case.maps, sightings=torch.cat([case.maps.sightings, more]))
    case.ids = another.ids
    twin, triton = both(case, lambda ops, c: ops.mark(c.ids, c.features, c.maps, sighting, SIGHTINGS[0].use))
    rows = rows_of_ids(case.ids, case.features)
    assert int(rows[3]) == -1
    for outcome in (twin, triton):
        check_ahead(outcome.maps, [*zip(case.seen, SIGHTINGS, strict=True), (rows, sighting)])
        assert torch.equal(notes_of_absent(case), notes_of_absent(outcome))
    assert torch.equal(twin.maps.next_use, triton.maps.next_use)


def notes_of_absent(case: Case) -> Tensor:
    entries = case.maps.row_to_slot
    return notes_of(entries[entries < 0], case.maps)


@pytest.mark.parametrize(
    "shape_and_dtype",
    [
        ((40, 128), torch.float32),
        ((40, 12), torch.float32),
        ((40, 2500), torch.float32),
        ((40,), torch.float32),
        ((40, 4), torch.float16),
        ((40,), torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_rows", [0, 1, 17])
def test_move(shape_and_dtype: tuple[tuple[int, ...], torch.dtype], num_rows: int) -> None:
    shape, dtype = shape_and_dtype
    generator = torch.Generator().manual_seed(1)
    source = torch.rand(shape, generator=generator).to(dtype)
    source_index = torch.randperm(40, generator=generator)[:20]
    target_index = torch.randperm(40, generator=generator)[:20].int()
    counts = torch.zeros(len(Count), dtype=torch.int64)
    counts[Count.FILLS], counts[Count.WRITEBACKS] = num_rows, 20
    targets = []
    for ops in (TorchOps(), TritonOps()):
        target = torch.zeros(shape, dtype=dtype, device=DEVICE)
        version = target._version
        ops.move(
            source.to(DEVICE),
            source_index.to(DEVICE),
            target,
            target_index.to(DEVICE),
            counts.to(DEVICE),
            Count.FILLS,
        )
        assert target._version == version  # the tables' versions tell who else has written them
        targets.append(target.cpu())
    expected = torch.zeros(shape, dtype=dtype)
    expected[target_index[:num_rows].long()] = source[source_index[:num_rows]]
    assert torch.equal(expected, targets[0])
    assert torch.equal(expected, targets[1])


def test_count_misses() -> None:
    case = make_case(5, (60, 20, 0, 20, 50))
    case.buffers.counts.zero_()
    outcomes = both(case, find, take, scan, take_all, commit, translate)
    for outcome in outcomes:
        rows = outcome.buffers.rows[:150]
        for expected in (0, int((rows == rows[0]).sum())):  # repeated ids miss as often as they are looked up
            for ops in (TorchOps(), TritonOps()):
                num_misses = torch.zeros(1, dtype=torch.int64, device=DEVICE)
                on_device = Case(**{name: _to_device(value) for name, value in vars(outcome).items()})
                ops.prepare(request(on_device), on_device.buffers)
                on_device.buffers.numbers.copy_(on_device.buffers.host_numbers)
                ops.count_misses(request(on_device), on_device.maps, on_device.buffers, num_misses)
                assert int(num_misses) == expected
            outcome.maps.slot_to_row[outcome.buffers.slots[0]] = -1


def test_kernels_compile_for_gpus_and_move_rows_16_bytes_at_a_time() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_kernels.py"
    result = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    kernels = {name for name in vars(triton_ops) if name.endswith("_kernel")}
    by_capability = json.loads(result.stdout)
    assert by_capability.keys() == {"80", "89", "90"}
    for figures in by_capability.values():
        assert figures.keys() == kernels
        for of_wide_rows in figures["_move_kernel"][:2]:
            assert of_wide_rows["ld.global.v4.b32"] == of_wide_rows["st.global.v4.b32"] == 4
        for found in (found for variants in figures.values() for found in variants):
            assert not any("acq_rel" in name for name in found), found
            assert found["spilled_bytes"] == 0
        # Each thread adds what its program has counted of a bin or of a table, instead of one for each slot or row.
        for kernel, most in (("_histogram_kernel", NUM_BINS // 128), ("_commit_kernel", 3)):
            for found in figures[kernel]:
                assert sum(count for name, count in found.items() if name.startswith(("atom", "red"))) <= most


@pytest.mark.parametrize("num_rows", [1, 5, 4096, 4097, 10_000_000])
def test_order_puts_neighbours_beside_each_other(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    capacity, count = 3000, 2500
    rows = torch.randint(0, num_rows, (capacity,), generator=generator)
    slots = torch.randperm(capacity, generator=generator).int()
    counts = torch.zeros(len(Count), dtype=torch.int64)
    counts[Count.WRITEBACKS] = count
    buffers = _make_order_buffers(capacity, DEVICE)
    for _ in range(2):  # its bins are used again
        ordered = TritonOps().order(
            rows.to(DEVICE), slots.to(DEVICE), counts.to(DEVICE), Count.WRITEBACKS, num_rows, buffers
        )
        ordered_rows, ordered_slots = (values[:count].cpu() for values in ordered)
        assert pairs(ordered_rows, ordered_slots) == pairs(rows[:count], slots[:count])
        bin_rows = 1 << max(0, (num_rows - 1).bit_length() - 12)
        assert bool(((ordered_rows // bin_rows).diff() >= 0).all())
    assert num_rows < 2 or not bool(((rows[:count] // bin_rows).diff() >= 0).all())


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted beside a GPU")
def test_recordings_serve_later_batches_and_are_told_apart() -> None:
    """What is recorded depends on nothing but the numbers that :meth:`prepare` writes, and on the key."""
    recorded: list[LaunchList] = []

    def make_graph() -> LaunchList:
        recorded.append(LaunchList())
        return recorded[-1]

    plans = {}
    for ops in (TritonOps(), TritonOps(make_graph)):
        slot_map = SlotMap(200, 60, [0, 200], ops, CPU)
        features = FeatureRows(torch.tensor([0]), torch.tensor([200]), torch.tensor([0], dtype=torch.int32))
        generator = torch.Generator().manual_seed(0)
        outcomes = []
        for index in range(20):
            if index == 12:
                slot_map.grow(80)  # a recording of before has the old maps
            num_ids = 5 + 3 * (index % 12)
            dtype = torch.int32 if index % 4 == 3 else torch.int64
            ids = torch.randint(0, 200, (num_ids,), generator=generator).to(dtype)
            batch = PoolIds(FeatureIds(ids, torch.tensor([0, num_ids])), features)
            slot_map.take_in_releases()
            plan = slot_map.plan(batch)
            assert slot_map.confirm(plan)
            slot_map.count_misses(plan)
            moves = plan.moves()
            outcomes.append((plan.wait(), pairs(moves.miss_rows), pairs(moves.victim_rows)))
            assert torch.equal(slot_map.maps.slot_to_row[plan.slots[:num_ids]], ids.long())
            slot_map.release(plan.batch_index)
        assert int(slot_map.table_counts.num_misses_at_train) == 0
        slot_map.check_integrity()
        plans[ops] = outcomes
    by_launches, by_recordings = plans.values()
    assert by_launches == by_recordings
    assert sum(len(victims) for _, _, victims in by_launches) > 50
    assert len(recorded) == 6  # for ids of 64 and of 32 bits, and the count of misses; before and after the growth


def test_where_nothing_can_be_recorded_launches_go_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    def refuse() -> LaunchList:
        raise OSError("libcuda.so.1: cannot open shared object file")

    ops, num_runs = TritonOps(refuse), []
    buffers = _make_buffers(CAPACITY, CPU)
    for _ in range(4):
        with ops.recorded(buffers, "key") as is_enqueued:
            num_runs.append(1 - is_enqueued)
    assert num_runs == [1] * 4
    assert caplog.text.count("launches cannot be recorded") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_without_a_driver_there_are_no_graphs_and_no_noise() -> None:
    with pytest.raises(OSError, match="libcuda"):
        CudaGraph()
    gc.collect()


def test_graphs_reach_the_driver_as_they_were_asked_for(tmp_path: Path) -> None:
    """Names, types and structs are checked by the C compiler, addresses and numbers by the driver's stub."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library = tmp_path / "libcuda_stub.so"
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    source = Path(__file__).parent / "cuda_stub.c"
    subprocess.run(
        [compiler, "-Wall", "-Werror", "-shared", "-fPIC", f"-I{headers}", "-o", library, source], check=True
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "graph_nodes.py"
    result = subprocess.run([sys.executable, script, library], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    asked = [line for line in lines if "kernel" in line]
    added = [line for line in lines if "kernel" not in line and "grid" in line]
    assert [{name: value for name, value in line.items() if name != "kernel"} for line in asked] == added
    names = [line["kernel"] for line in asked]
    assert names[:2] == ["_begin_kernel", "_find_kernel"]
    assert {"_take_kernel", "_commit_kernel", "_report_kernel", "_move_kernel", "_count_misses_kernel"} <= set(names)
    assert [line for line in lines if "launched_on" in line] == [{"launched_on": 1234}] * 4  # plan, moves, count


@pytest.mark.parametrize("shape", [(0, 128), (0,)])
def test_move_of_a_table_without_rows(shape: tuple[int, ...]) -> None:
    """A rank may have no row of a table that is shorter than the number of ranks; its pool has a slot all the same."""
    table, slots = torch.zeros(shape, device=DEVICE), torch.ones(1, *shape[1:], device=DEVICE)
    counts = torch.zeros(len(Count), dtype=torch.int64, device=DEVICE)
    index = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    TritonOps().move(table, index, slots, index.int(), counts, Count.FILLS)
    TritonOps().move(slots, index.int(), table, index, counts, Count.WRITEBACKS)
    assert bool((slots == 1.0).all())
