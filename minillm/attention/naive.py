"""Attention as the textbook writes it, with the score matrix in plain view: the oracle of every other backend."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(q_len: int, kv_len: int, sliding_window: int | None = None, device: torch.device | None = None) -> Tensor:
    """The causal rule as a boolean mask `[q_len, kv_len]`: True where query i may look at key j.

    The queries are the *last* `q_len` of `kv_len` tokens, so query i stands at position `kv_len - q_len + i`: the
    triangle is aligned bottom-right. A sliding window of W keeps the W newest keys, the token itself included.
    """
    position = torch.arange(kv_len - q_len, kv_len, device=device)[:, None]
    key = torch.arange(kv_len, device=device)[None, :]
    mask = key <= position
    return mask if sliding_window is None else mask & (key > position - sliding_window)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, sliding_window: int | None = None) -> Tensor:
    """softmax(q kᵀ · scale) v for q `[q_len, heads, d]`, k and v `[kv_heads, kv_len, d]` -> `[q_len, heads, d]`."""
    return naive_attention_map(q, k, v, scale=scale, sliding_window=sliding_window)[0]


def naive_attention_map(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, sliding_window: int | None = None
) -> tuple[Tensor, Tensor]:
    """The output `[q_len, heads, d]` and the attention map `[heads, q_len, kv_len]` (rows sum to 1, or to 0).

    A row that sees no key at all has no softmax; its weights and its output are defined as 0.
    """
    group = q.shape[1] // k.shape[0]
    scores = q.transpose(0, 1) @ k.repeat_interleave(group, 0).transpose(1, 2) * scale
    mask = visible(q.shape[0], k.shape[1], sliding_window, q.device)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=_accumulator(q.dtype))
    weights = weights.nan_to_num(0.0)
    out = weights.to(v.dtype) @ v.repeat_interleave(group, 0)
    return out.transpose(0, 1), weights


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """Softmax is computed in float32 at least: sums of many bfloat16 terms lose the small ones."""
    return torch.promote_types(dtype, torch.float32)
