"""Exercise 10 · Prefix caching: why compute a shared prompt twice?

Thousands of requests begin with the same system prompt. Its keys and values are in the cache already, in blocks: all
that is missing is a way to find them again. You write the names of blocks, the search, the queue that decides what is
forgotten first, and copy-on-write, which lets two sequences share a block until one of them writes.

Lesson: 10_prefix_caching · 60 minutes · difficulty ●●●○○
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict


def hash_blocks(tokens: list[int], block_size: int, salt: str = "") -> list[str]:
    """The names of all *full* blocks of a text, as a chain: each name depends on everything before its block.

    The KV of a token depends on all tokens before it, so equal tokens in a block do not make equal blocks. With the
    parent's name in the hash, they do only after equal prefixes. The name of a block with tokens 7, 8 behind the
    parent `p` is `hashlib.sha256(b"p|7,8").hexdigest()`; the parent of the first block is `salt`, so that users with
    different salts share nothing. Tokens behind the last full block have no name.

    >>> names = hash_blocks([7, 8, 7, 8, 9], block_size=2)
    >>> names == [hashlib.sha256(b"|7,8").hexdigest(), hashlib.sha256(names[0].encode() + b"|7,8").hexdigest()]
    True
    """
    raise NotImplementedError("hash_blocks is yours to write")


def longest_match(names: list[str], cached: dict[str, int], num_tokens: int, block_size: int) -> tuple[list[int], int]:
    """The blocks that a prompt can start with, and how many of its `num_tokens` tokens they save.

    `names` are those of the prompt's full blocks, `cached` tells the block that holds each known name. Take blocks from
    the beginning up to the first unknown one: behind a gap nothing counts. The last token is always computed, because
    its logits are wanted: a prompt that is known entirely saves one token less than it has.

    >>> longest_match(["a", "b", "c"], {"a": 5, "c": 6}, num_tokens=7, block_size=2)
    ([5], 2)
    >>> longest_match(["a", "b"], {"a": 5, "b": 6}, num_tokens=4, block_size=2)
    ([5, 6], 3)
    """
    raise NotImplementedError("longest_match is yours to write")


class FreeQueue:
    """The blocks that nobody uses, in the order in which they will be taken.

    A free block may still hold keys that somebody asks for again: it waits at the end of the queue, so that what was
    useful last is forgotten last (LRU). A block that nobody can find again goes to the head: it is taken first. A block
    in use is not in the queue, so it can never be evicted. All methods take constant time: use an OrderedDict.

    >>> queue = FreeQueue([1, 2, 3])
    >>> queue.remove(2)  # a request found block 2 in the cache
    >>> queue.append(2)  # it is done; the cache still knows the block
    >>> queue.popleft(), len(queue)
    (1, 2)
    >>> queue.prepend(1)  # its content is worth nothing
    >>> [queue.popleft() for _ in range(3)]
    [1, 3, 2]
    """

    def __init__(self, blocks: list[int]) -> None:
        """All of these blocks are free; the first is taken first."""
        raise NotImplementedError("__init__ is yours to write")

    def __len__(self) -> int:
        """How many blocks are free."""
        raise NotImplementedError("__len__ is yours to write")

    def popleft(self) -> int:
        """Take the block at the head, to be used for something new."""
        raise NotImplementedError("popleft is yours to write")

    def remove(self, block: int) -> None:
        """Take this very block out, wherever it is: a prompt found its content in the cache."""
        raise NotImplementedError("remove is yours to write")

    def append(self, block: int) -> None:
        """A block became free that the cache knows: it goes to the end."""
        raise NotImplementedError("append is yours to write")

    def prepend(self, block: int) -> None:
        """A block became free that nobody can find again: it goes to the head."""
        raise NotImplementedError("prepend is yours to write")


class SharedBlocks:
    """Blocks that several sequences read, with a count of how many tables hold each: `ref_counts[block]`.

    One prompt, two answers: `fork` gives the second answer a table of its own over the same blocks. They part when one
    of them writes: `write` gives the writer a copy of the block (copy-on-write).

    >>> blocks = SharedBlocks(num_blocks=5)
    >>> first = blocks.new(2)
    >>> second = blocks.fork(first)
    >>> first, second, blocks.ref_counts
    ([0, 1], [0, 1], [2, 2, 0, 0, 0])
    >>> blocks.write(second, 1)  # shared: copy block 1 into block 2, then write there
    (1, 2)
    >>> first, second, blocks.ref_counts
    ([0, 1], [0, 2], [2, 1, 1, 0, 0])
    >>> blocks.write(second, 1) is None  # nobody else holds block 2
    True
    >>> blocks.release(first)
    >>> blocks.ref_counts
    [1, 0, 1, 0, 0]
    """

    def __init__(self, num_blocks: int) -> None:
        """Nobody holds any block: `ref_counts` is a list of `num_blocks` zeros."""
        raise NotImplementedError("__init__ is yours to write")

    def new(self, count: int) -> list[int]:
        """A table of `count` free blocks, those with the smallest numbers first."""
        raise NotImplementedError("new is yours to write")

    def fork(self, table: list[int]) -> list[int]:
        """A second table over the same blocks."""
        raise NotImplementedError("fork is yours to write")

    def write(self, table: list[int], index: int) -> tuple[int, int] | None:
        """Make the block `table[index]` writable. Returns (source, target) if its content must be copied, else None."""
        raise NotImplementedError("write is yours to write")

    def release(self, table: list[int]) -> None:
        """The sequence is done: it holds none of its blocks any more, and its table is empty."""
        raise NotImplementedError("release is yours to write")
