"""The roofline's arithmetic against hand-made numbers, published ones, and limits."""

from __future__ import annotations

from math import inf

import pytest

from minillm.costs.formulas import least_bytes, step_bytes, step_flops
from minillm.costs.steps import decode_step, prefill_step, verify_step
from minillm.measure import roof
from minillm.measure.roof import Roof
from minillm.shapes import named_shape

LLAMA, QWEN, SMOL = named_shape("llama-3.1-8b"), named_shape("qwen3-0.6b"), named_shape("smollm2-135m")
GPU = Roof(flops_per_second=790e12, bytes_per_second=4.3e12)


def test_a_roof_is_a_slope_and_a_ceiling() -> None:
    square = Roof(100.0, 10.0)
    assert square.ridge == 10
    assert [square.flop_rate(x) for x in (1, 10, 1000)] == [10, 100, 100]
    assert (square.seconds(200, 10), square.seconds(200, 50)) == (2, 5)
    assert (square.mfu(200, 4), square.mbu(30, 6)) == (0.5, 0.5)


def test_utilisation_is_one_at_the_bound() -> None:
    for step in (prefill_step(2000), decode_step(100)):
        flops, moved = step_flops(LLAMA, step).total, least_bytes(LLAMA, step, 2)
        seconds = roof.step_seconds(LLAMA, step, 2, GPU)
        assert max(GPU.mfu(flops, seconds), GPU.mbu(moved, seconds)) == pytest.approx(1)


@pytest.mark.parametrize(
    "batch, context, milliseconds", [(1, 1024, 3.52), (32, 1024, 4.49), (128, 1024, 7.49), (32, 8192, 11.5)]
)
def test_time_per_token_of_an_8b_model(batch: int, context: int, milliseconds: float) -> None:
    assert 1e3 * roof.tpot_bound(LLAMA, context, 2, GPU, batch=batch) == pytest.approx(milliseconds, rel=0.005)


def test_a_prompt_token_costs_a_ridge_less_than_an_output_token() -> None:
    """Cost of a token read against one written, both at their bound: 1 / ridge."""
    read = roof.step_seconds(LLAMA, prefill_step(10_000), 2, Roof(GPU.flops_per_second, inf)) / 10_000
    written = roof.tpot_bound(LLAMA, 1, 2, Roof(inf, GPU.bytes_per_second))
    assert written / read == pytest.approx(GPU.ridge, rel=0.2)  # the head runs once per prompt, attention comes on top


@pytest.mark.parametrize("batch, expected", [(1, 1.0), (32, 26), (128, 62), (256, 81)])
def test_intensity_of_decode_never_reaches_the_ridge(batch: int, expected: float) -> None:
    assert roof.intensity(LLAMA, decode_step(1000, batch), 2) == pytest.approx(expected, rel=0.03)
    assert roof.intensity(LLAMA, decode_step(1000, 100_000), 2) < GPU.ridge


def test_rows_are_rows() -> None:
    """A prompt of T tokens and a batch of T sequences lift the linear layers alike."""
    assert roof.linear_intensity(1, 4096, 14336, 2) == pytest.approx(1, rel=0.001)
    assert roof.linear_intensity(64, 4096, 14336, 2) == pytest.approx(64, rel=0.03)
    assert roof.linear_intensity(10**9, 576, 192, 2) == pytest.approx(144, rel=0.001)  # k_proj of SmolLM2-135M


def test_knee() -> None:
    assert roof.ridge_rows(4096, 14336, 2, 184) == pytest.approx(195, rel=0.01)
    assert roof.ridge_rows(576, 192, 2, 184) == inf, "no number of rows lifts it over the ridge"
    for inputs, outputs, width in ((4096, 14336, 2), (576, 1536, 2), (1024, 3072, 4)):
        rows = roof.ridge_rows(inputs, outputs, width, 50)
        assert roof.linear_intensity(round(rows), inputs, outputs, width) == pytest.approx(50, rel=0.02)


def test_intensity_of_decode_attention_is_the_group_whatever_the_batch() -> None:
    """Out of the formulas for whole steps: attention FLOPs over KV bytes."""
    for config in (LLAMA, QWEN, SMOL):
        for batch, context in ((1, 100), (16, 100), (16, 5000)):
            step = decode_step(context, batch)
            ratio = step_flops(config, step).attention / step_bytes(config, step, 2).kv_read
            assert ratio == roof.attention_intensity(config, 2) == config.group_size
    step = verify_step(10_000, drafts=3)
    ratio = step_flops(LLAMA, step).attention / step_bytes(LLAMA, step, 2).kv_read
    assert ratio == pytest.approx(roof.attention_intensity(LLAMA, 2, q_len=4), rel=0.001)


@pytest.mark.parametrize(
    "acceptance, drafts, expected", [(0.6, 3, 2.18), (0.8, 5, 3.69), (0.9, 8, 6.13), (1, 4, 5), (0, 4, 1)]
)
def test_expected_tokens(acceptance: float, drafts: int, expected: float) -> None:
    assert roof.expected_tokens(acceptance, drafts) == pytest.approx(expected, abs=0.005)


def test_speculation_pays_only_while_verifying_is_cheap() -> None:
    assert roof.speculative_speedup(0.8, 5, draft_cost=0.1) == pytest.approx(3.69 / 1.5, abs=0.01)
    assert roof.speculative_speedup(0.8, 5, draft_cost=0.1, verify_cost=6) < 1


def test_quantising_a_small_share_gains_little() -> None:
    assert roof.quantized_speedup(0.22, 4) == pytest.approx(1.2, abs=0.01)
    assert roof.quantized_speedup(0.01, 4) < 1.01 and roof.quantized_speedup(1.0, 4) == 4
