"""What requests share: the tree of their blocks with reference counts, and the time that a known beginning saves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minillm.course.figures import style
from minillm.course.figures.blocks import owner_color
from minillm.errors import ConfigError
from minillm.measure.bench_prefix import PrefixRow
from minillm.measure.snapshot import ROOT, PoolSnapshot

ROW, CAPTION, BOX = 0.5, 0.42, 0.36  # inches: a leaf's row, a tree's caption, and the height of a block
WIDEST, NAMES, AIR = 1.75, 0.7, 0.22  # inches: a column, room for names on the right, the air between columns
Decode = Callable[[Sequence[int]], str]


@dataclass
class Tree:
    """Blocks after blocks: the children of each, and where it stands (column, row)."""

    children: dict[int, list[int]] = field(default_factory=dict)
    place: dict[int, tuple[int, float]] = field(default_factory=dict)
    num_leaves: int = 0

    @classmethod
    def of(cls, snapshot: PoolSnapshot) -> Tree:
        """The tables' paths, and what the prefix cache remembers beside them."""
        parents = {block: parent for block, (parent, _) in snapshot.known.items()}
        for blocks in snapshot.tables.values():
            parents |= {block: before for before, block in pairwise([ROOT, *blocks])}
        tree = cls()
        for block, parent in sorted(parents.items()):
            tree.children.setdefault(parent, []).append(block)
        for block in tree.children.get(ROOT, []):
            tree._lay_out(block, 0)
        return tree

    def _lay_out(self, block: int, column: int) -> float:
        """A leaf takes the next row; what has children stands in the row of its first."""
        children = self.children.get(block, [])
        rows = [self._lay_out(child, column + 1) for child in children]
        if not children:
            self.num_leaves += 1
        self.place[block] = column, rows[0] if rows else self.num_leaves - 1
        return self.place[block][1]

    @property
    def num_columns(self) -> int:
        return 1 + max((column for column, _ in self.place.values()), default=0)


@style.SHEET
def prefix_trees(snapshots: Sequence[PoolSnapshot], captions: Sequence[str], decode: Decode) -> Figure:
    """The tree of blocks at several moments, from top to bottom, with what happened written above each.

    Each box is a block: its text and how many tables hold it. Dots: several hold it; dots on a pale frame: nobody
    does, and the prefix cache remembers it. A bold frame: it was not there in the tree above. Names stand where a
    request's table ends. decode: token ids as text. Raises ConfigError unless there is one caption per snapshot, and
    for a pool without a block to draw.
    """
    trees = [Tree.of(snapshot) for snapshot in snapshots]
    if not trees or len(captions) != len(trees) or not all(tree.place for tree in trees):
        raise ConfigError(
            f"{len(snapshots)} snapshots with {len(captions)} captions: give one caption for each, and snapshots in "
            "which somebody holds a block or the prefix cache knows one."
        )
    heights = [CAPTION + ROW * tree.num_leaves for tree in trees]
    figure = style.new_figure(0.5 + sum(heights) + 0.35)
    style.add_title(figure, _title(snapshots))
    columns, top, before = max(tree.num_columns for tree in trees), 0.5, None
    for tree, snapshot, caption, height in zip(trees, snapshots, captions, heights, strict=True):
        axes = style.add_row(figure, top=top + CAPTION, height=height - CAPTION)
        axes.set(xlim=(0, style.WIDTH - 2 * style.MARGIN), ylim=(height - CAPTION, 0))
        axes.set_title(caption, size=style.NORMAL, weight="normal", pad=4)
        style.bare(axes)
        _draw_tree(
            axes, tree, snapshot, min(WIDEST, (style.WIDTH - 2 * style.MARGIN - NAMES) / columns), decode, before
        )
        top, before = top + height, snapshot
    figure.text(0.5, 0.12 / figure.get_figheight(), _key(snapshots), ha="center", size=style.SMALL, color=style.QUIET)
    return figure


def _title(snapshots: Sequence[PoolSnapshot]) -> str:
    """Of the moment with the most sharing: blocks that are there, and what they would be without it."""
    entries, held = max(
        ((sum(map(len, one.tables.values())), one.num_held) for one in snapshots), key=lambda pair: pair[0] - pair[1]
    )
    if entries == held:
        return "Each block is held by one table" if held else "Nobody holds a block; the text is remembered"
    return f"What several tables begin with is kept once: {held} blocks do the work of {entries}"


def _key(snapshots: Sequence[PoolSnapshot]) -> str:
    """What the signs mean, of those that are there."""
    signs = {
        "7: ×1   block 7, held by one": True,
        "dots: held by several": any(max(one.ref_counts) > 1 for one in snapshots),
        "pale frame, ×0: held by nobody, remembered": any(
            not one.ref_counts[b] for one in snapshots for b in one.known
        ),
        "bold: new": len(snapshots) > 1,
    }
    return "     ".join(words for words, there in signs.items() if there)


