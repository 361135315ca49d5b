"""BlockPool against a model of the memory it manages.

The fuzz below plays a physical cache: a slot that is written holds the tokens up to its position, which is exactly what
a real KV entry depends on. Whatever a table claims to be computed must read back as its own tokens, after any sequence
of operations. The named tests pin one bug each; the mutants at the end show that the fuzz sees every one of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator
from copy import deepcopy
from dataclasses import dataclass

import pytest

from minillm.cache import blocks
from minillm.cache.blocks import BlockPool, BlockTable, Prefix
from minillm.errors import ConfigError
from minillm.sampling import SamplingParams
from tests.engine.scripted import scripted_engine

BLOCK = 4


@dataclass(eq=False)
class User:
    """A request as the pool sees it."""

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
        table, num_computed = self.pool.open(tokens, self.pool.lookup(tokens, salt), salt)
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
            assert named <= user.num_computed, "a block is named that is not computed"
            assert spelled(user.table.prefix) == user.tokens[:named], "a table names other tokens than its own"
            for position in range(user.num_computed):
                assert self.slots[self._slot(user, position)] == user.kv(position), "the wrong KV is read back"

    def _slot(self, user: User, position: int) -> tuple[int, int]:
        assert position // BLOCK < len(user.table.blocks), "a position has no block"
        return user.table.blocks[position // BLOCK], position % BLOCK


def spelled(prefix: Prefix) -> list[object]:
    """The tokens that a chain of names stands for, without its root."""
    links = []
    while prefix.parent is not None:
        links.append(prefix.tokens)
        prefix = prefix.parent
    return [token for link in reversed(links) for token in link]


def states(rng: random.Random, num_steps: int = 150) -> Iterator[Memory]:
    """One pool after each of many random operations, over a small vocabulary: prefixes meet and blocks run out."""
    memory = Memory(num_blocks=rng.randint(4, 14))
    for _ in range(num_steps):
        _random_operation(memory, rng)
        yield memory


def run_fuzz(seed: int, num_steps: int = 150) -> None:
    """Every invariant, after every operation; in the end every block is free again."""
    for memory in states(random.Random(seed), num_steps):
        memory.check()
    for user in list(memory.users):
        memory.close(user)
    memory.check()
    assert memory.pool.num_free == memory.pool.num_usable, "a block leaked"


def _random_operation(memory: Memory, rng: random.Random) -> None:
    user = rng.choice(memory.users) if memory.users else None
    kind = rng.choice(["open", "compute", "compute", "compute", "append", "fork", "truncate", "close"])
    if user is None or kind == "open":
        memory.open(_random_tokens(rng), salt=rng.choice([None, None, None, "salt"]))
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


def _random_tokens(rng: random.Random) -> list[int]:
    length = rng.choice([1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK, rng.randint(1, 4 * BLOCK)])
    tokens = [0] * length
    tokens[rng.randrange(length)] = rng.randint(0, 1)
    return tokens


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
    monkeypatch.setattr(Prefix, "__hash__", lambda self: self._hash % 2**bits)
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
    assert list(memory.open([1] * 9).table.blocks) == list(first.table.blocks[:2])
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
    assert list(second.table.blocks[: len(before)]) == before
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
    assert bf16.open([1], [])[0].prefix != int8.open([1], [])[0].prefix


def test_prefix_caching_can_be_switched_off() -> None:
    memory = Memory(enable_prefix_caching=False)
    memory.compute(memory.open([1] * 9))
    assert memory.open([1] * 9).num_computed == 0 and not memory.pool.cached


def test_spare_blocks_are_left_over() -> None:
    pool = BlockPool(4, BLOCK)
    assert [pool.fits([], 8, spare) for spare in (0, 1, 2)] == [True, True, False]


# --- looking changes nothing -----------------------------------------------------------------------------------------


def snapshot(pool: BlockPool) -> object:
    """All that a pool knows: who holds what, what is remembered, and in which order blocks will be taken."""
    counts = [(block.ref_count, block.prefix) for block in pool.blocks]
    return counts, list(pool.free), [(prefix, block.id) for prefix, block in pool.cached.items()]


def admitted(pool: BlockPool, tokens: list[int], salt: str | None, spare: int) -> bool:
    """Whether a request finds room, tried out on a copy of the pool."""
    pool = deepcopy(pool)
    table, start = pool.open(tokens, pool.lookup(tokens, salt), salt)
    return pool.prepare(table, start, len(tokens)) is not None and pool.num_free >= spare


def check_looking(seed: int) -> set[bool]:
    """In every state of a random pool: looks and refusals change nothing, and `fits` says what a trial says.

    Returns the answers that were met.
    """
    rng, answers = random.Random(seed), set[bool]()
    for memory in states(rng, 60):
        pool, tokens = memory.pool, _random_tokens(rng)
        salt, spare = rng.choice([None, None, None, "salt"]), rng.randint(0, 3)
        before = snapshot(pool)
        hits = pool.lookup(tokens, salt)
        fits = pool.fits(hits, len(tokens), spare)
        assert snapshot(pool) == before, "a look changes the pool"
        assert [token for prefix in hits for token in prefix.tokens] == tokens[: len(hits) * BLOCK], "foreign hits"
        assert fits == admitted(pool, tokens, salt, spare), "fits is not what a trial says"
        answers.add(fits)
    return answers


@pytest.mark.parametrize("seed", range(30))
def test_looking_changes_nothing_and_fits_is_exact(seed: int) -> None:
    check_looking(seed)


def test_both_answers_of_fits_are_met() -> None:
    assert check_looking(0) | check_looking(1) | check_looking(2) == {True, False}


def test_an_earlier_look_gives_the_same_hits_as_a_fresh_one() -> None:
    """Whatever happened in between: blocks are evicted, made known again, and others are added."""
    lengths = set[tuple[int, int]]()
    for seed in range(30):
        rng = random.Random(seed)
        tokens, early = [0] * (3 * BLOCK + 1), list[Prefix]()
        for memory in states(rng, 60):
            fresh = memory.pool.lookup(tokens)
            again = memory.pool.lookup(tokens, None, early)
            assert again == fresh, seed
            lengths.add((len(early), len(again)))
            early = again if rng.random() < 0.5 else early
    assert {(a > b) - (a < b) for a, b in lengths if a} == {-1, 0, 1}, "hits come, stay and go"


def count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A list that grows with each block that is hashed."""
    hashed, right = list[object](), Prefix.__init__

    def counted(self: Prefix, tokens: tuple[Hashable, ...], parent: Prefix | None = None) -> None:
        hashed.append(tokens)
        right(self, tokens, parent)

    monkeypatch.setattr(Prefix, "__init__", counted)
    return hashed


