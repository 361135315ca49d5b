"""What a decode step waits for: its bytes as the context grows, a map over batch and context, one walk for many.

The walk is the old picture of decoding: a teacher writes word after word, and the ink stands in a far store. What the
picture leaves out is drawn, too: one walk serves a whole class, and each pupil's own notes are read for that pupil
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter

from minillm.costs.formulas import Bytes
from minillm.course.figures import style
from minillm.course.lessons.regimes import Site
from minillm.measure.units import quantity

WEIGHTS: dict[str, Any] = {"facecolor": style.WEIGHTS, "edgecolor": "white", "linewidth": 0}
CACHE: dict[str, Any] = {"facecolor": "white", "edgecolor": style.KV_CACHE, "hatch": style.KV_HATCH, "linewidth": 0.8}
ACTIVATIONS: dict[str, Any] = {"facecolor": style.ACTIVATIONS, "edgecolor": "white", "linewidth": 0}
LOOKS: dict[str, dict[str, Any]] = {  # of a regime on the map
    "weights": {"facecolor": "#c6c8cd", "edgecolor": "#c6c8cd"},
    "KV cache": {"facecolor": "white", "edgecolor": style.KV_CACHE, "hatch": style.KV_HATCH},
    "arithmetic": {"facecolor": "#cfe3f6", "edgecolor": "#cfe3f6"},
    "overhead": {"facecolor": "#efe4f7", "edgecolor": style.DRAFT, "hatch": "oo"},
    "capacity": {"facecolor": "white", "edgecolor": style.INK, "hatch": "xx"},
}


@style.SHEET
def ledger_growth(contexts: Sequence[int], counted: Sequence[Bytes], predicted: Sequence[Bytes], model: str) -> Figure:
    """A bar for each context: weights, KV cache and activations that one decode step moves, as they were counted.

    A tick stands where the formula for weights and KV ends. Above each bar: the cache's share.
    """
    figure = style.new_figure(3.9)
    style.add_title(figure, _ledger_title(contexts, counted))
    axes = style.add_row(figure, top=0.95, height=2.35, left=0.75)
    places = range(len(contexts))
    parts = (("weights", WEIGHTS), ("KV cache", CACHE), ("activations", ACTIVATIONS))
    heights = [[b.weights, b.kv_read + b.kv_write, b.activations] for b in counted]
    for index, (_, look) in enumerate(parts):
        bottom = [sum(bars[:index]) for bars in heights]
        axes.bar(places, [bars[index] for bars in heights], 0.62, bottom=bottom, **look)
    axes.hlines([p.total for p in predicted], [p - 0.4 for p in places], [p + 0.4 for p in places], color=style.INK)
    for place, bars, moved in zip(places, heights, counted, strict=True):
        share = 100 * moved._replace(activations=0).kv_share
        text = f"KV {share:.0f} %" if share >= 1 else f"KV {share:.1f} %"
        axes.annotate(text, (place, sum(bars)), (0, 4), textcoords="offset points", ha="center", size=style.SMALL)
    highest = max(*map(sum, heights), *(p.total for p in predicted))
    axes.set_ylim(0, 1.12 * highest)  # room for the share above its bar
    axes.set_xticks(places, [f"{context:,}" for context in contexts])
    axes.set_xlabel("context, tokens", loc="right")
    axes.yaxis.set_major_formatter(EngFormatter("B"))
    axes.set_title(f"One decode step of {model}, batch 1. Bars: counted", size=style.NORMAL, weight="normal", pad=20)
    _add_keys(axes, parts)
    return figure


def _ledger_title(contexts: Sequence[int], counted: Sequence[Bytes]) -> str:
    """What most of the bytes are at the shortest context, and where that changes."""
    first = counted[0]._replace(activations=0).kv_share
    most = next((c for c, b in zip(contexts, counted, strict=True) if b.kv_read > b.weights), None)
    if most == contexts[0]:
        return f"At {most:,} tokens already a step reads mostly KV cache: {100 * first:.0f} %"
    start = f"At {contexts[0]:,} tokens a step reads weights, and {100 * first:.0f} % KV cache"
    return f"{start}; at {most:,} mostly cache" if most else start


def _add_keys(axes: Axes, parts: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """What the parts of the bars are, and the tick, in one line above them."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    box = axes.get_position()
    across, height = 72 * figure.get_figwidth() * box.width, 72 * figure.get_figheight() * box.height
    at = 0.0
    for name, look in (*parts, ("formula: weights + KV", {"facecolor": style.INK, "linewidth": 0})):
        tall = 1.6 if name.startswith("formula") else 8.0
        corner = at / across, 1 + (12 - tall / 2) / height
        axes.add_patch(Rectangle(corner, 10 / across, tall / height, transform=axes.transAxes, clip_on=False, **look))
        axes.text(
            (at + 14) / across, 1 + 12 / height, name, transform=axes.transAxes, va="center_baseline", size=style.SMALL
        )
        at += 30 + style.text_width(name)


