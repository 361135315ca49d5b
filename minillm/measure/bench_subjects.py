"""What is measured: minillm, and `transformers` in its fastest ordinary use, with the same two phases.

Only this module and `bench_throughput` run the modelling code of transformers, and they import it on first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from minillm.cache.contiguous import ContiguousCache
from minillm.config import ModelConfig
from minillm.generate import decode, prefill
from minillm.measure.hardware import dtype_name
from minillm.measure.hf_shape import hf_shape
from minillm.model.decoder import Decoder


class Subject(Protocol):
    """Something with two phases and a cache between them. A step is the model alone: tokens in, logits out."""

    def prefill(self, token_ids: Sequence[int]) -> None:
        """Read the prompt into a new cache; the logits of its last position are computed."""
        ...

    def decode(self, context: int, steps: int) -> None:
        """Drop what is cached after the first `context` tokens, then run `steps` tokens one after the other."""
        ...


class MinillmSubject:
    """This project's `prefill` and `decode`."""

    cache: ContiguousCache

    def __init__(self, model: Decoder) -> None:
        self.model = model

    def prefill(self, token_ids: Sequence[int]) -> None:
        _, self.cache = prefill(self.model, token_ids)

    def decode(self, context: int, steps: int) -> None:
        self.cache.truncate(context)
        for _ in range(steps):
            decode(self.model, 0, self.cache)


class TransformersSubject:
    """The same shape in `transformers`, with random weights: sdpa attention, a dynamic cache, logits of the last row.

    Its static cache and eager attention were no faster on the CPUs that we tried.
    """

    cache: Any

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.model = _random_transformer(config, device, dtype)

    def prefill(self, token_ids: Sequence[int]) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache()
        self._step(token_ids)

    def decode(self, context: int, steps: int) -> None:
        self.cache.crop(context - self.cache.get_seq_length())  # negative: this many tokens are removed
        for _ in range(steps):
            self._step([0])

    @torch.inference_mode()
    def _step(self, token_ids: Sequence[int]) -> None:
        tokens = torch.tensor([token_ids], device=self.device)
        self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)


def _random_transformer(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """A `transformers` model of this shape. Rotary scaling is left out: it changes numbers in a table, not the time."""
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    shape = hf_shape(replace(config, rope_scaling=None), dtype_name(dtype))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), attn_implementation="sdpa")
    return model.to(device, dtype).eval()
