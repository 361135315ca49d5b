"""Exercise 15 · Capstone: does your engine hold?

You join the parts into an engine that serves many requests with one paged cache. Each step it decides who computes how
many tokens, finds room for their keys, packs all tokens side by side, runs the model once, and hands out what came of
it. There is no prefill phase and no decode phase in it: `num_computed` of a sequence's tokens have their keys in the
cache, and each step moves that number towards all of them. Who gets there receives a new token.

`Parts` says what the engine is made of. The plain parts below work; put your own in their place, from the other
exercises. The engine runs any model with the interface of `ToyModel`, the trained one included:

    parts = Parts(schedule=ex11.schedule, pool=ex09.BlockPool, attention=ex02.grouped_attention)
    engine = Engine(minillm.load_model("tiny"), num_blocks=64, block_size=16, budget=64, max_num_seqs=8, parts=parts)

Lesson: 15_capstone · 120 minutes · difficulty ●●●●●
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(eq=False)  # two requests with the same tokens are two
class Sequence:
    """A request on its way. Given."""

    tokens: list[int]  # the prompt, then what was generated
    num_prompt: int
    max_tokens: int  # new tokens wanted
    num_computed: int = 0  # tokens whose keys and values are in the cache
    block_table: list[int] = field(default_factory=list)

    @property
    def remaining(self) -> int:
        """Tokens still to be computed: 1 for a sequence that decodes."""
        return len(self.tokens) - self.num_computed

    @property
    def done(self) -> bool:
        """Whether it has all the tokens that it wants."""
        return len(self.tokens) - self.num_prompt >= self.max_tokens


@dataclass
class Batch:
    """One step as lists: the tokens of all sequences, one after the other, without padding. Given."""

    tokens: list[int]  # [num_tokens]
    positions: list[int]  # [num_tokens]: the place of each token in its own sequence
    slots: list[int]  # [num_tokens]: where its keys and values go, block · block_size + offset
    q_lens: list[int]  # [num_seqs]: tokens that each sequence computes
    kv_lens: list[int]  # [num_seqs]: keys that the last of them sees
    block_tables: list[list[int]]  # [num_seqs]
    last_rows: list[int]  # where the last token stands of each sequence that computes all it has: it gets a new one


def one_by_one(running: list[int], waiting: list[int], budget: int, max_num_seqs: int) -> tuple[list[int], list[int]]:
    """The plainest schedule: the oldest sequence alone, as much of it as fits. Given; exercise 11 has a better one."""
    if running:
        return [min(running[0], budget)] + [0] * (len(running) - 1), []
    return [], [min(remaining, budget) for remaining in waiting[:1]]


def token_by_token(
    running: list[int], waiting: list[int], budget: int, max_num_seqs: int
) -> tuple[list[int], list[int]]:
    """A schedule to test with: everybody computes one token a step, prompts too, so that many run at once. Given."""
    counts = [int(place < budget) for place in range(len(running))]
    return counts, [1] * min(len(waiting), max_num_seqs - len(running), budget - sum(counts))


class Stack:
    """The plainest pool of the blocks 1 … num_blocks - 1: last in, first out. Given; exercise 09 has a better one."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = list(range(num_blocks - 1, 0, -1))

    def allocate(self, count: int) -> list[int] | None:
        """Take blocks, or None if there are not so many."""
        return [self.blocks.pop() for _ in range(count)] if count <= len(self.blocks) else None

    def free(self, blocks: list[int]) -> None:
        """Give blocks back."""
        self.blocks += blocks


