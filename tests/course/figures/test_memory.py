"""The paging figure draws what was allocated over what was predicted, and says so."""

from __future__ import annotations

import random

import pytest
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

from minillm.course.figures.memory import paging_figure
from minillm.course.lessons.paging import Paging, measure_paging
from minillm.errors import ConfigError
from tests.course.figures.tidy import untidy


def measured(seed: int, sizes: list[int]) -> list[Paging]:
    rng = random.Random(seed)
    lengths = [min(2048, round(rng.lognormvariate(5, 1)) + 1) for _ in range(200)]
    return [measure_paging(lengths, size, 2**14) for size in sizes]


def points_and_line(figure: Figure, panel: int) -> tuple[list[float], list[float]]:
    line, points = figure.axes[panel].lines
    return list(points.get_ydata()), list(line.get_ydata())


def test_points_are_counts_and_lines_are_formulas() -> None:
    rows = measured(1, [4, 16, 2048, 1])
    ordered = sorted(rows, key=lambda row: row.block_size)
    figure = paging_figure(rows)
    assert_allclose(points_and_line(figure, 0), [[r.waste for r in ordered], [r.waste_predicted for r in ordered]])
    assert_allclose(points_and_line(figure, 1), [[r.num_fit for r in ordered], [r.fit_predicted for r in ordered]])
    assert_allclose(figure.axes[0].lines[1].get_xdata(), [1, 4, 16, 2048])


def test_the_title_compares_the_usual_block_with_one_for_everything() -> None:
    rows = measured(2, [1, 16, 2048])
    title = paging_figure(rows).texts[0].get_text()
    assert f"In blocks of 16, {100 * rows[1].waste_share:.0f} %" in title
    assert f"instead of {100 * rows[2].waste_share:.0f} %" in title


def test_nothing_overlaps_whatever_is_measured() -> None:
    seed = random.randrange(2**32)
    for case in range(4):
        rows = measured(seed + case, [2**k for k in range(0, random.Random(seed + case).randint(3, 12))])
        assert untidy(paging_figure(rows)) == [], f"{seed=}, {case=}"


def test_one_size_is_no_curve() -> None:
    with pytest.raises(ConfigError, match="no curve"):
        paging_figure(measured(3, [16]))
