"""What a KV cache saves: which tokens each step computes, without one and with one, and what lies in it meanwhile."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from minillm.course.figures import style
from minillm.errors import ConfigError

Passes = Sequence[Sequence[int]]  # positions that each pass of the model computed, in order

GAP, LARGEST = 0.35, 0.24  # inches between the panels, and of the largest cell
WORDS = {"prefill": "prefill", "decode": "decode", "again": "computed again", "cached": "read from the cache"}
LOOKS: dict[str, dict[str, Any]] = {
    "prefill": {"facecolor": style.PREFILL, "edgecolor": "white"},
    "decode": {"facecolor": style.DECODE, "edgecolor": "white"},
    "again": {"facecolor": "white", "edgecolor": style.PREFILL, "hatch": "xxxx"},
    "cached": {"facecolor": "white", "edgecolor": style.KV_CACHE, "hatch": style.KV_HATCH},
}


@style.SHEET
def recompute_triangle(runs: Mapping[str, Passes], texts: Sequence[str]) -> Figure:
    """A row for each pass of the model, a column for each token: computed, computed again, or read from the cache.

    runs: by name, the positions that each pass was given. texts: what the tokens say. Raises ConfigError where a pass
    has a position without a text.
    """
    if any(position >= len(texts) for passes in runs.values() for one in passes for position in one):
        raise ConfigError(f"There are texts for {len(texts)} tokens, and a pass that computes a later one.")
    kinds = {name: [_kinds(passes, row) for row in range(len(passes))] for name, passes in runs.items()}
    labels = [style.token_label(text) for text in texts]
    width = (style.WIDTH - 2 * style.MARGIN - 0.35 - GAP * (len(runs) - 1)) / len(runs)
    cell = min(LARGEST, width / len(texts))
    height = cell * max(map(len, runs.values()))
    below = max(style.text_width("\n".join(labels)) / 72 + 0.3, 0.7 - height / 2)  # labels; half of the axis' name
    figure = style.new_figure(0.95 + height + below)
    style.add_title(figure, _title(kinds))
    for place, (name, rows) in enumerate(kinds.items()):
        left = style.MARGIN + 0.35 + place * (width + GAP)
        axes = style.add_axes(figure, left=left, top=0.95, width=cell * len(texts), height=cell * len(rows))
        _draw_cells(axes, rows, labels)
        _explain(axes, name, rows)
        if place == 0:
            axes.set_ylabel("pass of the model", labelpad=4)
    return figure


def _kinds(passes: Passes, row: int) -> dict[int, str]:
    """What happens to each token that a pass sees: all up to its last one."""
    before = {position for earlier in passes[:row] for position in earlier}
    fresh = "prefill" if row == 0 else "decode"
    now = {position: "again" if position in before else fresh for position in passes[row]}
    return {position: now.get(position, "cached") for position in range(max(passes[row]) + 1)}


def _count(rows: Sequence[Mapping[int, str]], *kinds: str) -> int:
    return sum(kind in kinds for row in rows for kind in row.values())


def _title(kinds: Mapping[str, Sequence[Mapping[int, str]]]) -> str:
    """The run that repeats most of its work, and what is left in the one that repeats least."""
    again = {name: _count(rows, "again") for name, rows in kinds.items()}
    most, least = max(again, key=again.__getitem__), min(again, key=again.__getitem__)
    computed = _count(kinds[most], "prefill", "decode", "again")
    return f"{most}: {again[most]} of {computed} tokens are computed again. {least}: {again[least] or 'none'}"


def _draw_cells(axes: Axes, rows: Sequence[Mapping[int, str]], labels: Sequence[str]) -> None:
    axes.set(xlim=(0, len(labels)), ylim=(len(rows), 0))
    style.bare(axes)
    for row, kinds in enumerate(rows):
        for column, kind in kinds.items():
            axes.add_patch(Rectangle((column + 0.06, row + 0.06), 0.88, 0.88, linewidth=0.6, **LOOKS[kind]))
    every = math.ceil((style.SMALL + 3) / style.points_per_unit(axes))  # of the columns has room for words
    places = range(0, len(labels), every)
    axes.set_xticks([place + 0.5 for place in places], [labels[place] for place in places], rotation=90)
    axes.set_yticks(
        [row + 0.5 for row in range(0, len(rows), every)], [str(row + 1) for row in range(0, len(rows), every)]
    )
    axes.tick_params(length=0, pad=2)


def _explain(axes: Axes, name: str, rows: Sequence[Mapping[int, str]]) -> None:
    """Above a panel the name of its run, and what its cells mean and how many there are."""
    axes.set_title(name, size=style.NORMAL, pad=22)
    points, key, at = style.points_per_unit(axes), 8.0, 0.0
    height = key / points  # cells are square
    for kind, words in WORDS.items():
        if count := _count(rows, kind):
            text = f"{words} {count}"
            corner = at / points, -1.9 * height
            axes.add_patch(Rectangle(corner, key / points, height, linewidth=0.6, clip_on=False, **LOOKS[kind]))
            middle = corner[1] + height / 2
            axes.text((at + 1.5 * key) / points, middle, text, va="center_baseline", size=style.SMALL)
            at += 1.5 * key + style.text_width(text) + 14


@style.SHEET
def cache_figure(snapshots: Sequence[Tensor], lengths: Sequence[int], step: int) -> Figure:
    """What lay in a cache after a step: a column for each token, a row for each layer.

    snapshots: after each step a number for each place, `[layers, capacity]`, such as the length of its key; lengths:
    how many places were written by then. What was not written is empty; brightness compares a layer with itself.
    """
    before, after = (0, *lengths)[step], lengths[step]
    layers, capacity = snapshots[step].shape
    top, height = 0.8, 0.13 * layers
    figure = style.new_figure(top + height + 0.45)
    style.add_title(figure, _cache_title(before, after))
    axes = style.add_row(figure, top=top, height=height, left=0.45)
    axes.imshow(
        _shades(snapshots[step], snapshots[-1][:, : lengths[-1]], after), cmap=colormaps["cividis"], vmin=0, vmax=1,
        aspect="auto", interpolation="nearest", extent=(0, capacity, layers, 0),
    )  # fmt: skip
    color, ink = (style.PREFILL, style.PREFILL_INK) if before == 0 else (style.DECODE, style.DECODE_INK)
    axes.add_patch(Rectangle((before, -0.9), after - before, 0.6, facecolor=color, clip_on=False))
    axes.text(before, -1.1, "prefill" if before == 0 else "decode", color=ink, size=style.SMALL, va="bottom")
    axes.set_yticks([0.5, layers - 0.5], ["0", str(layers - 1)])
    axes.set_ylabel("layer")
    axes.set_xlabel("place in the cache. Bright: a long key vector, for its layer. White: not written yet", loc="right")
    axes.tick_params(length=0)
    return figure


def _cache_title(before: int, after: int) -> str:
    new = f"{after - before} column" + "s" * (after - before > 1)
    return f"Prefill writes {new} at once" if before == 0 else f"This step writes {new}; the {before} before it stay"


def _shades(values: Tensor, all_values: Tensor, written: int) -> Tensor:
    """Each layer from 0 to 1 over what it held in the end; nothing where nothing is written."""
    low, high = all_values.amin(1, keepdim=True), all_values.amax(1, keepdim=True)
    shades = (values.float() - low) / (high - low).clamp_min(1e-12)
    shades[:, written:] = torch.nan
    return shades
