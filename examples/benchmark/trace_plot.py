# SPDX-License-Identifier: BSD-3-Clause
"""Draws what ran beside what, from a trace of torch.profiler.

    python examples/benchmark/trace_plot.py trace.json trace.png

One row per stream of the device, or, without a device, per thread; one colour per kind of work. Traces open in Perfetto
too.
"""

import gzip
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

# By what a kernel's or range's name contains; the first that fits.
KINDS = {
    "scratchpipe plan": "plan",
    "_find_kernel": "plan",
    "_mark_kernel": "plan",
    "_take_kernel": "plan",
    "_histogram_kernel": "plan",
    "_threshold_kernel": "plan",
    "_list_kernel": "plan",
    "_commit_kernel": "plan",
    "_translate_kernel": "plan",
    "scratchpipe collect": "collect",
    "scratchpipe exchange": "exchange",
    "scratchpipe insert": "insert",
    "_move_kernel": "move rows",
    "## forward": "forward",
    "## backward": "backward",
    "## optimizer": "optimizer",
    "embedding": "embedding",
    "Memcpy": "copy",
}


def import_pyplot() -> Any:
    """Matplotlib's, for files; None, with a word about it, where it is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("no plots: matplotlib is not installed")
        return None
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


class Span(NamedTuple):
    """One kernel, or one named range."""

    row: str
    kind: str
    start_ms: float
    duration_ms: float


def read_spans(path: Path) -> list[Span]:
    """Kernels and copies by stream; without any, named ranges by thread.

    Args:
        path: A trace, may be gzipped.

    Returns:
        In order of time, from 0.
    """
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    events = [event for event in json.loads(text)["traceEvents"] if event.get("ph") == "X"]
    on_device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    chosen = on_device or [event for event in events if event.get("cat") == "user_annotation"]
    spans = [_span(event, is_on_device=bool(on_device)) for event in chosen]
    if not on_device:
        spans = [span for span in spans if span.kind != "other"]
    first = min((span.start_ms for span in spans), default=0.0)
    return sorted((span._replace(start_ms=span.start_ms - first) for span in spans), key=lambda span: span.start_ms)


def stage_times(path: Path) -> dict[str, float]:
    """Milliseconds of each kind of work in a trace, all steps together.

    Args:
        path: As for :func:`read_spans`.

    Returns:
        By kind; on a device, moved rows are told apart by stream.
    """
    times: dict[str, float] = defaultdict(float)
    for span in read_spans(path):
        times[f"{span.kind} on {span.row}" if span.kind == "move rows" else span.kind] += span.duration_ms
    return dict(times)


def plot_trace(path: Path, picture: Path, window_ms: float | None = None) -> None:
    """Draw the middle of a trace.

    Args:
        path: As for :func:`read_spans`.
        picture: PNG to write.
        window_ms: How much of it; by default a third.
    """
    plt = import_pyplot()
    if plt is None:
        return
    colours = dict(zip(dict.fromkeys([*KINDS.values(), "other"]), plt.get_cmap("tab20").colors, strict=False))
    spans = read_spans(path)
    end = max((span.start_ms + span.duration_ms for span in spans), default=1.0)
    window = window_ms or end / 3
    left = (end - window) / 2
    rows = sorted({span.row for span in spans})
    fig, ax = plt.subplots(figsize=(12, 1.2 + 0.6 * len(rows)), layout="constrained")
    for kind in colours:
        for index, row in enumerate(rows):
            bars = [(span.start_ms, span.duration_ms) for span in spans if (span.row, span.kind) == (row, kind)]
            if bars:
                ax.broken_barh(bars, (index - 0.4, 0.8), color=colours[kind], label=kind)
    labels = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    ax.legend(
        labels.values(), labels.keys(), ncol=len(labels), loc="upper center", bbox_to_anchor=(0.5, 1.3), fontsize=8
    )
    ax.set_xlim(left, left + window)
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xlabel("ms")
    fig.savefig(picture, dpi=130)
    plt.close(fig)


def _span(event: dict[str, Any], *, is_on_device: bool) -> Span:
    name = event["name"]
    kind = next((kind for part, kind in KINDS.items() if part in name), "other")
    row = f"stream {event['args'].get('stream')}" if is_on_device else f"thread {event['tid']}"
    return Span(row, kind, event["ts"] / 1e3, event.get("dur", 0) / 1e3)


if __name__ == "__main__":
    plot_trace(Path(sys.argv[1]), Path(sys.argv[2]))
    for kind, milliseconds in stage_times(Path(sys.argv[1])).items():
        print(f"{kind:30s} {milliseconds:8.2f} ms")
