"""Checks of exercise 08. The oracle plays the clock: step by step it asks who may take part."""

from __future__ import annotations

import torch

from minillm.course.lab.checks import Case, check
from minillm.course.lab.exercises import Exercise, Task

EXERCISE = Exercise(
    slug="batching",
    tasks=(
        Task(
            "static",
            "A batch at a time",
            hints=(
                "How many steps does a batch last? Who takes part in its last one?",
                "Cut the requests into groups of num_slots. A group lasts as long as its longest request; in its step "
                "number s those with lengths[i] > s take part.",
                "for first in range(0, len(lengths), num_slots): batch = range(first, min(first + num_slots, "
                "len(lengths))); for s in range(max(lengths[i] for i in batch)): steps.append([i for i in batch if "
                "lengths[i] > s])",
            ),
        ),
        Task(
            "continuous",
            "Let them in as soon as there is room",
            hints=(
                "In which order do admission, the step itself and leaving happen? The docstring says it.",
                "Keep a list `running`. The number of the next step is len(steps), so whoever has arrivals[i] <= "
                "len(steps) is there.",
                "while waiting or running: admit from the left while there is room and the first has arrived; "
                "steps.append(list(running)); count down; running = those with something left",
            ),
        ),
        Task(
            "occupancy",
            "How full the machine was",
            hints=(
                "What is the most that these steps could have brought?",
                "Tokens that came, over slots that there were: num_slots in every step, also in an empty one.",
                "return sum(len(step) for step in steps) / (len(steps) * num_slots)",
            ),
        ),
        Task(
            "server",
            "The loop of a server",
            hints=(
                "What must be known of a running request? Its slot, what it has not read, how many tokens are left.",
                "A step: admit (clear the slot first: somebody's memory is still in it), read all unread tokens of all "
                "who have a slot in one call, take the argmax of each row, and let go who is done.",
                "logits = model.read(list(slots.values()), [unread[r] for r in slots]); tokens = dict(zip(slots, "
                "logits.argmax(-1).tolist())); then for each: unread[r] = [token]; left[r] -= 1; at 0 give the slot "
                "back",
            ),
        ),
    ),
)


VOCAB = 200  # of the toy model


def lengths_of(case: Case, count: int) -> list[int]:
    """Answers of one to seven tokens."""
    return case.randint(1, 8, count).tolist()


def played(lengths: list[int], arrivals: list[int], num_slots: int) -> list[list[int]]:
    """The oracle: in each step the oldest requests that are there and not done, as many as there are slots.

    Whoever is in stays in, because whoever is older was in before.
    """
    left, steps = list(lengths), []
    while any(left):
        present = [i for i in range(len(left)) if left[i] and arrivals[i] <= len(steps)][:num_slots]
        for i in present:
            left[i] -= 1
        steps.append(present)
    return steps


def alone(table: torch.Tensor, prompt: list[int], max_tokens: int) -> list[int]:
    """What a request would get from the toy model if it were the only one."""
    memory, unread, said = torch.zeros(table.shape[1]), prompt, []
    for _ in range(max_tokens):
        for token in unread:
            memory = 0.9 * memory + table[token]
        unread = [int(memory.argmax())]
        said += unread
    return said


@check("static", points=2)
def batch_by_batch(case: Case) -> None:
    """The next batch begins when the longest request of this one is done"""
    lengths, slots = lengths_of(case, 8), 3
    expected = []
    for first in range(0, 8, slots):
        group = list(range(first, min(first + slots, 8)))
        for step in range(max(lengths[i] for i in group)):
            expected.append([i for i in group if lengths[i] > step])
    case.expect(case.learner.static_schedule(lengths, slots), expected, f"lengths {lengths}, {slots} at a time")


@check("static", points=1, hidden=True)
def fewer_than_slots(case: Case) -> None:
    """More slots than requests, and none at all"""
    case.expect(case.learner.static_schedule([2, 1], 5), [[0, 1], [0]], "one batch that is not full")
    case.expect(case.learner.static_schedule([], 5), [], "nobody came")


