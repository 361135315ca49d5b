"""The triangle counts what was computed again and what was read; the cache shows what was written and nothing else."""

from __future__ import annotations

import random

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minillm.course.figures import style
from minillm.course.figures.recompute import LOOKS, cache_figure, recompute_triangle
from minillm.errors import ConfigError
from tests.course.figures.tidy import texts_of, untidy

AGAIN = [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
CACHED = [[0, 1, 2], [3], [4]]
TEXTS = ["def", " f", "(", "x", "):"]


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in texts_of(figure))


def cells(figure: Figure, panel: int, kind: str) -> set[tuple[int, int]]:
    """(row, column) of the cells of one kind."""
    look = LOOKS[kind]
    patches = [p for p in figure.axes[panel].patches if isinstance(p, Rectangle) and p.get_y() >= 0]
    same = [p for p in patches if p.get_hatch() == look.get("hatch") and _is(p.get_facecolor(), look["facecolor"])]
    return {(int(p.get_y()), int(p.get_x())) for p in same}


def _is(color: object, name: str) -> bool:
    from matplotlib.colors import same_color

    return same_color(color, name)  # type: ignore[arg-type]


def test_cells_are_what_each_pass_did() -> None:
    figure = recompute_triangle({"none": AGAIN, "cache": CACHED}, TEXTS)
    assert cells(figure, 0, "prefill") == cells(figure, 1, "prefill") == {(0, 0), (0, 1), (0, 2)}
    assert cells(figure, 0, "decode") == cells(figure, 1, "decode") == {(1, 3), (2, 4)}
    assert cells(figure, 0, "again") == cells(figure, 1, "cached")
    assert cells(figure, 1, "cached") == {(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3)}
    assert cells(figure, 0, "cached") == cells(figure, 1, "again") == set()


def test_words_are_the_counts() -> None:
    text = words(recompute_triangle({"none": AGAIN, "cache": CACHED}, TEXTS))
    assert "none: 7 of 12 tokens are computed again. cache: none" in text
    assert "computed again 7" in text and "read from the cache 7" in text and "prefill 3" in text


def test_a_chunked_prompt_repeats_nothing() -> None:
    figure = recompute_triangle({"chunks": [[0, 1], [2, 3], [4]]}, TEXTS)
    assert cells(figure, 0, "again") == set()


def test_tokens_without_a_text_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 tokens"):
        recompute_triangle({"cache": CACHED}, TEXTS[:2])


def test_only_what_is_written_is_shown() -> None:
    torch.manual_seed(0)
    final = torch.rand(3, 8)
    garbage = [final.masked_fill(torch.arange(8) >= n, torch.nan) for n in (4, 5)]
    axes = cache_figure(garbage, [4, 5], 0).axes[0]
    shown = torch.tensor(axes.images[0].get_array().filled(torch.nan))
    assert not shown[:, :4].isnan().any() and shown[:, 4:].isnan().all()
    assert float(shown[:, :4].min()) >= 0 and float(shown[:, :4].max()) <= 1
    assert torch.equal(shown[0, :4].argsort(), final[0, :4].argsort())


def test_new_columns_are_marked_in_the_colour_of_their_phase() -> None:
    values = [torch.rand(2, 8) for _ in range(3)]
    for step, (start, width, color) in enumerate([(0, 4, style.PREFILL), (4, 1, style.DECODE), (5, 1, style.DECODE)]):
        figure = cache_figure(values, [4, 5, 6], step)
        (mark,) = figure.axes[0].patches
        assert (mark.get_x(), mark.get_width()) == (start, width) and _is(mark.get_facecolor(), color)
        assert ("Prefill writes 4 columns" if step == 0 else f"the {start} before it stay") in words(figure)


def test_one_pass_has_room_for_the_name_of_its_axis() -> None:
    assert untidy(recompute_triangle({"KV cache": [[*range(30)]]}, ["x"] * 30)) == []


def test_nothing_overlaps_whatever_was_recorded() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for case in range(8):
        prompt, new = rng.randint(2, 30), rng.randint(1, 14)
        texts = [rng.choice(["x", "return", "\n", "    ", "a_long_name_of_something"]) for _ in range(prompt + new)]
        again = [list(range(prompt + i)) for i in range(new)]
        cached = [list(range(prompt)), *([prompt + i] for i in range(new - 1))]
        assert untidy(recompute_triangle({"No cache": again, "KV cache": cached}, texts)) == [], f"{seed=}, {case=}"
        lengths = sorted(rng.sample(range(1, 64), 3))
        values = [torch.rand(rng.randint(2, 32), 64)] * 3
        assert untidy(cache_figure(values, lengths, rng.randrange(3))) == [], f"{seed=}, {case=}"
