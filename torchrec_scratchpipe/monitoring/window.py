# SPDX-License-Identifier: BSD-3-Clause
"""What was counted over some steps in a row: figures only, as they go to a log, to TensorBoard and to a file.

Shapes: ``T`` tables of a pool, ``N`` steps.

Counts are those of the window unless a name says ``per_batch``. Batches are counted when they are planned, some steps
ahead of Train.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from torchrec_scratchpipe.core.memory import SLOT_BYTES_OF_MAPS
from torchrec_scratchpipe.core.pool import Pool
from torchrec_scratchpipe.core.rows import Stage
from torchrec_scratchpipe.monitoring.looks import Looks, MissCurve

__all__ = ["Counts", "PoolWindow", "Speeds", "StepWindow", "TableWindow", "as_json", "pool_window", "scalars"]


@dataclass(frozen=True)
class Speeds:
    """What the machine can do; the shares of a window are shares of this."""

    bus_bytes_per_s: float  # one way
    disk_reads_per_s: float | None = None


@dataclass(frozen=True)
class TableWindow:
    """One table's share of a window of its pool."""

    table_name: str
    num_ids: int
    num_unique_ids: int
    num_unique_misses: int
    num_victims: int
    miss_share: float


@dataclass(frozen=True)
class PoolWindow:
    """One pool over a window. Counts have the names of :class:`PoolStats` and are differences of its counts.

    `miss_share` is of unique ids. `slots_in_flight_p50` and `slots_in_flight_max` are slots held by batches in flight,
    at the batches that were looked at. `fill_bus_share` and `writeback_bus_share` are shares of the window in which a
    plain copy of as many bytes would keep the bus busy; `disk_share` is the same for reads of the disk. `stage_ms` is
    the mean time of each stage, by the host's clock.
    """

    name: str
    num_slots: int
    num_rows: int
    slot_bytes: float
    scratchpad_bytes: int
    num_resident_rows: int
    num_batches: int
    num_ids: int
    num_unique_ids: int
    num_unique_misses: int
    num_victims: int
    miss_share: float
    misses_per_batch: float
    first_uses_per_batch: float
    fill_bytes: int
    writeback_bytes: int
    fill_bus_share: float
    writeback_bus_share: float
    num_stalls: int
    stall_ms: float
    num_slot_waits: int
    slots_in_flight_p50: float
    slots_in_flight_max: float
    num_misses_at_train: int
    num_growths: int
    num_rows_reset: int
    num_disk_rows_read: int
    num_disk_pages_read: int
    num_cold_pages_at_collect: int
    disk_bytes_written: int
    disk_share: float | None
    stage_ms: dict[str, float]
    tables: tuple[TableWindow, ...]
    looks: Looks = field(repr=False)  # not for files: what advice is made of

    @property
    def curve(self) -> MissCurve:
        """Misses by slots, scaled to what was counted in the whole window."""
        # Looks see some batches of the window; their shape is taken, and the level of what was counted.
        seen = self.looks.curve
        factor = self.misses_per_batch / seen.num_misses if seen.num_misses else 1.0
        return seen._replace(
            num_misses=self.misses_per_batch,
            num_first_uses=seen.num_first_uses * factor,
            hits=seen.hits * factor,
            misses=seen.misses * factor,
        )


@dataclass(frozen=True)
class StepWindow:
    """Some steps in a row, on one rank.

    `samples_per_s` is of this rank; None if batches have no KeyedJaggedTensor. `stall_share` is the share of the time
    in which Train waited for rows. `device_memory_bytes` is what PyTorch has allocated on a CUDA device, else None.
    """

    rank: int
    last_step: int  # counted from 1
    num_steps: int
    seconds: float
    samples_per_s: float | None
    step_p50_ms: float
    step_p99_ms: float
    stall_share: float
    host_memory_bytes: int
    device_memory_bytes: int | None
    pools: tuple[PoolWindow, ...]


