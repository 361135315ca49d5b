"""Decoding on a GPU: split-KV attention (Flash-Decoding, 2023) in Triton.

A decode step has one query per sequence: with a batch of 1 and 8 key/value heads there are 8 programs for 132
multiprocessors, and a program alone cannot draw the memory's bandwidth. So the keys are split as well: each program
attends to one part of them, and a second kernel merges the parts by their log-sum-exp.

All query heads of a group, and all queries of a verification, are rows of one tile: keys and values are read once.
Loses: for long queries, where the rows of the tile would not fit and keys need no splitting; that is `triton_prefill`.
"""

# ruff: noqa: E741
# mypy: disable-error-code="no-untyped-def,arg-type,var-annotated"
from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import e, log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.attention.metadata import AttentionMetadata
from minillm.kernels.gpu.tiles import INTERPRETED, NO_WINDOW, Share, Stored, attend_keys, finish, tile_edge

MAX_ROWS = 64  # queries · heads per group that the decode kernel takes in one tile
MAX_SPLITS = 128
KEYS_PER_SPLIT = 256  # at least: a shorter part costs more to merge than it saves
CONFIGS = [
    triton.Config({"KEYS": keys}, num_warps=4, num_stages=stages) for keys, stages in ((64, 3), (32, 4), (128, 2))
]


