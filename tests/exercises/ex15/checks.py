"""Checks of exercise 15. The oracle serves one request at a time, without a cache, without blocks, without a batch."""

from __future__ import annotations

import torch

from minillm.course.lab.checks import Case, check
from minillm.course.lab.exercises import Exercise, Task

EXERCISE = Exercise(
    slug="capstone",
    tasks=(
        Task(
            "pack",
            "A step as lists",
            hints=(
                "Which of a sequence's tokens come next, and at which positions do they stand in their own sequence?",
                "Positions num_computed … num_computed + count - 1 give everything: tokens by slicing, slots through "
                "the block table, and the last position + 1 is what the last of them sees.",
                "for each sequence with count > 0: positions = range(num_computed, num_computed + count); tokens += "
                "sequence.tokens[positions.start : positions.stop]; slots += [table[p // block_size] * block_size + p "
                "% block_size for p in positions]; if count == sequence.remaining: "
                "last_rows.append(len(batch.tokens) - 1)",
            ),
        ),
        Task(
            "attend_batch",
            "Attention of a packed step",
            hints=(
                "First write, then read: a token sees itself, too. What may a sequence read of its last block?",
                "k_pool[:, slots // block_size, slots % block_size] = k.transpose(0, 1) writes all tokens at once. A "
                "sequence's keys are k_pool[:, table], its blocks joined, without what lies behind kv_len.",
                "keys = k_pool[:, table].reshape(kv_heads, -1, d)[:, :kv_len], values alike; out = attention(q[start : "
                "start + q_len], keys, values, d**-0.5); start += q_len; at the end torch.cat(outs)",
            ),
        ),
        Task(
            "reserve",
            "Room for everybody, or for the older ones",
            hints=(
                "How many blocks hold num_computed + num_tokens[i] tokens, and how many does the table have?",
                "Go from the oldest to the youngest. When allocate returns None, the last of the list leaves; then ask "
                "again for the same sequence, unless it was the one who left.",
                "index = 0; while index < len(running): blocks = pool.allocate(max(0, needed - len(table))); if not "
                "None: table += blocks, index += 1; else: victim = running.pop(), num_tokens.pop(), "
                "pool.free(victim.block_table), victim.block_table, victim.num_computed = [], 0",
            ),
        ),
        Task(
            "commit",
            "Account for a step",
            hints=(
                "Who gets a token, and is that token computed?",
                "Move num_computed first. Then nothing remains for exactly those who get a token.",
                "said = iter(new_tokens); for each: num_computed += count; if count > 0 and remaining == 0: "
                "tokens.append(next(said)); return [s for s in running if s.done]",
            ),
        ),
        Task(
            "engine",
            "The engine",
            hints=(
                "The docstring of `step` names the six parts in their order. You have written four of them.",
                "Schedule with what remains of the running and of the waiting ones, move the admitted, reserve, put "
                "back at the head of the queue who had to leave, pack, run, commit, free who is done.",
                "hidden = model(tokens, positions, attend) with attend(layer, q, k, v) = attend_batch(q, k, v, "
                "keys[layer], values[layer], batch, parts.attention); logits = model.logits(hidden[batch.last_rows]); "
                "new = [parts.choose(row) for row in logits]",
            ),
        ),
    ),
)

BLOCK_SIZE = 3


def lists(case: Case, low: int, high: int, count: int) -> list[int]:
    """Whole numbers as a list."""
    return case.randint(low, high + 1, count).tolist()


