"""Checks of exercise 06. The oracle sees whole rows of scores at once, in float64."""

from __future__ import annotations

import torch

from minillm.course.lab.checks import Case, check
from minillm.course.lab.exercises import Exercise, Task

EXERCISE = Exercise(
    slug="flash_attention",
    tasks=(
        Task(
            "online_step",
            "Fold in one tile",
            hints=(
                "What was summed up so far was measured against the old maximum. What must happen to it when a larger "
                "one comes?",
                "Multiply l and out by exp(m - new m), and only then add what the tile brings. Where the new maximum "
                "is still -inf, subtract 0 instead of it.",
                "new_m = torch.maximum(m, scores.amax(-1)); base = new_m.where(new_m > NEG_INF, 0.0); r = "
                "torch.exp(m - base); w = torch.exp(scores - base[:, None]); return new_m, l * r + w.sum(-1), out * "
                "r[:, None] + w @ v",
            ),
        ),
        Task(
            "finish",
            "What it comes to",
            hints=(
                "out is a sum of values, each times its weight. What is the sum of the weights?",
                "out / l and m + log l. A row with l = 0 must give 0, not NaN: divide by 1 there.",
                "return out / l.where(l > 0, 1.0)[:, None], m + l.log()",
            ),
        ),
        Task(
            "tiled_attention",
            "Attention without the matrix",
            hints=(
                "For one tile of queries: which keys do they see at most, and in which tiles is the mask needed?",
                "Per head and tile of queries: m = -inf, l = 0, out = 0; for each tile of keys up to the last one that "
                "is seen: scores, hide what lies behind each query's position, online_step; then finish.",
                "position = torch.arange(first, first + rows)[:, None] with first = kv_len - q_len + start; for keys "
                "from 0 to first + rows in steps of tile: scores = (q * scale @ k[keys].T).masked_fill("
                "torch.arange(keys) > position, NEG_INF); m, l, out = online_step(m, l, out, scores, v[keys])",
            ),
        ),
        Task(
            "merge",
            "Join parts of the keys",
            hints=(
                "Part i is a mean over its own keys. With which weight does it enter the mean over all keys?",
                "Weights exp(lse_i) / sum of exp(lse_j), with the largest lse taken off first. The new log-sum-exp is "
                "the largest plus the log of that sum.",
                "largest = lses.amax(0); shares = torch.exp(lses - largest.where(largest > NEG_INF, 0.0)); total = "
                "shares.sum(0); weights = shares / total.where(total > 0, 1.0); return (weights[..., None] * "
                "outs).sum(0), largest + total.log()",
            ),
        ),
    ),
    banned_operations=("softmax", "log_softmax", "logsumexp", "scaled_dot_product_attention"),
)

NEG_INF = float("-inf")


