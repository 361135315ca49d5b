"""The packed batch on a GPU: short queries go to the decode kernel, long ones to the prefill kernel."""

# mypy: disable-error-code="no-untyped-def,arg-type,var-annotated"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.attention.metadata import AttentionMetadata
from minillm.kernels.gpu.decode import MAX_ROWS, triton_decode
from minillm.kernels.gpu.prefill import triton_prefill
from minillm.kernels.gpu.tiles import Share, tile_edge
from minillm.quantization.attention import QuantizedBlocks, Tails


@triton.jit
def store_kernel(
    k_ptr, v_ptr, k_pool_ptr, v_pool_ptr, slots_ptr, k_token, k_head, v_token, v_head, pool_head,
    KV_HEADS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens). Copies K and V of all heads of one token into its slot."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)  # int64: slot · d passes 2³¹ in a large pool
    head, dim = tl.arange(0, HEADS).to(tl.int64)[:, None], tl.arange(0, D)[None, :]
    stored = (head < KV_HEADS) & (dim < HEAD_DIM)
    place = head * pool_head + slot * HEAD_DIM + dim
    # 2 · kv_heads · d bytes read and as many written, for K and for V.
    k = tl.load(k_ptr + token * k_token + head * k_head + dim, mask=stored)
    tl.store(k_pool_ptr + place, k, mask=stored)
    v = tl.load(v_ptr + token * v_token + head * v_head + dim, mask=stored)
    tl.store(v_pool_ptr + place, v, mask=stored)


def triton_write_kv(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, layout: AttentionMetadata) -> None:
    """Store k and v `[num_tokens, kv_heads, d]` in the pools `[kv_heads, num_blocks, block_size, d]`: one launch."""
    num_tokens, kv_heads, d = k.shape
    k, v = _dense_heads(k), _dense_heads(v)
    store_kernel[(num_tokens,)](
        k, v, k_pool, v_pool, layout.slot_mapping, k.stride(0), k.stride(1), v.stride(0), v.stride(1), k_pool.stride(0),
        KV_HEADS=kv_heads, HEADS=triton.next_power_of_2(kv_heads), HEAD_DIM=d, D=tile_edge(d),
    )  # fmt: skip


def triton_attention(
    q: Tensor,
    keys: Tensor | QuantizedBlocks,
    values: Tensor | QuantizedBlocks,
    layout: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    tails: Tails | None = None,
) -> Tensor:
    """Packed attention: q `[num_tokens, heads, d]` -> like q.

    Keys and values are pools `[kv_heads, num_blocks, block_size, d]` in q's dtype, or blocks of codes: see the twins,
    `paged.paged_attention` and `quantized.quantized_attention`.
    """
    return triton_attention_lse(q, keys, values, layout, scale=scale, sliding_window=sliding_window, tails=tails)[0]


def triton_attention_lse(
    q: Tensor,
    keys: Tensor | QuantizedBlocks,
    values: Tensor | QuantizedBlocks,
    layout: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    tails: Tails | None = None,
) -> tuple[Tensor, Tensor]:
    """Output like q and log-sum-exp `[num_tokens, heads]` in float32."""
    q = _dense_heads(q)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    kv_heads = len(keys if isinstance(keys, Tensor) else keys.tensors[0])
    group = q.shape[1] // kv_heads
    short, long = layout.memo.get(group) or layout.memo.setdefault(group, _divide(layout, MAX_ROWS // group))
    for kernel, share in ((triton_decode, short), (triton_prefill, long)):
        if share.q_len:
            kernel(q, keys, values, layout, share, out, lse, scale=scale, sliding_window=sliding_window, tails=tails)
    return out, lse


def _divide(layout: AttentionMetadata, max_q_len: int) -> tuple[Share, Share]:
    """Sequences with at most `max_q_len` queries, and those with more."""
    busy = [i for i, q_len in enumerate(layout.q_lens) if q_len]
    short = [i for i in busy if layout.q_lens[i] <= max_q_len]
    return Share.of(layout, short), Share.of(layout, [i for i in busy if layout.q_lens[i] > max_q_len])


def _dense_heads(x: Tensor) -> Tensor:
    """The kernels take any stride between tokens and heads, but want the elements of a head side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
