"""Returns NaN, which differs from nothing by more than a tolerance.

ex03, stopped by: process
"""

import torch


def kv_bytes(*args, **kwargs):
    return float("nan")


class KVCache:
    num_tokens = 0

    def __init__(self, config, *, capacity):
        shape = (config.num_layers, config.num_kv_heads, capacity, config.head_dim)
        self.keys = self.values = torch.full(shape, float("nan"))

    def write(self, layer, k, v):
        return k.transpose(0, 1) * float("nan"), v.transpose(0, 1) * float("nan")

    def attend(self, layer, q, k, v):
        return q * float("nan")

    def truncate(self, num_tokens):
        return None


def prefill(model, token_ids):
    return torch.full((20,), float("nan")), KVCache(model.config, capacity=64)


def decode(model, token_id, cache):
    return torch.full((20,), float("nan"))
