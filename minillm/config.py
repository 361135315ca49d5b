"""What a model is, its shape and its variations, and how an engine serves it.

One decoder serves the whole Llama family, so a family is nothing but a set of flags here: a bias on the
projections (Qwen2), a norm on queries and keys (Qwen3), a sliding window (Mistral), scaled frequencies (Llama 3.x).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minillm.errors import CheckpointError, ConfigError, RequestError

BLOCK_SIZE = 16  # tokens per block of KV cache, if nobody says how many
MIN_BLOCK_SIZES = {"int4": 32}  # where a block's keys share ranges, few of them would have to pay for these
POLICIES = ("mixed", "prefill_first", "static")  # who goes first; see minillm.engine.scheduler


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


def check_prompt(token_ids: Sequence[int], config: ModelConfig) -> None:
    """Raise RequestError for a prompt that the model cannot read: empty, too long, or of another vocabulary."""
    if len(token_ids) == 0:
        raise RequestError("The prompt is empty. Give at least one token.")
    if len(token_ids) > config.max_position_embeddings:
        raise RequestError(
            f"The prompt has {len(token_ids)} tokens, the model has {config.max_position_embeddings} positions. "
            "Shorten the prompt."
        )
    strange = [token for token in token_ids if not 0 <= token < config.vocab_size]
    if strange:
        raise RequestError(
            f"Token id {strange[0]} is outside the vocabulary of {config.vocab_size}. Did another "
            "model's tokenizer encode the prompt?"
        )


@dataclass(frozen=True)
class EngineConfig:
    """How an engine serves: sizes, scheduling policy, and a switch for each optimisation.

    kv_format: how keys and values are stored: "auto" in the model's dtype, or "fp8", "int8", "int4" (see
    `minillm.quantization.formats`). block_size: tokens per block of KV cache; None takes what suits the format. num_blocks:
    blocks of the cache, the dummy block included; None takes `cache_bytes` instead, and None there lets the engine
    choose (see `minillm.cache.paged.choose_num_blocks`). max_num_seqs: sequences that run at the same time.
    max_num_batched_tokens: tokens per step, the budget that keeps a long prompt from stalling the others. policy: see
    `minillm.engine.scheduler`. enable_prefix_caching: reuse the KV of common beginnings. attention: a backend of
    `minillm.attention`. cuda_graphs: replay decode steps from CUDA graphs; no effect on a CPU, with other backends than
    Triton's, or with int4. num_speculative_tokens: how many tokens a proposer, if there is one, may guess for a
    sequence in one step. adaptive_drafts: guess fewer where guesses were wrong. seed: for requests that bring none.
    trace_steps: how many of the latest `StepRecord`s are kept. debug: recompute every invariant after each step; slow.

    Raises ConfigError for values that cannot work.
    """

    kv_format: str = "auto"
    block_size: int | None = None
    num_blocks: int | None = None
    cache_bytes: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    policy: str = "mixed"
    enable_prefix_caching: bool = True
    attention: str = "auto"
    cuda_graphs: bool = True
    num_speculative_tokens: int = 4
    adaptive_drafts: bool = True
    seed: int = 0
    trace_steps: int = 2000
    debug: bool = False

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            _at_least(name, getattr(self, name), 1)
        _at_least("block_size", self.kv_block_size, 1)
        if self.kv_block_size < MIN_BLOCK_SIZES.get(self.kv_format, 1):
            raise ConfigError(
                f"block_size={self.block_size} is too small for kv_format={self.kv_format!r}: a block's keys share a "
                "range per channel, and ranges would take up what codes save. Use "
                f"{MIN_BLOCK_SIZES[self.kv_format]} or more, or leave it out."
            )
        _at_least("num_speculative_tokens", self.num_speculative_tokens, 0)
        _at_least("trace_steps", self.trace_steps, 0)
        if self.num_blocks is not None:
            _at_least("num_blocks", self.num_blocks, 2)
        if self.cache_bytes is not None:
            _at_least("cache_bytes", self.cache_bytes, 1)
        if self.policy not in POLICIES:
            raise ConfigError(f"policy={self.policy!r} is unknown. Choose one of {', '.join(map(repr, POLICIES))}.")

    @property
    def kv_block_size(self) -> int:
        """Tokens per block: as many as were asked for, else what suits the format."""
        return max(BLOCK_SIZE, MIN_BLOCK_SIZES.get(self.kv_format, 1)) if self.block_size is None else self.block_size


def _at_least(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name}={value!r} is not possible: it must be an integer of at least {minimum}.")
