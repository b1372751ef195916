# SPDX-License-Identifier: BSD-3-Clause
"""Draws the stages of a run: when they ran, how long they took, how much they moved."""

import sys
from collections.abc import Sequence
from typing import Any

from torchrec_scratchpipe import Stage, StageSpan
from torchrec_scratchpipe.monitoring.drawing import COLOURS, GREY, STAGES, draw_timeline

NUM_PLOTTED_BATCHES = 60
NUM_PLOTTED_AFTER = 15  # batches validated after the last one trained
NUM_TIMELINE_BATCHES = 8


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
    draw_timeline(timeline, [span for span in spans if span.batch_index in middle], validated_s)
    timeline.set_title("Stages of some batches: rows of coming batches travel while earlier ones train")
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
