"""What a model is, its shape and its variations, and how an engine serves it.

One decoder serves the whole Llama family, so a family is nothing but a set of flags here: a bias on the
projections (Qwen2), a norm on queries and keys (Qwen3), a sliding window (Mistral), scaled frequencies (Llama 3.x).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from minillm.errors import CheckpointError, ConfigError, MinillmError, RequestError, require, shown

KERNELS = ("auto", "reference")
POLICIES = ("mixed", "prefill_first", "static")  # who goes first; see minillm.engine.scheduler
INT64 = 2**63 - 1  # the largest integer that a tensor holds
Range = tuple[Any, float, float]  # numbers of a kind (bool, int, float), from the smallest to the largest


def number(kind: type, default: Any, low: float = -math.inf, high: float = math.inf) -> Any:
    """A field that holds a number of this range. Where the default is None, None is allowed."""
    return field(default=default, metadata={"range": (kind, low, high)})


def check_number(name: str, value: Any, allowed: Range, error: type[MinillmError]) -> None:
    """Raise `error` for what is no number of this range. An int may stand for a float, nothing else for another."""
    kind, low, high = allowed
    right = isinstance(value, (int, kind)) and isinstance(value, bool) == (kind is bool) and bool(low <= value <= high)
    span = f" of at least {low}" if high == INT64 else f" from {low:.6g} to {high:.6g}" if high < math.inf else ""
    what = {bool: "True or False", int: f"an integer{span}", float: f"a number{span}"}[kind]
    require(right, name, value, what, error)


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
        heads, kv_heads = self.num_heads, self.num_kv_heads
        multiple = f"a multiple of num_key_value_heads={kv_heads}. Check config.json"
        require(heads % kv_heads == 0, "num_attention_heads", heads, multiple, CheckpointError)
        even = "even, for rotary embeddings turn pairs. Check config.json"
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, even, CheckpointError)

    @property
    def group_size(self) -> int:
        """Query heads per key/value head (g): 1 is multi-head, num_heads is multi-query attention."""
        return self.num_heads // self.num_kv_heads


def check_prompt(token_ids: Sequence[int], config: ModelConfig) -> None:
    """Raise RequestError for a prompt that the model cannot read: empty, too long, or of another vocabulary."""
    if len(token_ids) == 0:
        raise RequestError("The prompt is empty. Give at least one token.")
    if len(token_ids) > (most := config.max_position_embeddings):
        raise RequestError(
            f"The prompt has {len(token_ids)} tokens, the model has {most} positions. Shorten the prompt."
        )
    if strange := [token for token in token_ids if type(token) is not int or not 0 <= token < config.vocab_size]:
        why = f"Token id {shown(strange[0])} is outside the vocabulary of {config.vocab_size}, or no integer"
        raise RequestError(f"{why}. Did another model's tokenizer encode the prompt?")


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
    block_size: int = number(int, 16, 1, INT64)
    num_blocks: int | None = number(int, None, 2, INT64)
    cache_bytes: int | None = number(int, None, 1, INT64)
    max_num_seqs: int = number(int, 64, 1, INT64)
    max_num_batched_tokens: int = number(int, 512, 1, INT64)
    policy: str = _one_of(*POLICIES)
    enable_prefix_caching: bool = True
    cuda_graphs: bool = True
    num_speculative_tokens: int = number(int, 4, 0, INT64)
    adaptive_drafts: bool = True
    seed: int = number(int, 0)
    trace_bytes: int = number(int, 2**22, 0, INT64)
    debug: bool = False

    def __post_init__(self) -> None:
        for one in fields(self):
            value, kind = getattr(self, one.name), type(one.default)
            if value is one.default:
                continue
            if "range" in one.metadata:
                check_number(one.name, value, one.metadata["range"], ConfigError)
            elif choices := one.metadata.get("choices"):
                require(value in choices, one.name, value, f"one of {', '.join(map(repr, choices))}", ConfigError)
            else:
                require(type(value) is kind, one.name, value, f"a {kind.__name__}", ConfigError)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> EngineConfig:
        """The configuration with these fields. Raises ConfigError for a name that is none of them."""
        known = [one.name for one in fields(cls)]
        if strange := [name for name in settings if name not in known]:
            raise ConfigError(f"There is no setting {shown(strange[0])}. The settings are {', '.join(known)}.")
        return cls(**settings)
