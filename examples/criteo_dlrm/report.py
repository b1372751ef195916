# SPDX-License-Identifier: BSD-3-Clause
"""Measures the example and shows what it measured: plan, summary line."""

import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch._C._profiler import _ExperimentalConfig
from torchrec.distributed.types import ParameterSharding

from torchrec_scratchpipe import PlanReport, PoolStats

NUM_WARMUP_STEPS = 5  # not timed: first batches build the input dist and fill an empty scratchpad
NUM_STEPS_BEFORE_TRACE = 50
NUM_TRACED_STEPS = 6


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
            Step times in ms, samples per second, peak memory in bytes; None where nothing was left to train.
        """
        timed = self._step_ms[NUM_WARMUP_STEPS:] or self._step_ms
        return {
            "num_train_batches": len(self._step_ms),
            "samples_per_second": 1e3 * samples_per_step * len(timed) / sum(timed) if timed else None,
            "step_ms_p50": statistics.median(timed) if timed else None,
            "step_ms_p90": float(np.percentile(timed, 90)) if timed else None,
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


class ScratchpadCounts:
    """Unique ids and misses of training batches, over parts of the run.

    A batch is counted when it is planned, some batches ahead of Train; so a reading says how many batches it is of, and
    is taken when so many are planned. What validation counts is taken off.

    Args:
        read: Statistics of this rank's pools, of batches whose planning has ended.
        ends: Where the parts begin and end, in training batches of this run.
        lookahead: Batches planned ahead.
    """

    def __init__(self, read: Callable[[], list[PoolStats]], ends: Iterable[int], lookahead: int) -> None:
        self._read = read
        self._lookahead = lookahead
        self._of_validation = np.zeros((), dtype=np.int64)
        self._at = {0: self._now()}
        self._due = sorted(set(ends) - {0})

    def step_done(self, num_steps: int) -> None:
        """Take the readings that are due.

        Args:
            num_steps: Batches that this run has trained.
        """
        while self._due and num_steps + self._lookahead >= self._due[0]:
            counts = self._now() - self._of_validation
            if num_steps < self._due[0] and counts.size and counts[:, 0].min() < self._due[0]:
                return  # before a validation, batches are not planned so far ahead
            self._at[self._due.pop(0)] = counts

    @contextmanager
    def validation(self) -> Iterator[None]:
        """While entered, batches are not of training; no batch may be in flight before and after."""
        before = self._now()
        yield
        self._of_validation = self._of_validation + self._now() - before

    def between(self, first: int, last: int) -> dict[str, float] | None:
        """Means per training batch over one part of the run.

        Args:
            first: Where it begins, as given at first.
            last: Where it ends.

        Returns:
            From which batch to which (counted from 1, both included), unique ids and misses; None if nothing was
            counted.
        """
        if last not in self._at or first not in self._at:
            return None
        counted = self._at[last] - self._at[first]  # [pools, 3]
        if not counted.size or not counted[:, 0].all():
            return None
        unique_ids, misses = (counted[:, 1:] / counted[:, :1]).sum(0).tolist()
        first_batch, last_batch = int(self._at[first][0, 0]) + 1, int(self._at[last][0, 0])
        return {"first_batch": first_batch, "last_batch": last_batch, "unique_ids": unique_ids, "misses": misses}

    def _now(self) -> npt.NDArray[np.int64]:
        counts = [(pool.num_batches, pool.num_unique_ids, pool.num_unique_misses) for pool in self._read()]
        return np.array(counts, dtype=np.int64)


def planned_part(report: PlanReport | None, num_batches: int) -> tuple[int, int] | None:
    """Which batches the plan's misses are those of: the later half of the measured ones.

    Args:
        report: The planner's.
        num_batches: That will be trained from the first one on.

    Returns:
        As `[first, last)`; None without a plan, or if training does not come so far.
    """
    if report is None:
        return None
    sizes = report.tables[0].sized.table.reuse.bin_sizes
    first, last = int(sizes[: len(sizes) // 2].sum()), int(sizes.sum())
    return (first, last) if last <= num_batches else None


def print_plan(
    plan: Mapping[str, ParameterSharding], pools: Sequence[PoolStats], report: PlanReport | None, is_long: bool
) -> None:
    """Print what the scratchpads got.

    Args:
        plan: The sharding plan of the embedding collection.
        pools: This rank's pools.
        report: The planner's, for a budget.
        is_long: Print every table, too.
    """
    if report is not None:
        print(report if is_long else str(report).rpartition("\n\n")[2])
    if is_long:
        _print_tables(plan, pools)
    for pool in pools:
        print(
            f"scratchpad of {len(pool.table_names)} tables: {pool.num_slots:,} slots "
            f"({pool.scratchpad_bytes / 1e6:,.1f} MB) for {pool.num_rows:,} rows ({pool.table_bytes / 1e6:,.1f} MB), "
            "optimizer state included",
            flush=True,
        )


def _print_tables(plan: Mapping[str, ParameterSharding], pools: Sequence[PoolStats]) -> None:
    local_rows = {table.table_name: table.num_rows for pool in pools for table in pool.tables}
    print(f"{'table':10s} {'sharding':18s} {'compute kernel':18s} {'ranks':10s} {'rows here':>12s}")
    for name, sharding in plan.items():
        ranks = ",".join(map(str, sharding.ranks or []))
        rows = f"{local_rows[name]:,}" if name in local_rows else "-"
        print(f"{name:10s} {sharding.sharding_type:18s} {sharding.compute_kernel:18s} {ranks:10s} {rows:>12s}")


def summary_line(figures: Mapping[str, Any]) -> str:
    """Everything a reader wants to know, in one line.

    Args:
        figures: As written to JSON.

    Returns:
        The line.
    """
    parts = [*_of_quality(figures), *_of_speed(figures)]
    if figures["scratchpad"]:
        parts += _of_scratchpad(figures)
    parts.append(f"peak memory {figures['peak_rss_bytes'] / 1e9:.2f} GB")
    if "privacy" in figures:
        parts.append(_of_privacy(figures["privacy"]))
    if "verify" in figures:
        verify = figures["verify"]
        parts.append(f"largest difference from stock {verify['max_abs_diff']} after {verify['num_batches']} batches")
    return "summary: " + " | ".join(parts)


def _of_privacy(privacy: Mapping[str, Any]) -> str:
    if privacy["epsilon"] is None:
        return "epsilon unknown: batches are no Poisson samples"
    return f"epsilon {privacy['epsilon']:.3g} at delta {privacy['delta']:.3g}"


def _of_quality(figures: Mapping[str, Any]) -> list[str]:
    if figures["auroc"] is None:
        return ["not validated"]
    stock = f" (plain TorchRec modules: {figures['stock_auroc']:.4f})" if "stock_auroc" in figures else ""
    return [f"auroc {figures['auroc']:.4f}{stock}", f"logloss {figures['logloss']:.4f}"]


def _of_speed(figures: Mapping[str, Any]) -> list[str]:
    if not figures["num_train_batches"]:
        return ["nothing was left to train"]
    return [
        f"{figures['samples_per_second']:,.0f} samples/s",
        f"step P50 {figures['step_ms_p50']:.1f} ms P90 {figures['step_ms_p90']:.1f} ms",
    ]


def _of_scratchpad(figures: Mapping[str, Any]) -> list[str]:
    pools = figures["scratchpad"]
    total = {
        key: sum(pool[key] for pool in pools) for key, value in pools[0].items() if isinstance(value, (int, float))
    }
    parts = [f"scratchpad {total['scratchpad_bytes'] / 1e6:,.1f} of {total['table_bytes'] / 1e6:,.1f} MB"]
    half, misses = figures["later_half"], figures.get("misses_per_batch")
    if half is not None:
        parts.append(f"per batch of the later half {half['unique_ids']:,.0f} unique ids, {half['misses']:,.0f} misses")
    if misses is not None:
        first_batch, last_batch = misses["first_batch"], misses["last_batch"]
        parts.append(
            f"misses per batch from {first_batch} to {last_batch}: planned {misses['planned']:,.1f}, counted "
            f"{misses['counted']:,.1f}"
        )
    if total["num_rows_reset"]:
        parts.append(f"rows given to other values {total['num_rows_reset']:,}")
    if num_reads := total["num_disk_pages_read"]:
        parts.append(
            f"from the disk {total['num_disk_rows_read']:,} rows by {num_reads:,} reads, "
            f"{1 - total['num_cold_pages_at_collect'] / num_reads:.1%} of them ahead of need, "
            f"{total['disk_bytes_written'] / 1e6:,.1f} MB to it"
        )
    return [
        *parts,
        f"evictions {total['num_victims']:,}",
        f"fill {total['fill_bytes'] / 1e6:,.1f} MB",
        f"writeback {total['writeback_bytes'] / 1e6:,.1f} MB",
        f"stalls {total['num_stalls']} ({total['stall_ms']:,.0f} ms)",
        f"misses at Train {total['num_misses_at_train']}",
    ]
