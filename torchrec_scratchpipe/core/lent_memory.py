# SPDX-License-Identifier: BSD-3-Clause
"""Memory of a host table in the hands of somebody whom PyTorch's operations do not go through.

NumPy, DLPack, storages.
"""

import ctypes
import weakref
from typing import Any

import torch
from torch import Tensor

__all__ = ["LentMemories", "LentMemory"]


class LentMemory:
    """A piece of a table that is lent until its last alias has gone.

    Every alias of a storage keeps the whole storage alive, and the table's own tensors are aliases too. So what is lent
    has a storage of its own, over the same memory, whose end can be seen.
    """

    def __init__(self, shown: Tensor) -> None:
        num_values = 1 + sum((size - 1) * stride for size, stride in zip(shown.shape, shown.stride(), strict=True))
        buffer: Any = (ctypes.c_char * (num_values * shown.dtype.itemsize)).from_address(shown.data_ptr())
        buffer.keeps = shown
        self._buffer = weakref.ref(buffer)
        values = torch.frombuffer(buffer, dtype=shown.dtype, count=num_values)
        self._tensor: Tensor | None = values.as_strided(shown.shape, shown.stride())

    def take(self) -> Tensor:
        """The memory as a plain tensor; call it once, because nothing of it is kept here."""
        tensor, self._tensor = self._tensor, None
        assert tensor is not None, "lent memory is taken once"
        return tensor

    @property
    def is_lent(self) -> bool:
        """Whether somebody still has it."""
        return self._buffer() is not None


class LentMemories:
    """All that is lent of one table, or of several."""

    def __init__(self) -> None:
        self._memories: list[LentMemory] = []

    def add(self, memory: LentMemory) -> None:
        """Note one more."""
        self._memories = [*(other for other in self._memories if other.is_lent), memory]

    @property
    def is_any_lent(self) -> bool:
        """Whether somebody has any of it."""
        if self._memories:
            self._memories = [memory for memory in self._memories if memory.is_lent]
        return bool(self._memories)
