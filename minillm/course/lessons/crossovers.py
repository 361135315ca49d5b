"""Where one cost overtakes another: the lengths at which attention, or the cache, weighs as much as the weights."""

from __future__ import annotations

from minillm.config import ModelConfig
from minillm.costs.formulas import attention_parameters, kv_bytes_per_token, matmul_parameters, mlp_parameters


def prefill_crossover(config: ModelConfig) -> float:
    """N*: prompt length at which causal attention takes as many FLOPs as the matrices of the layers do."""
    matrices = attention_parameters(config) + mlp_parameters(config)
    return matrices / (config.num_heads * config.head_dim) - 1


def kv_crossover(config: ModelConfig, element_bytes: int) -> float:
    """Tokens in the caches of all sequences (batch · context) at which decode reads as much KV as matrix weights."""
    return element_bytes * matmul_parameters(config) / kv_bytes_per_token(config, element_bytes)
