"""Attention in tiles: the running softmax replayed, the order of the tiles, and what their height costs and saves.

What is drawn was observed: `TileSteps` keeps what `tiled_attention(observer=…)` shows after every tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, NullLocator
from torch import Tensor

from minillm.costs.formulas import visible_pairs
from minillm.course.figures import style
from minillm.course.lessons.softmax import TileStep
from minillm.errors import ConfigError
from minillm.measure.units import quantity

PAST = "#c9ced6"  # what earlier tiles left
EDGE = "#d8dce1"
WHOLE, CUT = style.PREFILL, "#b9d6f2"  # a tile that is seen as a whole, and one that the causal rule cuts
FRAMES = 6  # of a film-strip, at most
GAP = 0.28  # inches between frames
DIMS = 12  # of the output that a strip shows


@style.SHEET
def softmax_strip(steps: Sequence[TileStep], scores: Tensor, exact: Tensor) -> Figure:
    """The last query of head 0, tile by tile: the weights seen so far, their sum l, the maximum m, and the output.

    steps: what the observer was given for one tile of queries, in order. scores `[kv_len]`: the query's scaled scores,
    all at once. exact `[d]`: the output of ordinary attention, drawn as ticks. Raises ConfigError for more than six
    tiles, or for none.
    """
    if not 1 <= len(steps) <= FRAMES:
        raise ConfigError(f"A film-strip has 1 to {FRAMES} frames, not {len(steps)}. Choose larger tiles of keys.")
    rises = sum(step.m[0, -1] > before.m[0, -1] for before, step in pairwise(steps))
    figure = style.new_figure(3.75)
    times = {0: "never", 1: "once", 2: "twice"}.get(int(rises), f"{int(rises)} times")
    style.add_title(figure, f"One pass over {len(steps)} tiles: the maximum rises {times}, and what was summed shrinks")
    left = style.MARGIN + 0.45
    width = (style.WIDTH - left - style.MARGIN - GAP * (len(steps) - 1)) / len(steps)
    for frame, step in enumerate(steps):
        x = left + frame * (width + GAP)
        _draw_weights(style.add_axes(figure, left=x, top=0.95, width=width, height=1.1), steps[: frame + 1], scores)
        _draw_output(style.add_axes(figure, left=x, top=2.3, width=width, height=0.95), step, exact, first=frame == 0)
    figure.axes[0].set_ylabel("exp(score − m)", size=style.SMALL)
    figure.axes[1].set_ylabel("out / l", size=style.SMALL)
    _explain(figure, len(exact))
    return figure


def _draw_weights(axes: Axes, steps: Sequence[TileStep], scores: Tensor) -> None:
    """Bars under the newest maximum: this tile's, and what became of the earlier ones, with their old outline."""
    step, keys = steps[-1], steps[-1].keys
    m = float(step.m[0, -1])
    axes.set(xlim=(-0.7, len(scores) - 0.3), ylim=(0, 1.05))
    weights = (scores[: keys.stop] - m).exp().tolist()
    axes.bar(range(keys.start), weights[: keys.start], 0.8, color=PAST)
    axes.bar(keys, weights[keys.start :], 0.8, color=style.ACTIVATIONS, edgecolor=style.INK, linewidth=0.8)
    words = [f"keys {keys.start}–{keys.stop - 1}", f"m = {_signed(m)}", f"l = {float(step.l[0, -1]):.2f}"]
    if len(steps) > 1 and m > (before := float(steps[-2].m[0, -1])):
        old = (scores[: keys.start] - before).exp().tolist()
        axes.bar(range(keys.start), old, 0.8, fill=False, edgecolor=style.QUIET, linewidth=0.6, linestyle=":")
        words[1] += f"   × {float((steps[-2].m[0, -1] - m).exp()):.2f}"
    axes.set_title("\n".join(words), size=style.SMALL, weight="normal", linespacing=1.3, pad=4)
    style.bare(axes, keep="bottom")
    axes.set_xticks([])


