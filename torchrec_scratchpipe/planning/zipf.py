# SPDX-License-Identifier: BSD-3-Clause
"""What a Zipf law says about the reuse of a table's rows, where no data has been measured.

Shapes: ``C`` classes of rows that are used equally often, ``P`` pressures, ``G`` gaps.

Every lookup draws a row, independently of all others: so a row that is used `rate` times per batch stays unused for `n`
batches with probability ``exp(-rate * n)``, and all counts of a :class:`Reuse` are sums over rows.
"""

import numpy as np

from torchrec_scratchpipe.core.slot_ops import HALF_LIFE
from torchrec_scratchpipe.planning.reuse import GAPS, LEVELS, Curve, Floats, Reuse, Window

__all__ = ["zipf_reuse"]

NUM_CLASSES = 2000


def zipf_reuse(
    num_rows: int, ids_per_batch: float, exponent: float, lookahead: int, num_batches_seen_ahead: int
) -> Reuse:
    """The reuse of a table whose rows are looked up by a Zipf law, in the long run."""
    sizes, rates = _classes(num_rows, ids_per_batch, exponent)

    def used_within(num_batches: Floats) -> Floats:
        """[n] expected distinct rows."""
        return sizes @ -np.expm1(-np.outer(rates, num_batches))

    used_per_batch = sizes * -np.expm1(-rates)
    unused_for = np.exp(-np.outer(rates, GAPS))  # [C, G]
    missed_after_gap = used_per_batch @ unused_for
    windows = used_within(GAPS.astype(np.float64))
    spread = np.sqrt(np.maximum(windows * (1 - windows / num_rows), 0.0))

    # Between two uses a row waits: rows that wait for a gap up to g are uses per batch times the batches they wait.
    widths = np.diff(GAPS, prepend=0)
    ends_in_gap = -np.diff(np.concatenate([used_per_batch.sum(keepdims=True), missed_after_gap]))
    waiting = np.cumsum(ends_in_gap * (GAPS - widths / 2 - 0.5))
    optimum = _curve(
        np.append(used_per_batch.sum(), used_per_batch.sum() + waiting), _with_all(missed_after_gap, used_per_batch)
    )

    held = lookahead + 1
    frequencies = np.log2(1.0 + rates * HALF_LIFE / np.log(2))
    # A row stays for so many batches after a use; and until its next use, if that is at most so many more later: those
    # that are seen ahead, and beyond all levels fewer.
    stays = np.maximum(held, 1 + HALF_LIFE * (frequencies[:, None] - LEVELS))
    stays = np.concatenate([stays, np.full((rates.size, num_batches_seen_ahead + 1), held)], axis=1)  # [C, P]
    seen = np.arange(num_batches_seen_ahead, -1, -1)
    more = np.concatenate([np.full(LEVELS.size, num_batches_seen_ahead), seen])  # [P]
    has_left = np.exp(-rates[:, None] * (stays + more))
    # Kept are rows used within `stays` batches, and rows that wait for a use: in any batch, a gap of g batches begins
    # with probability used ** 2 * exp(-rate * (g - 1)), and its row waits for g - stays of them.
    kept = sizes @ (1.0 - has_left * (1.0 - np.outer(np.expm1(-rates), more)))
    return Reuse(
        num_rows=num_rows,
        num_batches=1,
        lookahead=lookahead,
        num_batches_seen_ahead=num_batches_seen_ahead,
        num_ids=ids_per_batch,
        num_distinct=num_rows,
        windows=tuple(
            Window(int(gap), float(mean), p99=float(at_most), max=float(at_most))
            for gap, mean, at_most in zip(GAPS, windows, np.minimum(num_rows, windows + 3 * spread), strict=True)
        ),
        bin_sizes=np.ones(1),
        first_uses=np.zeros(1),
        curves={
            "ours": Curve(np.append(num_rows, kept)[None], np.append(0.0, used_per_batch @ has_left)[None]),
            "lru": _curve(windows, missed_after_gap),
            "optimum": optimum,
        },
    )


def _classes(num_rows: int, ids_per_batch: float, exponent: float) -> tuple[Floats, Floats]:
    """[C] rows of each class, [C] expected lookups of each of its rows per batch."""
    edges = np.unique(np.geomspace(1, num_rows + 1, NUM_CLASSES).astype(np.int64))
    sizes = np.diff(edges).astype(np.float64)
    middles = (edges[:-1] + edges[1:] - 1) / 2.0
    weights = middles**-exponent
    return sizes, ids_per_batch * weights / (sizes @ weights)


def _with_all(missed_after_gap: Floats, used_per_batch: Floats) -> Floats:
    return np.append(used_per_batch.sum(), missed_after_gap)


def _curve(kept: Floats, missed: Floats) -> Curve:
    """By rising pressure, from values that are by rising gap."""
    return Curve(kept[::-1][None], missed[::-1][None])
