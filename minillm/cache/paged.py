"""The tensors behind the blocks: one pool of keys and one of values per layer, and what they cost.

A pool is `[num_kv_heads, num_blocks, block_size, head_dim]`: the tokens of one head lie together, so that reading one
head through a block table moves whole blocks of contiguous memory.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from minillm.attention.metadata import AttentionMetadata
from minillm.attention.paged import Backend
from minillm.config import EngineConfig, ModelConfig
from minillm.errors import ConfigError, require
from minillm.model.decoder import Attend

CPU_CACHE_BYTES = 2**30  # what a cache takes at most on a CPU if nobody says how much; pages are touched when written
CUDA_FREE_SHARE = 0.9  # of the memory that is free once the model is loaded; the rest is for activations


class BlockTensors:
    """What every paged cache is made of: tensors `[num_kv_heads, num_blocks, ...]`, copied and counted by the block.

    Block 0 is the dummy block that padding is written to.
    """

    def __init__(self, config: ModelConfig, tensors: list[Tensor]) -> None:
        self.config = config
        self.num_blocks, self.block_size = tensors[0].shape[1:3]
        self.tensors = tensors

    @property
    def bytes_per_token(self) -> int:
        """What one token really occupies in all layers."""
        return sum(tensor.nbytes for tensor in self.tensors) // (self.num_blocks * self.block_size)

    def attend(self, metadata: AttentionMetadata) -> Attend:
        """The decoder's `attend` for one step whose requests lie as `metadata` says."""
        raise NotImplementedError

    def copy(self, copies: Tensor) -> None:
        """Copy whole blocks, `[n, 2]` int64 (source, target), in all layers.

        All sources are read before any target is written.
        """
        if len(copies):
            sources, targets = copies.unbind(1)
            for tensor in self.tensors:
                tensor.index_copy_(1, targets, tensor.index_select(1, sources))

    def gather(self, blocks: Tensor) -> Tensor:
        """What stands in these blocks `[n]` int64, all layers, as bytes `[n, bytes per block]`: to be handed over."""
        parts = [tensor[:, blocks].transpose(0, 1).contiguous() for tensor in self.tensors]
        return torch.cat([part.view(torch.uint8).flatten(1) for part in parts], dim=1)

    def scatter(self, blocks: Tensor, source: Tensor) -> None:
        """Put what `gather` gave into these blocks `[n]`."""
        sizes = [tensor[:, 0].nbytes for tensor in self.tensors]
        for tensor, part in zip(self.tensors, source.split(sizes, dim=1), strict=True):
            values = part.contiguous().view(tensor.dtype).view(len(blocks), len(tensor), *tensor.shape[2:])
            tensor[:, blocks] = values.transpose(0, 1)


class PagedCache(BlockTensors):
    """Keys and values of many requests, `num_blocks` blocks of `block_size` tokens for each layer.

    `backend` writes first and then reads through the block tables, so a token sees itself.
    """

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        *,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.backend = backend
        shape = (config.num_kv_heads, num_blocks, block_size, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        super().__init__(config, self.keys + self.values)

    def attend(self, metadata: AttentionMetadata) -> Attend:
        return partial(self._attend, self.backend.prepare(metadata, self.keys[0], self.config.group_size))

    def _attend(self, metadata: AttentionMetadata, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        self.backend.write(k, v, keys, values, metadata)
        scale, window = self.config.head_dim**-0.5, self.config.sliding_window
        return self.backend.attend(q, keys, values, metadata, scale=scale, sliding_window=window)


def choose_num_blocks(config: ModelConfig, engine: EngineConfig, device: torch.device, per_block: int) -> int:
    """How many blocks of `per_block` bytes to allocate: what the user says, else as many as the memory budget holds.

    The budget is `cache_bytes`, else a share of the memory that is free now on a GPU (whatever other processes hold is
    gone already: subtracting it again has driven others below zero), else `CPU_CACHE_BYTES`. Never more than all
    requests could fill at the model's full length. Raises `ConfigError` if the budget does not hold two blocks.
    """
    if engine.num_blocks is not None:
        return engine.num_blocks
    budget = engine.cache_bytes or CPU_CACHE_BYTES
    if engine.cache_bytes is None and device.type == "cuda":
        budget = int(torch.cuda.mem_get_info(device)[0] * CUDA_FREE_SHARE)
    allowed = f"at least {2 * per_block}, two blocks. Make block_size smaller, or free memory on the device"
    require(budget >= 2 * per_block, "cache_bytes", budget, allowed, ConfigError)
    longest = -(-config.max_position_embeddings // engine.block_size)
    return min(budget // per_block, 1 + engine.max_num_seqs * longest)
