# SPDX-License-Identifier: BSD-3-Clause
"""Reads a data loader without a trace: afterwards every random number generator is where it was."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

__all__ = ["random_states_kept"]

MAX_DEPTH = 5  # loader, batch sampler, sampler, generator; and a wrapper around the loader
NOT_LOOKED_INTO = (torch.Tensor, torch.nn.Module, ModuleType, type, FunctionType, BuiltinFunctionType, MethodType)
MAX_PARTS = 64  # of a list that may hold generators


@contextmanager
def random_states_kept(source: Any) -> Iterator[None]:
    """Put back, at the end or on an error, what iterating changes.

    A DataLoader draws the seed of its workers from torch's generator, or from its own, and samplers draw the order.
    Kept are the global generators of torch (CPU, and CUDA once it is in use), NumPy and Python, and those that the
    source or its samplers and datasets hold. Workers that a loader would keep for its next pass are let go: they have
    drawn their seed.
    """
    put_back = [*_global_states(), *(undo for part in _parts(source) for undo in _states_of(part))]
    try:
        yield
    finally:
        for undo in put_back:
            undo()


def _global_states() -> Iterator[Callable[[], object]]:
    yield partial(torch.set_rng_state, torch.get_rng_state())
    yield partial(np.random.set_state, np.random.get_state())  # noqa: NPY002 - others may draw from it
    yield partial(random.setstate, random.getstate())
    if torch.cuda.is_initialized():
        yield partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())


def _states_of(part: Any) -> Iterator[Callable[[], object]]:
    if isinstance(part, torch.Generator):
        yield partial(part.set_state, part.get_state())
    elif isinstance(part, np.random.Generator):
        yield partial(setattr, part.bit_generator, "state", part.bit_generator.state)
    elif isinstance(part, np.random.RandomState):
        yield partial(part.set_state, part.get_state())
    elif isinstance(part, random.Random):
        yield partial(part.setstate, part.getstate())
    elif isinstance(part, DataLoader) and part._iterator is None:
        yield partial(setattr, part, "_iterator", None)


def _parts(source: Any) -> list[Any]:
    """The source and what it is made of, a few levels deep."""
    found: dict[int, Any] = {}
    level = [source]
    for _ in range(MAX_DEPTH):
        new = {id(part): part for part in level if id(part) not in found}
        found.update(new)
        level = [child for part in new.values() for child in _children(part)]
    return list(found.values())


def _children(part: Any) -> list[Any]:
    if isinstance(part, NOT_LOOKED_INTO):
        return []
    if isinstance(part, dict | list | tuple):
        children = list(part.values() if isinstance(part, dict) else part)
        return children if len(children) <= MAX_PARTS else []
    return list(getattr(part, "__dict__", {}).values())
