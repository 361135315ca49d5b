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

from minillm.attention.metadata import AttentionMetadata

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LN2 = tl.constexpr(0.6931471805599453)
FORMATS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8", torch.uint8: "int4"}  # by the type of the codes
NO_WINDOW = 2**30  # positions stay below it, so a window this wide hides nothing


@triton.jit
def attend_keys(
    q,  # [ROWS, D] query heads of one key/value head, D = d rounded up to a power of two
    position,  # [ROWS] of the token behind each row
    first,  # smallest and largest of these positions
    last,
    lo,  # the keys lo <= key < hi
    hi,
    k_ptr,  # keys or their codes, low and high ends of their ranges: see `Stored`
    k_low_ptr,
    k_high_ptr,
    v_ptr,  # values likewise
    v_low_ptr,
    v_high_ptr,
    table,  # block table of this sequence
    head_block,  # of this head, its first block in a pool
    scale_log2,  # softmax scale · log2(e): scores in units of log 2, because exp2 is one instruction
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUPS: tl.constexpr,  # ranges per token, in int4
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
            q, m, l, out, position, lo, inner_lo,
            k_ptr, k_low_ptr, k_high_ptr, v_ptr, v_low_ptr, v_high_ptr, table,
            head_block, scale_log2, window, HEAD_DIM, BLOCK_SIZE, KEYS, WINDOWED, True, FORMAT, GROUPS,
        )  # fmt: skip
    inner_hi = inner_lo + tl.maximum(tl.minimum(hi, first + 1) - inner_lo, 0) // KEYS * KEYS
    m, l, out = _fold(
        q, m, l, out, position, inner_lo, inner_hi,
        k_ptr, k_low_ptr, k_high_ptr, v_ptr, v_low_ptr, v_high_ptr, table,
        head_block, scale_log2, window, HEAD_DIM, BLOCK_SIZE, KEYS, WINDOWED, False, FORMAT, GROUPS,
    )  # fmt: skip
    m, l, out = _fold(
        q, m, l, out, position, inner_hi, hi,
        k_ptr, k_low_ptr, k_high_ptr, v_ptr, v_low_ptr, v_high_ptr, table,
        head_block, scale_log2, window, HEAD_DIM, BLOCK_SIZE, KEYS, WINDOWED, True, FORMAT, GROUPS,
    )  # fmt: skip
    return m, l, out


