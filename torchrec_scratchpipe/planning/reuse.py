# SPDX-License-Identifier: BSD-3-Clause
"""Measures how one table's rows are used again, in one pass, and what that means for a scratchpad of any size.

Shapes: ``I`` ids, ``U`` unique rows, ``N`` batches, ``B`` bins of successive batches, ``P`` pressures, ``G`` gaps.

A full scratchpad keeps the rows above some level of its eviction order and lets the others go; call that level the
pressure. Given the pressure, each row's fate can be told by itself: how long it stays after a use, and whether it is
still there at the next one. So one pass over the batches counts the rows kept and the uses missed for all pressures at
once. What presses on a scratchpad is then looked up: the pressure at which the rows of all its tables together just
fill its slots. It is looked up for each bin of batches, because it rises while the scratchpad fills, and falls where
the data end and nothing more is seen ahead.

A use misses because its row was let go some batches before. So it counts at the pressure of that time: rows kept are
counted when those that a batch uses could last be let go.

A gap is the number of batches from one use of a row to the next. Pressures are

* for the least recently used order, and for the optimum, gaps: the former keeps a row for so many batches after a use,
  the latter keeps it only if it will be used again within so many. (This optimum may use more slots now and fewer then;
  Belady's, for a fixed number of slots, misses a little more.)
* for our order, first the frequency, aged to the moment, below which rows that no batch seen ahead will use
  must leave; and when all of those have left, the gap beyond which even the others must.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from torchrec_scratchpipe.core.slot_ops import HALF_LIFE

__all__ = ["Curve", "Reuse", "ReuseMeter", "Window", "misses_of_pool"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MAX_BINS = 12
MAX_EXACT_GAP = 64
GAPS: Ints = np.unique(
    np.concatenate([np.arange(1, MAX_EXACT_GAP + 1), np.ceil(MAX_EXACT_GAP * 1.2 ** np.arange(1, 60)).astype(np.int64)])
)
_AGES = np.unique(np.ceil(np.concatenate([np.arange(6), 6 * 1.18 ** np.arange(24)])))  # 0 to 271 batches
_OLD = np.array([384, 512, 1024, 2048, 4096, 16384])
_COUNTS = np.array([2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64, 128, 256])
LEVELS: Floats = np.unique(  # log2 of frequencies: one use so long ago; so many uses, up to a half-life ago
    np.concatenate(
        [-np.concatenate([_AGES, _OLD]) / HALF_LIFE, *(np.log2(n) - _AGES[::3] / HALF_LIFE for n in _COUNTS)]
    )
)


class Curve(NamedTuple):
    """Means per batch, by bin and rising pressure; a row's first use misses anyway and is not among `missed`."""

    kept: Floats  # [B, P] rows in the scratchpad, when those that the batch uses could be let go
    missed: Floats  # [B, P] unique rows to be fetched


class Window(NamedTuple):
    """How many distinct rows so many successive batches use."""

    num_batches: int
    mean: float
    p99: float
    max: float


