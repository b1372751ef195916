# SPDX-License-Identifier: BSD-3-Clause
"""Updates that rows get late: of steps in which nobody looked them up, before somebody does.

Shapes: ``N`` rows, ``R`` rows of all tables of the pool, ``D`` row width.
"""

from typing import Protocol

from torch import Tensor

__all__ = ["LateUpdates"]


class LateUpdates(Protocol):
    """What the rows of one pool are still to get.

    A row must have all of it before it is looked up, and before somebody outside is shown it (hazard 10). Where a row
    is does not matter: it moves between scratchpad and table without changing.
    """

    updated_to: Tensor  # [R] int32, on the device of the slot map: the step up to which a row has its updates

    @property
    def is_any_due(self) -> bool:
        """Whether a row may be still to get something."""

    def take(self, rows: Tensor) -> Tensor | None:
        """What is to be added to the weights of some rows now; the caller adds it. None: nothing.

        Shapes: `rows` [N] int64, each once, on the device of the slot map; returns [N, D] there.
        """

    def note_all_taken(self) -> None:
        """All rows have been taken since the last step."""

    def note_loaded(self) -> None:
        """Somebody has written :attr:`updated_to`."""

    def check_may_train(self) -> None:
        """Raise if rows are about to be trained in a way that does not count as a step."""
