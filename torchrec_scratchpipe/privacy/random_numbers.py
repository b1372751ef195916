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
CHUNK_COUNTERS = 16384  # what a chunk needs stays in a processor's cache: 128 KiB a word

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counters: Sequence[Tensor], seed: int) -> Words:
    """Four random words of four: each in [0, 2^32), int64.

    Args:
        counters: Four tensors of one shape, int64, each number in [0, 2^32).
        seed: In [0, 2^64).

    Returns:
        Four tensors of the same shape.
    """
    words = [counter.clone() for counter in counters]
    keys = [seed & WORD, seed >> 32]
    product = [torch.empty_like(words[0]) for _ in range(2)]
    for _ in range(NUM_ROUNDS):
        # A product of two words overflows into the sign, and its bits are right. `>>` copies the sign: hence the mask.
        torch.mul(words[0], MULTIPLIERS[0], out=product[0])
        torch.mul(words[2], MULTIPLIERS[1], out=product[1])
        torch.bitwise_and(product[1] >> 32, WORD, out=words[0]).bitwise_xor_(words[1]).bitwise_xor_(keys[0])
        torch.bitwise_and(product[0] >> 32, WORD, out=words[2]).bitwise_xor_(words[3]).bitwise_xor_(keys[1])
        torch.bitwise_and(product[1], WORD, out=words[1])
        torch.bitwise_and(product[0], WORD, out=words[3])
        keys = [(key + step) & WORD for key, step in zip(keys, KEY_STEPS, strict=True)]
    return words[0], words[1], words[2], words[3]


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
    for first in range(0, rows.numel(), rows_together):
        chunk = slice(first, first + rows_together)
        shape = (rows[chunk].numel(), num_blocks)
        counters = [words[chunk, None].expand(shape) for words in (rows, tables, steps)]
        counters.append(blocks + (first_columns[chunk, None] // COLUMNS_OF_A_BLOCK))
        words = philox(counters, seed)
        _to_normal(words[0], words[1], numbers[chunk, :, 0:2])
        _to_normal(words[2], words[3], numbers[chunk, :, 2:4])
    return numbers.view(rows.numel(), num_blocks * COLUMNS_OF_A_BLOCK)[:, :dim]


def _to_normal(first: Tensor, second: Tensor, out: Tensor) -> None:
    """Two normal numbers of two random words (Box and Muller). Shapes: `out` [..., 2]."""
    # In (0, 1]: small ones keep their digits, which the largest normal numbers come from.
    radius = first.to(torch.float32).mul_(2.0**-32).add_(2.0**-33).log_().mul_(-2.0).sqrt_()
    angle = second.to(torch.float32).mul_(2.0**-32 * 2.0 * math.pi)
    torch.mul(radius, angle.cos(), out=out[..., 0])
    torch.mul(radius, angle.sin_(), out=out[..., 1])
