"""Exercise 02 · Attention: what does a token see?

You write attention as the textbook has it, with the whole score matrix in memory: the mask, the softmax, one head, then
many query heads that share a few key/value heads. It is the definition that every faster version of this course must
agree with.

Shapes everywhere: q `[q_len, heads, d]`, k and v `[kv_heads, kv_len, d]`. The queries are the *last* `q_len` of
`kv_len` tokens: a whole prompt (`q_len == kv_len`), a decode step (`q_len == 1`) and everything between are one case.

Lesson: 02_attention · 45 minutes · difficulty ●●○○○
"""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(q_len: int, kv_len: int, sliding_window: int | None = None) -> Tensor:
    """Who sees whom: bool `[q_len, kv_len]`, True where query i may look at key j.

    Query i stands at position `kv_len - q_len + i` and sees the keys up to its own position: the triangle is aligned
    bottom-right. A `sliding_window` of W lets it see the W newest of them only, its own included.

    >>> causal_mask(2, 4).int()
    tensor([[1, 1, 1, 0],
            [1, 1, 1, 1]], dtype=torch.int32)
    >>> causal_mask(2, 4, sliding_window=2).int()
    tensor([[0, 1, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """
    raise NotImplementedError("causal_mask is yours to write")


def softmax(scores: Tensor) -> Tensor:
    """exp(x_j) / sum over j of exp(x_j), along the last dimension. Without `torch.softmax`.

    exp overflows above 88 in float32, so take the row's maximum off first: the result is the same. A score of -inf
    gets weight 0, and a row that is -inf throughout has no softmax: all its weights are 0, not NaN.

    >>> softmax(torch.tensor([[0.0, 0.0], [1000.0, float("-inf")]]))
    tensor([[0.5000, 0.5000],
            [1.0000, 0.0000]])
    """
    raise NotImplementedError("softmax is yours to write")


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """One head: softmax(q kᵀ · scale) v. q `[q_len, d]`, k and v `[kv_len, d]`, mask `[q_len, kv_len]` -> `[q_len, d]`.

    The scale, usually 1/√d, keeps scores from growing with the head size. Hidden scores become -inf *before* the
    softmax, so that the others share all of the weight.

    >>> q, k = torch.zeros(1, 2), torch.zeros(2, 2)  # all scores 0: both keys weigh the same
    >>> v = torch.tensor([[2.0, 0.0], [4.0, 8.0]])
    >>> attention(q, k, v, torch.tensor([[True, True]]), scale=1.0)
    tensor([[3., 4.]])
    >>> attention(q, k, v, torch.tensor([[True, False]]), scale=1.0)
    tensor([[2., 0.]])
    """
    raise NotImplementedError("attention is yours to write")


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, sliding_window: int | None = None) -> Tensor:
    """All heads, causal: q `[q_len, heads, d]`, k and v `[kv_heads, kv_len, d]` -> `[q_len, heads, d]`.

    heads is a multiple of kv_heads, and *neighbouring* query heads share a key/value head: with 4 query and 2
    key/value heads, queries 0 and 1 read keys 0, queries 2 and 3 read keys 1. That makes the KV cache half as large.

    >>> q = torch.zeros(1, 4, 1)
    >>> k, v = torch.zeros(2, 1, 1), torch.tensor([[[5.0]], [[7.0]]])  # one key: its value is the answer
    >>> grouped_attention(q, k, v, scale=1.0).flatten()
    tensor([5., 5., 7., 7.])
    """
    raise NotImplementedError("grouped_attention is yours to write")
