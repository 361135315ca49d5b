"""Checks of exercise 04. The oracle is plain Python: lists, sorted by probability, and sums in float64."""

from __future__ import annotations

import math

import torch

from minillm.course.lab.checks import Case, check
from minillm.course.lab.exercises import Exercise, Task

EXERCISE = Exercise(
    slug="sampling",
    tasks=(
        Task(
            "temperature",
            "Logits become probabilities",
            hints=(
                "Is it the logits or the probabilities that are divided? What happens at 0?",
                "softmax(logits / temperature). Temperature 0 is its limit: 1 for the largest logit, 0 for all others.",
                "if temperature == 0: probs = torch.zeros_like(logits); probs[logits.argmax()] = 1.0; return probs. "
                "Else return torch.softmax(logits.float() / temperature, dim=-1).",
            ),
        ),
        Task(
            "top_k",
            "Keep the k most likely",
            hints=(
                "What remains has to sum to 1 again. What does k = 0 mean?",
                "A threshold (probs >= the k-th largest) keeps too many when several are equal. Use the order instead.",
                "order = probs.sort(descending=True, stable=True).indices; kept = torch.zeros_like(probs); "
                "kept[order[:k]] = probs[order[:k]]; return kept / kept.sum()",
            ),
        ),
        Task(
            "top_p",
            "Keep a nucleus",
            hints=(
                "Which sum decides whether a token stays: the one up to it, or the one before it?",
                "Sort, sum up, and drop a token if the mass *before* it has reached p. Then back into the old order.",
                "ranked, order = probs.sort(descending=True, stable=True); before = ranked.cumsum(0) - ranked; "
                "kept = torch.zeros_like(probs); kept[order] = ranked * (before < p); return kept / kept.sum()",
            ),
        ),
        Task(
            "min_p",
            "Keep what is not far behind",
            hints=(
                "The bar is not p itself. Relative to what?",
                "Keep the tokens with probs >= p * probs.max(), and make the rest 0.",
                "kept = probs * (probs >= p * probs.max()); return kept / kept.sum()",
            ),
        ),
        Task(
            "sample",
            "Draw",
            hints=(
                "Lay the tokens side by side on a line from 0 to 1. Which one lies above u?",
                "The running sums are the right ends. The first that is larger than u, not equal: at u = 0 a first "
                "token without probability must not be hit.",
                "sums = probs.double().cumsum(0); return int(torch.searchsorted(sums, u * sums[-1], right=True))",
            ),
        ),
    ),
    banned_operations=("multinomial", "Categorical"),
)


def distribution(case: Case, size: int) -> torch.Tensor:
    """Probabilities of `size` tokens, from clear favourites to unlikely ones, in any order."""
    return (2 * case.randn(size)).softmax(-1)


def renormalised(probs: torch.Tensor, kept: set[int]) -> torch.Tensor:
    """Only these tokens, so that they sum to 1."""
    total = sum(float(probs[i]) for i in kept)
    return torch.tensor([float(p) / total if i in kept else 0.0 for i, p in enumerate(probs)])


def ranking(probs: torch.Tensor) -> list[int]:
    """Tokens, the most likely first; of equals the earlier."""
    return sorted(range(len(probs)), key=lambda i: -float(probs[i]))


def nucleus(probs: torch.Tensor, p: float) -> set[int]:
    """The fewest most likely tokens that reach p together."""
    kept, mass = set[int](), 0.0
    for token in ranking(probs):
        if mass >= p:
            break
        kept.add(token)
        mass += float(probs[token])
    return kept


@check("temperature", points=2)
def temperatures(case: Case) -> None:
    """Below 1 the likely gain, above 1 the unlikely"""
    logits = 2 * case.randn(case.integer(6, 9))
    for temperature in (1.0, 0.5, 2.5):
        powers = [math.exp(float(x) / temperature) for x in logits]
        expected = torch.tensor([power / sum(powers) for power in powers])
        got = case.learner.apply_temperature(logits, temperature)
        case.expect(got, expected, f"exp(logit / {temperature}) over their sum")


@check("temperature", points=1)
def temperature_zero(case: Case) -> None:
    """At 0 the largest logit takes all"""
    logits = case.randn(6)
    logits[2] = logits[4] = logits.max() + 1
    expected = torch.tensor([0.0, 0, 1, 0, 0, 0])
    case.expect(case.learner.apply_temperature(logits, 0.0), expected, "the first of the largest, and no division by 0")


