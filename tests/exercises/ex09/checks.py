"""Checks of exercise 09. The oracle has no blocks: a list of what is free, and each sequence's keys side by side."""

from __future__ import annotations

import torch

from minillm.course.lab.checks import Case, check
from minillm.course.lab.exercises import Exercise, Task

EXERCISE = Exercise(
    slug="paged_kv",
    tasks=(
        Task(
            "pool",
            "Hand out blocks and take them back",
            hints=(
                "Which block has been free for longest? What does a queue do?",
                "A deque of free blocks: taken on the left, given back on the right. Block 0 never gets in. Look "
                "before you change anything: a refused call leaves the pool as it was.",
                "self.free_blocks = deque(range(1, num_blocks)); allocate: None if count > num_free, else [popleft() "
                "for _ in range(count)]; free: ValueError if a block is in free_blocks or twice in the list, else "
                "extend(blocks)",
            ),
        ),
        Task(
            "blocks_to_add",
            "How many blocks are missing",
            hints=(
                "16 tokens in blocks of 16 need one block, 17 need two. Which kind of division is that?",
                "Round up: (num_tokens + block_size - 1) // block_size. A table may already be longer than needed.",
                "return max(0, (num_tokens + block_size - 1) // block_size - len(block_table))",
            ),
        ),
        Task(
            "slots",
            "From a position to a place",
            hints=(
                "Two questions for each position: which entry of the table, and where in that block?",
                "Entry p // block_size of the table, offset p % block_size. Positions are those of the whole sequence.",
                "[block_table[p // block_size] * block_size + p % block_size for p in range(start, end)]",
            ),
        ),
        Task(
            "write_kv",
            "Store keys and values at their slots",
            hints=(
                "A slot is block * block_size + offset. How do you get the two back?",
                "where // block_size and where % block_size index dimensions 1 and 2 of the pool. Its first dimension "
                "is the head, k's first is the token.",
                "k_pool[:, where // block_size, where % block_size] = k.transpose(0, 1), and the same for v",
            ),
        ),
        Task(
            "attention",
            "Attention through the block table",
            hints=(
                "Bring the sequence's keys side by side first. Then it is attention as you know it, without a mask.",
                "Your slot_mapping(block_table, 0, seq_len, block_size) names exactly the slots that may be read. "
                "pool.flatten(1, 2) has one row per slot.",
                "k = k_pool.flatten(1, 2)[:, slots]; grouped = q.view(kv_heads, -1, d); weights = softmax((grouped @ "
                "k.transpose(1, 2)).float() * scale, -1); return (weights.to(v.dtype) @ v).view(q.shape)",
            ),
        ),
    ),
    banned_operations=("scaled_dot_product_attention",),
)


def shuffled_table(case: Case, num_blocks: int, count: int) -> list[int]:
    """A block table in no order, without block 0."""
    return (1 + torch.randperm(num_blocks - 1, generator=case.generator))[:count].tolist()


def poisoned(kv_heads: int, num_blocks: int, block_size: int, d: int) -> torch.Tensor:
    """A pool in which everything that nobody wrote is NaN."""
    return torch.full((kv_heads, num_blocks, block_size, d), float("nan"))


