"""The tile loop as a kernel: which program computes what, how parts of the keys are merged, and how fast it all is.

Programs and parts are those of a launch that took place; speeds are read from a file that a benchmark wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, exp, floor, log10
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, NullLocator

from minillm.course.figures import style
from minillm.errors import ConfigError
from minillm.measure.units import quantity

HEADS = 4  # panels of a program grid
LEVEL, GAP = 0.42, 0.32  # inches: height of a level of merging, and the air between panels
MARKERS = "osD^v"
SPEEDS = {"prefill": ("flop_per_s", "FLOP/s"), "decode": ("byte_per_s", "B/s")}  # of a recorded row, and its unit


@dataclass(frozen=True)
class Program:
    """One program of a launch: its place in the grid, its queries, and the tiles of keys in the order it read them."""

    tile: int
    head: int
    queries: range
    keys: Sequence[range]


@style.SHEET
def program_grid(programs: Sequence[Program]) -> Figure:
    """One panel per head, one band per program, cut into the tiles of keys that it loops over.

    Bands lie beside each other and share nothing. Raises ConfigError for a launch that is empty or has too many heads.
    """
    heads = sorted({program.head for program in programs})
    if not 1 <= len(heads) <= HEADS:
        raise ConfigError(f"A launch over {len(heads)} heads cannot be drawn. Launch 1 to {HEADS} of them.")
    q_len = max(program.queries.stop for program in programs)
    kv_len = max(keys.stop for program in programs for keys in program.keys)
    left = style.MARGIN + 0.3
    size = min(2.3, (style.WIDTH - left - style.MARGIN - GAP * (len(heads) - 1)) / len(heads))
    figure = style.new_figure(0.85 + size + 0.35)
    most, least = (pick(len(program.keys) for program in programs) for pick in (max, min))
    loops = f"each loops over {least} to {most} tiles" if least < most else f"each loops over {most} tiles"
    style.add_title(figure, f"{len(programs)} programs, one for each tile of queries and head; {loops} of keys")
    for place, head in enumerate(heads):
        axes = style.add_axes(figure, left=left + place * (size + GAP), top=0.85, width=size, height=size)
        axes.set(xlim=(0, kv_len), ylim=(q_len, 0), xticks=[0, kv_len], yticks=[0, q_len] if place == 0 else [])
        axes.set_title(f"program_id(1) = {head}", size=style.NORMAL, weight="normal", pad=5)
        axes.set_xlabel("key", labelpad=-8)
        for program in programs:
            if program.head == head:
                _draw_program(axes, program)
    figure.axes[0].set_ylabel("query", labelpad=-8)
    return figure


def _draw_program(axes: Axes, program: Program) -> None:
    """A band of tiles with its program's number in the first one."""
    height = len(program.queries)
    for keys in program.keys:
        place = (keys.start, program.queries.start)
        shade = style.PREFILL if program.tile % 2 == 0 else "#8fbfec"
        axes.add_patch(Rectangle(place, len(keys), height, facecolor=shade, edgecolor="white", linewidth=0.8))
    middle = program.queries.start + height / 2
    axes.text(
        axes.get_xlim()[1] * 0.03, middle, str(program.tile), va="center_baseline", weight="bold", size=style.SMALL
    )


@dataclass(frozen=True)
class Part:
    """Attention of one query over a range of keys: all that a merge needs of it, besides its output."""

    keys: range
    lse: float  # log-sum-exp of the scaled scores


