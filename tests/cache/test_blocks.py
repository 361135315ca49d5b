"""BlockPool against a model of the memory it manages.

The fuzz below plays a physical cache: a slot that is written holds the tokens up to its position, which is exactly what
a real KV entry depends on. Whatever a table claims to be computed must read back as its own tokens, after any sequence
of operations. The named tests pin one bug each; the mutants at the end show that the fuzz sees every one of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from minillm.cache import blocks
from minillm.cache.blocks import BlockPool, BlockTable, Prefix
from minillm.errors import ConfigError

BLOCK = 4


@dataclass(eq=False)
class User:
    """A sequence as the pool sees it."""

    tokens: list[int]
    table: BlockTable
    num_computed: int
    salt: str | None

    def kv(self, position: int) -> tuple[object, ...]:
        """What the KV at a position depends on: everything up to it."""
        return (self.salt, *self.tokens[: position + 1])


class Memory:
    """A pool with a pretended cache behind it, and the users that live in it."""

    def __init__(self, num_blocks: int = 12, **options: object) -> None:
        self.pool = BlockPool(num_blocks, BLOCK, **options)  # type: ignore[arg-type]
        self.slots: dict[tuple[int, int], tuple[object, ...]] = {}
        self.users: list[User] = []

    def open(self, tokens: list[int], salt: str | None = None) -> User:
        table, num_computed = self.pool.open(tokens, salt)
        self.users.append(User(tokens, table, num_computed, salt))
        return self.users[-1]

    def compute(self, user: User, end: int | None = None, *, commit: bool = True) -> bool:
        """Write the KV of the next tokens, as a step does."""
        end = len(user.tokens) if end is None else end
        copies = self.pool.prepare(user.table, user.num_computed, end)
        if copies is None:
            return False
        for source, target in copies:
            for offset in range(BLOCK):
                self.slots[target, offset] = self.slots.get((source, offset), ())
        for position in range(user.num_computed, end):
            self.slots[self._slot(user, position)] = user.kv(position)
        user.num_computed = end
        if commit:
            self.pool.commit(user.table, user.tokens, end)
        return True

    def truncate(self, user: User, num_tokens: int) -> None:
        user.num_computed = min(user.num_computed, num_tokens)
        del user.tokens[num_tokens:]
        self.pool.truncate(user.table, user.num_computed)

    def fork(self, user: User) -> User:
        self.users.append(User(list(user.tokens), self.pool.fork(user.table), user.num_computed, user.salt))
        return self.users[-1]

    def close(self, user: User) -> None:
        self.users.remove(user)
        self.pool.release(user.table)

    def check(self) -> None:
        """Every invariant of the pool, and every computed token of every user reads back as it was written."""
        self.pool.check(user.table for user in self.users)
        for user in self.users:
            named = user.table.num_hashed * BLOCK
            assert named <= user.num_computed and spelled(user.table.prefix) == user.tokens[:named]
            for position in range(user.num_computed):
                assert self.slots[self._slot(user, position)] == user.kv(position)

    def _slot(self, user: User, position: int) -> tuple[int, int]:
        return user.table.blocks[position // BLOCK], position % BLOCK


def spelled(prefix: Prefix) -> list[object]:
    """The tokens that a chain of names stands for, without its root."""
    links = []
    while prefix.parent is not None:
        links.append(prefix.tokens)
        prefix = prefix.parent
    return [token for link in reversed(links) for token in link]


def run_fuzz(seed: int, num_steps: int = 150) -> None:
    """Random operations on a small pool over a small vocabulary, so that prefixes meet and blocks run out."""
    rng = random.Random(seed)
    memory = Memory(num_blocks=rng.randint(4, 14))
    for _ in range(num_steps):
        _random_operation(memory, rng)
        memory.check()
    for user in list(memory.users):
        memory.close(user)
    memory.check()
    assert memory.pool.num_free == memory.pool.num_usable, "a block leaked"


def _random_operation(memory: Memory, rng: random.Random) -> None:
    user = rng.choice(memory.users) if memory.users else None
    kind = rng.choice(["open", "compute", "compute", "compute", "append", "fork", "truncate", "close"])
    if user is None or kind == "open":
        length = rng.choice([1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK, rng.randint(1, 4 * BLOCK)])
        tokens = [0] * length
        tokens[rng.randrange(length)] = rng.randint(0, 1)
        memory.open(tokens, salt=rng.choice([None, None, None, "salt"]))
    elif kind == "compute" and user.num_computed < len(user.tokens):
        memory.compute(user, rng.randint(user.num_computed + 1, len(user.tokens)))
    elif kind == "append" and user.num_computed == len(user.tokens):
        user.tokens.append(rng.randint(0, 1))
    elif kind == "fork":
        memory.fork(user)
    elif kind == "truncate":
        memory.truncate(user, rng.randint(1, len(user.tokens)))
    elif kind == "close":
        memory.close(user)


@pytest.mark.parametrize("seed", range(40))
def test_fuzz(seed: int) -> None:
    run_fuzz(seed)


@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1])
def test_trap_1_a_prompt_known_entirely_still_computes_its_last_token(length: int) -> None:
    memory = Memory()
    memory.compute(memory.open(list(range(length))))
    again = memory.open(list(range(length)))
    assert again.num_computed == min(length // BLOCK * BLOCK, length - 1)
    assert memory.compute(again)
    memory.check()


def test_trap_1_one_token_is_recomputed_in_a_private_copy() -> None:
    """The block is shared while its first owner lives, so it is copied; afterwards it is rewritten in place."""
    memory = Memory()
    first = memory.open(list(range(2 * BLOCK)))
    memory.compute(first)
    second = memory.open(list(range(2 * BLOCK)))
    assert memory.pool.prepare(second.table, 7, 8) == [(first.table.blocks[1], second.table.blocks[1])]
    assert first.table.blocks[1] != second.table.blocks[1] and first.table.blocks[0] == second.table.blocks[0]


def test_trap_1_a_full_hit_fits_a_pool_of_exactly_its_size() -> None:
    memory = Memory(num_blocks=3)
    memory.open(list(range(2 * BLOCK)))
    memory.compute(memory.users[0])
    memory.close(memory.users[0])
    again = memory.open(list(range(2 * BLOCK)))
    assert again.num_computed == 2 * BLOCK - 1 and memory.compute(again)
    memory.check()


@pytest.mark.parametrize("bits", [0, 1, 2])
def test_trap_2_colliding_hashes_are_harmless(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hash of no bits at all, every block collides with every other."""
    monkeypatch.setattr(blocks, "chained_hash", lambda parent, tokens: hash((parent, tokens)) % 2**bits)
    for seed in range(10):
        run_fuzz(seed, num_steps=80)