def _draw_output(axes: Axes, step: TileStep, exact: Tensor, *, first: bool) -> None:
    """The output so far as bars, and ticks where exact attention ends."""
    out, exact = (step.out[0, -1, :DIMS] / step.l[0, -1]).tolist(), exact[:DIMS]
    axes.bar(range(len(out)), out, 0.7, color=style.ACTIVATIONS)
    axes.axhline(0, color=style.INK, lw=0.8)
    reach = 1.5 * max(float(exact.abs().max()), 1e-9)
    axes.hlines(exact.tolist(), [i - 0.42 for i in range(len(out))], [i + 0.42 for i in range(len(out))],
                color=style.INK, lw=1.6)  # fmt: skip
    axes.set(xlim=(-0.7, len(out) - 0.3), ylim=(-reach, reach))
    style.bare(axes)


def _explain(figure: Figure, dims: int) -> None:
    bars = "one bar per dimension" if dims <= DIMS else f"the first {DIMS} of {dims} dimensions"
    note = "Top: cyan, the newest tile; grey, earlier ones; dotted, what they were under the old maximum.\n"
    note += f"Below: the output so far, {bars}; ticks: attention over all keys at once."
    place = style.MARGIN / style.WIDTH, 0.1 / figure.get_figheight()
    figure.text(*place, note, size=style.SMALL, color=style.QUIET, linespacing=1.4)


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


@style.SHEET
def tile_order(steps: Sequence[TileStep], q_len: int, kv_len: int) -> Figure:
    """The tiles of the score matrix in the order in which they were computed; what is white was skipped.

    The line is the causal rule: a query sees the keys left of it. Numbers stand in tiles that have room for them. Half
    as wide as the page.
    """
    left, width = style.MARGIN + 0.3, 3.1
    height = width * max(0.3, min(1.0, q_len / kv_len))
    figure = style.new_figure(0.6 + height + 1.05, style.WIDTH / 2)
    done = sum(len(step.queries) * len(step.keys) for step in steps) / (q_len * kv_len)
    seen = visible_pairs(q_len, kv_len) / (q_len * kv_len)
    style.add_title(
        figure, f"{len(steps)} tiles compute {done:.0%} of the matrix;\nthe causal rule asks for {seen:.0%}"
    )
    axes = style.add_axes(figure, left=left, top=0.6, width=width, height=height)
    axes.set(xlim=(0, kv_len), ylim=(q_len, 0), xticks=[0, kv_len], yticks=[0, q_len])
    for number, step in enumerate(steps, 1):
        _draw_tile(axes, step, kv_len - q_len, str(number))
    axes.plot([kv_len - q_len, kv_len], [0, q_len], color=style.INK, lw=1.2)
    axes.set_xlabel("key", labelpad=-8)
    axes.set_ylabel("query", labelpad=-8)
    whole = sum(not _is_cut(step, kv_len - q_len) for step in steps)
    _add_keys(figure, left, 0.6 + height + 0.35, (whole, len(steps) - whole))
    return figure


def _is_cut(step: TileStep, offset: int) -> bool:
    """Whether some query of the tile must not see some key of it."""
    return step.keys.stop - 1 > offset + step.queries.start


def _draw_tile(axes: Axes, step: TileStep, offset: int, text: str) -> None:
    """A rectangle, light and hatched where the causal rule cuts it, with its number if there is room."""
    cut = _is_cut(step, offset)
    look: dict[str, Any] = {"facecolor": CUT, "hatch": "..."} if cut else {"facecolor": WHOLE}
    place, width, height = (step.keys.start, step.queries.start), len(step.keys), len(step.queries)
    axes.add_patch(Rectangle(place, width, height, edgecolor="white", linewidth=1.0, **look))
    room = style.points_per_unit(axes) * width
    if room > style.text_width(text) + 5 and _points_high(axes, height) > style.SMALL + 3:
        box = {"facecolor": CUT, "edgecolor": "none", "pad": 1} if cut else None
        centre = (place[0] + width / 2, place[1] + height / 2)
        axes.text(*centre, text, ha="center", va="center_baseline", size=style.SMALL, bbox=box, zorder=4,
                  color=style.INK if cut else "white")  # fmt: skip


def _points_high(axes: Axes, height: float) -> float:
    figure = axes.get_figure(root=True)
    assert figure is not None
    low, high = sorted(axes.get_ylim())
    return 72 * figure.get_figheight() * axes.get_position().height * height / (high - low)


