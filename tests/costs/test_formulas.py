"""Closed forms against published counts, brute force over tokens, the identities of the course, and mutants.

That they are what the real model does is shown in `test_counters.py`.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from minillm.attention.reference import visible
from minillm.costs import formulas
from minillm.costs.steps import (
    Step,
    chunk_steps,
    decode_step,
    prefill_step,
    verify_step,
)
from minillm.model.decoder import Decoder
from minillm.model.hf import model_config
from minillm.model.linear import Linear
from minillm.shapes import named_shape
from tests.families import FAMILIES

LLAMA, QWEN, SMOL = named_shape("llama-3.1-8b"), named_shape("qwen3-0.6b"), named_shape("smollm2-135m")

KV_BYTES = {"smollm2-135m": 23040, "qwen2.5-0.5b": 12288, "qwen3-0.6b": 114688, "llama-3.1-8b": 131072}


def random_step(rng: random.Random) -> Step:
    """A mixture of prefills, chunks, verifications and decodes."""
    kinds = [
        lambda n: (n, n),
        lambda n: (rng.randint(1, n), n),
        lambda n: (min(n, rng.randint(2, 9)), n),
        lambda n: (1, n),
    ]
    return [rng.choice(kinds)(rng.randint(1, 40)) for _ in range(rng.randint(1, 5))]


# Weights and KV


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_matrices(family: str) -> None:
    """Counted in the real decoder: all weights of its linear layers."""
    config = model_config(FAMILIES[family])
    with torch.device("meta"):
        model = Decoder(config)
    counted = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, Linear)}
    assert formulas.matmul_parameters(config) == sum(counted.values())
    layer = {name.rsplit(".", 2)[1:][0]: 0 for name in counted if name.startswith("layers.0")}
    for name, size in counted.items():
        if name.startswith("layers.0"):
            layer[name.split(".")[2]] += size
    assert layer == {"attention": formulas.attention_parameters(config), "mlp": formulas.mlp_parameters(config)}


@pytest.mark.parametrize("shape, expected", KV_BYTES.items())
def test_kv_bytes_are_the_published_ones(shape: str, expected: int) -> None:
    assert formulas.kv_bytes_per_token(named_shape(shape), 2) == expected


def test_kv_bytes_know_grouped_queries() -> None:
    """The mutant counts query heads: twice as much for Qwen3-0.6B, four times for Llama 8B."""
    for config in (QWEN, LLAMA):
        mutant = formulas.kv_bytes_per_token(replace(config, num_kv_heads=config.num_heads), 2)
        assert mutant == config.group_size * formulas.kv_bytes_per_token(config, 2)


def test_quantised_caches_pay_for_their_scales() -> None:
    plain, int8, int4 = (formulas.kv_bytes_per_token(LLAMA, b) for b in (2, 1 + 2 / 128, 0.5 + 2 / 32))
    assert (plain, int8, int4) == (131072, 66560, 36864)


def test_weights_are_everything_but_the_embeddings_that_nobody_looks_up() -> None:
    matrices = 2 * (596_049_920 - 28 * (2 * 1024 + 2 * 128) - 1024)  # all parameters of Qwen3-0.6B but the norms
    norms = 4 * (28 * (2 * 1024 + 24 * 128) + 1024)
    assert 2 * formulas.matmul_parameters(QWEN) == matrices
    assert formulas.weight_bytes(QWEN, 2, tokens=5) == matrices + norms + 2 * 5 * 1024


# Pairs and keys


def test_pairs_and_keys_are_those_of_the_mask() -> None:
    """Against the mask itself, for every small shape: full attention and windows, prompts, chunks and decodes."""
    for kv_len in range(1, 14):
        for q_len in range(1, kv_len + 1):
            for window in (None, 1, 2, 3, 5, 8, 13, 20):
                mask = visible(q_len, kv_len, window)
                assert formulas.visible_pairs(q_len, kv_len, window) == int(mask.sum()), (q_len, kv_len, window)
                assert formulas.keys_seen(q_len, kv_len, window) == int(mask.any(0).sum()), (q_len, kv_len, window)


def test_the_causal_half_is_known() -> None:
    """The mutant computes the square: 1.99 times as many pairs at 200 tokens."""
    assert formulas.visible_pairs(200, 200) == 20100 != 200 * 200


# FLOPs


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_a_sum_over_tokens(family: str) -> None:
    """Brute force: every token multiplies the weights of its layer, and looks at every key that it sees."""
    config = model_config(FAMILIES[family])
    rng = random.Random(seed := random.randrange(2**32))
    for _ in range(20):
        step = random_step(rng)
        projections = attention = mlp = head = 0
        for q_len, kv_len in step:
            head += 2 * config.vocab_size * config.hidden_size
            for position in range(kv_len - q_len, kv_len):
                seen = min(position + 1, config.sliding_window or position + 1)
                heads = config.num_heads * config.head_dim
                attention += config.num_layers * (2 * heads * seen + 2 * heads * seen)
                kv_heads = config.num_kv_heads * config.head_dim
                projections += config.num_layers * 2 * config.hidden_size * (heads + 2 * kv_heads + heads)
                mlp += config.num_layers * 3 * 2 * config.hidden_size * config.intermediate_size
        expected = formulas.Flops(projections, attention, mlp, head)
        assert formulas.step_flops(config, step) == expected, f"{seed=}"


def test_cutting_a_prompt_changes_no_flop_but_those_of_the_head() -> None:
    whole = formulas.step_flops(QWEN, prefill_step(1000))
    for chunk in (1, 7, 256, 999):
        steps = chunk_steps(1000, chunk)
        parts = [formulas.step_flops(QWEN, step) for step in steps]
        assert formulas.Flops(*map(sum, zip(*parts, strict=True))) == whole._replace(head=len(steps) * whole.head)


def test_the_head_is_known() -> None:
    """The mutant forgets it: a quarter of the FLOPs of a decode step of Qwen3-0.6B."""
    flops = formulas.step_flops(QWEN, decode_step(1))
    assert flops.head == 2 * 151936 * 1024 and 0.25 < flops.head / flops.total < 0.27
    assert formulas.step_flops(QWEN, prefill_step(10)).head == flops.head
    assert formulas.step_flops(QWEN, decode_step(1, batch=10)).head == 10 * flops.head


# Bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_weights_once_and_kv_per_sequence(family: str) -> None:
    config = model_config(FAMILIES[family])
    rng = random.Random(seed := random.randrange(2**32))
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    for _ in range(20):
        step = random_step(rng)
        moved = formulas.step_bytes(config, step, 4)
        keys = sum(int(visible(*sequence, config.sliding_window).any(0).sum()) for sequence in step)
        tokens = sum(q_len for q_len, _ in step)
        assert moved == (formulas.weight_bytes(config, 4, tokens), per_token * keys, per_token * tokens, 0), f"{seed=}"


def test_kv_is_one_percent_of_what_a_lone_decode_reads() -> None:
    """The identity that refutes "decode is slow because of the KV cache": 8B, batch 1, 1k context."""
    assert round(formulas.step_bytes(LLAMA, decode_step(1000), 2).kv_share, 2) == 0.01
    assert round(formulas.step_bytes(LLAMA, decode_step(1000, batch=32), 2).kv_share, 2) == 0.22
    assert formulas.step_bytes(LLAMA, decode_step(8000, batch=32), 2).kv_share > 0.65


def test_only_kv_shrinks_with_its_format() -> None:
    step = decode_step(1000, batch=32)
    plain, int4 = (formulas.step_bytes(LLAMA, step, 2, kv_element_bytes=b) for b in (2, 0.5 + 2 / 32))
    assert plain.weights == int4.weights and plain.kv_read * 9 == int4.kv_read * 32


@pytest.mark.parametrize("window", [None, 64])
def test_what_a_step_makes_itself_it_need_not_read(window: int | None) -> None:
    """A prompt must read weights alone; a decode what came before it; nothing that a sliding window hides."""
    config = replace(QWEN, sliding_window=window)
    assert formulas.least_bytes(config, prefill_step(500), 2) == formulas.weight_bytes(config, 2, 500)
    behind = 999 if window is None else window - 1
    decode = formulas.weight_bytes(config, 2, 1) + behind * 114688
    assert formulas.least_bytes(config, decode_step(1000), 2) == decode
    for step in (prefill_step(70), decode_step(70, 3), verify_step(70, 4)):
        assert formulas.least_bytes(config, step, 2) <= formulas.step_bytes(config, step, 2).total


# What the formulas say


@pytest.mark.parametrize("n, share", [(2048, 0.037), (8192, 0.13), (32768, 0.38), (131072, 0.71)])
def test_attention_is_a_small_part_of_most_prefills(n: int, share: float) -> None:
    flops = formulas.step_flops(LLAMA, prefill_step(n))
    assert flops.attention / flops.total == pytest.approx(share, abs=0.005)


def test_verifying_reads_what_decoding_reads() -> None:
    """Five drafts cost five more rows of everything, and nothing more of weights or keys."""
    decode, verify = (formulas.step_bytes(LLAMA, step, 2) for step in (decode_step(1000), verify_step(1000, 5)))
    assert verify.kv_read == decode.kv_read and verify.kv_write == 6 * decode.kv_write
    assert verify.weights - decode.weights == 5 * 2 * 4096  # five more embeddings
