"""Decoding many sequences at once on a CPU: one query each, keys and values gathered to a common width.

Alone, a short sequence costs more in starting operators than in arithmetic. Few keys go through SDPA with a mask; many
are faster as two plain matrix products, and then values can take the keys' place in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from minillm.attention.metadata import AttentionMetadata
from minillm.attention.paged import Backend, read, write_kv
from minillm.attention.reference import NEG_INF
from minillm.kernels.cpu.attention import attention, decode_weights, weigh_values
from minillm.kernels.sdpa import sdpa_decode

GROUP_BYTES = 8 * 2**20  # of a group's keys, gathered: they should still be in the last-level cache when they are read
FUSED_ROWS = 6144  # keys · key/value heads from which on two matrix products are faster than SDPA
GROUP_STEP = 64  # widths are multiples of it: a new shape costs the matrix library a millisecond, once in 64 steps


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences with one query each, computed together.

    Keys are aligned right, so that a sliding window is a slice of the last columns. The padding on the left repeats
    the sequence's first slot: what a slot outside the sequence holds, even NaN, is never read.
    """

    queries: Tensor  # [num_seqs] int64, indices into the packed queries
    rows: Tensor  # [kv_heads, num_seqs, width] int64: where each key lies in a pool seen as [kv_heads * num_slots, d]
    bias: Tensor  # [num_seqs, 1, width] in the pool's dtype: 0, or -inf where a column is padding


@dataclass(frozen=True, eq=False)
class CpuMetadata(AttentionMetadata):
    """How a CPU computes a packed batch: groups of decodes, and the other requests one by one.

    All groups of all layers gather into one buffer: memory that is in the cache already. Fresh pages would cost more
    than the copy.
    """

    groups: tuple[DecodeGroup, ...]
    rest: tuple[int, ...]  # requests that are in no group
    buffer: Tensor  # [rows, d]


def prepare(metadata: AttentionMetadata, k_pool: Tensor, _: int = 1, *, group_bytes: int = GROUP_BYTES) -> CpuMetadata:
    """Plan for pools like `k_pool` `[kv_heads, num_blocks, block_size, d]`: which decodes to compute together."""
    kv_heads, _, _, d = k_pool.shape
    max_keys = group_bytes // (kv_heads * d * k_pool.element_size())
    kv_lens = metadata.kv_lens
    decodes = [index for index, q_len in enumerate(metadata.q_lens) if q_len == 1 <= kv_lens[index]]
    chosen = _packed(sorted(decodes, key=kv_lens.__getitem__), kv_lens, max_keys)
    packed = [group for group in chosen if len(group) > 1 or not _adjacent(metadata, group[0])]
    grouped = {index for group in packed for index in group}
    groups = tuple(_padded(group, metadata, k_pool) for group in packed)
    size = max((group.rows.numel() for group in groups), default=0)
    return CpuMetadata(
        **vars(metadata),
        groups=groups,
        rest=tuple(index for index, q_len in enumerate(metadata.q_lens) if q_len and index not in grouped),
        buffer=k_pool.new_empty(max(size, 2 * min(size, FUSED_ROWS)), d),  # SDPA wants keys and values at once
    )


def paged_attention(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, metadata: CpuMetadata, *, scale: float, sliding_window: int | None = None
) -> Tensor:
    """Decodes in groups, the others one by one. q `[num_tokens, heads, d]` -> like q."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for group in metadata.groups:
        newest = slice(None) if sliding_window is None else slice(-sliding_window, None)
        rows, bias = group.rows[:, :, newest], group.bias[:, :, newest]
        queries, keys = q[group.queries], _gather(k_pool, rows, metadata.buffer)
        if rows.numel() < FUSED_ROWS:
            values = _gather(v_pool, rows, metadata.buffer[rows.numel() :])
            out[group.queries] = sdpa_decode(queries, keys, values, bias, scale=scale)
        else:
            weights = decode_weights(queries, keys, bias, scale=scale)
            out[group.queries] = weigh_values(weights, _gather(v_pool, rows, metadata.buffer))
    starts = [0, *accumulate(metadata.q_lens)]
    for index in metadata.rest:
        own = slice(starts[index], starts[index + 1])
        k, v = (read(pool, metadata, index, sliding_window) for pool in (k_pool, v_pool))
        out[own] = attention(q[own], k, v, scale=scale, sliding_window=sliding_window)
    return out


BACKEND = Backend(paged_attention, write_kv, prepare)


def _gather(pool: Tensor, rows: Tensor, buffer: Tensor) -> Tensor:
    """`[kv_heads, num_seqs, width, d]`, valid until the buffer is used again.

    Along dimension 0, because there torch uses all cores.
    """
    d = pool.shape[3]
    return torch.index_select(pool.view(-1, d), 0, rows.flatten(), out=buffer[: rows.numel()]).view(*rows.shape, d)


def _packed(indices: list[int], kv_lens: Sequence[int], max_keys: int) -> Iterator[list[int]]:
    """Requests, shortest first, cut where a group would hold too many keys or pad its shortest to more than twice."""
    group: list[int] = []
    for index in indices:
        width = _width(kv_lens[index])
        if group and ((len(group) + 1) * width > max_keys or width > 2 * _width(kv_lens[group[0]])):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _adjacent(metadata: AttentionMetadata, index: int) -> bool:
    """Whether a request's blocks are adjacent: alone, it is then read where it lies."""
    blocks = metadata.tables[index, : -(-metadata.kv_lens[index] // metadata.block_size)]
    return bool((np.diff(blocks) == 1).all())


def _width(kv_len: int) -> int:
    return -(-kv_len // GROUP_STEP) * GROUP_STEP


def _padded(group: list[int], metadata: AttentionMetadata, pool: Tensor) -> DecodeGroup:
    kv_heads, num_blocks, block_size, _ = pool.shape
    kv_lens = [metadata.kv_lens[index] for index in group]
    key = torch.arange(-_width(kv_lens[-1]), 0) + torch.tensor(kv_lens)[:, None]
    real = key.clamp(min=0)
    slots = metadata.block_tables[group].gather(1, real // block_size) * block_size + real % block_size
    heads = torch.arange(kv_heads)[:, None, None] * (num_blocks * block_size)
    return DecodeGroup(
        queries=metadata.cu_seqlens_q[group].long(),
        rows=heads + slots,
        bias=pool.new_zeros(key.shape).masked_fill_(key < 0, NEG_INF)[:, None],
    )
