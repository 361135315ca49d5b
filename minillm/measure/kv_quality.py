"""What a format of the KV cache costs in quality: perplexity of a trained model, and the error of attention's output.

Random weights cannot answer this. Their keys are Gaussian, and Gaussian keys have no loud channels: every way to share
a scale does equally well on them. So perplexity is measured on text that a trained model has never read, and the error
on three kinds of keys, of which the first is what random weights would show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss

from minillm.attention.reference import naive_attention
from minillm.cache.contiguous import ContiguousCache
from minillm.config import ModelConfig
from minillm.errors import ConfigError
from minillm.measure.corpus import held_out_texts
from minillm.model.decoder import Attend, Decoder
from minillm.model.tokenizer import Tokenizer
from minillm.quantization.formats import FORMATS, Codec, Int4

PER_TOKEN = "int4 per token"  # one range for all channels of a head: the wrong way, to be compared
COMPARED = {**FORMATS, PER_TOKEN: Int4(group=10**6)}
KEYS, HEAD_DIM, QUERIES = 2048, 128, 64  # of drawn keys
OUTLIERS, LOUDNESS = 4, 5.0  # channels of drawn keys that are so many times as large as the others


@dataclass(frozen=True)
class Sample:
    """One layer's attention: q `[n, heads, d]`, k and v `[kv_heads, n, d]`, float32."""

    q: Tensor
    k: Tensor
    v: Tensor

    def error(self, codec: Codec, queries: int = QUERIES) -> float:
        """‖ô - o‖ / ‖o‖ over the outputs o of the last `queries` tokens, where ô reads what `codec` stores."""
        q, scale = self.q[-queries:], self.q.shape[2] ** -0.5
        exact = naive_attention(q, self.k, self.v, scale=scale)
        out = naive_attention(q, rounded(self.k, codec), rounded(self.v, codec), scale=scale)
        return float((out - exact).norm() / exact.norm())


class RoundedCache(ContiguousCache):
    """The cache of one sequence, whose keys and values are read as a format stores them, in the model's dtype.

    Every token is stored by itself, so its numbers can be rounded on their way in: attention sees what it sees in the
    engine, where the codes themselves are kept. Right for quality and text, wrong for bytes and time.
    """

    def __init__(
        self, config: ModelConfig, codec: Codec, *, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(config, capacity=capacity, device=device, dtype=dtype)
        self.codec = codec

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As ever, on rounded keys and values `[q_len, num_kv_heads, head_dim]`."""
        return super().attend(layer, q, rounded(k, self.codec), rounded(v, self.codec))


def rounded(x: Tensor, codec: Codec) -> Tensor:
    """x `[..., d]` as it comes back from its codes, in its own dtype."""
    return codec.decode(*codec.encode(x)).to(x.dtype)


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


def output_error(samples: Sequence[Sample], codec: Codec) -> float:
    """Mean of the relative errors of these outputs."""
    return sum(sample.error(codec) for sample in samples) / len(samples)


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
def perplexity(model: Decoder, rows: Tensor, codec: Codec | None = None) -> float:
    """exp of the mean cross entropy of each token given those before it in its row `[count, length]`.

    Every token is read as `codec` stores it (None: the model's dtype). What a query sees does not depend on how a
    sequence is cut into steps, so one step per row gives what decoding token by token would.
    """
    losses = [nll_loss(_log_probs(model, row, codec), row[1:]).item() for row in rows.to(model.device)]
    return math.exp(sum(losses) / len(losses))


class Fidelity(NamedTuple):
    """How a model that reads through a format compares with itself."""

    perplexity: float
    divergence: float  # of its distributions from the unquantised ones: Kullback and Leibler, nats per token


@torch.inference_mode()
def fidelity(model: Decoder, rows: Tensor, codecs: Mapping[str, Codec | None]) -> dict[str, Fidelity]:
    """Perplexity and divergence on the same rows `[count, length]`, for each codec.

    A format pushes the probabilities of single tokens up and down, and in the perplexity most of that cancels: tens of
    thousands of tokens know the difference of two formats. The divergence only ever adds up, so a few thousand do.
    """
    found = {name: torch.zeros(2) for name in codecs}
    for row in rows.to(model.device):
        plain = _log_probs(model, row, None)
        for name, codec in codecs.items():
            read = _log_probs(model, row, codec) if codec else plain
            divergence = kl_div(read, plain, reduction="batchmean", log_target=True)
            found[name] += torch.stack([nll_loss(read, row[1:]), divergence]).cpu()
    means = {name: (sums / len(rows)).tolist() for name, sums in found.items()}
    return {name: Fidelity(math.exp(loss), divergence) for name, (loss, divergence) in means.items()}


def _log_probs(model: Decoder, row: Tensor, codec: Codec | None) -> Tensor:
    """What the model expects after each token but the last: `[length - 1, vocab_size]`."""
    cache = one_sequence(model, codec, len(row))
    return model.logits(_run(model, row[:-1], cache.attend)).log_softmax(-1)


def one_sequence(model: Decoder, codec: Codec | None, capacity: int) -> ContiguousCache:
    """An empty cache for one sequence that is read in a format; None: in the model's dtype."""
    sizes: dict[str, Any] = {"capacity": capacity, "device": model.device, "dtype": model.dtype}
    return RoundedCache(model.config, codec, **sizes) if codec else ContiguousCache(model.config, **sizes)


def _run(model: Decoder, tokens: Tensor, attend: Attend) -> Tensor:
    return model(tokens, torch.arange(len(tokens), device=tokens.device), attend)
