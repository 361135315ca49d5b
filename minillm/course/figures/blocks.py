"""Where the KV of each request lies: its blocks in logical order and in the pool, and the pool over time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from minillm.course.figures import style
from minillm.errors import ConfigError
from minillm.measure.snapshot import PoolSnapshot

INSET = 0.06  # air between two cells, in cells
CAPTION, COUNT = 1.75, 1.0  # inches left of a strip for what happened, right of it for what it came to
FRAME = 0.46  # inches: height of a frame of the strip, with the air below it
Box = tuple[float, float, float, float]  # left, bottom, width, height


def owner_color(name: str) -> str:
    """The tint of a request's blocks: the same in every figure. Its name stands beside it."""
    return style.OWNERS[sum(map(ord, name)) % len(style.OWNERS)]


@style.SHEET
def block_map(snapshot: PoolSnapshot) -> Figure:
    """Every table's blocks in logical order, and a line from each to its place in the pool.

    A cell is coloured as far as it holds tokens. What several tables hold is dotted and says how many they are; a
    dotted frame without a number is free, but its tokens are remembered. Raises ConfigError without tables.
    """
    if not snapshot.tables:
        raise ConfigError("Nobody holds a block now, so there is no table to draw. Take the snapshot a step earlier.")
    figure = style.new_figure(3.0)
    style.add_title(figure, "Neighbours in the text, scattered in memory: a table of numbers holds them together")
    axes = style.add_row(figure, top=0.62, height=2.1)
    size = len(snapshot.ref_counts) - 1
    places = _logical_places(snapshot)
    width = max(size, max(place for place, _, _ in places) + 1)
    axes.set(xlim=(0, width), ylim=(-0.75, 4.35))
    style.bare(axes)
    for place, name, logical in places:
        physical = snapshot.tables[name][logical]
        _connect(axes, (place + 0.5, 3), (physical - 0.5, 1), owner_color(name))
        _draw_owned(axes, (place, 3, 1, 1), snapshot, name, logical, str(physical))
    for name in snapshot.tables:
        first = min(place for place, owner, _ in places if owner == name)
        axes.text(first + INSET, 4.12, _describe(snapshot, name), weight="bold", size=style.SMALL, va="bottom")
    for block in range(1, size + 1):
        draw_block(axes, (block - 1, 0, 1, 1), snapshot, block)
        _write(axes, (block - 1, -0.4, 1, 0.3), str(block), color=style.QUIET)
    axes.text(0, -0.85, _summary(snapshot), size=style.SMALL, color=style.QUIET, va="top", clip_on=False)
    return figure


