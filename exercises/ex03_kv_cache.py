"""Exercise 03 · The KV cache: what would be computed again and again?

A token's keys and values never change once they are computed, and everybody behind it reads them. So you keep them. You
write the memory that does it, the attention that reads it, and the two phases of inference that follow: prefill runs
all prompt tokens at once, decode runs one.

Shapes: q `[q_len, heads, d]`, new k and v `[q_len, kv_heads, d]`, the memory `[layers, kv_heads, capacity, d]` twice.

Lesson: 03_kv_cache · 45 minutes · difficulty ●●○○○
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def kv_bytes(num_tokens: int, *, layers: int, kv_heads: int, head_dim: int, bytes_per_number: int = 2) -> int:
    """Bytes that the keys *and* the values of a sequence take.

    Each token has, in each layer and for each key/value head, two vectors of `head_dim` numbers. The number of query
    heads has no part in it, and that is the point of grouped queries.

    >>> kv_bytes(1, layers=1, kv_heads=1, head_dim=1)
    4
    >>> kv_bytes(8192, layers=32, kv_heads=8, head_dim=128) // 2**20  # Llama 3.1 8B at its 8k context, in MiB
    1024
    """
    raise NotImplementedError("kv_bytes is yours to write")


class KVCache:
    """Keys and values of one sequence, filled from the left. `minillm.generate` can use it in place of its own.

    `num_tokens` counts the tokens that *all* layers have stored. The layers of a step store the same tokens one after
    the other, so the step moves the counter, once, when all of them are through: `write` does not.
    """

    def __init__(
        self, config: Any, *, capacity: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        """Given. `config` has num_layers, num_kv_heads and head_dim. The memory starts as garbage, as memory does."""
        self.num_tokens = 0
        shape = (config.num_layers, config.num_kv_heads, capacity, config.head_dim)
        self.keys = torch.full(shape, float("nan"), device=device, dtype=dtype)
        self.values = self.keys.clone()

    @property
    def capacity(self) -> int:
        """Tokens that fit. Given."""
        return self.keys.shape[2]

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v `[q_len, kv_heads, d]` of one layer behind the `num_tokens` tokens that are there.

        Returns all keys and all values of this layer, `[kv_heads, num_tokens + q_len, d]` each: what attention reads.
        When the memory is too small it grows to at least twice its capacity, so that n tokens cost O(n) copies; what
        all layers have stored stays. `num_tokens` does not move.

        With one layer, one head and d = 1, two cached keys 5 and 6, write(0, k=[7, 8], …) returns keys 5, 6, 7, 8.
        """
        raise NotImplementedError("write is yours to write")

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the decoder calls in each layer: store k and v, then let q see all that is stored. Returns like q.

        q `[q_len, heads, d]` are the *last* q_len tokens, so query i sees the first `num_tokens + i + 1` keys. The
        scale is 1/√d. Neighbouring query heads share a key/value head, as in exercise 02; `write` stores, and
        `torch.nn.functional.scaled_dot_product_attention` may do the rest if you give it the right mask.
        """
        raise NotImplementedError("attend is yours to write")

    def truncate(self, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` tokens; ValueError for fewer than 0 or more than there are.

        Nothing needs to be erased: what lies behind the counter is overwritten before it is read. Speculative
        decoding takes rejected drafts back in this way.
        """
        raise NotImplementedError("truncate is yours to write")


def extend(model: Any, token_ids: list[int], cache: KVCache) -> Tensor:
    """The one step of inference: run tokens behind the cached ones. Logits `[vocab]` of what follows the last of them.

    `model(tokens, positions, attend)` runs tokens `[n]` that stand at positions `[n]`, calls `attend(layer, q, k, v)`
    in each layer, and returns the last hidden states `[n, hidden]`; `model.logits(hidden)` makes `[n, vocab]` of
    these, which is a large product: ask for the last row only. Afterwards the cache has these tokens, too.
    """
    raise NotImplementedError("extend is yours to write")


def prefill(model: Any, token_ids: list[int]) -> tuple[Tensor, KVCache]:
    """Phase 1: all prompt tokens in one step. Returns the logits `[vocab]` of the first new token, and the cache.

    `model.config`, `model.device` and `model.dtype` tell what kind of cache it needs. Leave it some room to grow.
    """
    raise NotImplementedError("prefill is yours to write")


def decode(model: Any, token_id: int, cache: KVCache) -> Tensor:
    """Phase 2: one token in, the logits `[vocab]` of the next one out. The cache grows by this token.

    The model runs this one token and no other: however long the text is, a step costs the same but for attention.
    """
    raise NotImplementedError("decode is yours to write")
