# SPDX-License-Identifier: BSD-3-Clause
"""Which shards of a plan share slots, and what they miss together."""

from collections.abc import Hashable, Sequence

from torchrec_scratchpipe.planning.reuse import misses_of_pool
from torchrec_scratchpipe.planning.sizing import ShardToSize, SizedTable

__all__ = ["Members", "misses_of_members", "num_slots_of_members", "pools_of"]

Members = list[tuple[SizedTable, ShardToSize]]  # of one pool


def pools_of(tables: Sequence[SizedTable]) -> dict[tuple[int, Hashable], Members]:
    """By rank and pool, the shards that have slots there."""
    pools: dict[tuple[int, Hashable], Members] = {}
    for sized in tables:
        for shard in sized.table.shards:
            if not sized.is_whole:
                pools.setdefault((shard.rank, shard.pool), []).append((sized, shard))
    return pools


def num_slots_of_members(members: Members) -> float:
    """The slots that the shards of a pool share."""
    return sum(sized.num_slots * shard.share for sized, shard in members)


def misses_of_members(members: Members, num_slots: float, order: str = "ours") -> list[float]:
    """Per shard, the unique rows of a step that it misses."""
    reuses = [sized.table.reuse.scaled(share=shard.share) for sized, shard in members]
    per_bin = misses_of_pool(reuses, num_slots, order)
    return [reuse.in_second_half(misses) for reuse, misses in zip(reuses, per_bin, strict=True)]