@dataclass(frozen=True)
class Reuse:
    """What a :class:`ReuseMeter` has counted of one table."""

    num_rows: int
    num_batches: int
    lookahead: int
    num_batches_seen_ahead: int
    num_ids: float  # per batch
    num_distinct: int  # in all batches
    windows: tuple[Window, ...]
    bin_sizes: Floats  # [B] batches
    first_uses: Floats  # [B] per batch
    curves: dict[str, Curve]  # "ours", "lru", "optimum"

    def window(self, num_batches: float) -> Window:
        """The working set of a window, interpolated between those measured, else extrapolated by a power law."""
        sizes = np.log([window.num_batches for window in self.windows])
        values = [self._on_power_law(sizes, [window[i] for window in self.windows], num_batches) for i in (1, 2, 3)]
        return Window(int(np.ceil(num_batches)), *(min(float(self.num_rows), value) for value in values))

    def in_second_half(self, per_bin: Floats) -> float:
        """Mean over the later half of the batches, when the scratchpad has filled. Shapes: `per_bin` [B]."""
        half = len(per_bin) // 2
        return float(np.average(per_bin[half:], weights=self.bin_sizes[half:]))

    def scaled(self, num_steps: float = 1.0, share: float = 1.0) -> "Reuse":
        """The same data, with `num_steps` batches in one, or of a share of the rows.

        A row that one of several batches fetches is there for the others.
        """
        if num_steps == 1.0 and share == 1.0:
            return self
        windows = self.windows
        if num_steps != 1.0:
            windows = tuple(Window(size, *self.window(size * num_steps)[1:]) for size, *_ in self.windows)
        least = windows[0].mean
        return dataclasses.replace(
            self,
            num_rows=max(1, round(self.num_rows * share)),
            num_ids=self.num_ids * num_steps * share,
            windows=tuple(Window(window.num_batches, *(rows * share for rows in window[1:])) for window in windows),
            first_uses=self.first_uses * num_steps * share,
            curves={
                name: Curve(np.maximum(curve.kept, least) * share, curve.missed * num_steps * share)
                for name, curve in self.curves.items()
            },
        )

    @staticmethod
    def _on_power_law(log_sizes: Floats, values: Sequence[float], num_batches: float) -> float:
        logs = np.log(np.maximum(values, 1e-9))
        at = np.log(num_batches)
        if log_sizes[0] <= at <= log_sizes[-1]:
            return float(np.exp(np.interp(at, log_sizes, logs)))
        if len(log_sizes) == 1:
            return float(values[0] * num_batches)
        low, high = (0, 1) if at < log_sizes[0] else (min(len(log_sizes) // 2, len(log_sizes) - 2), -1)
        slope = (logs[high] - logs[low]) / (log_sizes[high] - log_sizes[low])
        nearest = 0 if at < log_sizes[0] else -1
        return float(np.exp(logs[nearest] + slope * (at - log_sizes[nearest])))


class ReuseMeter:
    """Counts the reuse of one table's rows while batches stream by.

    What becomes of a row between two uses, with lookahead L = 2 and W = 3 batches seen ahead::

        batch       1     2     3     4     5     6     7     8     9    10
        used        x                                                     x
        held        |-----------|                                           by batches in flight: L + 1 batches
        exposed                       |-----------|                         may leave, if its level is low
        seen                                            |-----------|       stays, because its use is known

    A use is a miss if the row left while it was exposed, which lasts from L + 1 batches after the last use to W + 1
    batches before the next. If the gap is at most L + W + 1 batches, the row is never exposed.

    The *level* of a row is the logarithm of its frequency. The rows that stay are those above some level. So the meter
    counts by level: rows that are there to stay (what a scratchpad must hold), and exposed rows that are used again
    (what it misses if it holds only rows above the level). Both together are a curve: slots against misses.

    The level of a row falls by one in a half-life, also while its use is seen. A row that was above the pressure at its
    last chance to leave stays till that use, though it may be below by then. With hundreds of batches seen, many are.

    Memory grows with distinct rows, 16 to 32 bytes each, and with batches, about 3 KB each; of 4 bytes per row of the
    table, only the pages in which a row was used are touched.
    """

    def __init__(self, num_rows: int, lookahead: int, num_batches_seen_ahead: int) -> None:
        self._num_rows = num_rows
        self._held = lookahead
        self._ahead = num_batches_seen_ahead
        self._row_to_entry = np.zeros(num_rows, dtype=np.int32)  # 0: never used
        self._last_use: Ints = np.zeros(1024, dtype=np.int64)
        self._frequency = np.zeros(1024)  # log2 of the sum of 2 ** (batch / HALF_LIFE) over its uses
        self._num_entries = 1
        self._num_ids = 0
        self._nums_first: list[int] = []
        self._last_used_in: Ints = np.zeros(0, dtype=np.int64)  # per batch: rows whose last use it is
        self._window_sizes: list[Ints] = []
        self._gaps = _CountsByBatch(GAPS.size + 1)
        self._begun_gaps = _CountsByBatch(GAPS.size + 1)
        # Uses of rows that could have left, by their level before they were seen.
        self._exposed = _CountsByBatch(LEVELS.size + 1)
        # Waits of rows whose next use is seen, by their level meanwhile.
        self._begun_waits = _CountsByBatch(LEVELS.size + 1)
        self._ended_waits = _CountsByBatch(LEVELS.size + 1)
        # Of how many batches the pieces are in which a wait is counted; as long as the levels there are apart.
        self._wait_edges = _wait_edges(lookahead + 1, num_batches_seen_ahead + 1)
        self._wait_edges_of_exposed = _wait_edges(lookahead + num_batches_seen_ahead, num_batches_seen_ahead)
        self._short_gaps = _CountsByBatch(lookahead + num_batches_seen_ahead + 3)  # exactly; longer ones in the last
        self._checked_at: list[int] = []
        self._rows_at_level: list[Ints] = []

    @property
    def num_batches(self) -> int:
        """N, so far."""
        return len(self._nums_first)

    def add(self, ids: Ints) -> None:
        """Count one batch. Shapes: `ids` [I]."""
        # 1. Which rows were used before.
        now = self.num_batches
        rows = np.unique(ids)
        entries = self._row_to_entry[rows]
        is_first = entries == 0
        again = entries[~is_first]
        self._num_ids += ids.size
        self._nums_first.append(int(is_first.sum()))
        # 2. What became of them since.
        self._count_uses(now, self._last_use[again], self._frequency[again])
        # 3. Their last use is now, and their frequency has grown.
        self._last_used_in = np.append(self._last_used_in, rows.size) - np.bincount(
            self._last_use[again], minlength=now + 1
        )
        self._frequency[again] = np.logaddexp2(self._frequency[again], now / HALF_LIFE)
        self._last_use[again] = now
        self._add_entries(rows[is_first], now)
        # 4. Working sets of windows that end now: rows whose last use lies in the window.
        newest_first = np.cumsum(self._last_used_in[::-1])
        self._window_sizes.append(newest_first[np.minimum(GAPS, now + 1) - 1])
        if not self._checked_at or now - self._checked_at[-1] >= max(1, now // 24):
            self._check_levels(now)

    def result(self) -> Reuse:
        """What has been counted so far."""
        num_batches = self.num_batches
        if self._checked_at[-1] != num_batches - 1:
            self._check_levels(num_batches - 1)
        edges = np.unique(np.linspace(0, num_batches, min(MAX_BINS, num_batches) + 1).astype(np.int64))
        sizes = np.diff(edges)

        def mean(values: npt.NDArray[np.generic]) -> Floats:
            sums = np.add.reduceat(values.astype(np.float64), edges[:-1], axis=0)
            return np.asarray(sums / sizes.reshape(-1, *[1] * (values.ndim - 1)))

        windows = np.stack(self._window_sizes)
        curves = {"ours": self._ours(windows), "lru": self._lru(windows), "optimum": self._optimum(windows)}
        return Reuse(
            num_rows=self._num_rows,
            num_batches=num_batches,
            lookahead=self._held,
            num_batches_seen_ahead=self._ahead,
            num_ids=self._num_ids / num_batches,
            num_distinct=self._num_entries - 1,
            windows=tuple(
                Window(int(size), float(full.mean()), float(np.percentile(full, 99)), float(full.max()))
                for index, size in enumerate(GAPS[num_batches >= GAPS])
                for full in [windows[size - 1 :, index]]
            ),
            bin_sizes=sizes.astype(np.float64),
            first_uses=mean(np.array(self._nums_first)),
            curves={name: Curve(mean(kept), mean(missed)) for name, (kept, missed) in curves.items()},
        )

    def _count_uses(self, now: int, last_use: Ints, frequency: Floats) -> None:
        # For LRU and the optimum: uses by the gap before them, when they end and when they begin.
        gaps = now - last_use
        columns = np.searchsorted(GAPS, gaps)
        self._gaps.add(now, columns)
        self._begun_gaps.add_at(last_use + 1, columns)
        self._short_gaps.add(now, np.minimum(gaps, self._held + self._ahead + 2))
        # Plan `now - ahead - 1` is the last that may let the row go; it may not while the row is held.
        is_exposed = gaps > self._held + self._ahead + 1
        last_chance = now - self._ahead - 1
        levels = np.searchsorted(LEVELS, frequency[is_exposed] - last_chance / HALF_LIFE, side="right")
        self._exposed.add(now, levels)
        # Rows whose next use is seen before they could leave take a slot from their release on, whatever their level.
        released = last_use + self._held + 1
        stays_for_use = ~is_exposed & (released < now)
        self._count_waits(now, released[stays_for_use], frequency[stays_for_use], self._wait_edges)
        # So do exposed rows after their last chance; without those that were below the level then, which have left.
        if levels.size:
            seen = np.full(levels.size, last_chance + 1)
            self._count_waits(now, seen, frequency[is_exposed], self._wait_edges_of_exposed)
            self._ended_waits.add(last_chance + 1, levels)
            self._begun_waits.add(now, levels)

    def _count_waits(self, now: int, since: Ints, frequency: Floats, edges: list[int]) -> None:
        """Rows that waited for their use, by level. It falls meanwhile, so that a long wait is counted in pieces."""
        for begin, end in itertools.pairwise(edges):
            is_there = since + begin < now
            if not is_there.any():
                break
            begun = since[is_there] + begin
            ended = np.minimum(since[is_there] + end, now)
            levels = np.searchsorted(LEVELS, frequency[is_there] - (begun + ended) / 2 / HALF_LIFE, side="right")
            self._begun_waits.add_at(begun, levels)
            self._ended_waits.add_at(ended, levels)

    def _add_entries(self, rows: Ints, now: int) -> None:
        end = self._num_entries + rows.size
        while end > self._last_use.size:
            self._last_use = np.concatenate([self._last_use, np.zeros_like(self._last_use)])
            self._frequency = np.concatenate([self._frequency, np.zeros_like(self._frequency)])
        self._row_to_entry[rows] = np.arange(self._num_entries, end, dtype=np.int32)
        self._last_use[self._num_entries : end] = now
        self._frequency[self._num_entries : end] = now / HALF_LIFE
        self._num_entries = end

    def _check_levels(self, now: int) -> None:
        """Count rows that are not held by level; interpolated between the batches at which it is done."""
        entries = slice(1, self._num_entries)
        frequency = self._frequency[entries][self._last_use[entries] < now - self._held]
        levels = np.searchsorted(LEVELS, frequency - now / HALF_LIFE, side="right")
        self._checked_at.append(now)
        self._rows_at_level.append(np.bincount(levels, minlength=LEVELS.size + 1))

    def _lru(self, windows: Ints) -> tuple[Floats, Floats]:
        # LRU with the rows of the last g batches in its slots misses every use after a longer gap than g.
        hits = np.cumsum(self._gaps.stack(), axis=1)[:, :-1]
        missed = hits[:, -1:] - hits
        return windows[:, ::-1].astype(np.float64), missed[:, ::-1].astype(np.float64)

    def _optimum(self, windows: Ints) -> tuple[Floats, Floats]:
        # The optimum keeps a row from one use to the next if the gap is short, and lets it go at once if it is long.
        ended = self._gaps.stack()
        in_gap = np.cumsum(self._begun_gaps.stack(self.num_batches) - ended, axis=0)[:, :-1]
        kept = windows[:, :1] + np.concatenate([np.zeros_like(in_gap[:, :1]), np.cumsum(in_gap, axis=1)], axis=1)
        hits = np.concatenate([np.zeros_like(ended[:, :1]), np.cumsum(ended[:, :-1], axis=1)], axis=1)
        missed = ended.sum(axis=1, keepdims=True) - hits
        return kept[:, ::-1].astype(np.float64), missed[:, ::-1].astype(np.float64)

    def _ours(self, windows: Ints) -> tuple[Floats, Floats]:
        num_batches = self.num_batches
        batches = np.arange(num_batches)
        # What a scratchpad must hold to keep all rows above a level: those of batches in flight, at any level; ...
        held = windows[:, min(self._held, GAPS.size - 1)].astype(np.float64)[:, None]  # GAPS[held] == held + 1
        # ... those above the level; ...
        rows = np.stack(self._rows_at_level)
        above = np.cumsum(rows[:, ::-1], axis=1)[:, ::-1]  # [C, 1 + LEVELS]: at or above each level; first, all
        by_level = np.stack([np.interp(batches, self._checked_at, column) for column in above.T], axis=1)
        # ... and those below it whose use was seen before they could leave.
        seen = np.cumsum(self._begun_waits.stack(num_batches) - self._ended_waits.stack(num_batches), axis=0)
        below = np.concatenate([np.zeros((num_batches, 1)), np.cumsum(seen, axis=1)[:, :-1]], axis=1)
        kept = held + by_level + below
        # What it misses: uses of rows that were exposed while they were below the level.
        exposed = self._exposed.stack()
        missed = np.concatenate([np.zeros((num_batches, 1)), np.cumsum(exposed, axis=1)[:, :-1]], axis=1)
        # Beyond all levels: rows that are neither held nor seen have left. Then those seen to be used late leave too.
        gaps = self._short_gaps.stack()
        missed_for_gap = gaps.sum(axis=1, keepdims=True) - np.cumsum(gaps, axis=1)[:, self._held + 1 : -1]
        # All this is counted when rows could be let go. For a level, that is at the last chance, when it is lowest. For
        # a gap, it is any batch of the wait: the one at which most rows are there.
        waiting = np.zeros(num_batches)
        for_gaps = []
        for gap in range(self._held + 1, self._held + self._ahead + 2):
            waiting += self._waiting(gaps, gap)
            for_gaps.append(_most_before(held[:, 0] + waiting, gap - self._held))
        kept_for_gap = np.stack(for_gaps[::-1], axis=1)
        at_last_chance = np.zeros_like(kept)
        at_last_chance[self._ahead + 1 :] = kept[: max(0, num_batches - self._ahead - 1)]
        return (
            np.concatenate([np.maximum(at_last_chance, kept_for_gap[:, :1]), kept_for_gap], axis=1),
            np.concatenate([missed, missed_for_gap[:, ::-1]], axis=1),
        )

    def _waiting(self, gaps: Ints, gap: int) -> Floats:
        """[N] rows that are not held any more and will be used `gap` batches after their last use."""
        # Whatever ends its wait now began it when it was let go, some batches ago.
        ended = gaps[:, gap].astype(np.float64)
        begun = np.zeros_like(ended)
        num_waiting = min(gap - self._held - 1, len(ended))
        begun[: len(ended) - num_waiting] = ended[num_waiting:]
        return np.cumsum(begun - ended)


def _wait_edges(age: int, longest: int) -> list[int]:
    """From a row's release to its use, cut where its age has grown by a half."""
    edges = [0]
    while edges[-1] < longest:
        edges.append(edges[-1] + max(8, (age + edges[-1]) // 2))
    return edges


def _most_before(values: Floats, num_batches: int) -> Floats:
    """[N] The largest of so many values before each one."""
    most = np.concatenate([[0.0], values[:-1]])
    covered = 1
    while covered < num_batches:
        step = min(covered, num_batches - covered)
        most[step:] = np.maximum(most[step:], most[:-step])
        covered += step
    return most


class _CountsByBatch:
    """Counts in columns, one row per batch."""

    def __init__(self, num_columns: int) -> None:
        self._num_columns = num_columns
        self._counts: Ints = np.zeros((64, num_columns), dtype=np.int64)
        self._num_batches = 0

    def add(self, batch: int, columns: Ints) -> None:
        """Count events of one batch."""
        self._reserve(batch + 1)
        self._counts[batch] += np.bincount(columns, minlength=self._num_columns)

    def add_at(self, batches: Ints, columns: Ints) -> None:
        """Count events of several batches."""
        if batches.size == 0:
            return
        first, last = int(batches.min()), int(batches.max())
        self._reserve(last + 1)
        num_cells = (last + 1 - first) * self._num_columns
        counts = np.bincount((batches - first) * self._num_columns + columns, minlength=num_cells)
        self._counts[first : last + 1] += counts.reshape(-1, self._num_columns)

    def stack(self, num_batches: int | None = None) -> Ints:
        """[N, columns]."""
        num_batches = num_batches or self._num_batches
        self._reserve(num_batches)
        return self._counts[:num_batches]

    def _reserve(self, num_batches: int) -> None:
        self._num_batches = max(self._num_batches, num_batches)
        while num_batches > len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])


def misses_of_pool(reuses: Sequence[Reuse], num_slots: float, order: str = "ours") -> list[Floats]:
    """What tables miss that share slots: [B] unique rows per batch and table, first uses included."""
    # At one level, slots that tables take add up. So the tables share one level, that at which they fill the slots.
    curves = [reuse.curves[order] for reuse in reuses]
    kept = np.sum([curve.kept for curve in curves], axis=0)
    misses = [reuse.first_uses.copy() for reuse in reuses]
    for bin_index, kept_in_bin in enumerate(kept):
        # `kept` falls; where the slots lie between two pressures, so do the misses.
        falling = np.minimum.accumulate(kept_in_bin)
        after = int(np.searchsorted(-falling, -num_slots))
        if after == 0:
            continue
        if after == len(falling):
            share, before, after = 1.0, after - 1, after - 1
        else:
            before = after - 1
            share = (falling[before] - num_slots) / max(falling[before] - falling[after], 1e-9)
        for miss, curve in zip(misses, curves, strict=True):
            miss[bin_index] += (1 - share) * curve.missed[bin_index, before] + share * curve.missed[bin_index, after]
    return misses
