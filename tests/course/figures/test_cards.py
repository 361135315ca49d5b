"""A card's picture shows its numbers to scale, says its verdict, and is tidy for every claim there is."""

from __future__ import annotations

import random

import pytest
from matplotlib.figure import Figure

from minillm.course.claims import CLAIMS, Card, Finding
from minillm.course.figures.cards import claim_card
from tests.course.figures.tidy import texts_of, untidy


def card(id: str, findings: list[Finding], cases: list[bool]) -> Card:
    """A claim with invented numbers; `cases` is repeated over its cases."""
    claim = CLAIMS[id]
    verdicts = {name: cases[i % len(cases)] for i, name in enumerate(claim.cases)}
    return Card(claim, {str(i): finding for i, finding in enumerate(findings)}, verdicts)


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in texts_of(figure))


def bars(figure: Figure) -> list[float]:
    return [patch.get_width() for patch in figure.axes[0].patches]


def ticks(figure: Figure) -> list[float]:
    return [lines.get_segments()[0][0][0] for lines in figure.axes[0].collections]


def test_bars_are_to_scale_within_a_unit() -> None:
    findings = [Finding("a", 4, 8, "×"), Finding("b", None, 2, "×"), Finding("c", 25, 50, "%")]
    figure = claim_card(card("A20", findings, [True]))
    a, b, c = bars(figure)
    start = figure.axes[0].patches[0].get_x()
    assert b == pytest.approx(a / 4) and c == pytest.approx(a / 2), "per cent fill their scale at 100"
    assert ticks(figure) == pytest.approx([start + a / 2, start + a / 4])


def test_words_are_the_cards() -> None:
    findings = [Finding("a", 4, 8, "×"), Finding("b", 3, 3), Finding("c", None, 1.25, "GB")]
    shown = words(claim_card(card("A6", findings, [True, False])))
    for expected in (
        "8 ×, predicted 4 ×",
        "3, as predicted",
        "1.25 GB",
        "◐ holds when",
        "✓ one request runs",
        "✗ several",
    ):
        assert expected in shown
    wrong, right = (words(claim_card(card("A19", findings, [verdict]))) for verdict in (False, True))
    assert "✗ wrong" in wrong and CLAIMS["A19"].otherwise in wrong
    assert "✓ holds" in right and CLAIMS["A19"].otherwise not in right


@pytest.mark.parametrize("id", CLAIMS)
def test_every_card_is_tidy(id: str) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    findings = [
        Finding("W" * 12 + "x" * rng.randint(0, 20), rng.choice([None, 10 ** rng.uniform(-3, 4)]), value, unit)
        for value, unit in ((10 ** rng.uniform(-3, 4), rng.choice(["×", "%", "FLOP", "B", ""])) for _ in range(3))
    ]
    assert untidy(claim_card(card(id, findings, rng.choice([[True], [False], [True, False]])))) == [], f"{seed=}"
