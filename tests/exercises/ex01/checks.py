"""Checks of exercise 01. The oracle reads the whole text again for each token, and takes times apart by hand."""

from __future__ import annotations

from itertools import pairwise

import torch

from minillm.course.lab.checks import Case, check
from minillm.course.lab.exercises import Exercise, Task

EXERCISE = Exercise(
    slug="two_phases",
    tasks=(
        Task(
            "generate",
            "The loop",
            hints=(
                "Which tokens has the model not read yet, when you want the next one? That is all that step needs.",
                "The first call reads the prompt. Each further call reads one token, in a list. The last new token is "
                "never read, because nobody asks what follows it.",
                "logits = step(prompt); tokens = [int(logits.argmax())]; while len(tokens) < max_tokens and tokens[-1] "
                "!= stop_token: logits = step([tokens[-1]]); tokens.append(int(logits.argmax()))",
            ),
        ),
        Task(
            "ttft",
            "How long nothing happens",
            hints=(
                "Between which two moments does the user see nothing?",
                "The clock starts when the request arrives, not at 0, and stops at the first token.",
                "return token_times[0] - arrival",
            ),
        ),
        Task(
            "tpot",
            "How long a decode step takes",
            hints=(
                "How many decode steps lie between the first and the last of n tokens?",
                "n - 1 gaps. With one token there is none: dividing by 0 says nothing, None says it.",
                "if len(token_times) < 2: return None; return (token_times[-1] - token_times[0]) / "
                "(len(token_times) - 1)",
            ),
        ),
        Task(
            "itl",
            "What a reader sees",
            hints=(
                "A gap lies between two tokens of one request. Between two requests there is none.",
                "itertools.pairwise gives neighbours. Collect the gaps of all requests in one list.",
                "[later - earlier for times in requests for earlier, later in pairwise(times)]",
            ),
        ),
    ),
)

VOCAB = 30


def tokens(case: Case, count: int) -> list[int]:
    """Token ids of the toy's vocabulary."""
    return case.randint(0, VOCAB, count).tolist()


def written(table: torch.Tensor, prompt: list[int], count: int) -> list[int]:
    """The oracle: the memory behind the whole text is made anew for each token, as a weighted sum."""
    text = list(prompt)
    for _ in range(count):
        weights = 0.9 ** torch.arange(len(text) - 1, -1, -1)
        text.append(int((weights[:, None] * table[text]).sum(0).argmax()))
    return text[len(prompt) :]


def times(case: Case, count: int) -> list[float]:
    """Moments in ascending order, seconds."""
    return (torch.rand(count, generator=case.generator, dtype=torch.float64) + 0.1).cumsum(0).tolist()


@check("generate", points=3)
def the_text(case: Case) -> None:
    """The most likely token, again and again, without the prompt"""
    table, prompt, count = case.randn(VOCAB, VOCAB), tokens(case, case.integer(2, 6)), case.integer(4, 9)
    got = case.learner.generate(case.given.ToyModel(table), prompt, count)
    case.expect(got, written(table, prompt, count), f"{count} tokens behind {prompt}")


@check("generate", points=2)
def what_each_step_reads(case: Case) -> None:
    """Prefill reads the prompt, each decode step one token, and nothing is read that nobody asks about"""
    model = case.given.ToyModel(case.randn(VOCAB, VOCAB))
    case.learner.generate(model, tokens(case, 5), 4)
    case.expect(model.calls, [5, 1, 1, 1], "4 new tokens: one prefill and 3 decode steps")


@check("generate", points=2)
def the_stop_token(case: Case) -> None:
    """The stop token ends the text, and is part of it"""
    table, prompt = case.randn(VOCAB, VOCAB), tokens(case, 3)
    whole = written(table, prompt, 12)
    stop = whole[4]
    model = case.given.ToyModel(table)
    text = whole[: whole.index(stop) + 1]
    case.expect(case.learner.generate(model, prompt, 12, stop), text, f"the stop token is {stop}")
    case.expect(model.calls, [3] + [1] * (len(text) - 1), "nothing is read behind the stop token")


@check("generate", points=1, hidden=True)
def the_shortest_text(case: Case) -> None:
    """One token takes a prefill and no decode step; a prompt may hold the stop token"""
    table, prompt = case.randn(VOCAB, VOCAB), tokens(case, 4)
    model = case.given.ToyModel(table)
    case.expect(case.learner.generate(model, prompt, 1), written(table, prompt, 1), "max_tokens is 1")
    case.expect(model.calls, [4], "the token came out of prefill")
    first, second = written(table, prompt, 2)
    stop = next(token for token in prompt + [VOCAB] if token not in (first, second))
    got = case.learner.generate(case.given.ToyModel(table), prompt, 2, stop)
    case.expect(got, [first, second], f"{stop} is the stop token, and it stands in the prompt at most")


@check("ttft", points=1)
def first_token(case: Case) -> None:
    """From the arrival to the first token"""
    arrival, *moments = times(case, 5)
    case.expect(
        case.learner.ttft(arrival, moments), moments[0] - arrival, f"arrived at {arrival:.3f}", rtol=1e-9, atol=0
    )


@check("tpot", points=2)
def mean_decode_step(case: Case) -> None:
    """The mean of the gaps"""
    moments = times(case, case.integer(3, 8))
    gaps = [b - a for a, b in pairwise(moments)]
    got = case.learner.tpot(moments)
    case.expect(got, sum(gaps) / len(gaps), f"{len(moments)} tokens, {len(gaps)} gaps", rtol=1e-9, atol=0)


@check("tpot", points=1, hidden=True)
def a_single_token(case: Case) -> None:
    """One token took no decode step"""
    case.expect(case.learner.tpot(times(case, 1)), None, "a single token has no time per output token")


@check("itl", points=2)
def all_gaps(case: Case) -> None:
    """Every gap within a request, none between two requests"""
    requests = [times(case, count) for count in (4, 1, 3)]
    gaps = [b - a for moments in requests for a, b in pairwise(moments)]
    case.expect(case.learner.itl(requests), gaps, "3 gaps, none, and 2", rtol=1e-9, atol=1e-12)


@check("itl", points=1, hidden=True)
def no_gaps(case: Case) -> None:
    """Requests of one token have no gaps"""
    case.expect(case.learner.itl([times(case, 1), times(case, 1)]), [], "two tokens, but of two requests")
    case.expect(case.learner.itl([]), [], "nobody came")
