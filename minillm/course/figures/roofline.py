"""The roofline of this machine with a model's prefills and decodes under it, and the ledger of the bytes they moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from minillm.course.figures import style
from minillm.measure.roof import Roof
from minillm.measure.roofline import Point, RooflineRun
from minillm.measure.units import PREFIXES, number, quantity

ROOF_HEIGHT, BAR = 3.4, 0.34  # inches: the roof, and a bar of the ledger with the air around it
PLACES = ((0, 9), (0, -9), (11, -6), (-11, 6), (11, 6), (-11, -6), (0, 18), (0, -18))  # points from a dot to its number
FILLS, MARKERS = (style.DECODE, "white", "#ffe3b3"), "sD^"  # of decodes, one for each context
LEDGER: dict[str, dict[str, Any]] = {  # what a step moves, and how it is drawn
    "weights": {"color": style.WEIGHTS},
    "KV cache": {"facecolor": "white", "edgecolor": style.KV_CACHE, "hatch": style.KV_HATCH, "linewidth": 0.8},
    "activations": {"color": style.ACTIVATIONS},
}
KEYS = (0.0, 65.0, 135.0, 215.0)  # points from the ledger's left edge to each of its keys


@dataclass(frozen=True)
class Series:
    """Points that are drawn alike, and what the number beside each of them counts."""

    name: str
    counts: str
    points: list[Point]
    marker: str
    color: str
    fill: str

    def number(self, point: Point) -> str:
        """What is written beside a point: tokens of a prompt, or requests of a batch."""
        return str(point.context if point.phase == "prefill" else point.batch)


@style.SHEET
def roofline(run: RooflineRun) -> Figure:
    """The roof that was measured in the run, a line, and the steps, points; below, the bytes that each step moved.

    A point at the roof is as fast as this machine allows. Left of the ridge it waits for bytes, right of it for
    arithmetic.
    """
    bars = [point for series in _series(run.points) for point in (series.points[0], series.points[-1])]
    bars = list(dict.fromkeys(bars))
    figure = style.new_figure(1.0 + ROOF_HEIGHT + 1.2 + BAR * len(bars) + 0.6)
    style.add_title(figure, _title(run))
    axes = style.add_row(figure, top=1.0, height=ROOF_HEIGHT, left=0.6)
    _set_scales(axes, run)
    _draw_roof(axes, run)
    _draw_points(axes, run)
    ledger = style.add_row(figure, top=1.0 + ROOF_HEIGHT + 1.2, height=BAR * len(bars), left=2.15)
    _draw_ledger(ledger, bars)
    return figure


def _title(run: RooflineRun) -> str:
    """What the points say, whatever was measured: what the longest prompt and the smallest decode wait for."""
    prompts = [p for p in run.points if p.phase == "prefill"]
    decodes = [p for p in run.points if p.phase == "decode"]
    if not prompts or not decodes:
        return f"{run.model} under the roof of this machine"
    prompt = run.waits_for(max(prompts, key=lambda p: p.intensity))
    decode = run.waits_for(min(decodes, key=lambda p: p.intensity))
    if prompt == decode:
        far = "Neither a long prompt nor a lone decode comes near the roof"
        return f"A long prompt and a lone decode both wait for {prompt}" if prompt else far
    if prompt and decode:
        return f"A long prompt waits for {prompt}, a lone decode for {decode}"
    near, below = ("long prompt", "lone decode") if prompt else ("lone decode", "long prompt")
    return f"A {near} waits for {prompt or decode}, a {below} stays far below the roof"


def _series(points: Sequence[Point]) -> list[Series]:
    """Prefills by length; decodes by batch, one series for each context."""
    prefills = sorted((p for p in points if p.phase == "prefill"), key=lambda p: p.context)
    series = [Series("prefill", "tokens", prefills, "o", style.PREFILL_INK, style.PREFILL)]
    for index, context in enumerate(sorted({p.context for p in points if p.phase == "decode"})):
        decodes = sorted((p for p in points if p.phase == "decode" and p.context == context), key=lambda p: p.batch)
        look = MARKERS[index % len(MARKERS)], style.DECODE_INK, FILLS[index % len(FILLS)]
        series.append(Series(f"decode, context {context}", "requests", decodes, *look))
    return [one for one in series if one.points]


def _set_scales(axes: Axes, run: RooflineRun) -> None:
    """Logarithmic axes that show all points and the ridge, with air for their numbers."""
    roof, x = run.roof, [*(p.intensity for p in run.points), run.roof.ridge]
    low, high = min(*x, roof.ridge / 12) / 2.5, max(x) * 3
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    lowest = min(roof.flop_rate(low), *(p.flop_rate for p in run.points)) / 2.5
    axes.set_ylim(lowest, roof.flops_per_second * (roof.flops_per_second / lowest) ** 0.16)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(EngFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel("FLOP per byte that has to be read", loc="right")
    axes.set_ylabel("FLOP/s", loc="top")


def _draw_roof(axes: Axes, run: RooflineRun) -> None:
    """Slope and ceiling with their measured numbers, and the ridge between them: all words stand above the roof."""
    roof, (low, high), (bottom, top) = run.roof, axes.get_xlim(), axes.get_ylim()
    axes.plot([low, roof.ridge, high], [roof.flop_rate(v) for v in (low, roof.ridge, high)], color=style.INK, zorder=1)
    axes.plot([roof.ridge] * 2, [bottom, top], color=style.QUIET, lw=0.8, ls=":", zorder=0)
    slope = f"{quantity(roof.bytes_per_second, 'B/s')} from {'the cache' if run.in_cache else 'memory'}"
    ceiling = f"{quantity(roof.flops_per_second, 'FLOP/s')}, {run.dtype}"
    right = log(roof.ridge / low) > 0.6 * log(high / low)  # the ridge is far right: its word goes to the left
    words = (
        (slope, (roof.ridge / 1.5, roof.flops_per_second / 1.5), (-8, 0), "right"),
        (ceiling, (high, roof.flops_per_second), (0, 4), "right"),
        (
            f"ridge: {number(roof.ridge)} FLOP/byte",
            (roof.ridge, top),
            (-4 if right else 4, -10),
            "right" if right else "left",
        ),
    )
    for text, at, place, align in words:
        axes.annotate(text, at, place, textcoords="offset points", ha=align, va="bottom", size=style.SMALL)


def _draw_points(axes: Axes, run: RooflineRun) -> None:
    """Dots with their numbers, and above the axes what they mean."""
    series = _series(run.points)
    step = 1 / len(series)
    taken: list[Bbox] = []
    for index, one in enumerate(series):
        x, y = ([getattr(p, name) for p in one.points] for name in ("intensity", "flop_rate"))
        look: dict[str, Any] = {"marker": one.marker, "mfc": one.fill, "mec": one.color, "ms": 6, "ls": "none"}
        axes.plot(x, y, zorder=3, **look)
        axes.plot(index * step + 0.01, 1.13, transform=axes.transAxes, clip_on=False, **look)
        key = f"{one.name}\nnumber: {one.counts}"
        axes.text(index * step + 0.03, 1.13, key, color=one.color, va="center", transform=axes.transAxes)
        taken += [_around(axes, (p.intensity, p.flop_rate), (0, 0), 8, 8) for p in one.points]
    for one in series:
        for point in [one.points[0], *reversed(one.points[1:])]:
            _write_number(axes, one, point, run.roof, taken)


def _write_number(axes: Axes, series: Series, point: Point, roof: Roof, taken: list[Bbox]) -> None:
    """Put a point's number beside it where nothing stands yet; nowhere if there is no such place."""
    text = series.number(point)
    at, width = (point.intensity, point.flop_rate), style.text_width(text) + 2
    for place in PLACES:
        box = _around(axes, at, place, width, style.SMALL + 1)
        if not _above(axes, roof, box) and not any(box.overlaps(other) for other in taken):
            taken.append(box)
            axes.annotate(
                text, at, place, textcoords="offset points", ha="center", va="center_baseline",
                size=style.SMALL, color=series.color,
            )  # fmt: skip
            return


