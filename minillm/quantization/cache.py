"""The tensors behind the blocks when keys and values are quantised: the paged cache, with fewer bits."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from minillm.attention import AttentionMetadata, PagedAttention
from minillm.cache.paged import BlockTensors
from minillm.config import ModelConfig
from minillm.model.decoder import Attend
from minillm.quantization.formats import Format, QuantizedPool, as_bytes
from minillm.quantization.tails import TailPool, TailStep


class QuantizedCache(BlockTensors):
    """Keys and values of many sequences in a `kv_format`; otherwise as `PagedCache`.

    Formats that quantise keys by block also need `num_tails` tails (None: one per block, which always suffices), and
    to be told between two steps which blocks a sequence goes on in: `tails.keep`. `bytes_read` counts all keys as they
    are stored, those of the last block too.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: PagedAttention,
        kv_format: Format,
        *,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
        num_tails: int | None = None,
    ) -> None:
        self.attention = attention
        shape = (config.num_kv_heads, num_blocks, block_size, config.head_dim)
        self.keys = [QuantizedPool(kv_format.keys, shape, device) for _ in range(config.num_layers)]
        self.values = [QuantizedPool(kv_format.values, shape, device) for _ in range(config.num_layers)]
        tensors = [as_bytes(tensor) for pool in self.keys + self.values for tensor in pool.tensors]
        super().__init__(config, tensors, num_blocks=num_blocks, block_size=block_size)
        if kv_format.needs_tails:
            shape = (config.num_kv_heads, num_blocks if num_tails is None else num_tails, block_size, config.head_dim)
            self.tails = TailPool(config.num_layers, shape, device=device, dtype=dtype)

    @property
    def num_bytes(self) -> int:
        """What blocks and tails really occupy."""
        return super().num_bytes + (self.tails.num_bytes if self.tails else 0)

    def copy(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, target), in all layers: codes, ranges and tails."""
        super().copy(copies)
        if self.tails:
            self.tails.copy(copies)

    def attend(self, layout: AttentionMetadata) -> Attend:
        """The decoder's `attend` for one step whose sequences lie as `layout` says."""
        return partial(self._attend, layout, self.tails.begin(layout) if self.tails else None)

    def _attend(
        self, layout: AttentionMetadata, step: TailStep | None, layer: int, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        values.write(v, layout.slot_mapping)
        tails = None
        if self.tails and step:
            tails = self.tails.write(layer, k, step)
            if len(step.blocks):
                keys.write_blocks(tails.read(step.tails), step.blocks)
        else:
            keys.write(k, layout.slot_mapping)
        scale, window = self.config.head_dim**-0.5, self.config.sliding_window
        return self.attention(q, keys, values, layout, scale=scale, sliding_window=window, tails=tails)
