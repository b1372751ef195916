# SPDX-License-Identifier: BSD-3-Clause
"""Checks what a user gives: numbers, and names that were meant."""

import difflib
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from torchrec_scratchpipe.errors import ConfigError

__all__ = ["check_count", "check_number", "did_you_mean", "few"]

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


def check_count(name: str, value: Any, least: int, below: int | None = None) -> int:
    """Refuse what is not a whole number in a range. Raises ConfigError."""
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_integer or value < least or (below is not None and value >= below):
        wanted = f"of at least {least}" if below is None else f"in [{least}, {below})"
        raise ConfigError(f"{name} is {value!r}, it must be an integer {wanted}.")
    return int(value)


def check_number(name: str, value: Any, *, is_positive: bool = False) -> float:
    """Refuse what is not a finite number from 0 on. Raises ConfigError."""
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0 or (is_positive and value == 0):
        raise ConfigError(
            f"{name} is {value!r}, it must be a finite number {'above 0' if is_positive else 'of at least 0'}."
        )
    return float(value)
