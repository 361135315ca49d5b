"""What a format costs a model that was trained: perplexity on held-out text. Random weights say nothing about it."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.cache.contiguous import ContiguousCache, QuantizedContiguousCache, SequenceCache
from minillm.cache.formats import FORMATS, Format, Int4, PerToken8
from minillm.model.corpus import held_out_texts
from minillm.model.decoder import Decoder
from minillm.model.loader import load_model
from minillm.model.tokenizer import load_tokenizer

ROWS, LENGTH = 8, 512
CPU = torch.device("cpu")


@cache
def tiny() -> Decoder:
    return load_model("tiny", device="cpu", dtype="float32")


@cache
def rows() -> Tensor:
    """`[ROWS, LENGTH]` tokens, taken evenly from all held-out text."""
    tokenizer = load_tokenizer("tiny")
    assert tokenizer is not None
    tokens = torch.tensor([token for text in held_out_texts() for token in tokenizer.encode(text)])
    starts = torch.linspace(0, len(tokens) - LENGTH, ROWS).long()
    return torch.stack([tokens[start : start + LENGTH] for start in starts])


@cache
def losses(kv_format: Format | None) -> Tensor:
    """Mean nats per token of each row, read through the cache in one step."""
    return torch.stack([_loss(row, _cache(kv_format)) for row in rows()])


@torch.inference_mode()
def _loss(row: Tensor, kv: SequenceCache) -> Tensor:
    logits = tiny().logits(tiny()(row, torch.arange(len(row)), kv.attend))
    return F.cross_entropy(logits[:-1], row[1:])


def _cache(kv_format: Format | None) -> SequenceCache:
    sizes = {"capacity": LENGTH, "device": CPU, "dtype": torch.float32}
    if kv_format is None:
        return ContiguousCache(tiny().config, **sizes)
    return QuantizedContiguousCache(tiny().config, kv_format, **sizes, block_size=32)


def rise(kv_format: Format) -> float:
    """By which share the perplexity rises."""
    return math.expm1(float((losses(kv_format) - losses(None)).mean()))


@pytest.mark.parametrize(("name", "budget"), [("int8", 0.001), ("fp8", 0.005), ("int4", 0.02)])
def test_perplexity_stays_within_its_budget(name: str, budget: float) -> None:
    assert rise(FORMATS[name]) <= budget


INT4_BY_TOKEN = Format("int4 by token", Int4(dim=-1), Int4(dim=-1))


def test_int4_keys_by_token_are_visibly_worse() -> None:
    """The wrong axis: same bits, twice the loss or more, in nearly every row."""
    assert rise(INT4_BY_TOKEN) > 2 * rise(FORMATS["int4"])
    assert (losses(INT4_BY_TOKEN) > losses(FORMATS["int4"])).sum() >= ROWS - 2


class Narrow(PerToken8):
    """A scale that was not looked up but guessed, as for unit scales: what is larger than it is clipped (trap 47)."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.ones(x.shape[:-1], dtype=torch.bfloat16)
        return (x.float().clamp(-1, 1) * self.largest).to(self.dtype), scale


def test_a_guessed_scale_is_visibly_worse() -> None:
    assert rise(Format("clipped", *[Narrow(torch.float8_e4m3fn, 448.0)] * 2)) > 0.05
