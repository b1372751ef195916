# SPDX-License-Identifier: BSD-3-Clause
"""Random numbers that depend on where they are used alone: Philox4x32-10, and normal numbers of it.

A counter of four words and a key of two give four random words. The counter here is (row, table, step, block of four
columns), and the key is the seed. So a number does not depend on the order in which numbers are asked for, nor on who
asks.

Shapes: ``N`` rows, ``D`` row width.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["COLUMNS_OF_A_BLOCK", "normal_numbers", "philox"]

COLUMNS_OF_A_BLOCK = 4
NUM_ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
# Bounds what a chunk needs: 3 MiB of words and 2 MiB of others. On an AMD EPYC, chunks of 16,384 take a quarter longer:
# there are more calls.
CHUNK_COUNTERS = 65536

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counters: Sequence[Tensor], seed: int) -> Words:
    """Four random words of four: each in [0, 2^32), int64.

    Args:
        counters: Four tensors of one shape, int64, each number in [0, 2^32).
        seed: In [0, 2^64).

    Returns:
        Four tensors of the same shape.
    """
    pairs = _Pairs(counters[0].numel(), counters[0].device)
    for word, counter in zip(pairs.words, counters, strict=True):
        word.view(counter.shape).copy_(counter)
    pairs.mix(seed)
    first, second, third, fourth = (word.view(counters[0].shape) for word in pairs.words)
    return first, second, third, fourth


class _Pairs:
    """The words of many counters, two and two, so that one operation does for two of them.

    Args:
        size: How many counters.
        device: Where they are.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.evens, self.odds, self._products = torch.empty((3, 2, size), dtype=torch.int64, device=device)
        self._key_rounds = torch.tensor([[[step] for step in KEY_STEPS]], dtype=torch.int64, device=device)
        self._rounds = torch.arange(NUM_ROUNDS, dtype=torch.int64, device=device)[:, None, None]

    @property
    def words(self) -> Words:
        """[size] each, in their order."""
        return self.evens[0], self.odds[0], self.evens[1], self.odds[1]

    def mix(self, seed: int) -> None:
        """Make random words of the words."""
        first_key = torch.tensor([[seed & WORD], [seed >> 32]], dtype=torch.int64, device=self.evens.device)
        keys = (first_key + self._key_rounds * self._rounds) & WORD
        for key in keys.unbind():
            # A product of two words overflows into the sign, and its bits are right. `>>` copies the sign; what is
            # above a word is cut off where it would count.
            torch.mul(self.evens[1], MULTIPLIERS[1], out=self._products[0])
            torch.mul(self.evens[0], MULTIPLIERS[0], out=self._products[1])
            torch.bitwise_right_shift(self._products, 32, out=self.evens)
            self.evens.bitwise_xor_(self.odds).bitwise_xor_(key).bitwise_and_(WORD)
            self.odds, self._products = self._products, self.odds
        self.odds.bitwise_and_(WORD)


def normal_numbers(rows: Tensor, tables: Tensor, steps: Tensor, first_columns: Tensor, dim: int, seed: int) -> Tensor:
    """One standard normal number for each column of each row.

    The largest is 6.66, because a random word has 32 bits; of 10^11 numbers, three are larger in truth.

    Args:
        rows: [N] int64. In [0, 2^32).
        tables: [N] int64. In [0, 2^32).
        steps: [N] int64. In [0, 2^32).
        first_columns: [N] int64. The first of D columns, for each row; multiples of 4.
        dim: D, any number; for others than multiples of 4, the last block is cut.
        seed: In [0, 2^64).

    Returns:
        [N, D] float32, on the same device.
    """
    num_blocks = -(-dim // COLUMNS_OF_A_BLOCK)
    numbers = torch.empty((rows.numel(), num_blocks, COLUMNS_OF_A_BLOCK), dtype=torch.float32, device=rows.device)
    blocks = torch.arange(num_blocks, dtype=torch.int64, device=rows.device)
    # A GPU takes all at once.
    rows_together = max(1, CHUNK_COUNTERS // max(1, num_blocks)) if rows.device.type == "cpu" else max(1, rows.numel())
    pairs = None
    for first in range(0, rows.numel(), rows_together):
        chunk = slice(first, first + rows_together)
        shape = (rows[chunk].numel(), num_blocks)
        if pairs is None or pairs.evens[0].numel() != shape[0] * num_blocks:
            pairs = _Pairs(shape[0] * num_blocks, rows.device)
        for word, values in zip(pairs.words, (rows, tables, steps), strict=False):
            word.view(shape).copy_(values[chunk, None])
        torch.add(blocks, first_columns[chunk, None] // COLUMNS_OF_A_BLOCK, out=pairs.words[3].view(shape))
        pairs.mix(seed)
        _to_normal(pairs.evens, pairs.odds, numbers[chunk].view(-1, 2, 2).transpose(0, 1))
    return numbers.view(rows.numel(), num_blocks * COLUMNS_OF_A_BLOCK)[:, :dim]


def _to_normal(first: Tensor, second: Tensor, out: Tensor) -> None:
    """Two normal numbers of two random words (Box and Muller). Shapes: `out` [..., 2]."""
    # In (0, 1]: small ones keep their digits, which the largest normal numbers come from.
    radius = first.to(torch.float32).mul_(2.0**-32).add_(2.0**-33).log_().mul_(-2.0).sqrt_()
    angle = second.to(torch.float32).mul_(2.0**-32 * 2.0 * math.pi)
    torch.mul(radius, angle.cos(), out=out[..., 0])
    torch.mul(radius, angle.sin_(), out=out[..., 1])
