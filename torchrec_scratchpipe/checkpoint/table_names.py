# SPDX-License-Identifier: BSD-3-Clause
"""Finds the tables of a state, and what a user means by a table's name."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from torchrec_scratchpipe.errors import ConfigError

__all__ = ["few", "match_of", "open_npy", "table_of"]


def table_of(state_name: str) -> str | None:
    """The table whose weights have this name in a state_dict; None if it is no table's."""
    parts = state_name.split(".")
    is_table = len(parts) >= 3 and parts[-1] == "weight" and parts[-3] in ("embedding_bags", "embeddings")
    return parts[-2] if is_table else None


def match_of(table: str, found: Mapping[str, Any], caller: str) -> str | None:
    """The name under which a table was given: its own, or one that ends in `<table>.weight`. Raises ConfigError."""
    if table in found:
        return table
    names = [name for name in found if name == f"{table}.weight" or name.endswith(f".{table}.weight")]
    if len(names) > 1:
        raise ConfigError(
            f"{caller}: {few(names)} are all called like table {table}. Give one of them under {table!r}."
        )
    return names[0] if names else None


def open_npy(path: str | os.PathLike[str], table: str, caller: str, mode: Any = "r") -> Any:
    """Map a file. Raises ConfigError."""
    try:
        return np.load(path, mmap_mode=mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{caller}: {path} for table {table} cannot be read as .npy ({error}).") from error


def few(names: Iterable[Any]) -> str:
    """Some names for a message."""
    names = sorted(map(str, names))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "no names"