class Counts:
    """Running counts of one pool, and what they were when the last window ended; made while no stage runs."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        counts = pool.slot_map.table_counts
        rows = [counts.num_ids, counts.num_unique, counts.num_misses, counts.num_victims]
        self._rows = np.array([numbers.tolist() for numbers in rows])
        self._last_batch = pool.slot_map.next_batch - 1
        self._numbers = pool.counters.on_host()

    def differences(self, looks: Looks) -> tuple[int, Any, dict[str, Any]]:
        """Batches, [4, T] ids, unique ids, misses and victims, and other counts since the last call."""
        rows = np.stack([looks.num_ids, looks.num_unique, looks.num_misses, looks.num_victims])
        numbers = self._pool.counters.on_host()
        num_batches = looks.last_batch - self._last_batch
        result = num_batches, rows - self._rows, {name: numbers[name] - self._numbers[name] for name in numbers}
        self._rows, self._last_batch, self._numbers = rows, looks.last_batch, numbers
        return result


def pool_window(
    pool: Pool, counts: Counts, looks: Looks, speeds: Speeds, start_s: float, end_s: float
) -> PoolWindow | None:
    """One pool between two moments of :func:`time.perf_counter`; None if no batch was planned."""
    num_batches, rows, others = counts.differences(looks)
    if num_batches <= 0:
        return None
    num_ids, num_unique, num_misses, num_victims = (int(total) for total in rows.sum(axis=1))
    seconds, row_bytes = end_s - start_s, pool.host_table.layout.row_bytes
    fill_bytes, writeback_bytes = num_misses * row_bytes, num_victims * row_bytes
    reads_per_s = speeds.disk_reads_per_s
    return PoolWindow(
        name=pool.name,
        num_slots=pool.scratchpad.num_slots,
        num_rows=pool.host_table.num_rows,
        slot_bytes=row_bytes + SLOT_BYTES_OF_MAPS,
        scratchpad_bytes=pool.scratchpad.num_slots * row_bytes,
        num_resident_rows=round(looks.num_resident),
        num_batches=num_batches,
        num_ids=num_ids,
        num_unique_ids=num_unique,
        num_unique_misses=num_misses,
        num_victims=num_victims,
        miss_share=num_misses / max(1, num_unique),
        misses_per_batch=num_misses / num_batches,
        first_uses_per_batch=looks.curve.num_first_uses,
        fill_bytes=fill_bytes,
        writeback_bytes=writeback_bytes,
        fill_bus_share=fill_bytes / speeds.bus_bytes_per_s / seconds,
        writeback_bus_share=writeback_bytes / speeds.bus_bytes_per_s / seconds,
        slots_in_flight_p50=float(np.median(looks.held)),
        slots_in_flight_max=float(looks.held.max()),
        num_misses_at_train=looks.num_misses_at_train,
        disk_share=None if reads_per_s is None else others["num_disk_pages_read"] / reads_per_s / seconds,
        stage_ms=_stage_ms(pool, start_s),
        tables=tuple(
            TableWindow(table.name, ids, unique, misses, victims, misses / max(1, unique))
            for table, (ids, unique, misses, victims) in zip(pool.host_table.tables, rows.T.tolist(), strict=True)
        ),
        looks=looks,
        **others,
    )


def _stage_ms(pool: Pool, start_s: float) -> dict[str, float]:
    times: dict[Stage, list[float]] = {}
    for span in reversed(pool.counters.spans):
        if span.end_s < start_s:
            break
        times.setdefault(span.stage, []).append(1e3 * (span.end_s - span.start_s))
    return {stage.value: sum(times[stage]) / len(times[stage]) for stage in Stage if stage in times}


def as_json(window: Any) -> Any:
    """What of a window goes into files: numbers, strings, lists and dictionaries; no number that JSON lacks."""
    if isinstance(window, Looks):
        raise TypeError("looks are not for files")
    if dataclasses.is_dataclass(window):
        fields = dataclasses.fields(window)
        return {one.name: as_json(getattr(window, one.name)) for one in fields if one.name != "looks"}
    if isinstance(window, dict):
        return {name: as_json(value) for name, value in window.items()}
    if isinstance(window, str) or window is None:
        return window
    if isinstance(window, Sequence):
        return [as_json(value) for value in window]
    if isinstance(window, float):
        return round(window, 6) if math.isfinite(window) else None
    return window


def scalars(window: StepWindow) -> dict[str, float]:
    """Every number of a window, by a name with slashes, as TensorBoard groups them."""
    found: dict[str, float] = {}

    def collect(prefix: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, bool | int | float):
                found[f"{prefix}/{name}"] = value

    content = as_json(window)
    collect("scratchpipe", content)
    for number, pool in enumerate(content["pools"]):
        collect(f"scratchpipe_pool_{number}", pool)
        collect(f"scratchpipe_pool_{number}_stage_ms", pool["stage_ms"])
        for table in pool["tables"]:
            collect(f"scratchpipe_table_{table['table_name']}", table)
    for name in ("rank", "last_step", "num_steps"):
        del found[f"scratchpipe/{name}"]
    return found
