"""Blocks: who owns a piece of KV cache, who shares it, and who still remembers it.

The KV cache is cut into blocks of `block_size` tokens (Kwon et al. 2023, arXiv:2309.06180), so that a sequence needs
no contiguous memory and two sequences with a common beginning can read the same block. This file does the book-keeping
in plain Python and never sees a tensor. Four rules carry all of it:

* A block is free when its reference count is 0. Nothing else frees a block.
* A free block may still be known to the prefix cache; it can be revived by a hit, or evicted, oldest first.
* A block enters the prefix cache only when it is full and its KV is computed (`commit`).
* A block is written only while one table owns it and the cache does not know it (`prepare` sees to that).

    hits = pool.lookup(tokens)                      # what the prefix cache knows of a prompt's beginning
    table, start = pool.open(tokens, hits)          # a table that holds it
    copies = pool.prepare(table, start, end)        # makes positions start..end-1 writable; None: blocks are lacking
    ...                                             # copy the blocks, compute the KV
    pool.commit(table, tokens, num_computed=end)    # full blocks become known to others
    pool.release(table)
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from minillm.errors import ConfigError, require

DUMMY_BLOCK = 0  # padding is written here, so that no kernel needs a special case for it; no sequence ever owns it


class Prefix:
    """The identity of a full block: its tokens, after everything that came before them.

    KV at a position depends on all tokens up to it, so a block is named by its whole prefix: a chain of links, one per
    block, that starts at a root holding whatever else changes the KV (model, format, salt). As a dictionary key it
    costs one block's tokens: the hash is chained, and comparing two chains ends where they meet in the same link.
    Colliding hashes are harmless: equality compares tokens, all the way down.
    """

    __slots__ = ("_hash", "parent", "tokens")

    def __init__(self, tokens: tuple[Hashable, ...], parent: Prefix | None = None) -> None:
        self.tokens = tokens
        self.parent = parent
        self._hash = hash((parent, tokens))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        mine: Prefix | None = self
        theirs = other if isinstance(other, Prefix) else None
        while mine is not theirs:
            if mine is None or theirs is None or mine.tokens != theirs.tokens:
                return False
            mine, theirs = mine.parent, theirs.parent
        return True


@dataclass(eq=False)
class Block:
    """One block: how many tables hold it, and the name the prefix cache knows it by, if it does."""

    id: int
    ref_count: int = 0
    prefix: Prefix | None = None


@dataclass(eq=False)
class BlockTable:
    """Where the KV of one sequence lies: block `blocks[i]` holds positions i * block_size and on.

    The first `num_hashed` blocks are full, computed and named by `prefix`. The table only grows; rolling back is a
    matter of counters (`BlockPool.truncate`). It is an array, so that a step copies it without looking at each number.
    """

    prefix: Prefix = field(default_factory=lambda: Prefix(()))
    blocks: array[int] = field(default_factory=lambda: array("i"))
    num_hashed: int = 0


class FreeQueue(OrderedDict[int, None]):
    """The blocks that nobody holds, in the order in which they will be taken. Every method takes constant time."""

    def popleft(self) -> int:
        """Take the block that has been useless for longest."""
        return self.popitem(last=False)[0]

    def remove(self, block: int) -> None:
        """Take this very block: a prompt found its content in the cache."""
        del self[block]

    def append(self, block: int) -> None:
        """Put a block at the end: the cache knows it, and it was useful just now."""
        self[block] = None

    def prepend(self, block: int) -> None:
        """Put a block at the head: nobody can find what is in it."""
        self.append(block)
        self.move_to_end(block, last=False)


class BlockPool:
    """Hands out the blocks 1..num_blocks-1 of a cache and remembers what is in them.

    `identity` names everything that changes the KV of the same tokens: model, dtype, format. Raises `ConfigError` for
    sizes that cannot hold anything.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, identity: Hashable = None, enable_prefix_caching: bool = True
    ) -> None:
        sizes = (num_blocks, block_size)
        require(num_blocks > 1 and block_size > 0, "(num_blocks, block_size)", sizes, "at least (2, 1)", ConfigError)
        self.block_size = block_size
        self.identity = identity
        self.enable_prefix_caching = enable_prefix_caching
        self.blocks = [Block(index) for index in range(num_blocks)]
        self.reset()

    def reset(self) -> None:
        """Take every block back and forget what is in them. Tables that still hold blocks are void."""
        for block in self.blocks:
            block.ref_count, block.prefix = 0, None
        self.free = FreeQueue((index, None) for index in range(1, len(self.blocks)))
        self.cached: dict[Prefix, Block] = {}  # what the prefix cache knows, held or free

    @property
    def num_usable(self) -> int:
        """Blocks that sequences can own: all but the dummy."""
        return len(self.blocks) - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, whether the prefix cache remembers them or not."""
        return len(self.free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def lookup(self, tokens: Sequence[int], cache_salt: str | None = None, hits: Sequence[Prefix] = ()) -> list[Prefix]:
        """The names of the known blocks at the beginning of `tokens`. Changes nothing.

        `hits`: what an earlier look found. Only what comes after it is hashed again, so that a request which waits for
        blocks does not pay for its prefix in every step. Requests with different `cache_salt` never share blocks.
        """
        names = list(takewhile(self.cached.__contains__, hits))
        parent = names[-1] if names else Prefix((self.identity, cache_salt))
        for start in range(len(names) * self.block_size, len(tokens) - self.block_size + 1, self.block_size):
            block = self.cached.get(Prefix(tuple(tokens[start : start + self.block_size]), parent))
            if block is None or block.prefix is None:
                break
            parent = block.prefix  # this very link, so that comparing its children ends here
            names.append(parent)
        return names

    def fits(self, hits: Sequence[Prefix], num_tokens: int, spare: int = 0) -> bool:
        """Whether a table that begins with `hits` can grow to `num_tokens` tokens and leave `spare` blocks over."""
        held = [self.cached[prefix].ref_count > 0 for prefix in hits]
        copied = bool(held) and held[-1] and len(hits) * self.block_size >= num_tokens  # its last token is computed
        return self.blocks_for(num_tokens) - sum(held) + copied + spare <= self.num_free

    def open(
        self, tokens: Sequence[int], hits: Sequence[Prefix], cache_salt: str | None = None
    ) -> tuple[BlockTable, int]:
        """A table that holds the blocks that `lookup` found, and the number of tokens it saves.

        The last token always stays to be computed, because its logits are wanted: a prompt that is known entirely
        costs one token.
        """
        table = BlockTable(hits[-1] if hits else Prefix((self.identity, cache_salt)), num_hashed=len(hits))
        for prefix in hits:
            block = self.cached[prefix]
            self._hold(block)
            table.blocks.append(block.id)
        num_computed = max(0, min(len(hits) * self.block_size, len(tokens) - 1))
        self.truncate(table, num_computed)
        return table, num_computed

    def prepare(self, table: BlockTable, start: int, end: int) -> list[tuple[int, int]] | None:
        """Make positions start..end-1 of the table writable, or change nothing and return None if blocks are lacking.

        Appends blocks up to `end`. A block that others hold too is replaced by a fresh one: copy-on-write, and the
        caller must copy each returned `(source, target)` before the step writes anything. A block that only the prefix
        cache knows is forgotten there instead.
        """
        written = range(start // self.block_size, min(self.blocks_for(end), len(table.blocks)))
        shared = [index for index in written if self.blocks[table.blocks[index]].ref_count > 1]
        num_new = max(0, self.blocks_for(end) - len(table.blocks))
        if len(shared) + num_new > self.num_free:
            return None
        copies = [(table.blocks[index], self._take()) for index in shared]
        for index, (source, target) in zip(shared, copies, strict=True):
            table.blocks[index] = target
            self._drop(self.blocks[source])
        for index in written:
            self._forget(self.blocks[table.blocks[index]])
        table.blocks.extend(self._take() for _ in range(num_new))
        return copies

    def commit(self, table: BlockTable, tokens: Sequence[int], num_computed: int) -> None:
        """Let the prefix cache know the blocks that are now full and computed.

        Where it already knows a block of that name, computed by another sequence in the same step, the first one
        stays and this one is an ordinary block; the table takes over the name.
        """
        if not self.enable_prefix_caching:
            return
        for index in range(table.num_hashed, num_computed // self.block_size):
            start = index * self.block_size
            prefix = Prefix(tuple(tokens[start : start + self.block_size]), table.prefix)
            known = self.cached.setdefault(prefix, self.blocks[table.blocks[index]])
            known.prefix = known.prefix or prefix
            table.prefix = known.prefix
            table.num_hashed += 1

    def truncate(self, table: BlockTable, num_tokens: int) -> None:
        """Take back the names of the blocks beyond the first `num_tokens` tokens. The blocks stay in the table."""
        while table.num_hashed > num_tokens // self.block_size and table.prefix.parent is not None:
            table.prefix = table.prefix.parent
            table.num_hashed -= 1

    def fork(self, table: BlockTable) -> BlockTable:
        """A second table over the same blocks, the partly filled last one included; whoever writes first copies it."""
        for index in table.blocks:
            self._hold(self.blocks[index])
        return BlockTable(table.prefix, table.blocks[:], table.num_hashed)

    def release(self, table: BlockTable) -> None:
        """Give all blocks back, last one first: a prefix is worth more than what follows it, so it is evicted later."""
        while table.blocks:
            self._drop(self.blocks[table.blocks.pop()])
        self.truncate(table, 0)

    def _take(self) -> int:
        """The free block that has been useless for longest, emptied of what the cache remembers."""
        index = self.free.popleft()
        block = self.blocks[index]
        self._forget(block)
        block.ref_count = 1
        return index

    def _hold(self, block: Block) -> None:
        if block.ref_count == 0:
            self.free.remove(block.id)
        block.ref_count += 1

    def _drop(self, block: Block) -> None:
        """One holder less. A free block that the cache knows waits at the end of the queue, any other at its head."""
        block.ref_count -= 1
        if block.ref_count == 0:
            if block.prefix is None:
                self.free.prepend(block.id)
            else:
                self.free.append(block.id)

    def _forget(self, block: Block) -> None:
        if block.prefix is not None:
            del self.cached[block.prefix]
            block.prefix = None

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Recompute every invariant from all live tables; raises `AssertionError` naming the broken one."""
        tables = list(tables)
        held = Counter(index for table in tables for index in table.blocks)
        ensure(held[DUMMY_BLOCK] == 0, "the dummy block belongs to nobody")
        for block in self.blocks:
            ensure(block.ref_count == held[block.id], f"block {block.id} counts the tables that hold it")
            ensure(block.prefix is None or self.cached.get(block.prefix) is block, f"block {block.id} has a name")
        free = {block.id for block in self.blocks[1:] if block.ref_count == 0}
        ensure(set(self.free) == free, "the free list is the set of blocks that nobody holds")
        ensure(all(b.prefix is p for p, b in self.cached.items()), "the cache points to blocks that carry the name")
        for table in tables:
            self._check_names(table)

    def _check_names(self, table: BlockTable) -> None:
        """The chain of names has one link per hashed block, and no block of the table carries another name."""
        prefix = table.prefix
        for index in reversed(range(table.num_hashed)):
            carried = self.blocks[table.blocks[index]].prefix
            ensure(carried in (None, prefix), "a block has the name that its table gives it, or none")
            ensure(prefix.parent is not None, "a table has a name for each hashed block")
            prefix = prefix.parent or prefix
        ensure(prefix.parent is None, "a table has no names beyond its hashed blocks")


def ensure(holds: bool, what: str) -> None:
    """Raise `AssertionError` unless an invariant holds. Unlike `assert`, it stays when Python optimises."""
    if not holds:
        raise AssertionError(f"Broken invariant: {what}")