@style.SHEET
def merge_tree(levels: Sequence[Sequence[Part]]) -> Figure:
    """Parts of the keys, level by level: first what the programs computed, last the whole.

    Each box is as wide as its keys, and filled as high as its share of the softmax, exp(its log-sum-exp - the whole
    one). Raises ConfigError unless the last level is one part.
    """
    if not levels or len(levels[-1]) != 1:
        raise ConfigError("The last level of a merge is one part: go on merging, or give the levels in order.")
    whole = levels[-1][0]
    figure = style.new_figure(0.75 + len(levels) * (LEVEL + GAP) + 0.5)
    parts = len(levels[0])
    style.add_title(figure, f"{parts} programs share the keys of one query; their log-sum-exps make one softmax of it")
    for level, row in enumerate(levels):
        axes = style.add_row(figure, left=0.75, top=0.75 + level * (LEVEL + GAP), height=LEVEL)
        axes.set(xlim=(whole.keys.start, whole.keys.stop), ylim=(0, 1))
        style.bare(axes)
        for part in row:
            _draw_part(axes, part, exp(part.lse - whole.lse))
        name = f"{len(row)} parts" if len(row) > 1 else "the whole"
        axes.text(-0.01, 0.5, name, transform=axes.transAxes, ha="right", va="center", size=style.SMALL)
    bottom = figure.axes[-1]
    bottom.spines["bottom"].set_visible(True)
    bottom.set_xticks(_far_apart([*(part.keys.start for part in levels[0]), whole.keys.stop], bottom))
    bottom.set_xlabel("key. Above each part: its log-sum-exp and, filled, its share of the softmax", loc="left")
    return figure


def _far_apart(edges: Sequence[int], axes: Axes) -> list[int]:
    """The edges whose numbers have room beside each other; first and last among them."""
    room = (style.text_width(str(edges[-1])) + 8) / style.points_per_unit(axes)
    kept = [edges[0]]
    for edge in edges[1:-1]:
        if edge - kept[-1] >= room and edges[-1] - edge >= room:
            kept.append(edge)
    return [*kept, edges[-1]]


def _draw_part(axes: Axes, part: Part, share: float) -> None:
    """A box with its share filled, and above it the numbers that it has room for."""
    place, width = part.keys.start, len(part.keys)
    axes.add_patch(Rectangle((place, 0), width, share, facecolor=style.DECODE, edgecolor="none"))
    axes.add_patch(Rectangle((place, 0), width, 1, fill=False, edgecolor=style.INK, linewidth=0.8, clip_on=False))
    percent = f"{100 * share:.0f} %"
    room = style.points_per_unit(axes) * width - 6
    text = next((t for t in (f"{part.lse:.2f}: {percent}", percent) if style.text_width(t) < room), "")
    axes.annotate(text, (place + width / 2, 1), (0, 3), textcoords="offset points", ha="center", size=style.SMALL)


@style.SHEET
def kernel_speed(rows: Sequence[Mapping[str, Any]], ceiling: float, where: str) -> Figure:
    """Time and speed of attention kernels against context, from rows of one phase that `benchmarks/attention.py` wrote.

    ceiling: what that machine reaches at best, FLOP/s for prefill and B/s for decode; a line in both panels, and
    nothing can be faster. where: hardware and date, which stand in the figure. Raises ConfigError for rows of both
    phases, or none.
    """
    phases = {row["phase"] for row in rows}
    if len(phases) != 1:
        raise ConfigError(f"Rows of phases {sorted(phases)} cannot share an axis. Choose those of one phase.")
    phase = phases.pop()
    field, unit = SPEEDS[phase]
    rows = sorted(rows, key=lambda row: row["tokens"])
    figure = style.new_figure(3.9)
    style.add_title(figure, _speed_title(rows, phase, field, unit, ceiling))
    left, width = style.MARGIN + 0.6, 2.7
    times = style.add_axes(figure, left=left, top=1.0, width=width, height=2.15)
    speeds = style.add_axes(figure, left=left + width + 1.0, top=1.0, width=width, height=2.15)
    names = _candidates(rows)
    for index, name in enumerate(names):
        _draw_candidate(times, speeds, [row for row in rows if name in row["candidates"]], name, field, index)
    for axes, words in ((times, "time of one layer. Line: at best"), (speeds, f"{unit} reached")):
        _set_context_axis(axes, [row["tokens"] for row in rows], phase)
        axes.set_title(words, size=style.NORMAL, weight="normal")
    bound = [_work(next(iter(row["candidates"].values())), field) / ceiling for row in rows]
    times.plot([row["tokens"] for row in rows], bound, color=style.INK, lw=1.2)
    _set_scales(times, speeds, unit, ceiling)
    last = [[row["candidates"][name][field] for row in rows if name in row["candidates"]][-1] for name in names]
    for index, (name, y) in enumerate(zip(names, style.apart(speeds, last), strict=True)):
        speeds.text(1.02, y, name, transform=speeds.transAxes, va="center", size=style.SMALL, color=_color(index))
    figure.text(style.MARGIN / style.WIDTH, 1 - 0.42 / 3.9, f"recorded: {where}", va="top", color=style.QUIET)
    return figure


