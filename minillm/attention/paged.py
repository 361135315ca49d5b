"""Attention over a packed batch whose keys and values live in blocks.

Prefill, chunk, decode and verify are one case with different query lengths: each sequence's queries are the last
`q_len` of its `kv_len` tokens. K and V of the new tokens are written first, then everything is read through the block
table. A contiguous cache is the special case of one long block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.attention.contiguous import attention
from minillm.errors import ConfigError


@dataclass(frozen=True)
class PagedLayout:
    """Where each token of a packed batch stands: made once per step, read by every layer.

    A slot is `block * block_size + offset`. Block 0 is the dummy block: no sequence owns it, and tokens before
    position 0 (padding: `kv_len < q_len`) are written there.
    """

    block_size: int
    block_tables: Tensor  # [num_seqs, max_blocks] int32, unused entries 0
    seq_lens: Tensor  # [num_seqs] int32: keys of each sequence after this step's write
    cu_seqlens_q: Tensor  # [num_seqs + 1] int32: where each sequence's queries begin in the packed batch
    slot_mapping: Tensor  # [num_tokens] int64: where each new token's K and V go
    q_lens: tuple[int, ...]  # the same on the host, so that no layer has to wait for the device
    kv_lens: tuple[int, ...]
    blocks: tuple[Tensor, ...]  # per sequence the ids of the blocks it really uses, int64

    @classmethod
    def build(
        cls,
        block_tables: Sequence[Sequence[int]],
        q_lens: Sequence[int],
        kv_lens: Sequence[int],
        *,
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> PagedLayout:
        """Lay out sequences with these block tables, new tokens (`q_lens`) and total tokens (`kv_lens`).

        Tables may be longer than the sequence needs; a table that is too short raises `ConfigError`.
        """
        used = [_used_blocks(*sequence, block_size) for sequence in zip(block_tables, kv_lens, strict=True)]
        slots = [
            _slot(table, position, block_size)
            for table, q_len, kv_len in zip(used, q_lens, kv_lens, strict=True)
            for position in range(kv_len - q_len, kv_len)
        ]
        width = max(map(len, used), default=0)
        padded = [[*table, *[0] * (width - len(table))] for table in used]
        starts = torch.tensor([0, *q_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(
            block_size=block_size,
            block_tables=torch.tensor(padded, dtype=torch.int32, device=device).view(len(used), width),
            seq_lens=torch.tensor(kv_lens, dtype=torch.int32, device=device),
            cu_seqlens_q=starts.to(device),
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
            q_lens=tuple(q_lens),
            kv_lens=tuple(kv_lens),
            blocks=tuple(torch.tensor(table, dtype=torch.int64, device=device) for table in used),
        )


def _used_blocks(table: Sequence[int], kv_len: int, block_size: int) -> list[int]:
    needed = -(-kv_len // block_size)
    if len(table) < needed:
        raise ConfigError(
            f"A block table of {len(table)} blocks of {block_size} cannot hold {kv_len} tokens; {needed} blocks are "
            "needed. Allocate blocks before packing the batch."
        )
    return list(table[:needed])


def _slot(table: Sequence[int], position: int, block_size: int) -> int:
    """Slot of a token; padding (position < 0) spreads over the dummy block."""
    block = table[position // block_size] if position >= 0 else 0
    return block * block_size + position % block_size


def write_kv(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, layout: PagedLayout) -> None:
    """Store k and v `[num_tokens, kv_heads, d]` in the pools `[kv_heads, num_blocks, block_size, d]`, slot by slot."""
    k_pool.flatten(1, 2).index_copy_(1, layout.slot_mapping, k.transpose(0, 1))
    v_pool.flatten(1, 2).index_copy_(1, layout.slot_mapping, v.transpose(0, 1))


def paged_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    layout: PagedLayout,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    """Attention of a packed batch: q `[num_tokens, heads, d]` over pools `[kv_heads, num_blocks, block_size, d]`."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    start = 0
    for q_len, kv_len, blocks in zip(layout.q_lens, layout.kv_lens, layout.blocks, strict=True):
        k = k_pool.index_select(1, blocks).flatten(1, 2)[:, :kv_len]
        v = v_pool.index_select(1, blocks).flatten(1, 2)[:, :kv_len]
        end = start + q_len
        out[start:end] = attention(q[start:end], k, v, scale=scale, sliding_window=sliding_window)
        start = end
    return out
