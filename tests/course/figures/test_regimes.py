"""Ledger, map and walk draw the counted bytes, the regimes of a site and the terms of a step."""

from __future__ import annotations

import random

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minillm.costs.formulas import Bytes, step_bytes
from minillm.costs.steps import decode_step
from minillm.course.figures.regimes import LOOKS, ledger_growth, one_walk, regime_map
from minillm.course.lessons.regimes import Site
from minillm.measure.roof import Roof
from minillm.shapes import named_shape
from tests.course.figures.tidy import texts_of, untidy

LLAMA = named_shape("llama-3.1-8b")
SITE = Site("a site", LLAMA, 2, Roof(9.89e14, 4.8e12), 141e9)
CONTEXTS, BATCHES = [2**i for i in range(6, 18)], [2**i for i in range(11)]


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in texts_of(figure))


def counted(contexts: list[int], activations: int = 10**6) -> list[Bytes]:
    return [step_bytes(LLAMA, decode_step(context), 2)._replace(activations=activations) for context in contexts]


def test_bars_are_the_counted_bytes() -> None:
    contexts = [1000, 128000]
    moved = counted(contexts)
    figure = ledger_growth(contexts, moved, [b._replace(activations=0) for b in moved], "a model")
    heights = [[bar.get_height() for bar in bars] for bars in figure.axes[0].containers]
    assert heights[0] == [b.weights for b in moved]
    assert heights[1] == [b.kv_read + b.kv_write for b in moved]
    assert heights[2] == [b.activations for b in moved]
    ticks = [segment[0][1] for segment in figure.axes[0].collections[0].get_segments()]
    assert ticks == pytest.approx([b.total - b.activations for b in moved])
    assert "At 1,000 tokens a step reads weights, and 1 % KV cache; at 128,000 mostly cache" in words(figure)


def test_the_title_does_not_claim_what_did_not_happen() -> None:
    contexts = [1000, 8000]
    assert "mostly" not in words(ledger_growth(contexts, counted(contexts), counted(contexts), "a model"))


def test_a_cache_that_is_most_of_it_from_the_start_is_said_to_be() -> None:
    contexts = [751_662, 765_114]  # bars of one height, both below the keys of the parts
    figure = ledger_growth(contexts, counted(contexts), counted(contexts), "a model")
    assert "At 751,662 tokens already a step reads mostly KV cache: 87 %" in words(figure)
    assert untidy(figure) == []


def test_the_map_is_filled_with_the_regimes_of_the_site() -> None:
    figure = regime_map([SITE], BATCHES, CONTEXTS)
    regimes = SITE.regimes(BATCHES, CONTEXTS)
    drawn: dict[tuple[int, int], Rectangle] = {}
    for patch in figure.axes[0].patches:
        assert isinstance(patch, Rectangle)
        for x in range(int(patch.get_x()), int(patch.get_x() + patch.get_width())):
            assert (x, int(patch.get_y())) not in drawn
            drawn[x, int(patch.get_y())] = patch
    assert len(drawn) == len(BATCHES) * len(CONTEXTS)
    assert all(patch.get_hatch() == LOOKS[regimes[y][x]].get("hatch") for (x, y), patch in drawn.items())
    assert all(name in words(figure) for name in ("weights", "KV cache", "arithmetic", "capacity"))


def test_a_word_costs_the_measured_step_over_the_batch() -> None:
    figure = one_walk(SITE, 16, 1000, 0.032, 0.05)
    terms = SITE.terms(16, 1000)
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == [terms["weights"], terms["KV cache"], terms["arithmetic"], 0.032]
    assert "One walk, 16 words: 2.00 ms a word" in words(figure)


def test_nothing_overlaps_whatever_the_machine() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for case in range(8):
        speed = 10 ** rng.uniform(9, 13)
        roof, memory = Roof(speed * rng.uniform(2, 300), speed), 10 ** rng.uniform(10.3, 12)
        sites = [Site(f"site {i}", LLAMA, 2, roof, memory, 10 ** rng.uniform(-5, 0)) for i in range(rng.randint(1, 3))]
        assert untidy(regime_map(sites, BATCHES, CONTEXTS)) == [], f"{seed=}, {case=}"
        longest = 10 ** rng.uniform(-4, 1)
        assert untidy(one_walk(sites[0], rng.choice(BATCHES), 128, longest * rng.random(), longest)) == [], f"{seed=}"
        contexts = sorted(rng.sample(range(10, 10**6), rng.randint(2, 7)))
        assert untidy(ledger_growth(contexts, counted(contexts), counted(contexts), "a model")) == [], f"{seed=}"
