"""Lanes show what became of each guess: by letter, colour and place, and tidily whatever happened."""

from __future__ import annotations

import random

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minillm.course.figures import lanes, style
from minillm.course.figures.lanes import marks, verification_lanes
from minillm.course.lessons.rounds import Round
from minillm.errors import ConfigError
from tests.course.figures.tidy import texts_of, untidy

TEXTS = {0: "\n", 1: " return", 2: "self", 3: ":", 4: " __init_subclass__", 5: "        ", 6: "$x$", 7: ""}


def letters(one: Round) -> str:
    return " ".join("".join(mark.letter for mark in lane) for lane in marks(one))


@pytest.mark.parametrize(
    ("guesses", "said", "want"),
    [
        ([1, 2, 3], [1, 2, 3, 4], "AAA B"),
        ([1, 2, 3], [1, 4], "A✗– R"),
        ([1, 2, 3], [4], "✗–– R"),
        ([], [4], " "),
        ([1, 2, 3], [1, 2], "AA– "),
    ],
    ids=["bonus", "recovered", "all wrong", "nobody guessed", "ended by an accepted guess"],
)
def test_each_token_gets_its_letter(guesses: list[int], said: list[int], want: str) -> None:
    assert letters(Round(guesses, said, 0, 0)) == want


def cells(figure: Figure, color: str) -> list[tuple[float, float]]:
    """(column, row) of the filled cells of a colour, the keys above the lanes left out."""
    found = [p for p in figure.axes[0].patches if isinstance(p, Rectangle) and p.get_y() >= 0]
    width = max(p.get_width() for p in found) + lanes.GAP
    places = [((p.get_x() - lanes.NUMBERS) / width, p.get_y()) for p in found if to_hex(p.get_facecolor()) == color]
    return [(round(x), y) for x, y in places]


def test_cells_stand_where_their_tokens_go() -> None:
    rounds = [Round([1, 2, 3], [1, 2, 3, 4], 0.001, 0.002), Round([1, 2], [1, 5], 0.001, 0.002)]
    figure = verification_lanes(rounds, TEXTS)
    below = lanes.LANE + lanes.GAP
    assert cells(figure, style.DRAFT) == [(0, 0), (1, 0), (2, 0), (0, lanes.PITCH)]
    assert cells(figure, style.DECODE) == [(3, below), (1, lanes.PITCH + below)]
    words = [text.get_text() for text in texts_of(figure)]
    assert any(word.startswith("3 of 3 right: 4 tokens\nguess 1.0, check 2.0 ms") for word in words)
    assert "Guesses are checked together: 6 tokens in 2 steps of the model" in words


def test_nothing_overlaps_whatever_is_guessed() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for case in range(12):
        rounds = []
        for _ in range(rng.randint(1, 12)):
            guesses = [rng.randrange(8) for _ in range(rng.randint(0, 10))]
            right = rng.randint(0, len(guesses))
            rounds.append(Round(guesses, [*guesses[:right], 9], rng.random(), rng.random()))
        if any(one.guesses for one in rounds):
            assert untidy(verification_lanes(rounds, TEXTS | {9: "x" * 20})) == [], f"{seed=}, {case=}"


def test_rounds_without_a_guess_are_refused() -> None:
    with pytest.raises(ConfigError, match="Nothing was guessed"):
        verification_lanes([Round([], [1], 0, 0)], TEXTS)
