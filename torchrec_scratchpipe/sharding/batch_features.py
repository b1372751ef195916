# SPDX-License-Identifier: BSD-3-Clause
"""Finds the ids of a batch, whatever the batch is made of."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_scratchpipe.errors import MeasurementError

__all__ = ["find_tensors", "ids_of_features", "num_samples"]

MAX_DEPTH = 8
LEAVES = (
    Tensor,
    JaggedTensor,
    KeyedTensor,
    np.ndarray,
    nn.Module,
    ModuleType,
    type,
    str,
    bytes,
    int,
    float,
    type(None),
)


def find_tensors(batch: Any, get_features: Callable[[Any], Any] | None = None) -> dict[str, KeyedJaggedTensor]:
    """Look for KeyedJaggedTensors in attributes, fields, lists, tuples and dictionaries, nested in any way.

    Raises MeasurementError.
    """
    looked_at = batch if get_features is None else get_features(batch)
    found: dict[int, tuple[str, KeyedJaggedTensor]] = {}
    seen: dict[int, Any] = {}  # holds what it has seen, so that no other object gets its id
    _collect("batch" if get_features is None else "get_features(batch)", looked_at, found, seen, 0)
    if not found and get_features is None:
        raise MeasurementError(
            f"a batch is a {type(batch).__name__} without a KeyedJaggedTensor in its attributes, lists or "
            "dictionaries. Give get_features, which takes a batch and returns its KeyedJaggedTensor."
        )
    if not found:
        raise MeasurementError(
            f"get_features gave a {type(looked_at).__name__}. Have it return the KeyedJaggedTensor of a batch, "
            "or several."
        )
    return dict(found.values())


def ids_of_features(tensors: Mapping[str, KeyedJaggedTensor], names: Set[str]) -> dict[str, Tensor]:
    """The ids of some features, of those that are there. Raises MeasurementError."""
    ids: dict[str, Tensor] = {}
    place_of: dict[str, str] = {}
    for place, tensor in tensors.items():
        wanted = [key for key in tensor.keys() if key in names]  # noqa: SIM118 - no mapping
        parts = tensor.to_dict() if wanted else {}
        for name in wanted:
            if name in ids:
                raise MeasurementError(
                    f"feature {name} is in {place_of[name]} and in {place}, which are two KeyedJaggedTensors: which of "
                    "them the model looks up cannot be told. Give get_features, which takes a batch and returns the "
                    "right one."
                )
            ids[name], place_of[name] = parts[name].values(), place
    return ids


def num_samples(tensors: Mapping[str, KeyedJaggedTensor], names: Set[str]) -> set[int]:
    """The sizes that a batch could have, also where features bring fewer bags."""
    return {_num_samples(tensor) for tensor in tensors.values() if not names.isdisjoint(tensor.keys())}


def _num_samples(features: KeyedJaggedTensor) -> int:
    if not features.variable_stride_per_key():
        return int(features.stride())
    inverse = features.inverse_indices_or_none()
    return int(inverse[1].shape[-1] if inverse is not None else max(features.stride_per_key(), default=0))


def _collect(
    place: str, value: Any, found: dict[int, tuple[str, KeyedJaggedTensor]], seen: dict[int, Any], depth: int
) -> None:
    if isinstance(value, KeyedJaggedTensor):
        found.setdefault(id(value), (place, value))
    elif not isinstance(value, LEAVES) and id(value) not in seen and depth < MAX_DEPTH:
        seen[id(value)] = value
        for suffix, part in _parts(value):
            _collect(place + suffix, part, found, seen, depth + 1)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from ((f".{name}", part) for name, part in zip(value._fields, value, strict=True))
    elif isinstance(value, Sequence | Set):
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    else:
        names = [*getattr(value, "__dict__", {}), *_slots(value)]
        if dataclasses.is_dataclass(value):
            names += [field.name for field in dataclasses.fields(value)]
        if hasattr(type(value), "sparse_features"):  # a property
            names.append("sparse_features")
        for name in dict.fromkeys(names):
            yield f".{name}", getattr(value, name, None)


def _slots(value: Any) -> Iterator[str]:
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        yield from [slots] if isinstance(slots, str) else slots
