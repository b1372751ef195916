# SPDX-License-Identifier: BSD-3-Clause
"""The report says what more memory would save; the picture can be read."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.types import CacheParams
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_scratchpipe import (
    PlanReport,
    ScratchPipeEmbeddingBagCollectionSharder,
    ScratchPipeShardingPlanner,
    WorkingSets,
    measure_working_set,
    plot_plan,
    zipf_working_sets,
)
from torchrec_scratchpipe.planning.plot import draw_plan

SHARDERS: list[Any] = [ScratchPipeEmbeddingBagCollectionSharder()]
SIZES = (40_000, 30_000, 5_000, 50)
MIB = 1024**2


def bags(sizes: tuple[int, ...] = SIZES, prefix: str = "t") -> EmbeddingBagCollection:
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name=f"{prefix}{i}", num_embeddings=size, embedding_dim=16, feature_names=[f"f{i}"])
            for i, size in enumerate(sizes)
        ],
        device=torch.device("meta"),
    )


@pytest.fixture(scope="module")
def measured() -> WorkingSets:
    """Of a short job, whose rows are new to the last batch."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(40):
        ids = [(torch.rand(128, generator=generator) ** 4 * size).long() for size in SIZES]
        keys, lengths = [f"f{i}" for i in range(len(SIZES))], torch.ones(128 * len(SIZES), dtype=torch.int64)
        batches.append(KeyedJaggedTensor(keys=keys, values=torch.cat(ids), lengths=lengths))
    return measure_working_set(batches, bags())


def plan(working_sets: WorkingSets, num_bytes: float, **kwargs: Any) -> PlanReport:
    planner = ScratchPipeShardingPlanner(
        topology=Topology(world_size=1, compute_device="cpu"),
        working_sets=working_sets,
        scratchpad_bytes=int(num_bytes),
        debug=False,
        **kwargs,
    )
    planner.plan(bags(), SHARDERS)
    assert planner.report is not None
    return planner.report


def plan_of_gpus(num_ranks: int, model: EmbeddingBagCollection, hbm: int, **kwargs: Any) -> PlanReport:
    tables = model.embedding_bag_configs()
    planner = ScratchPipeShardingPlanner(
        topology=Topology(
            world_size=num_ranks, local_world_size=min(8, num_ranks), compute_device="cuda", hbm_cap=hbm, ddr_cap=10**11
        ),
        working_sets=zipf_working_sets(tables, {table.name: 128 for table in tables}, 1.05, batch_size=128),
        storage_reservation=FixedPercentageStorageReservation(0.0),
        debug=False,
        **kwargs,
    )
    planner.plan(model, SHARDERS)
    assert planner.report is not None
    return planner.report


def test_it_says_how_many_misses_are_first_uses(measured: WorkingSets) -> None:
    report = plan(measured, 0.7 * MIB)
    (line,) = [line for line in str(report).splitlines() if line.startswith("misses per step")]
    misses, first_uses = (float(number) for number in re.findall(r"(\d+)[, ]", line))
    with_slots = [table for table in report.tables if not table.sized.is_whole]
    for table in with_slots:
        bins = measured[table.name].reuse.first_uses
        assert table.num_first_uses == pytest.approx(measured[table.name].in_second_half(bins))
    assert misses == round(sum(table.num_misses for table in with_slots))
    assert 0 < first_uses == round(sum(table.num_first_uses for table in with_slots)) < misses
    assert "unused" not in str(report)


def test_memory_that_is_left_over_is_explained_and_the_way_to_use_it_is_right(measured: WorkingSets) -> None:
    budget = 1.6 * MIB
    report = plan(measured, budget)
    (line,) = [line for line in str(report).splitlines() if line.startswith("unused memory per rank")]
    found = re.search(
        r"more slots would save no misses; with at most (.*) MiB more, table (\w+) could be kept whole", line
    )
    assert found is not None, line
    more, name = float(found[1]) * MIB, found[2]
    whole = {table.name: table.sized.is_whole for table in report.tables}
    assert not whole[name]
    with_less = {table.name: table.sized for table in plan(measured, budget + 0.5 * more).tables}
    with_more = {table.name: table.sized for table in plan(measured, budget + 1.02 * more).tables}
    assert not with_less[name].is_whole
    assert [table.num_slots for table in with_less.values()] == [table.sized.num_slots for table in report.tables]
    assert with_more[name].is_whole


