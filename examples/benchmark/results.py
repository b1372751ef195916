# SPDX-License-Identifier: BSD-3-Clause
"""Writes what the benchmark measured: JSON, a Markdown table, plots."""

import dataclasses
import json
import os
import platform
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trace_plot import import_pyplot


@dataclass
class Figures:
    """One contender at one point of the grid; counts and bytes are per batch."""

    cache: str
    title: str
    workload: dict[str, Any]
    zipf: float
    load_factor: float
    optimizer: str
    lookahead: int | None
    step_ms: float  # median of blocks
    step_ms_of_blocks: list[float]
    ratio_to_fused: float | None
    last_loss: float  # of a measured step, the same one for all
    peak_device_bytes: int | None
    unique_rows: float | None = None
    misses: float | None = None
    victims: float | None = None
    misses_at_train: int | None = None
    stalls: float | None = None
    fill_bytes: float | None = None
    writeback_bytes: float | None = None
    bus_ms: float | None = None  # the larger of both over the bandwidth of a plain copy
    floor_ms: float | None = None  # no scratchpad can be faster: the step of fused, or the bus
    stage_ms: dict[str, float] | None = None
    traced_ms: dict[str, float] | None = None
    scratchpad: list[dict[str, Any]] | None = None  # statistics of each pool since construction

    @property
    def point(self) -> tuple[Any, ...]:
        """Of the grid."""
        return self.workload["name"], self.optimizer, self.load_factor, self.zipf

    @property
    def spread_ms(self) -> tuple[float, float]:
        """P10 and P90 of the blocks."""
        low, high = np.percentile(self.step_ms_of_blocks, [10, 90])
        return float(low), float(high)

    def line(self) -> str:
        """For the terminal."""
        low, high = self.spread_ms
        text = f"  {self.cache:22s} {self.step_ms:8.1f} ms ({low:.1f} to {high:.1f})"
        if self.ratio_to_fused is not None:
            text += f"  ratio_to_fused {self.ratio_to_fused:.3f}"
        if self.misses is not None:
            text += f"  misses {self.misses:,.0f} of {self.unique_rows:,.0f}, at Train {self.misses_at_train}"
        return text


def machine(device: torch.device) -> dict[str, Any]:
    """Where it ran, and with what."""
    versions = {}
    for package in ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "triton", "torchrec-scratchpipe"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    name = _processor()
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name()}, {name}"
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "device": name,
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "memory_gb": round(memory_gb),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@dataclass
class Report:
    """What a run has measured so far."""

    where: dict[str, Any]  # from :func:`machine`
    command: str
    gb_per_s: dict[str, Any]  # of rows and of plain copies
    figures: list[Figures] = field(default_factory=list)  # in the order of measurement
    notes: list[str] = field(default_factory=list)  # what was left out, and why

    def write_results(self, directory: Path) -> None:
        """Write results.json.

        Args:
            directory: Made if it is missing.
        """
        directory.mkdir(parents=True, exist_ok=True)
        results = {
            "machine": self.where,
            "command": self.command,
            "gb_per_s": self.gb_per_s,
            "notes": self.notes,
            "rows": [dataclasses.asdict(dataclasses.replace(row, scratchpad=None)) for row in self.figures],
        }
        (directory / "results.json").write_text(json.dumps(results, indent=2))

    def write(self, directory: Path) -> None:
        """Write results.json, results.md, and a plot per model.

        Args:
            directory: Made if it is missing.
        """
        self.write_results(directory)
        (directory / "results.md").write_text(_markdown(self))
        for name in dict.fromkeys(row.workload["name"] for row in self.figures):
            _plot([row for row in self.figures if row.workload["name"] == name], directory / f"{name}.png")


def write_by_contender(path: Path, figures: list[Figures], args: dict[str, Any]) -> None:
    """Write one JSON file whose keys are stable, so that scripts can read it.

    Args:
        path: The file.
        figures: In the order of measurement.
        args: The command line.
    """
    groups: list[list[Figures]] = []
    for row in figures:  # a point has each contender once
        if not groups or row.point != groups[-1][0].point or row.cache in {other.cache for other in groups[-1]}:
            groups.append([])
        groups[-1].append(row)
    points = [_by_contender(rows) for rows in groups]
    result = {
        "args": args,
        "torch": torch.__version__,
        "machine": {"cpu": _processor(), "num_threads": torch.get_num_threads()},
        "date": time.strftime("%Y-%m-%d"),
        **(points[0] if len(points) == 1 else {"points": points}),
    }
    path.write_text(json.dumps(result, indent=2))


def _by_contender(rows: list[Figures]) -> dict[str, Any]:
    """One point of the grid."""
    name, optimizer, load_factor, exponent = rows[0].point
    result: dict[str, Any] = {
        "model": name,
        "optimizer": optimizer,
        "load_factor": load_factor,
        "zipf": exponent,
        "lookahead": next((row.lookahead for row in rows if row.lookahead is not None), None),
        "step_ms_p50": {row.cache: row.step_ms for row in rows},
        "step_ms_p90": {row.cache: row.spread_ms[1] for row in rows},
        "step_ms": {row.cache: row.step_ms_of_blocks for row in rows},
    }
    ratios = {row.cache: row.ratio_to_fused for row in rows if row.cache != "fused" and row.ratio_to_fused is not None}
    if ratios:
        result["ratio_to_fused"] = next(iter(ratios.values())) if len(ratios) == 1 else ratios
    for row in rows:
        if row.cache == "scratchpipe" and row.stage_ms is not None:
            result |= {"scratchpad": row.scratchpad, "stage_ms": row.stage_ms}
            result["plan_lookups_per_second"] = 1e3 * row.workload["ids_per_batch"] / row.stage_ms["plan"]
    return result