@style.SHEET
def regime_map(sites: Sequence[Site], batches: Sequence[int], contexts: Sequence[int]) -> Figure:
    """Panels over batch and context: what a decode step waits for at each place, by the largest of its terms."""
    gap = 0.75
    width = (style.WIDTH - 2 * style.MARGIN - 0.55 - gap * (len(sites) - 1)) / len(sites)
    figure = style.new_figure(4.1)
    style.add_title(figure, "What a decode step waits for depends on batch and context")
    for place, site in enumerate(sites):
        left = style.MARGIN + 0.55 + place * (width + gap)
        axes = style.add_axes(figure, left=left, top=0.8, width=width, height=2.75)
        regimes = site.regimes(batches, contexts)
        _fill(axes, regimes)
        _write_regimes(axes, regimes)
        _label_ends(axes, batches, contexts)
        axes.set_title(site.name, size=style.NORMAL, weight="normal", pad=6)
    return figure


def _fill(axes: Axes, regimes: Sequence[Sequence[str]]) -> None:
    """Runs of one regime in a row are one rectangle, so that hatches go through."""
    axes.set(xlim=(0, len(regimes[0])), ylim=(0, len(regimes)))
    for y, row in enumerate(regimes):
        start = 0
        for x in range(1, len(row) + 1):
            if x == len(row) or row[x] != row[start]:
                axes.add_patch(Rectangle((start, y), x - start, 1, linewidth=0, **LOOKS[row[start]]))
                start = x


def _write_regimes(axes: Axes, regimes: Sequence[Sequence[str]]) -> None:
    """The name of each regime where most of it lies, inside the panel; small ones have none."""
    points = style.points_per_unit(axes)
    cells = [(name, x, y) for y, row in enumerate(regimes) for x, name in enumerate(row)]
    for name in dict.fromkeys(name for name, _, _ in cells):
        mine = [(x, y) for other, x, y in cells if other == name]
        if len(mine) < 0.04 * len(cells):
            continue
        x, y = sum(x for x, _ in mine) / len(mine), sum(y for _, y in mine) / len(mine)
        x, y = min(mine, key=lambda cell: (cell[0] - x) ** 2 + (cell[1] - y) ** 2)
        half = (style.text_width(name) / 2 + 4) / points
        x = min(max(x + 0.5, half), len(regimes[0]) - half)
        box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none"}
        axes.text(x, y + 0.5, name, ha="center", va="center", size=style.SMALL, bbox=box)


def _label_ends(axes: Axes, batches: Sequence[int], contexts: Sequence[int]) -> None:
    """A few of the places on each axis, by their numbers."""
    for ticks, values in ((axes.set_xticks, batches), (axes.set_yticks, contexts)):
        chosen = range(0, len(values), max(1, (len(values) + 4) // 6))
        ticks([place + 0.5 for place in chosen], [_thousands(values[place]) for place in chosen])
    axes.set_xlabel("batch, requests", loc="right")
    axes.set_ylabel("context of each, tokens", loc="top")
    axes.tick_params(length=2)


def _thousands(count: int) -> str:
    return f"{count / 1024:g}k" if count >= 1024 else str(count)


@style.SHEET
def one_walk(site: Site, batch: int, context: int, measured: float, longest: float) -> Figure:
    """One decode step as the teacher with the far ink bottle: the walk, the notes, the writing, and what a word costs.

    measured: seconds of the step; longest: seconds at the right end, the same for all steps that are compared.
    """
    terms = site.terms(batch, context)
    rows = (
        ("walk: read the weights", terms["weights"], WEIGHTS),
        (f"{_count(batch, 'set', 'sets')} of notes: read KV", terms["KV cache"], CACHE),
        ("writing: arithmetic", terms["arithmetic"], {"facecolor": "#cfe3f6", "edgecolor": style.PREFILL}),
        ("the step, measured", measured, {"facecolor": style.DECODE, "edgecolor": style.DECODE}),
    )
    figure = style.new_figure(1.75)
    words = f"One walk, {_count(batch, 'word', 'words')}: {quantity(measured / batch, 's')} a word"
    style.add_title(figure, words)
    axes = style.add_row(figure, top=0.45, height=1.2, left=1.9)
    end = max(longest, *(seconds for _, seconds, _ in rows))
    axes.set(xlim=(0, 1.18 * end), ylim=(len(rows) - 0.5, -0.5))
    style.bare(axes, keep="left")
    for row, (_, seconds, look) in enumerate(rows):
        axes.barh(row, seconds, 0.6, **look)
        axes.annotate(
            quantity(seconds, "s"), (seconds, row), (4, 0), textcoords="offset points", va="center", size=style.SMALL
        )
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.tick_params(length=0)
    return figure


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
