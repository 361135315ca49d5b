"""What every figure shares: numbers on logarithmic axes, and words beside lines, that do not meet."""

from __future__ import annotations

import random
import threading

import pytest
from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.textpath import TextPath

from minillm.course.figures import style
from tests.course.figures.tidy import untidy


def log_axes(way: str, inches: float, low: float, high: float) -> Axes:
    """Axes of a length, on which numbers from `low` to `high` go across or up."""
    figure = style.new_figure(6, 8)
    width, height = (inches, 3) if way == "x" else (3, inches)
    axes = style.add_axes(figure, left=1.5, top=1, width=width, height=height)
    style.bare(axes, keep="bottom" if way == "x" else "left")
    axes.set(**{f"{way}scale": "log", f"{way}lim": (low, high)})  # type: ignore[arg-type]
    style.plain_log(axes.xaxis if way == "x" else axes.yaxis)
    return axes


@pytest.mark.parametrize("way", ["x", "y"])
@style.SHEET
def test_numbers_on_a_logarithmic_axis_keep_apart(way: str) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for case in range(20):
        low = 10 ** rng.uniform(-4, 3)
        axes = log_axes(way, rng.uniform(0.7, 4), low, low * 10 ** rng.uniform(0.2, 5))
        figure = axes.get_figure(root=True)
        assert figure is not None
        assert untidy(figure) == [], f"{seed=}, {case=}"


@style.SHEET
def test_where_there_is_room_there_are_more_of_them() -> None:
    shown = [log_axes("x", inches, 1, 1000).get_xticks() for inches in (4, 1)]
    assert [[tick for tick in ticks if 1 <= tick <= 1000] for ticks in shown] == [
        [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000],
        [1, 10, 100, 1000],
    ]


@style.SHEET
def test_words_beside_lines_keep_apart_and_below_the_top() -> None:
    axes = style.add_axes(style.new_figure(4), left=1, top=1, width=4, height=2)
    axes.set_ylim(0, 10)
    step = (style.SMALL + 4) / 72 / 2  # of a height of two inches
    assert style.apart(axes, [2, 8]) == pytest.approx([0.2, 0.8]), "who meets nobody stays"
    assert style.apart(axes, [2, 2.1, 5]) == pytest.approx([0.2, 0.2 + step, 0.5])
    assert style.apart(axes, [10, 0, 9.9]) == pytest.approx([1 - step / 2, 0, 1 - 1.5 * step])


def test_figures_at_once_share_the_sheet_and_leave_nothing() -> None:
    """Threads that begin and end in any order: each draws in the style, and at the end all settings are as before."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for _ in range(5):
        before, drawn = dict(rcParams), list[bool]()
        events = [(threading.Event(), threading.Event()) for _ in range(4)]

        @style.SHEET
        def figure(begun: threading.Event, go: threading.Event, drawn: list[bool] = drawn) -> None:
            begun.set()
            go.wait()
            text = style.new_figure(1).text(0, 0, "$x$")
            drawn.append(text.get_color() == style.INK and not text.get_parse_math())

        threads = [threading.Thread(target=figure, args=pair) for pair in events]
        for thread, (begun, _go) in zip(threads, events, strict=True):
            thread.start()
            begun.wait()
        for index in rng.sample(range(4), 4):
            events[index][1].set()
            threads[index].join()
        assert dict(rcParams) == before and drawn == [True] * 4, f"{seed=}"


def test_a_figure_that_fails_and_one_within_another_leave_nothing() -> None:
    before = dict(rcParams)

    @style.SHEET
    def outer() -> None:
        inner()
        assert rcParams["text.color"] == style.INK, "the inner one did not take the sheet away"
        raise ZeroDivisionError

    @style.SHEET
    def inner() -> None:
        assert rcParams["text.color"] == style.INK

    with pytest.raises(ZeroDivisionError):
        outer()
    assert dict(rcParams) == before


def test_what_somebody_else_sets_meanwhile_stays() -> None:
    with rc_context():
        with style.SHEET:
            rcParams["text.color"] = "red"
        assert rcParams["text.color"] == "red" and rcParams["axes.edgecolor"] != style.INK


def test_a_text_is_as_wide_as_its_font_makes_it() -> None:
    """Widths are remembered: by text, size and font, and the font is the one in force."""
    for family in ("DejaVu Sans", "DejaVu Sans Mono", "DejaVu Sans"):
        with rc_context({"font.family": family}):
            for size in (8, 11.5):
                for text in ("illi", "WWWW", "ab\nabcdef\n"):
                    widest = max(TextPath((0, 0), line, size=size).get_extents().width for line in text.splitlines())
                    assert style.text_width(text, size) == pytest.approx(widest)
    assert style.text_width(" \n") == 0