def _add_keys(figure: Figure, left: float, top: float, counts: tuple[int, int]) -> None:
    """What the fills mean, below the matrix; how many tiles have them."""
    axes = style.add_axes(figure, left=left, top=top, width=0.25, height=0.6)
    axes.set(xlim=(0, 1), ylim=(3, 0))
    style.bare(axes)
    looks: tuple[dict[str, Any], ...] = (
        {"facecolor": WHOLE},
        {"facecolor": CUT, "hatch": "..."},
        {"facecolor": "white", "edgecolor": style.QUIET},
    )
    words = (f"seen as a whole ({counts[0]})", f"cut by the rule, needs a mask ({counts[1]})", "future: never computed")
    for row, (text, look) in enumerate(zip(words, looks, strict=True)):
        axes.add_patch(Rectangle((0, row + 0.2), 1, 0.6, **look))
        axes.text(1.3, row + 0.5, text, va="center", size=style.SMALL)


@dataclass(frozen=True)
class TileCost:
    """What attention with tiles of one height took."""

    rows: int  # queries per tile
    moved: int  # bytes of q, k, v and the output, read and written
    predicted: int  # the same, of the formula
    held: int  # most bytes that were alive at once, besides the inputs


@style.SHEET
def tile_cost(costs: Sequence[TileCost], naive: TileCost, caches: Sequence[tuple[str, int]] = ()) -> Figure:
    """The trade of tiles: the higher they are, the fewer times keys are read, and the more memory their scores take.

    naive: the textbook's attention; its `moved` counts the score matrix, too, which is too large to stay in a cache.
    caches: names and bytes of this machine's, to see what the tiles fit into.
    """
    figure = style.new_figure(3.9)
    style.add_title(figure, _cost_title(costs))
    room = 1.25  # inches right of each panel, for the names of its lines
    left = style.MARGIN + 0.55
    width = (style.WIDTH - left - style.MARGIN - 0.45) / 2 - room
    moved = style.add_axes(figure, left=left, top=0.95, width=width, height=2.3)
    held = style.add_axes(figure, left=left + width + room + 0.55, top=0.95, width=width, height=2.3)
    rows = [cost.rows for cost in costs]
    moved.plot(rows, [cost.predicted for cost in costs], color=style.PREFILL_INK, lw=1.2)
    moved.plot(rows, [cost.moved for cost in costs], "o", color=style.PREFILL_INK)
    held.plot(rows, [cost.held for cost in costs], "o", color=style.PREFILL_INK)
    lines = [("score matrix", naive.held, "--")] + [(name, size, ":") for name, size in caches]
    _draw_levels(moved, [("score matrix", naive.moved, "--")], costs[-1].moved)
    _draw_levels(held, lines, costs[-1].held)
    for axes in (moved, held):
        axes.set_xscale("log", base=2)
        axes.set_xticks(rows, [str(count) for count in rows])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("queries per tile", loc="right")
    moved.set_title("moved to and from memory\npoints: counted, line: formula", size=style.NORMAL, weight="normal")
    held.set_title("held besides the inputs\npoints: counted", size=style.NORMAL, weight="normal")
    return figure


def _cost_title(costs: Sequence[TileCost]) -> str:
    first, last = costs[0], costs[-1]
    high = f"Tiles {last.rows // first.rows} times as high"
    return (
        f"{high} move {first.moved / last.moved:.2g} times fewer bytes and hold {last.held / first.held:.2g} times more"
    )


def _draw_levels(axes: Axes, levels: Sequence[tuple[str, float, str]], points: float) -> None:
    """Lines across a panel of bytes with their names at the right; `points` names the dots."""
    for _, level, line in levels:
        axes.axhline(level, color=style.QUIET, lw=1.0, ls=line)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(EngFormatter("B"))
    axes.yaxis.set_minor_locator(NullLocator())
    names = [("tiles", points, style.PREFILL_INK)] + [
        (f"{n}, {quantity(b, 'B')}", b, style.QUIET) for n, b, _ in levels
    ]
    for (name, _, color), y in zip(names, style.apart(axes, [level for _, level, _ in names]), strict=True):
        axes.text(1.03, y, name, transform=axes.transAxes, va="center", color=color, size=style.SMALL)