def some_sequences(case: Case) -> tuple[list, list[int], list[int], list[list[int]]]:
    """Three sequences over there, and what is known of them: prompt lengths, tokens computed, block tables."""
    lengths = lists(case, 5, 9, 3)
    computed = [case.integer(1, length - 3) for length in lengths]
    blocks = iter(torch.randperm(12, generator=case.generator).add(1).tolist())
    tables = [[next(blocks) for _ in range(-(-length // BLOCK_SIZE))] for length in lengths]
    return lengths, computed, tables


def placed(table: list[int], position: int) -> int:
    """The slot of a token."""
    block, offset = divmod(position, BLOCK_SIZE)
    return table[block] * BLOCK_SIZE + offset


@check("pack", points=2)
def side_by_side(case: Case) -> None:
    """Tokens, positions and slots of all sequences, one after the other"""
    lengths, computed, tables = some_sequences(case)
    texts = [lists(case, 0, 99, length) for length in lengths]
    counts = [lengths[0] - computed[0], 2, 1]  # all that remains, and less than that
    sequences = [
        case.given.Sequence(text, len(text), 4, num_computed=done, block_table=table)
        for text, done, table in zip(texts, computed, tables, strict=True)
    ]
    got = case.learner.pack(sequences, counts, BLOCK_SIZE)
    where = [(i, p) for i, count in enumerate(counts) for p in range(computed[i], computed[i] + count)]
    case.expect(got.tokens, [texts[i][p] for i, p in where], f"{counts} tokens behind {computed}")
    case.expect(got.positions, [p for _, p in where], "positions in their own sequences")
    case.expect(got.slots, [placed(tables[i], p) for i, p in where], f"block tables {tables}, {BLOCK_SIZE} a block")
    case.expect(got.q_lens, counts, "tokens of each sequence")
    case.expect(got.kv_lens, [a + b for a, b in zip(computed, counts, strict=True)], "keys that the last one sees")
    case.expect(got.last_rows, [counts[0] - 1], "only the first sequence computes all that it has")


@check("pack", points=1, hidden=True)
def not_everybody_takes_part(case: Case) -> None:
    """A sequence without tokens in this step leaves no trace; all who get level get a token"""
    sequences = [
        case.given.Sequence([1, 2], 2, 4, num_computed=1, block_table=[5]),
        case.given.Sequence([3, 4, 5], 3, 4, block_table=[2]),
        case.given.Sequence([6, 7, 8], 3, 4, block_table=[4]),
    ]
    got = case.learner.pack(sequences, [1, 0, 3], BLOCK_SIZE)
    case.expect(got.tokens, [2, 6, 7, 8], "the second sequence waits")
    case.expect(got.block_tables, [[5], [4]], "tables of those who take part")
    case.expect(got.last_rows, [0, 3], "both get level")


def seen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The oracle: one query, head by head. q `[heads, d]`, k and v `[kv_heads, keys, d]`."""
    group = len(q) // len(k)
    scores = [k[h // group] @ q[h] / q.shape[1] ** 0.5 for h in range(len(q))]
    return torch.stack([s.softmax(0) @ v[h // group] for h, s in enumerate(scores)])


@check("attend_batch", points=3)
def each_sees_its_own(case: Case) -> None:
    """Queries see the keys of their own sequence, up to their own position, wherever these lie"""
    _, computed, tables = some_sequences(case)
    counts, kv_heads, heads, d = [2, 1, 3], 2, 4, 5
    pools = torch.full((2, kv_heads, 13, BLOCK_SIZE, d), float("nan"))
    stories = [case.randn(2, kv_heads, done + count, d) for done, count in zip(computed, counts, strict=True)]
    for story, done, table in zip(stories, computed, tables, strict=True):
        for position in range(done):
            slot = placed(table, position)
            pools[:, :, slot // BLOCK_SIZE, slot % BLOCK_SIZE] = story[:, :, position]
    where = [(i, p) for i, count in enumerate(counts) for p in range(computed[i], computed[i] + count)]
    q = case.randn(len(where), heads, d)
    k, v = torch.stack([stories[i][:, :, p] for i, p in where], dim=1)
    batch = case.given.Batch(
        [0] * len(where),
        [p for _, p in where],
        [placed(tables[i], p) for i, p in where],
        counts,
        [done + count for done, count in zip(computed, counts, strict=True)],
        tables,
        [],
    )
    got = case.learner.attend_batch(q, k, v, pools[0], pools[1], batch)
    want = [seen(row, *stories[i][:, :, : p + 1]) for row, (i, p) in zip(q, where, strict=True)]
    case.expect(got, torch.stack(want), f"tables {tables}; all that belongs to nobody is NaN")


@check("attend_batch", points=1, hidden=True)
def any_attention_will_do(case: Case) -> None:
    """The attention that is handed over computes, with queries, keys and values of one sequence"""
    pool = torch.zeros(1, 3, 2, 1)
    x = case.randn(2, 1, 1)
    batch = case.given.Batch([0, 0], [0, 0], [4, 2], [1, 1], [1, 1], [[2], [1]], [0, 1])
    got = case.learner.attend_batch(x, x, 2 * x, pool, pool.clone(), batch, case.given.row_by_row)
    case.expect(got, 2 * x, "one key each: its value is the answer")


@check("reserve", points=2)
def blocks_for_new_tokens(case: Case) -> None:
    """Every sequence gets the blocks that it lacks, no more"""
    lengths, computed, tables = some_sequences(case)
    pool = case.given.Stack(30)  # of blocks 1 to 29; what is held already has other numbers
    held = [[30 + b for b in table[: -(-done // BLOCK_SIZE)]] for table, done in zip(tables, computed, strict=True)]
    counts = [length - done for length, done in zip(lengths, computed, strict=True)]
    running = [
        case.given.Sequence([1] * length, length, 4, num_computed=done, block_table=list(table))
        for length, done, table in zip(lengths, computed, held, strict=True)
    ]
    got = case.learner.reserve(running, counts, pool, BLOCK_SIZE)
    case.expect(got, [], "there are blocks for all")
    for sequence, length, table in zip(running, lengths, held, strict=True):
        case.require(sequence.block_table, grown(table, -(-length // BLOCK_SIZE)), f"{length} tokens, had {table}")


def grown(table: list[int], size: int):
    """Accepts a table that begins with what was there and has this many different blocks."""
    return lambda got: (
        None
        if isinstance(got, list) and got[: len(table)] == table and len(set(got)) == len(got) == size
        else f"expected {size} blocks, the first {len(table)} of them {table}, got {got}"
    )


def crowd(case: Case, free: int) -> tuple:
    """Three sequences that hold two full blocks each and want one token more; a pool that has `free` blocks."""
    tables = [[7, 8], [9, 10], [11, 12]]
    running = [case.given.Sequence([1] * 7, 3, 9, num_computed=6, block_table=table) for table in tables]
    pool = case.given.Stack(1 + free)
    return case.learner.reserve(running, [1, 1, 1], pool, BLOCK_SIZE), running, pool


@check("reserve", points=2)
def the_youngest_leaves(case: Case) -> None:
    """Where blocks are lacking, the youngest gives back all of its own"""
    left, running, pool = crowd(case, free=1)
    case.expect(left[0].block_table, [], "the youngest holds nothing now")
    case.expect(left[0].num_computed, 0, "what it had computed is gone")
    case.expect(left[0].tokens, [1] * 7, "it keeps its tokens")
    for sequence in running[:2]:
        case.require(sequence.block_table, lambda got: None if len(got) == 3 else f"expected 3 blocks, got {got}")
    case.expect(pool.blocks, [11], "of the two blocks that came back, one went to the second sequence")


@check("reserve", points=1, hidden=True)
def as_many_leave_as_necessary(case: Case) -> None:
    """A sequence that nobody can make room for leaves itself, and so may all but one"""
    left, running, _ = crowd(case, free=0)
    case.require(running[0].block_table, lambda got: None if len(got) == 3 else f"expected 3 blocks, got {got}")
    case.expect(left[0].num_computed, 0, "the youngest made room for the oldest and for the second")
    alone = [case.given.Sequence([1] * 7, 3, 9, num_computed=6, block_table=[7, 8])]
    got = case.learner.reserve(alone, [1], case.given.Stack(1), BLOCK_SIZE)
    case.expect(got[0].num_computed, 0, "it was alone, and the pool was empty")


@check("commit", points=2)
def counted(case: Case) -> None:
    """Computed tokens are counted, and whoever is level gets its token"""
    texts = [lists(case, 0, 99, length) for length in (4, 6, 5, 3)]
    computed, counts, new = [3, 1, 2, 2], [1, 2, 3, 0], lists(case, 0, 99, 2)
    running = [case.given.Sequence(text, 3, 2, num_computed=done) for text, done in zip(texts, computed, strict=True)]
    case.learner.commit(running, counts, new)
    want = [[*texts[0], new[0]], texts[1], [*texts[2], new[1]], texts[3]]
    for sequence, text, done, count in zip(running, want, computed, counts, strict=True):
        case.expect(sequence.tokens, text, f"{count} tokens computed behind {done}; new tokens {new}")
        case.expect(sequence.num_computed, done + count, "a new token is not computed yet")


@check("commit", points=1, hidden=True)
def who_is_done(case: Case) -> None:
    """Done is who has all tokens that it wants"""
    running = [case.given.Sequence([1, 2], 2, wanted, num_computed=1) for wanted in (1, 2)]
    done = case.learner.commit(running, [1, 1], [7, 8])
    case.expect(done[0].tokens, [1, 2, 7], "it wanted one token")
    case.require(done, lambda got: None if len(got) == 1 else f"expected one sequence, got {len(got)}", "one wants two")


def alone(model, prompt: list[int], max_tokens: int, choose=torch.argmax) -> list[int]:
    """The oracle: everything is computed again for each token."""
    text = list(prompt)
    for _ in range(max_tokens):
        hidden = model(torch.tensor(text), torch.arange(len(text)), triangle)
        text.append(int(choose(model.logits(hidden[-1:])[0])))
    return text[len(prompt) :]


def triangle(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of a whole text: q `[n, heads, d]`, k and v `[n, kv_heads, d]`."""
    k, v = k.transpose(0, 1), v.transpose(0, 1)
    return torch.stack([seen(row, k[:, : i + 1], v[:, : i + 1]) for i, row in enumerate(q)])


def engine(case: Case, num_blocks: int = 20, budget: int = 7, max_num_seqs: int = 3, **settings):
    """A learner's engine around a toy, and the same toy here."""
    sizes = {"num_blocks": num_blocks, "block_size": BLOCK_SIZE, "budget": budget, "max_num_seqs": max_num_seqs}
    seed = case.integer(0, 10**6)
    return case.learner.Engine(case.given.ToyModel(seed=seed), **sizes, **settings), case.ours.ToyModel(seed=seed)


@check("engine", points=2)
def one_request(case: Case) -> None:
    """A single request: prompt in chunks, then token by token"""
    theirs, ours = engine(case)
    prompt = lists(case, 0, 15, 11)
    case.expect(theirs.add(prompt, 6), 0, "its number")
    case.expect(theirs.run(99), [alone(ours, prompt, 6)], "11 prompt tokens, at most 7 a step; then 6 new ones")


@check("engine", points=3)
def many_requests(case: Case) -> None:
    """Everybody gets the text that it would get alone"""
    theirs, ours = engine(case)
    prompts, wanted = [lists(case, 0, 15, case.integer(1, 9)) for _ in range(5)], lists(case, 1, 6, 5)
    for prompt, max_tokens in zip(prompts, wanted, strict=True):
        theirs.add(prompt, max_tokens)
    case.expect(theirs.run(99), [alone(ours, *one) for one in zip(prompts, wanted, strict=True)], "in the order of add")


@check("engine", points=3)
def few_blocks(case: Case) -> None:
    """A cache that cannot hold all: who is pushed out comes back, and its text is the same"""
    theirs, ours = engine(case, num_blocks=6, parts=case.given.Parts(schedule=case.given.token_by_token))
    prompts = [lists(case, 0, 15, 5) for _ in range(4)]
    for prompt in prompts:
        theirs.add(prompt, 6)
    case.expect(theirs.run(99), [alone(ours, prompt, 6) for prompt in prompts], "5 blocks of 3 tokens for 4 requests")


@check("engine", points=1, hidden=True)
def other_parts(case: Case) -> None:
    """The engine is made of the parts that it gets"""
    theirs, ours = engine(case, parts=case.given.Parts(choose=case.torch.argmin))
    prompt = lists(case, 0, 15, 4)
    want = alone(ours, prompt, 5, torch.argmin)
    theirs.add(prompt, 5)
    case.require(theirs.run(99)[0], same_tokens(want), "a sampler that takes the least likely token")


def same_tokens(want: list[int]):
    """Accepts these tokens, as numbers or as tensors of one."""
    return lambda got: None if [int(token) for token in got] == want else f"expected {want}, got {got}"


@check("engine", points=1)
def impossible_requests(case: Case) -> None:
    """A request that the cache could never hold is refused, and nothing else is"""
    theirs, ours = engine(case, num_blocks=4)
    case.raises("ValueError", theirs.add, [1] * 5, 6, why="10 tokens have to be stored; 3 blocks hold 9")
    case.expect(theirs.add([1] * 5, 5), 0, "9 tokens fit: the last one is never computed")
    case.expect(theirs.run(99), [alone(ours, [1] * 5, 5)], "the refused request leaves no trace")


@check("engine", points=1, hidden=True)
def nothing_is_computed_twice(case: Case) -> None:
    """What is in the cache is not computed again"""
    theirs, ours = engine(case)
    prompt = lists(case, 0, 15, 9)
    theirs.add(prompt, 8)
    run = case.count(theirs.run, 99)
    case.expect(run["out"], [alone(ours, prompt, 8)], "8 new tokens")
    rows = len(prompt) + 8  # one more than there are
    products = 2 * rows * (ours.qkv.numel() + ours.embedding.numel())
    heads = ours.split[0] * ours.config.head_dim
    limit = products + 2 * 4 * heads * rows * rows
    case.require(run["flops"], lambda got: None if got <= limit else f"{got} FLOPs, where {limit} are plenty")
