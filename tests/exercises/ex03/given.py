"""A decoder small enough to read: what the checks of exercise 03 run a learner's cache in."""

from __future__ import annotations

from types import SimpleNamespace

import torch


class ToyDecoder:
    """Attention layers with rotary positions, and a head. Weights come from outside, so that two can be the same."""

    def __init__(self, embedding, layers, kv_heads, head_dim):
        self.embedding, self.layers, self.head_dim = embedding, layers, head_dim
        self.config = SimpleNamespace(num_layers=len(layers), num_kv_heads=kv_heads, head_dim=head_dim)
        self.device, self.dtype = embedding.device, embedding.dtype
        self.rows = []  # how many tokens came with each call

    def __call__(self, tokens, positions, attend):
        self.rows.append(len(tokens))
        hidden = self.embedding[tokens]
        for layer, (wq, wk, wv, wo) in enumerate(self.layers):
            q, k, v = (hidden.matmul(w).unflatten(-1, (-1, self.head_dim)) for w in (wq, wk, wv))
            out = attend(layer, self._rotate(q, positions), self._rotate(k, positions), v)
            hidden = hidden + out.flatten(1).matmul(wo)
        return hidden

    def logits(self, hidden):
        return hidden.matmul(self.embedding.T)

    def _rotate(self, x, positions):
        frequency = 100.0 ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)
        angle = (positions[:, None] * frequency)[:, None, :]
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.cat([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], dim=-1)
