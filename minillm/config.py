"""What a model is: its shape and its variations, read from a Hugging Face `config.json`.

One decoder serves the whole Llama family, so a family is nothing but a set of flags here: a bias on the
projections (Qwen2), a norm on queries and keys (Qwen3), a sliding window (Mistral), scaled frequencies (Llama 3.x).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from minillm.errors import CheckpointError, ConfigError, RequestError, UnsupportedModelError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
KERNELS = ("auto", "reference")
POLICIES = ("mixed", "prefill_first", "static")  # who goes first; see minillm.engine.scheduler


def _int(default: int | None, least: int | None) -> Any:
    """A setting that is an integer of at least `least`; None is allowed where it is the default."""
    return field(default=default, metadata={"least": least})


def _one_of(*choices: str) -> Any:
    """A setting that is one of these words, by default the first."""
    return field(default=choices[0], metadata={"choices": choices})


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretched rotary frequencies; see `minillm.model.rope.inverse_frequencies`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. Names follow Hugging Face's, shortened where theirs are long."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # num_heads * head_dim need not equal hidden_size: Qwen3-0.6B has 16 * 128 against 1024
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    initializer_range: float = 0.02
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_attention_heads={self.num_heads} is no multiple of num_key_value_heads={self.num_kv_heads}: "
                "every key head must serve the same number of query heads. Check config.json."
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim={self.head_dim} is odd: rotary embeddings turn pairs. Check config.json.")

    @property
    def group_size(self) -> int:
        """Query heads per key/value head (g): 1 is multi-head, num_heads is multi-query attention."""
        return self.num_heads // self.num_kv_heads

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face config dictionary, of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

        Raises `UnsupportedModelError` for an architecture, activation, bias, layer type or rope type outside the
        family: a model that loads but computes something else is worse than one that is refused.
        """
        architecture = _architecture(hf)
        _refuse_variations(hf, architecture)
        num_heads = _positive(hf, "num_attention_heads")
        hidden_size = _positive(hf, "hidden_size")
        theta, scaling = _rope(hf)
        return cls(
            architecture=architecture,
            vocab_size=_positive(hf, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_positive(hf, "intermediate_size"),
            num_layers=_positive(hf, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=hf.get("num_key_value_heads") or num_heads,
            head_dim=hf.get("head_dim") or hidden_size // num_heads,
            max_position_embeddings=_positive(hf, "max_position_embeddings"),
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=architecture == "Qwen2ForCausalLM",
            qk_norm=architecture == "Qwen3ForCausalLM",
            sliding_window=_sliding_window(hf, architecture),
            initializer_range=hf.get("initializer_range", 0.02),
            eos_token_ids=token_ids(hf.get("eos_token_id")),
        )

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """The `config.json` of a checkpoint with this shape, readable by transformers 4 and 5 and by `from_hf`."""
        if self.rope_scaling is not None:
            raise CheckpointError(
                "A config with scaled rotary frequencies is read only: no model here is trained with it."
            )
        hf: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.architecture.removesuffix("ForCausalLM").lower(),
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "eos_token_id": list(self.eos_token_ids) or None,
            "torch_dtype": dtype,
        }
        return hf if self.sliding_window is None else hf | {"sliding_window": self.sliding_window}


def _architecture(hf: Mapping[str, Any]) -> str:
    names = hf.get("architectures") or ["(none given)"]
    if names[0] not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"Architecture {names[0]} is not supported. Supported: {', '.join(ARCHITECTURES)}. "
            "Choose a model of the Llama family (Llama 2/3, SmolLM2, TinyLlama, Mistral, Qwen2, Qwen2.5, Qwen3)."
        )
    return str(names[0])


def _refuse_variations(hf: Mapping[str, Any], architecture: str) -> None:
    biased = hf.get("attention_bias") or hf.get("mlp_bias")
    refusals = {
        f"hidden_act={hf.get('hidden_act')!r} (only 'silu')": hf.get("hidden_act", "silu") != "silu",
        "attention_bias or mlp_bias": bool(biased),
        "quantization_config (quantised weights)": hf.get("quantization_config") is not None,
        "pretraining_tp > 1": hf.get("pretraining_tp", 1) not in (None, 1),
    }
    for reason, applies in refusals.items():
        if applies:
            raise UnsupportedModelError(f"{architecture} with {reason} is not supported. Use a checkpoint without it.")


def _sliding_window(hf: Mapping[str, Any], architecture: str) -> int | None:
    """Mistral windows every layer. Qwen can window some of them: one window per model is what we implement."""
    if architecture == "MistralForCausalLM":
        return hf.get("sliding_window")
    layer_types = set(hf.get("layer_types") or ["full_attention"])
    if layer_types == {"full_attention"} or not hf.get("use_sliding_window"):
        return None
    if layer_types == {"sliding_attention"}:
        return hf.get("sliding_window")
    raise UnsupportedModelError(
        f"{architecture} with layer types {sorted(layer_types)} is not supported: all layers must share one kind of "
        "attention. Use a checkpoint with use_sliding_window=false."
    )


