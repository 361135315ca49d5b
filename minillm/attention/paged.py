"""Attention over a packed batch whose keys and values lie in blocks, in PyTorch: the twin of the Triton kernels.

Prefill, chunk, decode and verify are one case with different query lengths: a sequence's queries are the last `q_len`
of its `kv_len` tokens. K and V of the new tokens are written first, then everything is read through the block table.
A contiguous cache is the special case of neighbouring blocks, and is then read in place.

Pools are `[kv_heads, num_blocks, block_size, d]`, head-major: what one head gathers lies close together.
Loses: blocks that are no neighbours are copied into a buffer before they are read, which a GPU kernel need not do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minillm.attention.metadata import AttentionMetadata, Span
from minillm.attention.reference import oldest_key
from minillm.kernels.cpu.contiguous import attention
from minillm.kernels.cpu.grouped import CpuPlan


def write_kv(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, layout: AttentionMetadata) -> None:
    """Store k and v `[num_tokens, kv_heads, d]` in the pools `[kv_heads, num_blocks, block_size, d]`, slot by slot."""
    k_pool.flatten(1, 2).index_copy_(1, layout.slot_mapping, k.transpose(0, 1))
    v_pool.flatten(1, 2).index_copy_(1, layout.slot_mapping, v.transpose(0, 1))


def paged_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    layout: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """The CPU's way: decodes in groups, the others one by one. q `[num_tokens, heads, d]` -> like q.

    What to group depends on the batch and on the shape of the pools alone, so the first layer plans for all.
    """
    key = (k_pool.shape, k_pool.dtype)
    plan: CpuPlan = layout.memo.get(key) or layout.memo.setdefault(key, CpuPlan.make(layout, k_pool))
    if not plan.groups:
        return attend_spans(q, k_pool, v_pool, layout, scale=scale, sliding_window=sliding_window)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    plan.attend_groups(q, k_pool, v_pool, out, scale=scale, sliding_window=sliding_window)
    for span in plan.spans:
        k, v = read_span(k_pool, v_pool, span, sliding_window)
        out[span.queries] = attention(q[span.queries], k, v, scale=scale, sliding_window=sliding_window)
    return out


def attend_spans(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    layout: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    kernel: Callable[..., Tensor] = attention,
) -> Tensor:
    """Sequence by sequence with any `kernel` for one sequence, on any device. q `[num_tokens, heads, d]` -> like q."""
    outs = []
    for span in layout.spans:
        k, v = read_span(k_pool, v_pool, span, sliding_window)
        outs.append(kernel(q[span.queries], k, v, scale=scale, sliding_window=sliding_window))
    return outs[0] if len(outs) == 1 else torch.cat([q[:0], *outs])


def read_span(k_pool: Tensor, v_pool: Tensor, span: Span, sliding_window: int | None) -> tuple[Tensor, Tensor]:
    """One sequence's keys and values `[kv_heads, keys, d]`: views if its blocks are neighbours, else copies.

    Keys that a sliding window hides from all of its queries are left out.
    """
    first = oldest_key(span.q_len, span.kv_len, sliding_window)
    if isinstance(span.slots, slice):
        keys = slice(span.slots.start + first, span.slots.stop)
        return k_pool.flatten(1, 2)[:, keys], v_pool.flatten(1, 2)[:, keys]
    kv_heads, num_blocks, block_size, d = k_pool.shape
    heads = torch.arange(kv_heads, device=k_pool.device)[:, None] * (num_blocks * block_size)
    rows = heads + span.slots[first:].to(k_pool.device)  # along dimension 0, because there torch uses all cores
    k, v = (pool.view(-1, d).index_select(0, rows.flatten()) for pool in (k_pool, v_pool))
    return k.view(*rows.shape, d), v.view(*rows.shape, d)
