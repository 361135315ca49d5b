"""Checks of exercise 13. The oracle of the guessing searches by hand; that of the checking adds up probabilities."""

from __future__ import annotations

import torch

from minillm.course.lab.checks import Case, check
from minillm.course.lab.exercises import Exercise, Task

EXERCISE = Exercise(
    slug="speculative_decoding",
    tasks=(
        Task(
            "ngram",
            "Guess by looking back",
            hints=(
                "Which of several earlier places do you take: of the longest match, and among these the latest?",
                "Lengths from long to short; for each, places from late to early. A place may overlap the end, but not "
                "be the end itself. Copy what follows one token at a time, so that you may copy your own guesses.",
                "for length in range(min(max_match, len(text) - 1), min_match - 1, -1): for start in range(len(text) - "
                "length - 1, -1, -1): if text[start:start + length] == text[-length:]: append text[start + length], "
                "text[start + length + 1], … to text, `count` times",
            ),
        ),
        Task(
            "greedy",
            "Check guesses, greedily",
            hints=(
                "What does the model say in the place of the first wrong draft? What about the places behind it?",
                "Walk along the drafts. At the first that differs, the answer is the model's choices up to and "
                "including that place.",
                "for place, draft in enumerate(drafts): if draft != choices[place]: return choices[:place + 1]. "
                "Otherwise return all choices.",
            ),
        ),
        Task(
            "accept",
            "Keep a guess with the right probability",
            hints=(
                "If the draft model proposes a token twice as often as the model would say it, how often may it stay?",
                "The ratio p(token) / q(token), and never more than 1.",
                "return min(1.0, float(p[token] / q[token]))",
            ),
        ),
        Task(
            "residual",
            "What makes up for it",
            hints=(
                "Which tokens come out too rarely if you only accept and reject?",
                "Those with p above q, by how much they are above. Negative differences count as 0, and the rest must "
                "sum to 1.",
                "more = (p - q).clamp(min=0); return more / more.sum() if more.sum() > 0 else p",
            ),
        ),
        Task(
            "rejection",
            "Check guesses that were drawn",
            hints=(
                "Each draft has its own distributions. What is the last row of p for?",
                "Walk along the drafts; accept if accept_u[i] < acceptance_probability. At the first rejection draw "
                "from the residual of that place and stop. If none is rejected, draw from the last row of p.",
                "for i, token in enumerate(drafts): if accept_u[i] >= acceptance_probability(p[i], q[i], token): "
                "return [*drafts[:i], draw(residual(p[i], q[i]), draw_u)]. At the end: [*drafts, draw(p[-1], draw_u)]",
            ),
        ),
    ),
)


def distributions(case: Case, rows: int, size: int) -> torch.Tensor:
    """Rows of probabilities, none of them even."""
    return (1.5 * case.randn(rows, size)).softmax(-1)


def looked_up(tokens: list[int], count: int, min_match: int, max_match: int) -> list[int]:
    """The oracle: all earlier places, with the length of the longest match that ends there; the best one goes on."""
    places = []
    for end in range(1, len(tokens)):  # a match ends before position `end`
        length = 0
        while length < min(end, max_match) and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        if length >= min_match:
            places.append((length, end))
    text = list(tokens)
    if places:
        _, end = max(places)
        for step in range(count):
            text.append(text[end + step])
    return text[len(tokens) :]


def point(probs: torch.Tensor, u: float) -> int:
    """The token on which u falls."""
    total = 0.0
    for token, p in enumerate(probs.double().tolist()):
        total += p
        if u * float(probs.double().sum()) < total:
            return token
    return len(probs) - 1


def drawn_from(case: Case, rows: torch.Tensor) -> list[int]:
    """One token of each row."""
    return [point(row, float(torch.rand(1, generator=case.generator))) for row in rows]


