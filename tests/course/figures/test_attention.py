"""Maps, heads and steps are drawn from the tensors that were given, and named by what is in them."""

from __future__ import annotations

import random

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.testing import assert_allclose
from torch import Tensor

from minillm.attention.reference import masked_attention, visible
from minillm.course.figures.attention import attention_strip, head_grid, head_map
from minillm.errors import ConfigError
from tests.course.figures.tidy import texts_of, untidy

WORDS = ["def", "\n", "    ", " return", ",", "$x$", "self.assertEqual", "é", " a"]


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in texts_of(figure)]


def strip(tokens: list[str], scores: Tensor, values: Tensor, mask: Tensor | None = None) -> Figure:
    mask = visible(len(tokens), len(tokens)) if mask is None else mask
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return attention_strip(tokens, scores=scores, mask=mask, weights=weights, values=values, out=weights @ values)


def causal_map(*shape: int, generator: torch.Generator) -> Tensor:
    """A map [..., n, n] of random weights under the causal rule."""
    n = shape[-1]
    scores = 3 * torch.randn(*shape, n, generator=generator)
    return scores.masked_fill(~visible(n, n), -torch.inf).softmax(-1)


def test_the_strip_writes_each_number_in_its_cell() -> None:
    scores = torch.tensor([[1.0, 9.0], [0.0, 0.0]])
    figure = strip(["a", "b"], scores, torch.tensor([[10.0, -4.0], [20.0, 0.0]]))
    cells = [
        {(round(t.get_position()[0]), round(t.get_position()[1])): t.get_text() for t in axes.texts}
        for axes in figure.axes
    ]
    assert cells[0] == {(0, 0): "1", (1, 0): "9", (0, 1): "0", (1, 1): "0"}
    assert cells[1] == {(0, 0): "1", (1, 0): "−∞", (0, 1): "0", (1, 1): "0"}
    assert cells[2] == {(0, 0): "1.00", (1, 0): "0", (0, 1): "0.50", (1, 1): "0.50"}
    assert cells[4] == {(0, 0): "10", (1, 0): "−4", (0, 1): "15", (1, 1): "−2"}


def test_the_strip_hides_what_the_mask_hides() -> None:
    """Hatched are the cells of the mask that was given, not those of a triangle that the figure made up."""
    window = visible(3, 3, sliding_window=1)
    axes = strip(["a", "b", "c"], torch.zeros(3, 3), torch.zeros(3, 2), window).axes[1]
    hatched = {(round(p.get_x() + 0.5), round(p.get_y() + 0.5)) for p in axes.patches if p.get_hatch()}
    assert hatched == {(column, row) for row in range(3) for column in range(3) if column != row}


def test_a_strip_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 rows"):
        strip(["a", "b", "c"], torch.zeros(2, 2), torch.zeros(2, 2), visible(2, 2))


def test_the_grid_frames_and_names_the_best_head() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = causal_map(3, 2, 6, generator=generator)
    scores = torch.zeros(3, 2)
    scores[1, 0] = 0.71
    figure = head_grid(maps, scores, "induction score")
    assert "Of 6 heads one stands out: layer 1, head 0, induction score 0.71" in words(figure)
    framed = [axes for axes in figure.axes if axes.spines["left"].get_linewidth() > 2]
    assert [axes.get_xlabel() for axes in framed] == ["0.71"]
    assert_allclose(framed[0].images[0].get_array().filled(0), maps[1, 0])


def test_a_head_that_copies_is_told_from_one_that_does_not() -> None:
    tokens = ["x", " *", " h", "x", " *"]
    weights = torch.eye(5)
    weights[4] = torch.tensor([0.1, 0.0, 0.8, 0.1, 0.0])
    figure = head_map(weights, tokens, "Layer 1, head 0")
    assert "Layer 1, head 0: “*” looks at what followed it last time: “h”" in words(figure)
    outlined = {(p.get_x() + 0.5, p.get_y() + 0.5) for p in figure.axes[0].patches if isinstance(p, Rectangle)}
    assert outlined == {(1, 3), (2, 4)}, "(column, row): after the first x, and after the first *"
    bars = [bar.get_width() for bar in figure.axes[1].patches]
    assert bars == pytest.approx([0.8, 0.1, 0.1, 0.0])
    weights[4] = torch.tensor([0.9, 0.0, 0.1, 0.0, 0.0])
    assert "Layer 1, head 0: “*” looks at “x”" in words(head_map(weights, tokens, "Layer 1, head 0"))


def test_two_long_tokens_fit() -> None:
    weights, long = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.1, 0.8, 0.1]]), "self.assertEqual"
    assert untidy(head_map(weights, [long] * 3, "Layer 27, head 13")) == []


def test_nothing_overlaps_whatever_is_drawn() -> None:
    seed = random.randrange(2**32)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for case in range(6):
        n = rng.randint(2, 4)
        tokens = [rng.choice(["the", "cat", "sat", "down", "here"]) for _ in range(n)]
        figures = [
            strip(tokens, 3 * torch.randn(n, n, generator=generator), 3 * torch.randn(n, 2, generator=generator))
        ]
        maps = causal_map(rng.randint(2, 8), rng.randint(1, 4), 12, generator=generator)
        figures.append(head_grid(maps, maps.mean((-1, -2)), "score"))
        n = rng.randint(2, 36)
        text = [rng.choice(WORDS) for _ in range(n)]
        figures.append(head_map(causal_map(n, generator=generator), text, "Layer 0, head 0"))
        assert [untidy(figure) for figure in figures] == [[]] * 3, f"{seed=}, {case=}"


def test_a_map_of_attention_is_drawn_as_it_is() -> None:
    q, k, v = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(1))
    weights = masked_attention(q[:, None], k[None], v[None], visible(8, 8), scale=0.5)[1][0]
    drawn = head_map(weights, list("abcdefgh"), "x").axes[0].images[0].get_array()
    assert_allclose(drawn.filled(0), weights)
    assert drawn.mask.sum() == 28, "what lies in the future is blank"
