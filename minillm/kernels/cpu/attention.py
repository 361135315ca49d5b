"""Attention over keys and values that lie side by side: which implementation for which shape."""

from __future__ import annotations

import torch
from torch import Tensor

from minillm.attention.reference import accumulator_dtype
from minillm.attention.tiled import tiled_attention
from minillm.kernels import sdpa

# From how many scores (q_len · kv_len) on tiles are at least as fast as SDPA on a CPU; other dtypes have no fast matrix
# product there. With fewer queries than TILED_QUERIES the operators of a tile cost more than they compute.
TILED_SCORES = {torch.bfloat16: 128 * 128, torch.float32: 512 * 512}
TILED_QUERIES = 32
PRODUCT_KEYS = 2048  # from here on one query in bfloat16 is faster as two plain matrix products than through SDPA


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, sliding_window: int | None = None) -> Tensor:
    """Causal attention: q `[q_len, heads, d]`, k and v `[kv_heads, kv_len, d]` -> `[q_len, heads, d]`.

    The queries are the last `q_len` of `kv_len` tokens (bottom-right causal). k and v may have any strides.
    """
    q_len, kv_len = len(q), k.shape[1]
    if q.device.type == "cpu" and q.dtype in TILED_SCORES:
        if q_len >= TILED_QUERIES and q_len * kv_len >= TILED_SCORES[q.dtype]:
            return tiled_attention(q, k, v, scale=scale, sliding_window=sliding_window)[0]
        if q_len == 1 and kv_len >= PRODUCT_KEYS and q.dtype == torch.bfloat16 and sliding_window is None:
            return decode_attention(q, k[:, None], v[:, None], None, scale=scale)
    return sdpa.attention(q, k, v, scale=scale, sliding_window=sliding_window)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, scale: float) -> Tensor:
    """One query per sequence: q `[num_seqs, heads, d]`, k and v `[kv_heads, num_seqs, kv_len, d]` -> like q.

    Two batched matrix products with a softmax between: a single row of scores is too small to need tiles.
    """
    return weigh_values(decode_weights(q, k, bias, scale=scale), v)


def decode_weights(q: Tensor, k: Tensor, bias: Tensor | None, *, scale: float) -> Tensor:
    """The softmax `[kv_heads, num_seqs, group, kv_len]`, in q's dtype.

    `bias` `[num_seqs, 1, kv_len]` is added to the scaled scores, -inf where a sequence has no key.
    """
    num_seqs, _, d = q.shape
    rows = q.view(num_seqs, len(k), -1, d).transpose(0, 1)
    scores = (rows @ k.transpose(2, 3)).to(accumulator_dtype(q.dtype)) * scale
    if bias is not None:
        scores += bias
    return scores.softmax(-1).to(q.dtype)


def weigh_values(weights: Tensor, v: Tensor) -> Tensor:
    """Weights times values `[kv_heads, num_seqs, kv_len, d]` -> output `[num_seqs, heads, d]`."""
    return (weights @ v).transpose(0, 1).flatten(1, 2)
