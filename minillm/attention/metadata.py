"""Where each token of a packed batch stands: made once per step, read by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from minillm.errors import ConfigError


@dataclass(frozen=True)
class Span:
    """One sequence of a packed batch: which of the packed queries are its own, and where its keys lie."""

    index: int  # of the sequence in the batch
    queries: slice
    kv_len: int
    table: list[int]
    block_size: int

    @property
    def q_len(self) -> int:
        return self.queries.stop - self.queries.start

    @cached_property
    def adjacent(self) -> bool:
        """Whether its blocks are neighbours, in order: then its keys need not be gathered."""
        return not self.table or self.table == list(range(self.table[0], self.table[0] + len(self.table)))

    @cached_property
    def slots(self) -> slice | Tensor:
        """Of its keys, in order: a slice if the blocks are neighbours, else `[kv_len]` int64."""
        if self.adjacent:
            first = self.table[0] * self.block_size if self.table else 0
            return slice(first, first + self.kv_len)
        starts = torch.tensor(self.table)[:, None] * self.block_size
        return (starts + torch.arange(self.block_size)).flatten()[: self.kv_len]


@dataclass(frozen=True)
class AttentionMetadata:
    """The packed batch: block tables and lengths for the device, the lengths once more for the host.

    A slot is `block * block_size + offset`. Block 0 is the dummy block that no sequence owns: tokens before position 0
    are padding (`q_len > kv_len`), and their K and V go there.
    """

    block_size: int
    block_tables: Tensor  # [num_seqs, max_blocks] int32, unused entries 0
    seq_lens: Tensor  # [num_seqs] int32: keys of each sequence after this step's write
    cu_seqlens_q: Tensor  # [num_seqs + 1] int32: where each sequence's queries begin
    slot_mapping: Tensor  # [num_tokens] int64: where each new token's K and V go
    q_lens: tuple[int, ...]  # on the host, so that no layer waits for the device
    kv_lens: tuple[int, ...]
    tables: tuple[list[int], ...]  # the blocks that each sequence really uses
    memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # what a backend derives once a step

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
        """Lay out sequences with these block tables, new tokens (`q_lens`) and tokens in all (`kv_lens`).

        A table may be longer than its sequence needs; one that is too short raises `ConfigError`.
        """
        tables = tuple(_used_blocks(*one, block_size) for one in zip(block_tables, kv_lens, strict=True))
        slots = [
            _slot(table, position, block_size)
            for table, q_len, kv_len in zip(tables, q_lens, kv_lens, strict=True)
            for position in range(kv_len - q_len, kv_len)
        ]
        width = max(map(len, tables), default=0)
        padded = [[*table, *[0] * (width - len(table))] for table in tables]
        return cls(
            block_size=block_size,
            block_tables=torch.tensor(padded, dtype=torch.int32, device=device).view(len(tables), width),
            seq_lens=torch.tensor(kv_lens, dtype=torch.int32, device=device),
            cu_seqlens_q=torch.tensor([0, *accumulate(q_lens)], dtype=torch.int32, device=device),
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
            q_lens=tuple(q_lens),
            kv_lens=tuple(kv_lens),
            tables=tables,
        )

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Every sequence that has queries, in order."""
        starts = accumulate(self.q_lens, initial=0)
        sequences = zip(starts, self.q_lens, self.kv_lens, self.tables, strict=False)
        return tuple(
            Span(index, slice(start, start + q_len), kv_len, table, self.block_size)
            for index, (start, q_len, kv_len, table) in enumerate(sequences)
            if q_len
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
