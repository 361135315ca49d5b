"""The film-strip replays what the observer saw, tiles lie where they were computed, costs are the counter's."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.testing import assert_allclose

from minillm.attention.reference import naive_attention
from minillm.attention.tiled import tiled_attention
from minillm.course.figures import style
from minillm.course.figures.tiles import CUT, WHOLE, TileCost, softmax_strip, tile_cost, tile_order
from minillm.course.lessons.softmax import TileStep, TileSteps
from minillm.errors import ConfigError
from tests.course.figures.tidy import texts_of, untidy


def observed(
    q_len: int, kv_len: int, q_tile: int, kv_tile: int, seed: int = 0
) -> tuple[list[TileStep], torch.Tensor, torch.Tensor]:
    """Tiles of one head, the last query's scaled scores, and its exact output."""
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(q_len, 1, 4, generator=generator)
    k, v = torch.randn(2, 1, kv_len, 4, generator=generator)
    steps = TileSteps()
    tiled_attention(q, k, v, scale=0.5, q_tile=q_tile, kv_tile=kv_tile, observer=steps)
    return steps, k[0] @ q[-1, 0] * 0.5, naive_attention(q, k, v, scale=0.5)[-1, 0]


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in texts_of(figure))


def test_bars_of_the_strip_add_up_to_the_observed_sum() -> None:
    steps, scores, exact = observed(1, 20, 1, 4)
    figure = softmax_strip(steps, scores, exact)
    for step, axes in zip(steps, figure.axes[::2], strict=True):
        bars = [p.get_height() for p in axes.patches if p.get_fill()]
        assert len(bars) == step.keys.stop
        assert sum(bars) == pytest.approx(step.l.item(), rel=1e-5)
        assert f"l = {step.l.item():.2f}" in axes.get_title(loc="left")


def test_the_last_output_ends_at_the_ticks() -> None:
    steps, scores, exact = observed(1, 20, 1, 4)
    last = softmax_strip(steps, scores, exact).axes[-1]
    ticks = [segment[0][1] for segment in last.collections[0].get_segments()]
    assert_allclose([bar.get_height() for bar in last.patches], ticks, atol=1e-6)
    assert_allclose(ticks, exact)


def test_what_was_summed_shrinks_where_the_maximum_rises() -> None:
    steps, scores, exact = observed(1, 20, 1, 4, seed=5)
    rises = sum(bool(b.m[0, -1] > a.m[0, -1]) for a, b in pairwise(steps))
    figure = softmax_strip(steps, scores, exact)
    outlines = [any(not p.get_fill() for p in axes.patches) for axes in figure.axes[::2]]
    assert sum(outlines) == rises == words(figure).count("×") > 0


def test_too_many_frames_are_refused() -> None:
    steps, scores, exact = observed(1, 40, 1, 4)
    with pytest.raises(ConfigError, match="larger tiles"):
        softmax_strip(steps, scores, exact)


def rectangles(figure: Figure, color: str) -> list[tuple[float, float, float, float]]:
    patches = [p for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    return [
        (p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in patches if to_hex(p.get_facecolor()) == color
    ]


def test_tiles_lie_where_they_were_computed() -> None:
    steps, *_ = observed(8, 12, 4, 4)
    figure = tile_order(steps, 8, 12)
    assert rectangles(figure, WHOLE) == [(0, 0, 4, 4), (0, 4, 4, 4), (4, 4, 4, 4)]
    assert rectangles(figure, CUT) == [(4, 0, 4, 4), (8, 4, 4, 4)]
    assert "5 tiles compute 83% of the matrix;\nthe causal rule asks for 71%" in words(figure)
    assert "seen as a whole (3)" in words(figure) and "needs a mask (2)" in words(figure)


def test_costs_are_points_and_the_formula_a_line() -> None:
    costs = [TileCost(16, 40_000, 41_000, 1_000), TileCost(64, 10_000, 10_500, 4_000)]
    figure = tile_cost(costs, TileCost(256, 10**6, 0, 10**5), [("L2", 50_000)])
    line, points = figure.axes[0].lines[:2]
    assert_allclose(line.get_ydata(), [41_000, 10_500])
    assert_allclose(points.get_ydata(), [40_000, 10_000])
    assert_allclose(figure.axes[1].lines[0].get_ydata(), [1_000, 4_000])
    assert "Tiles 4 times as high move 4 times fewer bytes and hold 4 times more" in words(figure)
    assert "L2, 50.0 kB" in words(figure)


def test_nothing_overlaps_whatever_is_drawn() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for case in range(6):
        steps, scores, exact = observed(1, rng.randint(4, 24), 1, 4, seed=seed % 1000 + case)
        figures = [softmax_strip(steps, scores, exact)]
        q_len = rng.choice([1, 3, 16, 64])
        kv_len = q_len + rng.choice([0, 0, 7, 64])
        steps, *_ = observed(q_len, kv_len, rng.choice([1, 4, 16]), rng.choice([2, 8, 16]))
        figures.append(tile_order(steps, q_len, kv_len))
        costs = [TileCost(2**i, rng.randint(10**4, 10**7), 10**5, rng.randint(10**4, 10**7)) for i in range(4, 9)]
        caches = [(name, rng.randint(10**4, 10**8)) for name in ("L2", "L3")]
        figures.append(tile_cost(costs, TileCost(512, 10**8, 0, rng.randint(10**4, 10**8)), caches))
        assert [untidy(figure) for figure in figures] == [[]] * 3, f"{seed=}, {case=}"


def test_prefill_keeps_its_colour() -> None:
    assert WHOLE == style.PREFILL and CUT != WHOLE
