"""Attention as the textbook writes it, with the score matrix in plain view: the oracle of every other backend.

Loses: everywhere but in clarity. The score matrix takes heads · q_len · kv_len numbers, and K and V are repeated for
every query head of their group.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEG_INF = float("-inf")


def visible(q_len: int, kv_len: int, sliding_window: int | None = None, device: torch.device | None = None) -> Tensor:
    """The causal rule as a boolean mask `[q_len, kv_len]`: True where query i may look at key j.

    The queries are the *last* `q_len` of `kv_len` tokens, so query i stands at position `kv_len - q_len + i`: the
    triangle is aligned bottom-right. A sliding window of W keeps the W newest keys, the token's own included.
    """
    return tile_mask(range(kv_len - q_len, kv_len), range(kv_len), sliding_window, device)


def tile_mask(positions: range, keys: range, sliding_window: int | None, device: torch.device | None) -> Tensor:
    """The part `[len(positions), len(keys)]` of that mask: what queries at these positions see of these keys."""
    position = torch.arange(positions.start, positions.stop, device=device)[:, None]
    key = torch.arange(keys.start, keys.stop, device=device)[None, :]
    mask = key <= position
    return mask if sliding_window is None else mask & (key > position - sliding_window)


def oldest_key(q_len: int, kv_len: int, sliding_window: int | None) -> int:
    """The first key that one of the queries sees: what lies before it need not be read."""
    return 0 if sliding_window is None else max(0, kv_len - q_len - sliding_window + 1)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums are kept in float32 at least: adding many bfloat16 terms loses the small ones."""
    return torch.promote_types(dtype, torch.float32)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, sliding_window: int | None = None) -> Tensor:
    """softmax(q kᵀ · scale) v: q `[q_len, heads, d]`, k and v `[kv_heads, kv_len, d]` -> `[q_len, heads, d]`."""
    return masked_attention(q, k, v, visible(len(q), k.shape[1], sliding_window, q.device), scale=scale)[0]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """The output `[q_len, heads, d]` and the map `[heads, q_len, kv_len]` of the weights behind it.

    mask `[q_len, kv_len]`: True where a query may look. Each row of the map sums to 1. A query that sees no key (it
    stands before position 0) has no softmax; its weights and its output are defined as 0.
    """
    group = q.shape[1] // k.shape[0]
    scores = q.transpose(0, 1) @ k.repeat_interleave(group, 0).transpose(1, 2)
    scores = (scores.to(accumulator_dtype(q.dtype)) * scale).masked_fill(~mask, NEG_INF)
    weights = scores.softmax(dim=-1).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    out = weights.to(v.dtype) @ v.repeat_interleave(group, 0)
    return out.transpose(0, 1), weights
