"""What a step of inference must do, in closed form: FLOPs and bytes from the shape of the model alone.

One function for FLOPs and one for bytes, over any step (`minillm.costs.steps`): prefill, chunk, decode, verify and
every mixture of them are special cases. All numbers are integers, and `minillm.measure.counters` counts the same ones
in the running model.

A multiply-add is 2 FLOPs. Only matrix products are counted: norms, rotations and activation functions are a few per
cent of a small model, so that what stands here stays a lower bound.
"""

from __future__ import annotations

from typing import NamedTuple

from minillm.config import ModelConfig
from minillm.costs.steps import Step, num_tokens

NORM_BYTES = 4  # norm weights stay float32 in every model: see `minillm.model.decoder.RMSNorm`


class Flops(NamedTuple):
    """FLOPs by the part of the model that spends them."""

    projections: int  # to queries, keys and values, and back
    attention: int  # scores, and the weighted sum of the values
    mlp: int
    head: int

    @property
    def total(self) -> int:
        return sum(self)


class Bytes(NamedTuple):
    """Bytes between memory and processor, by what they hold."""

    weights: int
    kv_read: int
    kv_write: int
    activations: int = 0  # depends on the implementation: counted, not predicted

    @property
    def total(self) -> int:
        return sum(self)

    @property
    def kv_share(self) -> float:
        """Part of the bytes that is KV cache."""
        return (self.kv_read + self.kv_write) / self.total


# Weights


def attention_parameters(config: ModelConfig) -> int:
    """Weights of one layer's q, k, v and out projections; num_heads · head_dim need not be hidden_size."""
    return config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)


def mlp_parameters(config: ModelConfig) -> int:
    """Weights of the three matrices of one layer's SwiGLU: gate, up, down."""
    return 3 * config.hidden_size * config.intermediate_size


def head_parameters(config: ModelConfig) -> int:
    """Weights of the head: it multiplies, tied or not. Looking up an embedding multiplies nothing."""
    return config.vocab_size * config.hidden_size


def matmul_parameters(config: ModelConfig) -> int:
    """Weights that a step multiplies with: every layer's, and the head's."""
    return config.num_layers * (attention_parameters(config) + mlp_parameters(config)) + head_parameters(config)


def weight_bytes(config: ModelConfig, element_bytes: int, tokens: int) -> int:
    """Bytes of weights that a step over `tokens` tokens reads: every matrix, bias and norm once, an embedding each.

    The number of tokens hardly matters, and that is the whole point of batching. (A step that nobody samples from, such
    as the first chunk of a prompt, does not read the head.)
    """
    heads = config.num_heads + 2 * config.num_kv_heads
    biases = config.num_layers * heads * config.head_dim if config.qkv_bias else 0
    rows = config.num_heads + config.num_kv_heads if config.qk_norm else 0  # the decoder norms q and k head by head
    norms = config.num_layers * (2 * config.hidden_size + rows * config.head_dim) + config.hidden_size
    elements = matmul_parameters(config) + biases + tokens * config.hidden_size
    return element_bytes * elements + max(NORM_BYTES, element_bytes) * norms


# Who sees whom


def visible_pairs(q_len: int, kv_len: int, window: int | None = None) -> int:
    """(query, key) pairs that the causal rule lets through: each query sees its own token and all before, or a window.

    The queries are the last q_len of kv_len tokens. Query 0 sees `first` keys, each next one sees one more, until the
    window is full: a trapezium, then a rectangle.
    """
    limit = kv_len if window is None else min(window, kv_len)
    first = min(kv_len - q_len + 1, limit)
    growing = min(q_len, limit - first)
    return growing * first + growing * (growing - 1) // 2 + (q_len - growing) * limit


def keys_seen(q_len: int, kv_len: int, window: int | None = None) -> int:
    """Different keys that at least one of the queries sees: those a step has to read."""
    return kv_len if window is None else min(kv_len, window + q_len - 1)


# FLOPs


def step_flops(config: ModelConfig, step: Step) -> Flops:
    """FLOPs of a step: its weights times the new tokens, and 4 · heads · head_dim for each visible pair and layer.

    Scores take 2 · head_dim per pair and head, weighing the values takes as much again. Grouped queries change
    nothing: each query head has scores of its own. The head multiplies the last row of each sequence.
    """
    tokens, layers = num_tokens(step), config.num_layers
    pairs = sum(visible_pairs(*sequence, config.sliding_window) for sequence in step)
    return Flops(
        projections=2 * layers * tokens * attention_parameters(config),
        attention=4 * layers * config.num_heads * config.head_dim * pairs,
        mlp=2 * layers * tokens * mlp_parameters(config),
        head=2 * len(step) * head_parameters(config),
    )


# Bytes


def kv_bytes_per_token(config: ModelConfig, element_bytes: float) -> int:
    """Bytes of keys and values that one token leaves in the cache, all layers. Query heads do not count.

    `element_bytes` may be a fraction: see `minillm.quantization.formats.element_bytes`.
    """
    return round(2 * config.num_layers * config.num_kv_heads * config.head_dim * element_bytes)


def step_bytes(config: ModelConfig, step: Step, element_bytes: int, *, kv_element_bytes: float | None = None) -> Bytes:
    """Bytes that a step must move: every weight once, every key that somebody sees once, every new key.

    Sequences share weights, never KV. `kv_element_bytes` is for caches in another format than the model.
    """
    per_token = kv_bytes_per_token(config, element_bytes if kv_element_bytes is None else kv_element_bytes)
    tokens = num_tokens(step)
    return Bytes(
        weights=weight_bytes(config, element_bytes, tokens),
        kv_read=per_token * sum(keys_seen(*sequence, config.sliding_window) for sequence in step),
        kv_write=per_token * tokens,
    )


def least_bytes(config: ModelConfig, step: Step, element_bytes: int) -> int:
    """Bytes that no program can avoid to read from memory: the weights, and the keys and values of earlier steps.

    What the step itself makes may never leave the processor's caches. This is what bounds on time are made of.
    """
    earlier = sum(keys_seen(q_len, kv_len, config.sliding_window) - q_len for q_len, kv_len in step)
    return step_bytes(config, step, element_bytes).weights + earlier * kv_bytes_per_token(config, element_bytes)
