"""The packed batch on a GPU: short queries go to the decode kernel, long ones to the prefill kernel."""

# mypy: disable-error-code="no-untyped-def,arg-type,var-annotated"
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.attention.metadata import AttentionMetadata
from minillm.attention.paged import Backend
from minillm.kernels.gpu.decode import MAX_ROWS, triton_decode
from minillm.kernels.gpu.prefill import triton_prefill
from minillm.kernels.gpu.tiles import Share, tile_edge


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


def triton_write_kv(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, metadata: AttentionMetadata) -> None:
    """Store k and v `[num_tokens, kv_heads, d]` in the pools `[kv_heads, num_blocks, block_size, d]`: one launch."""
    num_tokens, kv_heads, d = k.shape
    k, v = _dense_heads(k), _dense_heads(v)
    strides = k.stride(0), k.stride(1), v.stride(0), v.stride(1), k_pool.stride(0)
    store_kernel[(num_tokens,)](
        k, v, k_pool, v_pool, metadata.slot_mapping, *strides,
        KV_HEADS=kv_heads, HEADS=triton.next_power_of_2(kv_heads), HEAD_DIM=d, D=tile_edge(d),
    )  # fmt: skip


def triton_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    metadata: GpuMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Packed attention: q `[num_tokens, heads, d]` -> like q; see the definition, `paged.paged_attention`.

    Keys and values are pools `[kv_heads, num_blocks, block_size, d]` in q's dtype.
    """
    return triton_attention_lse(q, k_pool, v_pool, metadata, scale=scale, sliding_window=sliding_window)[0]


def triton_attention_lse(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    metadata: GpuMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Output like q and log-sum-exp `[num_tokens, heads]` in float32."""
    return attend_stored(q, (k_pool,), (v_pool,), metadata, scale=scale, sliding_window=sliding_window)


@dataclass(frozen=True, eq=False)
class GpuMetadata(AttentionMetadata):
    """A step as the kernels take it."""

    short: Share  # for the decode kernel
    long: Share  # for the prefill kernel


def prepare(metadata: AttentionMetadata, group: int) -> GpuMetadata:
    """Requests with few queries apart from those with many; group: query heads per key/value head."""
    busy = [i for i, q_len in enumerate(metadata.q_lens) if q_len]
    short = [i for i in busy if metadata.q_lens[i] <= MAX_ROWS // group]
    long = [i for i in busy if metadata.q_lens[i] > MAX_ROWS // group]
    return GpuMetadata(**vars(metadata), short=Share.of(metadata, short), long=Share.of(metadata, long))


def attend_stored(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    metadata: GpuMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The same for keys and values in any format: a pool each, or codes and the ends of their ranges."""
    q = _dense_heads(q)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    for kernel, share in ((triton_decode, metadata.short), (triton_prefill, metadata.long)):
        if share.q_len:
            kernel(q, keys, values, metadata, share, out, lse, scale=scale, sliding_window=sliding_window)
    return out, lse


def _dense_heads(x: Tensor) -> Tensor:
    """The kernels take any stride between tokens and heads, but want the elements of a head side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


BACKEND = Backend(triton_attention, triton_write_kv, lambda metadata, _, group: prepare(metadata, group))
