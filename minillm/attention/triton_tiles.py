"""The part that both Triton kernels share: the online softmax over one range of keys, read through the block table.

Byte counts in comments are for 2-byte elements; d is the head size.
"""

# ruff: noqa: E741
# mypy: disable-error-code="no-untyped-def,arg-type,var-annotated"
from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.attention.layout import PagedLayout

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LN2 = tl.constexpr(0.6931471805599453)
NO_WINDOW = 2**30  # positions stay below it, so a window this wide hides nothing


@triton.jit
def attend_keys(
    q,  # [ROWS, D] query heads of one key/value head, D = d rounded up to a power of two
    position,  # [ROWS] of the token behind each row
    first,  # smallest and largest of these positions
    last,
    lo,  # the keys lo <= key < hi
    hi,
    k_head,  # start of this head in its pool
    v_head,
    table,  # block table of this sequence
    scale_log2,  # softmax scale · log2(e): scores in units of log 2, because exp2 is one instruction
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Running maximum m, sum l and output over the keys lo..hi, in the order: window's edge, inside, causal edge.

    Only edges pay for a mask. Tiles wholly outside the causal rule or the window are not visited.
    """
    m = tl.full([q.shape[0]], float("-inf"), tl.float32)
    l = tl.zeros([q.shape[0]], tl.float32)
    out = tl.zeros([q.shape[0], q.shape[1]], tl.float32)
    hi = tl.minimum(hi, last + 1)
    inner_lo = lo
    if WINDOWED:
        lo = tl.maximum(lo, first - window + 1)
        inner_lo = tl.minimum(hi, lo + tl.cdiv(tl.maximum(last - window + 1 - lo, 0), KEYS) * KEYS)
        m, l, out = _fold(
            q, m, l, out, position, lo, inner_lo, k_head, v_head, table, scale_log2, window,
            HEAD_DIM, BLOCK_SIZE, KEYS, WINDOWED, True,
        )  # fmt: skip
    inner_hi = inner_lo + tl.maximum(tl.minimum(hi, first + 1) - inner_lo, 0) // KEYS * KEYS
    m, l, out = _fold(
        q, m, l, out, position, inner_lo, inner_hi, k_head, v_head, table, scale_log2, window,
        HEAD_DIM, BLOCK_SIZE, KEYS, WINDOWED, False,
    )  # fmt: skip
    m, l, out = _fold(
        q, m, l, out, position, inner_hi, hi, k_head, v_head, table, scale_log2, window,
        HEAD_DIM, BLOCK_SIZE, KEYS, WINDOWED, True,
    )  # fmt: skip
    return m, l, out


@triton.jit
def _fold(
    q, m, l, out, position, lo, hi, k_head, v_head, table, scale_log2, window,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold the keys lo..hi into (m, l, out), KEYS at a time; without MASKED every row sees all of them."""
    dim = tl.arange(0, q.shape[1])
    for start in range(lo, hi, KEYS):
        key = start + tl.arange(0, KEYS)
        inside = key < hi
        # Block table: 4 bytes per key, the same word for all keys of a block. Block · block bytes passes 2³¹: int64.
        block = tl.load(table + key // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        token = (block * BLOCK_SIZE + key % BLOCK_SIZE) * HEAD_DIM
        loaded = inside[:, None] & (dim < HEAD_DIM)[None, :]
        # K tile: 2 · KEYS · d bytes from memory, used by all rows: 16 KiB for 64 keys of d = 128.
        k = tl.load(k_head + token[:, None] + dim[None, :], mask=loaded, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        if MASKED:
            seen = inside[None, :] & (key[None, :] <= position[:, None])
            if WINDOWED:
                seen = seen & (key[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key yet: -inf - (-inf) would be NaN
        rescale = tl.exp2(m - base)
        weights = tl.exp2(scores - base[:, None])
        l = l * rescale + tl.sum(weights, 1)
        # V tile: 2 · KEYS · d bytes, as K.
        v = tl.load(v_head + token[:, None] + dim[None, :], mask=loaded, other=0.0)
        out = tl.dot(weights.to(v.dtype), v, out * rescale[:, None], input_precision="ieee")
        m = m_new
    return m, l, out


@triton.jit
def finish(m, l, out):
    """Divide by the sum and give the natural log-sum-exp; a row without keys becomes 0 and -inf."""
    seen = l > 0
    divisor = tl.where(seen, l, 1.0)
    return out / divisor[:, None], tl.where(seen, (m + tl.log2(divisor)) * LN2, float("-inf"))


class Share(NamedTuple):
    """The sequences of a batch that one kernel takes, and how long they are at most: the host's part of a launch."""

    sequences: Tensor  # int32, indices of sequences, on the device
    q_len: int
    kv_len: int

    @classmethod
    def of(cls, layout: PagedLayout, sequences: Sequence[int]) -> Share:
        return cls(
            torch.tensor(sequences, dtype=torch.int32, device=layout.seq_lens.device),
            max((layout.q_lens[i] for i in sequences), default=0),
            max((layout.kv_lens[i] for i in sequences), default=0),
        )


def tile_edge(n: int) -> int:
    """Edges of Triton's tiles are powers of two, and at least 16 where a matrix product needs them."""
    return max(16, int(triton.next_power_of_2(n)))
