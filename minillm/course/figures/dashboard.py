"""Does an engine hold? One recorded load in four panels: who takes part, what is held, how fast, and who waits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from minillm.config import ModelConfig
from minillm.costs.formulas import least_bytes, step_flops
from minillm.course.figures import style
from minillm.course.figures.gantt import LOOKS
from minillm.engine.trace import StepRecord
from minillm.errors import ConfigError
from minillm.measure.roof import Roof
from minillm.measure.units import quantity
from minillm.outputs import RequestMetrics

TITLE, CAPTION, LEFT = 0.35, 0.36, 0.5  # inches: the figure's title, a panel's caption, room for names
ROW, POOL, LOWER = 0.17, 0.8, 2.2  # inches: a request, the blocks, the two panels at the foot
ROOF_WIDTH, GAP = 3.55, 1.2  # inches: the roof, and the room for names between it and the latencies
PERCENTILES = (50, 90, 99)


@style.SHEET
def load_dashboard(
    trace: Sequence[StepRecord],
    metrics: Sequence[RequestMetrics],
    *,
    config: ModelConfig,
    num_blocks: int,
    roof: Roof,
    element_bytes: int = 4,
) -> Figure:
    """A load at one glance: request by step, blocks after each step, steps under the roof, percentiles of waiting.

    trace: all steps of the load. metrics: times of the requests that it completed. num_blocks: those that the pool can
    hand out. roof: of the machine that the load ran on; element_bytes: of a weight and of a key. Raises ConfigError
    without steps, or if no request got two tokens: there is no gap to tell of then.
    """
    gaps = [gap for one in metrics for gap in one.itl]
    if not trace or not gaps:
        raise ConfigError(
            f"{len(trace)} steps and {len(gaps)} gaps between tokens: record a load with at least one request of two "
            "tokens, and give the engine trace_bytes enough for all steps."
        )
    requests = parts_by_request(trace)
    pool = TITLE + CAPTION + ROW * len(requests) + CAPTION
    lower = pool + POOL + 0.55 + CAPTION
    figure = style.new_figure(lower + LOWER + 0.5)
    style.add_title(figure, _title(trace, metrics, len(requests)))
    _draw_requests(
        style.add_row(figure, top=TITLE + CAPTION, height=ROW * len(requests), left=LEFT), requests, len(trace)
    )
    _draw_pool(style.add_row(figure, top=pool, height=POOL, left=LEFT), trace, num_blocks)
    left = style.MARGIN + LEFT
    axes = style.add_axes(figure, left=left, top=lower, width=ROOF_WIDTH, height=LOWER)
    _draw_steps(axes, step_points(trace, config, element_bytes), roof)
    left += ROOF_WIDTH + GAP
    width = style.WIDTH - style.MARGIN - left
    axes = style.add_axes(figure, left=left, top=lower, width=width, height=LOWER)
    _draw_waits(axes, [one.ttft for one in metrics if one.ttft is not None], gaps)
    return figure


def parts_by_request(trace: Sequence[StepRecord]) -> dict[str, list[tuple[int, str]]]:
    """(step, phase) of every step in which a request took part, by its id, in order of appearance."""
    requests: dict[str, list[tuple[int, str]]] = {}
    for step, record in enumerate(trace):
        for part in record.requests:
            requests.setdefault(part.request_id, []).append((step, part.phase))
    return requests


def step_points(
    trace: Sequence[StepRecord], config: ModelConfig, element_bytes: int
) -> Iterator[tuple[float, float, bool]]:
    """Of each step: FLOP per byte that it cannot avoid to read, useful FLOP/s, and whether it computed a prompt.

    By formula, over the time that model and sampling took.
    """
    for record in trace:
        flops = step_flops(config, record.shape).total
        prompt = any(part.phase in ("prefill", "recompute") for part in record.requests)
        yield flops / least_bytes(config, record.shape, element_bytes), flops / record.run_time, prompt


def _title(trace: Sequence[StepRecord], metrics: Sequence[RequestMetrics], count: int) -> str:
    lost = len({name for record in trace for name in record.preempted})
    words = f"{lost} lost their blocks on the way" if lost else "nobody lost a block"
    return f"{len(metrics)} of {count} requests served in {len(trace)} steps; {words}"


def _draw_requests(axes: Axes, requests: dict[str, list[tuple[int, str]]], num_steps: int) -> None:
    """A row per request; a line where it has begun and takes no part."""
    axes.set(xlim=(0, num_steps), ylim=(len(requests), 0))
    for row, parts in enumerate(requests.values()):
        axes.plot(
            [parts[0][0], parts[-1][0] + 1], [row + 0.5] * 2, color=style.QUIET, lw=0.8, zorder=0, solid_capstyle="butt"
        )
        for phase, same in groupby(sorted(parts, key=lambda part: part[1]), key=lambda part: part[1]):
            spans = [(step, 1.0) for step, _ in same]
            axes.broken_barh(spans, (row + 0.12, 0.76), edgecolor="white", linewidth=0.3, **LOOKS[phase])
    words = "Requests. Blue: prompt. Crossed: computed again. Amber: a token each step. Line: preempted, waits"
    axes.set_title(words, size=style.NORMAL, weight="normal", pad=4)
    style.bare(axes)
    axes.set_yticks([row + 0.5 for row in range(len(requests))], list(requests))
    axes.tick_params(axis="y", length=0)


def _draw_pool(axes: Axes, trace: Sequence[StepRecord], num_blocks: int) -> None:
    """Blocks that are held after each step, up to all there are; a mark where somebody was preempted."""
    held = [num_blocks - record.num_free_blocks for record in trace]
    look: dict[str, Any] = {"facecolor": "white", "edgecolor": style.KV_CACHE, "hatch": style.KV_HATCH, "linewidth": 0}
    axes.stairs(held, fill=True, **look)
    axes.stairs(held, color=style.KV_CACHE, lw=1.0)
    axes.axhline(num_blocks, color=style.INK, lw=0.8, ls="--")
    preempted = [step + 0.5 for step, record in enumerate(trace) if record.preempted]
    axes.plot(preempted, [1.12 * num_blocks] * len(preempted), ls="none", marker="v", ms=5, color=style.INK)
    axes.set(xlim=(0, len(trace)), ylim=(0, 1.25 * num_blocks), yticks=[0, num_blocks])
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.set_xlabel("engine step", loc="right")
    words = f"Blocks. Hatched: held, at most {max(held)} of {num_blocks}. White: free. Triangle: somebody is preempted"
    axes.set_title(words, size=style.NORMAL, weight="normal", pad=4)


def _draw_steps(axes: Axes, points: Iterator[tuple[float, float, bool]], roof: Roof) -> None:
    """Every step under the roof: dots with a prompt in it, squares for decodes alone."""
    steps = list(points)
    x, y = [step[0] for step in steps], [step[1] for step in steps]
    low, high = min(*x, roof.ridge / 4) / 1.6, max(*x, roof.ridge) * 2.5
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(min(y) / 2, 4 * max(*y, roof.flops_per_second)))
    places = [low, roof.ridge, high]
    axes.plot(places, [roof.flop_rate(place) for place in places], color=style.INK, zorder=1)
    for prompt, marker, color in ((True, "o", style.PREFILL), (False, "s", style.DECODE)):
        some = [step for step in steps if step[2] == prompt]
        look: dict[str, Any] = {"ls": "none", "marker": marker, "ms": 4.5, "mfc": color, "mec": "white", "mew": 0.4}
        axes.plot([step[0] for step in some], [step[1] for step in some], **look)
    said = f"{quantity(roof.bytes_per_second, 'B/s')}, {quantity(roof.flops_per_second, 'FLOP/s')}"
    axes.annotate(
        said, (0, 1), (3, -2), xycoords="axes fraction", textcoords="offset points", va="top", size=style.SMALL
    )
    axes.set_title("Steps under the roof. Dots: with a prompt", size=style.NORMAL, weight="normal", pad=4)
    style.plain_log(axes.xaxis)
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("FLOP per byte that has to be read", loc="right")
    axes.set_ylabel("FLOP/s", loc="top")


def _draw_waits(axes: Axes, first: Sequence[float], gaps: Sequence[float]) -> None:
    """Percentiles of the time to the first token and of the gaps between tokens, a row each."""
    rows = [("TTFT", p, np.percentile(first, p), style.PREFILL_INK, "o") for p in PERCENTILES]
    rows += [("ITL", p, np.percentile(gaps, p), style.DECODE_INK, "s") for p in PERCENTILES]
    low, high = min(row[2] for row in rows) / 2, max(row[2] for row in rows) * 6
    axes.set(xscale="log", xlim=(low, high), ylim=(len(rows) - 0.5, -0.5))
    for place, (_, _, value, color, marker) in enumerate(rows):
        axes.plot([low, value], [place] * 2, color=color, lw=0.8)
        axes.plot(value, place, marker=marker, color=color, ms=6)
        beside: dict[str, Any] = {
            "xytext": (7, 0),
            "textcoords": "offset points",
            "va": "center_baseline",
            "size": style.SMALL,
        }
        axes.annotate(quantity(value, "s"), (value, place), color=color, **beside)
    words = f"Waiting. {len(first)} first tokens, {len(gaps)} gaps"
    axes.set_title(words, size=style.NORMAL, weight="normal", pad=4)
    axes.set_yticks(range(len(rows)), [f"{name} P{p}" for name, p, *_ in rows])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(LogLocator(numticks=4))
    axes.xaxis.set_major_formatter(EngFormatter("s"))
    axes.xaxis.set_minor_locator(NullLocator())
