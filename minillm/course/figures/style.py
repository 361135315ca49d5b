"""One hand for every figure: what a colour means, and how a figure of this project looks.

A colour has one meaning, and position, hatch or a letter always says the same thing again, so that a figure survives
greyscale and colour blindness. The colours are Petroff's ten (arXiv:2107.02270); their copy here serves versions of
matplotlib that do not ship them.

Figures are made without pyplot: no current figure, no window. Decorate what draws one with `@SHEET`; several threads
may draw at once, and when none of them draws any more, matplotlib's settings are as they were.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ContextDecorator
from functools import lru_cache
from itertools import pairwise
from threading import Lock
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.ticker import LogLocator, NullLocator

PETROFF10 = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)

PREFILL = PETROFF10[0]  # blue
DECODE = PETROFF10[1]  # amber; also recovered and bonus tokens
REJECTED = PETROFF10[2]  # red slash on white
DRAFT = PETROFF10[4]  # violet; also verified
KV_CACHE = PETROFF10[6]  # orange, hatched
SHARED = PETROFF10[7]  # sand, dotted, with a reference count
WEIGHTS = PETROFF10[8]  # grey
ACTIVATIONS = PETROFF10[9]  # pale cyan
KV_HATCH, SHARED_HATCH = "///", "..."
OWNERS = ("#9cc98a", "#e6a3c4", "#c79a84", "#d3d97a", "#a9b8b6")  # whose block it is; a letter always says it again

INK, QUIET = "#24292f", "#6a6f7a"  # text and axes; what matters less
PREFILL_INK, DECODE_INK = "#1b66ab", "#9a6100"  # the same hues, dark enough to be read as text on white

WIDTH, MARGIN = 8.2, 0.3  # inches: 900 pixels at 110 dpi, and the air left and right
SMALL, NORMAL = 8, 9  # points
LONGEST = 14  # characters of a token's text
SIGNS = str.maketrans({"\n": "⏎", "\t": "⇥", " ": "␣"})

LOG_TICKS: Sequence[tuple[float, float, Sequence[float]]] = (  # below so many decades, powers of a base times these
    (1, 10, (1, 1.5, 2, 3, 5, 7)),
    (4, 10, (1, 2, 5)),
    *((math.inf, base, (1,)) for base in (10, 100, 1000)),
)

_SHEET: Any = {  # names of rcParams; their type differs between versions of matplotlib
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": NORMAL,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": NORMAL,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": SMALL,
    "lines.linewidth": 1.6,
}


class Sheet(ContextDecorator):
    """Settings of matplotlib for as long as somebody draws: the first in lays them out, the last out takes them away.

    matplotlib has one set of settings for all threads. Two `rc_context` that overlap would each put back what it found,
    and so the later one would leave the sheet of the earlier in force for good.
    """

    def __init__(self, settings: Mapping[Any, Any]) -> None:
        self.settings, self._lock = settings, Lock()
        self._drawing, self._before, self._laid = 0, dict[Any, Any](), dict[Any, Any]()

    def __enter__(self) -> None:
        with self._lock:
            if self._drawing == 0:
                self._before = {name: rcParams[name] for name in self.settings}
                rcParams.update(self.settings)
                self._laid = {name: rcParams[name] for name in self.settings}  # as matplotlib writes them
            self._drawing += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._drawing -= 1
            if self._drawing == 0:  # what somebody else has set meanwhile stays
                rcParams.update({name: old for name, old in self._before.items() if rcParams[name] == self._laid[name]})


SHEET = Sheet(_SHEET)


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure of the course's width, or half of it where an explorer shows two in a row; in inches."""
    return Figure(figsize=(width, height))


def add_row(figure: Figure, *, top: float, height: float, left: float = 0.0) -> Axes:
    """Axes between the course's margins, `top` inches below the figure's upper edge; `left` inches for labels."""
    return add_axes(figure, left=MARGIN + left, top=top, width=figure.get_figwidth() - 2 * MARGIN - left, height=height)


def add_axes(figure: Figure, *, left: float, top: float, width: float, height: float) -> Axes:
    """Axes of a size in inches, `left` inches from the figure's left edge and `top` inches below its upper one."""
    across, full = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / full, width / across, height / full))


def add_title(figure: Figure, text: str) -> None:
    """What the figure says, in one line above everything else."""
    across, full = figure.get_size_inches()
    figure.text(MARGIN / across, 1 - 0.12 / full, text, ha="left", va="top", weight="bold", size=11)


def bare(axes: Axes, *, keep: str = "") -> None:
    """Take off spines and ticks that say nothing. `keep` names the sides that stay: any of "left", "bottom"."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in keep)
    if "left" not in keep:
        axes.set_yticks([])
    if "bottom" not in keep:
        axes.set_xticks([])


def plain_log(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis, as many as there is room for."""
    low, high = axis.get_view_interval()
    for most_decades, base, subs in LOG_TICKS:
        axis.set_major_locator(LogLocator(base, subs, numticks=100))  # all of them
        ticks = [float(tick) for tick in axis.get_majorticklocs() if low <= tick <= high]
        if math.log10(high / low) < most_decades and _fit(axis, ticks):
            break
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _fit(axis: Axis, ticks: Sequence[float]) -> bool:
    """Whether the numbers at these ticks of a logarithmic axis keep apart."""
    axes, across = axis.axes, axis is axis.axes.xaxis
    places = axes.transData.transform(np.column_stack([ticks, ticks]))[:, 0 if across else 1] * 72 / axes.figure.dpi
    sizes = [(text_width(f"{tick:g}") if across else SMALL) + 4 for tick in ticks]
    return all(
        after - before > (size + other) / 2
        for (before, size), (after, other) in pairwise(zip(places, sizes, strict=True))
    )


def apart(axes: Axes, levels: Sequence[float], size: float = SMALL) -> list[float]:
    """Heights (0 to 1) for words beside these levels of the y axis: up where two would meet, down below the top."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    step = (size + 4) / (72 * figure.get_figheight() * axes.get_position().height)
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(to_axes.transform((axes.get_xlim()[1], level))[1]) for level in levels]
    order, taken, free = sorted(range(len(levels)), key=heights.__getitem__), -1.0, 1 - step / 2
    for index in order:
        taken = heights[index] = max(heights[index], taken + step)
    for index in reversed(order):
        heights[index] = min(heights[index], free)
        free = heights[index] - step
    return heights


def points_per_unit(axes: Axes) -> float:
    """Points on paper per unit of the x axis, to tell what fits where."""
    low, high = axes.get_xlim()
    figure = axes.get_figure(root=True)
    assert figure is not None
    return 72 * figure.get_figwidth() * axes.get_position().width / (high - low)


def text_width(text: str, size: float = SMALL) -> float:
    """How wide a text gets, in points; the largest line counts."""
    font = FontProperties()
    return max((_line_width(line, size, font) for line in text.splitlines() if line.strip()), default=0.0)


@lru_cache(maxsize=4096)  # the extents of curves are slow to find, and figures ask for the same words again and again
def _line_width(line: str, size: float, font: FontProperties) -> float:
    return float(TextPath((0, 0), line, size=size, prop=font).get_extents().width)


def token_label(text: str) -> str:
    """A token's text on one short line: line breaks and lone blanks get a sign, what is long is cut."""
    shown = text.strip(" ") or (text if len(text) < 2 else f"␣×{len(text)}")
    shown = "".join(c if c.isprintable() else "·" for c in shown.translate(SIGNS))
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"
