# SPDX-License-Identifier: BSD-3-Clause
"""What to set otherwise, by what was counted in a window; each piece with the figures that it rests on.

Advice about slots says how many misses a batch will have. Tests do what it says, and count.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torchrec_scratchpipe.monitoring.window import PoolWindow, Speeds, StepWindow
from torchrec_scratchpipe.planning.report import as_size

__all__ = ["Advice", "advice_of"]

HEADROOM = 1.05  # of slots beyond what was measured
WORTH_SLOTS = 0.05  # of the scratchpad: less is not worth a word
WORTH_MISSES = 0.02  # of the misses: so many more are a fair price for memory, if the bus has room
IS_LIMIT = 0.8  # of the time: what is busy for so long is the limit
IS_STALLED = 0.02  # of the time
IS_WAITING = 0.01  # of the batches


@dataclass(frozen=True)
class Advice:
    """One thing to do.

    `kind` is one of ``smaller_scratchpad``, ``larger_scratchpad``, ``slot_waits``, ``growths``, ``bus``, ``disk``,
    ``stages``. `settings` are what to set; where there are several, one of them is enough. `figures` are what was
    counted, `predicted` is what will be counted per batch once a setting of `settings` is followed, by its name.
    """

    kind: str
    pool: str
    text: str
    settings: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Facts:
    """What all advice about one pool looks at."""

    window: StepWindow
    pool: PoolWindow
    speeds: Speeds
    lookahead: int

    @property
    def bus_share(self) -> float:
        """Of the busier direction; both may be used at once."""
        return max(self.pool.fill_bus_share, self.pool.writeback_bus_share)

    @property
    def slot_wait_share(self) -> float:
        return self.pool.num_slot_waits / self.pool.num_batches

    def slots_for(self, lookahead: int) -> float:
        """That the rows of all batches in flight need, of the largest batches seen."""
        looks = self.pool.looks
        largest = looks.num_unique_most / max(1.0, looks.curve.num_unique)
        return HEADROOM * largest * looks.distinct_in(lookahead + 1)

    def load_factor(self, num_slots: float) -> float:
        """Rounded up to four digits."""
        return min(1.0, -(-num_slots / self.pool.num_rows * 1e4 // 1) / 1e4)

    def bus_ms(self, num_rows: float) -> float:
        """For so many more missing rows, which take the place of as many victims."""
        row_bytes = self.pool.scratchpad_bytes / self.pool.num_slots
        return 1e3 * num_rows * row_bytes / self.speeds.bus_bytes_per_s


def advice_of(window: StepWindow, speeds: Speeds, lookahead: int) -> list[Advice]:
    """All advice that a window gives, pool by pool; none where all is well."""
    found = []
    for pool in window.pools:
        facts = _Facts(window, pool, speeds, lookahead)
        found += [advice for rule in _RULES for advice in [rule(facts)] if advice is not None]
    return found


def _smaller(facts: _Facts) -> Advice | None:
    """The fewest slots that cost few more misses."""
    pool, curve = facts.pool, facts.pool.curve
    if pool.num_slot_waits or pool.num_growths or facts.window.stall_share > IS_STALLED or facts.bus_share > IS_LIMIT:
        return None
    least = max(facts.slots_for(facts.lookahead), HEADROOM * curve.num_pinned)
    most_misses = curve.num_misses * (1 + WORTH_MISSES) + 1
    candidates = [pool.num_slots * share / 100 for share in range(2, 100)]
    fitting = [slots for slots in candidates if slots >= least and curve.misses_with(slots) <= most_misses]
    if not fitting or pool.num_slots - fitting[0] < WORTH_SLOTS * pool.num_slots:
        return None
    load_factor = facts.load_factor(fitting[0])
    misses = curve.misses_with(load_factor * pool.num_rows)
    saved_bytes = (pool.num_slots - load_factor * pool.num_rows) * pool.slot_bytes
    more = max(0.0, misses - curve.num_misses)
    return Advice(
        "smaller_scratchpad",
        pool.name,
        f"scratchpad {pool.slots_in_flight_max / pool.num_slots:.0%} used by batches in flight; "
        f"{as_size(saved_bytes)} less (load_factor {load_factor:.4f}) would cost {more:,.0f} more misses a batch "
        f"({misses:,.0f} instead of {curve.num_misses:,.0f}; {facts.bus_ms(more):.2f} ms of bus)",
        {"load_factor": load_factor},
        {
            "slots_in_flight_max": pool.slots_in_flight_max,
            "num_slots": pool.num_slots,
            "misses_per_batch": curve.num_misses,
        },
        {"misses_per_batch": misses},
    )


def _larger(facts: _Facts) -> Advice | None:
    """Twice the slots, where the moving of rows costs time."""
    pool, curve = facts.pool, facts.pool.curve
    is_needed = facts.window.stall_share > IS_STALLED or facts.bus_share > IS_LIMIT
    is_full = pool.num_resident_rows > (1 - WORTH_SLOTS) * pool.num_slots
    if not is_needed or not is_full or pool.num_slots == pool.num_rows:
        return None
    load_factor = facts.load_factor(min(2 * pool.num_slots, pool.num_rows))
    misses = curve.misses_with(load_factor * pool.num_rows)
    if curve.num_misses - misses < WORTH_SLOTS * curve.num_misses:
        return None
    more_bytes = (load_factor * pool.num_rows - pool.num_slots) * pool.slot_bytes
    return Advice(
        "larger_scratchpad",
        pool.name,
        f"{as_size(more_bytes)} more (load_factor {load_factor:.4f}) would save "
        f"{curve.num_misses - misses:,.0f} of {curve.num_misses:,.0f} misses a batch "
        f"({facts.bus_ms(curve.num_misses - misses):.2f} ms of bus); {curve.num_first_uses:,.0f} are first uses, which "
        "no number of slots saves",
        {"load_factor": load_factor},
        {
            "misses_per_batch": curve.num_misses,
            "first_uses_per_batch": curve.num_first_uses,
            "stall_share": facts.window.stall_share,
            "bus_share": facts.bus_share,
        },
        {"misses_per_batch": misses},
    )


def _slot_waits(facts: _Facts) -> Advice | None:
    """Enough slots for the lookahead, or a lookahead for which there are enough."""
    pool, share = facts.pool, facts.slot_wait_share
    if share <= IS_WAITING:
        return None
    settings = {"load_factor": facts.load_factor(facts.slots_for(facts.lookahead))}
    shorter = [n for n in range(1, facts.lookahead) if facts.slots_for(n) <= pool.num_slots]
    if shorter:
        settings["lookahead"] = shorter[-1]
    lower = f" or lower lookahead to {shorter[-1]}" if shorter else ""
    return Advice(
        "slot_waits",
        pool.name,
        f"Plan waited for slots in {share:.0%} of batches: raise load_factor to {settings['load_factor']:.4f}{lower}",
        settings,
        {"num_slot_waits": pool.num_slot_waits, "num_batches": pool.num_batches, "num_slots": pool.num_slots},
        {"slot_wait_share": 0.0},
    )


def _growths(facts: _Facts) -> Advice | None:
    """The size to begin with."""
    pool = facts.pool
    if not pool.num_growths:
        return None
    load_factor = facts.load_factor(max(pool.num_slots, facts.slots_for(facts.lookahead)))
    return Advice(
        "growths",
        pool.name,
        f"the scratchpad grew {pool.num_growths} times, to {pool.num_slots:,} slots: begin with load_factor "
        f"{load_factor:.4f}",
        {"load_factor": load_factor},
        {"num_growths": pool.num_growths, "num_slots": pool.num_slots},
        {"num_growths": 0.0},
    )


def _bus(facts: _Facts) -> Advice | None:
    if facts.bus_share <= IS_LIMIT:
        return None
    way = "to the device" if facts.pool.fill_bus_share >= facts.pool.writeback_bus_share else "to the host"
    return Advice(
        "bus",
        facts.pool.name,
        f"the bus is the limit: rows would keep it busy for {facts.bus_share:.0%} of the time {way}. Fewer misses "
        "make steps shorter: more slots, or num_batches_seen_ahead",
        {},
        {"bus_share": facts.bus_share, "misses_per_batch": facts.pool.misses_per_batch},
    )


def _disk(facts: _Facts) -> Advice | None:
    pool = facts.pool
    if pool.disk_share is None or pool.disk_share <= IS_LIMIT:
        return None
    reads = pool.num_disk_pages_read / pool.num_batches
    return Advice(
        "disk",
        pool.name,
        f"the disk is the limit: {reads:,.0f} reads a batch keep it busy for {pool.disk_share:.0%} of the time. More "
        "ram_budget_gb, or more slots, make steps shorter",
        {},
        {"disk_share": pool.disk_share, "reads_per_batch": reads},
    )


def _stages(facts: _Facts) -> Advice | None:
    """Train waits, and neither slots nor bus nor disk are why."""
    pool, window = facts.pool, facts.window
    is_explained = facts.slot_wait_share > IS_WAITING or facts.bus_share > IS_LIMIT or (pool.disk_share or 0) > IS_LIMIT
    if window.stall_share <= IS_STALLED or is_explained or not pool.num_stalls:
        return None
    stages_ms = sum(ms for stage, ms in pool.stage_ms.items() if stage != "train")
    return Advice(
        "stages",
        pool.name,
        f"Train waited for {window.stall_share:.0%} of the time: a batch's stages take {stages_ms:.1f} ms, a step "
        f"{window.step_p50_ms:.1f} ms. Fewer misses make the stages shorter; a longer lookahead helps where batches "
        "differ",
        {},
        {"stall_share": window.stall_share, "stages_ms": stages_ms, "step_p50_ms": window.step_p50_ms},
    )


_RULES: tuple[Callable[[_Facts], Advice | None], ...] = (
    _slot_waits, _growths, _bus, _disk, _stages, _larger, _smaller,
)  # fmt: skip
