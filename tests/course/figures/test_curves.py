"""Curves draw measured points and predicted lines where they were given, with their names, and nothing overlaps."""

from __future__ import annotations

import random

import pytest
from numpy.testing import assert_allclose

from minillm.course.figures.curves import curves, decode_curve, prefill_curve
from minillm.errors import ConfigError
from tests.course.figures.tidy import texts_of, untidy

X = [16, 32, 64]


def test_points_are_measured_and_lines_predicted() -> None:
    lines = [prefill_curve("no cache", X, [1, 2, 4], [1.5, 2.5, 3.5]), decode_curve("cache", X, [3, 3, 3])]
    axes = curves("A title", lines, x="tokens", y="a step", unit="s").axes[0]
    drawn = [line.get_xydata() for line in axes.lines]
    assert_allclose(drawn[0], [(16, 1.5), (32, 2.5), (64, 3.5)])
    assert_allclose(drawn[1], [(16, 1), (32, 2), (64, 4)])
    assert_allclose(drawn[2], [(16, 3), (32, 3), (64, 3)])
    assert [line.get_linestyle() for line in axes.lines] == ["-", "None", "None"]


def test_words_say_what_is_drawn() -> None:
    figure = curves("A title", [prefill_curve("a name", X, X)], x="tokens", y="a step", unit="s")
    words = [text.get_text() for text in texts_of(figure)]
    assert {"A title", "a name", "tokens", "a step. Points: measured."} <= set(words)
    figure = curves("A title", [prefill_curve("a name", X, X, X)], x="tokens", y="a step", unit="s")
    assert "a step. Points: measured. Lines: formula." in [text.get_text() for text in texts_of(figure)]


def test_curves_of_different_phases_differ_in_more_than_hue() -> None:
    axes = curves("A", [prefill_curve("p", X, X), decode_curve("d", X, X)], x="", y="", unit="s").axes[0]
    assert len({line.get_marker() for line in axes.lines}) == 2


@pytest.mark.parametrize(("measured", "predicted"), [([1, 2], None), ([1, 2, 3], [1]), ([], None)])
def test_lists_of_different_lengths_are_refused(measured: list[float], predicted: list[float] | None) -> None:
    with pytest.raises(ConfigError, match="at least one"):
        curves("A title", [prefill_curve("a name", X, measured, predicted)], x="tokens", y="a step", unit="s")


def test_nothing_overlaps_whatever_is_drawn() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for case in range(16):
        lines = []
        for name in range(rng.randint(1, 4)):
            x = sorted(rng.sample(range(1, 10**5), rng.randint(2, 20)))
            low = 10 ** rng.uniform(-6, 12)
            lines.append(decode_curve(f"curve number {name}", x, [low * rng.uniform(1, 1000) for _ in x]))
        scales = {"x_scale": rng.choice(["linear", "log"]), "y_scale": rng.choice(["linear", "log"])}
        figure = curves("A title of some length", lines, x="tokens", y="one step", unit="B", **scales)  # type: ignore[arg-type]
        assert untidy(figure) == [], f"{seed=}, {case=}"
