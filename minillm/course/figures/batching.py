"""What a batch gains: tokens per second against the time of a step, and FLOP per byte against the ridge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minillm.course.figures import style
from minillm.course.lessons.intensity import BatchIntensity
from minillm.errors import ConfigError
from minillm.measure.roof import Roof
from minillm.measure.roofline import Point, RooflineRun
from minillm.measure.units import number

LEFT, PANEL, GAP = 0.95, 3.05, 0.95  # inches: room for labels, width of a panel, room for its neighbour's labels
PARTS = {  # what is drawn of an intensity: its name, marker, line and fill
    "linear": ("linear layers", "o", style.WEIGHTS, style.WEIGHTS),
    "step": ("whole step", "s", style.DECODE_INK, style.DECODE),
    "attention": ("attention", "D", style.KV_CACHE, "white"),
}
MARKERS, SIGNS, FILLS = "sD^", "■◇▲", (style.DECODE, "white", "#ffe3b3")  # of decodes, one for each context


@style.SHEET
def batch_figure(run: RooflineRun) -> Figure:
    """New tokens per second, and milliseconds per step, against the batch: points measured, lines the machine's bound.

    Takes the run's decodes; one curve for each context. Raises ConfigError for fewer than two batches.
    """
    decodes = sorted((p for p in run.points if p.phase == "decode"), key=lambda p: (p.context, p.batch))
    if len({point.batch for point in decodes}) < 2:
        raise ConfigError("A curve over the batch needs decodes of at least two batch sizes. Measure more.")
    figure = style.new_figure(3.75)
    style.add_title(figure, _batch_title(decodes))
    rate, wait = (
        style.add_axes(figure, left=LEFT + place * (PANEL + GAP), top=0.85, width=PANEL, height=2.25)
        for place in range(2)
    )
    for index, (_, points) in enumerate(groupby(decodes, key=lambda point: point.context)):
        _draw_context(rate, wait, run.roof, list(points), index)
    contexts = dict.fromkeys(point.context for point in decodes)
    key = "     ".join(f"{SIGNS[index % 3]} context {context}" for index, context in enumerate(contexts))
    figure.text(
        1 - style.MARGIN / style.WIDTH, 1 - 0.42 / figure.get_figheight(),
        f"{key}     line: no faster on this machine", ha="right", va="top", size=style.SMALL, color=style.QUIET,
    )  # fmt: skip
    batches = sorted({point.batch for point in decodes})
    _finish(rate, batches, "New tokens per second, all together", "tokens/s")
    _finish(wait, batches, "What each of them waits for a token", "TPOT, ms")
    return figure


def _draw_context(rate: Axes, wait: Axes, roof: Roof, points: Sequence[Point], index: int) -> None:
    """The points of one context, and the line that the roof allows them."""
    line: dict[str, Any] = {"color": style.QUIET, "lw": 1.0}
    dots: dict[str, Any] = {"marker": MARKERS[index % 3], "mfc": FILLS[index % 3], "mec": style.DECODE_INK}
    dots |= {"ls": "none", "ms": 5.5, "zorder": 3}
    batches = [point.batch for point in points]
    bounds = [roof.seconds(point.flops, point.least_bytes) for point in points]
    times = [point.timing.best for point in points]
    for seconds, look in ((bounds, line), (times, dots)):
        rate.plot(batches, [batch / time for batch, time in zip(batches, seconds, strict=True)], **look)
        wait.plot(batches, [1e3 * time for time in seconds], **look)


def _finish(axes: Axes, batches: Sequence[int], title: str, unit: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel="batch, requests", ylabel=unit)
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.15, high * 1.25)
    style.plain_log(axes.yaxis)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.set_title(title, size=style.NORMAL)


def _batch_title(decodes: Sequence[Point]) -> str:
    """Of the shortest context: what its largest batch gains, and what it costs."""
    shortest = [point for point in decodes if point.context == decodes[0].context]
    one, many = shortest[0], shortest[-1]
    slower = many.timing.best / one.timing.best
    gain = many.batch / one.batch / slower
    return f"Batch {many.batch}: {number(gain)}× the tokens per second, for {number(slower)}× the wait"


@style.SHEET
def intensity_figure(
    counted: Sequence[BatchIntensity], predicted: Sequence[BatchIntensity], ridges: Mapping[str, float]
) -> Figure:
    """FLOP per byte of a decode step against its batch: points counted, lines predicted, ridges as dotted lines.

    ridges: FLOP per byte by the name of a machine. Raises ConfigError for a line of fewer than two batches.
    """
    if len(predicted) < 2 or not counted:
        raise ConfigError(f"{len(predicted)} predictions and {len(counted)} counts: give at least two and one.")
    figure = style.new_figure(4.3)
    over = " over the ridge" if predicted[-1].linear > max(ridges.values(), default=0.0) else ""
    style.add_title(figure, f"A batch lifts the linear layers{over}; attention stays where it was")
    axes = style.add_row(figure, top=0.6, height=3.05, left=0.65)
    axes.set(xscale="log", yscale="log", xlabel="batch, requests", ylabel="FLOP per byte of weights or KV")
    batches = [row.batch for row in predicted]
    axes.set_xlim(0.8 * batches[0], 4 * batches[-1])
    axes.set_ylim(0.6, 2.5 * max([*ridges.values(), predicted[-1].linear]))
    for part, (name, marker, color, fill) in PARTS.items():
        axes.plot(batches, [getattr(row, part) for row in predicted], color=color, lw=1.0, zorder=1)
        points = [getattr(row, part) for row in counted]
        axes.plot([row.batch for row in counted], points, marker, mec=color, mfc=fill, ms=6, zorder=2)
        end = getattr(predicted[-1], part)
        words = f"{name}\n{float(number(end)):g}"
        axes.annotate(words, (batches[-1], end), (9, 0), textcoords="offset points", va="center", color=color)
    for name, ridge in ridges.items():
        axes.axhline(ridge, color=style.INK, lw=0.9, ls=":", zorder=0)
        words, place = f"ridge of {name}: {number(ridge)}", (batches[0], ridge)
        axes.annotate(words, place, (0, 3), textcoords="offset points", size=style.SMALL)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    style.plain_log(axes.yaxis)
    return figure