def test_trap_2_the_same_tokens_after_other_tokens_are_another_block() -> None:
    memory = Memory()
    memory.compute(memory.open([1] * BLOCK + [2] * BLOCK))
    other = memory.open([3] * BLOCK + [2] * BLOCK + [4])
    assert other.num_computed == 0


def test_trap_3_a_recycled_block_is_no_longer_a_hit() -> None:
    memory = Memory(num_blocks=3)
    memory.compute(memory.open([1] * (2 * BLOCK)))
    memory.close(memory.users[0])
    memory.compute(memory.open([2] * (2 * BLOCK)))
    memory.close(memory.users[0])
    assert memory.open([1] * (2 * BLOCK)).num_computed == 0
    memory.check()


def test_trap_4_blocks_return_exactly_once() -> None:
    memory = Memory()
    for _ in range(3):
        user = memory.open([5] * 9)
        memory.compute(user)
        memory.close(user)
    assert memory.pool.num_free == memory.pool.num_usable
    assert all(block.ref_count == 0 for block in memory.pool.blocks)


def test_trap_5_a_hit_leaves_the_free_list() -> None:
    """Two known blocks of a pool of three are revived: one is left, not three."""
    memory = Memory(num_blocks=4)
    memory.compute(memory.open([1] * (2 * BLOCK)))
    memory.close(memory.users[0])
    user = memory.open([1] * (2 * BLOCK) + [2] * (BLOCK + 1))
    assert memory.pool.num_free == 1
    assert memory.pool.prepare(user.table, user.num_computed, len(user.tokens)) is None
    assert memory.pool.num_free == 1, "a refusal changes nothing"


def test_trap_6_uncomputed_blocks_are_unknown() -> None:
    memory = Memory()
    user = memory.open([1] * (2 * BLOCK))
    memory.compute(user, commit=False)
    assert memory.open([1] * (2 * BLOCK)).num_computed == 0
    memory.close(user)
    assert memory.open([1] * (2 * BLOCK)).num_computed == 0


def test_trap_7_of_two_equal_blocks_the_first_stays_known() -> None:
    memory = Memory()
    first, second = memory.open([1] * 9), memory.open([1] * 9)
    memory.compute(first)
    memory.compute(second)
    assert memory.open([1] * 9).table.blocks == first.table.blocks[:2]
    memory.close(second)
    memory.check()
    assert memory.open([1] * 9).num_computed == 8, "the second's end must not take the first's name away"


def test_trap_8_a_table_keeps_its_blocks_when_others_know_them_too() -> None:
    """No de-duplication after the fact: a block in a live table is never swapped or freed behind its back."""
    memory = Memory()
    first, second = memory.open([1] * 9), memory.open([1] * 9)
    memory.compute(first)
    before = list(second.table.blocks)
    memory.compute(second, 4)
    memory.close(first)
    assert second.table.blocks[: len(before)] == before
    memory.compute(second)
    memory.check()


