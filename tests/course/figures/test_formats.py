"""Figures of cache formats draw what was measured, and their titles follow the numbers."""

from __future__ import annotations

import random

import pytest
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

from minillm.costs.formulas import Bytes
from minillm.course.figures.formats import format_figure, quality_figure
from minillm.errors import ConfigError
from minillm.measure.bench import Timing
from minillm.measure.bench_kv import KvQuality, KvRow, KvStep
from tests.course.figures.tidy import texts_of, untidy

SIZES = {"auto": 3072, "fp8": 1584, "int8": 1584, "int4": 912}


def step(context: int, size: int, seconds: float) -> KvStep:
    predicted = Bytes(11_000_000, size * context, size)
    counted = predicted._replace(kv_write=2 * size)
    timing = Timing((0.9 * seconds, seconds, 1.2 * seconds))
    return KvStep(context, predicted, counted, timing, Timing((0.01, 0.01, 0.01)))


def rows(factor: float = 3.0) -> list[KvRow]:
    """A quantised step takes `factor` times 10 ms at the longest context."""
    return [
        KvRow(name, size, size, [step(c, size, 0.01 * (1 if name == "auto" else factor)) for c in (128, 1024)])
        for name, size in SIZES.items()
    ]


def qualities(wrong: float = 12.4) -> list[KvQuality]:
    errors = {"Gaussian": 0.04, "outliers": 0.3, "trained": 0.05}
    bits = {"fp8": 8.25, "int8": 8.25, "int4": 4.75, "int4 per token": 4.5}
    perplexities = {"fp8": 12.01, "int8": 11.99, "int4": 12.06, "int4 per token": wrong}
    found = [KvQuality(name, bits[name], value, 0.01, errors) for name, value in perplexities.items()]
    return [KvQuality("auto", 32, 12.0, 0.0, {}), *found]


def title(figure: Figure) -> str:
    return next(text.get_text() for text in texts_of(figure) if text.get_weight() == "bold")


def test_bars_are_what_was_measured_and_ticks_what_was_predicted() -> None:
    capacity, moved, _ = format_figure(rows()).axes
    assert_allclose([bar.get_width() for bar in capacity.patches], [1e6 / size for size in SIZES.values()], rtol=1e-3)
    weights, kv = moved.patches[:4], moved.patches[4:]
    assert_allclose([bar.get_width() for bar in weights], 11)
    assert_allclose([bar.get_width() for bar in kv], [1026 * size / 1e6 for size in SIZES.values()])
    ends = [collection.get_paths()[0].vertices[0][0] for collection in moved.collections]
    assert_allclose(ends, [11 + 1025 * size / 1e6 for size in SIZES.values()])


def test_times_are_medians_with_quartiles() -> None:
    times = format_figure(rows(2.0)).axes[2]
    drawn = [container.lines[0].get_xydata() for container in times.containers]
    assert_allclose(drawn, [[[128, t], [1024, t]] for t in (10, 20, 20, 20)])


def test_the_title_tells_a_gain_from_a_loss() -> None:
    assert title(format_figure(rows(4.0))) == (
        "int4 holds 3.4 times the tokens; on this machine its step takes 4.0 times the time"
    )
    assert "saves 20 % of the time" in title(format_figure(rows(0.8)))


def test_points_are_perplexity_and_errors() -> None:
    perplexity, errors = quality_figure(qualities()).axes
    points = [line.get_xydata()[0] for line in perplexity.lines[1:]]
    assert_allclose(points, [(one.bits, 100 * (one.perplexity / 12 - 1)) for one in qualities()[1:]])
    assert_allclose([line.get_xdata()[0] for line in errors.lines], [0.04, 0.3, 0.05] * 4)


def test_the_title_compares_int4_with_its_wrong_version_only_if_that_is_worse() -> None:
    assert "int4 costs 0.50 % of perplexity; with one range per token it would be 3.33 %" in title(
        quality_figure(qualities())
    )
    assert title(quality_figure(qualities(wrong=12.0))) == "No format costs more than 0.50 % of perplexity"


def test_nothing_overlaps_whatever_was_measured() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for case in range(8):
        contexts = sorted(rng.sample(range(1, 200_000), rng.randint(1, 5)))
        sizes = [rng.randint(1, 10**6) for _ in range(4)]
        drawn = [
            KvRow(name, size, size, [step(c, size, rng.lognormvariate(-4, 2)) for c in contexts])
            for name, size in zip(SIZES, sizes, strict=True)
        ]
        assert untidy(format_figure(drawn, batch=rng.randint(1, 512))) == [], f"{seed=}, {case=}"
        found = [
            KvQuality(
                one.format, one.bits, rng.uniform(11.9, 13), 0.01, {k: rng.lognormvariate(-3, 1) for k in one.errors}
            )
            for one in qualities()
        ]
        assert untidy(quality_figure(found)) == [], f"{seed=}, {case=}"


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ConfigError, match="no decode step"):
        format_figure([KvRow("auto", 1, 1, [])])
    with pytest.raises(ConfigError, match="no quality"):
        quality_figure(qualities()[:1])
