"""What a format of the KV cache costs in quality: perplexity of a trained model, and the error of attention's output.

Random weights cannot answer this. Their keys are Gaussian, and Gaussian keys have no loud channels: every way to share
a scale does equally well on them. So perplexity is measured on text that a trained model has never read, and the error
on three kinds of keys, of which the first is what random weights would show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from minillm.attention.reference import naive_attention
from minillm.cache.contiguous import ContiguousCache, new_cache
from minillm.config import ModelConfig
from minillm.errors import ConfigError
from minillm.measure.corpus import held_out_texts
from minillm.model.decoder import Attend, Decoder
from minillm.model.tokenizer import Tokenizer
from minillm.quantization.formats import Format, Int4

PER_TOKEN = Format("int4 per token", keys=Int4(dim=-1), values=Int4(dim=-1))  # the wrong way, to be compared
KEYS, HEAD_DIM, QUERIES = 2048, 128, 64  # of drawn keys: long enough that a step's exact block says little
OUTLIERS, LOUDNESS = 4, 5.0  # channels of drawn keys that are so many times as large as the others


@dataclass(frozen=True)
class Sample:
    """One layer's attention: q `[n, heads, d]`, k and v `[kv_heads, n, d]`, float32."""

    q: Tensor
    k: Tensor
    v: Tensor

    def error(self, kv_format: Format, queries: int = QUERIES) -> float:
        """‖ô - o‖ / ‖o‖ over the outputs o of the last `queries` tokens, where ô reads the cache in `kv_format`."""
        heads, d, before = self.q.shape[1], self.q.shape[2], self.k.shape[1] - queries
        exact = naive_attention(self.q[before:], self.k, self.v, scale=d**-0.5)
        config, capacity = _one_layer(heads, len(self.k), d), self.k.shape[1]
        cache = new_cache(config, kv_format, capacity=capacity, device=self.k.device, dtype=torch.float32)
        k, v = self.k.transpose(0, 1), self.v.transpose(0, 1)
        cache.attend(0, self.q[:before], k[:before], v[:before])
        cache.num_tokens = before
        out = cache.attend(0, self.q[before:], k[before:], v[before:])
        return float((out - exact).norm() / exact.norm())


def _one_layer(heads: int, kv_heads: int, d: int) -> ModelConfig:
    """A model that consists of one layer's attention, as far as a cache can tell."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=1,
        hidden_size=heads * d,
        intermediate_size=1,
        num_layers=1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=d,
        max_position_embeddings=2**20,
    )


def drawn_sample(*, outliers: bool = False, seed: int = 0) -> Sample:
    """Gaussian queries, keys and values of one head; with `outliers` a few channels of the keys are loud."""
    q, k, v = torch.randn(3, KEYS, 1, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    if outliers:
        k[..., :OUTLIERS] *= LOUDNESS
    return Sample(q, k.transpose(0, 1), v.transpose(0, 1))


@torch.inference_mode()
def trained_samples(model: Decoder, tokens: Sequence[int]) -> list[Sample]:
    """Queries, keys and values that the model makes of these tokens, one sample per layer."""
    cache = ContiguousCache(model.config, capacity=len(tokens), device=model.device, dtype=model.dtype)
    queries: list[Tensor] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries.append(q)
        return cache.attend(layer, q, k, v)

    _run(model, torch.tensor(tokens, device=model.device), attend)
    parts = zip(queries, cache.keys[:, :, : len(tokens)], cache.values[:, :, : len(tokens)], strict=True)
    return [Sample(*(x.float().cpu() for x in part)) for part in parts]


def output_error(samples: Sequence[Sample], kv_format: Format) -> float:
    """Mean of the relative errors of these outputs."""
    return sum(sample.error(kv_format) for sample in samples) / len(samples)


def held_out_rows(tokenizer: Tokenizer, count: int, length: int) -> Tensor:
    """`count` pieces `[count, length]` of text that no training has seen. Raises ConfigError for more than there is."""
    ids = _held_out_ids(tokenizer)
    rows = [[next(ids, -1) for _ in range(length)] for _ in range(count)]
    if count < 1 or length < 2 or rows[-1][-1] < 0:
        raise ConfigError(f"{count} rows of {length} tokens: at least 1 of 2, and no more than the held-out text has.")
    return torch.tensor(rows)


def _held_out_ids(tokenizer: Tokenizer) -> Iterator[int]:
    for text in held_out_texts():
        yield from tokenizer.encode(text)


@torch.inference_mode()
def perplexity(model: Decoder, rows: Tensor, kv_format: Format | None = None) -> float:
    """exp of the mean cross entropy of each token given those before it in its row `[count, length]`.

    Every token is read through a cache in the format (None: the model's dtype). What a query sees does not depend on
    how a sequence is cut into steps, so one step per row gives what decoding token by token would.
    """
    losses = []
    for row in rows.to(model.device):
        cache = new_cache(model.config, kv_format, capacity=len(row), device=model.device, dtype=model.dtype)
        logits = model.logits(_run(model, row[:-1], cache.attend))
        losses.append(cross_entropy(logits, row[1:]).item())
    return math.exp(sum(losses) / len(losses))


def _run(model: Decoder, tokens: Tensor, attend: Attend) -> Tensor:
    return model(tokens, torch.arange(len(tokens), device=tokens.device), attend)
