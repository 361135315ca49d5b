"""The simplest KV cache: one sequence, one piece of memory, filled from the left. Its own dtype, or fewer bits."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from minillm.attention import AttentionMetadata, attention
from minillm.attention.reference import oldest_key
from minillm.config import BLOCK_SIZE, MIN_BLOCK_SIZES, ModelConfig
from minillm.model.decoder import Attend
from minillm.quantization.attention import quantized_attention
from minillm.quantization.cache import QuantizedCache
from minillm.quantization.formats import Format

CHUNK = 512  # tokens that a quantised cache takes at once: what is exact for a step is as much at most


class SequenceCache(Protocol):
    """The cache of one sequence."""

    num_tokens: int  # how many are cached; the caller counts, once per step, when all layers are through

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k and v `[q_len, num_kv_heads, head_dim]` behind the cached tokens, then let q see all of them."""
        ...

    def truncate(self, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` tokens."""
        ...


class ContiguousCache:
    """Keys and values of one sequence, [num_layers, num_kv_heads, capacity, head_dim] each.

    `attend` is what the decoder calls. It writes behind the first `num_tokens` positions and does not move that
    counter: the caller does, once per step, when all layers are through. Taking tokens back is the same counter
    (`truncate`), because whatever lies behind it is overwritten before it is read.

    The memory is allocated ahead and doubles when it is full, so that n tokens cost O(n) copies. A cache that is
    concatenated anew at every step costs O(n²).
    """

    def __init__(self, config: ModelConfig, *, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        self.config = config
        self.num_tokens = 0
        shape = (config.num_layers, config.num_kv_heads, max(capacity, 1), config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)

    @property
    def capacity(self) -> int:
        """Tokens that fit without a copy."""
        return self.keys.shape[2]

    @property
    def bytes_per_token(self) -> int:
        """2 (K and V) x layers x KV heads x head_dim x bytes per element."""
        layers, kv_heads, _, head_dim = self.keys.shape
        return 2 * layers * kv_heads * head_dim * self.keys.element_size()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k and v [q_len, num_kv_heads, head_dim] behind the cached tokens, then let q see all of them.

        Keys that a sliding window hides from all queries are not read.
        """
        keys, values = self.write(layer, k, v)
        scale, window = self.config.head_dim**-0.5, self.config.sliding_window
        oldest = oldest_key(len(q), keys.shape[1], window)
        return attention(q, keys[:, oldest:], values[:, oldest:], scale=scale, sliding_window=window)

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write behind the cached tokens; views of the layer's keys and values [num_kv_heads, kv_len, head_dim]."""
        end = self.num_tokens + len(k)
        if end > self.capacity:
            self._grow(end)
        self.keys[layer, :, self.num_tokens : end] = k.transpose(0, 1)
        self.values[layer, :, self.num_tokens : end] = v.transpose(0, 1)
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def keep(self, written: list[int]) -> None:
        """Of what was written behind the cached tokens, count these rows, in this order; the others are forgotten."""
        rows, end = self.num_tokens + torch.tensor(written), self.num_tokens + len(written)
        for stored in (self.keys, self.values):
            stored[:, :, self.num_tokens : end] = stored[:, :, rows.to(stored.device)]
        self.num_tokens = end

    def truncate(self, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` tokens. Raises ValueError for more than there are."""
        _check_truncation(self, num_tokens)
        self.num_tokens = num_tokens

    def _grow(self, needed: int) -> None:
        room = max(needed, 2 * self.capacity) - self.capacity
        self.keys, self.values = (torch.nn.functional.pad(t, (0, 0, 0, room)) for t in (self.keys, self.values))


class QuantizedContiguousCache:
    """The same in a `kv_format`: the blocks 1, 2, 3 … of a paged cache that nobody shares.

    Long prompts are taken in chunks of `CHUNK` tokens, layer by layer. What a query sees does not depend on how a
    sequence is cut, so this changes nothing but the memory for exact keys.
    """

    def __init__(
        self,
        config: ModelConfig,
        kv_format: Format,
        *,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        block_size: int | None = None,
    ) -> None:
        self.config, self.kv_format = config, kv_format
        self.device, self.dtype = device, dtype
        self.block_size = block_size or max(BLOCK_SIZE, MIN_BLOCK_SIZES.get(kv_format.name, 1))
        self.num_tokens = 0
        self.blocks = self._blocks_for(capacity)
        self._steps: list[Attend] = []

    @property
    def capacity(self) -> int:
        """Tokens that fit without a copy."""
        return (self.blocks.num_blocks - 1) * self.block_size

    @property
    def bytes_per_token(self) -> int:
        """What one token occupies in all layers, ranges included."""
        return self.blocks.bytes_per_token

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k and v [q_len, num_kv_heads, head_dim] behind the cached tokens, then let q see all of them."""
        if layer == 0:
            self._steps = self._chunks(len(q))
        parts = zip(self._steps, *(x.split(CHUNK) for x in (q, k, v)), strict=True)
        return torch.cat([step(layer, *part) for step, *part in parts])

    def truncate(self, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` tokens.

        Raises ValueError for more than there are, or if the sequence would go on in the middle of a block whose keys
        exist in quantised form alone: before the block that the last step began in.
        """
        _check_truncation(self, num_tokens)
        block, offset = divmod(num_tokens, self.block_size)
        if offset and self.blocks.tails and 1 + block not in self.blocks.tails:
            raise ValueError(
                f"Cannot go on behind token {num_tokens}: the keys of its block of {self.block_size} are quantised "
                f"together. Truncate to {num_tokens - offset}, or take back tokens of the last step only."
            )
        self.num_tokens = num_tokens

    def _chunks(self, q_len: int) -> list[Attend]:
        """The step of q_len tokens, cut into chunks: the `attend` of each."""
        end = self.num_tokens + q_len
        if end > self.capacity:
            self._grow(end)
        starts = range(self.num_tokens, end, CHUNK)
        return [self._chunk(start, min(start + CHUNK, end)) for start in starts]

    def _chunk(self, start: int, end: int) -> Attend:
        table = range(1, 2 + (end - 1) // self.block_size)
        if self.blocks.tails:
            self.blocks.tails.keep([1 + start // self.block_size] if start % self.block_size else [])
        return self.blocks.attend(
            AttentionMetadata.build([table], [end - start], [end], block_size=self.block_size, device=self.device)
        )

    def _blocks_for(self, capacity: int) -> QuantizedCache:
        return QuantizedCache(
            self.config,
            quantized_attention,
            self.kv_format,
            num_blocks=1 + -(-max(capacity, 1) // self.block_size),
            block_size=self.block_size,
            num_tails=3 + CHUNK // self.block_size,  # of the dummy block, and of those that a chunk can touch
            device=self.device,
            dtype=self.dtype,
        )

    def _grow(self, needed: int) -> None:
        smaller, self.blocks = self.blocks, self._blocks_for(max(needed, 2 * self.capacity))
        self.blocks.tails = smaller.tails
        for new, old in zip(self.blocks.tensors, smaller.tensors, strict=True):
            new[:, : old.shape[1]] = old


def new_cache(
    config: ModelConfig, kv_format: Format | None, *, capacity: int, device: torch.device, dtype: torch.dtype
) -> SequenceCache:
    """An empty cache for one sequence in this format; None is the model's dtype."""
    if kv_format is None:
        return ContiguousCache(config, capacity=capacity, device=device, dtype=dtype)
    return QuantizedContiguousCache(config, kv_format, capacity=capacity, device=device, dtype=dtype)


def _check_truncation(cache: SequenceCache, num_tokens: int) -> None:
    if not 0 <= num_tokens <= cache.num_tokens:
        raise ValueError(f"Cannot truncate a cache of {cache.num_tokens} tokens to {num_tokens}; give 0 to that.")
