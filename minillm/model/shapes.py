"""The shapes of well-known models, so that their time and bytes can be measured without their weights.

`load_model("random:qwen3-0.6b")` builds the real thing in everything but the numbers inside: right for time, memory
and FLOPs, wrong for quality, acceptance rates or quantisation error. Values are those of the published `config.json`
files; the exact parameter counts are tests.
"""

from __future__ import annotations

from typing import Any

from minillm.config import ModelConfig
from minillm.errors import CheckpointError

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _llama(**shape: Any) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5} | shape


def _qwen3(**shape: Any) -> dict[str, Any]:
    common = dict(vocab_size=151936, head_dim=128, max_position_embeddings=40960, rope_theta=1e6)
    return {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True} | common | shape


def _shape(layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
    }


_SMOL = dict(vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True)
_LLAMA3 = dict(vocab_size=128256, max_position_embeddings=131072, rope_theta=500000.0)

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": _llama(**_shape(30, 576, 9, 3, 1536), **_SMOL, rope_theta=100000.0, initializer_range=1 / 24),
    "smollm2-360m": _llama(**_shape(32, 960, 15, 5, 2560), **_SMOL, rope_theta=100000.0),
    "smollm2-1.7b": _llama(**_shape(24, 2048, 32, 32, 8192), **_SMOL, rope_theta=130000.0),
    "qwen2.5-0.5b": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
    | _shape(24, 896, 14, 2, 4864)
    | dict(vocab_size=151936, max_position_embeddings=32768, rope_theta=1e6),
    "qwen3-0.6b": _qwen3(**_shape(28, 1024, 16, 8, 3072)),
    "qwen3-4b": _qwen3(**_shape(36, 2560, 32, 8, 9728)),
    "tinyllama-1.1b": _llama(**_shape(22, 2048, 32, 4, 5632), vocab_size=32000, max_position_embeddings=2048),
    "llama-3.2-1b": _llama(
        **_shape(16, 2048, 32, 8, 8192),
        **_LLAMA3,
        tie_word_embeddings=True,
        rope_scaling=_LLAMA3_ROPE | {"factor": 32.0},
    ),
    "llama-3.2-3b": _llama(
        **_shape(28, 3072, 24, 8, 8192),
        **_LLAMA3,
        head_dim=128,
        tie_word_embeddings=True,
        rope_scaling=_LLAMA3_ROPE | {"factor": 32.0},
    ),
    "llama-3.1-8b": _llama(**_shape(32, 4096, 32, 8, 14336), **_LLAMA3, rope_scaling=_LLAMA3_ROPE | {"factor": 8.0}),
    "mistral-7b": {"architectures": ["MistralForCausalLM"], "rms_norm_eps": 1e-5, "sliding_window": 4096}
    | _shape(32, 4096, 32, 8, 14336)
    | dict(vocab_size=32000, max_position_embeddings=32768),
}


def named_shape(name: str) -> ModelConfig:
    """The config behind `random:<name>`."""
    if name not in SHAPES:
        raise CheckpointError(f"No shape is called {name!r}. Shapes: {', '.join(SHAPES)}.")
    return ModelConfig.from_hf(SHAPES[name])
