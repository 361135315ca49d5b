"""The simplest KV cache: one sequence, one piece of memory, filled from the left."""

from __future__ import annotations

import torch
from torch import Tensor

from minillm.attention.reference import oldest_key
from minillm.attention.tiled import attention
from minillm.config import ModelConfig
from minillm.seams import offer


class ContiguousCache:
    """Keys and values of one sequence, [num_layers, num_kv_heads, capacity, head_dim] each.

    `attend` is what the decoder calls. It writes after the first `num_tokens` positions and does not move that
    counter: the caller does, once per step, when all layers are through. Taking tokens back is the same counter
    (`truncate`), because whatever lies after it is overwritten before it is read.

    The memory is allocated ahead and doubles when it is full, so that n tokens cost O(n) copies. A cache that is
    concatenated anew at every step costs O(n²).
    """

    def __init__(
        self, config: ModelConfig, *, capacity: int, device: torch.device, dtype: torch.dtype, kernels: str = "auto"
    ) -> None:
        self.config = config
        extra = offer("attention", device.type) if kernels == "auto" else None
        self.attention = extra.attention if extra else attention
        self.num_tokens = 0
        shape = (config.num_layers, config.num_kv_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)

    @property
    def capacity(self) -> int:
        """Tokens that fit without a copy."""
        return self.keys.shape[2]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k and v [q_len, num_kv_heads, head_dim] after the cached tokens, then let q see all of them.

        Keys that a sliding window hides from all queries are not read.
        """
        keys, values = self.write(layer, k, v)
        scale, window = self.config.head_dim**-0.5, self.config.sliding_window
        oldest = oldest_key(len(q), keys.shape[1], window)
        return self.attention(q, keys[:, oldest:], values[:, oldest:], scale=scale, sliding_window=window)

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write after the cached tokens; views of the layer's keys and values [num_kv_heads, kv_len, head_dim]."""
        end = self.num_tokens + len(k)
        if end > self.capacity:
            self._grow(end)
        self.keys[layer, :, self.num_tokens : end] = k.transpose(0, 1)
        self.values[layer, :, self.num_tokens : end] = v.transpose(0, 1)
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def truncate(self, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` tokens. Raises ValueError for more than there are."""
        if not 0 <= num_tokens <= self.num_tokens:
            raise ValueError(f"Cannot truncate a cache of {self.num_tokens} tokens to {num_tokens}; give 0 to that.")
        self.num_tokens = num_tokens

    def _grow(self, needed: int) -> None:
        room = max(needed, 2 * self.capacity) - self.capacity
        self.keys, self.values = (torch.nn.functional.pad(t, (0, 0, 0, room)) for t in (self.keys, self.values))