@check("temperature", points=1, hidden=True)
def half_precision(case: Case) -> None:
    """Logits in bfloat16 still become float32 probabilities"""
    logits = case.randn(7).bfloat16()
    expected = logits.double().softmax(-1).float()
    case.expect(case.learner.apply_temperature(logits, 1.0), expected, "computed in float32", atol=1e-6)


@check("top_k", points=2)
def the_likeliest(case: Case) -> None:
    """k tokens remain and sum to 1"""
    probs = distribution(case, case.integer(7, 9))
    for k in (1, case.integer(2, 5), len(probs)):
        expected = renormalised(probs, set(ranking(probs)[:k]))
        case.expect(case.learner.top_k(probs, k), expected, f"the {k} most likely of {len(probs)}, renormalised")


@check("top_k", points=1)
def no_limit(case: Case) -> None:
    """k = 0 keeps all"""
    probs = distribution(case, 6)
    case.expect(case.learner.top_k(probs, 0), probs, "0 switches the limit off")


@check("top_k", points=1, hidden=True)
def equals(case: Case) -> None:
    """Of equally likely tokens exactly k remain"""
    probs = torch.tensor([0.1, 0.2, 0.2, 0.2, 0.2, 0.1])
    case.expect(case.learner.top_k(probs, 2), torch.tensor([0, 0.5, 0.5, 0, 0, 0]), "the earlier ones go first")


@check("top_p", points=3)
def the_nucleus(case: Case) -> None:
    """The fewest likely tokens that reach p"""
    probs = distribution(case, case.integer(7, 9))
    masses = probs.double().sort(descending=True).values.cumsum(0)
    for share in (0.5, 0.9):
        count = int((masses < share).sum())
        p = float(masses[count - 1] if count else 0) / 2 + float(masses[count]) / 2  # between two sums: no rounding
        expected = renormalised(probs, nucleus(probs, p))
        case.expect(case.learner.top_p(probs, p), expected, "the token that crosses p is in; those behind it are out")


@check("top_p", points=1)
def a_single_favourite(case: Case) -> None:
    """A token that is likelier than p stays, alone"""
    probs = torch.tensor([0.05, 0.8, 0.15])
    case.expect(case.learner.top_p(probs, 0.3), torch.tensor([0.0, 1.0, 0.0]), "at least one token always remains")


@check("top_p", points=1, hidden=True)
def all_of_it(case: Case) -> None:
    """p = 1 keeps all"""
    probs = distribution(case, 12)
    case.expect(case.learner.top_p(probs, 1.0), probs, "1 switches the cut off, whatever rounding does to the sum")


@check("min_p", points=2)
def a_bar_that_moves(case: Case) -> None:
    """The bar follows the largest probability"""
    for spread in (0.3, 3.0):
        probs = (spread * case.randn(8)).softmax(-1)
        p = 0.31
        kept = {i for i, x in enumerate(probs) if float(x) >= p * float(probs.max())}
        case.expect(case.learner.min_p(probs, p), renormalised(probs, kept), f"at least {p} times the largest")


@check("min_p", points=1, hidden=True)
def no_bar(case: Case) -> None:
    """p = 0 keeps all"""
    probs = distribution(case, 6)
    case.expect(case.learner.min_p(probs, 0.0), probs, "0 switches the cut off")


@check("sample", points=3)
def where_u_points(case: Case) -> None:
    """The token whose stretch of the line u lies in"""
    probs = distribution(case, case.integer(6, 9))
    ends = [math.fsum(map(float, probs[: i + 1])) for i in range(len(probs))]
    for token, end in enumerate(ends):
        u = end - float(probs[token]) / 2
        case.expect(case.learner.sample(probs, u), token, f"u lies in the middle of token {token}'s stretch")


@check("sample", points=1)
def impossible_tokens(case: Case) -> None:
    """A token without probability is never drawn"""
    probs = torch.tensor([0.0, 0.5, 0.0, 0.0, 0.5, 0.0])
    for u, token in ((0.0, 1), (0.25, 1), (0.5, 4), (0.999999, 4)):
        case.expect(case.learner.sample(probs, u), token, f"u = {u}")


@check("sample", points=1, hidden=True)
def sums_below_one(case: Case) -> None:
    """Rounding leaves no gap at the end of the line"""
    probs = torch.full((3,), 0.333)
    case.expect(case.learner.sample(probs, 0.9999), 2, "the last sum is 0.999, and u is a share of that")
