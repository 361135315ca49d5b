"""What a batch gains is drawn from the run, over its own bound; intensities are counts over formulas."""

from __future__ import annotations

import random

import pytest
from numpy.testing import assert_allclose

from minillm.costs.formulas import Bytes
from minillm.course.figures.batching import batch_figure, intensity_figure
from minillm.course.lessons.intensity import BatchIntensity, predict_intensity
from minillm.errors import ConfigError
from minillm.measure.bench import Timing
from minillm.measure.roof import Roof
from minillm.measure.roofline import Point, RooflineRun
from tests.course.figures.tidy import untidy
from tests.families import random_model


def run(seed: int, batches: list[int], contexts: list[int]) -> RooflineRun:
    """A run with invented times above its bound."""
    rng = random.Random(seed)
    roof = Roof(rng.lognormvariate(25, 2), rng.lognormvariate(23, 2))
    points = []
    for context in contexts:
        for batch in batches:
            flops, moved = 10**8 * batch, 10**8 + 10**4 * batch * context
            time = roof.seconds(flops, moved) * rng.uniform(1, 9)
            none = Bytes(0, 0, 0, 0)
            points.append(Point("decode", batch, context, Timing((time, 2 * time)), flops, moved, none, none))
    prefill = Point("prefill", 1, 99, Timing((1.0,)), 1, 1, Bytes(0, 0, 0, 0), Bytes(0, 0, 0, 0))
    return RooflineRun("m", "x", "bfloat16", roof, 1, False, [*points, prefill])


def test_points_are_the_best_times_and_lines_the_bound() -> None:
    recorded = run(1, [1, 4, 16], [128])
    rate, wait = batch_figure(recorded).axes
    decodes = recorded.points[:3]
    bounds = [recorded.roof.seconds(p.flops, p.least_bytes) for p in decodes]
    assert_allclose(wait.lines[0].get_ydata(), [1e3 * t for t in bounds])
    assert_allclose(wait.lines[1].get_ydata(), [1e3 * p.timing.best for p in decodes])
    assert_allclose(rate.lines[0].get_ydata(), [p.batch / t for p, t in zip(decodes, bounds, strict=True)])
    assert_allclose(rate.lines[1].get_ydata(), [p.batch / p.timing.best for p in decodes])


def test_the_title_says_gain_and_cost() -> None:
    recorded = run(2, [1, 8], [128, 1024])
    one, many = recorded.points[:2]
    slower = many.timing.best / one.timing.best
    title = batch_figure(recorded).texts[0].get_text()
    assert title.startswith("Batch 8: ") and f"{slower:.2f}"[:3] in title


def rows(batches: list[int]) -> list[BatchIntensity]:
    config = random_model("qwen3").config
    return [predict_intensity(config, batch, 100) for batch in batches]


def test_intensities_are_drawn_as_given() -> None:
    counted, predicted = rows([1, 4]), rows([1, 4, 16, 64])
    (axes,) = intensity_figure(counted, predicted, {"a": 20.0, "b": 200.0}).axes
    for place, part in enumerate(("linear", "step", "attention")):
        line, points = axes.lines[2 * place : 2 * place + 2]
        assert_allclose(line.get_ydata(), [getattr(row, part) for row in predicted])
        assert_allclose(points.get_ydata(), [getattr(row, part) for row in counted])
    assert [line.get_ydata()[0] for line in axes.lines[6:]] == [20.0, 200.0]


def test_nothing_overlaps_whatever_is_recorded() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for case in range(8):
        batches = [2**k for k in range(rng.randint(2, 7))]
        figure = batch_figure(run(seed + case, batches, [128, 4096][: rng.randint(1, 2)]))
        assert untidy(figure) == [], f"{seed=}, {case=}"
    assert untidy(intensity_figure(rows([1, 4]), rows([1, 4, 16, 64, 256]), {"a": 20.0, "b": 200.0})) == []


def test_no_curve_is_refused() -> None:
    with pytest.raises(ConfigError, match="two batch sizes"):
        batch_figure(run(1, [4], [128]))
    with pytest.raises(ConfigError, match="at least two"):
        intensity_figure(rows([1]), rows([1]), {})
