"""A copy of the block pool at one moment: who holds which block, which blocks the prefix cache knows, what is in them.

Tables and pool change with every step; a picture of what happened needs copies. `PoolSnapshot.take` reads the pool's
own books and nothing else. `tables` reads the trace instead, afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from minillm.cache.blocks import BlockPool, BlockTable
from minillm.engine.trace import RequestStep, StepRecord

Tables = dict[tuple[str, int], tuple[int, ...]]  # (request, completion) -> its blocks, in logical order
ROOT = 0  # the parent of a first block: the dummy's number, which no sequence's block has


@dataclass(frozen=True)
class PoolSnapshot:
    """Blocks by number, tables by the name of their sequence.

    ref_counts: tables that hold each block, the dummy block 0 first. known: for each block that the prefix cache knows,
    its tokens and the number of the block before it. tables: numbers of each sequence's blocks, in logical order.
    tokens: the tokens whose KV each sequence has in them.
    """

    block_size: int
    ref_counts: tuple[int, ...]
    known: Mapping[int, tuple[int, tuple[int, ...]]]  # block -> (parent, tokens)
    tables: Mapping[str, tuple[int, ...]]
    tokens: Mapping[str, tuple[int, ...]]

    @classmethod
    def take(cls, pool: BlockPool, holders: Mapping[str, tuple[BlockTable, Sequence[int]]]) -> PoolSnapshot:
        """Read the pool. holders: each sequence's table and the tokens that are computed."""
        number = {block.prefix: block.id for block in pool.blocks if block.prefix}
        known = {}
        for prefix, block in number.items():
            parent = number.get(prefix.parent, ROOT) if prefix.parent else ROOT
            known[block] = (parent, tuple(token for token in prefix.tokens if isinstance(token, int)))
        return cls(
            block_size=pool.block_size,
            ref_counts=tuple(block.ref_count for block in pool.blocks),
            known=known,
            tables={name: tuple(table.blocks) for name, (table, _) in holders.items()},
            tokens={name: tuple(tokens) for name, (_, tokens) in holders.items()},
        )

    def places(self, block: int) -> Iterator[tuple[str, int]]:
        """(sequence, logical number) of every table entry that points to this block."""
        for name, blocks in self.tables.items():
            for logical, physical in enumerate(blocks):
                if physical == block:
                    yield name, logical

    def filled(self, name: str, logical: int) -> int:
        """How many tokens of a sequence are in its block with this logical number."""
        return max(0, min(self.block_size, len(self.tokens[name]) - logical * self.block_size))

    @property
    def num_held(self) -> int:
        """Blocks that at least one table holds."""
        return sum(count > 0 for count in self.ref_counts)

    @property
    def waste(self) -> int:
        """Places for tokens that are held but empty. A place that several sequences share counts once."""
        used: dict[int, int] = {}
        for name, blocks in self.tables.items():
            for logical, block in enumerate(blocks):
                used[block] = max(used.get(block, 0), self.filled(name, logical))
        return self.num_held * self.block_size - sum(used.values())


def tables(records: Iterable[StepRecord]) -> Iterator[Tables]:
    """The block tables of all running completions after each of these records, which follow on each other.

    A record names the blocks that a step found at admission or wrote to; what comes before them in a table stays. A
    completion that is spawned begins with its request's table. Who was admitted before the first record is left out
    until it is admitted again. A request id must not be used for two requests.
    """
    held: Tables = {}
    for record in records:
        for request_id in record.preempted:  # the youngest completions are
            held.pop(max((name for name in held if name[0] == request_id), default=(request_id, 0)), None)
        fresh: Tables = {}
        for part in record.requests:
            fresh.update(_table(part, held.get((part.request_id, part.index), ())))
        held = {name: blocks for name, blocks in (held | fresh).items() if name not in record.finished}
        if len(held) > record.num_running:  # a step failed, and all began anew: only these were admitted since
            held = {name: blocks for name, blocks in held.items() if name in fresh}
        yield dict(held)


def _table(part: RequestStep, before: tuple[int, ...]) -> Iterator[tuple[tuple[str, int], tuple[int, ...]]]:
    """The table of a request after a step, and those of the completions that it spawned; none if it is not known."""
    if len(before) >= part.first_block:
        for index in range(part.index, part.index + max(1, part.num_samples)):
            yield (part.request_id, index), before[: part.first_block] + part.blocks
