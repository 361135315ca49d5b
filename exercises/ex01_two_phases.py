"""Exercise 01 · Two phases: why does the first token take so long and the second so little?

You write the loop that turns a model into a writer, and the three numbers by which every inference server is judged.
Nothing later in the course changes this loop: caches, batches and drafts only make its steps cheaper.

Lesson: 01_two_phases · 30 minutes · difficulty ●○○○○
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor


class ToyModel:
    """A model small enough to follow by hand. Given: nothing to do here.

    It remembers what it has read, as a model with a KV cache does: each call gets the *new* tokens only. Its memory
    is one vector: 0.9 times what it was, plus the token's row of `table` `[vocab, vocab]`. The vector is the logits.
    `calls` notes how many tokens came with each call.
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.memory = torch.zeros(table.shape[1])
        self.calls: list[int] = []

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        for token in tokens:
            self.memory = 0.9 * self.memory + self.table[token]
        self.calls.append(len(tokens))
        return self.memory


def generate(
    step: Callable[[Sequence[int]], Tensor], prompt: list[int], max_tokens: int, stop_token: int | None = None
) -> list[int]:
    """Write up to `max_tokens` tokens behind the prompt, always the most likely one. Returns the new tokens.

    `step(tokens)` reads new tokens and returns the logits `[vocab]` of what follows the last of them. It remembers
    what it has read, so nothing may be read twice. The first token comes out of *prefill*, which reads the whole
    prompt at once; each further one takes a *decode* step, which reads one token. So M tokens take 1 prefill and
    M - 1 decode steps, and the last token is never read. The stop token ends the text and is part of it.

    >>> model = ToyModel(torch.eye(3).roll(1, dims=1))  # after token t comes t + 1, modulo 3
    >>> generate(model, prompt=[0, 1], max_tokens=3)
    [2, 0, 1]
    >>> model.calls  # prefill reads two tokens, each decode step one
    [2, 1, 1]
    """
    raise NotImplementedError("generate is yours to write")


def ttft(arrival: float, token_times: list[float]) -> float:
    """Time to first token, in seconds: from the request's arrival to its first token.

    Queue, prefill and sampling are in it: what a user waits before anything happens.

    >>> ttft(arrival=2.0, token_times=[3.5, 3.75, 4.0])
    1.5
    """
    raise NotImplementedError("ttft is yours to write")


def tpot(token_times: list[float]) -> float | None:
    """Time per output token of one request, in seconds: the mean time of a decode step.

    (last - first) / (n - 1): n tokens take n - 1 decode steps, because the first token comes from prefill. A single
    token has none: return None.

    >>> tpot([3.5, 3.75, 4.5])
    0.5
    >>> tpot([3.5]) is None
    True
    """
    raise NotImplementedError("tpot is yours to write")


def itl(requests: list[list[float]]) -> list[float]:
    """Inter-token latencies, in seconds: all gaps between two tokens of the same request, in one pool.

    `requests[i]` holds the token times of request i. A long answer brings many gaps and so weighs more; that is why
    the mean ITL of a server is not the mean of its requests' TPOT.

    >>> itl([[1.0, 1.5, 2.5], [4.0], [2.0, 2.25]])
    [0.5, 1.0, 0.25]
    """
    raise NotImplementedError("itl is yours to write")