@triton.jit
def _fold(
    q, m, l, out, position, lo, hi, k_ptr, k_low_ptr, k_high_ptr, v_ptr, v_low_ptr, v_high_ptr,
    table, head_block, scale_log2, window,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr,
    FORMAT: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Fold the keys lo..hi into (m, l, out), KEYS at a time; without MASKED every row sees all of them.

    A scale per token leaves the sum over channels, q · (step · code) = step · (q · code): codes are multiplied as they
    are, and the step is multiplied with a score or a weight. Several ranges per token (int4) do not: those are decoded.
    """
    dim = tl.arange(0, q.shape[1])
    for start in range(lo, hi, KEYS):
        key = start + tl.arange(0, KEYS)
        inside = key < hi
        # Block table: 4 bytes per key, the same word for all keys of a block. Block · block bytes passes 2³¹: int64.
        block = head_block + tl.load(table + key // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        token = block * BLOCK_SIZE + key % BLOCK_SIZE
        loaded = inside[:, None] & (dim < HEAD_DIM)[None, :]
        # K tile: 2 · KEYS · d bytes from memory, used by all rows: 16 KiB for 64 keys of d = 128. 8 bits: half of it.
        k = _load(k_ptr, k_low_ptr, k_high_ptr, token, dim, loaded, HEAD_DIM, FORMAT, GROUPS)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale_log2
        if FORMAT == "int8" or FORMAT == "fp8":
            scores *= _step(k_high_ptr, token, inside, FORMAT)[None, :]
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
        out *= rescale[:, None]
        # V tile: as many bytes as K.
        v = _load(v_ptr, v_low_ptr, v_high_ptr, token, dim, loaded, HEAD_DIM, FORMAT, GROUPS).to(q.dtype)
        if FORMAT == "int8" or FORMAT == "fp8":
            weights *= _step(v_high_ptr, token, inside, FORMAT)[None, :]
        out = tl.dot(weights.to(v.dtype), v, out, input_precision="ieee")
        m = m_new
    return m, l, out


@triton.jit
def _load(
    ptr, low_ptr, high_ptr, token, dim, loaded, HEAD_DIM: tl.constexpr, FORMAT: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """Rows `token` of a pool, [KEYS, D]: numbers, or codes of 8 bits that are still to be multiplied with a step.

    float8 comes as bytes, because Triton knows e4m3 only from sm_89 on. Its 4 bits of exponent and 3 of mantissa, put
    where float16 has its own, are the number divided by 2⁸, exactly and whatever the GPU.
    """
    if FORMAT == "int4":  # two channels share a byte, and each fetches it: the second time from the L1 cache
        half: tl.constexpr = HEAD_DIM // 2
        byte = tl.load(ptr + token[:, None] * half + (dim % half)[None, :], mask=loaded, other=0)
        code = (byte >> (dim // half * 4)[None, :]) & 15
        # Ranges: 4 · groups bytes per key, the same two words for all channels of a group, from the L1 cache too.
        group: tl.constexpr = (HEAD_DIM + GROUPS - 1) // GROUPS
        place = token[:, None] * GROUPS + (dim // group)[None, :]
        low = tl.load(low_ptr + place, mask=loaded, other=0.0).to(tl.float32)
        high = tl.load(high_ptr + place, mask=loaded, other=0.0).to(tl.float32)
        numbers = low + code.to(tl.float32) * ((high - low) / 15)
    else:
        numbers = tl.load(ptr + token[:, None] * HEAD_DIM + dim[None, :], mask=loaded, other=0)
    if FORMAT == "fp8":
        bits = numbers.to(tl.uint16)
        numbers = ((bits & 0x80) << 8 | (bits & 0x7F) << 7).to(tl.float16, bitcast=True)
    return numbers


@triton.jit
def _step(scale_ptr, token, inside, FORMAT: tl.constexpr):
    """What a code of 1 stands for in int8 and fp8, for each key: float32 [KEYS]."""
    scale = tl.load(scale_ptr + token, mask=inside, other=0.0).to(tl.float32)
    return scale / (127.0 if FORMAT == "int8" else 448.0 / 256)


@triton.jit
def finish(m, l, out):
    """Divide by the sum and give the natural log-sum-exp; a row without keys becomes 0 and -inf."""
    seen = l > 0
    divisor = tl.where(seen, l, 1.0)
    return out / divisor[:, None], tl.where(seen, (m + tl.log2(divisor)) * LN2, float("-inf"))


class Stored(NamedTuple):
    """Where keys and values lie and in which format: the cache's part of a launch."""

    format: str  # "plain", "int8", "fp8" or "int4"
    pointers: tuple[Tensor, ...]  # keys, their low and high ends; values, low, high
    head_blocks: int  # blocks per head
    kv_heads: int
    block_size: int
    groups: int  # ranges per token: 1, but for int4

    @classmethod
    def of(cls, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Stored:
        """Pools `[kv_heads, num_blocks, block_size, d]` in the model's dtype, or codes and the ends of their ranges."""
        (k, *k_range), (v, *v_range) = _parts(keys), _parts(values)
        name = FORMATS.get(k.dtype, "plain")
        if name == "fp8":
            k, v = k.view(torch.uint8), v.view(torch.uint8)
        groups = k_range[0].shape[3] if name == "int4" else 1
        return cls(name, (k, *k_range, v, *v_range), k.stride(0) // k.stride(1), len(k), k.shape[2], groups)


def _parts(stored: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, low and high. A scale is both of its ends; numbers that are no codes have none."""
    codes, *ends = stored
    return codes, (ends or [codes])[0], (ends or [codes])[-1]


class Share(NamedTuple):
    """The sequences of a batch that one kernel takes, and how long they are at most: the host's part of a launch."""

    sequences: Tensor  # int32, indices of sequences, on the device
    q_len: int
    kv_len: int

    @classmethod
    def of(cls, layout: AttentionMetadata, sequences: Sequence[int]) -> Share:
        return cls(
            torch.tensor(sequences, dtype=torch.int32, device=layout.seq_lens.device),
            max((layout.q_lens[i] for i in sequences), default=0),
            max((layout.kv_lens[i] for i in sequences), default=0),
        )


def tile_edge(n: int) -> int:
    """Edges of Triton's tiles are powers of two, and at least 16 where a matrix product needs them."""
    return max(16, int(triton.next_power_of_2(n)))
