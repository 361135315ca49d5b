"""Figures of sampling draw the probabilities and entropies that they get, find loops, and stay tidy."""

from __future__ import annotations

import random

import pytest
import torch
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

from minillm.course.figures.sampling import Loop, distribution_bars, entropy_trace, loop_trace, repetition
from minillm.errors import ConfigError
from minillm.sampling import SamplingParams, probs_from_logits
from tests.course.figures.tidy import texts_of, untidy

WORDS = ["\n", "    ", " if", " n", "\t", ":", " return", " self.assertEqual_everything", "é", "$x$", "", " "]


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in texts_of(figure))


def shapes(rng: random.Random, vocab: int = 40) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(rng.randrange(2**30))) * 3
    kinds = {"top-k 4": dict(top_k=4), "top-p 0.9": dict(top_p=0.9), "temperature 0.5": dict(temperature=0.5)}
    chosen = dict(list(kinds.items())[: rng.randint(1, 3)])
    base, *panels = (probs_from_logits(logits, [SamplingParams(**kind)])[0] for kind in ({}, *chosen.values()))
    return base, dict(zip(chosen, panels, strict=True))


def test_bars_are_the_probabilities_of_the_likeliest_tokens() -> None:
    base, panels = shapes(random.Random(0))
    figure = distribution_bars(panels, base, [f"w{i}" for i in range(40)], title="T", ticks="K", count=6)
    order = base.argsort(descending=True)[:6]
    for axes, panel in zip(figure.axes, panels.values(), strict=True):
        assert_allclose([bar.get_width() for bar in axes.patches], panel[order])
        assert_allclose([segment[0][0] for segment in axes.collections[0].get_segments()], base[order])
        assert axes.get_xlabel() == f"{int((panel > 0).sum())} can be drawn"
        assert [text.get_text() for text in axes.texts] == ["cut"] * int((panel[order] == 0).sum())
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [f"w{i}" for i in order]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("abcabcabc", Loop(0, 3, 9)),
        ("xxabcabca", Loop(2, 3, 9)),
        ("xyabbabb", Loop(2, 3, 8)),
        ("abcdd", Loop(3, 1, 5)),
        ("abababab", Loop(0, 2, 8)),
        ("abcab", None),
        ("", None),
    ],
)
def test_loops_are_found(text: str, want: Loop | None) -> None:
    assert Loop.find(text) == want


def test_rounds_of_a_loop() -> None:
    assert Loop(2, 3, 9).rounds == [range(2, 5), range(5, 8), range(8, 9)]


def test_a_loop_against_brute_force() -> None:
    """The longest end of the text that has a period of at most half its length."""
    rng = random.Random(0)
    for _ in range(300):
        tokens = [rng.randrange(2) for _ in range(rng.randint(1, 12))]
        ends = [
            (start, period)
            for start in range(len(tokens))
            for period in range(1, (len(tokens) - start) // 2 + 1)
            if all(tokens[i] == tokens[i + period] for i in range(start, len(tokens) - period))
        ]
        found = Loop.find(tokens)
        assert (found and (found.start, found.period)) == min(ends, default=None), tokens


def test_titles_are_what_the_numbers_say() -> None:
    figure = entropy_trace(["a"] * 10, [4.0, 4.0] + [1.0] * 8)
    assert "2 of 10 tokens hold half" in words(figure)
    assert_allclose([bar.get_height() for bar in figure.axes[0].patches], [4, 4] + [1] * 8)
    looped = words(loop_trace(list("xabababab"), [9.0, *[3.0] * 2, *[2.0] * 4, *[1.0] * 2]))
    assert "a circle of 2 tokens, and gets surer: 3.0 bits a token, then 1.0" in looped
    assert "each round says: a b" in looped
    assert "surer" not in words(loop_trace(list("abab"), [1.0, 1.0, 2.0, 2.0]))
    cold = words(repetition([0, 1], [0.8, 0.1], [1.2, 6.0], [1.0, 5.0]))
    assert "(80%)" in cold and "6 bits a token instead of 1" in cold


def test_nothing_overlaps_whatever_is_recorded() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for case in range(8):
        base, panels = shapes(rng)
        names = [rng.choice(WORDS) for _ in range(40)]
        assert untidy(distribution_bars(panels, base, names, title="T", ticks="K", count=rng.randint(1, 12))) == []
        tokens = [rng.choice(WORDS) for _ in range(rng.randint(1, 50))]
        entropy = [rng.expovariate(0.5) for _ in tokens]
        assert untidy(entropy_trace(tokens, entropy)) == [], f"{seed=}, {case=}"
        period = [rng.choice(WORDS) for _ in range(rng.randint(1, 12))]
        looped = [*tokens, *period * rng.randint(3, 9)]
        assert untidy(loop_trace(looped, [rng.random() for _ in looped])) == [], f"{seed=}, {case=}"
    assert untidy(repetition([0, 0.5, 1], [0.7, 0.2, 0], [1, 2, 7], [1, 2.2, 6.6])) == []


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 tokens and 1 entropies"):
        entropy_trace(["a", "b"], [1.0])
    with pytest.raises(ConfigError, match="does not end in a loop"):
        loop_trace(["a", "b", "c"], [1.0, 1.0, 1.0])
