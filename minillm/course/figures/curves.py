"""Measured points on predicted curves: the form of every figure that says what something costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from minillm.course.figures import style
from minillm.errors import ConfigError

HEIGHT = 2.9  # inches of the axes
Scale = Literal["linear", "log"]


@dataclass(frozen=True)
class Curve:
    """What was measured at some places, and what a formula says there; the name stands at the right end.

    color and marker are those of the phase or part it belongs to, and tell the curve from its neighbours twice.
    `predicted` is None where no formula tells beforehand.
    """

    name: str
    x: Sequence[float]
    measured: Sequence[float]
    predicted: Sequence[float] | None
    color: str
    marker: str


def prefill_curve(
    name: str, x: Sequence[float], measured: Sequence[float], predicted: Sequence[float] | None = None
) -> Curve:
    """A curve of the first phase: blue dots."""
    return Curve(name, x, measured, predicted, style.PREFILL_INK, "o")


def decode_curve(
    name: str, x: Sequence[float], measured: Sequence[float], predicted: Sequence[float] | None = None
) -> Curve:
    """A curve of the second phase: amber squares."""
    return Curve(name, x, measured, predicted, style.DECODE_INK, "s")


@style.SHEET
def curves(
    title: str, lines: Sequence[Curve], *, x: str, y: str, unit: str, x_scale: Scale = "linear", y_scale: Scale = "log"
) -> Figure:
    """Points: measured. Lines: formula. x and y name the axes; numbers of the y axis carry `unit` and a prefix.

    title: what the measured numbers say, so it is made from them. Raises ConfigError for a curve whose lists differ
    in length.
    """
    for line in lines:
        if not len(line.x) == len(line.measured) == len(line.predicted or line.x) > 0:
            raise ConfigError(f"{line.name}: as many measured and predicted values as places are needed, at least one.")
    figure = style.new_figure(0.75 + HEIGHT + 0.55)
    style.add_title(figure, title)
    right = max(style.text_width(line.name, style.NORMAL) for line in lines) / 72 + 0.2
    left = style.MARGIN + 0.75
    axes = style.add_axes(figure, left=left, top=0.75, width=style.WIDTH - left - right - 0.1, height=HEIGHT)
    axes.set(xscale=x_scale, yscale=y_scale)
    for line in lines:
        _draw(axes, line)
    if y_scale == "linear":
        axes.set_ylim(bottom=0)
    _number(axes.xaxis, x_scale, "{x:,.0f}".format)
    _number(axes.yaxis, y_scale, EngFormatter(unit))
    axes.set_xlabel(x, loc="right")
    kinds = "Points: measured. Lines: formula." if any(line.predicted for line in lines) else "Points: measured."
    axes.set_title(f"{y}. {kinds}", size=style.NORMAL, weight="normal")
    _name(axes, lines)
    return figure


def _draw(axes: Axes, line: Curve) -> None:
    """A line for the formula, points for what was measured; thin points where there are many."""
    few = len(line.x) <= 40
    if line.predicted is not None:
        axes.plot(line.x, line.predicted, color=line.color, lw=1.2, zorder=2)
    look: dict[str, Any] = {"ms": 5.5, "mfc": "white", "mew": 1.4} if few else {"ms": 3.5, "mew": 0}
    axes.plot(line.x, line.measured, line.marker, color=line.color, zorder=3, clip_on=False, **look)


def _number(axis: Axis, scale: Scale, text: EngFormatter | Callable[..., str]) -> None:
    """Few numbers on each axis, and none between the powers of ten of a long logarithmic one."""
    if scale == "linear":
        axis.set_major_locator(MaxNLocator(6, integer=not isinstance(text, EngFormatter)))
    else:
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1,) if high / low > 300 else (1, 2, 5)))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(text if isinstance(text, EngFormatter) else lambda value, _: text(x=value))


def _name(axes: Axes, lines: Sequence[Curve]) -> None:
    """The name of each curve right of its end, moved up where two would meet."""
    for line, height in zip(lines, style.apart(axes, [line.measured[-1] for line in lines]), strict=True):
        axes.text(1.02, height, line.name, transform=axes.transAxes, va="center", color=line.color)
