"""What a quantised cache means, written down without one: every key and every value as it comes back from its codes.

No blocks, no sharing: what the model made is kept, and all of it is quantised anew each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

import torch
from torch import Tensor

from minillm.attention.reference import NEG_INF, visible
from minillm.cache.contiguous import ContiguousCache
from minillm.generate import generate
from minillm.model.decoder import Decoder
from minillm.quantization.formats import Codec
from minillm.sampling import SamplingParams


def as_stored(codec: Codec, x: Tensor) -> Tensor:
    """x as it comes back from storage, in float32."""
    return codec.decode(*codec.encode(x))


def attend(q: Tensor, k: Tensor, v: Tensor, codec: Codec, *, scale: float, window: int | None = None) -> Tensor:
    """q `[q_len, heads, d]` after exact k and v `[kv_heads, kv_len, d]`, read as the format stores them -> like q."""
    group = q.shape[1] // k.shape[0]
    k, v = (as_stored(codec, x).repeat_interleave(group, 0) for x in (k, v))
    scores = (q.transpose(0, 1) @ k.mT * scale).masked_fill(~visible(len(q), k.shape[1], window), NEG_INF)
    weights = scores.softmax(-1).nan_to_num()  # a query that sees no key has no softmax
    return (weights @ v).transpose(0, 1)


class DefinitionCache(ContiguousCache):
    """A cache of one sequence for `minillm.generate.extend`, which has nothing but the interface from its parent."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.num_tokens = 0
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        new = k.transpose(0, 1), v.transpose(0, 1)
        before = self.kv.get(layer, (new[0][:, :0], new[1][:, :0]))
        keys, values = (torch.cat([old[:, : self.num_tokens], x], dim=1) for old, x in zip(before, new, strict=True))
        self.kv[layer] = keys, values
        return attend(q, keys, values, self.codec, scale=q.shape[-1] ** -0.5)

    def truncate(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens


def generate_in(
    cache: ContiguousCache, model: Decoder, prompt: Sequence[int], params: SamplingParams, sample_index: int = 0
) -> list[int]:
    """The tokens of `minillm.generate.generate` with this cache, an empty one, in the place of a contiguous one."""
    with patch("minillm.generate.ContiguousCache", lambda *_, **__: cache):
        return list(generate(model, prompt, params, sample_index=sample_index))
