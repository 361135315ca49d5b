"""Crossovers: the published values, rounded, and that the formulas do cross there."""

from __future__ import annotations

import pytest

from minillm.config import ModelConfig
from minillm.costs.formulas import step_flops
from minillm.costs.steps import prefill_step
from minillm.course.lessons.crossovers import kv_crossover, prefill_crossover
from minillm.shapes import named_shape

LLAMA, QWEN, SMOL = named_shape("llama-3.1-8b"), named_shape("qwen3-0.6b"), named_shape("smollm2-135m")


@pytest.mark.parametrize(
    "config, prefill, tokens", [(LLAMA, 53_000, 114_500), (QWEN, 7_700, 10_400), (SMOL, 6_100, 11_700)]
)
def test_crossovers(config: ModelConfig, prefill: int, tokens: int) -> None:
    assert prefill_crossover(config) == pytest.approx(prefill, rel=0.02)
    assert kv_crossover(config, 2) == pytest.approx(tokens, rel=0.01)


def test_attention_overtakes_the_matrices_at_the_crossover() -> None:
    for config in (LLAMA, QWEN, SMOL):
        below, above = (step_flops(config, prefill_step(int(prefill_crossover(config) * f))) for f in (0.99, 1.01))
        assert below.attention < below.projections + below.mlp
        assert above.attention > above.projections + above.mlp
