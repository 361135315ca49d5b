"""A shape as transformers writes it: for the other library's model in a benchmark, and for checkpoints of our own."""

from __future__ import annotations

from typing import Any

from minillm.config import ModelConfig
from minillm.errors import CheckpointError


def hf_shape(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model with this shape, readable by transformers 4 and 5 and by `minillm.model.hf`.

    Raises CheckpointError for scaled rotary frequencies.
    """
    if config.rope_scaling is not None:
        raise CheckpointError("A config with scaled rotary frequencies is read only: no model here is trained with it.")
    hf: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": config.architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "eos_token_id": list(config.eos_token_ids) or None,
        "torch_dtype": dtype,
    }
    if config.architecture == "MistralForCausalLM":  # a window for every layer, or none
        return hf | {"sliding_window": config.sliding_window}
    if config.sliding_window is None:
        return hf
    return hf | {"sliding_window": config.sliding_window, "use_sliding_window": True, "max_window_layers": 0}
