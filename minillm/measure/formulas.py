"""What each phase must do, in closed form: FLOPs and bytes from the config alone.

A multiply-add counts as 2 FLOPs. Weights are what multiplies: projections, MLP and head, whether the head is tied or
not; looking up an embedding multiplies nothing. Norms, rotations and activations are left out: a few per cent of the
FLOPs of a small model, so that what stands here stays a lower bound.
"""

from __future__ import annotations

from minillm.config import ModelConfig


def matmul_parameters(config: ModelConfig) -> int:
    """Weights that a step multiplies with: every layer's, and the head's."""
    return config.num_layers * layer_parameters(config) + config.vocab_size * config.hidden_size


def layer_parameters(config: ModelConfig) -> int:
    """Weights of the matrices of one layer: q, k, v, out (heads * head_dim need not be hidden_size), SwiGLU's three."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    return config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)


def kv_bytes_per_token(config: ModelConfig, element_bytes: int) -> int:
    """Bytes of keys and values that one token leaves in the cache, all layers. Query heads do not count."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * element_bytes


def visible_keys(config: ModelConfig, context: int) -> int:
    """Keys that the last of `context` tokens sees, itself included."""
    return min(context, config.sliding_window or context)


def decode_flops(config: ModelConfig, context: int) -> int:
    """FLOPs of the step that makes the sequence `context` tokens long: every weight once, then scores and values."""
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * visible_keys(config, context)
    return 2 * matmul_parameters(config) + attention


def decode_bytes(config: ModelConfig, context: int, element_bytes: int) -> int:
    """Bytes that the same step must read: every weight, and the KV of every visible token."""
    keys = visible_keys(config, context)
    return element_bytes * matmul_parameters(config) + keys * kv_bytes_per_token(config, element_bytes)


def prefill_flops(config: ModelConfig, tokens: int) -> int:
    """FLOPs of a prompt in one step: the layers for every token, causal attention, the head for the last token only."""
    full = min(tokens, config.sliding_window or tokens)  # tokens that see everything before them
    pairs = full * (full + 1) // 2 + (tokens - full) * full
    linear = 2 * tokens * config.num_layers * layer_parameters(config) + 2 * config.vocab_size * config.hidden_size
    return linear + 4 * config.num_layers * config.num_heads * config.head_dim * pairs


def prefill_bytes(config: ModelConfig, element_bytes: int) -> int:
    """Bytes that a prompt of any length must read: every weight once."""
    return element_bytes * matmul_parameters(config)