def lay_down(pool: torch.Tensor, table: list[int], rows: torch.Tensor) -> None:
    """Put rows `[tokens, kv_heads, d]` where the table says, one by one."""
    for position, row in enumerate(rows):
        pool[:, table[position // pool.shape[2]], position % pool.shape[2]] = row


def newest_attends(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The oracle: head by head over keys `[tokens, kv_heads, d]` that lie side by side, in float64."""
    group, out = len(q) // k.shape[1], torch.empty_like(q)
    for head in range(len(q)):
        scores = k[:, head // group].double() @ q[head].double() * scale
        out[head] = (scores.softmax(0) @ v[:, head // group].double()).to(q.dtype)
    return out


@check("pool", points=2)
def blocks_go_and_come(case: Case) -> None:
    """Blocks that were free for longest go first; block 0 never does"""
    size = case.integer(8, 12)
    pool, free = case.learner.BlockPool(num_blocks=size), list(range(1, size))
    held: list[int] = []
    for _ in range(6):
        count = case.integer(1, 3)
        expected, free = (free[:count], free[count:]) if count <= len(free) else (None, free)
        case.expect(pool.allocate(count), expected, f"{count} blocks, those that have been free for longest")
        held += expected or []
        back = [held.pop(case.integer(0, len(held) - 1)) for _ in range(min(2, len(held)))]
        pool.free(back)
        free += back
        case.expect(pool.num_free, len(free), "blocks that nobody holds; block 0 is not one of them")


@check("pool", points=1)
def too_many(case: Case) -> None:
    """A pool that has too few blocks says None and keeps what it has"""
    size = case.integer(5, 8)
    pool = case.learner.BlockPool(num_blocks=size)
    case.expect(pool.allocate(size), None, f"{size} blocks exist, and block 0 is not given away")
    case.expect(pool.num_free, size - 1, "the refused call changed nothing")
    case.expect(pool.allocate(size - 1), list(range(1, size)), "all of them at once")


@check("pool", points=1, hidden=True)
def given_back_twice(case: Case) -> None:
    """A block that is free already is not taken back again"""
    pool = case.learner.BlockPool(num_blocks=6)
    pool.allocate(3)
    case.raises("ValueError", pool.free, [2, 2], why="twice in one call")
    case.expect(pool.num_free, 2, "the refused call changed nothing")
    pool.free([2])
    case.raises("ValueError", pool.free, [1, 2], why="block 2 is free")
    case.expect(pool.num_free, 3, "the refused call changed nothing: block 1 is still in use")


@check("blocks_to_add", points=2)
def missing_blocks(case: Case) -> None:
    """As many blocks as the tokens need, and no more"""
    block_size = case.integer(3, 6)
    for tokens in range(1, 3 * block_size + 1):
        needed = sum(1 for first in range(0, tokens, block_size) if first < tokens)
        got = case.learner.blocks_to_add([4], tokens, block_size)
        case.expect(got, max(0, needed - 1), f"{tokens} tokens in blocks of {block_size}, one of which is there")


@check("blocks_to_add", points=1, hidden=True)
def never_below_zero(case: Case) -> None:
    """A table that is longer than needed, or none at all"""
    case.expect(case.learner.blocks_to_add([5, 6, 7], 4, 4), 0, "three blocks are there, one is needed")
    case.expect(case.learner.blocks_to_add([], 0, 4), 0, "no tokens, no blocks")
    case.expect(case.learner.blocks_to_add([], 9, 4), 3, "9 tokens in blocks of 4")


@check("slots", points=2)
def where_tokens_lie(case: Case) -> None:
    """Positions to slots, through a table in no order"""
    block_size = case.integer(3, 5)
    table = shuffled_table(case, 9, 4)
    places = [block * block_size + offset for block in table for offset in range(block_size)]
    for start, end in ((0, len(places)), (case.integer(1, block_size), 3 * block_size - 1)):
        got = case.learner.slot_mapping(table, start, end, block_size)
        case.expect(got, places[start:end], f"positions {start} to {end - 1} of the whole sequence")


@check("write_kv", points=2)
def stored(case: Case) -> None:
    """Each token's keys and values at its slot, and nothing else changed"""
    kv_heads, d, block_size, count = case.integer(2, 3), case.integer(4, 5), case.integer(2, 4), 3
    k_pool, v_pool = case.randn(kv_heads, 5, block_size, d), case.randn(kv_heads, 5, block_size, d)
    k, v = case.randn(count, kv_heads, d), case.randn(count, kv_heads, d)
    slots = torch.randperm(5 * block_size, generator=case.generator)[:count].tolist()
    expected = [k_pool.clone(), v_pool.clone()]
    for pool, rows in zip(expected, (k, v), strict=True):
        for slot, row in zip(slots, rows, strict=True):
            pool[:, slot // block_size, slot % block_size] = row
    got = case.learner.write_kv(k, v, k_pool, v_pool, slots)
    case.expect(got[0], expected[0], "the key pool")
    case.expect(got[1], expected[1], "the value pool")


@check("attention", points=3)
def through_the_table(case: Case) -> None:
    """The newest token reads its sequence, wherever the blocks lie"""
    kv_heads, group, d, block_size = case.integer(2, 3), case.integer(2, 3), case.integer(4, 6), case.integer(3, 4)
    tokens = 2 * block_size + case.integer(1, block_size - 1)
    table = shuffled_table(case, 7, 3)
    k, v, q = case.randn(tokens, kv_heads, d), case.randn(tokens, kv_heads, d), case.randn(kv_heads * group, d)
    k_pool, v_pool = (torch.zeros(kv_heads, 7, block_size, d) for _ in range(2))
    lay_down(k_pool, table, k)
    lay_down(v_pool, table, v)
    got = case.learner.paged_decode_attention(q, k_pool, v_pool, table, tokens, scale=d**-0.5)
    case.expect(got, newest_attends(q, k, v, d**-0.5), f"{tokens} tokens in blocks {table}")


@check("attention", points=2)
def nothing_else_is_read(case: Case) -> None:
    """What lies behind the last token, and in other blocks, is not read"""
    tokens, table = case.integer(5, 7), shuffled_table(case, 8, 4)  # the last entry of the table is not needed yet
    k, v, q = case.randn(tokens, 2, 4), case.randn(tokens, 2, 4), case.randn(4, 4)
    k_pool, v_pool = poisoned(2, 8, 4, 4), poisoned(2, 8, 4, 4)
    lay_down(k_pool, table, k)
    lay_down(v_pool, table, v)
    got = case.learner.paged_decode_attention(q, k_pool, v_pool, table, tokens, 0.5)
    case.expect(got, newest_attends(q, k, v, 0.5), "all other memory is NaN, as if somebody else had just freed it")


@check("attention", points=1, hidden=True)
def full_blocks_and_first_tokens(case: Case) -> None:
    """A sequence that ends with its block, and one of a single token"""
    for tokens in (8, 1):
        table = shuffled_table(case, 6, 2)
        k, v, q = case.randn(tokens, 1, 4), case.randn(tokens, 1, 4), 5 * case.randn(3, 4)
        k_pool, v_pool = poisoned(1, 6, 4, 4), poisoned(1, 6, 4, 4)
        lay_down(k_pool, table, k)
        lay_down(v_pool, table, v)
        got = case.learner.paged_decode_attention(q, k_pool, v_pool, table, tokens, 0.5)
        case.expect(got, newest_attends(q, k, v, 0.5), f"{tokens} tokens in blocks of 4")