@check("continuous", points=3)
def slots_are_filled_at_once(case: Case) -> None:
    """A free slot is taken in the very next step"""
    lengths, slots = lengths_of(case, 9), case.integer(2, 3)
    got = case.learner.continuous_schedule(lengths, arrivals=[0] * 9, num_slots=slots)
    case.expect(got, played(lengths, [0] * 9, slots), f"lengths {lengths}, all there from the beginning")


@check("continuous", points=2)
def nobody_comes_early(case: Case) -> None:
    """Nobody is served before arriving, and quiet steps pass"""
    lengths = lengths_of(case, 6)
    arrivals = [1, 2, 2, 9, 30, 31]
    got = case.learner.continuous_schedule(lengths, arrivals, num_slots=2)
    case.expect(got, played(lengths, arrivals, 2), f"lengths {lengths}, arrivals {arrivals}")


@check("continuous", points=1, hidden=True)
def as_long_as_each_wants(case: Case) -> None:
    """Everybody gets as many tokens as wanted, in order of arrival"""
    lengths, arrivals = lengths_of(case, 12), sorted(case.randint(0, 12, 12).tolist())
    for slots in (1, 12):
        got = case.learner.continuous_schedule(lengths, arrivals, num_slots=slots)
        case.expect(got, played(lengths, arrivals, slots), f"{slots} slots, lengths {lengths}, arrivals {arrivals}")


@check("occupancy", points=1)
def share_of_slots(case: Case) -> None:
    """Tokens that came, over slots that were there"""
    steps = [list(range(case.integer(0, 4))) for _ in range(6)] + [[]]
    expected = sum(map(len, steps)) / (7 * 5)
    case.expect(case.learner.occupancy(steps, num_slots=5), expected, "empty steps count, too", rtol=1e-9)


def server(case: Case, num_slots: int):
    """The toy model and the learner's loop over it."""
    table = case.randn(VOCAB, VOCAB)  # wide, so that the likeliest token depends on more than the latest one
    model = case.given.ToyBatchModel(table, num_slots)
    return table, case.learner.ContinuousBatcher(model, num_slots)


@check("server", points=3)
def tokens_as_if_alone(case: Case) -> None:
    """Each request gets the tokens that it would get alone"""
    table, batcher = server(case, 2)
    requests = {
        name: (case.randint(0, VOCAB, case.integer(2, 5)).tolist(), length)
        for name, length in zip("abcdef", (3, 1, 14, 2, 12, 9), strict=True)
    }
    for name, (prompt, count) in requests.items():
        batcher.add(name, prompt, count)
    said = {name: alone(table, *request) for name, request in requests.items()}
    members = played([count for _, count in requests.values()], [0] * 6, 2)
    seen = dict.fromkeys(requests, 0)
    for step in members:
        expected = {}
        for name in ("abcdef"[i] for i in step):
            expected[name] = said[name][seen[name]]
            seen[name] += 1
        case.expect(batcher.step(), expected, "a slot's memory belongs to whoever is in it now")
    case.expect(batcher.step(), {}, "all are done")


@check("server", points=2, hidden=True)
def requests_come_at_any_time(case: Case) -> None:
    """Idle steps, then somebody comes, then somebody else"""
    table, batcher = server(case, 2)
    case.expect(batcher.step(), {}, "nobody is there")
    first, second = [1, 2], [3]
    batcher.add("x", first, 3)
    one, two = alone(table, first, 3), alone(table, second, 2)
    case.expect(batcher.step(), {"x": one[0]}, "x alone")
    batcher.add("y", second, 2)
    case.expect(batcher.step(), {"x": one[1], "y": two[0]}, "y reads its prompt while x decodes")
    case.expect(batcher.step(), {"x": one[2], "y": two[1]}, "both decode")
    batcher.add("z", first, 1)
    case.expect(batcher.step(), {"z": one[0]}, "the same prompt as x, in a slot that was used before")
    case.expect(batcher.step(), {}, "all are done")
