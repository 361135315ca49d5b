"""Where each token of a packed batch stands: made once per step, read by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minillm.errors import ConfigError


@dataclass(frozen=True, eq=False)
class AttentionMetadata:
    """The packed batch: block tables and lengths for the device, the lengths once more for the host.

    A slot is `block * block_size + offset`. Block 0 is the dummy block that no request owns: tokens before position 0
    are padding (`q_len > kv_len`), and their K and V go there. Backends may add to it what all layers share.
    """

    block_size: int
    block_tables: Tensor  # [num_reqs, max_blocks] int32, unused entries 0
    seq_lens: Tensor  # [num_reqs] int32: keys of each request after this step's write
    cu_seqlens_q: Tensor  # [num_reqs + 1] int32: where each request's queries begin
    slot_mapping: Tensor  # [num_tokens] int64: where each new token's K and V go
    q_lens: tuple[int, ...]  # on the host, so that no layer waits for the device
    kv_lens: tuple[int, ...]
    tables: np.ndarray  # block_tables, on the host

    @classmethod
    def build(
        cls,
        block_tables: Sequence[Sequence[int]],
        q_lens: Sequence[int],
        kv_lens: Sequence[int],
        *,
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> AttentionMetadata:
        """Lay out requests with these block tables, new tokens (`q_lens`) and tokens in all (`kv_lens`).

        A table may be longer than its request needs; one that is too short raises `ConfigError`. Tables are copied
        as arrays, so that the cost on the host follows the new tokens and not the context.
        """
        tables = _pad(block_tables, kv_lens, block_size)
        ends = np.cumsum([0, *q_lens])
        row = np.repeat(np.arange(len(q_lens)), q_lens)
        position = np.arange(ends[-1]) - ends[row] + (np.asarray(kv_lens, np.int64) - np.asarray(q_lens, np.int64))[row]
        block = tables[row, np.maximum(position, 0) // block_size] if tables.size else np.zeros_like(position)
        slots = np.where(position < 0, 0, block) * block_size + position % block_size
        return cls(
            block_size=block_size,
            block_tables=torch.from_numpy(tables).to(device),
            seq_lens=torch.tensor(kv_lens, dtype=torch.int32, device=device),
            cu_seqlens_q=torch.from_numpy(ends.astype(np.int32)).to(device),
            slot_mapping=torch.from_numpy(slots.astype(np.int64)).to(device),
            q_lens=tuple(q_lens),
            kv_lens=tuple(kv_lens),
            tables=tables,
        )


def _pad(block_tables: Sequence[Sequence[int]], kv_lens: Sequence[int], block_size: int) -> np.ndarray:
    """The used beginnings of all tables, `[num_reqs, max_blocks]` int32, unused entries 0."""
    needed = [-(-kv_len // block_size) for kv_len in kv_lens]
    padded = np.zeros((len(needed), max(needed, default=0)), np.int32)
    for row, table, count in zip(padded, block_tables, needed, strict=True):
        if len(table) < count:
            short = f"A block table of {len(table)} blocks of {block_size} cannot hold {count * block_size} tokens"
            raise ConfigError(f"{short}. Allocate blocks before packing the batch.")
        row[:count] = table[:count]
    return padded
