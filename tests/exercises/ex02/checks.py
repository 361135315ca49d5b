"""Checks of exercise 02. The oracle goes pair by pair: for each query the keys that it may see, one after the other."""

from __future__ import annotations

import math

import torch

from minillm.course.lab.checks import Case, check
from minillm.course.lab.exercises import Exercise, Task

EXERCISE = Exercise(
    slug="attention",
    tasks=(
        Task(
            "mask",
            "Who sees whom",
            hints=(
                "At which position of the whole text does query 0 stand? It is 0 only if nothing came before.",
                "Query i stands at kv_len - q_len + i. Compare a column of positions with a row of keys.",
                "position = torch.arange(kv_len - q_len, kv_len)[:, None]; key = torch.arange(kv_len); "
                "mask = key <= position; with a window also key > position - sliding_window.",
            ),
        ),
        Task(
            "softmax",
            "Scores become weights",
            hints=(
                "exp(1000) is infinite. What may be taken off all scores of a row without changing the result?",
                "Subtract the row's maximum, but 0 where that is -inf: -inf - (-inf) is NaN. Divide by the sum, but by "
                "1 where that is 0.",
                "largest = scores.amax(-1, keepdim=True); weights = torch.exp(scores - "
                "largest.where(largest.isfinite(), 0.0)); total = weights.sum(-1, keepdim=True); "
                "return weights / total.where(total > 0, 1.0)",
            ),
        ),
        Task(
            "attention",
            "One head",
            hints=(
                "Three steps: a score for each pair, weights along the keys, a mean of the values by these weights.",
                "Hide scores before the softmax with masked_fill(~mask, -inf). Zeros put in afterwards would leave "
                "rows that do not sum to 1.",
                "scores = (q @ k.T).float() * scale; weights = softmax(scores.masked_fill(~mask, float('-inf'))); "
                "return weights.to(v.dtype) @ v",
            ),
        ),
        Task(
            "grouped",
            "Many query heads, few key/value heads",
            hints=(
                "How many query heads share a key/value head, and which ones? The docstring has an example.",
                "Query head h reads key/value head h // group, where group = heads // kv_heads. One mask serves all.",
                "outs = [attention(q[:, h], k[h // group], v[h // group], mask, scale) for h in range(heads)]; "
                "return torch.stack(outs, dim=1)",
            ),
        ),
    ),
    banned_operations=("softmax", "log_softmax", "scaled_dot_product_attention"),
)


def seen(q_len: int, kv_len: int, window: int | None = None) -> torch.Tensor:
    """The oracle's mask, entry by entry."""
    mask = torch.zeros(q_len, kv_len, dtype=torch.bool)
    for i in range(q_len):
        position = kv_len - q_len + i
        for j in range(position + 1):
            mask[i, j] = window is None or position - j < window
    return mask