def row_by_row(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The plainest causal attention, query by query: q `[q_len, heads, d]`, k and v `[kv_heads, kv_len, d]`. Given."""
    outs = []
    for row, query in enumerate(q, start=k.shape[1] - len(q) + 1):
        groups = query.view(len(k), -1, q.shape[2])
        weights = torch.softmax((groups @ k[:, :row].transpose(1, 2)).float() * scale, dim=-1)
        outs.append((weights.to(v.dtype) @ v[:, :row]).flatten(0, 1))
    return torch.stack(outs)


def most_likely(logits: Tensor) -> int:
    """The plainest sampler: logits `[vocab]` to a token. Given; exercise 04 has a better one."""
    return int(logits.argmax())


@dataclass
class Parts:
    """What an engine is made of. Given: replace what you have built yourself."""

    schedule: Callable[..., tuple[list[int], list[int]]] = one_by_one  # exercise 11: schedule
    pool: Callable[[int], Any] = Stack  # exercise 09: BlockPool
    attention: Callable[..., Tensor] = row_by_row  # exercise 02: grouped_attention
    choose: Callable[[Tensor], int] = most_likely  # exercise 04


class ToyConfig(NamedTuple):
    """What an engine must know about a model. Given."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


class ToyModel:
    """Two layers of attention with random weights, and the interface of the real model. Given.

    `model(tokens, positions, attend)` runs packed tokens `[n]` at positions `[n]`, calls `attend(layer, q, k, v)` in
    each layer and returns hidden states `[n, hidden]`; `model.logits(hidden)` makes `[n, vocab]` of them.
    """

    def __init__(self, vocab: int = 16, heads: int = 4, kv_heads: int = 2, head_dim: int = 4, seed: int = 0) -> None:
        self.config = ToyConfig(num_layers=2, num_kv_heads=kv_heads, head_dim=head_dim)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        generator = torch.Generator().manual_seed(seed)
        hidden = heads * head_dim
        self.embedding = torch.randn(vocab, hidden, generator=generator)
        self.qkv = torch.randn(2, hidden, (heads + 2 * kv_heads) * head_dim, generator=generator) / hidden**0.5
        self.split = [heads, kv_heads, kv_heads]

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        places = torch.sin(positions[:, None] * torch.arange(1, self.embedding.shape[1] + 1))
        x = self.embedding[tokens] + places
        for layer, weights in enumerate(self.qkv):
            q, k, v = (x @ weights).view(len(x), -1, self.config.head_dim).split(self.split, dim=1)
            x = x + attend(layer, q, k, v).flatten(1)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token."""
        return hidden @ self.embedding.T


def pack(sequences: list[Sequence], num_tokens: list[int], block_size: int) -> Batch:
    """Lay the next `num_tokens[i]` tokens of each sequence side by side; sequences with 0 of them take no part.

    The token at position p lies in block `block_table[p // block_size]`, at the offset `p % block_size`. A sequence
    whose last token is computed in this step gets a new token from it; one that stays behind does not: to sample from
    the middle of a prompt would invent a token.

    >>> a = Sequence([7, 8, 9], num_prompt=3, max_tokens=1, num_computed=1, block_table=[4, 2])
    >>> b = Sequence([5, 6, 5], num_prompt=3, max_tokens=1, block_table=[3])
    >>> batch = pack([a, b], [2, 1], block_size=2)
    >>> batch.tokens, batch.positions, batch.slots
    ([8, 9, 5], [1, 2, 0], [9, 4, 6])
    >>> batch.q_lens, batch.kv_lens, batch.last_rows
    ([2, 1], [3, 1], [1])
    """
    # BEGIN SOLUTION
    batch = Batch([], [], [], [], [], [], [])
    for sequence, count in zip(sequences, num_tokens, strict=True):
        if count == 0:
            continue
        positions = range(sequence.num_computed, sequence.num_computed + count)
        table = sequence.block_table
        batch.tokens += sequence.tokens[positions.start : positions.stop]
        batch.positions += positions
        batch.slots += [table[p // block_size] * block_size + p % block_size for p in positions]
        batch.q_lens.append(count)
        batch.kv_lens.append(positions.stop)
        batch.block_tables.append(table)
        if count == sequence.remaining:
            batch.last_rows.append(len(batch.tokens) - 1)
    return batch
    # END SOLUTION


def attend_batch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    batch: Batch,
    attention: Callable[..., Tensor] = row_by_row,
) -> Tensor:
    """Attention of a packed step: q `[num_tokens, heads, d]`, k and v `[num_tokens, kv_heads, d]` -> like q.

    First store k and v at the batch's slots of the pools `[kv_heads, num_blocks, block_size, d]`. Then gather, for each
    sequence, its `kv_len` keys and values through its block table, `[kv_heads, kv_len, d]`, and let its own queries see
    them with `attention(q, k, v, scale)`, scale = 1/√d. What other slots hold, even NaN, is nobody's business.

    >>> pool = torch.full((1, 3, 2, 1), float("nan"))
    >>> batch = Batch([7, 8], [0, 0], [4, 2], q_lens=[1, 1], kv_lens=[1, 1], block_tables=[[2], [1]], last_rows=[0, 1])
    >>> x = torch.tensor([[[3.0]], [[5.0]]])
    >>> attend_batch(x, x, x, pool, pool.clone(), batch).flatten()  # each sees its own value only
    tensor([3., 5.])
    """
    # BEGIN SOLUTION
    kv_heads, _, block_size, d = k_pool.shape
    slots = torch.tensor(batch.slots, device=q.device)
    for pool, new in ((k_pool, k), (v_pool, v)):
        pool[:, slots // block_size, slots % block_size] = new.transpose(0, 1)
    outs, start = [], 0
    for q_len, kv_len, table in zip(batch.q_lens, batch.kv_lens, batch.block_tables, strict=True):
        keys, values = (pool[:, table].reshape(kv_heads, -1, d)[:, :kv_len] for pool in (k_pool, v_pool))
        outs.append(attention(q[start : start + q_len], keys, values, d**-0.5))
        start += q_len
    return torch.cat(outs)
    # END SOLUTION


def reserve(running: list[Sequence], num_tokens: list[int], pool: Any, block_size: int) -> list[Sequence]:
    """Give each running sequence the blocks that its next `num_tokens[i]` tokens need, oldest first.

    `pool.allocate(count)` gives blocks, or None if there are not so many; `pool.free(blocks)` takes them back. Where
    blocks are lacking, the youngest running sequence, the last of the list, gives back all of its own: it leaves both
    lists, forgets its table, and has computed nothing. It keeps its tokens. Repeat until the older one gets its blocks,
    or has itself left. Returns those who left, in that order.

    >>> old, young = Sequence([1] * 5, 5, 9, num_computed=4, block_table=[1]), Sequence([2], 1, 9, block_table=[2])
    >>> pool, running, num_tokens = Stack(num_blocks=2), [old, young], [1, 1]
    >>> pool.allocate(1)  # somebody else holds the only block that the pool has
    [1]
    >>> reserve(running, num_tokens, pool, block_size=4) == [young], running == [old], num_tokens
    (True, True, [1])
    >>> old.block_table, young.block_table
    ([1, 2], [])
    """
    # BEGIN SOLUTION
    victims, index = [], 0
    while index < len(running):
        sequence = running[index]
        needed = -(-(sequence.num_computed + num_tokens[index]) // block_size)
        blocks = pool.allocate(max(0, needed - len(sequence.block_table)))
        if blocks is not None:
            sequence.block_table += blocks
            index += 1
            continue
        victim = running.pop()
        num_tokens.pop()
        pool.free(victim.block_table)
        victim.block_table, victim.num_computed = [], 0
        victims.append(victim)
    return victims
    # END SOLUTION


def commit(running: list[Sequence], num_tokens: list[int], new_tokens: list[int]) -> list[Sequence]:
    """Account for a step that was run. Returns the sequences that are done now, oldest first.

    Sequence i has computed `num_tokens[i]` tokens more. `new_tokens` has one token for each sequence that has computed
    something and has nothing left to compute, in order: it goes behind the others, not computed yet.

    >>> a = Sequence([7, 8, 9], num_prompt=3, max_tokens=1, num_computed=1)
    >>> b = Sequence([5, 6, 5], num_prompt=3, max_tokens=1)
    >>> commit([a, b], [2, 1], new_tokens=[4]) == [a]
    True
    >>> a.tokens, a.remaining, b.tokens, b.remaining
    ([7, 8, 9, 4], 1, [5, 6, 5], 2)
    """
    # BEGIN SOLUTION
    said = iter(new_tokens)
    for sequence, count in zip(running, num_tokens, strict=True):
        sequence.num_computed += count
        if count > 0 and sequence.remaining == 0:
            sequence.tokens.append(next(said))
    return [sequence for sequence in running if sequence.done]
    # END SOLUTION


class Engine:
    """Serves many requests with one model and one paged cache, step by step.

    >>> engine = Engine(ToyModel(), num_blocks=8, block_size=2, budget=4, max_num_seqs=2)
    >>> engine.add([1, 2, 3], max_tokens=3), engine.add([4, 5], max_tokens=2)
    (0, 1)
    >>> alone = Engine(ToyModel(), num_blocks=8, block_size=2, budget=4, max_num_seqs=2)
    >>> alone.add([4, 5], max_tokens=2)
    0
    >>> engine.run()[1] == alone.run()[0]  # nobody's text depends on who else is served
    True
    """

    def __init__(
        self,
        model: Any,
        *,
        num_blocks: int,
        block_size: int,
        budget: int,
        max_num_seqs: int,
        parts: Parts | None = None,
    ) -> None:
        """Nobody is there, the cache is empty.

        Make a pool of keys and one of values for each of `model.config.num_layers` layers, `[num_kv_heads, num_blocks,
        block_size, head_dim]`, in the model's dtype and on its device, and the pool of blocks from `parts`.
        """
        # BEGIN SOLUTION
        self.model = model
        self.block_size, self.budget, self.max_num_seqs = block_size, budget, max_num_seqs
        self.parts = parts or Parts()
        self.pool = self.parts.pool(num_blocks)
        self.capacity = (num_blocks - 1) * block_size
        config = model.config
        shape = (config.num_layers, config.num_kv_heads, num_blocks, block_size, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, device=model.device, dtype=model.dtype) for _ in range(2))
        self.requests: list[Sequence] = []
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        # END SOLUTION

    def add(self, prompt: list[int], max_tokens: int) -> int:
        """Queue a request and return its number: 0, 1, 2 …

        ValueError if the cache could not even hold it alone: all of its tokens but the last, which is never computed.
        """
        # BEGIN SOLUTION
        needed = len(prompt) + max_tokens - 1
        if needed > self.capacity:
            raise ValueError(f"The request needs room for {needed} tokens; the cache has {self.capacity}.")
        self.requests.append(Sequence(list(prompt), len(prompt), max_tokens))
        self.waiting.append(self.requests[-1])
        return len(self.requests) - 1
        # END SOLUTION

    @torch.inference_mode()
    def step(self) -> None:
        """Schedule, reserve, pack, run the model, choose, commit.

        Those whom `reserve` sends away go back to the head of the queue, the oldest of them first. Those who are done
        free their blocks. If nobody is left who computes anything, the model is not run.
        """
        # BEGIN SOLUTION
        num_tokens, admitted = self.parts.schedule(
            [sequence.remaining for sequence in self.running],
            [sequence.remaining for sequence in self.waiting],
            self.budget,
            self.max_num_seqs,
        )
        num_tokens = num_tokens + admitted
        self.running += self.waiting[: len(admitted)]
        del self.waiting[: len(admitted)]
        victims = reserve(self.running, num_tokens, self.pool, self.block_size)
        self.waiting[:0] = reversed(victims)
        batch = pack(self.running, num_tokens, self.block_size)
        if not batch.tokens:
            return
        logits = self._logits(batch)
        for sequence in commit(self.running, num_tokens, [self.parts.choose(row) for row in logits]):
            self.running.remove(sequence)
            self.pool.free(sequence.block_table)

    def _logits(self, batch: Batch) -> Tensor:
        """The model's scores `[len(last_rows), vocab]`."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend_batch(q, k, v, self.keys[layer], self.values[layer], batch, self.parts.attention)

        tokens, positions = torch.tensor([batch.tokens, batch.positions], device=self.model.device)
        hidden = self.model(tokens, positions, attend)
        return self.model.logits(hidden[batch.last_rows])
        # END SOLUTION

    def run(self, max_steps: int = 10_000) -> list[list[int]]:
        """Step until nobody is running or waiting; returns the new tokens of all requests, in the order of `add`.

        Stop after `max_steps` in any case: an engine that pushes out the same sequence for ever should be noticed.
        """
        # BEGIN SOLUTION
        for _ in range(max_steps):
            if not self.running and not self.waiting:
                break
            self.step()
        return [sequence.tokens[sequence.num_prompt :] for sequence in self.requests]
        # END SOLUTION
