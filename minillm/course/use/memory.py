"""A learner's paging (exercise 09) and prefix cache (exercise 10) in the engine's place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from minillm.attention import AttentionMetadata
from minillm.cache.blocks import Block, FreeQueue, Prefix
from minillm.course.use.beside import Beside, known
from minillm.errors import LearnerError
from minillm.model.decoder import Attend

if TYPE_CHECKING:
    from minillm.llm import LLM


def put_slots(module: Any, llm: LLM) -> None:
    """Keys and values of a step are written where the learner says."""
    beside, cache = Beside("ex09 slot_mapping", module.slot_mapping, known), llm.engine.runner.cache
    own = cache.attend

    def attend(layout: AttentionMetadata) -> Attend:
        known_slots = iter(layout.slot_mapping.tolist())
        slots: list[int] = []
        for table, q_len, kv_len in zip(layout.tables, layout.q_lens, layout.kv_lens, strict=True):
            want = [next(known_slots) for _ in range(q_len)]
            slots += beside.check(want, table, kv_len - q_len, kv_len, layout.block_size)
        mapping = torch.tensor(slots, dtype=torch.int64, device=layout.slot_mapping.device)
        return own(replace(layout, slot_mapping=mapping))

    setattr(cache, "attend", attend)  # noqa: B010 (a method of this one object)


class LearnerQueue:
    """A learner's queue of free blocks, and the engine's beside it."""

    def __init__(self, theirs: Any, ours: FreeQueue) -> None:
        self._ours = ours
        self.popleft, self.remove, self.append, self.prepend = (
            Beside(f"ex10 FreeQueue.{name}", getattr(theirs, name), getattr(ours, name))
            for name in ("popleft", "remove", "append", "prepend")
        )
        self._len = Beside("ex10 FreeQueue.__len__", theirs.__len__, ours.__len__)

    def __len__(self) -> int:
        return int(self._len())

    def __iter__(self) -> Iterator[int]:
        return iter(self._ours)


def put_free_queue(module: Any, llm: LLM) -> str | None:
    """Who is taken next, who is revived, who is forgotten: both queues say the same."""
    pool = llm.engine.pool
    if not pool.enable_prefix_caching:
        return "without a prefix cache nothing has to be kept; see enable_prefix_caching=True"
    setattr(pool, "free", LearnerQueue(module.FreeQueue(list(pool.free)), pool.free))  # noqa: B010
    return None


class LearnerPool:
    """A learner's pool as a queue of free blocks. It may hand them out in another order than the engine would."""

    def __init__(self, theirs: Any, ours: FreeQueue) -> None:
        self._ours = ours
        self._allocate = Beside("ex09 BlockPool.allocate", lambda: theirs.allocate(1)[0], known)
        self._free = Beside("ex09 BlockPool.free", lambda block: theirs.free([block]), known)
        self._num_free = Beside("ex09 BlockPool.num_free", lambda: theirs.num_free, ours.__len__)

    def popleft(self) -> int:
        """A block that is really free: any will do."""
        block: int = self._allocate.call()
        if block not in set(self._ours):
            raise LearnerError(f"ex09 BlockPool.allocate gave block {block}, which is not free.")
        self._ours.remove(block)
        return block

    def prepend(self, block: int) -> None:
        """Put back a block. Without a prefix cache nobody ever looks for what is in it."""
        self._ours.prepend(block)
        self._free.call(block)

    def __len__(self) -> int:
        return int(self._num_free())

    def __iter__(self) -> Iterator[int]:
        return iter(self._ours)


def put_block_pool(module: Any, llm: LLM) -> str | None:
    """All blocks come from the learner's pool and go back to it."""
    pool = llm.engine.pool
    if pool.enable_prefix_caching:
        return "a prefix cache takes blocks in an order of its own; see enable_prefix_caching=False"
    setattr(pool, "free", LearnerPool(module.BlockPool(len(pool.blocks)), pool.free))  # noqa: B010
    return None


def put_match(module: Any, llm: LLM) -> None:
    """Which blocks a prompt can begin with: asked of the learner with the learner's names of all known blocks."""
    pool = llm.engine.pool
    size, own, names = pool.block_size, pool.match, dict[Prefix, str]()
    hash_blocks = Beside("ex10 hash_blocks", module.hash_blocks, known)
    longest_match = Beside("ex10 longest_match", module.longest_match, known)

    def name(prefix: Prefix) -> str:
        tokens: list[Any] = []
        while prefix.parent is not None:
            tokens, prefix = [*prefix.tokens, *tokens], prefix.parent
        return str(hash_blocks.call(tokens, size, repr(prefix.tokens))[-1])

    def match(tokens: Sequence[int], root: Prefix) -> Iterator[tuple[Block, Prefix]]:
        found = list(own(tokens, root))
        current = {prefix: names.get(prefix) or name(prefix) for prefix in pool.cached}
        names.clear()  # those of forgotten blocks
        names.update(current)
        blocks = [block.id for block, _ in found]
        want = blocks, max(0, min(len(blocks) * size, len(tokens) - 1))
        cached = {current[prefix]: block.id for prefix, block in pool.cached.items()}
        chain = hash_blocks.call(list(tokens), size, repr(root.tokens))
        longest_match.check(want, chain, cached, len(tokens), size)
        return iter(found)

    setattr(pool, "match", match)  # noqa: B010 (a method of this one object)
