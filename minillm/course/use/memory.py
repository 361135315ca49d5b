"""A learner's paging (exercise 09) and prefix cache (exercise 10) in the engine's place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from minillm.attention.metadata import AttentionMetadata
from minillm.cache.blocks import BlockPool, FreeQueue, Prefix
from minillm.course.errors import LearnerError
from minillm.course.use.beside import Beside, known
from minillm.errors import shown
from minillm.model.decoder import Attend

if TYPE_CHECKING:
    from minillm.llm import LLM


def put_slots(module: Any, llm: LLM) -> None:
    """Keys and values of a step are written where the learner says."""
    beside, cache = Beside("ex09 slot_mapping", module.slot_mapping, known), llm.engine.runner.cache
    own = cache.attend

    def attend(metadata: AttentionMetadata) -> Attend:
        known_slots = iter(metadata.slot_mapping.tolist())
        slots: list[int] = []
        for table, q_len, kv_len in zip(metadata.tables.tolist(), metadata.q_lens, metadata.kv_lens, strict=True):
            want = [next(known_slots) for _ in range(q_len)]
            slots += beside.check(want, table, kv_len - q_len, kv_len, metadata.block_size)
        mapping = torch.tensor(slots, dtype=torch.int64, device=metadata.slot_mapping.device)
        return own(replace(metadata, slot_mapping=mapping))

    setattr(cache, "attend", attend)  # noqa: B010 (a method of this one object)


def _put_free(pool: BlockPool, wrap: Callable[[FreeQueue], Any]) -> None:
    """Let a learner hold the free blocks, now and whenever the pool begins anew, as it does after an error."""
    own = pool.reset

    def reset() -> None:
        own()
        setattr(pool, "free", wrap(pool.free))  # noqa: B010

    setattr(pool, "reset", reset)  # noqa: B010 (a method of this one object)
    setattr(pool, "free", wrap(pool.free))  # noqa: B010


class LearnerQueue:
    """A learner's queue of free blocks, and the engine's beside it.

    The learner's is made when it is first used, within a step: an error in it is then like any other.
    """

    def __init__(self, kind: Callable[[list[int]], Any], ours: FreeQueue) -> None:
        self._kind, self._ours = kind, ours
        self._blocks = list(ours)
        self._beside: dict[str, Beside] = {}

    @cached_property
    def _theirs(self) -> Any:
        made: list[Any] = []
        Beside("ex10 FreeQueue", lambda blocks: made.append(self._kind(blocks)), known).call(self._blocks)
        return made[0]

    def _call(self, name: str, *args: int) -> Any:
        if name not in self._beside:
            theirs, ours = (getattr(queue, name) for queue in (self._theirs, self._ours))
            self._beside[name] = Beside(f"ex10 FreeQueue.{name}", theirs, ours)
        return self._beside[name](*args)

    def popleft(self) -> int:
        """The block that both take next."""
        return int(self._call("popleft"))

    def remove(self, block: int) -> None:
        """A hit revives it."""
        self._call("remove", block)

    def append(self, block: int) -> None:
        """The cache knows it."""
        self._call("append", block)

    def prepend(self, block: int) -> None:
        """Nobody can find what is in it."""
        self._call("prepend", block)

    def __len__(self) -> int:
        return int(self._call("__len__"))

    def __iter__(self) -> Iterator[int]:
        return iter(self._ours)


def put_free_queue(module: Any, llm: LLM) -> str | None:
    """Who is taken next, who is revived, who is forgotten: both queues say the same."""
    pool = llm.engine.pool
    if not pool.enable_prefix_caching:
        return "without a prefix cache nothing has to be kept; see enable_prefix_caching=True"
    _put_free(pool, lambda ours: LearnerQueue(module.FreeQueue, ours))
    return None


class LearnerPool:
    """A learner's pool as a queue of free blocks. It may hand them out in another order than the engine would.

    The learner's is made when it is first used, as in `LearnerQueue`.
    """

    def __init__(self, kind: Callable[[int], Any], num_blocks: int, ours: FreeQueue) -> None:
        self._kind, self._num_blocks, self._ours = kind, num_blocks, ours
        self._allocate = Beside("ex09 BlockPool.allocate", lambda: self._theirs.allocate(1)[0], known)
        self._free = Beside("ex09 BlockPool.free", lambda block: self._theirs.free([block]), known)
        self._num_free = Beside("ex09 BlockPool.num_free", lambda: self._theirs.num_free, ours.__len__)

    @cached_property
    def _theirs(self) -> Any:
        made: list[Any] = []
        Beside("ex09 BlockPool", lambda count: made.append(self._kind(count)), known).call(self._num_blocks)
        return made[0]

    def popleft(self) -> int:
        """A block that is really free: any will do."""
        block = self._allocate.call()
        if not isinstance(block, int) or block not in set(self._ours):
            raise LearnerError(f"ex09 BlockPool.allocate gave block {shown(block)}, which is not free.")
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
    _put_free(pool, lambda ours: LearnerPool(module.BlockPool, len(pool.blocks), ours))
    return None


def put_match(module: Any, llm: LLM) -> None:
    """Which blocks a prompt can begin with: asked of the learner with the learner's names of all known blocks."""
    pool = llm.engine.pool
    size, own, names = pool.block_size, pool.lookup, dict[Prefix, str]()
    hash_blocks = Beside("ex10 hash_blocks", module.hash_blocks, known)
    longest_match = Beside("ex10 longest_match", module.longest_match, known)

    def chain(tokens: list[int], root: Prefix) -> list[str]:
        found = hash_blocks.call(tokens, size, repr(root.tokens))
        if not isinstance(found, list) or len(found) != len(tokens) // size:
            raise LearnerError(
                f"ex10 hash_blocks gave {shown(found)}: no name for each of {len(tokens) // size} blocks."
            )
        return [str(name) for name in found]

    def name(prefix: Prefix) -> str:
        tokens: list[Any] = []
        while prefix.parent is not None:
            tokens, prefix = [*prefix.tokens, *tokens], prefix.parent
        return chain(tokens, prefix)[-1]

    def lookup(tokens: Sequence[int], cache_salt: str | None = None, hits: Sequence[Prefix] = ()) -> list[Prefix]:
        found = own(tokens, cache_salt, hits)
        current = {prefix: names.get(prefix) or name(prefix) for prefix in pool.cached}
        names.clear()  # those of forgotten blocks
        names.update(current)
        blocks = [pool.cached[prefix].id for prefix in found]
        want = blocks, max(0, min(len(blocks) * size, len(tokens) - 1))
        cached = {current[prefix]: block.id for prefix, block in pool.cached.items()}
        root = Prefix((pool.identity, cache_salt))
        longest_match.check(want, chain(list(tokens), root), cached, len(tokens), size)
        return found

    setattr(pool, "lookup", lookup)  # noqa: B010 (a method of this one object)