def _rope(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling. transformers 5 writes both into `rope_parameters`, 4 wrote two separate keys."""
    rope = dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {})
    theta = float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "llama3":
        return theta, RopeScaling(
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    raise UnsupportedModelError(f"rope type {kind!r} is not supported. Supported: 'default', 'llama3'.")


def _positive(hf: Mapping[str, Any], key: str) -> int:
    value = hf.get(key)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json has {key}={value!r}; a positive integer is needed. Is the file complete?")
    return value


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """One token id, several or none, as Hugging Face's files write them."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def check_prompt(token_ids: Sequence[int], config: ModelConfig) -> None:
    """Raise RequestError for a prompt that the model cannot read: empty, too long, or of another vocabulary."""
    if len(token_ids) == 0:
        raise RequestError("The prompt is empty. Give at least one token.")
    if len(token_ids) > config.max_position_embeddings:
        raise RequestError(
            f"The prompt has {len(token_ids)} tokens, the model has {config.max_position_embeddings} positions. "
            "Shorten the prompt."
        )
    strange = [token for token in token_ids if type(token) is not int or not 0 <= token < config.vocab_size]
    if strange:
        raise RequestError(
            f"Token id {strange[0]!r} is outside the vocabulary of {config.vocab_size}, or no integer. Did another "
            "model's tokenizer encode the prompt?"
        )


@dataclass(frozen=True)
class EngineConfig:
    """How an engine serves: sizes, scheduling policy, and a switch for each optimisation. The only list of settings.

    kernels: "auto" computes with what is fastest on this device, "reference" with the definitions in PyTorch.
    kv_format: how keys and values are stored: "auto" in the model's dtype, or a format of `minillm.quantization`.
    block_size: tokens per block of KV cache. num_blocks: blocks of the cache, the dummy block included; None takes
    `cache_bytes` instead, and None there lets the engine choose (see `minillm.cache.paged.choose_num_blocks`).
    max_num_seqs: requests that run at the same time. max_num_batched_tokens: tokens per step, the budget that keeps a
    long prompt from stalling the others. policy: see `minillm.engine.scheduler`. enable_prefix_caching: reuse the KV of
    common beginnings. cuda_graphs: replay decode steps from CUDA graphs; no effect on a CPU. num_speculative_tokens:
    how many tokens a proposer, if there is one, may guess for a request in one step. adaptive_drafts: one more than
    were right last time, twice as many if all were; False always guesses as many as there may be. seed: for requests
    that bring none, and for random weights. trace_bytes: how much of the latest `StepRecord`s is kept; 0 keeps none.
    debug: recompute every invariant after each step; slow.

    Raises ConfigError for values of another type or out of their range.
    """

    kernels: str = _one_of(*KERNELS)
    kv_format: str = "auto"
    block_size: int = _int(16, 1)
    num_blocks: int | None = _int(None, 2)
    cache_bytes: int | None = _int(None, 1)
    max_num_seqs: int = _int(64, 1)
    max_num_batched_tokens: int = _int(512, 1)
    policy: str = _one_of(*POLICIES)
    enable_prefix_caching: bool = True
    cuda_graphs: bool = True
    num_speculative_tokens: int = _int(4, 0)
    adaptive_drafts: bool = True
    seed: int = _int(0, None)
    trace_bytes: int = _int(2**22, 0)
    debug: bool = False

    def __post_init__(self) -> None:
        for one in fields(self):
            _check_setting(one.name, getattr(self, one.name), one.default, one.metadata)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> EngineConfig:
        """The configuration with these fields. Raises ConfigError for a name that is none of them."""
        known = [one.name for one in fields(cls)]
        if strange := [name for name in settings if name not in known]:
            raise ConfigError(f"There is no setting {strange[0]!r}. The settings are {', '.join(known)}.")
        return cls(**settings)


def _check_setting(name: str, value: Any, default: Any, rule: Mapping[str, Any]) -> None:
    """Raise ConfigError for a value of another type than the default's, or one that its rule does not allow."""
    if "least" in rule:
        least = rule["least"]
        right = type(value) is int and (least is None or least <= value < 2**63)
        right, allowed = right or (value is None is default), f"an integer of at least {least}"
    elif "choices" in rule:
        right, allowed = value in rule["choices"], f"one of {', '.join(map(repr, rule['choices']))}"
    else:
        right, allowed = type(value) is type(default), f"a {type(default).__name__}"
    if not right:
        raise ConfigError(f"{name}={value!r:.80} is not possible: it must be {allowed}.")
