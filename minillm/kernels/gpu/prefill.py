"""Prompts and chunks on a GPU: FlashAttention-2 in Triton, keys and values read through the block table.

One program computes a tile of rows of one sequence and one key/value head. A row is a (query, head of the group) pair:
packing the group into the tile reads each key once for all heads that share it.
Loses: with one query per sequence most rows of a tile are empty and few programs run; that is `triton_decode.py`.
"""

# ruff: noqa: E741
# mypy: disable-error-code="no-untyped-def,arg-type,var-annotated"
from __future__ import annotations

from collections.abc import Sequence
from math import e, log2

import triton
import triton.language as tl
from torch import Tensor

from minillm.attention.metadata import AttentionMetadata
from minillm.kernels.gpu.tiles import INTERPRETED, NO_WINDOW, Share, Stored, attend_keys, finish, tile_edge

CONFIGS = [
    triton.Config({"ROWS": rows, "KEYS": keys}, num_warps=warps, num_stages=stages)
    for rows, keys, warps, stages in ((64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 32, 4, 4))
]


@triton.autotune(CONFIGS[:1] if INTERPRETED else CONFIGS, key=["HEAD_DIM", "GROUP", "WINDOWED", "FORMAT", "LONG"])
@triton.jit
def prefill_kernel(
    q_ptr, k_ptr, k_low_ptr, k_high_ptr, v_ptr, v_low_ptr, v_high_ptr, out_ptr, lse_ptr,
    sequences_ptr, tables_ptr, seq_lens_ptr, cu_seqlens_ptr,
    q_token, q_head, head_blocks, table_width, scale_log2, window,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOWED: tl.constexpr,
    FORMAT: tl.constexpr, GROUPS: tl.constexpr,
    LONG: tl.constexpr,  # nothing but a key of the autotuner: a tile that suits 8000 queries does not suit 50
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of the longest sequence, sequences, key/value heads). Tiles behind a sequence's end return."""
    sequence = tl.load(sequences_ptr + tl.program_id(1))
    kv_head = tl.program_id(2)
    start = tl.load(cu_seqlens_ptr + sequence)
    q_len = tl.load(cu_seqlens_ptr + sequence + 1) - start
    kv_len = tl.load(seq_lens_ptr + sequence)
    # The last tiles see the most keys: they start first, so that no long program is left alone at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    if tile * ROWS >= q_len * GROUP:
        return

    row = tile * ROWS + tl.arange(0, ROWS)
    query, head = row // GROUP, kv_head * GROUP + row % GROUP
    offset = kv_len - q_len  # position of query 0: the causal triangle is aligned bottom-right
    first = offset + tile * ROWS // GROUP
    last = offset + (tl.minimum(tile * ROWS + ROWS, q_len * GROUP) - 1) // GROUP

    dim = tl.arange(0, D)
    stored = (query < q_len)[:, None] & (dim < HEAD_DIM)[None, :]
    token = (start + query).to(tl.int64)
    # Q tile: 2 · ROWS · d bytes, once per program.
    q = tl.load(q_ptr + (token * q_token + head * q_head)[:, None] + dim[None, :], mask=stored, other=0.0)
    kv_head, sequence = kv_head.to(tl.int64), sequence.to(tl.int64)
    m, l, out = attend_keys(
        q, offset + query, first, last, 0, kv_len,
        k_ptr, k_low_ptr, k_high_ptr, v_ptr, v_low_ptr, v_high_ptr,
        tables_ptr + sequence * table_width, kv_head * head_blocks, scale_log2, window,
        HEAD_DIM, BLOCK_SIZE, KEYS, WINDOWED, FORMAT, GROUPS,
    )  # fmt: skip
    out, lse = finish(m, l, out)
    place = token * (tl.num_programs(2) * GROUP) + head  # row of out [num_tokens, heads, d] and lse [num_tokens, heads]
    # Output tile: as many bytes as Q, written once; the log-sum-exp 4 bytes per row.
    tl.store(out_ptr + place[:, None] * HEAD_DIM + dim[None, :], out.to(out_ptr.dtype.element_ty), mask=stored)
    tl.store(lse_ptr + place, lse, mask=query < q_len)


def triton_prefill(
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
) -> None:
    """Attention of the sequences in `share`, into their rows of `out` `[num_tokens, heads, d]` and `lse` (float32).

    q `[num_tokens, heads, d]` may have any strides between tokens and heads; out and lse are contiguous.
    """
    _, heads, d = q.shape
    stored = Stored.of(keys, values)
    group = heads // stored.kv_heads

    def grid(config: dict[str, int]) -> tuple[int, int, int]:
        return triton.cdiv(share.q_len * group, config["ROWS"]), len(share.sequences), stored.kv_heads

    prefill_kernel[grid](
        q, *stored.pointers, out, lse,
        share.sequences, layout.block_tables, layout.seq_lens, layout.cu_seqlens_q,
        q.stride(0), q.stride(1), stored.head_blocks, layout.block_tables.stride(0),
        scale * log2(e), NO_WINDOW if sliding_window is None else sliding_window,
        GROUP=group, HEAD_DIM=d, D=tile_edge(d), BLOCK_SIZE=stored.block_size,
        WINDOWED=sliding_window is not None, FORMAT=stored.format, GROUPS=stored.groups,
        LONG=share.q_len >= 1024,
    )  # fmt: skip
