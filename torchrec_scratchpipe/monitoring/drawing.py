# SPDX-License-Identifier: BSD-3-Clause
"""Draws what happened in a run: stages over time, steps and misses over windows, misses by slots."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from torchrec_scratchpipe.core.rows import Stage, StageSpan
from torchrec_scratchpipe.monitoring.window import PoolWindow, StepWindow

__all__ = ["COLOURS", "GREY", "STAGES", "draw_curve", "draw_misses", "draw_steps", "draw_timeline"]

STAGES = [Stage.PLAN, Stage.COLLECT, Stage.EXCHANGE, Stage.INSERT, Stage.TRAIN]
COLOURS = ["#4477aa", "#66ccee", "#aa3377", "#ccbb44", "#228833"]
LEAST_WIDTH = 0.004  # of the timeline: what is thinner cannot be seen
NUMBER_WIDTH = 0.008  # of the timeline, one digit
GREY = "#dddddd"  # validation


def draw_timeline(
    axes: Any, spans: Sequence[StageSpan], validated_s: Sequence[tuple[float, float]] = (), digit_width: float = 1.0
) -> None:
    """When the stages of some batches ran, one stage below the other; numbers are batches.

    `validated_s` says from when to when batches were not trained. `digit_width` is larger where a picture is narrow.
    """
    start_s, end_s = min(span.start_s for span in spans), max(span.end_s for span in spans)
    total_ms = 1e3 * (end_s - start_s)
    least_ms = LEAST_WIDTH * total_ms
    number_end = -total_ms  # of the last one above Plan; after a break batches are planned at once
    for span in sorted(spans, key=lambda span: span.start_s):
        row, number = STAGES.index(span.stage), str(span.batch_index)
        left, width = 1e3 * (span.start_s - start_s), max(1e3 * (span.end_s - span.start_s), least_ms)
        axes.barh(row, width, left=left, color=COLOURS[row])
        middle, room = left + width / 2, NUMBER_WIDTH * digit_width * (1 + len(number)) * total_ms
        if span.stage is Stage.TRAIN and width > room:
            axes.text(middle, row, number, ha="center", va="center", color="white", fontsize=8)
        elif span.stage is Stage.PLAN and middle - room / 2 > number_end:
            axes.text(middle, row - 0.45, number, ha="center", va="bottom", fontsize=8)
            number_end = middle + room / 2
    for first_s, last_s in validated_s:
        if first_s < end_s and last_s > start_s:
            axes.axvspan(1e3 * (first_s - start_s), 1e3 * (last_s - start_s), color=GREY, linewidth=0, zorder=0)
    axes.set_yticks(range(len(STAGES)), [stage.value.capitalize() for stage in STAGES])
    axes.set_ylim(len(STAGES) - 0.5, -1.0)  # from the top down, with room for numbers above Plan
    axes.set_xlim(-0.01 * total_ms, 1.01 * total_ms)
    axes.set_xlabel(f"ms; what took less than {least_ms:.2g} ms is drawn as that")


def draw_steps(axes: Any, windows: Sequence[StepWindow]) -> None:
    """P50 and P99 of the steps, by window."""
    steps = [window.last_step for window in windows]
    axes.plot(steps, [window.step_p50_ms for window in windows], ".-", color=COLOURS[0], label="P50")
    axes.plot(steps, [window.step_p99_ms for window in windows], ".-", color=COLOURS[2], label="P99")
    axes.set(xlabel="step", ylabel="ms of a step", ylim=(0, None))
    axes.legend(frameon=False)


def draw_misses(axes: Any, windows: Sequence[StepWindow], pool_index: int) -> None:
    """Misses of a batch by window, and how many of them are first uses."""
    steps = [window.last_step for window in windows]
    pools = [window.pools[pool_index] for window in windows]
    axes.plot(steps, [pool.misses_per_batch for pool in pools], ".-", color=COLOURS[0], label="misses")
    axes.plot(steps, [pool.first_uses_per_batch for pool in pools], ".-", color=COLOURS[3], label="first uses of a row")
    axes.set(xlabel="step", ylabel="rows a batch", ylim=(0, None))
    axes.legend(frameon=False)


def draw_curve(axes: Any, pool: PoolWindow) -> None:
    """What a batch would miss with other numbers of slots, and where the scratchpad is."""
    curve = pool.curve
    least = max(1.0, curve.num_pinned)
    slots = np.geomspace(least, max(least + 1, min(pool.num_rows, 8 * pool.num_slots)), 100)
    axes.plot(slots / pool.num_rows, [curve.misses_with(number) for number in slots], color=COLOURS[0])
    axes.plot(pool.num_slots / pool.num_rows, curve.num_misses, "o", color=COLOURS[2], label="as it is")
    axes.axvline(
        pool.slots_in_flight_max / pool.num_rows, color="grey", linestyle="--", label="held by batches in flight"
    )
    axes.set(xlabel="load factor (slots per row)", ylabel="misses a batch", xscale="log", ylim=(0, None))
    axes.legend(frameon=False)