def test_memory_that_constraints_leave_over_is_explained(measured: WorkingSets) -> None:
    fixed = {f"t{i}": ParameterConstraints(cache_params=CacheParams(load_factor=0.05)) for i in (0, 1)}
    assert "constraints fix the slots of t0, t1" in str(plan(measured, 4 * MIB, constraints=fixed))


def test_memory_that_is_left_over_when_all_is_kept_whole_is_explained(measured: WorkingSets) -> None:
    text = str(plan(measured, 100 * MIB))
    assert "unused memory per rank" in text
    assert "every table is kept whole" in text
    assert "misses per step: " not in text


def test_memory_that_one_rank_alone_has_left_is_explained() -> None:
    text = str(plan_of_gpus(8, bags((400_000, 300_000, 50_000, 500)), 3_500_000, constraints=None))
    assert "unused memory per rank" in text
    assert "other ranks, which share tables with these, have no more" in text


PICTURES = {
    "one rank": lambda: plan_of_gpus(1, bags(), 1_000_000),
    "two ranks": lambda: plan_of_gpus(2, bags(), 1_000_000),
    "128 ranks": lambda: plan_of_gpus(128, bags((10**6, 10**6)), 7_000_000),
    "other tables": lambda: plan_of_gpus(
        2, bags(), 2_500_000, constraints={"t2": ParameterConstraints(compute_kernels=["fused"])}
    ),
    "many long names": lambda: plan_of_gpus(1, bags((20_000,) * 30, "a_table_with_a_rather_long_name_"), 8_000_000),
    "all whole": lambda: plan_of_gpus(1, bags(), 10**9),
}


@pytest.mark.parametrize("make_report", PICTURES.values(), ids=PICTURES)
def test_nothing_in_the_picture_covers_anything_else(make_report: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plot_plan draws with matplotlib")
    report = make_report()
    figure = draw_plan(report, num_tables=12)
    figure.savefig(tmp_path / "as_drawn.png", dpi="figure")
    legends = [legend for part in figure.subfigs for legend in part.legends]
    (memory, rates) = (part.axes[0] for part in figure.subfigs)
    texts = [text for axes in (memory, rates) for text in (axes.title, axes.xaxis.label, axes.yaxis.label)]
    boxes = [it.get_window_extent() for it in [*legends, *texts, memory.patch, rates.patch]]
    for index, box in enumerate(boxes):
        assert figure.bbox.contains(box.x0, box.y0)
        assert figure.bbox.contains(box.x1, box.y1)
        assert not any(box.overlaps(other) for other in boxes[:index])
    assert len(legends) == (1 if all(table.sized.is_whole for table in report.tables) else 2)
    ticks = [tick for tick in memory.get_xticks() if memory.get_xlim()[0] <= tick <= memory.get_xlim()[1]]
    assert ticks
    assert all(tick == int(tick) and 0 <= tick < len(report.ranks) for tick in ticks)
    highest = max(max(line.get_ydata()) for line in memory.lines)
    assert highest < 0.95 * memory.get_ylim()[1], "the budget is seen"


def test_the_unit_of_the_picture_fits_the_memory() -> None:
    pytest.importorskip("matplotlib", reason="plot_plan draws with matplotlib")
    for hbm, unit in ((1_000_000, "MiB"), (10**9, "GiB")):
        report = plan_of_gpus(1, bags(), hbm)
        axes = draw_plan(report, 12).subfigs[0].axes[0]
        assert axes.get_ylabel() == f"device memory ({unit})"
        budget = report.ranks[0].budget_bytes / (MIB if unit == "MiB" else 1024**3)
        assert max(axes.lines[0].get_ydata()) == pytest.approx(budget)


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_pictures_of_any_kind_are_written(ending: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plot_plan draws with matplotlib")
    plot_plan(plan_of_gpus(1, bags(), 1_000_000), tmp_path / f"plan.{ending}")
    assert (tmp_path / f"plan.{ending}").stat().st_size > 5_000
