# SPDX-License-Identifier: BSD-3-Clause
"""A sharding plan as one HTML file."""

import os

from torchrec_scratchpipe.planning.page import Page
from torchrec_scratchpipe.planning.plot import draw_memory, draw_miss_rates
from torchrec_scratchpipe.planning.report import PlanReport, as_size

__all__ = ["save_plan_page"]

NUM_CURVES = 12


def save_plan_page(report: PlanReport, path: str | os.PathLike[str]) -> None:
    """Write what each table gets, what it will miss, and what other numbers of slots would do.

    Args:
        report: Of :class:`ScratchPipeShardingPlanner`.
        path: Of the HTML file.
    """
    page = Page("Sharding plan")
    page.points([line for line in report.summary() if line])
    page.heading("Memory")
    page.picture(
        "device memory by rank, beside the budget", lambda figure, is_narrow: draw_memory(figure, report, is_narrow)
    )
    page.heading("Misses by slots")
    page.text(
        f"Each curve is a table: what it would miss with other numbers of slots. The point is what was chosen. The "
        f"{NUM_CURVES} tables that travel most are shown."
    )
    page.picture(
        "misses per unique id by load factor, for each table",
        lambda figure, is_narrow: draw_miss_rates(figure, report, NUM_CURVES, is_narrow),
    )
    page.heading("Tables")
    page.table(
        [
            "table",
            "sharding",
            "slots",
            "load factor",
            "table",
            "on the device",
            "unique a step",
            "misses",
            "on the bus",
        ],
        [
            [
                table.name,
                table.sharding_type,
                "whole" if table.sized.is_whole else f"{table.num_slots:,}",
                f"{table.load_factor:.4f}",
                as_size(table.table_bytes),
                as_size(table.device_bytes),
                f"{table.num_unique:,.0f}",
                f"{table.num_misses:,.0f}",
                as_size(table.bus_bytes),
            ]
            for table in report.tables
        ],
    )
    page.save(path)
