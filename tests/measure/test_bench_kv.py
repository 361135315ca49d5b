"""Formats of the KV cache: their bytes against the formula, their quality against definitions and known tables."""

from __future__ import annotations

import json
import math
from functools import cache

import pytest
import torch

from minillm.config import EngineConfig
from minillm.engine.engine import Engine
from minillm.errors import ConfigError
from minillm.generate import decode, prefill
from minillm.measure.bench_kv import bench_kv, bench_quality
from minillm.measure.kv_quality import (
    COMPARED,
    PER_TOKEN,
    drawn_sample,
    fidelity,
    held_out_rows,
    one_sequence,
    output_error,
    perplexity,
    trained_samples,
)
from minillm.model.decoder import Decoder
from minillm.model.loader import load_model
from minillm.model.tokenizer import Tokenizer, load_tokenizer
from minillm.quantization.formats import FORMATS, Int4, PerToken8
from minillm.sampling import SamplingParams
from tests.cache.definition import DefinitionCache, generate_in
from tests.families import random_model


@cache
def tiny() -> tuple[Decoder, Tokenizer]:
    tokenizer = load_tokenizer("tiny")
    assert tokenizer is not None
    return load_model("tiny", dtype="float32"), tokenizer


def test_bytes_are_those_of_the_formula() -> None:
    """Integer equality, ranges included."""
    rows = bench_kv(random_model("qwen3", dtype=torch.bfloat16), contexts=[64, 128], batch=2, repeats=1)
    assert [row.format for row in rows] == ["auto", "fp8", "int8", "int4"]
    for row in rows:
        assert row.allocated_bytes == row.predicted_bytes
        for step in row.steps:
            assert step.counted.weights == step.predicted.weights
            assert step.counted.kv_read == step.predicted.kv_read
            assert step.counted.kv_write == step.predicted.kv_write


def test_shares_of_a_16_bit_cache() -> None:
    """At d = 64 int8 takes at most 0.53 and int4 at most 0.32 of it."""
    model = random_model("qwen3", dtype=torch.bfloat16, head_dim=64)
    plain, fp8, int8, int4 = (row.allocated_bytes for row in bench_kv(model, contexts=[32], repeats=1))
    assert fp8 == int8 == plain * (64 + 2) / 128 <= 0.53 * plain
    assert int4 == plain * 5 / 16 <= 0.32 * plain


def test_a_report_is_plain_data() -> None:
    (row, *_) = bench_kv(random_model(), contexts=[32], repeats=2)
    data = json.loads(json.dumps(row.to_json()))
    assert data["tokens_per_gb"] == 10**9 // row.allocated_bytes and len(data["steps"][0]["times_ms"]) == 2
    assert row.steps[0].speedup == (1, 1, 1)


@pytest.mark.parametrize(
    "wrong", [{"contexts": []}, {"contexts": [0]}, {"contexts": [600]}, {"batch": 0}, {"repeats": 0}]
)
def test_what_cannot_be_measured_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="512 positions"):
        bench_kv(random_model(), **({"contexts": [32]} | wrong))  # type: ignore[arg-type]


def test_perplexity_is_that_of_decoding_token_by_token() -> None:
    model, tokenizer = tiny()
    rows = held_out_rows(tokenizer, 2, 40)
    losses = []
    for row in rows.tolist():
        logits, kv = prefill(model, row[:1])
        for token in row[1:]:
            losses.append(-float(logits.log_softmax(-1)[token]))
            logits = decode(model, token, kv)
    assert perplexity(model, rows) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_fidelity_by_definition() -> None:
    """The perplexity is `perplexity`'s; the divergence is Σ p log(p / q), token by token in float64."""
    model, tokenizer = tiny()
    rows, codec = held_out_rows(tokenizer, 2, 30), FORMATS["int4"]
    found = fidelity(model, rows, {"plain": None, "int4": codec})
    total = 0.0
    for row in rows.tolist():
        caches = [one_sequence(model, one, 30) for one in (None, codec)]
        for token in row[:-1]:
            p, q = (decode(model, token, one).double().softmax(-1) for one in caches)
            total += float((p * (p / q).log()).sum())
    assert found["int4"].divergence == pytest.approx(total / 58, rel=1e-3)
    assert found["plain"] == (pytest.approx(perplexity(model, rows)), 0)
    assert found["int4"].perplexity == pytest.approx(perplexity(model, rows, codec))