def test_trap_9_the_longest_unused_goes_first_and_tails_before_heads() -> None:
    memory = Memory(num_blocks=5)
    old, new = memory.open([1] * (2 * BLOCK)), memory.open([2] * (2 * BLOCK))
    memory.compute(old)
    memory.compute(new)
    memory.close(old)
    memory.close(new)
    memory.compute(memory.open([3] * BLOCK))  # evicts the tail of the older one
    assert memory.open([2] * 9).num_computed == 8
    assert memory.open([1] * 9).num_computed == 4
    memory.check()


def test_trap_9_blocks_that_nobody_remembers_go_before_those_that_are() -> None:
    memory = Memory(num_blocks=4)
    memory.compute(memory.open([1] * BLOCK))
    partial = memory.open([2] * (BLOCK - 1))
    memory.compute(partial)
    memory.close(memory.users[0])
    memory.close(partial)
    memory.compute(memory.open([3] * (2 * BLOCK)))
    assert memory.open([1] * (BLOCK + 1)).num_computed == BLOCK


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_trap_10_blocks_for_counts_up(num_tokens: int, expected: int) -> None:
    assert BlockPool(4, BLOCK).blocks_for(num_tokens) == expected


@pytest.mark.parametrize("length", range(1, 3 * BLOCK + 2))
def test_trap_10_growing_token_by_token_takes_a_block_at_each_boundary(length: int) -> None:
    memory = Memory()
    user = memory.open([0])
    while True:
        assert memory.compute(user)
        assert len(user.table.blocks) == -(-len(user.tokens) // BLOCK)
        if len(user.tokens) == length:
            break
        user.tokens.append(1)
    memory.check()


def test_trap_11_a_shared_partial_block_is_copied_before_either_writes() -> None:
    memory = Memory()
    parent = memory.open([1] * (BLOCK + 2))
    memory.compute(parent)
    child = memory.fork(parent)
    assert child.table.blocks == parent.table.blocks
    parent.tokens.append(2)
    child.tokens.append(3)
    memory.compute(parent)
    memory.compute(child)
    memory.check()
    assert child.table.blocks[0] == parent.table.blocks[0] and child.table.blocks[1] != parent.table.blocks[1]
    assert memory.pool.num_usable - memory.pool.num_free == 3, "one shared block and two private ones"


def test_trap_11_the_last_owner_writes_in_place() -> None:
    memory = Memory(num_blocks=3)
    parent = memory.open([1] * (BLOCK + 2))
    memory.compute(parent)
    child = memory.fork(parent)
    memory.close(parent)
    child.tokens.append(3)
    assert memory.pool.prepare(child.table, child.num_computed, len(child.tokens)) == []


def test_trap_12_whatever_changes_the_kv_is_part_of_the_name() -> None:
    assert Prefix(("model-a",)) != Prefix(("model-b",))
    memory = Memory()
    memory.compute(memory.open([1] * 9, salt="adapter"))
    assert memory.open([1] * 9).num_computed == 0
    assert memory.open([1] * 9, salt="adapter").num_computed == 8
    bf16, int8 = (BlockPool(4, BLOCK, identity=kind) for kind in ("bf16", "int8"))
    assert bf16.open([1])[0].prefix != int8.open([1])[0].prefix


def test_prefix_caching_can_be_switched_off() -> None:
    memory = Memory(enable_prefix_caching=False)
    memory.compute(memory.open([1] * 9))
    assert memory.open([1] * 9).num_computed == 0 and memory.pool.num_cached == 0


def test_spare_blocks_are_left_over() -> None:
    pool = BlockPool(4, BLOCK)
    table, _ = pool.open([1] * 9)
    assert pool.prepare(table, 0, 8, spare=2) is None
    assert pool.prepare(table, 0, 8, spare=1) == []


@pytest.mark.parametrize(("num_blocks", "block_size"), [(1, 4), (0, 4), (-3, 4), (8, 0)])
def test_a_pool_that_holds_nothing_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ConfigError, match="holds nothing"):
        BlockPool(num_blocks, block_size)


def test_a_long_chain_of_names_neither_recurses_nor_slows_down() -> None:
    """100,000 blocks deep: equality walks, and meets the shared link after one step."""
    memory = BlockPool(4, 1)
    chain = Prefix((0,))
    for _ in range(100_000):
        chain = Prefix((1,), chain)
    assert Prefix((1,), chain.parent) == chain
    assert memory.num_free == 3


# --- mutants: the fuzz must see each of these bugs -------------------------------------------------------------------


