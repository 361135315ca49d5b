"""Checks of exercise 11. The oracle hands out tokens one at a time: each goes to whoever is first in line for it."""

from __future__ import annotations

from itertools import product

from minillm.course.lab.checks import Case, check
from minillm.course.lab.exercises import Exercise, Task

EXERCISE = Exercise(
    slug="chunked_prefill",
    tasks=(
        Task(
            "prefill_first",
            "The old way",
            hints=(
                "One question decides who is served at all: is anybody behind?",
                "If somebody has more than 1 left, those with exactly 1 get nothing. Everybody else takes min(what is "
                "left, what the budget still has), oldest first.",
                "behind = any(n > 1 for n in remaining); for n in remaining: taken = 0 if behind and n == 1 else "
                "min(n, budget); scheduled.append(taken); budget -= taken",
            ),
        ),
        Task(
            "schedule",
            "Decodes first, chunks fill up",
            hints=(
                "Two passes over the running ones: first who has 1 left, then who has more. The result keeps the "
                "order of the list.",
                "sorted(range(len(running)), key=lambda i: running[i] > 1) puts decodes first and keeps ages in order. "
                "The waiting ones come last and stop at the first that gets nothing.",
                "scheduled = [0] * len(running); for i in that order: scheduled[i] = min(running[i], budget); "
                "budget -= scheduled[i]. Then for n in waiting[:max(0, max_num_seqs - len(running))]: stop at "
                "budget 0, else append min(n, budget) and take it off",
            ),
        ),
        Task(
            "choose_victims",
            "Who gives its memory back",
            hints=(
                "Who has lost least if its work is thrown away? And who must not starve?",
                "From the end of the list, one after the other, until enough is free, and no further.",
                "youngest = len(held) - 1; while num_free < needed and youngest >= 0: victims.append(youngest); "
                "num_free += held[youngest]; youngest -= 1",
            ),
        ),
        Task(
            "simulate",
            "A day at the server",
            hints=(
                "What changes for a sequence when its remaining tokens reach 0? It has a new token, which is not "
                "computed yet.",
                "In each step: who has arrived, ask schedule, move the admitted ones to running, take off what was "
                "computed. At 0: one token less is wanted, and 1 remains. Who wants nothing more leaves.",
                "scheduled, admitted = schedule([remaining[i] for i in running], [remaining[i] for i in here], budget, "
                "max_num_seqs); running += here[:len(admitted)]; for i, n in zip(running, scheduled + admitted): "
                "row[i] = n; remaining[i] -= n; if it is 0: wanted[i] -= 1; remaining[i] = 1",
            ),
        ),
    ),
)


def handed_out(remaining: list[int], order: list[int], budget: int) -> list[int]:
    """One token at a time to the first in `order` who still wants one."""
    given = [0] * len(remaining)
    for _ in range(budget):
        hungry = [i for i in order if given[i] < remaining[i]]
        if hungry:
            given[hungry[0]] += 1
    return given


def prefill_first(remaining: list[int], budget: int) -> list[int]:
    """The oracle of the old way: those who may be served, oldest first."""
    behind = [i for i, count in enumerate(remaining) if count > 1]
    return handed_out(remaining, behind or list(range(len(remaining))), budget)


def mixed(running: list[int], waiting: list[int], budget: int, max_num_seqs: int) -> tuple[list[int], list[int]]:
    """The oracle of the new way: one line of people, in the order in which they are served."""
    places = len(running) + min(len(waiting), max(0, max_num_seqs - len(running)))
    everybody = (running + waiting)[:places]
    decodes = [i for i in range(len(running)) if running[i] == 1]
    others = [i for i in range(places) if i not in decodes]
    given = handed_out(everybody, decodes + others, budget)
    admitted = given[len(running) :]
    return given[: len(running)], [count for count in admitted if count > 0]


def sequences(case: Case, count: int) -> list[int]:
    """What remains of some sequences: about half of them decode."""
    return [1 if case.integer(0, 1) else case.integer(2, 9) for _ in range(count)]


def lived_through(
    prompts: list[int], outputs: list[int], arrivals: list[int], budget: int, max_num_seqs: int
) -> list[list[int]]:
    """The oracle of the simulation: for each request the tokens that are known and those that are computed."""
    known, computed = list(prompts), [0] * len(prompts)
    steps: list[list[int]] = []
    running: list[int] = []
    done = [False] * len(prompts)
    while not all(done):
        waiting = [i for i in range(len(prompts)) if arrivals[i] <= len(steps) and i not in running and not done[i]]
        left = [known[i] - computed[i] for i in running], [known[i] - computed[i] for i in waiting]
        scheduled, admitted = mixed(*left, budget, max_num_seqs)
        running += waiting[: len(admitted)]
        row = [0] * len(prompts)
        for i, count in zip(running, scheduled + admitted, strict=True):
            row[i] = count
            computed[i] += count
            if count and computed[i] == known[i]:
                known[i] += 1
            done[i] = known[i] == prompts[i] + outputs[i]
        running = [i for i in running if not done[i]]
        steps.append(row)
    return steps


