"""The tensors behind the blocks: one pool of keys and one of values per layer, and what they cost.

A pool is `[num_kv_heads, num_blocks, block_size, head_dim]`: the tokens of one head lie together, so that reading one
head through a block table moves whole blocks of contiguous memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from minillm import seams
from minillm.attention import AttentionMetadata, PagedAttention, write_kv
from minillm.config import EngineConfig, ModelConfig
from minillm.errors import ConfigError
from minillm.model.decoder import Attend

CPU_CACHE_BYTES = 2**30  # what a cache takes at most on a CPU if nobody says how much; pages are touched when written
CUDA_FREE_SHARE = 0.9  # of the memory that is free once the model is loaded; the rest is for activations


class BlockTensors:
    """What every paged cache is made of: tensors `[num_kv_heads, num_blocks, ...]`, copied and counted by the block.

    Block 0 is the dummy block that padding is written to.
    """

    def __init__(self, config: ModelConfig, tensors: list[Tensor], *, num_blocks: int, block_size: int) -> None:
        self.config = config
        self.num_blocks, self.block_size = num_blocks, block_size
        self.tensors = tensors

    @property
    def num_bytes(self) -> int:
        """What the pools really occupy."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bytes_per_token(self) -> int:
        """What one token occupies in all layers."""
        return sum(tensor.nbytes for tensor in self.tensors) // (self.num_blocks * self.block_size)

    def bytes_read(self, q_len: int, kv_len: int) -> int:
        """Least KV traffic of a sequence's queries in one step: every key and value that one of them sees, once."""
        window = self.config.sliding_window
        return self.bytes_per_token * (kv_len if window is None else min(kv_len, window + q_len - 1))

    def copy(self, copies: list[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, target), in all layers. All sources are read before any target is written."""
        if not copies:
            return
        sources, targets = torch.tensor(copies, device=self.tensors[0].device).unbind(1)
        for tensor in self.tensors:
            tensor.index_copy_(1, targets, tensor.index_select(1, sources))


class PagedCache(BlockTensors):
    """Keys and values of many sequences, `num_blocks` blocks of `block_size` tokens for each layer.

    `attention` reads through the block tables; writing comes first, so a token sees itself.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: PagedAttention,
        *,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.attention = attention
        shape = (config.num_kv_heads, num_blocks, block_size, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        super().__init__(config, self.keys + self.values, num_blocks=num_blocks, block_size=block_size)

    def attend(self, layout: AttentionMetadata) -> Attend:
        """The decoder's `attend` for one step whose sequences lie as `layout` says."""
        return partial(self._attend, layout)

    def _attend(self, layout: AttentionMetadata, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        write_kv(k, v, keys, values, layout)
        scale, window = self.config.head_dim**-0.5, self.config.sliding_window
        return self.attention(q, keys, values, layout, scale=scale, sliding_window=window)


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype, kv_format: str = "auto") -> int:
    """Bytes of one block in all layers, ranges included.

    Unquantised 2 (K and V) x layers x KV heads x head_dim x block_size x element size.
    """
    if kv_format != "auto":
        formats: Any = seams.offer("kv_format")
        return int(formats.block_bytes(config, block_size, kv_format))
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * block_size * dtype.itemsize


def choose_num_blocks(config: ModelConfig, engine: EngineConfig, device: torch.device, dtype: torch.dtype) -> int:
    """How many blocks to allocate: what the user says, else as many as the memory budget holds.

    The budget is `cache_bytes`, else a share of the memory that is free now on a GPU (whatever other processes hold is
    gone already: subtracting it again has driven others below zero), else `CPU_CACHE_BYTES`. Never more than all
    sequences could fill at the model's full length. Raises `ConfigError` if the budget does not hold one block.
    """
    if engine.num_blocks is not None:
        return engine.num_blocks
    budget, block_size = engine.cache_bytes or _free_bytes(device), engine.kv_block_size
    per_block = block_bytes(config, block_size, dtype, engine.kv_format)
    num_blocks = budget // per_block
    if num_blocks < 2:
        raise ConfigError(
            f"{budget:,} bytes hold {num_blocks} blocks of {per_block:,} bytes; at least 2 are needed. "
            "Raise cache_bytes, make block_size smaller, or free memory on the device."
        )
    longest = -(-config.max_position_embeddings // block_size)
    return min(num_blocks, 1 + engine.max_num_seqs * longest)


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_CACHE_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * CUDA_FREE_SHARE)
