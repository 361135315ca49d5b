"""What a quantised cache means, written down without one: every key exact, every key as stored, and who sees which.

No blocks are shared, nothing is kept between steps but what the model made, and all of it is quantised anew each time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minillm.attention.reference import NEG_INF, visible
from minillm.quantization.formats import Codec, Format


def as_stored(codec: Codec, x: Tensor, block_size: int) -> Tensor:
    """x `[kv_heads, n, d]` as it comes back from storage; what a codec by block has no whole block for stays NaN."""
    n = x.shape[1]
    if not codec.by_block:
        return codec.decode(*codec.encode(x))
    whole = n // block_size * block_size
    blocks = x[:, :whole].unflatten(1, (-1, block_size)) if whole else x[:, :0]
    stored = codec.decode(*codec.encode(blocks)).flatten(1, 2) if whole else blocks
    return torch.cat([stored, torch.full_like(x[:, whole:], torch.nan)], dim=1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, kv_format: Format, block_size: int, *, scale: float, window: int | None = None
) -> Tensor:
    """q `[q_len, heads, d]` after exact k and v `[kv_heads, kv_len, d]`, read as the format stores them -> like q."""
    group = q.shape[1] // k.shape[0]
    stored_k, stored_v = (as_stored(c, x, block_size) for c, x in ((kv_format.keys, k), (kv_format.values, v)))
    exact, stored = (q.transpose(0, 1) @ x.repeat_interleave(group, 0).mT for x in (k, stored_k))
    position, key = torch.arange(k.shape[1] - len(q), k.shape[1])[:, None], torch.arange(k.shape[1])
    own = (key // block_size == position // block_size) & torch.tensor(kv_format.keys.by_block)
    scores = (torch.where(own, exact, stored) * scale).masked_fill(~visible(len(q), k.shape[1], window), NEG_INF)
    weights = scores.softmax(-1).nan_to_num()  # a query that sees no key has no softmax
    return (weights @ stored_v.repeat_interleave(group, 0)).transpose(0, 1)


class DefinitionCache:
    """A cache of one sequence for `minillm.generate.extend`."""

    def __init__(self, kv_format: Format, block_size: int) -> None:
        self.kv_format, self.block_size = kv_format, block_size
        self.num_tokens = 0
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        new = k.transpose(0, 1), v.transpose(0, 1)
        before = self.kv.get(layer, (new[0][:, :0], new[1][:, :0]))
        keys, values = (torch.cat([old[:, : self.num_tokens], x], dim=1) for old, x in zip(before, new, strict=True))
        self.kv[layer] = keys, values
        return attend(q, keys, values, self.kv_format, self.block_size, scale=q.shape[-1] ** -0.5)

    def truncate(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
