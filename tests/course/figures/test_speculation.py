"""Figures of speculation draw the measured rows and the exact distributions, and stay tidy."""

from __future__ import annotations

import random

import pytest
import torch
from matplotlib.axes import Axes
from numpy.testing import assert_allclose

from minillm.course.figures.speculation import Sweep, acceptance_lengths, output_distributions, speedups
from minillm.errors import ConfigError
from minillm.measure.bench import Timing
from minillm.measure.bench_spec import SpecRow
from minillm.measure.roof import expected_tokens
from minillm.speculative import SpecDecodingStats
from tests.course.figures.tidy import texts_of, untidy
from tests.speculative.chance import random_probs


def row(drafts: int, batch: int, alpha: float, rng: random.Random) -> SpecRow:
    """1,000 verifications in which each guess is right with probability α, served in random times."""
    per_pos = tuple(round(1000 * alpha ** (place + 1)) for place in range(drafts))
    stats = SpecDecodingStats(1000, 1000 * drafts, sum(per_pos), per_pos, per_pos[-1])
    plain, fast = (Timing(tuple(rng.uniform(0.5, 2) for _ in range(3))) for _ in range(2))
    return SpecRow(drafts, batch, plain, fast, stats, rng.uniform(0, 0.5), rng.uniform(1, 2), rng.uniform(0.2, 1))


def sweeps(rng: random.Random, count: int, *, batches: bool = False) -> list[Sweep]:
    steps = [1, 4, 16, 64] if batches else [1, 2, 4, 8]
    alphas = [rng.random() for _ in range(count)]
    names = ["ngram, held-out", "draft, held-out", "ngram, repetitive", "draft, repetitive"]
    return [
        Sweep(name, [row(*((4, step) if batches else (step, 1)), alpha, rng) for step in steps])
        for name, alpha in zip(names, alphas, strict=False)
    ]


def points(axes: Axes, marker: str) -> list[tuple[float, float]]:
    (line,) = [line for line in axes.lines if line.get_marker() == marker]
    return [(float(x), float(y)) for x, y in line.get_xydata()]


def test_points_are_counted_and_lines_are_the_formula() -> None:
    data = sweeps(random.Random(1), 1)
    axes = acceptance_lengths(data).axes[0]
    assert points(axes, "o") == [(r.num_drafts, r.stats.mean_acceptance_length) for r in data[0].rows]
    line = axes.lines[1].get_ydata()
    assert_allclose(line, [expected_tokens(data[0].acceptance, drafts) for drafts in range(9)])


def test_one_alpha_for_all_rows_is_that_of_all_guesses_that_were_looked_at() -> None:
    data = Sweep("x", [row(1, 1, 0.5, random.Random(0)), row(2, 1, 0.5, random.Random(0))])
    assert data.acceptance == pytest.approx((500 + 750) / (1000 + 1500))


def test_speedups_are_medians_over_both_formulas() -> None:
    rng = random.Random(2)
    by_drafts, by_batch = sweeps(rng, 1), sweeps(rng, 1, batches=True)
    figure = speedups(by_drafts, by_batch, crossover=9.0)
    for axes, sweep, name in zip(figure.axes, (by_drafts[0], by_batch[0]), ("num_drafts", "batch"), strict=True):
        assert points(axes, "o") == [(getattr(one, name), one.speedup.median) for one in sweep.rows]
        drawn = [list(line.get_ydata()) for line in axes.lines]
        assert [one.formula for one in sweep.rows] in drawn and [one.formula_as_served for one in sweep.rows] in drawn
    title = f"{max(one.speedup.median for one in (*by_drafts[0].rows, *by_batch[0].rows)):.1f} times as fast at best"
    assert any(title in text.get_text() for text in texts_of(figure))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_nothing_overlaps_whatever_is_measured(count: int) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for case in range(4):
        data, batches = sweeps(rng, count), sweeps(rng, count, batches=True)
        assert untidy(acceptance_lengths(data)) == [], f"{seed=}, {case=}"
        assert untidy(speedups(data, batches, rng.choice([None, 3.3]))) == [], f"{seed=}, {case=}"


def test_bars_are_what_comes_out_and_ticks_the_target() -> None:
    target, draft, wrong = random_probs(3, 8, seed=1)
    figure = output_distributions(target, draft, {"right": target, "wrong": wrong}, list("abcdefgh"))
    for axes, out in zip(figure.axes, (target, wrong), strict=True):
        assert_allclose([bar.get_height() for bar in axes.patches], out)
        assert_allclose([segment[0][1] for segment in axes.collections[0].get_segments()], target)
        assert_allclose(axes.lines[0].get_ydata(), draft)
    off = f"{float((wrong - target).abs().max()):.2g}"
    words = "; ".join(text.get_text() for text in texts_of(figure))
    assert f"another is off by {off}" in words and f"wrong: off by at most {off}" in words
    assert untidy(figure) == []


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ConfigError, match="sweeps with rows"):
        acceptance_lengths([])
    with pytest.raises(ConfigError, match="sweeps with rows"):
        speedups([Sweep("x", [])], [Sweep("x", [])])
    with pytest.raises(ConfigError, match="over 3 named tokens"):
        output_distributions(torch.ones(2), torch.ones(3), {"x": torch.ones(3)}, list("abc"))
