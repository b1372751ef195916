# SPDX-License-Identifier: BSD-3-Clause
"""What all ranks of a job do together; an error on one of them is raised on all."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

__all__ = ["Ranks"]

T = TypeVar("T")

_group_of_world: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None


def _group_of_one() -> dist.ProcessGroup:
    """For all jobs of one rank: nobody is waited for, so that no order is kept. Each group has threads."""
    global _group_of_world
    world = dist.group.WORLD
    assert world is not None, "there are process groups"
    if _group_of_world is None or _group_of_world[0] is not world:
        _group_of_world = world, dist.new_group(backend="gloo")
    return _group_of_world[1]


class Ranks:
    """Ranks that call the same methods in the same order, in a gloo group of their own."""

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self.group: dist.ProcessGroup | None = None
        self.rank, self.world_size = 0, 1
        if dist.is_available() and dist.is_initialized():
            # Of its own, because its collectives run beside those of training, in another order.
            ranks = None if process_group is None else dist.get_process_group_ranks(process_group)
            self.group = dist.new_group(ranks, backend="gloo") if dist.get_world_size() > 1 else _group_of_one()
            self.rank, self.world_size = dist.get_rank(self.group), dist.get_world_size(self.group)

    def gather(self, value: T) -> list[T]:
        """Exchange values."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """Let rank 0 make something for all."""
        return self.gather(make() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def first_or_fail(self, do: Callable[[], object], make_error: Callable[[str], Exception]) -> None:
        """As :meth:`each_or_fail`, on rank 0 alone."""
        self.each_or_fail(lambda: do() if self.rank == 0 else None, make_error)

    def each_or_fail(self, do: Callable[[], T], make_error: Callable[[str], Exception]) -> T:
        """Do something on every rank; if it fails on any, all raise what the first of them said."""
        error: Exception | None = None
        try:
            result = do()
        except Exception as caught:  # whatever it is, the other ranks must not wait for this one
            error = caught
        reason = None if error is None else str(error) or repr(error)
        if reason is not None and self.world_size > 1:
            reason = f"rank {self.rank}: {reason}"
        first = next((other for other in self.gather(reason) if other is not None), None)
        if first is None:
            return result
        raise make_error(first) from error
