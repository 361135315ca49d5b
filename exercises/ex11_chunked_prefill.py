"""Exercise 11 · Chunked prefill: who waits when a long prompt arrives?

A long prompt read in one go makes everybody else wait for it. You write the scheduler that avoids this: a *budget* of
tokens per step, given first to those who decode, and what is left to pieces of prompts. And you decide who has to give
its memory back when blocks run out.

A sequence is described by `remaining`: how many of its tokens are not computed yet. 1 means that it decodes: only its
newest token is missing. More means that it still reads its prompt. Lists begin with the oldest sequence.

Lesson: 11_chunked_prefill · 60 minutes · difficulty ●●●○○
"""

from __future__ import annotations


def schedule_prefill_first(remaining: list[int], budget: int) -> list[int]:
    """The old way: how many tokens of each sequence the next step computes, if prompts go first.

    As long as anybody is behind (remaining > 1), only they are served, oldest first, each with as much as the budget
    has left. Those who decode wait until nobody is behind; then they all get their token, as far as the budget goes.

    >>> schedule_prefill_first([1, 10, 1], budget=8)
    [0, 8, 0]
    >>> schedule_prefill_first([1, 1, 1], budget=2)
    [1, 1, 0]
    """
    raise NotImplementedError("schedule_prefill_first is yours to write")


def schedule(running: list[int], waiting: list[int], budget: int, max_num_seqs: int) -> tuple[list[int], list[int]]:
    """How many tokens of each running sequence the next step computes, and of each waiting one that it admits.

    `running` and `waiting` hold what remains of each sequence. Spend the budget in this order:

    1. One token for each running sequence that decodes, oldest first: nobody's answer stalls.
    2. Then the running ones that are behind, oldest first, each as much as is left: chunks fill the budget.
    3. Then waiting ones, strictly in order, while there is budget left and fewer than `max_num_seqs` sequences run.
       The second list ends with the last one that is admitted.

    >>> schedule(running=[1, 10, 1], waiting=[5], budget=8, max_num_seqs=4)
    ([1, 6, 1], [])
    >>> schedule(running=[1, 3, 1], waiting=[5, 5], budget=8, max_num_seqs=4)
    ([1, 3, 1], [3])
    """
    raise NotImplementedError("schedule is yours to write")


def choose_victims(held: list[int], needed: int, num_free: int) -> list[int]:
    """Who gives its blocks back, so that `needed` blocks are free: indices, in the order in which they are chosen.

    `held[i]` is the number of blocks of running sequence i, oldest first. The youngest go first, no more of them than
    necessary: whoever has waited longest gets on, and so everybody does in the end. A victim keeps its tokens; its KV
    is computed again later.

    >>> choose_victims([4, 2, 3], needed=4, num_free=1)
    [2]
    >>> choose_victims([4, 2, 3], needed=5, num_free=1)
    [2, 1]
    >>> choose_victims([4, 2, 3], needed=1, num_free=1)
    []
    """
    raise NotImplementedError("choose_victims is yours to write")


def simulate(
    prompts: list[int], outputs: list[int], arrivals: list[int], budget: int, max_num_seqs: int
) -> list[list[int]]:
    """Serve requests with your `schedule` until all are done; how many tokens each request computes in each step.

    Request i arrives before step `arrivals[i]` (ascending), has `prompts[i]` tokens and wants `outputs[i]` new ones. In
    a step, whoever computes the last of its tokens gets a new one: if it has all it wants it leaves, else that token is
    what remains. A chunk in the middle of a prompt brings no token. Row s holds one number per request: its tokens in
    step s, 0 while it waits or is done.

    >>> simulate(prompts=[2, 6], outputs=[3, 1], arrivals=[0, 1], budget=4, max_num_seqs=2)
    [[2, 0], [1, 3], [1, 3]]
    """
    raise NotImplementedError("simulate is yours to write")