def _above(axes: Axes, roof: Roof, box: Bbox) -> bool:
    """Whether a box reaches over the roof: that is where the roof's own words stand."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    corner = (box.x0 * figure.dpi / 72, (box.y1 + 1) * figure.dpi / 72)
    x, y = axes.transData.inverted().transform(corner)
    return bool(y > roof.flop_rate(x))


def _around(axes: Axes, at: tuple[float, float], place: tuple[float, float], width: float, height: float) -> Bbox:
    """A box of this size around a place near a dot; all but the dot itself in points on paper."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    x, y = axes.transData.transform(at) * 72 / figure.dpi
    return Bbox.from_bounds(x + place[0] - width / 2, y + place[1] - height / 2, width, height)


def _draw_ledger(axes: Axes, points: Sequence[Point]) -> None:
    """A bar per step: weights, KV cache and activations as they were counted; a tick where the formula ends."""
    rows = range(len(points))
    power, prefix = next((e, p) for e, p in PREFIXES if max(p.counted.total for p in points) >= 10**e)
    scale = 10**power
    left = [0.0] * len(points)
    for place, (name, look) in enumerate(LEDGER.items()):
        widths = [_bytes(point, name) / scale for point in points]
        axes.barh(rows, widths, 0.62, left=left, **look)
        left = [start + width for start, width in zip(left, widths, strict=True)]
        _add_key(axes, place, name, look)
    predicted = [p.predicted.total / scale for p in points]
    axes.vlines(predicted, [r - 0.42 for r in rows], [r + 0.42 for r in rows], color=style.INK, lw=1.4)
    _add_key(axes, 3, "formula: weights + KV", {"color": style.INK}, width=1.4)
    axes.set_ylim(len(points) - 0.45, -0.55)
    axes.set_yticks(list(rows), [_name(point) for point in points])
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(f"{prefix}B read and written by one step", loc="right")
    axes.tick_params(axis="y", length=0)


def _bytes(point: Point, part: str) -> int:
    """What was counted of a part of the ledger."""
    moved = point.counted
    return {"weights": moved.weights, "KV cache": moved.kv_read + moved.kv_write, "activations": moved.activations}[
        part
    ]


def _add_key(axes: Axes, place: int, name: str, look: dict[str, Any], width: float = 9.0) -> None:
    """A patch of a colour and what it means, above the bars."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    box = axes.get_position()
    across, height = 72 * figure.get_figwidth() * box.width, 72 * figure.get_figheight() * box.height  # points
    x, y = KEYS[place] / across, 1 + 12 / height
    patch = Rectangle((x, y), width / across, 9 / height, transform=axes.transAxes, clip_on=False, **look)
    axes.add_artist(patch)
    axes.text(x + (width + 4) / across, y + 4.5 / height, name, transform=axes.transAxes, va="center_baseline")


def _name(point: Point) -> str:
    if point.phase == "prefill":
        return f"prefill, {point.context} tokens"
    return f"decode, {point.batch} × context {point.context}"
