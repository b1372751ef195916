# SPDX-License-Identifier: BSD-3-Clause
"""Measures the example and shows what it measured: plan, summary line, picture."""

import resource
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._C._profiler import _ExperimentalConfig
from torchrec.distributed.types import ParameterSharding

from torchrec_scratchpipe import PoolStats, Stage, StageSpan

NUM_WARMUP_STEPS = 5  # not timed: first batches build the input dist and fill an empty scratchpad
NUM_STEPS_BEFORE_TRACE = 50
NUM_TRACED_STEPS = 6
NUM_PLOTTED_BATCHES = 60
NUM_TIMELINE_BATCHES = 8
STAGES = [Stage.PLAN, Stage.COLLECT, Stage.EXCHANGE, Stage.INSERT, Stage.TRAIN]
COLOURS = ["#4477aa", "#66ccee", "#bbbbbb", "#ccbb44", "#228833"]


class Trace:
    """A few steady training steps as a trace for Perfetto: stages, kernels, and what ran beside what.

    Args:
        path: JSON file to write; None for no trace.
        num_steps: That will be trained; a short run is traced from its middle.
    """

    def __init__(self, path: str | None, num_steps: int) -> None:
        self._path = path
        self._profiler: torch.profiler.profile | None = None
        if path is not None:
            wait = min(NUM_STEPS_BEFORE_TRACE, max(0, num_steps // 2 - 1))
            self._profiler = torch.profiler.profile(
                schedule=torch.profiler.schedule(wait=wait, warmup=1, active=NUM_TRACED_STEPS, repeat=1),
                on_trace_ready=self._export,
                experimental_config=_ExperimentalConfig(profile_all_threads=True),  # the stages have one of their own
            )
            self._profiler.start()

    def step(self) -> None:
        """A training step has ended."""
        if self._profiler is not None:
            self._profiler.step()

    def stop(self) -> None:
        """Training has ended; what has been traced is written, if it was not before."""
        if self._profiler is not None:
            self._profiler.stop()

    def _export(self, profiler: "torch.profiler.profile") -> None:
        assert self._path is not None
        Path(self._path).parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(self._path)


class Measurements:
    """Step times and memory of the training loop."""

    def __init__(self) -> None:
        self._step_ms: list[float] = []
        self._peak_anonymous_bytes = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one training step."""
        start = time.perf_counter()
        yield  # no wait for the device: the next step follows at once, and in the long run no step is ahead
        self._step_ms.append(1e3 * (time.perf_counter() - start))
        self._peak_anonymous_bytes = max(self._peak_anonymous_bytes, anonymous_bytes())

    def figures(self, samples_per_step: int) -> dict[str, Any]:
        """Everything measured.

        Args:
            samples_per_step: Over all ranks.

        Returns:
            Step times in ms, samples per second, peak memory in bytes.
        """
        timed = self._step_ms[NUM_WARMUP_STEPS:] or self._step_ms or [float("nan")]  # nothing was left to train
        return {
            "num_train_batches": len(self._step_ms),
            "samples_per_second": 1e3 * samples_per_step * len(timed) / sum(timed),
            "step_ms_p50": statistics.median(timed),
            "step_ms_p90": float(np.percentile(timed, 90)),
            "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "peak_anonymous_bytes": self._peak_anonymous_bytes,
        }


def anonymous_bytes() -> int:
    """Resident memory that is backed by no file; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next((line for line in status.read_text().splitlines() if line.startswith("RssAnon:")), "RssAnon: 0 kB")
    return 1024 * int(line.split()[1])


def print_plan(plan: Mapping[str, ParameterSharding], pools: Sequence[PoolStats]) -> None:
    """Print where every table went.

    Args:
        plan: The sharding plan of the embedding collection.
        pools: This rank's pools.
    """
    local_rows = {table.table_name: table.num_rows for pool in pools for table in pool.tables}
    print(f"{'table':10s} {'sharding':18s} {'compute kernel':18s} {'ranks':10s} {'rows here':>12s}")
    for name, sharding in plan.items():
        ranks = ",".join(map(str, sharding.ranks or []))
        rows = f"{local_rows[name]:,}" if name in local_rows else "-"
        print(f"{name:10s} {sharding.sharding_type:18s} {sharding.compute_kernel:18s} {ranks:10s} {rows:>12s}")
    for pool in pools:
        print(
            f"scratchpad of {len(pool.table_names)} tables: {pool.num_slots:,} slots ({pool.scratchpad_bytes / 1e6:,.1f} "
            f"MB) for {pool.num_rows:,} rows ({pool.table_bytes / 1e6:,.1f} MB), optimizer state included",
            flush=True,
        )


def summary_line(figures: Mapping[str, Any]) -> str:
    """Everything a reader wants to know, in one line.

    Args:
        figures: As written to JSON.

    Returns:
        The line.
    """
    parts = [
        f"auroc {figures['auroc']:.4f}",
        f"logloss {figures['logloss']:.4f}",
        f"{figures['samples_per_second']:,.0f} samples/s",
        f"step P50 {figures['step_ms_p50']:.1f} ms P90 {figures['step_ms_p90']:.1f} ms",
    ]
    if "stock_auroc" in figures:
        parts[0] += f" (plain TorchRec modules: {figures['stock_auroc']:.4f})"
    pools = figures["scratchpad"]
    if pools:
        total = {
            key: sum(pool[key] for pool in pools) for key, value in pools[0].items() if isinstance(value, (int, float))
        }
        per_batch = 1 / max(1, max(pool["num_batches"] for pool in pools))
        parts += [
            f"scratchpad {total['scratchpad_bytes'] / 1e6:,.1f} of {total['table_bytes'] / 1e6:,.1f} MB",
            f"per batch {total['num_unique_ids'] * per_batch:,.0f} unique ids, "
            f"{total['num_unique_misses'] * per_batch:,.0f} misses",
            f"evictions {total['num_victims']:,}",
            f"fill {total['fill_bytes'] / 1e6:,.1f} MB",
            f"writeback {total['writeback_bytes'] / 1e6:,.1f} MB",
            f"stalls {total['num_stalls']} ({total['stall_ms']:,.0f} ms)",
            f"misses at Train {total['num_misses_at_train']}",
        ]
    parts.append(f"peak memory {figures['peak_rss_bytes'] / 1e9:.2f} GB")
    if "verify" in figures:
        verify = figures["verify"]
        parts.append(f"largest difference from stock {verify['max_abs_diff']} after {verify['num_batches']} batches")
    return "summary: " + " | ".join(parts)


def plot(spans_per_pool: Sequence[Sequence[StageSpan]], path: str) -> None:
    """Draw when the stages ran, how long they took and how much they moved, for the first pool.

    Args:
        spans_per_pool: From `stage_spans`.
        path: Where the picture goes.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    spans = list(spans_per_pool[0]) if spans_per_pool else []
    if not spans:
        raise SystemExit("--plot: no scratchpad was used, so there are no stages to draw")
    trained = sorted({span.batch_index for span in spans if span.stage is Stage.TRAIN})
    figure, (timeline, times, moved) = plt.subplots(3, 1, figsize=(11, 10), layout="constrained")
    middle = trained[len(trained) // 2 :][:NUM_TIMELINE_BATCHES]
    _draw_timeline(timeline, [span for span in spans if span.batch_index in middle])
    recent = trained[-NUM_PLOTTED_BATCHES:]
    for stage, colour in zip(STAGES, COLOURS, strict=True):
        by_batch = {span.batch_index: span for span in spans if span.stage is stage}
        shown = [batch for batch in recent if batch in by_batch]
        times.plot(
            shown,
            [1e3 * (by_batch[batch].end_s - by_batch[batch].start_s) for batch in shown],
            color=colour,
            label=stage.value.capitalize(),
        )
        if stage is Stage.INSERT:
            moved.bar(shown, [by_batch[batch].num_bytes / 1e6 for batch in shown], color=colour)
    times.set(title="Time of each stage", xlabel="batch", ylabel="ms", yscale="log")
    times.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    moved.set(title="Bytes moved, fill and writeback together", xlabel="batch", ylabel="MB")
    figure.savefig(path, dpi=120)


def _draw_timeline(axes: Any, spans: Sequence[StageSpan]) -> None:
    start = min(span.start_s for span in spans)
    for span in spans:
        row = STAGES.index(span.stage)
        left, width = 1e3 * (span.start_s - start), 1e3 * (span.end_s - span.start_s)
        axes.barh(row, width, left=left, color=COLOURS[row], edgecolor="white", linewidth=0.5)
        if span.stage is Stage.TRAIN:
            axes.text(left + width / 2, row, str(span.batch_index), ha="center", va="center", color="white")
        elif span.stage is Stage.PLAN:
            axes.text(left, row - 0.5, str(span.batch_index), ha="center", va="bottom", fontsize=8)
    axes.set_yticks(range(len(STAGES)), [stage.value.capitalize() for stage in STAGES])
    axes.invert_yaxis()
    axes.set(title="Stages of some batches: rows of coming batches travel while earlier ones train", xlabel="ms")