def _only_last_block_counts(self: Prefix, other: object) -> bool:
    return isinstance(other, Prefix) and self.tokens == other.tokens


def _no_copy(
    self: BlockPool, table: BlockTable, start: int, end: int, *, spare: int = 0
) -> list[tuple[int, int]] | None:
    new = max(0, self.blocks_for(end) - len(table.blocks))
    if new > self.num_free:
        return None
    table.blocks += [self._take() for _ in range(new)]
    return []


def _copies_forgotten(original: Callable[..., list[tuple[int, int]] | None]) -> Callable[..., object]:
    return lambda *args, **kwargs: None if original(*args, **kwargs) is None else []


def _hold_on_the_free_list(self: BlockPool, block: blocks.Block) -> None:
    block.ref_count += 1


def _take_without_forgetting(self: BlockPool) -> int:
    index = self.free.popleft()
    self.blocks[index].ref_count = 1
    return index


def _take_without_counting(self: BlockPool) -> int:
    index = self.free.popleft()
    self._forget(self.blocks[index])
    return index


def _last_one_stays_known(self: BlockPool, table: BlockTable, tokens: list[int], num_computed: int) -> None:
    for index in range(table.num_hashed, num_computed // BLOCK):
        table.prefix = Prefix(tuple(tokens[index * BLOCK : (index + 1) * BLOCK]), table.prefix)
        block = self.blocks[table.blocks[index]]
        self.cached[table.prefix] = block
        block.prefix = table.prefix
        table.num_hashed += 1


def _duplicates_freed(self: BlockPool, table: BlockTable, tokens: list[int], num_computed: int) -> None:
    """The known block is as good, so ours may go: but the table still points to it."""
    before = table.num_hashed
    _right_commit(self, table, tokens, num_computed)
    for index in table.blocks[before : table.num_hashed]:
        if self.blocks[index].prefix is None:
            self._drop(self.blocks[index])


_right_commit = BlockPool.commit


def _partial_blocks_named(original: Callable[..., None]) -> Callable[..., None]:
    return lambda self, table, tokens, n: original(self, table, tokens, min(n + BLOCK - 1, len(tokens)))


def _fork_without_counting(self: BlockPool, table: BlockTable) -> BlockTable:
    return BlockTable(table.prefix, list(table.blocks), table.num_hashed)


_right_open = BlockPool.open


MUTANTS: dict[str, tuple[type, str, Callable[..., object]]] = {
    "trap 2: names without their parents": (Prefix, "__eq__", _only_last_block_counts),
    "trap 3: recycled blocks stay known": (BlockPool, "_take", _take_without_forgetting),
    "trap 4: new blocks are not counted": (BlockPool, "_take", _take_without_counting),
    "trap 5: hits stay on the free list": (BlockPool, "_hold", _hold_on_the_free_list),
    "trap 6: named before they are computed": (BlockPool, "commit", _partial_blocks_named(BlockPool.commit)),
    "trap 7: the last equal block takes the name": (BlockPool, "commit", _last_one_stays_known),
    "trap 8: duplicates are freed in live tables": (BlockPool, "commit", _duplicates_freed),
    "trap 10: a block is missing at the boundary": (BlockPool, "blocks_for", lambda self, n: n // BLOCK),
    "trap 12: the salt is left out": (BlockPool, "open", lambda self, tokens, salt=None: _right_open(self, tokens)),
    "trap 11: writing into shared blocks": (BlockPool, "prepare", _no_copy),
    "trap 11: copies are not made": (BlockPool, "prepare", _copies_forgotten(BlockPool.prepare)),
    "trap 11: forks are not counted": (BlockPool, "fork", _fork_without_counting),
    "truncation keeps the names": (BlockPool, "truncate", lambda self, table, n: None),
    "release keeps the last block": (BlockPool, "release", lambda self, table: table.blocks.clear()),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_fuzz_kills(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong = MUTANTS[mutant]
    monkeypatch.setattr(owner, name, wrong)
    if mutant.startswith("trap 2"):  # a chained hash hides the bug until two hashes collide
        monkeypatch.setattr(blocks, "chained_hash", lambda parent, tokens: 0)
    with pytest.raises((AssertionError, KeyError, IndexError)):
        for seed in range(40):
            run_fuzz(seed)


def _take_newest(self: BlockPool) -> int:
    *_, index = self.free
    self.free.remove(index)
    self._forget(self.blocks[index])
    self.blocks[index].ref_count = 1
    return index


def test_trap_9_the_order_of_eviction_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evicting the newest breaks nothing but the hit rate, so no fuzz can see it; the tests of the order do."""
    monkeypatch.setattr(BlockPool, "_take", _take_newest)
    with pytest.raises(AssertionError):
        test_trap_9_the_longest_unused_goes_first_and_tails_before_heads()
