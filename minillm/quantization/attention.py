"""Attention over quantised keys and values that lie in blocks, in PyTorch: the twin of the Triton kernels.

A tile of codes is decoded, folded into the online softmax (`tiled.OnlineSoftmax`) and forgotten, so that the cache
never exists in more bits than it is stored in. To decode all of it before each step would save memory and cost time.

A format that has a range per token writes a token and reads it back as it is stored, its own query included. One that
has a range per channel of a block must wait until the block is complete. Until then the block's keys are kept as the
model made them, in a *tail*, and what a query sees follows from positions alone:

    a query sees the keys of its own block exactly, and those of earlier blocks as they are stored.

No matter how a sequence is cut into steps, whether it was preempted or begins with somebody else's blocks: query i
sees the same of key j. A rule that looks at what happens to be complete when the step runs has no such promise.

Loses: on a CPU, to the same attention without quantisation. Decoding is a handful of operators over each tile, and
nothing reads codes faster than a matrix product reads bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from minillm.attention.metadata import AttentionMetadata, Span
from minillm.attention.reference import NEG_INF
from minillm.attention.tiled import KV_TILE, Q_TILE, OnlineSoftmax

Read = Callable[[Tensor], Tensor]  # blocks [n] -> their tokens [kv_heads, n, block_size, d]


class QuantizedBlocks(Protocol):
    """The keys or the values of one layer; see `minillm.quantization.formats` for what the tensors hold."""

    tensors: tuple[Tensor, ...]  # codes, then ranges: each [kv_heads, num_blocks, ...]

    def read(self, blocks: Tensor) -> Tensor:
        """Decode these blocks `[n]`: `[kv_heads, n, block_size, d]` in float32."""
        ...


@dataclass(frozen=True)
class Tails:
    """The exact keys of every block that this step writes to, whether it completes the block or not."""

    keys: Tensor  # [kv_heads, num_tails, block_size, d] in the model's dtype
    layout: (
        AttentionMetadata  # the same step, with tails in the place of blocks; 0 for blocks that it does not write to
    )

    def read(self, tails: Tensor) -> Tensor:
        """These tails `[n]`: `[kv_heads, n, block_size, d]`."""
        return self.keys.index_select(1, tails.to(self.keys.device))


def quantized_attention(
    q: Tensor,
    keys: QuantizedBlocks,
    values: QuantizedBlocks,
    layout: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    tails: Tails | None = None,
) -> Tensor:
    """Packed attention, causal and bottom-right aligned: q `[num_tokens, heads, d]` -> like q.

    Without `tails` all keys are read as they are stored.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for span in layout.spans:
        sequence = _Sequence(keys, values, tails, span, sliding_window)
        sequence.attend(q[span.queries], out[span.queries], scale)
    return out


@dataclass(frozen=True)
class _Sequence:
    """One sequence of the batch: which keys its queries see in which form, and where they lie."""

    keys: QuantizedBlocks
    values: QuantizedBlocks
    tails: Tails | None
    span: Span
    sliding_window: int | None

    def attend(self, q: Tensor, out: Tensor, scale: float) -> None:
        """Fold tiles of keys as they are stored, then exact ones, into the softmax of each tile of queries."""
        q_len, kv_heads = len(q), self.keys.tensors[0].shape[0]
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        softmax = OnlineSoftmax(q, kv_heads, min(Q_TILE, q_len), min(self._tile, max(self.span.kv_len, 1)))
        position = torch.arange(self.span.kv_len - q_len, self.span.kv_len)
        for queries in position.split(Q_TILE):
            rows = slice(int(queries[0] - position[0]), int(queries[-1] - position[0]) + 1)
            softmax.begin(q[rows], scale)
            for k, v, bias in self._tiles(queries, q):
                softmax.fold(k, v, bias)
            softmax.finish(out[rows], lse[rows])

    def _tiles(self, position: Tensor, like: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Keys and values `[kv_heads, keys, d]` that queries at these positions see, and the bias that hides some."""
        oldest = torch.zeros_like(position)
        if self.sliding_window is not None:
            oldest = (position - self.sliding_window + 1).clamp(min=0)
        size, end = self.span.block_size, position + 1
        exact = end if self.tails is None else (position // size * size).clamp(min=0)
        parts: list[tuple[Read, list[int], Tensor, Tensor]] = [(self.keys.read, self.span.table, oldest, exact)]
        if self.tails is not None:
            parts.append((self.tails.read, self.tails.layout.tables[self.span.index], oldest.maximum(exact), end))
        for read, table, low, high in parts:
            for tokens in self._visible(low, high):
                k, v = _read(read, table, tokens, size), _read(self.values.read, self.span.table, tokens, size)
                yield k.to(like.dtype), v.to(like.dtype), _bias(low, high, tokens, like.device)

    @property
    def _tile(self) -> int:
        """Keys in a tile: whole blocks, because they are decoded as such."""
        return max(1, KV_TILE // self.span.block_size) * self.span.block_size

    def _visible(self, low: Tensor, high: Tensor) -> Iterator[range]:
        """Tiles of the keys that somebody sees if query i sees low[i] <= key < high[i]."""
        first, last = int(low.min()), int(high.max())
        for start in range(first // self._tile * self._tile, last, self._tile):
            if tokens := range(max(start, first), min(start + self._tile, last)):
                yield tokens


def _read(read: Read, table: list[int], tokens: range, block_size: int) -> Tensor:
    """These tokens of a sequence, `[kv_heads, len(tokens), d]`: the blocks that hold them, cut to size.

    What lies behind a sequence's last token is never looked at: it may be NaN.
    """
    first, end = tokens.start // block_size, -(-tokens.stop // block_size)
    start = tokens.start - first * block_size
    return read(torch.tensor(table[first:end])).flatten(1, 2)[:, start : start + len(tokens)]


def _bias(low: Tensor, high: Tensor, keys: range, device: torch.device) -> Tensor | None:
    """0 where query i sees a key, low[i] <= key < high[i], else -inf, `[queries, keys]`; None if all see all."""
    key = torch.arange(keys.start, keys.stop)
    hidden = (key < low[:, None]) | (key >= high[:, None])
    if not hidden.any():
        return None
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden.to(device), NEG_INF)
