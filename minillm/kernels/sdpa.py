"""PyTorch's fused attention, with the query heads of a group as rows of one head.

Grouped-query attention lets g query heads share one key/value head. Repeating K and V g times reads them g times; as g
*rows* of one head they are read once, and the kernel needs no notion of groups.
Loses: with a mask it computes what the mask hides, and on a CPU in bfloat16 the tiles of `tiled.py` overtake it at
about a hundred queries.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from minillm.attention.reference import visible


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, sliding_window: int | None = None) -> Tensor:
    """Causal attention: q `[q_len, heads, d]`, k and v `[kv_heads, kv_len, d]` -> `[q_len, heads, d]`."""
    q_len, kv_len = q.shape[0], k.shape[1]
    windowed = sliding_window is not None and sliding_window < kv_len
    if q_len == 1 and not windowed and kv_len:
        return _rows(q, k, v, scale, None)
    if q_len == kv_len and not windowed:
        return _causal(q, k, v, scale)
    return _rows(q, k, v, scale, visible(q_len, kv_len, sliding_window, q.device))


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """A whole prompt: the kernel's own causal rule, which is top-left, is right for a square alone."""
    out = functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _rows(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Queries of one group as rows, head after head; `mask` `[q_len, kv_len]` holds for each head."""
    q_len, heads, d = q.shape
    group = heads // k.shape[0]
    rows = q.view(q_len, -1, group, d).permute(1, 2, 0, 3).reshape(1, -1, group * q_len, d)
    mask = None if mask is None else mask.repeat(group, 1)
    out = functional.scaled_dot_product_attention(rows, k[None], v[None], attn_mask=mask, scale=scale)
    return out.view(-1, group, q_len, d).permute(2, 0, 1, 3).reshape(q_len, heads, d)


def sdpa_decode(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, scale: float) -> Tensor:
    """One query per sequence: q `[num_seqs, heads, d]`, k and v `[kv_heads, num_seqs, kv_len, d]` -> like q.

    `bias` `[num_seqs, 1, kv_len]`, in q's dtype, is added to the scaled scores, -inf where a sequence has no key.
    """
    num_seqs, _, d = q.shape
    rows = q.view(num_seqs, len(k), -1, d).transpose(0, 1)
    out = functional.scaled_dot_product_attention(rows, k, v, attn_mask=bias[None], scale=scale)
    return out.transpose(0, 1).flatten(1, 2)
