# SPDX-License-Identifier: BSD-3-Clause
"""A run as one HTML file."""

import os
from collections.abc import Sequence

from torchrec_scratchpipe.core.rows import Stage, StageSpan
from torchrec_scratchpipe.errors import ConfigError
from torchrec_scratchpipe.monitoring.advice import Advice
from torchrec_scratchpipe.monitoring.drawing import draw_curve, draw_misses, draw_steps, draw_timeline
from torchrec_scratchpipe.monitoring.window import PoolWindow, StepWindow
from torchrec_scratchpipe.planning.page import Page, check_page
from torchrec_scratchpipe.planning.report import as_size

__all__ = ["save_run_page"]

NUM_TIMELINE_BATCHES = 8


def save_run_page(
    windows: Sequence[StepWindow],
    advice: Sequence[Advice],
    spans_per_pool: Sequence[Sequence[StageSpan]],
    path: str | os.PathLike[str],
) -> None:
    """Write what a monitor has counted. Raises ConfigError without a window, or without matplotlib."""
    check_page(path)
    if not windows:
        raise ConfigError(
            f"{path}: no window has ended, so there is nothing to report. Lower `every`, or train longer."
        )
    page, last = Page(f"Run, up to step {windows[-1].last_step:,}"), windows[-1]
    page.points(_summary(last))
    if advice:
        page.heading("Advice")
        page.points([f"{one.pool}: {one.text}" for one in advice])
    page.heading("Time of a step")
    page.picture("P50 and P99 of steps over time", lambda figure, _: draw_steps(figure.subplots(), windows))
    for index, (pool, spans) in enumerate(zip(last.pools, spans_per_pool, strict=True)):
        _add_pool(page, pool, windows, index, spans)
    page.save(path)


def _summary(window: StepWindow) -> list[str]:
    samples = "" if window.samples_per_s is None else f", {window.samples_per_s:,.0f} samples/s"
    device = window.device_memory_bytes
    return [
        f"latest window, {window.num_steps:,} steps: P50 {window.step_p50_ms:.1f} ms, P99 {window.step_p99_ms:.1f} ms"
        f"{samples}",
        f"Train waited for rows {window.stall_share:.1%} of the time",
        f"memory of this process: {as_size(window.host_memory_bytes)}"
        + ("" if device is None else f", and {as_size(device)} on the device"),
    ]


def _add_pool(
    page: Page, pool: PoolWindow, windows: Sequence[StepWindow], index: int, spans: Sequence[StageSpan]
) -> None:
    page.heading(pool.name[0].upper() + pool.name[1:])
    page.points(
        [
            f"{pool.num_slots:,} slots for {pool.num_rows:,} rows, {as_size(pool.scratchpad_bytes)}; batches in flight "
            f"held {pool.slots_in_flight_p50 / pool.num_slots:.0%} of them, at most "
            f"{pool.slots_in_flight_max / pool.num_slots:.0%}",
            f"{pool.misses_per_batch:,.0f} misses a batch, {pool.miss_share:.1%} of its unique ids; "
            f"{pool.first_uses_per_batch:,.0f} are first uses of a row",
            f"bus: {pool.fill_bus_share:.1%} of its time to the device, {pool.writeback_bus_share:.1%} back",
        ]
    )
    recent = [window for window in windows if len(window.pools) > index]
    page.picture("misses of a batch over time", lambda figure, _: draw_misses(figure.subplots(), recent, index))
    page.text(
        "Misses by slots, as the scratchpad's own counts foretell them. More slots are to the right; no number of them "
        "saves first uses."
    )
    page.picture(
        "misses by load factor, with the point of this run", lambda figure, _: draw_curve(figure.subplots(), pool)
    )
    shown = _some_batches(spans)
    if shown:
        page.text("Stages of some batches: rows of coming batches travel while earlier ones train.")
        page.picture(
            "when the stages of some batches ran",
            lambda figure, is_narrow: draw_timeline(figure.subplots(), shown, digit_width=2.5 if is_narrow else 1.0),
        )
    page.table(
        ["table", "ids", "unique ids", "misses", "of unique", "evicted"],
        [
            [
                table.table_name,
                f"{table.num_ids:,}",
                f"{table.num_unique_ids:,}",
                f"{table.num_unique_misses:,}",
                f"{table.miss_share:.1%}",
                f"{table.num_victims:,}",
            ]
            for table in pool.tables
        ],
    )


def _some_batches(spans: Sequence[StageSpan]) -> list[StageSpan]:
    """All stages of some batches in the middle of those that are known: the ends of a run are not typical."""
    trained = sorted({span.batch_index for span in spans if span.stage is Stage.TRAIN})
    shown = trained[len(trained) // 2 :][:NUM_TIMELINE_BATCHES]
    return [span for span in spans if span.batch_index in shown]
