"""The tensors behind the blocks when keys and values are quantised: the paged cache, with fewer bits.

This is what the seam `kv_format` offers to the engine: `FORMATS`, `block_bytes` and `open_cache`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minillm import seams
from minillm.attention.metadata import AttentionMetadata
from minillm.cache.paged import BlockTensors
from minillm.config import ModelConfig
from minillm.errors import ConfigError
from minillm.model.decoder import Attend
from minillm.quantization import attention as reference
from minillm.quantization.attention import as_bytes
from minillm.quantization.formats import FORMATS, Codec

__all__ = ["FORMATS", "QuantizedCache", "block_bytes", "open_cache"]


class QuantizedCache(BlockTensors):
    """Keys and values of many sequences in a format; otherwise as `PagedCache`.

    `keys[layer]` and `values[layer]` are codes and ranges, each `[kv_heads, num_blocks, block_size, …]`. What `codec`
    makes of a token is written first, then read by `attention`, so a token sees itself as it is stored. `prepare` makes
    of a step's metadata, once for all layers, what `attention` wants in their place.
    """

    def __init__(
        self,
        config: ModelConfig,
        codec: Codec,
        *,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        prepare: Callable[[AttentionMetadata, int], Any] = reference.prepare,
        attention: Callable[..., Tensor] = reference.quantized_attention,
    ) -> None:
        self.codec, self.prepare, self.attention = codec, prepare, attention
        shape = (config.num_kv_heads, num_blocks, block_size)
        self.keys, self.values = (
            [_stored(codec, shape, config.head_dim, device) for _ in range(config.num_layers)] for _ in range(2)
        )
        tensors = [as_bytes(tensor) for stored in self.keys + self.values for tensor in stored]
        super().__init__(config, tensors)

    def attend(self, metadata: AttentionMetadata) -> Attend:
        """The decoder's `attend` for one step whose sequences lie as `metadata` says."""
        prepared = self.prepare(metadata, self.config.num_heads // self.config.num_kv_heads)
        return partial(self._attend, metadata.slot_mapping, prepared)

    def _attend(self, slots: Tensor, prepared: Any, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        self._write(keys, k, slots)
        self._write(values, v, slots)
        scale, window = self.config.head_dim**-0.5, self.config.sliding_window
        return self.attention(q, keys, values, prepared, scale=scale, sliding_window=window)

    def _write(self, stored: tuple[Tensor, ...], x: Tensor, slots: Tensor) -> None:
        """Encode tokens `[num_tokens, kv_heads, d]` into their slots."""
        for pool, part in zip(stored, self.codec.encode(x.transpose(0, 1)), strict=True):
            as_bytes(pool).flatten(1, 2).index_copy_(1, slots, as_bytes(part))


def open_cache(
    config: ModelConfig,
    kv_format: str,
    *,
    num_blocks: int,
    block_size: int,
    device: torch.device,
    dtype: torch.dtype,
    kernels: str = "auto",
) -> QuantizedCache:
    """An empty cache in the format of this name. Raises `ConfigError` for an unknown one.

    kernels: "reference" reads by the definition in PyTorch; anything else by the device's kernels, if there are any.
    What is stored does not depend on the model's dtype.
    """
    codec = _codec(kv_format)
    reader = None if kernels == "reference" else seams.offer("quantized_attention", device.type)
    functions = {"prepare": reader.prepare, "attention": reader.quantized_attention} if reader else {}
    return QuantizedCache(config, codec, num_blocks=num_blocks, block_size=block_size, device=device, **functions)


def block_bytes(config: ModelConfig, block_size: int, kv_format: str) -> int:
    """Bytes of one block in all layers, ranges included. Raises `ConfigError` for an unknown format."""
    shape = (config.num_kv_heads, 1, block_size)
    stored = _stored(_codec(kv_format), shape, config.head_dim, torch.device("meta"))
    return 2 * config.num_layers * sum(tensor.nbytes for tensor in stored)


def _codec(kv_format: str) -> Codec:
    if kv_format not in FORMATS:
        raise ConfigError(f"kv_format={kv_format!r} is unknown. Choose one of: auto, {', '.join(FORMATS)}.")
    return FORMATS[kv_format]


def _stored(codec: Codec, shape: tuple[int, int, int], d: int, device: torch.device) -> tuple[Tensor, ...]:
    """Room for the codes and ranges of one layer's keys or values: `[kv_heads, num_blocks, block_size, …]`."""
    parts = codec.encode(torch.zeros(1, d, device=device))
    return tuple(part.new_zeros(*shape, *part.shape[1:]) for part in parts)
