"""Attention of one contiguous sequence: which implementation for which shape."""

from __future__ import annotations

from torch import Tensor

from minillm.attention.sdpa import sdpa_attention


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, sliding_window: int | None = None) -> Tensor:
    """Causal attention: q `[q_len, heads, d]`, k and v `[kv_heads, kv_len, d]` -> `[q_len, heads, d]`.

    The queries are the last `q_len` of `kv_len` tokens (bottom-right causal). k and v may have any strides.
    """
    return sdpa_attention(q, k, v, scale=scale, sliding_window=sliding_window)