def _markdown(report: Report) -> str:
    figures, where = report.figures, report.where
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    lines = [
        "# Training step",
        "",
        f"{where['device']}, {where['num_cores']} cores, {where['memory_gb']} GB; {versions}; {where['date']}.",
        "",
        "```",
        report.command,
        "```",
        "",
        "Median of blocks of steps, P10 and P90; contenders interleaved in one process, all caches with the same "
        "bytes of device memory. Floor: the larger of fused's step and the bytes of one direction over the bandwidth "
        "of a plain copy.",
        "",
    ]
    for point in dict.fromkeys(row.point for row in figures):
        rows = [row for row in figures if row.point == point]
        shape = rows[0].workload
        lines += [
            f"## {shape['name']}: {shape['num_tables']} tables x {shape['num_embeddings']:,} rows x "
            f"{shape['embedding_dim']}, {shape['ids_per_bag']} ids a bag, batch {shape['batch_size']:,}"
            f"{', beside ' + str(shape['num_device_tables']) + ' small ones' if shape['num_device_tables'] else ''}; "
            f"{rows[0].optimizer}, Zipf {rows[0].zipf:g}, {rows[0].load_factor:.0%}",
            "",
            "| tables | lookahead | step (ms) | P10 to P90 | ratio to fused | floor (ms) | misses a batch | of unique "
            "| MB in / out | misses at Train | last loss |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_markdown_row(row) for row in rows]
        lines += ["", *(line for row in rows for line in _stages_of(row)), ""]
    lines += ["## Bandwidth", "", "| way | GB/s |", "|---|---|"]
    lines += [f"| {name} | {speed:.1f} |" for name, speed in report.gb_per_s.items()]
    if report.notes:
        lines += ["", "## Left out", "", *(f"* {note}" for note in report.notes)]
    return "\n".join(lines) + "\n"


def _stages_of(row: Figures) -> list[str]:
    """How a scratchpad's step splits, how fast rows moved, and what device memory it took."""
    text = []
    if row.stage_ms is not None and row.fill_bytes is not None and row.writeback_bytes is not None:
        stages = ", ".join(f"{stage} {milliseconds:.1f}" for stage, milliseconds in row.stage_ms.items())
        text.append(f"median of stages, by the host's clock (ms): {stages}")
        moving = sum(row.stage_ms.get(stage, 0.0) for stage in ("collect", "exchange", "insert"))
        if moving > 0 and row.peak_device_bytes is None:  # on a GPU the host's clock does not see rows move
            text.append(f"{(row.fill_bytes + row.writeback_bytes) / moving / 1e6:.1f} GB/s both ways")
    if row.traced_ms is not None:
        traced = ", ".join(f"{kind} {milliseconds:.1f}" for kind, milliseconds in row.traced_ms.items())
        text.append(f"traced steps together (ms): {traced}")
    if row.peak_device_bytes is not None:
        text.append(f"peak device memory {row.peak_device_bytes / 1e9:.2f} GB")
    lookahead = "" if row.lookahead is None else f", lookahead {row.lookahead}"
    return [f"* `{row.cache}`{lookahead}: {'; '.join(text)}."] if text else []


def _markdown_row(row: Figures) -> str:
    low, high = row.spread_ms

    def number(value: float | None, form: str = ",.0f") -> str:
        return "-" if value is None else format(value, form)

    moved = "-"
    if row.fill_bytes is not None and row.writeback_bytes is not None:
        moved = f"{row.fill_bytes / 1e6:.1f} / {row.writeback_bytes / 1e6:.1f}"
    cells = [
        f"`{row.cache}`",
        number(row.lookahead),
        f"{row.step_ms:.1f}",
        f"{low:.1f} to {high:.1f}",
        number(row.ratio_to_fused, ".3f"),
        number(row.floor_ms, ".1f"),
        number(row.misses),
        number(row.unique_rows),
        moved,
        number(row.misses_at_train),
        repr(row.last_loss),
    ]
    return f"| {' | '.join(cells)} |"


def _plot(figures: list[Figures], path: Path) -> None:
    """Step times of all contenders at every point of the grid, with their spread."""
    plt = import_pyplot()
    if plt is None:
        return
    points = list(dict.fromkeys((*row.point, row.lookahead) for row in figures if row.lookahead is not None))
    points = points or list(dict.fromkeys((*row.point, None) for row in figures))
    caches = list(dict.fromkeys(row.cache for row in figures))
    fig, ax = plt.subplots(figsize=(max(6.0, 1.6 * len(points) + 2), 4.0), layout="constrained")
    width = 0.8 / len(caches)
    for index, cache in enumerate(caches):
        rows = [
            next(
                (
                    row
                    for row in figures
                    if row.cache == cache and row.point == point[:-1] and row.lookahead in (None, point[-1])
                ),
                None,
            )
            for point in points
        ]
        places = [place + (index - (len(caches) - 1) / 2) * width for place in range(len(points))]
        shown = [(place, row) for place, row in zip(places, rows, strict=True) if row is not None]
        errors = np.array([[row.step_ms - row.spread_ms[0], row.spread_ms[1] - row.step_ms] for _, row in shown]).T
        ax.bar(
            [place for place, _ in shown],
            [row.step_ms for _, row in shown],
            width,
            yerr=np.maximum(errors, 0),
            label=cache,
        )
    ax.set_xticks(
        range(len(points)),
        [f"{p[1]}\nZipf {p[3]:g}, {p[2]:.0%}\nlookahead {p[4]}" for p in points],
        fontsize=8,
    )
    ax.set_ylabel("step (ms), median, P10 to P90")
    ax.set_title(figures[0].workload["name"])
    ax.legend(fontsize=8)
    fig.savefig(path, dpi=130)
    plt.close(fig)
