"""PyTorch's fused attention, given the query heads of one group as rows.

Grouped-query attention lets g query heads share one key/value head. Repeating K and V g times (`repeat_kv`) reads them
g times; passing the group as g *rows* of one head reads them once, and the kernel needs no notion of groups.
Loses: on a CPU with long prompts in bfloat16 (the tiles of `tiled.py` are faster); says nothing about the log-sum-exp.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.attention.naive import visible


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, sliding_window: int | None = None) -> Tensor:
    """Attention of one sequence: q `[q_len, heads, d]`, k and v `[kv_heads, kv_len, d]` -> `[q_len, heads, d]`."""
    q_len, heads, d = q.shape
    kv_heads, kv_len, _ = k.shape
    group = heads // kv_heads
    rows = q.view(q_len, kv_heads, group, d).permute(1, 2, 0, 3).reshape(1, kv_heads, group * q_len, d)
    mask = None
    if q_len > 1 or (sliding_window is not None and sliding_window < kv_len):
        mask = visible(q_len, kv_len, sliding_window, q.device).repeat(group, 1)
    out = F.scaled_dot_product_attention(rows, k[None], v[None], attn_mask=mask, scale=scale)
    return out.view(kv_heads, group, q_len, d).permute(2, 0, 1, 3).reshape(q_len, heads, d)
