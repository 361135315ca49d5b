"""What must hold for every figure: no text is cut off, none runs into another, none is too small to read."""

from __future__ import annotations

from itertools import combinations

from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

SMALLEST = 8  # points


def texts_of(figure: Figure) -> list[Text]:
    """All texts that are drawn and say something; ticks beyond an axis' limits keep labels that are never drawn."""
    hidden = {id(label) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in _beyond(axis)}
    texts = figure.findobj(lambda artist: isinstance(artist, Text) and id(artist) not in hidden)
    return [text for text in texts if isinstance(text, Text) and text.get_visible() and text.get_text().strip()]


def _beyond(axis: Axis) -> list[Text]:
    low, high = sorted(axis.get_view_interval())
    return [
        label
        for at, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
        if not low <= at <= high
    ]


def untidy(figure: Figure) -> list[str]:
    """What is wrong with the texts of a figure, in words; empty if nothing is."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    page = figure.bbox
    placed = [(text, text.get_window_extent(canvas.get_renderer())) for text in texts_of(figure)]
    faults = [f"{text.get_text()!r} is smaller than {SMALLEST} pt" for text, _ in placed if text.get_size() < SMALLEST]
    for text, box in placed:
        if box.x0 < page.x0 or box.y0 < page.y0 or box.x1 > page.x1 or box.y1 > page.y1:
            faults.append(f"{text.get_text()!r} is cut off")
    inner = [(text, box.padded(-0.5)) for text, box in placed]
    for (one, first), (other, second) in combinations(inner, 2):
        if first.overlaps(second):
            faults.append(f"{one.get_text()!r} runs into {other.get_text()!r}")
    return faults
