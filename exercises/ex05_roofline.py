"""Exercise 05 · Roofline: what is the machine waiting for?

You predict, from the shape of a model alone, how much a step computes and how much it reads, and so how fast any
machine could at best be. With these closed forms you can tell before you run anything whether a step waits for
arithmetic or for memory. A multiply-add counts as 2 FLOPs; only matrix products count.

A *step* is a list of (q_len, kv_len), one pair per sequence: q_len new tokens, the last of kv_len tokens. A prefill of
100 tokens is `[(100, 100)]`, a decode step of two sequences `[(1, 101), (1, 51)]`.

Lesson: 05_roofline · 45 minutes · difficulty ●●●○○
"""

from __future__ import annotations

from typing import TypedDict


class Shape(TypedDict):
    """The shape of a decoder. Given."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


def layer_parameters(shape: Shape) -> int:
    """Weights in the matrices of one layer. Given: q and out, k and v, and the three matrices of the MLP."""
    attention = shape["hidden"] * shape["head_dim"] * (2 * shape["heads"] + 2 * shape["kv_heads"])
    mlp = 3 * shape["hidden"] * shape["intermediate"]
    return attention + mlp


def head_parameters(shape: Shape) -> int:
    """Weights of the last matrix, from hidden state to logits. Given."""
    return shape["vocab"] * shape["hidden"]


def step_flops(shape: Shape, step: list[tuple[int, int]]) -> int:
    """FLOPs of a step: layers + attention + head.

    * Each new token multiplies with every weight of every layer: 2 FLOPs per weight.
    * Each (query, key) pair that the causal rule lets through costs 4 · heads · head_dim in each layer: 2 for the
      score, 2 for weighing the value. Query i of a sequence sees `kv_len - q_len + i + 1` keys, i from 0.
    * The head runs once per sequence, for its last token.

    >>> tiny = Shape(layers=1, hidden=2, intermediate=1, heads=1, kv_heads=1, head_dim=2, vocab=3)
    >>> layer_parameters(tiny), head_parameters(tiny)
    (22, 6)
    >>> step_flops(tiny, [(2, 2)])  # 2·2·22 layers, 3 pairs · 4·1·2 attention, 2·6 head
    124
    """
    raise NotImplementedError("step_flops is yours to write")


def step_bytes(shape: Shape, step: list[tuple[int, int]], element_bytes: int) -> int:
    """Bytes that a step moves between memory and processor: weights + KV read + KV written.

    * Every weight of the layers and of the head once, however many tokens share the step. That is why batching pays.
    * K and V of all `kv_len` tokens of each sequence are read, those of its `q_len` new ones are written: 2 numbers (K
      and V) per layer, key/value head and dimension. Sequences share weights, never KV. Query heads do not matter.

    >>> tiny = Shape(layers=1, hidden=2, intermediate=1, heads=1, kv_heads=1, head_dim=2, vocab=3)
    >>> step_bytes(tiny, [(1, 5)], element_bytes=2)  # 28 weights and 4·(5 + 1) numbers of KV, 2 bytes each
    104
    """
    raise NotImplementedError("step_bytes is yours to write")


def arithmetic_intensity(shape: Shape, step: list[tuple[int, int]], element_bytes: int) -> float:
    """FLOPs per byte of a step: how much is done with each byte that was fetched.

    >>> tiny = Shape(layers=1, hidden=2, intermediate=1, heads=1, kv_heads=1, head_dim=2, vocab=3)
    >>> arithmetic_intensity(tiny, [(1, 5)], element_bytes=2)  # (44 + 40 + 12) / 104
    0.9230769230769231
    """
    raise NotImplementedError("arithmetic_intensity is yours to write")


def step_time(flops: float, num_bytes: float, peak_flops: float, bandwidth: float) -> tuple[float, str]:
    """The least seconds a step can take on a machine, and what it waits for: "compute" or "bandwidth".

    Arithmetic (`peak_flops` per second) and memory (`bandwidth` in bytes per second) work at the same time, so the
    slower of the two decides. Where both take equally long, at the ridge of the roofline, say "compute".

    >>> step_time(flops=100, num_bytes=10, peak_flops=50, bandwidth=2)
    (5.0, 'bandwidth')
    >>> step_time(flops=1000, num_bytes=10, peak_flops=50, bandwidth=2)
    (20.0, 'compute')
    """
    raise NotImplementedError("step_time is yours to write")


def latency_bounds(
    shape: Shape, prompt_len: int, new_tokens: int, element_bytes: int, peak_flops: float, bandwidth: float
) -> tuple[float, float]:
    """The least TTFT and the least TPOT, in seconds, of one request alone on a machine.

    TTFT is the prefill of the prompt. TPOT is the mean over the `new_tokens - 1` decode steps, whose contexts are
    `prompt_len + 1` up to `prompt_len + new_tokens - 1`. `new_tokens` is at least 2.

    >>> tiny = Shape(layers=1, hidden=2, intermediate=1, heads=1, kv_heads=1, head_dim=2, vocab=3)
    >>> latency_bounds(tiny, prompt_len=2, new_tokens=3, element_bytes=2, peak_flops=1, bandwidth=1)
    (124.0, 92.0)
    """

    raise NotImplementedError("latency_bounds is yours to write")