@triton.autotune(CONFIGS[:1] if INTERPRETED else CONFIGS, key=["HEAD_DIM", "GROUP", "ROWS", "WINDOWED", "FORMAT"])
@triton.jit
def decode_kernel(
    q_ptr, k_ptr, k_low_ptr, k_high_ptr, v_ptr, v_low_ptr, v_high_ptr, parts_ptr, lses_ptr,
    sequences_ptr, tables_ptr, seq_lens_ptr, cu_seqlens_ptr,
    q_token, q_head, head_blocks, table_width, num_rows, scale_log2, window,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOWED: tl.constexpr,
    FORMAT: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid: (sequences, key/value heads, splits). A split without keys stores 0 and log-sum-exp -inf."""
    sequence = tl.load(sequences_ptr + tl.program_id(0))
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    start = tl.load(cu_seqlens_ptr + sequence)
    q_len = tl.load(cu_seqlens_ptr + sequence + 1) - start
    kv_len = tl.load(seq_lens_ptr + sequence)

    row = tl.arange(0, ROWS)
    query, head = row // GROUP, kv_head * GROUP + row % GROUP
    offset = kv_len - q_len
    oldest = 0
    if WINDOWED:
        oldest = tl.maximum(0, offset - window + 1)
    share = tl.cdiv(tl.cdiv(kv_len - oldest, tl.num_programs(2)), KEYS) * KEYS
    lo = oldest + split * share
    hi = tl.minimum(lo + share, kv_len)

    dim = tl.arange(0, D)
    stored = (query < q_len)[:, None] & (dim < HEAD_DIM)[None, :]
    token = (start + query).to(tl.int64)
    # Q tile: 2 · group · d bytes that are there, once per program.
    q = tl.load(q_ptr + (token * q_token + head * q_head)[:, None] + dim[None, :], mask=stored, other=0.0)
    kv_head, sequence = kv_head.to(tl.int64), sequence.to(tl.int64)
    m, l, out = attend_keys(
        q, offset + query, offset, kv_len - 1, lo, hi,
        k_ptr, k_low_ptr, k_high_ptr, v_ptr, v_low_ptr, v_high_ptr,
        tables_ptr + sequence * table_width, kv_head * head_blocks, scale_log2, window,
        HEAD_DIM, BLOCK_SIZE, KEYS, WINDOWED, FORMAT, GROUPS,
    )  # fmt: skip
    out, lse = finish(m, l, out)
    place = split.to(tl.int64) * num_rows + token * (tl.num_programs(1) * GROUP) + head
    # Part: 4 · group · d bytes in float32, and read again by the merge; against 4 · share · d bytes of keys and values.
    tl.store(parts_ptr + place[:, None] * HEAD_DIM + dim[None, :], out, mask=stored)
    tl.store(lses_ptr + place, lse, mask=query < q_len)


@triton.jit
def merge_kernel(
    parts_ptr, lses_ptr, out_ptr, lse_ptr, sequences_ptr, cu_seqlens_ptr, num_rows, num_splits,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """Grid: (sequences, queries of the longest, heads). Joins the parts of a row by their log-sum-exps."""
    sequence = tl.load(sequences_ptr + tl.program_id(0))
    token = tl.load(cu_seqlens_ptr + sequence) + tl.program_id(1)
    if token >= tl.load(cu_seqlens_ptr + sequence + 1):
        return
    place = token.to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    split = tl.arange(0, MAX_SPLITS).to(tl.int64)
    # Log-sum-exps: 4 bytes per split.
    lses = tl.load(lses_ptr + split * num_rows + place, mask=split < num_splits, other=float("-inf"))
    largest = tl.max(lses, 0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp(lses - base), 0)
    divisor = tl.where(total > 0, total, 1.0)

    dim = tl.arange(0, D)
    out = tl.zeros([D], tl.float32)
    row = place
    for _ in range(num_splits):
        # One part of the row: 4 · d bytes.
        weight = tl.exp(tl.load(lses_ptr + row) - base) / divisor
        out += weight * tl.load(parts_ptr + row * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)
        row += num_rows
    tl.store(out_ptr + place * HEAD_DIM + dim, out.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)
    tl.store(lse_ptr + place, tl.where(total > 0, base + tl.log(divisor), float("-inf")))


def triton_decode(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    layout: AttentionMetadata,
    share: Share,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    num_splits: int | None = None,
) -> None:
    """Attention of the sequences in `share`, into their rows of `out` `[num_tokens, heads, d]` and `lse` (float32).

    q `[num_tokens, heads, d]`; at most MAX_ROWS / group queries per sequence. The lengths in `layout` that the kernels
    read are the device's; those of the host only bound the launch, so that a recorded launch can be replayed.
    """
    num_tokens, heads, d = q.shape
    stored = Stored.of(keys, values)
    group = heads // stored.kv_heads
    num_splits = num_splits or choose_splits(len(share.sequences) * stored.kv_heads, share.kv_len, q.device)
    parts = q.new_empty(num_splits, num_tokens, heads, d, dtype=torch.float32)
    lses = q.new_empty(num_splits, num_tokens, heads, dtype=torch.float32)
    decode_kernel[len(share.sequences), stored.kv_heads, num_splits](
        q, *stored.pointers, parts, lses,
        share.sequences, layout.block_tables, layout.seq_lens, layout.cu_seqlens_q,
        q.stride(0), q.stride(1), stored.head_blocks, layout.block_tables.stride(0), num_tokens * heads,
        scale * log2(e), NO_WINDOW if sliding_window is None else sliding_window,
        GROUP=group, HEAD_DIM=d, D=tile_edge(d), BLOCK_SIZE=stored.block_size,
        WINDOWED=sliding_window is not None, FORMAT=stored.format, GROUPS=stored.groups,
        ROWS=tile_edge(share.q_len * group),
    )  # fmt: skip
    merge_kernel[len(share.sequences), share.q_len, heads](
        parts, lses, out, lse, share.sequences, layout.cu_seqlens_q, num_tokens * heads, num_splits,
        HEAD_DIM=d, D=tile_edge(d), MAX_SPLITS=MAX_SPLITS,
    )  # fmt: skip


def choose_splits(programs: int, kv_len: int, device: torch.device) -> int:
    """Parts to split the keys into: enough for four programs per multiprocessor, none shorter than KEYS_PER_SPLIT."""
    wanted = triton.cdiv(4 * _multiprocessors(device), max(programs, 1))
    return max(1, min(wanted, triton.cdiv(kv_len, KEYS_PER_SPLIT), MAX_SPLITS))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
