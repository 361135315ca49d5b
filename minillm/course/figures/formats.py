"""What a format of the KV cache buys and what it costs: tokens in memory, bytes and time of a step, lost quality.

Formats stand in the same order everywhere, the model's own first. What is predicted is a tick, what was measured a bar
or a point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minillm.course.figures import style
from minillm.errors import ConfigError
from minillm.measure.bench_kv import KvQuality, KvRow
from minillm.measure.kv_quality import PER_TOKEN

LEFT, MIDDLE, RIGHT = 0.95, 0.75, 0.85  # inches: for names of formats, between two panels, and for words at the end
TOP, PANEL, GAP = 0.8, 1.35, 0.95  # inches: above the panels, their height, and between two rows of them
PLAIN = "model's own"  # what "auto" is called in a figure
KINDS = {"Gaussian": "o", "outliers": "s", "trained": "^"}  # of keys, and their markers
MARKERS = "osD^v"
HATCHED: dict[str, Any] = {"facecolor": "white", "edgecolor": style.KV_CACHE, "hatch": style.KV_HATCH, "linewidth": 0.8}
WORDS: dict[str, Any] = {"loc": "left", "size": style.NORMAL, "weight": "normal", "pad": 5}


@style.SHEET
def format_figure(rows: Sequence[KvRow], *, batch: int = 1) -> Figure:
    """What formats buy: tokens per GB, bytes and time of a decode step of `batch` sequences.

    Bytes are those of the longest context. Raises ConfigError for rows without a step.
    """
    if not rows or not all(row.steps for row in rows):
        raise ConfigError("There is no decode step to draw. Measure with at least one context.")
    figure = style.new_figure(TOP + 2 * PANEL + GAP + 0.55)
    style.add_title(figure, _bought(rows))
    left, right = _pair(figure, TOP, PANEL)
    _draw_capacity(left, rows)
    _draw_bytes(right, rows, batch)
    wide = style.WIDTH - LEFT - RIGHT
    _draw_times(style.add_axes(figure, left=LEFT, top=TOP + PANEL + GAP, width=wide, height=PANEL), rows)
    return figure


@style.SHEET
def quality_figure(qualities: Sequence[KvQuality]) -> Figure:
    """What formats cost: perplexity against bits, and how far attention's output is off, by kind of keys.

    The first of them is the unquantised one. Raises ConfigError where there is nothing to compare with it.
    """
    if len(qualities) < 2:
        raise ConfigError("There is no quality to draw. Measure a trained model in at least one format.")
    figure = style.new_figure(TOP + 1.9 + 0.55)
    style.add_title(figure, _lost(qualities))
    left, right = _pair(figure, TOP, 1.9)
    _draw_perplexity(left, qualities[0], qualities[1:])
    _draw_errors(right, qualities[1:])
    return figure


def _pair(figure: Figure, top: float, height: float) -> tuple[Axes, Axes]:
    """Two panels side by side, each with room for names on its left."""
    width = (style.WIDTH - 2 * LEFT - MIDDLE - style.MARGIN) / 2
    return tuple(
        style.add_axes(figure, left=LEFT + place * (width + LEFT + MIDDLE), top=top, width=width, height=height)
        for place in range(2)
    )  # type: ignore[return-value]


def _name(kv_format: str) -> str:
    return PLAIN if kv_format == "auto" else kv_format.replace(" per ", "\nper ")


def _bought(rows: Sequence[KvRow]) -> str:
    """The smallest format: how many times the tokens, and what that does to the time of the longest step."""
    smallest = min(rows, key=lambda row: row.allocated_bytes)
    more = rows[0].allocated_bytes / smallest.allocated_bytes
    speedup = smallest.steps[-1].speedup.median
    time = f"saves {100 - 100 / speedup:.0f} % of" if speedup > 1 else f"takes {1 / speedup:.1f} times"
    return f"{smallest.format} holds {more:.1f} times the tokens; on this machine its step {time} the time"


def _lost(qualities: Sequence[KvQuality]) -> str:
    """What int4 loses, and how much more with one range per token; else the most that a format loses."""
    losses = {one.format: 100 * one.loss(qualities[0]) for one in qualities[1:]}
    right, wrong = losses.get("int4", math.inf), losses.get(PER_TOKEN, 0.0)
    if 0 < right < wrong:
        return f"int4 costs {right:.2f} % of perplexity; with one range per token it would be {wrong:.2f} %"
    return f"No format costs more than {max(0.0, *losses.values()):.2f} % of perplexity"


def _list_formats(axes: Axes, names: Sequence[str]) -> None:
    """A row for each format, the first on top."""
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_yticks(range(len(names)), [_name(name) for name in names])
    axes.tick_params(axis="y", length=0)
    style.bare(axes, keep="left bottom")
    axes.spines["left"].set_visible(False)


def _draw_capacity(axes: Axes, rows: Sequence[KvRow]) -> None:
    """Tokens that fit into a GB, as allocated; a tick where the formula puts them."""
    places = range(len(rows))
    axes.barh(places, [row.tokens_per_gb / 1e3 for row in rows], 0.6, **HATCHED)
    _tick(axes, [1e6 / row.predicted_bytes for row in rows])
    _list_formats(axes, [row.format for row in rows])
    axes.set_title("thousand tokens per GB of cache", **WORDS)


def _draw_bytes(axes: Axes, rows: Sequence[KvRow], batch: int) -> None:
    """Weights and KV cache of the longest step, as counted; a tick where the formula ends."""
    steps = [row.steps[-1] for row in rows]
    places = range(len(rows))
    weights = [step.counted.weights / 1e6 for step in steps]
    axes.barh(places, weights, 0.6, color=style.WEIGHTS)
    axes.barh(places, [(s.counted.kv_read + s.counted.kv_write) / 1e6 for s in steps], 0.6, left=weights, **HATCHED)
    _tick(axes, [step.predicted.total / 1e6 for step in steps])
    _list_formats(axes, [row.format for row in rows])
    axes.set_title(
        f"MB read and written by a decode step,\nbatch {batch}, context {steps[0].context}: weights, KV", **WORDS
    )


def _tick(axes: Axes, predicted: Sequence[float]) -> None:
    for place, end in enumerate(predicted):
        axes.vlines(end, place - 0.42, place + 0.42, color=style.INK, lw=1.4)


def _draw_times(axes: Axes, rows: Sequence[KvRow]) -> None:
    """Time of a step against its context, a line for each format with its name at the end."""
    for row, marker in zip(rows, MARKERS, strict=False):
        contexts, times = [s.context for s in row.steps], [s.timing for s in row.steps]
        fill = style.DECODE if row is rows[0] else "white"
        spread = [[1e3 * (t.median - t.low) for t in times], [1e3 * (t.high - t.median) for t in times]]
        axes.errorbar(
            contexts, [1e3 * t.median for t in times], spread,
            marker=marker, color=style.DECODE_INK, mfc=fill, ms=5, lw=1.0, elinewidth=0.8,
        )  # fmt: skip
    axes.set_ylim(0, None)
    ends = [1e3 * row.steps[-1].timing.median for row in rows]
    for row, height in zip(rows, style.apart(axes, ends), strict=True):
        axes.text(1.02, height, _name(row.format), transform=axes.transAxes, va="center", size=style.SMALL)
    axes.set_title("milliseconds of a decode step on this machine; median and quartiles", **WORDS)
    axes.set_xlabel("tokens in the context")


def _draw_perplexity(axes: Axes, plain: KvQuality, others: Sequence[KvQuality]) -> None:
    """By how much the perplexity rises, against the bits of a number."""
    losses = [100 * one.loss(plain) for one in others]
    place = axes.get_xaxis_transform()
    on_white: dict[str, Any] = {"size": style.SMALL, "bbox": {"fc": "white", "ec": "none", "pad": 0.8}}
    axes.axhline(0, color=style.QUIET, lw=0.8, zorder=0)
    for one, loss, marker in zip(others, losses, MARKERS, strict=False):
        wrong = one.format == PER_TOKEN
        axes.plot(one.bits, loss, marker, color=style.KV_CACHE, mfc="white" if wrong else style.KV_CACHE, ms=6)
    span = max(*losses, 0) - min(*losses, 0) or 1
    axes.set(xlim=(3.5, 9.9), ylim=(min(*losses, 0) - 0.15 * span, max(*losses, 0) + 0.3 * span))
    for near in ([one for one in others if one.bits < 6], [one for one in others if one.bits >= 6]):
        heights = style.apart(axes, [100 * one.loss(plain) for one in near])
        for one, height in zip(near, heights, strict=True):
            axes.text(one.bits + 0.25, height, one.format, transform=place, va="center", **on_white)
    axes.set_title(f"% more perplexity than {plain.perplexity:.2f}, unquantised", **WORDS)
    axes.set_xlabel("bits per number, ranges included")


def _draw_errors(axes: Axes, others: Sequence[KvQuality]) -> None:
    """A row for each format: the relative error of attention's output, a marker for each kind of keys."""
    for place, one in enumerate(others):
        for kind, error in one.errors.items():
            fill = style.KV_CACHE if kind == "trained" else "white"
            axes.plot(error, place, KINDS[kind], color=style.KV_CACHE, mfc=fill, ms=6)
    axes.set_xscale("log")
    _list_formats(axes, [one.format for one in others])
    style.plain_log(axes.xaxis)
    signs = {"Gaussian": "○", "outliers": "□", "trained": "▲"}
    key = ", ".join(f"{signs[kind]} {kind}" for kind in others[0].errors)
    axes.set_title(f"error of attention's output on keys:\n{key}", **WORDS)
    axes.set_xlabel("‖error‖ / ‖output‖")
