"""What a token sees: attention step by step, the heads of a model side by side, and one head in full.

A map `[queries, keys]` is drawn as it is written down: a row per token that looks, a column per token that is looked
at. Each row sums to 1. What the causal rule hides stays white: a token *cannot* look there, whatever it wants.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from minillm.course.figures import style
from minillm.errors import ConfigError

MAP = colormaps["cividis"].with_extremes(bad="white")
EDGE = "#d8dce1"
SQRT = PowerNorm(0.5, 0, 1)  # small weights are the rule: their square root can be told apart
CELL, GAP = 0.42, 0.32  # inches: the largest cell of a strip, and the air between two of its panels
HIDDEN: Any = {"facecolor": "#f2f3f5", "edgecolor": EDGE, "hatch": "////", "linewidth": 0.8}
ARROWS = ("", "→", "→", "×", "=")  # before each panel of the strip
ROW, NAMED = 0.145, 1.0  # inches per token of a labelled map, and of the smallest one beside which its names fit
BESTS, LIST = 4, 2.5  # keys that are listed beside a head, and inches for the list


@style.SHEET
def attention_strip(
    tokens: Sequence[str], *, scores: Tensor, mask: Tensor, weights: Tensor, values: Tensor, out: Tensor
) -> Figure:
    """Attention of one head on a few tokens, number by number: score, mask, softmax, values, output.

    scores, mask (True where a query may look) and weights `[n, n]`, values and out `[n, d]`. Made for up to
    four tokens and two dimensions. Raises ConfigError where shapes do not fit the tokens.
    """
    panels = (scores, scores, weights, values, out)
    if any(len(panel) != len(tokens) for panel in (*panels, mask)):
        raise ConfigError(f"A strip of {len(tokens)} tokens needs {len(tokens)} rows in every tensor.")
    label = (style.text_width("\n".join(tokens)) + 8) / 72
    columns = sum(panel.shape[1] for panel in panels)
    cell = min(CELL, (style.WIDTH - 2 * style.MARGIN - label - 4 * GAP - 0.15) / columns)
    figure = style.new_figure(0.85 + len(tokens) * cell + 0.35)
    style.add_title(figure, "A token scores all it may see, and takes a share of each value")
    left = style.MARGIN + label
    for step, (panel, words) in enumerate(zip(panels, _steps(), strict=True)):
        width = cell * panel.shape[1]
        axes = style.add_axes(figure, left=left, top=0.85, width=width, height=cell * len(tokens))
        hidden = ~mask if step in (1, 2) else mask.new_zeros(panel.shape)
        _write_cells(axes, panel, hidden, word="0" if panel is weights else "−∞", shaded=panel is weights)
        _name_panel(axes, f"{ARROWS[step]} {words}".strip(), tokens if step < 3 else ())
        if step == 0:
            axes.set_yticks(range(len(tokens)), tokens)
        left += width + GAP
    return figure


def _steps() -> tuple[str, ...]:
    return "1 score\nq·k / √d", "2 mask\nno future", "3 softmax\nrows sum to 1", "values\nv", "output\na row each"


def _write_cells(axes: Axes, panel: Tensor, hidden: Tensor, *, word: str, shaded: bool) -> None:
    """A number in each cell; shaded by it if it is a weight; hatched, with a word, where the mask hides it."""
    rows, columns = panel.shape
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    for row, column in product(range(rows), range(columns)):
        value = float(panel[row, column])
        look: Any = {"facecolor": MAP(value) if shaded else "white", "edgecolor": EDGE, "linewidth": 0.8}
        dark = shaded and value < 0.5 and not hidden[row, column]
        text = word if hidden[row, column] else f"{value:.2f}" if shaded else _short(value)
        look = HIDDEN if hidden[row, column] else look
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, clip_on=False, **look))
        ink = "white" if dark else style.INK
        axes.text(column, row, text, ha="center", va="center_baseline", size=style.SMALL, color=ink)


def _short(value: float) -> str:
    """A number with at most one digit after the point, and no minus before a zero."""
    return f"{round(value, 1) + 0.0:.1f}".removesuffix(".0").replace("-", "−")


def _name_panel(axes: Axes, words: str, keys: Sequence[str]) -> None:
    axes.set_title(words, size=style.NORMAL, weight="normal", pad=6, loc="left")
    style.bare(axes)
    if keys:
        axes.set_xticks(range(len(keys)), keys)
    axes.tick_params(length=0, labelsize=style.SMALL)


@style.SHEET
def head_grid(maps: Tensor, scores: Tensor, what: str) -> Figure:
    """Every head of a model on one text: maps `[layers, heads, n, n]`, and a score `[layers, heads]` of each.

    what: what the score measures; the head that has most of it is framed and named in the title.
    """
    layers, heads = scores.shape
    best = divmod(int(scores.argmax()), heads)
    left, top, gap = style.MARGIN + 0.5, 0.85, 0.1
    size = (style.WIDTH - left - style.MARGIN - gap * (layers - 1)) / layers
    figure = style.new_figure(top + heads * (size + 0.22) + 0.35)
    title = f"Of {layers * heads} heads one stands out: layer {best[0]}, head {best[1]}, {what} {scores.max():.2f}"
    style.add_title(figure, title)
    for layer, head in product(range(layers), range(heads)):
        x, y = left + layer * (size + gap), top + head * (size + 0.22)
        axes = style.add_axes(figure, left=x, top=y, width=size, height=size)
        _draw_map(axes, maps[layer, head])
        axes.set(xticks=[], yticks=[])
        chosen = (layer, head) == best
        _frame(axes, chosen)
        weight = "bold" if chosen else "normal"
        axes.set_xlabel(f"{scores[layer, head]:.2f}", size=style.SMALL, labelpad=2, weight=weight)
        if head == 0:
            axes.set_title(f"layer {layer}", size=style.NORMAL, weight="normal", loc="center", pad=4)
        if layer == 0:
            axes.set_ylabel(f"head {head}", size=style.NORMAL, labelpad=6)
    note = f"Rows look at columns; bright is much. Below each head: its {what}."
    figure.text(style.MARGIN / style.WIDTH, 0.1 / figure.get_figheight(), note, size=style.SMALL, color=style.QUIET)
    return figure


def _draw_map(axes: Axes, weights: Tensor) -> None:
    """Weights `[n, n]` as colours; what lies in the future is left out."""
    future = torch.ones_like(weights, dtype=torch.bool).triu(1)
    axes.imshow(weights.masked_fill(future, torch.nan), cmap=MAP, norm=SQRT, aspect="auto", interpolation="nearest")


def _frame(axes: Axes, chosen: bool) -> None:
    for spine in axes.spines.values():
        spine.set(visible=True, color=style.INK if chosen else EDGE, linewidth=2.6 if chosen else 0.8)


@style.SHEET
def head_map(weights: Tensor, tokens: Sequence[str], name: str) -> Figure:
    """One head on one text `[n, n]`, and what the last token looks at most. Up to about 36 tokens.

    Outlined are the places after an earlier occurrence of the token that looks: a head that copies is bright there.
    """
    labels = [style.token_label(token) for token in tokens]
    label = (style.text_width("\n".join(labels)) + 8) / 72
    left, top, size = style.MARGIN + label + 0.2, 0.55, max(ROW * len(labels), NAMED)
    figure = style.new_figure(top + max(size, 2.2) + label + 0.35)
    style.add_title(figure, _name_favourite(weights, tokens, labels, name))
    axes = style.add_axes(figure, left=left, top=top, width=size, height=size)
    _draw_map(axes, weights)
    for row, column in _followers(tokens):
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="white", linewidth=0.9))
    style.bare(axes, keep="left bottom")
    axes.set_xticks(range(len(labels)), labels, rotation=90)
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(length=0)
    axes.set_ylabel("this token …", loc="top")
    axes.set_xlabel("… looks at", loc="right")
    _list_keys(figure, weights[-1], labels, left=min(left + size + 0.3, style.WIDTH - style.MARGIN - LIST))
    return figure


def _name_favourite(weights: Tensor, tokens: Sequence[str], labels: Sequence[str], name: str) -> str:
    """What the last token looks at most, and whether that is what a copying head looks for."""
    last, best = len(tokens) - 1, int(weights[-1].argmax())
    copies = (last, best) in _followers(tokens)
    what = "looks at what followed it last time:" if copies else "looks at"
    return f"{name}: “{labels[-1]}” {what} “{labels[best]}”"


def _followers(tokens: Sequence[str]) -> list[tuple[int, int]]:
    """(row, column): column stands after an earlier occurrence of row's token."""
    return [(row, key + 1) for row in range(len(tokens)) for key in range(row) if tokens[key] == tokens[row]]


def _list_keys(figure: Figure, row: Tensor, labels: Sequence[str], *, left: float) -> None:
    """The keys that one token looks at most, as bars."""
    weights, keys = (x.tolist() for x in row.topk(min(BESTS, len(row))))
    names = [f"{labels[key]}  ({key})" for key in keys]
    room = (style.text_width("\n".join(names)) + 10) / 72
    axes = style.add_axes(figure, left=left + room, top=0.95, width=LIST - room, height=0.22 * len(keys))
    axes.barh(range(len(keys)), weights, 0.7, color=style.DECODE)
    axes.set(xlim=(0, 1), ylim=(len(keys) - 0.5, -0.5))
    style.bare(axes, keep="left bottom")
    axes.set_yticks(range(len(keys)), names)
    axes.set_xticks([0, 1])
    axes.tick_params(axis="y", length=0)
    axes.set_title("the last token's\nweights (position)", size=style.NORMAL, weight="normal", pad=4)
    note = "white frames: after an\nearlier token like this one"
    axes.text(1, len(keys) + 1.6, note, ha="right", va="top", size=style.SMALL, color=style.QUIET)
