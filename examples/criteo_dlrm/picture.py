# SPDX-License-Identifier: BSD-3-Clause
"""Draws the stages of a run: when they ran, how long they took, how much they moved."""

import sys
from collections.abc import Sequence
from typing import Any

from torchrec_scratchpipe import Stage, StageSpan

NUM_PLOTTED_BATCHES = 60
NUM_PLOTTED_AFTER = 15  # batches validated after the last one trained
NUM_TIMELINE_BATCHES = 8
LEAST_WIDTH = 0.004  # of the timeline: what is thinner cannot be seen
STAGES = [Stage.PLAN, Stage.COLLECT, Stage.EXCHANGE, Stage.INSERT, Stage.TRAIN]
COLOURS = ["#4477aa", "#66ccee", "#aa3377", "#ccbb44", "#228833"]
NUMBER_WIDTH = 0.008  # of the timeline, one digit
GREY = "#dddddd"  # validation


def plot(spans_per_pool: Sequence[Sequence[StageSpan]], validated_s: Sequence[tuple[float, float]], path: str) -> None:
    """Draw when the stages ran, how long they took and how much they moved, for the first pool.

    Args:
        spans_per_pool: From `stage_spans`.
        validated_s: From when to when batches were validated, not trained.
        path: Where the picture goes.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    spans = list(spans_per_pool[0]) if spans_per_pool else []
    trained, validated = _batches(spans, validated_s)
    if not trained:
        print("--plot: no batch was trained through a scratchpad, so there are no stages to draw", file=sys.stderr)
        return
    figure, (timeline, times, moved) = plt.subplots(3, 1, figsize=(11, 10), layout="constrained")
    middle = trained[len(trained) // 2 :][:NUM_TIMELINE_BATCHES]
    _draw_timeline(timeline, [span for span in spans if span.batch_index in middle], validated_s)
    shown = [batch for batch in sorted([*trained, *validated]) if batch <= trained[-1] + NUM_PLOTTED_AFTER]
    _draw_times(times, moved, spans, shown[-NUM_PLOTTED_BATCHES:], set(validated))
    times.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _batches(spans: Sequence[StageSpan], validated_s: Sequence[tuple[float, float]]) -> tuple[list[int], list[int]]:
    """Those that were trained, and those that were validated; Train has the forward of both."""
    start_s = {span.batch_index: span.start_s for span in spans if span.stage is Stage.TRAIN}
    validated = {batch for batch, start in start_s.items() if any(first <= start < last for first, last in validated_s)}
    return sorted(start_s.keys() - validated), sorted(validated)


def _draw_timeline(axes: Any, spans: Sequence[StageSpan], validated_s: Sequence[tuple[float, float]]) -> None:
    start_s, end_s = min(span.start_s for span in spans), max(span.end_s for span in spans)
    total_ms = 1e3 * (end_s - start_s)
    least_ms = LEAST_WIDTH * total_ms
    number_end = -total_ms  # of the last one above Plan; after a break batches are planned at once
    for span in sorted(spans, key=lambda span: span.start_s):
        row, number = STAGES.index(span.stage), str(span.batch_index)
        left, width = 1e3 * (span.start_s - start_s), max(1e3 * (span.end_s - span.start_s), least_ms)
        axes.barh(row, width, left=left, color=COLOURS[row])
        middle, room = left + width / 2, NUMBER_WIDTH * (1 + len(number)) * total_ms
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
    axes.set(
        title="Stages of some batches: rows of coming batches travel while earlier ones train",
        xlabel=f"ms; what took less than {least_ms:.2g} ms is drawn as that",
    )


def _draw_times(times: Any, moved: Any, spans: Sequence[StageSpan], shown: Sequence[int], validated: set[int]) -> None:
    for stage, colour in zip(STAGES, COLOURS, strict=True):
        by_batch = {span.batch_index: span for span in spans if span.stage is stage}
        known = [batch for batch in shown if batch in by_batch]
        milliseconds = [1e3 * (by_batch[batch].end_s - by_batch[batch].start_s) for batch in known]
        times.plot(known, milliseconds, color=colour, label=stage.value.capitalize())
        if stage is Stage.INSERT:
            moved.bar(known, [by_batch[batch].num_bytes / 1e6 for batch in known], color=colour)
    for axes in (times, moved):
        label = "validation"
        for batch in sorted(validated.intersection(shown)):
            axes.axvspan(batch - 0.5, batch + 0.5, color=GREY, linewidth=0, zorder=0, label=label)
            label = None  # one entry in the legend
        axes.set_xlim(shown[0] - 0.5, shown[-1] + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
    times.set(title="Time of each stage", xlabel="batch", ylabel="ms", yscale="log")
    moved.set(title="Bytes moved, fill and writeback together", xlabel="batch", ylabel="MB")