def _logical_places(snapshot: PoolSnapshot) -> list[tuple[int, str, int]]:
    """(column, request, logical number) of every table entry: the tables side by side, a free column between them."""
    places, column = [], 0
    for name, blocks in snapshot.tables.items():
        places += [(column + logical, name, logical) for logical in range(len(blocks))]
        column += len(blocks) + 1
    free = len(snapshot.ref_counts) - column
    return [(place + max(0, free // 2), name, logical) for place, name, logical in places]


def _describe(snapshot: PoolSnapshot, name: str) -> str:
    """A request and its length, as far as there is room above its blocks."""
    return f"{name}: {len(snapshot.tokens[name])} tokens" if len(snapshot.tables[name]) > 2 else name


def _summary(snapshot: PoolSnapshot) -> str:
    held, size = snapshot.num_held, len(snapshot.ref_counts) - 1
    places = held * snapshot.block_size
    return (
        f"{held} of {size} blocks of {snapshot.block_size} tokens are held, {places} places. "
        f"Empty: {snapshot.waste}, all in last blocks"
    )


def _connect(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    """A curve that leaves and arrives upright."""
    middle = (start[1] + end[1]) / 2
    path = Path([start, (start[0], middle), (end[0], middle), end], [Path.MOVETO, *[Path.CURVE4] * 3])
    axes.add_patch(PathPatch(path, facecolor="none", edgecolor=color, linewidth=1.3, zorder=0))


def draw_block(axes: Axes, box: Box, snapshot: PoolSnapshot, block: int, *, new: bool = False) -> None:
    """A block of the pool: free, remembered, of one request, or shared. `new`: with a bold frame."""
    places = list(snapshot.places(block))
    if len(places) == 1:
        ((name, logical),) = places
        _draw_owned(axes, box, snapshot, name, logical, f"{name}{logical}", new=new)
        return
    remembered = block in snapshot.known or places
    look: dict[str, Any] = {"hatch": style.SHARED_HATCH, "facecolor": "white"} if remembered else {"facecolor": "white"}
    _rectangle(axes, box, edgecolor=style.SHARED if remembered else "#d8dce1", **look)
    if places:
        _write(axes, box, f"×{snapshot.ref_counts[block]}", weight="bold", backed=True)
    if new:
        _rectangle(axes, box, facecolor="none", edgecolor=style.INK, linewidth=1.6)


def _draw_owned(
    axes: Axes, box: Box, snapshot: PoolSnapshot, name: str, logical: int, text: str, *, new: bool = False
) -> None:
    """A request's block, coloured as far as it holds tokens; sand with dots where others hold it too."""
    shared = snapshot.ref_counts[snapshot.tables[name][logical]] > 1
    share = snapshot.filled(name, logical) / snapshot.block_size
    left, bottom, width, height = box
    look: dict[str, Any] = (
        {"facecolor": "white", "edgecolor": style.SHARED, "hatch": style.SHARED_HATCH, "linewidth": 0}
        if shared
        else {"color": owner_color(name)}
    )
    inner = width * (1 - 2 * INSET) * share
    axes.add_patch(Rectangle((left + width * INSET, bottom), inner, height, **look))
    _rectangle(axes, box, facecolor="none", edgecolor=style.INK if new else style.QUIET, linewidth=1.6 if new else 0.8)
    _write(axes, box, text, backed=shared)


def _rectangle(axes: Axes, box: Box, **look: Any) -> None:
    left, bottom, width, height = box
    axes.add_patch(Rectangle((left + width * INSET, bottom), width * (1 - 2 * INSET), height, **look))


def _write(axes: Axes, box: Box, text: str, *, color: str = style.INK, backed: bool = False, **look: Any) -> None:
    """A text in the middle of a box, unless it would stick out of it; `backed`: on white, to be read on dots."""
    left, bottom, width, height = box
    if style.text_width(text) > style.points_per_unit(axes) * width * (1 - 2 * INSET):
        return
    if backed:
        look["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    look |= {"color": color, "size": style.SMALL, "ha": "center", "va": "center"}
    axes.text(left + width / 2, bottom + height / 2, text, **look)


@style.SHEET
def pool_strip(snapshots: Sequence[PoolSnapshot], captions: Sequence[str]) -> Figure:
    """The pool at several moments, one row each from top to bottom, with what happened written beside it.

    A letter and a number are a request and its logical block. A bold frame: another holder than in the row above.
    Raises ConfigError for no snapshots, pools of different size, or another number of captions.
    """
    if not snapshots or len({len(one.ref_counts) for one in snapshots}) > 1 or len(captions) != len(snapshots):
        raise ConfigError(
            f"{len(snapshots)} snapshots with {len(captions)} captions: give one caption for each, and at least one "
            "snapshot, all of the same pool."
        )
    rows = len(snapshots)
    figure = style.new_figure(1.12 + rows * FRAME)
    style.add_title(figure, _strip_title(snapshots))
    axes = style.add_row(figure, top=0.62, height=rows * FRAME)
    size = len(snapshots[0].ref_counts) - 1
    unit = (style.WIDTH - 2 * style.MARGIN - CAPTION - COUNT) / size  # inches per cell
    axes.set(xlim=(-CAPTION / unit, size + COUNT / unit), ylim=(rows - 0.15, -0.15))
    style.bare(axes)
    for row, (before, snapshot, caption) in enumerate(zip([None, *snapshots], snapshots, captions, strict=False)):
        for block in range(1, size + 1):
            draw_block(axes, (block - 1, row, 1, 0.7), snapshot, block, new=_is_new(before, snapshot, block))
        axes.text(-0.35, row + 0.35, caption, ha="right", va="center", size=style.SMALL)
        axes.text(size + 0.35, row + 0.35, _count(snapshot), va="center", size=style.SMALL, color=style.QUIET)
    key = _strip_key(snapshots)
    figure.text(0.5, 0.14 / figure.get_figheight(), key, ha="center", size=style.SMALL, color=style.QUIET)
    return figure


def _strip_key(snapshots: Sequence[PoolSnapshot]) -> str:
    """What the signs mean, of those that are there."""
    signs = {
        "C2: the third block of C": True,
        "bold: new since the row above": len(snapshots) > 1,
        "×2: two hold it": any(max(one.ref_counts) > 1 for one in snapshots),
        "dots: remembered": any(one.known for one in snapshots),
    }
    return "     ".join(words for words, there in signs.items() if there)


def _strip_title(snapshots: Sequence[PoolSnapshot]) -> str:
    """Whether anybody's block was ever replaced, whatever was recorded."""
    stayed = all(
        later.tables[name][: len(blocks)] == blocks
        for earlier, later in pairwise(snapshots)
        for name, blocks in earlier.tables.items()
        if name in later.tables
    )
    return f"Requests come and go, and take any block that is free: {'none ever moves' if stayed else 'some move'}"


def _is_new(before: PoolSnapshot | None, now: PoolSnapshot, block: int) -> bool:
    """Whether somebody holds the block who did not in the row above."""
    return before is not None and not set(now.places(block)) <= set(before.places(block))


def _count(snapshot: PoolSnapshot) -> str:
    places = "place" if snapshot.waste == 1 else "places"
    return f"{snapshot.num_held} held,\n{snapshot.waste} {places} empty"
