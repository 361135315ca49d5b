"""The keys of blocks that are not complete yet, as the model made them.

A format with a range per channel can quantise a block of keys when all of them are there, not before. Until then, and
in the step that completes it, the block has a *tail*: room for its keys in the model's dtype. See
`minillm.quantization.attention` for who reads what.

A step writes its keys into tails and quantises the blocks that it completes. Afterwards a tail is of use only to a
running sequence that goes on in the middle of that block. That may be a block which the step had completed, with
guesses that were rejected: the tail is still there, and its keys come in anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.attention import AttentionMetadata
from minillm.cache.blocks import DUMMY_BLOCK, ensure
from minillm.errors import ConfigError
from minillm.quantization.attention import Tails


@dataclass(frozen=True)
class TailStep:
    """Where the keys of one step go, before they are quantised and if they are."""

    layout: AttentionMetadata  # the step's, with tails in the place of blocks
    tails: Tensor  # [n] int64: those that the step completes …
    blocks: Tensor  # [n] int64: … and the blocks that they become


class TailPool:
    """`num_tails` tails for each layer, `[kv_heads, num_tails, block_size, d]`, and which block has which of them.

    Tail 0 belongs to the dummy block.
    """

    def __init__(
        self, num_layers: int, shape: tuple[int, int, int, int], *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(num_layers)]
        self.block_size = shape[2]
        self._tails = {DUMMY_BLOCK: 0}
        self._free = list(range(1, shape[1]))

    @property
    def num_used(self) -> int:
        """Tails that belong to a block, the dummy's aside."""
        return len(self._tails) - 1

    @property
    def num_bytes(self) -> int:
        """What all tails of all layers occupy, used or not."""
        return sum(keys.nbytes for keys in self.keys)

    def __contains__(self, block: int) -> bool:
        return block in self._tails

    def keep(self, blocks: Iterable[int]) -> None:
        """Take back the tails of all other blocks. Raises `AssertionError` if one of these has none: keys are lost."""
        kept = {DUMMY_BLOCK, *blocks}
        ensure(kept <= self._tails.keys(), f"blocks {kept - self._tails.keys()}, to be gone on in, have tails")
        for block in self._tails.keys() - kept:
            self._free.append(self._tails.pop(block))

    def copy(self, copies: list[tuple[int, int]]) -> None:
        """Give copies of blocks, (source, target), their own tails. All sources are read before any is written."""
        tailed = [(source, target) for source, target in copies if source in self._tails]
        if not tailed:
            return
        sources = torch.tensor([self._tails[source] for source, _ in tailed])
        targets = torch.tensor([self._tail(target) for _, target in tailed])
        for keys in self.keys:
            keys.index_copy_(1, targets.to(keys.device), keys.index_select(1, sources.to(keys.device)))

    def begin(self, layout: AttentionMetadata) -> TailStep:
        """A tail for every block that the step writes to."""
        tables, complete = [], list[tuple[int, int]]()
        for table, q_len, kv_len in zip(layout.tables, layout.q_lens, layout.kv_lens, strict=True):
            first = max(0, kv_len - q_len) // self.block_size if q_len else len(table)
            written = [(self._tail(block), block) for block in table[first:]]
            complete += written[: max(0, kv_len // self.block_size - first)]
            tables.append([0] * first + [tail for tail, _ in written])
        device = layout.slot_mapping.device
        tails, blocks = torch.tensor(complete, dtype=torch.int64, device=device).view(-1, 2).unbind(1)
        parts = (layout.q_lens, layout.kv_lens)
        return TailStep(
            AttentionMetadata.build(tables, *parts, block_size=self.block_size, device=device), tails, blocks
        )

    def write(self, layer: int, k: Tensor, step: TailStep) -> Tails:
        """Store the step's keys `[num_tokens, kv_heads, d]`; the layer's tails, to be read."""
        keys = self.keys[layer]
        keys.flatten(1, 2).index_copy_(1, step.layout.slot_mapping, k.transpose(0, 1))
        return Tails(keys, step.layout)

    def _tail(self, block: int) -> int:
        if block not in self._tails:
            if not self._free:
                raise ConfigError(f"All {self.num_used} tails are in use. Raise num_tails, or `keep` fewer blocks.")
            self._tails[block] = self._free.pop()
        return self._tails[block]
