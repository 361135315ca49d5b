"""One decoder for the Llama family. It knows no cache.

    hidden = model(tokens, positions, attend)     # [num_tokens, hidden_size]
    logits = model.logits(hidden[-1:])            # [1, vocab_size], only for the rows that somebody wants

Tokens come packed: no batch dimension, no padding. What a token sees is decided by `attend` alone, which gets the
rotated queries, keys and values of one layer and returns the attention output. A contiguous cache, a paged cache for
many sequences, a training loss and an observer that records attention maps are four `attend` functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.model.linear import Linear
from minillm.model.rope import Rotation, rotate, rotation


class Attend(Protocol):
    """Stores the keys and values of a layer wherever it keeps them and returns the attention output.

    q [num_tokens, num_heads, head_dim]; k, v [num_tokens, num_kv_heads, head_dim], possibly strided views;
    returns the shape and dtype of q.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimensions (Zhang & Sennrich 2019); computed and returned in float32.

    The weight stays float32 in every model: it is tiny, and one cast at the end is faster than three on the way.
    """

    def __init__(self, *shape: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*shape))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return normed * self.weight


class Attention(nn.Module):
    """Projects to queries, keys and values in one product, lets `attend` mix them, projects back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        rotated_heads = config.num_heads + config.num_kv_heads
        heads = rotated_heads + config.num_kv_heads
        self.qkv = Linear(config.hidden_size, heads * config.head_dim, bias=config.qkv_bias)
        self.out = Linear(config.num_heads * config.head_dim, config.hidden_size)
        # Queries and keys lie side by side in the fused product, so one norm and one rotation serve both:
        # the weight has one row per head, the query's for query heads and the key's for key heads.
        self.qk_norm = RMSNorm(rotated_heads, config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, turn: Rotation, attend: Attend, layer: int) -> Tensor:
        heads = self.qkv(x).view(len(x), -1, self.head_dim)
        qk, v = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        qk = qk.float() if self.qk_norm is None else self.qk_norm(qk)
        qk = rotate(qk, turn).to(v.dtype)
        q, k = qk.split([self.num_heads, self.num_kv_heads], dim=1)
        return self.out(attend(layer, q, k, v).reshape(len(x), -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Attention, then MLP, each on a normed copy of the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, turn: Rotation, attend: Attend, layer: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x).to(x.dtype), turn, attend, layer)
        return x + self.mlp(self.mlp_norm(x).to(x.dtype))


class Decoder(nn.Module):
    """Embedding, layers, norm, head. Weights are whatever `minillm.model.loader` put there."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.kernels = "auto"  # whether faster kernels may stand in for the definitions: see `load_model`
        # from_pretrained draws no numbers, which the loader would overwrite; on "meta" that costs seconds of imports.
        self.embedding = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.head.weight = self.embedding.weight

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The hidden states [num_tokens, hidden_size] of packed tokens [num_tokens] at positions [num_tokens].

        Both int64 on the model's device. Positions are absolute: a sequence that resumes at a cached prefix of n
        tokens starts at n.
        """
        turn = rotation(positions, self.config)
        x = self.embedding(tokens)
        for index, layer in enumerate(self.layers):
            x = layer(x, turn, attend, index)
        return self.norm(x).to(x.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, float32 [n, vocab_size], for chosen rows of `forward`'s result.

        Apart from `forward`, because the head is up to a quarter of a small model's work and prefill needs it for
        its last row only.
        """
        return self.head(hidden).float()


@contextmanager
def inference(device: torch.device) -> Iterator[None]:
    """What holds around a step of inference: no gradients, and a caller's autocast changes no dtype within."""
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        yield