def textbook(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """The oracle's attention of one head, query by query in float64, over the keys that it sees and no others."""
    out = torch.zeros(len(q), v.shape[1], dtype=torch.float64)
    for i, row in enumerate(mask):
        if row.any():
            scores = [math.exp(float(q[i].double() @ key.double()) * scale) for key in k[row]]
            out[i] = sum(score * value for score, value in zip(scores, v[row].double(), strict=True)) / sum(scores)
    return out.to(q.dtype)


def all_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """The oracle's attention of all heads."""
    group, mask = q.shape[1] // len(k), seen(len(q), k.shape[1], window)
    heads = [textbook(q[:, h], k[h // group], v[h // group], mask, scale) for h in range(q.shape[1])]
    return torch.stack(heads, dim=1)


@check("mask", points=2)
def whole_prompts_and_their_ends(case: Case) -> None:
    """A prompt, a chunk behind cached tokens, and a single token"""
    kv_len = case.integer(6, 9)
    for q_len in (kv_len, case.integer(2, kv_len - 2), 1):
        got = case.learner.causal_mask(q_len, kv_len)
        case.expect(
            got, seen(q_len, kv_len), f"the last {q_len} of {kv_len} tokens ask; each sees itself and all before"
        )


@check("mask", points=1)
def windows(case: Case) -> None:
    """A sliding window lets each query see the newest keys only, its own included"""
    q_len, kv_len = case.integer(3, 5), case.integer(7, 9)
    for window in (1, case.integer(2, 4), kv_len + 1):
        got = case.learner.causal_mask(q_len, kv_len, sliding_window=window)
        case.expect(got, seen(q_len, kv_len, window), f"{window} keys at most for each query, its own one of them")


@check("softmax", points=2)
def weights_sum_to_one(case: Case) -> None:
    """Each row becomes weights"""
    scores = 3 * case.randn(case.integer(2, 4), 3, case.integer(5, 7))
    expected = (scores.double().exp() / scores.double().exp().sum(-1, keepdim=True)).float()
    case.expect(case.learner.softmax(scores), expected, "exp of each score over the sum of its row")


@check("softmax", points=1)
def large_scores(case: Case) -> None:
    """Scores of a thousand, of either sign"""
    scores = case.randn(3, 5)
    expected = (scores.double().exp() / scores.double().exp().sum(-1, keepdim=True)).float()
    case.expect(case.learner.softmax(scores + 1000), expected, "only differences between scores count", atol=1e-3)
    case.expect(case.learner.softmax(scores - 1000), expected, "only differences between scores count", atol=1e-3)
    apart = scores + torch.tensor([[0.0], [500.0], [-500.0]])
    case.expect(case.learner.softmax(apart), expected, "only differences within a row count", atol=1e-3)


@check("softmax", points=1, hidden=True)
def hidden_scores(case: Case) -> None:
    """Scores of -inf get no weight, even if there are no others"""
    scores, hidden = case.randn(4, 6), torch.zeros(4, 6, dtype=torch.bool)
    hidden[0, 2:], hidden[1], hidden[2, 0] = True, True, True
    expected = torch.zeros(4, 6)
    for row in (0, 2, 3):
        weights = scores[row][~hidden[row]].double().exp()
        expected[row][~hidden[row]] = (weights / weights.sum()).float()
    got = case.learner.softmax(scores.masked_fill(hidden, float("-inf")))
    case.expect(got, expected, "hidden scores weigh 0; a row without any other is 0 throughout, not NaN")


@check("attention", points=3)
def one_head(case: Case) -> None:
    """A mean of the values that a query sees, by its scores"""
    q_len, kv_len, d = case.integer(3, 4), case.integer(6, 8), case.integer(5, 9)
    q, k, v = 2 * case.randn(q_len, d), case.randn(kv_len, d), case.randn(kv_len, d)
    mask = seen(q_len, kv_len)
    got = case.learner.attention(q, k, v, mask, scale=0.4)
    case.expect(got, textbook(q, k, v, mask, 0.4), "softmax(q kᵀ · scale) v over the keys that the mask lets through")


@check("attention", points=1, hidden=True)
def any_mask(case: Case) -> None:
    """The mask decides, whatever it hides; a query that sees nothing answers 0"""
    q, k, v = case.randn(5, 4), case.randn(7, 4), case.randn(7, 4)
    mask = case.randint(0, 2, 5, 7).bool()
    mask[2], mask[3] = False, True
    case.expect(case.learner.attention(q, k, v, mask, scale=0.5), textbook(q, k, v, mask, 0.5), "row 2 sees nothing")


@check("grouped", points=3)
def neighbours_share(case: Case) -> None:
    """Neighbouring query heads share a key/value head"""
    kv_heads, group, d = case.integer(2, 3), case.integer(2, 3), case.integer(3, 6)
    q_len, kv_len = case.integer(2, 4), case.integer(5, 8)
    q, k, v = case.randn(q_len, kv_heads * group, d), case.randn(kv_heads, kv_len, d), case.randn(kv_heads, kv_len, d)
    got = case.learner.grouped_attention(q, k, v, scale=d**-0.5)
    case.expect(got, all_heads(q, k, v, d**-0.5, None), f"{kv_heads * group} query heads, {kv_heads} key/value heads")


@check("grouped", points=2, hidden=True)
def prompts_decodes_and_windows(case: Case) -> None:
    """A whole prompt, a decode step, and a window, by the same function"""
    k, v = case.randn(2, 7, 4), case.randn(2, 7, 4)
    for q_len, window in ((7, None), (1, None), (3, 2)):
        q = case.randn(q_len, 4, 4)
        got = case.learner.grouped_attention(q, k, v, 0.5, sliding_window=window)
        case.expect(got, all_heads(q, k, v, 0.5, window), f"{q_len} queries, window {window}")


@check("grouped", points=1, hidden=True)
def what_is_hidden_changes_nothing(case: Case) -> None:
    """Other keys behind a query leave its output as it is"""
    q, k, v = case.randn(5, 2, 4), case.randn(1, 5, 4), case.randn(1, 5, 4)
    case.expect(case.learner.grouped_attention(q, k, v, 0.5), all_heads(q, k, v, 0.5, None), "the text as it is")
    k, v = torch.cat([k[:, :3], case.randn(1, 2, 4)], 1), torch.cat([v[:, :3], case.randn(1, 2, 4)], 1)
    case.expect(case.learner.grouped_attention(q, k, v, 0.5), all_heads(q, k, v, 0.5, None), "another end of the text")
