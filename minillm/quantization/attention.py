"""Attention over quantised keys and values that lie in blocks, in PyTorch: the twin of the Triton kernels.

A tile of codes is decoded, folded into the online softmax (`tiled.OnlineSoftmax`) and forgotten, so that the cache
never exists in more bits than it is stored in. To decode all of it before each step would save memory and cost time.

Every token is written first and read back as it is stored, by the query of the same token too. So what a query sees
follows from positions alone, however a sequence is cut into steps.

Loses: on a CPU, to the same attention without quantisation. Decoding is a handful of operators over each tile, and
nothing reads codes faster than a matrix product reads bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from minillm.attention.metadata import AttentionMetadata
from minillm.attention.reference import NEG_INF
from minillm.attention.tiled import KV_TILE, Q_TILE, OnlineSoftmax
from minillm.quantization.formats import decode

Decode = Callable[..., Tensor]  # (codes, *ranges) -> numbers in float32


def prepare(metadata: AttentionMetadata, group: int) -> AttentionMetadata:
    """What `quantized_attention` wants to know of a step: nothing more than it says already."""
    return metadata


def quantized_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    decode: Decode = decode,
) -> Tensor:
    """Packed attention, causal and bottom-right aligned: q `[num_tokens, heads, d]` -> like q.

    keys, values: codes and ranges of one layer, each `[kv_heads, num_blocks, block_size, …]`; see
    `minillm.quantization.formats`.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    starts = accumulate(metadata.q_lens, initial=0)
    for start, q_len, kv_len, table in zip(starts, metadata.q_lens, metadata.kv_lens, metadata.tables, strict=False):
        if q_len:
            rows = slice(start, start + q_len)
            tiles = _Tiles(keys, values, decode, table, kv_len, sliding_window)
            tiles.attend(q[rows], out[rows], scale)
    return out


class _Tiles:
    """The keys and values of one sequence, decoded tile by tile."""

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        decode: Decode,
        table: Sequence[int],
        kv_len: int,
        sliding_window: int | None,
    ) -> None:
        self.keys, self.values, self.decode = keys, values, decode
        self.table = torch.tensor(table, dtype=torch.int64, device=keys[0].device)
        self.kv_len, self.window = kv_len, sliding_window
        self.block_size = keys[0].shape[2]
        self.size = max(1, KV_TILE // self.block_size) * self.block_size  # of a tile: blocks are decoded whole

    def attend(self, q: Tensor, out: Tensor, scale: float) -> None:
        """Queries in tiles, and for each of them the tiles of keys that one of its queries sees."""
        q_len, kv_heads = len(q), len(self.keys[0])
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        softmax = OnlineSoftmax(q, kv_heads, min(Q_TILE, q_len), min(self.size, max(self.kv_len, 1)))
        for first in range(0, q_len, Q_TILE):
            rows = slice(first, min(first + Q_TILE, q_len))
            position = torch.arange(rows.start, rows.stop) + self.kv_len - q_len
            softmax.begin(q[rows], scale)
            for tokens in self._visible(position):
                k, v = (self._read(stored, tokens).to(q.dtype) for stored in (self.keys, self.values))
                softmax.fold(k, v, self._bias(position, tokens, q.device))
            softmax.finish(out[rows], lse[rows])

    def _visible(self, position: Tensor) -> Iterator[range]:
        """Tiles of the keys that a query at one of these positions sees; they begin where blocks do."""
        end = int(position[-1]) + 1
        oldest = 0 if self.window is None else max(0, int(position[0]) - self.window + 1)
        for start in range(oldest // self.block_size * self.block_size, end, self.size):
            yield range(max(start, oldest), min(start + self.size, end))

    def _read(self, stored: Sequence[Tensor], tokens: range) -> Tensor:
        """These tokens, `[kv_heads, len(tokens), d]`: the blocks that hold them, decoded and cut to size.

        What lies after a sequence's last token is never looked at: it may be NaN.
        """
        first, end = tokens.start // self.block_size, -(-tokens.stop // self.block_size)
        parts = (as_bytes(part).index_select(1, self.table[first:end]).view(part.dtype) for part in stored)
        start = tokens.start - first * self.block_size
        return self.decode(*parts).flatten(1, 2)[:, start : start + len(tokens)]

    def _bias(self, position: Tensor, tokens: range, device: torch.device) -> Tensor | None:
        """0 where a query sees a key, else -inf, `[queries, keys]`; None if all see all."""
        key = torch.arange(tokens.start, tokens.stop)
        hidden = key > position[:, None]
        if self.window is not None:
            hidden |= key <= position[:, None] - self.window
        if not hidden.any():
            return None
        return torch.zeros(hidden.shape, device=device).masked_fill_(hidden.to(device), NEG_INF)


def as_bytes(x: Tensor) -> Tensor:
    """Codes as plain bytes: many operators do not know float8."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x
