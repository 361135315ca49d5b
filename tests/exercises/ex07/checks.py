"""Checks of exercise 07, in Triton's interpreter. The oracle is written down row by row, in float64."""

from __future__ import annotations

import torch

from minillm.course.lab.checks import Case, check
from minillm.course.lab.exercises import ALLOWED, Exercise, Task

EXERCISE = Exercise(
    slug="gpu_kernels",
    tasks=(
        Task(
            "softmax",
            "A softmax, one program per row",
            hints=(
                "Where does row tl.program_id(0) begin, and which of the COLUMNS columns exist?",
                "Read with mask=column < num_columns and other=-inf: exp makes 0 of it. Write with the same mask.",
                'x = tl.load(x_ptr + row * num_columns + column, mask=exists, other=float("-inf")); weights = tl.exp(x '
                "- tl.max(x, axis=0)); tl.store(out_ptr + row * num_columns + column, weights / tl.sum(weights, "
                "axis=0), mask=exists)",
            ),
        ),
        Task(
            "attention",
            "Tiled attention",
            hints=(
                "It is `online_step` of exercise 06 in a loop over tiles of keys; one program has one tile of queries.",
                "Element (query, head, dim) of q lies at (query * HEADS + head) * D + dim; element (kv_head, key, dim) "
                "of k at (kv_head * kv_len + key) * D + dim. Mask queries behind q_len and keys behind kv_len.",
                "seen = (key[None, :] <= position[:, None]) & (key < kv_len)[None, :]; scores = tl.where(seen, "
                'tl.dot(q, tl.trans(k), input_precision="ieee"), float("-inf")); then new_m, rescale, weights, l, out '
                "as in exercise 06; at the end store out / l[:, None]",
            ),
        ),
        Task(
            "split",
            "Many programs for one query",
            hints=(
                "What changes if there is one query instead of a tile of them? m and l are single numbers.",
                "The loop runs from split * split_len to the smaller of (split + 1) * split_len and kv_len; keys from "
                "there on are masked. There is no causal rule: the newest token sees everything.",
                'scores = tl.where(key < end, tl.sum(q[None, :] * k, axis=1), float("-inf")); out = out * rescale + '
                "tl.sum(weights[:, None] * v, axis=0); store out / l at (split * HEADS + head) * D + dim, and "
                "m + tl.log(l) at split * HEADS + head",
            ),
        ),
    ),
    allowed=(*ALLOWED, "triton"),
    preload=("triton", "triton.language"),
)

LIMITS = {"seconds": 20.0, "memory_mb": 2048}


def heads(case: Case, q_len: int, kv_len: int, group: int, d: int = 16) -> tuple[torch.Tensor, ...]:
    """q `[q_len, 2 · group, d]`, k and v `[2, kv_len, d]`."""
    return case.randn(q_len, 2 * group, d), case.randn(2, kv_len, d), case.randn(2, kv_len, d)


def one_query(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle: one query, q `[heads, d]`, sees all keys `[kv_heads, keys, d]`. Output and log-sum-exp, by head."""
    group = len(q) // len(k)
    scores = [(k[h // group].double() @ q[h].double()) * scale for h in range(len(q))]
    outs = [s.softmax(0) @ v[h // group].double() for h, s in enumerate(scores)]
    return torch.stack(outs).float(), torch.stack([s.logsumexp(0) for s in scores]).float()


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Every query sees the keys up to its own position."""
    first = k.shape[1] - len(q) + 1
    return torch.stack([one_query(row, k[:, : first + i], v[:, : first + i], scale)[0] for i, row in enumerate(q)])


@check("softmax", points=2, **LIMITS)
def rows_of_any_length(case: Case) -> None:
    """Rows whose length is no power of two"""
    x = case.randn(3, case.integer(9, 13))
    case.expect(
        case.learner.softmax(x), x.softmax(-1), "each row sums to 1, and columns that do not exist weigh nothing"
    )


@check("softmax", points=1, hidden=True, **LIMITS)
def large_numbers(case: Case) -> None:
    """Numbers whose exp overflows, and rows of negative numbers"""
    x = case.randn(4, 6) * 200
    x[1] -= 1e3
    case.expect(case.learner.softmax(x), x.softmax(-1), "take off the maximum first")


@check("attention", points=3, **LIMITS)
def a_prompt(case: Case) -> None:
    """A whole prompt of several tiles, the last one not full"""
    q, k, v = heads(case, 21, 21, group=1)
    case.expect(case.learner.attention(q, k, v, 0.3), causal(q, k, v, 0.3), "21 queries, 21 keys, tiles of 16")


@check("attention", points=3, **LIMITS)
def a_chunk(case: Case) -> None:
    """Queries that are the last of many tokens, and groups that share a key/value head"""
    q, k, v = heads(case, 5, 39, group=case.integer(2, 3))
    case.expect(case.learner.attention(q, k, v, 0.3), causal(q, k, v, 0.3), "the last 5 of 39 tokens")


@check("attention", points=1, hidden=True, **LIMITS)
def large_scores(case: Case) -> None:
    """Scores that grow from tile to tile, and whose exp overflows"""
    q, k, v = heads(case, 2, 40, group=1)
    k = k * torch.linspace(1, 60, 40)[None, :, None]
    case.expect(case.learner.attention(q, k, v, 1.0), causal(q, k, v, 1.0), "what was summed so far is rescaled")


@check("split", points=3, **LIMITS)
def parts_of_the_keys(case: Case) -> None:
    """Each part has the output and the log-sum-exp of its own keys"""
    q, k, v = heads(case, 1, 50, group=2)
    splits = case.integer(2, 3)
    length = -(-50 // splits)
    outs, lses = zip(
        *(one_query(q[0], k[:, i : i + length], v[:, i : i + length], 0.3) for i in range(0, 50, length)), strict=True
    )
    got = case.learner.split_decode(q[0], k, v, 0.3, splits)
    case.expect(got[0], torch.stack(outs), f"{splits} parts of {length} keys, the last one shorter")
    case.expect(got[1], torch.stack(lses), "m + log l of each part")


@check("split", points=2, hidden=True, **LIMITS)
def parts_joined(case: Case) -> None:
    """The parts together are the whole, also when each has a single key"""
    q, k, v = heads(case, 1, 5, group=1)
    for splits in (1, 5):
        got = case.learner.split_decode(q[0], k, v, 0.3, splits)
        case.expect(got[2], one_query(q[0], k, v, 0.3)[0], f"5 keys in {splits} parts")
