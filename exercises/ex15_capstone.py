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
    raise NotImplementedError("pack is yours to write")


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
    raise NotImplementedError("attend_batch is yours to write")


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
    raise NotImplementedError("reserve is yours to write")


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
    raise NotImplementedError("commit is yours to write")


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
        raise NotImplementedError("__init__ is yours to write")

    def add(self, prompt: list[int], max_tokens: int) -> int:
        """Queue a request and return its number: 0, 1, 2 …

        ValueError if the cache could not even hold it alone: all of its tokens but the last, which is never computed.
        """
        raise NotImplementedError("add is yours to write")

    @torch.inference_mode()
    def step(self) -> None:
        """Schedule, reserve, pack, run the model, choose, commit.

        Those whom `reserve` sends away go back to the head of the queue, the oldest of them first. Those who are done
        free their blocks. If nobody is left who computes anything, the model is not run.
        """
        raise NotImplementedError("step is yours to write")

    def run(self, max_steps: int = 10_000) -> list[list[int]]:
        """Step until nobody is running or waiting; returns the new tokens of all requests, in the order of `add`.

        Stop after `max_steps` in any case: an engine that pushes out the same sequence for ever should be noticed.
        """
        raise NotImplementedError("run is yours to write")