def left_over(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """What p has more of than q."""
    more = torch.tensor([max(a - b, 0.0) for a, b in zip(p.tolist(), q.tolist(), strict=True)])
    return more / more.sum()


@check("ngram", points=2)
def longest_and_latest(case: Case) -> None:
    """The longest match counts, and of several the latest"""
    for _ in range(6):
        tokens = case.randint(0, 3, case.integer(10, 24)).tolist()
        got = case.learner.propose_ngram(tokens, count=4)
        case.expect(got, looked_up(tokens, 4, 2, 8), f"what followed the longest earlier match in {tokens}")
    a, b, c, x, y, z = torch.randperm(50, generator=case.generator)[:6].tolist()
    text = [a, b, c, x, y, b, c, z, y, a, b, c]
    case.expect(case.learner.propose_ngram(text, 2), [x, y], "three tokens match; two match at a later place, too")
    text = [a, b, x, a, b, y, z, a, b]
    case.expect(case.learner.propose_ngram(text, 2), [y, z], "two places match equally well: the later one counts")


@check("ngram", points=1)
def no_match(case: Case) -> None:
    """No earlier place, no guess"""
    tokens = torch.randperm(20, generator=case.generator).tolist()
    case.expect(case.learner.propose_ngram(tokens, 3), [], "no token stands there twice")
    case.expect(case.learner.propose_ngram([*tokens, tokens[4]], 3), [], "one token in common is fewer than min_match")
    case.expect(case.learner.propose_ngram([*tokens, tokens[4]], 3, min_match=1), tokens[5:8], "min_match 1 takes it")


@check("ngram", points=2, hidden=True)
def repetitions_go_on(case: Case) -> None:
    """A repetition is continued beyond the end of the text"""
    period = case.integer(2, 4)
    unit = torch.randperm(9, generator=case.generator)[:period].tolist()
    tokens = [*case.randint(20, 30, 3).tolist(), *unit * 3]
    got = case.learner.propose_ngram(tokens, count=2 * period + 1)
    case.expect(got, (unit * 4)[: 2 * period + 1], f"{unit} again and again")
    far = [*unit, 40, 41, *case.randint(50, 60, 5).tolist(), *unit]
    case.expect(case.learner.propose_ngram(far, 2, max_match=2), looked_up(far, 2, 2, 2), "matches of two tokens")


@check("greedy", points=2)
def accepted_until_wrong(case: Case) -> None:
    """Drafts count up to the first that the model would not have said"""
    choices = case.randint(0, 50, 5).tolist()
    for wrong in range(4):
        drafts = [token if i < wrong else token + 1 for i, token in enumerate(choices[:4])]
        case.expect(case.learner.verify_greedy(drafts, choices), choices[: wrong + 1], f"draft {wrong} is wrong")
    drafts = [choices[0], choices[1] + 1, choices[2], choices[3]]
    case.expect(case.learner.verify_greedy(drafts, choices), choices[:2], "what is right behind a wrong draft is void")


@check("greedy", points=1)
def a_bonus(case: Case) -> None:
    """If all drafts are right, there is one token more"""
    choices = case.randint(0, 50, 4).tolist()
    case.expect(case.learner.verify_greedy(choices[:3], choices), choices, "three drafts and the bonus")
    case.expect(case.learner.verify_greedy([], choices[:1]), choices[:1], "nobody guessed: a plain decode step")


@check("accept", points=2)
def how_often_a_draft_stays(case: Case) -> None:
    """p over q, and at most 1"""
    p, q = distributions(case, 2, 8)
    for token in range(8):
        expected = min(1.0, float(p[token]) / float(q[token]))
        case.expect(case.learner.acceptance_probability(p, q, token), expected, "the share of q that p agrees with")


@check("residual", points=2)
def what_p_has_more(case: Case) -> None:
    """What is left of p when q is taken off"""
    p, q = distributions(case, 2, 9)
    case.expect(case.learner.residual(p, q), left_over(p, q), "only what p has more of than q, renormalised")


@check("residual", points=1, hidden=True)
def nothing_left(case: Case) -> None:
    """A draft model that is the model itself"""
    p = distributions(case, 1, 6)[0]
    case.expect(case.learner.residual(p, p.clone()), p, "nothing is left over, and 0 / 0 is no distribution")


@check("rejection", points=3)
def drafts_that_were_drawn(case: Case) -> None:
    """Accepted drafts, then one token of the model's"""
    for first_rejected in (0, 2, 3):
        p, q = distributions(case, 4, 7), distributions(case, 3, 7)
        drafts = drawn_from(case, q)
        ratios = [min(1.0, float(p[i][token] / q[i][token])) for i, token in enumerate(drafts)]
        if first_rejected < 3:  # so that a rejection is possible there
            row = int((q[first_rejected] - p[first_rejected]).argmax())
            drafts[first_rejected] = row
            ratios[first_rejected] = float(p[first_rejected][row] / q[first_rejected][row])
        us = [ratio * 0.5 if i != first_rejected else (1 + ratio) / 2 for i, ratio in enumerate(ratios)]
        last = p[3] if first_rejected == 3 else left_over(p[first_rejected], q[first_rejected])
        u = float(torch.rand(1, generator=case.generator))
        got = case.learner.rejection_sample(drafts, p, q, us, u)
        expected = [*drafts[:first_rejected], point(last, u)]
        case.expect(got, expected, f"{first_rejected} drafts are accepted, then one token is drawn")


@check("rejection", points=2)
def each_place_for_itself(case: Case) -> None:
    """A draft is judged by the distributions of its own place"""
    q, sure = torch.full((2, 4), 0.25), torch.tensor([0.1, 0.7, 0.1, 0.1])
    last = distributions(case, 1, 4)[0]
    got = case.learner.rejection_sample([1, 0], torch.stack([sure, q[0], last]), q, [0.9, 0.9], 0.5)
    case.expect(got, [1, 0, point(last, 0.5)], "in its place, draft 0 is as likely under p as under q")
    got = case.learner.rejection_sample([2, 0], torch.stack([q[0], sure, last]), q, [0.9, 0.9], 0.5)
    case.expect(got, [2, 1], "in its place, draft 0 is kept with a probability of 0.4")


@check("rejection", points=3, hidden=True)
def exactly_the_models_distribution(case: Case) -> None:
    """Over all drafts and all random numbers, the first token is distributed as p says"""
    size = 4
    p, q = distributions(case, 2, size), distributions(case, 1, size)
    grid = [(i + 0.5) / 40 for i in range(40)]
    for token in range(size):
        ratio = min(1.0, float(p[0][token] / q[0][token]))
        for u in grid[::5]:
            if abs(u - ratio) < 1e-3:
                continue
            expected = [token, point(p[1], 0.4)] if u < ratio else [point(left_over(p[0], q[0]), 0.4)]
            got = case.learner.rejection_sample([token], p, q, [u], 0.4)
            case.expect(got, expected, f"draft {token}, kept with probability {ratio:.3f}, u = {u:.3f}")
