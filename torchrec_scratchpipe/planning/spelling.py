# SPDX-License-Identifier: BSD-3-Clause
"""Finds the name that was meant."""

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean", "few"]

NUM_SHOWN = 10


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question to put behind a message about an unknown name."""
    by_lower_case = {other.lower(): other for other in known}
    parts = [part for part in reversed(name.lower().split(".")) if part in by_lower_case]
    near = parts or difflib.get_close_matches(name.lower(), list(by_lower_case), n=1, cutoff=0.6)
    return f" Did you mean {by_lower_case[near[0]]} for {name}?" if near else ""


def few(names: Iterable[str]) -> str:
    """The first of some names, in order."""
    ordered = sorted(names)
    more = f" and {len(ordered) - NUM_SHOWN:,} more" if len(ordered) > NUM_SHOWN else ""
    return ", ".join(ordered[:NUM_SHOWN]) + more if ordered else "none"