def test_hits_of_an_earlier_look_are_not_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(num_blocks=60)
    tokens = list(range(50 * BLOCK))
    memory.compute(memory.open(tokens[: 40 * BLOCK]))
    hashed = count_hashes(monkeypatch)
    hits = memory.pool.lookup(tokens)
    assert (len(hits), len(hashed)) == (40, 42), "the root, 40 known blocks and the first unknown one"
    hashed.clear()
    for _ in range(5):
        assert memory.pool.lookup(tokens, None, hits) == hits
    assert len(hashed) == 5, "each time the one that is unknown"


def test_blocks_that_became_known_since_are_all_that_a_later_look_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(num_blocks=60)
    tokens = list(range(50 * BLOCK))
    user = memory.open(tokens)
    memory.compute(user, 30 * BLOCK)
    hits = memory.pool.lookup(tokens)
    memory.compute(user, 37 * BLOCK)
    hashed = count_hashes(monkeypatch)
    assert len(memory.pool.lookup(tokens, None, hits)) == 37 and len(hashed) == 7 + 1


def test_hits_that_were_evicted_are_not_hashed_either(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(num_blocks=5)
    tokens = [1] * (4 * BLOCK)
    memory.compute(memory.open(tokens))
    hits = memory.pool.lookup(tokens)
    memory.close(memory.users[0])
    memory.compute(memory.open([2] * BLOCK))
    hashed = count_hashes(monkeypatch)
    assert memory.pool.lookup(tokens, None, hits) == hits[:3] and len(hashed) == 1


def test_refused_admissions_do_not_change_the_order_of_eviction() -> None:
    """A request that waits in vain looks at its prefix in every step: it must not keep it from being evicted."""
    engine = scripted_engine(block_size=BLOCK, num_blocks=10, max_num_batched_tokens=64)
    params = SamplingParams(temperature=0, max_tokens=1)
    for token in (5, 6):
        engine.add([token] * (2 * BLOCK), params)
        list(engine.run())
    engine.add([8] * (4 * BLOCK), SamplingParams(temperature=0, max_tokens=4 * BLOCK, ignore_eos=True))
    for _ in range(2):
        engine.step()
    order = list(engine.pool.free)
    engine.add([5] * (2 * BLOCK) + [9] * (4 * BLOCK), params)
    for _ in range(3):
        engine.step()
        assert not engine.trace[-1].admitted and engine.trace[-1].num_waiting == 1
        assert list(engine.pool.free) == order


def _looks_and_holds(self: BlockPool, tokens: list[int], salt: str | None = None, hits: object = ()) -> list[Prefix]:
    """A look that opens a table and gives it back: all counters are as before, the order of eviction is not."""
    found = _right_lookup(self, tokens, salt)
    self.release(_right_open(self, tokens, found, salt)[0])
    return found


def _trusts_earlier_hits(
    self: BlockPool, tokens: list[int], salt: str | None = None, hits: list[Prefix] | tuple[()] = ()
) -> list[Prefix]:
    return list(hits) or _right_lookup(self, tokens, salt)


def _held_counts_as_free(self: BlockPool, hits: list[Prefix], num_tokens: int, spare: int = 0) -> bool:
    return self.blocks_for(num_tokens) - len(hits) + spare <= self.num_free


def _no_room_for_the_copy(self: BlockPool, hits: list[Prefix], num_tokens: int, spare: int = 0) -> bool:
    held = sum(self.cached[prefix].ref_count > 0 for prefix in hits)
    return self.blocks_for(num_tokens) - held + spare <= self.num_free


_right_lookup, _right_open = BlockPool.lookup, BlockPool.open


@pytest.mark.parametrize(
    ("name", "wrong", "found"),
    [
        ("lookup", _looks_and_holds, "a look changes the pool"),
        ("fits", _held_counts_as_free, "fits is not what a trial says"),
        ("fits", _no_room_for_the_copy, "fits is not what a trial says"),
    ],
)
def test_wrong_looks_are_found(name: str, wrong: object, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockPool, name, wrong)
    with pytest.raises(AssertionError, match=found):
        for seed in range(30):
            check_looking(seed)


def test_looks_that_hold_blocks_and_looks_that_trust_old_hits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockPool, "lookup", _looks_and_holds)
    with pytest.raises(AssertionError):
        test_refused_admissions_do_not_change_the_order_of_eviction()
    monkeypatch.setattr(BlockPool, "lookup", _trusts_earlier_hits)
    with pytest.raises(AssertionError):
        test_an_earlier_look_gives_the_same_hits_as_a_fresh_one()


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_blocks", "block_size"), [(1, 4), (0, 4), (-3, 4), (8, 0)])
def test_a_pool_that_holds_nothing_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ConfigError, match=r"num_blocks, block_size.* at least \(2, 1\)"):
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


