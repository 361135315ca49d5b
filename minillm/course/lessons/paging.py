"""What blocks waste, and how many requests a cache holds: counted with the engine's own allocator.

A request holds whole blocks, so on average half of its last one is empty: (B - 1) / 2 places, if lengths end anywhere
in a block. A cache without blocks is the same thing with one block as long as the longest request may become.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from minillm.cache.blocks import BlockPool, BlockTable
from minillm.errors import ConfigError


@dataclass(frozen=True)
class Paging:
    """One block size on a table of lengths: what was allocated, in token places."""

    block_size: int
    lengths: tuple[int, ...]
    num_blocks: int  # allocated for all of them
    num_places: int  # of a cache that is filled in their order
    num_fit: int  # requests that fit into it

    @property
    def waste(self) -> float:
        """Empty places per request."""
        return (self.num_blocks * self.block_size - sum(self.lengths)) / len(self.lengths)

    @property
    def waste_share(self) -> float:
        """Part of what is held that is empty."""
        return 1 - sum(self.lengths) / (self.num_blocks * self.block_size)

    @property
    def waste_predicted(self) -> float:
        """(B - 1) / 2, until a block holds the longest request: then B less the mean length."""
        if self.block_size < max(self.lengths):
            return (self.block_size - 1) / 2
        return self.block_size - fmean(self.lengths)

    @property
    def fit_predicted(self) -> float:
        """Places over what a request of mean length holds."""
        return self.num_places / (fmean(self.lengths) + self.waste_predicted)


def measure_paging(lengths: Sequence[int], block_size: int, num_places: int) -> Paging:
    """Allocate blocks for all lengths, then fill a cache of `num_places` with them, again and again until it is full.

    Raises `ConfigError` without lengths, and for a cache that does not hold the first of them.
    """
    if not lengths or min(lengths) < 1:
        raise ConfigError("Give at least one length, and none below 1: there is nothing to allocate.")
    needed = sum(-(-length // block_size) for length in lengths)
    pool = BlockPool(1 + needed, block_size)
    for length in lengths:
        pool.prepare(BlockTable(), 0, length)
    return Paging(
        block_size, tuple(lengths), pool.num_usable - pool.num_free, num_places, _fit(lengths, block_size, num_places)
    )


def _fit(lengths: Sequence[int], block_size: int, num_places: int) -> int:
    """Requests that get their blocks before the pool has none left for the next."""
    pool, count = BlockPool(1 + num_places // block_size, block_size), 0
    while pool.prepare(BlockTable(), 0, lengths[count % len(lengths)]) is not None:
        count += 1
    return count
