"""The stall figure draws what was recorded, chooses its lanes by the numbers, and never runs two texts together."""

from __future__ import annotations

import random

import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

from minillm.course.figures import style
from minillm.course.figures.serving import stall_figure
from minillm.errors import ConfigError
from minillm.measure.bench_stall import Arrival, StallRow
from tests.course.figures.tidy import texts_of, untidy


def arrival(gap: float, steps: int, usual: float = 0.01, running: int = 3) -> Arrival:
    """The others get a token each `usual` seconds; while the newcomer is computed, each `gap`, `steps` times."""
    before = [-usual * i for i in range(8, -1, -1)]
    during = [gap * i for i in range(1, steps + 1)]
    after = [during[-1] + usual * i for i in range(1, 9)]
    return Arrival(during[-1], tuple(tuple(before + during + after) for _ in range(running)))


def rows() -> list[StallRow]:
    """`prefill_first` stalls for 1 s; a budget of 16 keeps gaps at twice the usual one, 64 at five times."""
    return [
        StallRow("mixed", 16, [arrival(0.02, 100)]),
        StallRow("mixed", 64, [arrival(0.05, 24)]),
        StallRow("prefill_first", 512, [arrival(1.0, 1)]),
    ]


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in texts_of(figure))


def marks(figure: Figure, lane: int) -> list[list[float]]:
    """Times of the marks in each row of a lane."""
    collections = [c for c in figure.axes[lane].collections if isinstance(c, LineCollection)]
    return [[path.vertices[0][0] for path in collection.get_paths()] for collection in collections]


def test_marks_and_bars_are_the_recorded_times() -> None:
    recorded = rows()
    figure = stall_figure(recorded, 2048)
    for lane, row in enumerate(reversed(recorded)):
        assert_allclose(marks(figure, lane), row.arrivals[0].others)
        (bar,) = (p for p in figure.axes[lane].patches if to_hex(p.get_facecolor()) == style.PREFILL)
        assert_allclose((bar.get_x(), bar.get_width()), (0, row.arrivals[0].ttft))


def test_points_are_ttft_and_longest_gap() -> None:
    recorded = rows()
    trade = stall_figure(recorded, 2048).axes[-1]
    points = [container.lines[0].get_xydata()[0] for container in trade.containers]
    assert_allclose(points, [(row.arrivals[0].ttft, 1e3 * row.arrivals[0].worst_itl) for row in recorded])


def test_bounds_are_a_line_of_the_mixed_choices() -> None:
    trade = stall_figure(rows(), 2048, [(1.5, 0.01), (0.9, 0.03), (0.8, 0.8)]).axes[-1]
    (line,) = (line for line in trade.lines if line.get_color() == style.QUIET)
    assert_allclose(line.get_xydata(), [(0.9, 30), (1.5, 10)])


def test_words_say_what_was_measured() -> None:
    text = words(stall_figure(rows(), 2048))
    assert "2,048 tokens arrives: 3 others stall, unless it comes in chunks" in text
    assert "prefill_first, 512 tokens a step: longest gap 1.0 s, newcomer's first token after 1.0 s" in text
    assert "mixed, 16 tokens a step: longest gap 20 ms" in text
    assert "unless" not in words(stall_figure(rows()[1:], 2048)), "no choice keeps to three times the usual gap"


def test_lanes_are_chosen_by_the_numbers() -> None:
    assert len(stall_figure(rows()[:1], 2048).axes) == 2, "one choice: one lane and the trade"
    many = [StallRow("mixed", b, [arrival(g, 9)]) for b, g in ((16, 0.02), (32, 0.025), (48, 0.04), (64, 0.3))]
    titles = [axes.get_title(loc="left") for axes in stall_figure(many, 2048).axes]
    assert [title.split()[1] for title in titles[:3]] == ["64", "48", "32"], "the largest tolerable budget is the best"


def test_nothing_overlaps_whatever_is_recorded() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for case in range(12):
        recorded = []
        for policy in ["mixed"] * rng.randint(1, 9) + ["prefill_first"] * rng.randint(0, 2):
            gap, steps, running = rng.lognormvariate(-4, 1.5), rng.randint(1, 60), 8
            arrivals = [arrival(gap * rng.uniform(0.9, 1.1), steps, running=running) for _ in range(rng.randint(1, 3))]
            recorded.append(StallRow(policy, rng.randint(9, 4096), arrivals))
        bounds = [(rng.lognormvariate(-1, 1), rng.lognormvariate(-5, 1)) for _ in recorded]
        figure = stall_figure(recorded, rng.randint(1, 10**5), rng.choice([bounds, []]))
        assert untidy(figure) == [], f"{seed=}, {case=}"


@pytest.mark.parametrize("recorded", [[], [StallRow("mixed", 16)]])
def test_nothing_to_draw_is_refused(recorded: list[StallRow]) -> None:
    with pytest.raises(ConfigError, match="no arrival"):
        stall_figure(recorded, 2048)
