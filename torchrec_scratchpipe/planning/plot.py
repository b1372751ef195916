# SPDX-License-Identifier: BSD-3-Clause
"""Draws a sharding plan: memory per rank, and what each table would miss with other numbers of slots."""

import os
from typing import Any

import numpy as np

from torchrec_scratchpipe.planning.report import GIB, MIB, PlanReport
from torchrec_scratchpipe.planning.reuse import misses_of_pool

__all__ = ["draw_memory", "draw_miss_rates", "draw_plan", "plot_plan"]


def plot_plan(report: PlanReport, path: str | os.PathLike[str], num_tables: int = 12) -> None:
    """Draw memory per rank, and the miss-rate curves of the tables that miss most, with the chosen points.

    Args:
        report: Of :class:`ScratchPipeShardingPlanner`.
        path: Where the picture goes; the ending says what kind.
        num_tables: How many curves.
    """
    draw_plan(report, num_tables).savefig(path, dpi="figure")


def draw_plan(report: PlanReport, num_tables: int) -> Any:
    """What :func:`plot_plan` saves."""
    from matplotlib.figure import Figure  # optional, and slow to import

    figure = Figure(figsize=(13, 5.2), dpi=120, layout="constrained")
    subfigures: Any = figure.subfigures(1, 2)
    left, right = subfigures
    draw_memory(left, report)
    draw_miss_rates(right, report, num_tables)
    return figure


def draw_memory(figure: Any, report: PlanReport, is_narrow: bool = False) -> None:
    """Bars by rank, beside the budget."""
    from matplotlib.ticker import MaxNLocator

    num_ranks = len(report.ranks)
    budgets = np.array([rank.budget_bytes for rank in report.ranks])
    sized, other = (np.array([getattr(rank, f"{kind}_bytes") for rank in report.ranks]) for kind in ("device", "other"))
    highest = max(budgets.max(), (sized + other).max())
    unit, name = (GIB, "GiB") if highest >= 0.1 * GIB else (MIB, "MiB")
    axes = figure.subplots()
    ranks, width = np.arange(num_ranks), 1.0 if num_ranks > 64 else 0.8
    axes.bar(ranks, sized / unit, width=width, label="scratchpads, and tables kept whole by choice")
    if other.any():
        axes.bar(ranks, other / unit, bottom=sized / unit, width=width, label="other tables")
    edges = np.arange(num_ranks + 1) - 0.5
    axes.step(
        edges, np.append(budgets, budgets[-1]) / unit, where="post", color="black", linestyle="--", label="budget"
    )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    axes.set(
        xlim=(-1.5, 1.5) if num_ranks == 1 else (-0.75, num_ranks - 0.25),
        ylim=(0, 1.1 * highest / unit),
        xlabel="rank",
        ylabel=f"device memory ({name})",
        title="Memory per rank",
    )
    if num_ranks == 1:
        axes.set_xticks([0])
    figure.legend(loc="outside lower center", ncols=1 if is_narrow else 3, fontsize=8)


def draw_miss_rates(figure: Any, report: PlanReport, num_tables: int, is_narrow: bool = False) -> None:
    """Curves by table, with the chosen points."""
    from matplotlib import colormaps

    axes = figure.subplots()
    axes.set_prop_cycle(color=colormaps["tab10"](range(10)) if num_tables <= 10 else colormaps["tab20"](range(20)))
    with_slots = [table for table in report.tables if not table.sized.is_whole]
    for table in sorted(with_slots, key=lambda table: -table.bus_bytes)[:num_tables]:
        reuse = table.sized.table.reuse
        slots = np.geomspace(max(1.0, reuse.window(1).mean), reuse.num_rows, 40)
        rates = [reuse.in_second_half(misses_of_pool([reuse], n)[0]) / table.num_unique for n in slots]
        (line,) = axes.plot(slots / reuse.num_rows, rates, linewidth=1, label=table.name)
        axes.plot(table.load_factor, table.num_misses / table.num_unique, "o", color=line.get_color())
    axes.set(xlabel="load factor (slots per row)", ylabel="misses per unique id", title="Miss rates")
    if with_slots:
        axes.set_xscale("log")
        axes.plot([], [], "o", color="grey", label="as planned, with slots shared")
        longest = max(len(table.name) for table in with_slots)
        figure.legend(
            loc="outside lower center", ncols=max(1, min(4, (40 if is_narrow else 90) // (longest + 8))), fontsize=8
        )
    else:
        axes.text(0.5, 0.5, "every table is kept whole", ha="center", transform=axes.transAxes)