@check("prefill_first", points=2)
def prompts_first(case: Case) -> None:
    """As long as anybody reads a prompt, nobody decodes"""
    for budget in (3, case.integer(5, 9), 40):
        remaining = [1, case.integer(2, 9), 1, case.integer(2, 9)]
        got = case.learner.schedule_prefill_first(remaining, budget)
        case.expect(got, prefill_first(remaining, budget), "those who are behind, oldest first, up to the budget")


@check("prefill_first", points=1)
def then_decodes(case: Case) -> None:
    """When nobody is behind, everybody decodes"""
    for count, budget in ((5, 8), (5, 3)):
        got = case.learner.schedule_prefill_first([1] * count, budget)
        case.expect(got, prefill_first([1] * count, budget), f"{count} decodes, a budget of {budget}")


@check("schedule", points=3)
def decodes_first(case: Case) -> None:
    """Decodes first, chunks fill what is left"""
    short, long = case.integer(2, 4), case.integer(5, 9)
    for (older, younger), budget in product(((long, short), (short, long)), (2, case.integer(6, 9), 14)):
        running = [older, 1, younger, 1, 1]
        got = case.learner.schedule(running, [], budget, 8)
        case.expect(got, mixed(running, [], budget, 8), "one token for each decode, then the oldest who is behind")


@check("schedule", points=2)
def who_waits_comes_last(case: Case) -> None:
    """Waiting sequences come in with what is left, strictly in order"""
    for budget in (5, 10, 40):
        running, waiting = [1, case.integer(2, 4)], [case.integer(4, 9), case.integer(2, 3), 4]
        got = case.learner.schedule(running, waiting, budget, 9)
        case.expect(got, mixed(running, waiting, budget, 9), "nobody is overtaken, however small")


@check("schedule", points=1)
def no_more_than_seats(case: Case) -> None:
    """At most max_num_seqs sequences run"""
    running, waiting = [1, 1, 1], [case.integer(2, 5) for _ in range(4)]
    for seats in (3, 4, 6):
        got = case.learner.schedule(running, waiting, 50, seats)
        case.expect(got, mixed(running, waiting, 50, seats), f"{seats} seats, 3 of which are taken")


@check("schedule", points=2, hidden=True)
def all_mixtures(case: Case) -> None:
    """Any mixture, any budget"""
    for _ in range(8):
        running, waiting = sequences(case, case.integer(0, 5)), sequences(case, case.integer(0, 5))
        budget, seats = case.integer(1, 20), len(running) + case.integer(0, 3)
        got = case.learner.schedule(running, waiting, budget, seats)
        case.expect(got, mixed(running, waiting, budget, seats), f"budget {budget}, {seats} seats")


@check("choose_victims", points=2)
def youngest_first(case: Case) -> None:
    """The youngest give back, and no more of them than needed"""
    held = [case.integer(1, 5) for _ in range(6)]
    for needed in range(2, sum(held) + 2, 3):
        victims, free = list[int](), 1
        for i in reversed(range(6)):
            if free < needed:
                victims, free = [*victims, i], free + held[i]
        got = case.learner.choose_victims(held, needed, num_free=1)
        case.expect(got, victims, f"{held} blocks held, 1 free, {needed} needed")


@check("choose_victims", points=1, hidden=True)
def nobody_is_left(case: Case) -> None:
    """Nobody holds anything, or nobody needs anything"""
    case.expect(case.learner.choose_victims([], 4, 1), [], "nobody to choose from")
    case.expect(case.learner.choose_victims([3, 2], 9, 1), [1, 0], "everybody, and it is still not enough")
    case.expect(case.learner.choose_victims([3, 2], 4, 4), [], "enough is free already")


@check("simulate", points=3)
def a_long_prompt_arrives(case: Case) -> None:
    """Chunks of a long prompt beside those who decode"""
    prompts, outputs = [2, 3, case.integer(15, 25)], [8, 6, 2]
    budget = case.integer(5, 7)
    got = case.learner.simulate(prompts, outputs, arrivals=[0, 0, 2], budget=budget, max_num_seqs=4)
    expected = lived_through(prompts, outputs, [0, 0, 2], budget, 4)
    case.expect(got, expected, f"prompts {prompts}, outputs {outputs}, budget {budget}: tokens by step and request")


@check("simulate", points=1)
def one_token_answers(case: Case) -> None:
    """The first token comes out of the last chunk of the prompt"""
    prompts = [case.integer(3, 9), case.integer(3, 9)]
    got = case.learner.simulate(prompts, outputs=[1, 1], arrivals=[0, 0], budget=4, max_num_seqs=2)
    case.expect(got, lived_through(prompts, [1, 1], [0, 0], 4, 2), f"prompts {prompts}: no step of decode is needed")


@check("simulate", points=2, hidden=True)
def a_busy_day(case: Case) -> None:
    """Many requests, few seats, and quiet hours"""
    count = 8
    prompts, outputs = case.randint(1, 12, count).tolist(), case.randint(1, 6, count).tolist()
    arrivals = sorted(case.randint(0, 20, count - 1).tolist()) + [60]
    got = case.learner.simulate(prompts, outputs, arrivals, budget=6, max_num_seqs=3)
    case.expect(got, lived_through(prompts, outputs, arrivals, 6, 3), "tokens by step and request")
