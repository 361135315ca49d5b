"""Decoding many sequences at once on a CPU: one query each, keys and values gathered to a common width.

Alone, a short sequence costs more in starting operators than in arithmetic. Few keys go through SDPA with a mask; many
are faster as two plain matrix products, and then values can take the keys' place in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.attention.metadata import AttentionMetadata, Span
from minillm.attention.reference import NEG_INF
from minillm.kernels.cpu.contiguous import decode_weights, weigh_values
from minillm.kernels.cpu.sdpa import sdpa_decode

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


@dataclass(frozen=True)
class CpuPlan:
    """How a CPU computes a packed batch: groups of decodes, and the other sequences one by one.

    All groups of all layers gather into one buffer: memory that is in the cache already. Fresh pages would cost more
    than the copy.
    """

    groups: tuple[DecodeGroup, ...]
    spans: tuple[Span, ...]
    buffer: Tensor  # [rows, d]

    @classmethod
    def make(cls, layout: AttentionMetadata, pool: Tensor, group_bytes: int = GROUP_BYTES) -> CpuPlan:
        """Plan for pools like `pool` `[kv_heads, num_blocks, block_size, d]`."""
        kv_heads, _, _, d = pool.shape
        max_keys = group_bytes // (kv_heads * d * pool.element_size())
        decodes = [span for span in layout.spans if span.q_len == 1 <= span.kv_len]
        packed = [group for group in _packed(sorted(decodes, key=lambda span: span.kv_len), max_keys) if _pays(group)]
        grouped = {span.index for group in packed for span in group}
        groups = tuple(_padded(group, layout, pool) for group in packed)
        size = max((group.rows.numel() for group in groups), default=0)
        return cls(
            groups=groups,
            spans=tuple(span for span in layout.spans if span.index not in grouped),
            buffer=pool.new_empty(max(size, 2 * min(size, FUSED_ROWS)), d),  # SDPA wants keys and values at once
        )

    def attend_groups(
        self, q: Tensor, k_pool: Tensor, v_pool: Tensor, out: Tensor, *, scale: float, sliding_window: int | None
    ) -> None:
        """Decode all groups, into their rows of `out` `[num_tokens, heads, d]`."""
        for group in self.groups:
            newest = slice(None) if sliding_window is None else slice(-sliding_window, None)
            rows, bias = group.rows[:, :, newest], group.bias[:, :, newest]
            queries, keys = q[group.queries], self._gather(k_pool, rows)
            if rows.numel() < FUSED_ROWS:
                values = self._gather(v_pool, rows, behind=rows.numel())
                out[group.queries] = sdpa_decode(queries, keys, values, bias, scale=scale)
            else:
                weights = decode_weights(queries, keys, bias, scale=scale)
                out[group.queries] = weigh_values(weights, self._gather(v_pool, rows))

    def _gather(self, pool: Tensor, rows: Tensor, behind: int = 0) -> Tensor:
        """`[kv_heads, num_seqs, width, d]`, valid until the buffer is used again.

        Along dimension 0, because there torch uses all cores.
        """
        d = pool.shape[3]
        buffer = self.buffer[behind : behind + rows.numel()]
        return torch.index_select(pool.view(-1, d), 0, rows.flatten(), out=buffer).view(*rows.shape, d)


def _packed(spans: list[Span], max_keys: int) -> Iterator[list[Span]]:
    """Spans, shortest first, cut where a group would hold too many keys or pad its shortest to more than twice."""
    group: list[Span] = []
    for span in spans:
        if group and ((len(group) + 1) * _width(span) > max_keys or _width(span) > 2 * _width(group[0])):
            yield group
            group = []
        group.append(span)
    if group:
        yield group


def _pays(group: list[Span]) -> bool:
    """A sequence alone whose blocks are neighbours is read where it lies."""
    return len(group) > 1 or not group[0].adjacent


def _width(span: Span) -> int:
    return -(-span.kv_len // GROUP_STEP) * GROUP_STEP


def _padded(group: list[Span], layout: AttentionMetadata, pool: Tensor) -> DecodeGroup:
    kv_heads, num_blocks, block_size, _ = pool.shape
    kv_lens = torch.tensor([[span.kv_len] for span in group])
    tables = layout.block_tables[[span.index for span in group]]
    key = torch.arange(-_width(group[-1]), 0) + kv_lens
    real = key.clamp(min=0)
    slots = tables.gather(1, real // block_size) * block_size + real % block_size
    heads = torch.arange(kv_heads)[:, None, None] * (num_blocks * block_size)
    return DecodeGroup(
        queries=torch.tensor([span.queries.start for span in group]),
        rows=heads + slots,
        bias=pool.new_zeros(key.shape).masked_fill_(key < 0, NEG_INF)[:, None],
    )
