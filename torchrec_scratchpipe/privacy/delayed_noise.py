# SPDX-License-Identifier: BSD-3-Clause
"""The noise of private training that a row has not got yet, in one draw.

Shapes: ``N`` rows, ``R`` rows of all tables of the pool, ``T`` tables of the pool, ``D`` row width.

In step s, every row is to get `-eta_s / B * noise_multiplier * clip * z_s`, z_s normal. A sum of normal numbers is one
normal number whose variance is the sum of theirs. So a row that nobody looked up in steps (a, b] gets, when somebody
does, one normal number times

    noise_multiplier * clip / B * sqrt(V(b) - V(a)),    V(t) = eta_1^2 + ... + eta_t^2.

The draw belongs to row and step b. Intervals of one row do not overlap, so that no draw is used twice.

Source: LazyDP (ASPLOS 2024); V in place of a number of steps, so that a learning rate may change.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from torchrec_scratchpipe.errors import PrivacyError
from torchrec_scratchpipe.privacy.random_numbers import normal_numbers

__all__ = ["DelayedNoise", "NoiseOf", "NormalNoise", "Places", "Steps"]


class Places(NamedTuple):
    """Which rows of which tables; the same for every sharding. [N] int64 each."""

    tables: Tensor  # numbers of tables in the model
    rows: Tensor  # in the whole table
    first_columns: Tensor  # of the column shard


class NoiseOf(Protocol):
    """Draws the noise of some rows for steps (since, until] at once."""

    def __call__(self, places: Places, since: Tensor, until: int, dim: int, squared_rates: Tensor) -> Tensor:
        """Shapes: `since` [N] int64, `squared_rates` [until + 1] float64, V of each step; returns [N, D] float32."""


class NormalNoise:
    """Noise as it is: normal.

    Args:
        scale: Its standard deviation in one step at a learning rate of 1: noise_multiplier * clip / B.
        seed: In [0, 2^64).
    """

    def __init__(self, scale: float, seed: int) -> None:
        self._scale = scale
        self._seed = seed

    def __call__(self, places: Places, since: Tensor, until: int, dim: int, squared_rates: Tensor) -> Tensor:
        """See :class:`NoiseOf`."""
        variances = squared_rates[until] - squared_rates[since]
        deviations = variances.sqrt_().mul_(self._scale).float()
        steps = torch.full_like(places.rows, until)
        numbers = normal_numbers(places.rows, places.tables, steps, places.first_columns, dim, self._seed)
        return numbers.mul_(deviations[:, None].to(numbers.device))


class Steps:
    """The steps of one lookup so far, and the sums of their squared learning rates; 8 bytes a step."""

    def __init__(self, num_steps: int = 0) -> None:
        self._sums = torch.zeros(max(1024, num_steps + 1), dtype=torch.float64)
        self.num_steps = num_steps

    def end(self, rate: float) -> None:
        """A step has ended that was taken with this learning rate."""
        if self.num_steps + 1 == self._sums.numel():
            self._sums = torch.cat([self._sums, torch.zeros_like(self._sums)])
        self._sums[self.num_steps + 1] = self._sums[self.num_steps] + rate * rate
        self.num_steps += 1

    @property
    def squared_rates(self) -> Tensor:
        """[steps + 1] float64 on the host: V of each step."""
        return self._sums[: self.num_steps + 1]

    def load(self, squared_rates: Tensor) -> None:
        """Go on from what :attr:`squared_rates` was."""
        self.num_steps = squared_rates.numel() - 1
        self._sums = torch.zeros(2 * squared_rates.numel() + 1024, dtype=torch.float64)
        self._sums[: squared_rates.numel()] = squared_rates


class DelayedNoise:
    """Which noise the rows of a pool are still to get; 4 bytes a row. See :class:`LateUpdates`.

    Args:
        row_offsets: [T + 1]. Where the pool's tables begin.
        tables: [T]. Their numbers in the model.
        first_rows: [T]. Where the shard of each begins in its table.
        first_columns: [T]. The same for columns.
        dim: D.
        device: Of the slot map.
        steps: Of the lookup.
        noise_of: Draws.
        may_train: Whether a step is under way whose gradients are clipped.
    """

    def __init__(
        self,
        row_offsets: Sequence[int],
        tables: Sequence[int],
        first_rows: Sequence[int],
        first_columns: Sequence[int],
        dim: int,
        device: torch.device,
        steps: Steps,
        noise_of: NoiseOf,
        may_train: Callable[[], bool],
    ) -> None:
        def tensor(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        self._bounds = tensor(row_offsets[1:])
        self._shifts = tensor([first - offset for first, offset in zip(first_rows, row_offsets, strict=False)])
        self._tables = tensor(tables)
        self._first_columns = tensor(first_columns)
        self._dim = dim
        self._steps = steps
        self._noise_of = noise_of
        self._may_train = may_train
        self._all_to = steps.num_steps  # all rows have their noise up to this step, or a later one
        self.updated_to = torch.full((row_offsets[-1],), steps.num_steps, dtype=torch.int32, device=device)

    @property
    def is_any_due(self) -> bool:
        """See :class:`LateUpdates`."""
        return self._all_to < self._steps.num_steps

    def note_all_taken(self) -> None:
        """See :class:`LateUpdates`."""
        self._all_to = self._steps.num_steps

    def note_loaded(self) -> None:
        """Others have written :attr:`updated_to`."""
        self._all_to = int(self.updated_to.min()) if self.updated_to.numel() else self._steps.num_steps

    def take(self, rows: Tensor) -> Tensor | None:
        """See :class:`LateUpdates`."""
        until = self._steps.num_steps
        since = self.updated_to.index_select(0, rows)
        is_due = since < until
        num_due = int(is_due.sum())  # a device is waited for
        if num_due == 0:
            return None
        self.updated_to.index_fill_(0, rows, until)
        if num_due == rows.numel():
            return self._draw(rows, since, until)
        due = torch.zeros((rows.numel(), self._dim), dtype=torch.float32, device=rows.device)
        due[is_due] = self._draw(rows[is_due], since[is_due], until)
        return due

    def _draw(self, rows: Tensor, since: Tensor, until: int) -> Tensor:
        table = torch.bucketize(rows, self._bounds, right=True)
        places = Places(self._tables[table], rows + self._shifts[table], self._first_columns[table])
        return self._noise_of(places, since.long().cpu(), until, self._dim, self._steps.squared_rates)

    def check_may_train(self) -> None:
        """See :class:`LateUpdates`. Raises PrivacyError."""
        if not self._may_train():
            raise PrivacyError(
                "backward runs through a lookup of a private model outside ScratchPipeTrainPipeline.progress(): its "
                "gradients would be neither clipped nor counted. Train by the pipeline that was given privacy, one "
                "backward a step; evaluate under torch.no_grad()."
            )
