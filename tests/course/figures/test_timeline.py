"""The timeline draws what was recorded, to scale, says so in its title, and never runs two texts into each other."""

from __future__ import annotations

import random
from itertools import accumulate

import matplotlib
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

from minillm.course.figures import style
from minillm.course.figures.timeline import request_timeline
from minillm.errors import RequestError
from minillm.outputs import RequestMetrics
from tests.course.figures.tidy import texts_of, untidy

WORDS = ["\n", "    ", " if", " n", "\t", ":", " return", " self.assertEqual_everything", "é", "\x00", "$x$", "", " "]


def metrics(gaps: list[float], queue: float = 0.0) -> RequestMetrics:
    """A request whose tokens left after these gaps in seconds, the first counted from its arrival at t = 5."""
    return RequestMetrics(5.0, [list(accumulate(gaps, initial=5.0))[1:]], 5.0 + queue)


def rectangles(figure: Figure, color: str, row: int = 0) -> list[tuple[float, float]]:
    """(start, width) of everything that has this colour in one strip."""
    axes = figure.axes[row]
    found = [(p.get_x(), p.get_width()) for p in axes.patches if to_hex(p.get_facecolor()) == color]
    for collection in axes.collections:
        if to_hex(collection.get_facecolor()[0]) == color:
            boxes = [path.get_extents() for path in collection.get_paths()]
            found += [(box.x0, box.width) for box in boxes]
    return found


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in texts_of(figure))


def test_bars_are_the_recorded_times() -> None:
    figure = request_timeline(metrics([0.050, 0.010, 0.020, 0.015], queue=0.008), prompt_tokens=12)
    assert_allclose(rectangles(figure, style.PREFILL), [(8, 42)], atol=1e-9)
    assert_allclose(rectangles(figure, style.DECODE), [(50, 10), (60, 20), (80, 15)], atol=1e-9)
    assert_allclose(figure.axes[0].get_xlim(), (0, 95))


def test_words_are_the_metrics() -> None:
    figure = request_timeline(metrics([1.0, 0.1, 0.2, 0.3]), prompt_tokens=7)
    assert "TTFT 1000 ms" in words(figure) and "3 × TPOT 200 ms" in words(figure)
    assert "4 × TPOT" not in words(figure), "four tokens take three decode steps"
    assert "prefill: 7 tokens at once" in words(figure)
    assert "queue" not in words(figure)
    assert "200 ms of it in the queue" in words(request_timeline(metrics([1.0], queue=0.2), prompt_tokens=7))


def test_one_token_has_no_decode() -> None:
    figure = request_timeline(metrics([0.05]), prompt_tokens=1)
    assert "1 prompt token in one step" in words(figure)
    assert "TPOT" not in words(figure) and "decode" not in words(figure)


def test_wide_steps_carry_their_words_and_narrow_ones_are_magnified() -> None:
    wide = request_timeline(metrics([0.05] * 6), prompt_tokens=3, texts=["a", "b", "c", "d", "e", "f"])
    assert len(wide.axes) == 1 and {"b", "f"} <= set(words(wide).split("\n"))
    narrow = request_timeline(metrics([0.05] + [0.001] * 99), prompt_tokens=3, texts=["word"] * 100)
    assert len(narrow.axes) == 2
    first_steps = rectangles(narrow, style.DECODE, row=1)
    assert_allclose(first_steps[:2], [(50, 1), (51, 1)], atol=1e-9)
    assert words(narrow).count("word") == len(first_steps) + 1, "each magnified step, and the token of prefill"


def test_nothing_overlaps_whatever_is_recorded() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for case in range(20):
        gaps = [rng.lognormvariate(-6, 2)] + [
            rng.lognormvariate(-6, 0.4) for _ in range(rng.choice([0, 1, 5, 40, 400]))
        ]
        texts = [rng.choice(WORDS) for _ in gaps]
        queue = rng.choice([0, gaps[0] / 2])
        figure = request_timeline(metrics(gaps, queue), prompt_tokens=rng.randrange(1, 5000), texts=texts)
        assert untidy(figure) == [], f"{seed=}, {case=}"


def test_tidiness_notices_what_is_untidy() -> None:
    """The mutants of a figure: two texts in one place, one beyond the edge, one too small."""
    figure = request_timeline(metrics([0.05, 0.01]), prompt_tokens=3)
    figure.text(0.5, 0.5, "one")
    figure.text(0.51, 0.5, "other")
    figure.text(0.98, 0.05, "beyond the edge")
    figure.text(0.1, 0.01, "tiny", size=5)
    faults = "; ".join(untidy(figure))
    assert "'one' runs into 'other'" in faults and "'beyond the edge' is cut off" in faults and "'tiny' is sm" in faults


@pytest.mark.parametrize("times", [[], [[]]])
def test_a_request_without_tokens_is_refused(times: list[list[float]]) -> None:
    with pytest.raises(RequestError, match="no tokens yet"):
        request_timeline(RequestMetrics(0.0, times), prompt_tokens=3)


def test_the_style_stays_inside_its_figures() -> None:
    before = dict(matplotlib.rcParams)
    request_timeline(metrics([0.05, 0.01]), prompt_tokens=3)
    assert dict(matplotlib.rcParams) == before


def test_a_colour_means_one_thing() -> None:
    meanings = [style.PREFILL, style.DECODE, style.REJECTED, style.DRAFT, style.KV_CACHE, style.SHARED]
    meanings += [style.WEIGHTS, style.ACTIVATIONS]
    assert len(set(meanings)) == len(meanings)


def test_the_palette_is_petroffs() -> None:
    library = matplotlib.style.library
    if "petroff10" not in library:
        pytest.skip("this matplotlib does not ship the palette")
    assert tuple(library["petroff10"]["axes.prop_cycle"].by_key()["color"]) == style.PETROFF10
