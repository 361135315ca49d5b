"""One tiny random configuration per family, as Hugging Face writes it: the shapes that break things.

Groups of three (no power of two), head_dim * heads != hidden, biases, norms on queries and keys, a window shorter than
the prompt, stretched rotary frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from minillm.config import ModelConfig
from minillm.model.decoder import Decoder
from minillm.model.hf import model_config
from minillm.model.loader import assemble

BASE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # large weights: near-uniform attention would hide wrong masks
    "hidden_act": "silu",
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": BASE | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 6},
    "llama3": BASE | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_scaling": LLAMA3_ROPE},
    "smollm2": BASE | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True},
    "tinyllama": BASE | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": None},
    "mistral": BASE | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 9},
    "qwen2": BASE | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "head_dim": None},
    "qwen3": BASE | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16},
    "qwen3-tied": BASE | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True},
}


@dataclass(frozen=True)
class Drawn:
    """A source of tensors for `assemble`: normal ones of the config's initial spread, ones for norms."""

    config: ModelConfig
    dtype: torch.dtype
    generator: torch.Generator

    def __call__(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        spread = self.config.initializer_range
        plain = torch.empty(shape, dtype=self.dtype)
        return torch.ones(shape) if "norm" in name else plain.normal_(0, spread, generator=self.generator)


def random_model(family: str = "qwen3", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Decoder:
    """A tiny decoder of one family with random weights, on the CPU."""
    config = model_config(FAMILIES[family] | changes)
    read = Drawn(config, dtype, torch.Generator().manual_seed(seed))
    return assemble(config, read, torch.device("cpu"), dtype)