def _candidates(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["candidates"]))


def _draw_candidate(
    times: Axes, speeds: Axes, rows: Sequence[Mapping[str, Any]], name: str, field: str, index: int
) -> None:
    """Medians with quartiles, with the same marker in both panels."""
    tokens, results = [row["tokens"] for row in rows], [row["candidates"][name] for row in rows]
    fill = _color(index) if index == 0 else "none"
    look: Any = {"fmt": MARKERS[index], "color": _color(index), "ms": 5, "elinewidth": 1.0, "mfc": fill}
    for axes, value in ((times, lambda seconds, _: seconds), (speeds, lambda seconds, work: work / seconds)):
        spread = [sorted(value(s, _work(result, field)) for s in result["seconds"]) for result in results]
        error = [[mid - low for low, mid, _ in spread], [high - mid for _, mid, high in spread]]
        axes.errorbar(tokens, [mid for _, mid, _ in spread], yerr=error, **look)


def _work(result: Mapping[str, Any], field: str) -> float:
    """FLOPs or bytes of a recorded result: what it reached times how long it took."""
    return float(result[field] * result["seconds"][1])


def _color(index: int) -> str:
    """The first candidate is ours."""
    return style.INK if index == 0 else style.QUIET


def _set_scales(times: Axes, speeds: Axes, unit: str, ceiling: float) -> None:
    """Whole decades of time; speed from 0 to above the ceiling, which is a line."""
    times.set_yscale("log")
    low, high = (log10(limit) for limit in times.get_ylim())
    times.set_ylim(10 ** floor(low), 10 ** ceil(high))
    times.yaxis.set_major_formatter(EngFormatter("s"))
    times.yaxis.set_minor_locator(NullLocator())
    speeds.set_ylim(0, 1.2 * max(ceiling, speeds.get_ylim()[1] / 1.1))
    speeds.yaxis.set_major_formatter(EngFormatter(unit))
    speeds.axhline(ceiling, color=style.INK, lw=1.2)
    words: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "size": style.SMALL}
    speeds.annotate(f"at best {quantity(ceiling, unit)}", (1, ceiling), (0, 4), ha="right", **words)


def _set_context_axis(axes: Axes, tokens: Sequence[int], phase: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(tokens) / 1.3, max(tokens) * 1.3)
    axes.set_xticks(sorted(set(tokens)), [_thousands(count) for count in sorted(set(tokens))])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("prompt, tokens" if phase == "prefill" else "context, tokens", loc="right")


def _thousands(count: int) -> str:
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else str(count)


def _speed_title(rows: Sequence[Mapping[str, Any]], phase: str, field: str, unit: str, ceiling: float) -> str:
    """What part of the ceiling the first candidate reaches at the longest context."""
    name = _candidates(rows)[0]
    share = rows[-1]["candidates"][name][field] / ceiling
    what = f"a prompt of {rows[-1]['tokens']:,}" if phase == "prefill" else f"decode at context {rows[-1]['tokens']:,}"
    return f"“{name}”: {what} reaches {share:.0%} of the machine's {unit}"
