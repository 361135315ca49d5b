"""Closed forms against published counts, against brute force over tokens, and against the mutants people write."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minillm.config import ModelConfig
from minillm.measure import formulas
from minillm.model.decoder import Decoder
from minillm.model.shapes import named_shape
from tests.families import FAMILIES

QWEN = named_shape("qwen3-0.6b")

KV_BYTES = {"smollm2-135m": 23040, "qwen2.5-0.5b": 12288, "qwen3-0.6b": 114688, "llama-3.1-8b": 131072}


@pytest.mark.parametrize("shape, expected", KV_BYTES.items())
def test_kv_bytes_are_the_published_ones(shape: str, expected: int) -> None:
    assert formulas.kv_bytes_per_token(named_shape(shape), 2) == expected


def test_kv_bytes_know_grouped_queries() -> None:
    """The mutant counts query heads: twice as much for Qwen3-0.6B."""
    mutant = formulas.kv_bytes_per_token(replace(QWEN, num_kv_heads=QWEN.num_heads), 2)
    assert mutant == 2 * KV_BYTES["qwen3-0.6b"]


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_matrices(family: str) -> None:
    """Counted in the real decoder: all weights of its linear layers."""
    config = ModelConfig.from_hf(FAMILIES[family])
    with torch.device("meta"):
        model = Decoder(config)
    counted = sum(module.weight.numel() for name, module in model.named_modules() if hasattr(module, "in_features"))
    assert formulas.matmul_parameters(config) == counted


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_flops_equal_a_counter_and_a_sum_over_tokens(family: str) -> None:
    """Linear layers are counted by torch as they run; attention token by token: query i sees min(i, window) keys."""
    config = ModelConfig.from_hf(FAMILIES[family])
    tokens = random.Random(seed := random.randrange(2**32)).randrange(1, 40)
    with torch.device("meta"):
        model = Decoder(config)
        with FlopCounterMode(display=False) as counter:
            hidden = model(torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens), lambda layer, q, k, v: q)
            model.logits(hidden[-1:])
    pairs = sum(min(i, config.sliding_window or i) for i in range(1, tokens + 1))
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    assert formulas.prefill_flops(config, tokens) == counter.get_total_flops() + attention, f"{seed=}"


def test_decoding_the_last_token_completes_the_prefill() -> None:
    """A prompt of n tokens costs what n - 1 tokens and one decode step cost, but for one head too many."""
    for n in (2, 100, 5000):
        head = 2 * QWEN.vocab_size * QWEN.hidden_size
        parts = formulas.prefill_flops(QWEN, n - 1) + formulas.decode_flops(QWEN, n) - head
        assert formulas.prefill_flops(QWEN, n) == parts


def test_decode_reads_weights_and_kv() -> None:
    weights = 2 * formulas.matmul_parameters(QWEN)
    assert weights == 2 * (596_049_920 - 28 * (2 * 1024 + 2 * 128) - 1024)  # all parameters but the norms
    assert formulas.decode_bytes(QWEN, 1000, 2) == weights + 1000 * 114688
    assert formulas.decode_bytes(replace(QWEN, sliding_window=64), 1000, 2) == weights + 64 * 114688
    assert formulas.prefill_bytes(QWEN, 2) == weights
