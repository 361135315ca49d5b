"""Exercise 09 · Paged KV cache: where do the bytes live?

Nobody knows how long an answer gets, so memory set aside for the longest one is mostly wasted. Paging cuts the cache
into *blocks* of a few tokens; a sequence owns a list of blocks, its *block table*, which need not be neighbours. You
write the pool of blocks, the arithmetic from a token to its place, and attention that reads through a block table.

A *slot* is the place of one token: `block · block_size + offset`. Pools are `[kv_heads, num_blocks, block_size, d]`.

Lesson: 09_paged_kv · 50 minutes · difficulty ●●●○○
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class BlockPool:
    """Hands out the blocks 1 … num_blocks - 1. Block 0 is never given to anybody: padding is written there.

    The block that has been free for longest is taken first, the smallest number at the beginning.

    >>> pool = BlockPool(num_blocks=4)
    >>> pool.allocate(2)
    [1, 2]
    >>> pool.allocate(2) is None  # one block is left: nothing happens
    True
    >>> pool.free([2, 1])
    >>> pool.allocate(3), pool.num_free
    ([3, 2, 1], 0)
    """

    def __init__(self, num_blocks: int) -> None:
        """All blocks but number 0 are free."""
        raise NotImplementedError("__init__ is yours to write")

    @property
    def num_free(self) -> int:
        """How many blocks can still be had."""
        raise NotImplementedError("num_free is yours to write")

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, or change nothing and return None if there are not so many."""
        raise NotImplementedError("allocate is yours to write")

    def free(self, blocks: list[int]) -> None:
        """Give blocks back, in this order. Raises ValueError, and changes nothing, if one of them is free already.

        A block that is given back twice would be handed to two sequences, and each would overwrite the other's keys.
        """
        raise NotImplementedError("free is yours to write")


def blocks_to_add(block_table: list[int], num_tokens: int, block_size: int) -> int:
    """How many more blocks a sequence with this table needs before it can hold `num_tokens` tokens; never below 0.

    >>> blocks_to_add([7], num_tokens=16, block_size=16), blocks_to_add([7], num_tokens=17, block_size=16)
    (0, 1)
    """
    raise NotImplementedError("blocks_to_add is yours to write")


def slot_mapping(block_table: list[int], start: int, end: int, block_size: int) -> list[int]:
    """The slots of the tokens at positions start … end - 1 of a sequence.

    Position p lies in the table's block number p // block_size, at the offset p % block_size.

    >>> slot_mapping([5, 2], start=2, end=6, block_size=4)  # the end of block 5, then the beginning of block 2
    [22, 23, 8, 9]
    """
    raise NotImplementedError("slot_mapping is yours to write")


def write_kv(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, slots: list[int]) -> tuple[Tensor, Tensor]:
    """Store k and v `[num_tokens, kv_heads, d]` in the pools, token i at slot `slots[i]`. Returns the pools, changed.

    >>> pool = torch.zeros(1, 2, 2, 1)
    >>> write_kv(torch.tensor([[[3.0]], [[4.0]]]), torch.ones(2, 1, 1), pool, pool.clone(), slots=[3, 0])[0].flatten()
    tensor([4., 0., 0., 3.])
    """
    raise NotImplementedError("write_kv is yours to write")


def paged_decode_attention(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, block_table: list[int], seq_len: int, scale: float
) -> Tensor:
    """The newest token's attention over its sequence: q `[heads, d]` -> `[heads, d]`, in q's dtype.

    The sequence's `seq_len` tokens, the newest included, lie where the block table says. The rest of the last block,
    and blocks behind it, hold anything, even NaN: they must not be read. Softmax in float32. Neighbouring query heads
    share a key/value head, as in exercise 02.

    >>> k_pool, v_pool = torch.zeros(1, 3, 2, 1), torch.arange(6.0).view(1, 3, 2, 1)
    >>> paged_decode_attention(torch.zeros(1, 1), k_pool, v_pool, block_table=[2, 1], seq_len=3, scale=1.0)
    tensor([[3.6667]])
    """
    raise NotImplementedError("paged_decode_attention is yours to write")
