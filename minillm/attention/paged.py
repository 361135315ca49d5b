"""Attention over a packed batch whose keys and values lie in blocks: the definition of every faster backend.

Prefill, chunk, decode and verify are one case with different query lengths: a request's queries are the last `q_len`
of its `kv_len` tokens. K and V of the new tokens are written first, then everything is read through the block table.

Pools are `[kv_heads, num_blocks, block_size, d]`, head-major: what one head gathers lies close together.
Loses: it copies the keys and values of each request before it reads them, which a kernel need not do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minillm.attention.metadata import AttentionMetadata
from minillm.attention.reference import oldest_key
from minillm.attention.tiled import attention
from minillm.seams import offer


@dataclass(frozen=True)
class Backend:
    """Three functions that belong together. `prepare` runs once per step, the other two once per layer.

    attend(q, k_pool, v_pool, metadata, *, scale, sliding_window=None) -> like q `[num_tokens, heads, d]`
    write(k, v, k_pool, v_pool, metadata): k and v `[num_tokens, kv_heads, d]` into the pools
    prepare(metadata, k_pool, group) -> metadata with what all layers share; group: query heads per key/value head
    """

    attend: Callable[..., Tensor]
    write: Callable[..., None]
    prepare: Callable[[AttentionMetadata, Tensor, int], AttentionMetadata] = lambda metadata, *_: metadata


def write_kv(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, metadata: AttentionMetadata) -> None:
    """Store k and v `[num_tokens, kv_heads, d]` in the pools `[kv_heads, num_blocks, block_size, d]`, slot by slot."""
    k_pool.flatten(1, 2).index_copy_(1, metadata.slot_mapping, k.transpose(0, 1))
    v_pool.flatten(1, 2).index_copy_(1, metadata.slot_mapping, v.transpose(0, 1))


def paged_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    kernel: Callable[..., Tensor] = attention,
) -> Tensor:
    """Request by request, with any `kernel` for one sequence. q `[num_tokens, heads, d]` -> like q."""
    outs, start = [q[:0]], 0
    for index, q_len in enumerate(metadata.q_lens):
        queries = q[start : start + q_len]
        k, v = (read(pool, metadata, index, sliding_window) for pool in (k_pool, v_pool))
        outs.append(kernel(queries, k, v, scale=scale, sliding_window=sliding_window) if q_len else queries)
        start += q_len
    return torch.cat(outs)


def read(pool: Tensor, metadata: AttentionMetadata, index: int, sliding_window: int | None = None) -> Tensor:
    """The keys or values `[kv_heads, keys, d]` that a request sees: a view if its blocks are adjacent, else a copy.

    Keys that a sliding window hides from all of its queries are left out.
    """
    kv_len, size = metadata.kv_lens[index], metadata.block_size
    oldest = oldest_key(metadata.q_lens[index], kv_len, sliding_window)
    first, end = oldest // size, -(-kv_len // size)
    blocks = metadata.tables[index, first:end]
    if (np.diff(blocks) == 1).all():
        start = int(blocks[0]) if len(blocks) else 0
        chosen = pool[:, start : start + len(blocks)]
    else:
        chosen = pool.index_select(1, torch.from_numpy(blocks).to(pool.device))
    return chosen.flatten(1, 2)[:, oldest - first * size : kv_len - first * size]


REFERENCE = Backend(paged_attention, write_kv)


def choose_backend(kernels: str, device: torch.device) -> Backend:
    """Attention over blocks: this device's, or the definition."""
    extra = offer("paged_attention", device.type) if kernels == "auto" else None
    return extra.BACKEND if extra else REFERENCE
