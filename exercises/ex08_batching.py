"""Exercise 08 · Batching: why serve many at once?

A decode step reads all weights of the model, whether one sequence or sixty take part. So a server fills its *slots*:
places in the batch. You write the old way, which waits until the whole batch is done, the new way, which lets somebody
in as soon as a slot is free, and the loop of a real server.

Lesson: 08_batching · 45 minutes · difficulty ●●○○○
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


def static_schedule(lengths: list[int], num_slots: int) -> list[list[int]]:
    """Who gets a token in each step, if a batch runs until its longest request is done and only then the next begins.

    Request i wants `lengths[i]` tokens, at least one. Requests are served in order, `num_slots` at a time; all are
    there from the beginning. Each step gives one token to everybody in the batch who wants more: list their indices.

    >>> static_schedule([1, 3, 1], num_slots=2)  # request 2 waits for request 1, though slot 0 is free
    [[0, 1], [1], [1], [2]]
    """
    raise NotImplementedError("static_schedule is yours to write")


def continuous_schedule(lengths: list[int], arrivals: list[int], num_slots: int) -> list[list[int]]:
    """Who gets a token in each step, if a waiting request joins as soon as there is a slot (Orca, 2022).

    Request i arrives before step `arrivals[i]` (ascending) and wants `lengths[i]` tokens. In each step first the
    oldest waiting requests fill the free slots, then everybody in a slot gets a token, then those who are done leave.
    List the indices, oldest request first. A step in which nobody is there is an empty list; stop when all are done.

    >>> continuous_schedule([1, 3, 1], arrivals=[0, 0, 0], num_slots=2)
    [[0, 1], [1, 2], [1]]
    >>> continuous_schedule([1, 1], arrivals=[0, 2], num_slots=2)
    [[0], [], [1]]
    """
    raise NotImplementedError("continuous_schedule is yours to write")


def occupancy(steps: list[list[int]], num_slots: int) -> float:
    """The share of slots, over all steps, that brought somebody a token: 1 is a full machine.

    >>> occupancy([[0, 1], [1], [1], [2]], num_slots=2), occupancy([[0, 1], [1, 2], [1]], num_slots=2)
    (0.625, 0.8333333333333334)
    """
    raise NotImplementedError("occupancy is yours to write")


class ToyBatchModel:
    """A model with a memory per slot, small enough to follow by hand. Given: nothing to do here.

    A memory is one vector, the logits: each token shrinks it by a tenth and adds its row of `table` `[vocab, vocab]`.
    Whoever leaves a slot leaves its memory there, as a KV cache would: `clear(slot)` before somebody else moves in.
    """

    def __init__(self, table: Tensor, num_slots: int) -> None:
        self.table = table
        self.memory = torch.zeros(num_slots, table.shape[1])

    def clear(self, slot: int) -> None:
        """Forget what was read in this slot."""
        self.memory[slot] = 0.0

    def read(self, slots: list[int], tokens: list[list[int]]) -> Tensor:
        """One step: slot `slots[i]` reads `tokens[i]`, one or more. Returns logits `[len(slots), vocab]`."""
        for slot, new in zip(slots, tokens, strict=True):
            for token in new:
                self.memory[slot] = 0.9 * self.memory[slot] + self.table[token]
        return self.memory[slots]


class ContinuousBatcher:
    """A server's loop: requests come at any time, each step serves everybody who has a slot.

        >>> model = ToyBatchModel(torch.eye(3).roll(1, dims=1), num_slots=2)  # after token t comes t + 1, modulo 3
        >>> batcher = ContinuousBatcher(model, num_slots=2)
        >>> batcher.add("a", prompt=[0], max_tokens=1)
        >>> batcher.add("b", prompt=[0, 1], max_tokens=2)
        >>> batcher.add("c", prompt=[2], max_tokens=1)
        >>> batcher.step()  # a and b have slots; a is done
        {'a': 1, 'b': 2}
        >>> batcher.step()  # c reads its prompt in a's slot while b decodes
        {'b': 0, 'c': 0}
        >>> batcher.step()
        {}

    A request's first step in a slot reads its prompt, each further one its latest token. The next token is the most
    likely one. `step` returns the new token of each request, in the order in which they joined.
    """

    def __init__(self, model: ToyBatchModel, num_slots: int) -> None:
        """Start with `num_slots` free slots, nobody waiting and nobody running."""
        raise NotImplementedError("__init__ is yours to write")

    def add(self, request_id: str, prompt: list[int], max_tokens: int) -> None:
        """Queue a request that wants `max_tokens` tokens, at least one."""
        raise NotImplementedError("add is yours to write")

    def step(self) -> dict[str, int]:
        """Admit who fits, run one step, let those go who are done. Returns the new token by request; {} if idle."""
        raise NotImplementedError("step is yours to write")
