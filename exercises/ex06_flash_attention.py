"""Exercise 06 · FlashAttention: can attention avoid the N×N matrix?

You write the online softmax, and with it attention that looks at one small tile of scores at a time: the same numbers
as the textbook's, no matrix of all scores in memory. Then you join attention over separate parts of the keys, which is
how one long context is shared among many processors.

Shapes as in exercise 02: q `[q_len, heads, d]`, k and v `[kv_heads, kv_len, d]`, bottom-right causal.

Lesson: 06_flash_attention · 60 minutes · difficulty ●●●●○
"""

# ruff: noqa: E741
from __future__ import annotations

import torch
from torch import Tensor

NEG_INF = float("-inf")


def online_step(m: Tensor, l: Tensor, out: Tensor, scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fold one tile of keys into the running softmax; returns the new (m, l, out).

    m `[rows]`: largest score so far; l `[rows]`: sum of exp(score - m); out `[rows, d]`: sum of exp(score - m) · value,
    not divided by l yet. scores `[rows, keys]` are those of the new tile, v `[keys, d]` its values.

        m' = max(m, largest new score)          r = exp(m - m')          w = exp(scores - m')
        l' = l · r + sum of w                   out' = out · r + w v

    Before the first tile, m is -inf, l and out are 0. A row whose scores are all hidden (-inf) so far keeps them:
    -inf - (-inf) is NaN, so subtract 0 there instead of m'.

    >>> m, l, out = torch.tensor([NEG_INF]), torch.zeros(1), torch.zeros(1, 1)
    >>> m, l, out = online_step(m, l, out, torch.zeros(1, 1), torch.tensor([[4.0]]))
    >>> online_step(m, l, out, torch.zeros(1, 1), torch.tensor([[8.0]]))
    (tensor([0.]), tensor([2.]), tensor([[12.]]))
    """
    raise NotImplementedError("online_step is yours to write")


def finish(m: Tensor, l: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """What the running values come to: output `[rows, d]` = out / l, and log-sum-exp `[rows]` = m + log l.

    The log-sum-exp is the logarithm of the softmax's denominator. A row that saw no key (l = 0) has output 0 and
    log-sum-exp -inf.

    >>> finish(torch.tensor([0.0, NEG_INF]), torch.tensor([2.0, 0.0]), torch.tensor([[12.0], [0.0]]))
    (tensor([[6.],
            [0.]]), tensor([0.6931,   -inf]))
    """
    raise NotImplementedError("finish is yours to write")


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, tile: int = 64) -> tuple[Tensor, Tensor]:
    """Causal attention without a score matrix: q `[q_len, heads, d]` -> output like q, log-sum-exp `[q_len, heads]`.

    Go through the queries in tiles, and for each through the keys in tiles: nothing you make may hold more than
    `tile · tile` scores of a head at a time. Query i sees the keys up to position `kv_len - q_len + i`; tiles of keys
    that no query of the tile sees are not computed at all, which saves half of a prompt's work. Compute in float32,
    return the output in q's dtype. Neighbouring query heads share a key/value head, as in exercise 02.

    >>> q, k, v = torch.zeros(2, 1, 1), torch.zeros(1, 2, 1), torch.tensor([[[2.0], [4.0]]])
    >>> out, lse = tiled_attention(q, k, v, scale=1.0, tile=1)
    >>> out.flatten(), lse.flatten()
    (tensor([2., 3.]), tensor([0.0000, 0.6931]))
    """
    raise NotImplementedError("tiled_attention is yours to write")


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention over disjoint parts of the keys: outs `[parts, ..., d]`, lses `[parts, ...]` -> one of each.

    Part i holds exp(lse_i) of the softmax's sum, so its output weighs exp(lse_i) / sum over j of exp(lse_j). exp of a
    log-sum-exp overflows: take the largest off first. An empty part has log-sum-exp -inf and weighs nothing; where all
    parts are empty the output is 0 and the log-sum-exp -inf.

    >>> merge(torch.tensor([[2.0], [8.0]]), torch.tensor([0.0, 0.6931472]))  # the second part weighs twice as much
    (tensor([6.]), tensor(1.0986))
    """
    raise NotImplementedError("merge is yours to write")