def _no_copy(self: BlockPool, table: BlockTable, start: int, end: int) -> list[tuple[int, int]] | None:
    new = max(0, self.blocks_for(end) - len(table.blocks))
    if new > self.num_free:
        return None
    for index in range(start // BLOCK, len(table.blocks)):
        self._forget(self.blocks[table.blocks[index]])
    table.blocks.extend(self._take() for _ in range(new))
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
    return BlockTable(table.prefix, table.blocks[:], table.num_hashed)


def _unsalted(self: BlockPool, tokens: list[int], salt: str | None = None, hits: list[Prefix] | None = None) -> object:
    return _right_lookup(self, tokens, None, hits or [])


def _keep_blocks(self: BlockPool, table: BlockTable) -> None:
    del table.blocks[:]


COUNTED, READ = "counts the tables that hold it", "the wrong KV is read back"
COMPUTED, KNOWN = "a block is named that is not computed", "the cache points to blocks that carry the name"
FREE, OWN = "the free list is the set of blocks that nobody holds", "a block has the name that its table gives it"
MUTANTS: dict[str, tuple[type, str, Callable[..., object], str]] = {
    "trap 2: names without their parents": (Prefix, "__eq__", _only_last_block_counts, OWN),
    "trap 3: recycled blocks stay known": (BlockPool, "_take", _take_without_forgetting, KNOWN),
    "trap 4: new blocks are not counted": (BlockPool, "_take", _take_without_counting, COUNTED),
    "trap 5: hits stay on the free list": (BlockPool, "_hold", _hold_on_the_free_list, FREE),
    "trap 6: named before they are computed": (BlockPool, "commit", _partial_blocks_named(BlockPool.commit), COMPUTED),
    "trap 7: the last equal block takes the name": (BlockPool, "commit", _last_one_stays_known, "has a name"),
    "trap 8: duplicates are freed in live tables": (BlockPool, "commit", _duplicates_freed, COUNTED),
    "trap 10: a block is missing at the boundary": (
        BlockPool,
        "blocks_for",
        lambda self, n: n // BLOCK,
        "a position has no block",
    ),
    "trap 12: the salt is left out": (BlockPool, "lookup", _unsalted, READ),
    "trap 11: writing into shared blocks": (BlockPool, "prepare", _no_copy, READ),
    "trap 11: copies are not made": (BlockPool, "prepare", _copies_forgotten(BlockPool.prepare), READ),
    "trap 11: forks are not counted": (BlockPool, "fork", _fork_without_counting, COUNTED),
    "truncation keeps the names": (BlockPool, "truncate", lambda self, table, n: None, COMPUTED),
    "release keeps the last block": (BlockPool, "release", _keep_blocks, COUNTED),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_fuzz_kills(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong, found = MUTANTS[mutant]
    monkeypatch.setattr(owner, name, wrong)
    if mutant.startswith("trap 2"):  # a chained hash hides the bug until two hashes collide
        monkeypatch.setattr(Prefix, "__hash__", lambda self: 0)
    with pytest.raises(AssertionError, match=found):
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