def test_held_out_perplexity_keeps_its_budget() -> None:
    """int8 +0.1 %, fp8 +0.5 %, int4 +2 %.

    So few tokens know a perplexity to a fifth of a per cent. That one range per token does worse shows in what is
    hardly noisy at all: the divergence, and the error of attention's output on the trained keys.
    """
    model, tokenizer = tiny()
    plain, *found = bench_quality(model, held_out_rows(tokenizer, 4, 1024))
    losses = {one.format: one.loss(plain) for one in found}
    assert losses["int8"] < 0.001 and losses["fp8"] < 0.005 and losses["int4"] < 0.02, losses
    apart = {one.format: one.divergence for one in found}
    assert apart["int8"] < apart["fp8"] < apart["int4"] < apart[PER_TOKEN] / 1.25 and plain.divergence == 0, apart
    errors = {one.format: one.errors["trained"] for one in found}
    assert plain.errors == {} and errors["int8"] < errors["fp8"] < errors["int4"] < errors[PER_TOKEN] / 1.1, errors


TABLE = {"fp8": 0.037, "int8": 0.009}  # relative output error on Gaussian keys, d = 128, 2048 keys
BY_TOKEN, BY_GROUP = 0.142, 0.109  # int4 with groups of 128 numbers, and of 32


@pytest.mark.parametrize("name", TABLE)
def test_errors_on_gaussian_keys_are_the_known_ones(name: str) -> None:
    assert output_error([drawn_sample()], FORMATS[name]) == pytest.approx(TABLE[name], rel=0.2)


def test_loud_channels_are_what_groups_are_for() -> None:
    """On Gaussian keys groups gain a little; with loud channels one range per token costs far more."""
    plain, loud = [drawn_sample()], [drawn_sample(outliers=True)]
    token, group = (output_error(plain, COMPARED[name]) for name in (PER_TOKEN, "int4"))
    assert token == pytest.approx(BY_TOKEN, rel=0.2) and group == pytest.approx(BY_GROUP, rel=0.2)
    assert output_error(loud, COMPARED[PER_TOKEN]) > 1.4 * output_error(loud, COMPARED["int4"])


def test_trained_keys_are_not_gaussian() -> None:
    """What random weights would never show: with trained keys one range per token is clearly worse."""
    model, tokenizer = tiny()
    samples = trained_samples(model, held_out_rows(tokenizer, 1, 256)[0].tolist())
    assert len(samples) == model.config.num_layers
    right, wrong = (output_error(samples, Int4(group)) for group in (32, 64))
    assert wrong > 1.1 * right


def test_a_rounded_cache_is_the_engines() -> None:
    """The same tokens as from the engine's cache, where the codes themselves are kept; and as by definition."""
    model, prompt = random_model("qwen3", seed=3), list(range(40))
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    for name, codec in FORMATS.items():
        rounded = generate_in(one_sequence(model, codec, 1), model, prompt, params)
        by_definition = generate_in(DefinitionCache(codec), model, prompt, params)
        engine, got = Engine(model, EngineConfig(kv_format=name)), []
        engine.add(prompt, params)
        while engine.has_unfinished:
            got += [token for event in engine.step() for token in event.token_ids]
        assert rounded == got == by_definition


def test_a_unit_scale_is_found_out() -> None:
    """The mutant that many have shipped: codes of float8 without a scale. Small numbers drown."""

    class UnitScale(PerToken8):
        def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x.to(self.dtype), torch.full(x.shape[:-1], self.largest, dtype=torch.bfloat16)

    codec = UnitScale(torch.float8_e4m3fn, 448.0)
    small = drawn_sample()
    small = type(small)(small.q, small.k, 1e-3 * small.v)
    assert output_error([small], codec) > 5 * output_error([small], FORMATS["fp8"])


def test_held_out_rows_end_somewhere() -> None:
    _, tokenizer = tiny()
    assert held_out_rows(tokenizer, 3, 50).shape == (3, 50)
    for count, length in ((0, 10), (1, 1)):
        with pytest.raises(ConfigError, match="held-out"):
            held_out_rows(tokenizer, count, length)