def _draw_tree(
    axes: Axes, tree: Tree, snapshot: PoolSnapshot, width: float, decode: Decode, before: PoolSnapshot | None
) -> None:
    """Boxes, the lines between them, and the names of requests where their tables end."""
    texts = {block: decode(tokens) for block, tokens in _tokens(snapshot).items()}
    for block, (column, row) in tree.place.items():
        left, middle = column * width, ROW * row + ROW / 2
        new = before is not None and before.ref_counts[block] == 0 and block not in before.known
        _draw_box(axes, (left, middle - BOX / 2, width - AIR), snapshot, block, texts.get(block, ""), new=new)
        for child in tree.children.get(block, []):
            below = ROW * tree.place[child][1] + ROW / 2
            bend = left + width - AIR / 2
            axes.plot(
                [left + width - AIR, bend, bend, left + width],
                [middle, middle, below, below],
                color=style.QUIET,
                lw=0.8,
            )
        names = [name for name, blocks in snapshot.tables.items() if blocks and blocks[-1] == block]
        if names and not tree.children.get(block):
            axes.text(left + width - AIR + 0.08, middle, ", ".join(names), weight="bold", va="center")


def _tokens(snapshot: PoolSnapshot) -> dict[int, Sequence[int]]:
    """What stands in each block, from the prefix cache's names and the requests' own tokens."""
    found: dict[int, Sequence[int]] = {block: tokens for block, (_, tokens) in snapshot.known.items()}
    for name, blocks in snapshot.tables.items():
        for logical, block in enumerate(blocks):
            start = logical * snapshot.block_size
            found.setdefault(block, snapshot.tokens[name][start : start + snapshot.block_size])
    return found


def _draw_box(
    axes: Axes, box: tuple[float, float, float], snapshot: PoolSnapshot, block: int, text: str, *, new: bool
) -> None:
    """A block with the beginning of its text; below it, its number and its reference count."""
    left, top, width = box
    count = snapshot.ref_counts[block]
    frame = style.INK if new else style.QUIET if count else style.SHARED
    if count == 1:
        (name, _), *_ = snapshot.places(block)
        axes.add_patch(Rectangle((left, top), width, BOX, color=owner_color(name), alpha=0.75, lw=0))
    else:
        look: dict[str, Any] = {"facecolor": "white", "edgecolor": style.SHARED, "lw": 0}
        axes.add_patch(Rectangle((left, top), width, BOX, hatch=style.SHARED_HATCH, **look))
    axes.add_patch(Rectangle((left, top), width, BOX, facecolor="none", edgecolor=frame, lw=1.8 if new else 0.8))
    words = f"{_cut(text, 72 * width - 8)}\n{block}: ×{count}"
    back = {"facecolor": "white", "edgecolor": "none", "pad": 0.5} if count != 1 else None
    axes.text(
        left + width / 2, top + BOX / 2, words, size=style.SMALL, ha="center", va="center", linespacing=1.1, bbox=back
    )


def _cut(text: str, points: float) -> str:
    """As much of a text's beginning as fits, on one line."""
    shown = " ".join(text.split())
    while shown and style.text_width(shown + "…") > points:
        shown = shown[:-1]
    return shown if shown == " ".join(text.split()) else shown + "…"


@style.SHEET
def hit_figure(rows: Sequence[PrefixRow]) -> Figure:
    """TTFT against the share of the prompt that the cache knew: points with quartiles, and what is left as a line.

    The first row without a hit is what the others are compared with, round by round. Raises ConfigError without one.
    """
    cold = next((row for row in rows if row.num_cached == 0), None)
    if cold is None:
        raise ConfigError("Nothing to compare with: measure the share 0.0, too.")
    figure = style.new_figure(3.6)
    best = max(rows, key=lambda row: row.num_cached)
    style.add_title(
        figure, f"What is known is not computed again: TTFT falls to {_percent(best, cold)} of a cold prompt's"
    )
    axes = style.add_row(figure, top=0.55, height=2.45, left=0.6)
    axes.plot([0, 100], [100, 0], color=style.QUIET, lw=1.2, zorder=1)
    axes.annotate(
        "(N − hit) / N", (50, 50), (-8, -4), textcoords="offset points", ha="right", va="top", color=style.QUIET
    )
    for row in rows:
        low, middle, high = (100 * share for share in row.share_of_time(cold))
        at = 100 * row.num_cached / row.num_prompt
        axes.errorbar(at, middle, [[middle - low], [high - middle]], fmt="o", color=style.PREFILL, ms=5, zorder=2)
        label = f"{1e3 * row.timing.median:.3g} ms"
        axes.annotate(label, (at, middle), (6, 5), textcoords="offset points", size=style.SMALL)
    axes.set(xlim=(-3, 110), ylim=(0, 125), xlabel=f"found in the cache, % of {rows[0].num_prompt:,} prompt tokens")
    axes.set_ylabel("TTFT, % of a cold prompt's")
    return figure


def _percent(row: PrefixRow, cold: PrefixRow) -> str:
    return f"{100 * row.share_of_time(cold).median:.0f} %"