def textbook(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of causal attention, query by query and head by head, in float64."""
    q_len, heads, _ = q.shape
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.zeros(q_len, heads, dtype=torch.float64)
    for i in range(q_len):
        seen = k.shape[1] - q_len + i + 1
        for head in range(heads):
            kv = head // (heads // len(k))
            scores = k[kv, :seen].double() @ q[i, head].double() * scale
            out[i, head] = scores.softmax(0) @ v[kv, :seen].double()
            lse[i, head] = scores.logsumexp(0)
    return out.to(q.dtype), lse.float()


def running(scores: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What (m, l, out) are after all of these scores `[rows, keys]`, computed at once."""
    scores, v = scores.double(), v.double()
    m = scores.amax(-1)
    weights = torch.exp(scores - m.where(m > NEG_INF, 0.0)[:, None])
    return m.float(), weights.sum(-1).float(), (weights @ v).float()


def heads_of(case: Case, q_len: int, kv_len: int, d: int) -> tuple[torch.Tensor, ...]:
    """Queries of four or six heads over two key/value heads, with scores that differ enough to matter."""
    q = 2 * case.randn(q_len, 2 * case.integer(2, 3), d)
    return q, case.randn(2, kv_len, d), case.randn(2, kv_len, d)


@check("online_step", points=3)
def tiles_one_after_the_other(case: Case) -> None:
    """After each tile, the running values are those of all keys so far"""
    rows, d = case.integer(2, 4), case.integer(3, 5)
    scores, v = 3 * case.randn(rows, 12), case.randn(12, d)
    m, l, out = torch.full((rows,), NEG_INF), torch.zeros(rows), torch.zeros(rows, d)  # noqa: E741
    for start in (0, 3, 8):
        end = {0: 3, 3: 8, 8: 12}[start]
        got = case.learner.online_step(m, l, out, scores[:, start:end], v[start:end])
        m, l, out = running(scores[:, :end], v[:end])  # noqa: E741
        case.expect(got[0], m, f"the largest score of keys 0 to {end - 1}")
        case.expect(got[1], l, "the sum of exp(score - m)")
        case.expect(got[2], out, "the sum of exp(score - m) · value, not divided by l yet")


@check("online_step", points=2)
def rising_and_falling(case: Case) -> None:
    """A maximum that comes late, and one that came early"""
    v = case.randn(6, 3)
    scores = torch.tensor([[0.0, 1, 2, 60, 50, 40], [60.0, 50, 40, 0, 1, 2]]) + case.randn(2, 6)
    state = running(scores[:, :3], v[:3])
    got = case.learner.online_step(*state, scores[:, 3:], v[3:])
    for i, expected in enumerate(running(scores, v)):
        case.expect(got[i], expected, "what was summed up against another maximum is rescaled")


@check("online_step", points=1, hidden=True)
def nothing_seen_yet(case: Case) -> None:
    """Tiles that are hidden entirely, before and after the first key"""
    v = case.randn(4, 3)
    empty = torch.full((2,), NEG_INF), torch.zeros(2), torch.zeros(2, 3)
    hidden = torch.full((2, 4), NEG_INF)
    got = case.learner.online_step(*empty, hidden, v)
    for i, expected in enumerate(empty):
        case.expect(got[i], expected, "nothing was seen: nothing changes, and nothing is NaN")
    state = running(case.randn(2, 4), v)
    got = case.learner.online_step(*state, hidden, v)
    for i, expected in enumerate(state):
        case.expect(got[i], expected, "a hidden tile changes nothing")


@check("finish", points=2)
def divided_once(case: Case) -> None:
    """The mean of the values, and the logarithm of the denominator"""
    scores, v = 2 * case.randn(3, 7), case.randn(7, 4)
    got = case.learner.finish(*running(scores, v))
    case.expect(got[0], (scores.double().softmax(-1) @ v.double()).float(), "softmax(scores) @ v")
    case.expect(got[1], scores.double().logsumexp(-1).float(), "log of the sum of exp(score)")


@check("finish", points=1, hidden=True)
def rows_without_keys(case: Case) -> None:
    """A row that saw no key"""
    m, l, out = torch.tensor([NEG_INF, 2.0]), torch.tensor([0.0, 1.0]), torch.zeros(2, 3)  # noqa: E741
    out[1] = case.randn(3)
    got = case.learner.finish(m, l, out)
    case.expect(got[0], out, "0 for the row without keys")
    case.expect(got[1], m, "-inf for the row without keys")


@check("tiled_attention", points=3)
def prompts(case: Case) -> None:
    """A whole prompt, in tiles that do not fit evenly"""
    n, tile = case.integer(11, 14), case.integer(4, 5)
    q, k, v = heads_of(case, n, n, 6)
    got = case.learner.tiled_attention(q, k, v, 0.4, tile)
    out, lse = textbook(q, k, v, 0.4)
    case.expect(got[0], out, f"{n} tokens in tiles of {tile}")
    case.expect(got[1], lse, "the log-sum-exp of each query and head")


@check("tiled_attention", points=2)
def chunks_and_decodes(case: Case) -> None:
    """Queries that are the last of a longer text"""
    for q_len, kv_len, tile in ((5, 13, 4), (1, 9, 4), (3, 3, 16)):
        q, k, v = heads_of(case, q_len, kv_len, 6)
        got = case.learner.tiled_attention(q, k, v, 0.4, tile)
        out, lse = textbook(q, k, v, 0.4)
        case.expect(got[0], out, f"the last {q_len} of {kv_len} tokens, tiles of {tile}")
        case.expect(got[1], lse, f"the last {q_len} of {kv_len} tokens, tiles of {tile}")


@check("tiled_attention", points=2)
def no_matrix(case: Case) -> None:
    """Nothing as large as all scores is ever made, and hidden tiles are not computed"""
    n, d, tile = 192, 8, 16
    q, k, v = case.randn(n, 1, d), case.randn(1, n, d), case.randn(1, n, d)
    counted = case.count(case.learner.tiled_attention, q, k, v, 0.4, tile)
    case.expect(counted["out"][0], textbook(q, k, v, 0.4)[0], "the same numbers as the textbook's")
    case.require(counted["largest"], at_most(n * d), "all scores of a head would be 192 · 192 numbers")
    tiles = (n // tile) * (n // tile + 1) // 2
    case.require(counted["flops"], at_most(4 * d * tile * tile * tiles), "tiles that nobody sees are left out")


@check("tiled_attention", points=1, hidden=True)
def half_precision(case: Case) -> None:
    """bfloat16 comes in and goes out; between, the sums are float32"""
    q, k, v = (x.bfloat16() for x in heads_of(case, 40, 40, 8))
    expected = textbook(q, k, v, 0.4)[0]
    case.expect(case.learner.tiled_attention(q, k, v, 0.4, 8)[0], expected, "rounded once", atol=4e-3, rtol=8e-3)


@check("merge", points=3)
def parts_of_the_keys(case: Case) -> None:
    """Attention over parts, joined, is attention over all"""
    scores, v = 4 * case.randn(3, 12), case.randn(12, 4)
    parts = [slice(0, 2), slice(2, 9), slice(9, 12)]
    outs = torch.stack([scores[:, p].softmax(-1) @ v[p] for p in parts])
    lses = torch.stack([scores[:, p].logsumexp(-1) for p in parts])
    got = case.learner.merge(outs, lses)
    case.expect(got[0], (scores.double().softmax(-1) @ v.double()).float(), "the mean over all keys")
    case.expect(got[1], scores.double().logsumexp(-1).float(), "the log-sum-exp over all keys")
    got = case.learner.merge(outs, lses + 200)
    case.expect(got[1], scores.double().logsumexp(-1).float() + 200, "exp(200) does not fit into float32", rtol=1e-5)
    case.expect(got[0], (scores.double().softmax(-1) @ v.double()).float(), "only differences count", atol=1e-3)


@check("merge", points=1, hidden=True)
def empty_parts(case: Case) -> None:
    """Parts without keys weigh nothing"""
    outs, lses = case.randn(3, 2, 4), case.randn(3, 2)
    outs[1], lses[1] = 0.0, NEG_INF
    lses[:, 1] = NEG_INF
    outs[:, 1] = 0.0
    weights = torch.stack([lses[0, 0], lses[2, 0]]).softmax(0)
    expected = torch.zeros(2, 4)
    expected[0] = weights[0] * outs[0, 0] + weights[1] * outs[2, 0]
    lse = torch.stack([torch.stack([lses[0, 0], lses[2, 0]]).logsumexp(0), torch.tensor(NEG_INF)])
    got = case.learner.merge(outs, lses)
    case.expect(got[0], expected, "row 1 has no keys in any part: 0")
    case.expect(got[1], lse, "row 1 has no keys in any part: -inf")


def at_most(limit: int):
    """Accepts numbers up to a limit."""
    return lambda got: None if isinstance(got, int) and got <= limit else f"expected at most {limit:,}, got {got:,}"
