"""Decoding many sequences at once on a CPU: one query each, keys gathered to a common width, two batched products.

Alone, a short sequence costs more in starting operators than in arithmetic; in bfloat16 a long one is faster as a plain
matrix product than through the fused kernel. Several of them fill both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.attention.contiguous import decode_attention
from minillm.attention.layout import PagedLayout, Span
from minillm.attention.naive import NEG_INF

GROUP_BYTES = 4 * 2**20  # of a group's keys: with as many values they stay in the last-level cache between operators
GROUP_MIN_KEYS = 512  # fewer keys, padding included, are faster one sequence after the other
GROUP_STEP = 64  # widths are multiples of it: a new shape costs the matrix library a millisecond, once in 64 steps


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences with one query each, computed together.

    Keys are aligned right, so that a sliding window is a slice of the last columns. The padding on the left repeats
    the sequence's first slot: what a slot outside the sequence holds, even NaN, is never read.
    """

    queries: Tensor  # [num_seqs] int64, indices into the packed queries
    slots: Tensor  # [num_seqs, width] int64
    bias: Tensor  # [num_seqs, 1, width] float32: 0, or -inf where a column is padding


@dataclass(frozen=True)
class CpuPlan:
    """How a CPU computes a packed batch: groups of decodes, and the other sequences one by one."""

    groups: tuple[DecodeGroup, ...]
    spans: tuple[Span, ...]

    @classmethod
    def make(cls, layout: PagedLayout, max_keys: int) -> CpuPlan:
        """Groups of at most `max_keys` keys, padding included; similar lengths together, so that little is padded."""
        decodes = [span for span in layout.spans if span.q_len == 1 <= span.kv_len]
        groups = [group for group in _packed(sorted(decodes, key=lambda span: span.kv_len), max_keys) if _pays(group)]
        grouped = {span.index for group in groups for span in group}
        return cls(
            groups=tuple(_padded(group, layout) for group in groups),
            spans=tuple(span for span in layout.spans if span.index not in grouped),
        )

    @property
    def max_keys(self) -> int:
        """Keys of the largest group, padding included."""
        return max((group.slots.numel() for group in self.groups), default=0)


def attend_groups(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    plan: CpuPlan,
    out: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> None:
    """Decode the plan's groups over pools `[kv_heads, num_blocks, block_size, d]`, into their rows of `out`.

    All groups share one pair of buffers: memory that is in the cache already, and fresh pages cost more than a copy.
    """
    kv_heads, *_, d = k_pool.shape
    buffers = k_pool.new_empty(2, kv_heads * plan.max_keys, d)
    head_starts = torch.arange(kv_heads)[:, None, None] * k_pool[0].numel() // d
    for group in plan.groups:
        newest = slice(None) if sliding_window is None else slice(-sliding_window, None)
        slots, bias = group.slots[:, newest], group.bias[:, :, newest]
        rows = (head_starts + slots).flatten()
        k, v = (
            torch.index_select(pool.view(-1, d), 0, rows, out=buffer[: len(rows)]).view(kv_heads, *slots.shape, d)
            for pool, buffer in zip((k_pool, v_pool), buffers, strict=True)
        )
        out[group.queries] = decode_attention(q[group.queries], k, v, bias, scale=scale)


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
    """Few keys are faster one by one; a sequence alone whose blocks are neighbours is read where it lies."""
    if len(group) == 1 and group[0].adjacent:
        return False
    return len(group) * _width(group[-1]) >= GROUP_MIN_KEYS


def _width(span: Span) -> int:
    return -(-span.kv_len // GROUP_STEP) * GROUP_STEP


def _padded(group: list[Span], layout: PagedLayout) -> DecodeGroup:
    kv_lens = torch.tensor([[span.kv_len] for span in group])
    tables = layout.block_tables[[span.index for span in group]]
    key = torch.arange(-_width(group[-1]), 0) + kv_lens
    real = key.clamp(min=0)
    return DecodeGroup(
        queries=torch.tensor([span.queries.start for span in group]),
        slots=tables.gather(1, real // layout.block_size) * layout.block_size + real % layout.block_size,
        bias=torch.zeros(key.shape).masked_fill_(key < 0, NEG_INF)[:, None],
    )
