"""FLOP per byte of a decode step: what the operators ask for is what the formula says."""

from __future__ import annotations

import pytest

from minillm.course.lessons import intensity as module
from minillm.course.lessons.intensity import count_intensity, predict_intensity
from tests.families import random_model


def check(batch: int, context: int) -> None:
    config = random_model("qwen3").config
    assert count_intensity(config, batch, context) == pytest.approx(predict_intensity(config, batch, context))


@pytest.mark.parametrize("batch, context", [(1, 64), (3, 40), (8, 17)])
def test_counts_are_the_formula(batch: int, context: int) -> None:
    check(batch, context)


def test_only_linear_layers_gain_from_a_batch() -> None:
    config = random_model("qwen3").config
    one, many = (count_intensity(config, batch, 40) for batch in (1, 8))
    assert many.linear == 8 * one.linear
    assert many.attention == one.attention == config.group_size
    assert one.step < many.step < 8 * one.step


def test_the_check_notices_attention_that_gains_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "attention_intensity", lambda config, width: 2 * config.num_heads / width)
    with pytest.raises(AssertionError):
        check(1, 64)
