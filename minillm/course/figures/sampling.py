"""From logits to a token: a distribution reshaped, how sure a model is along its text, and where it goes in circles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from minillm.course.figures import style
from minillm.errors import ConfigError

BAR, GAP = 0.26, 0.22  # inches: a row of bars, and between two panels
FEWEST = 2  # rounds that make a loop
SHADES = ("#ffe3b3", style.DECODE)  # rounds of a loop, in turns


@style.SHEET
def distribution_bars(
    panels: Mapping[str, Tensor], base: Tensor, names: Sequence[str], *, title: str, ticks: str, count: int = 10
) -> Figure:
    """One distribution in several shapes, side by side: the `count` likeliest tokens of `base`, bars for each panel.

    panels: what each shape is called, and its probabilities [vocab]; names: what each token says. A tick in every row
    is `base` [vocab]; ticks: what to call it. A token that lost all of its probability is marked as cut.
    """
    probs, order = (x.tolist() for x in base.topk(min(count, len(base))))
    labels = [style.token_label(names[token]) for token in order]
    left = style.MARGIN + (style.text_width("\n".join(labels)) + 10) / 72
    width = (style.WIDTH - style.MARGIN - left - GAP * (len(panels) - 1)) / len(panels)
    figure = style.new_figure(0.85 + BAR * len(order) + 0.65)
    style.add_title(figure, title)
    highest = 1.05 * max(max(probs), *(float(panel.max()) for panel in panels.values()))
    for place, (name, panel) in enumerate(panels.items()):
        axes = style.add_axes(figure, left=left + place * (width + GAP), top=0.75, width=width, height=BAR * len(order))
        axes.set(xlim=(0, highest), ylim=(len(order) - 0.4, -0.6))
        _draw_shape(axes, [float(panel[token]) for token in order], probs)
        axes.set_title(name, size=style.NORMAL, weight="normal", pad=6)
        axes.set_yticks(range(len(order)), labels if place == 0 else [])
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(3, prune="upper" if place + 1 < len(panels) else None))
        axes.set_xlabel(f"{int((panel > 0).sum()):,} can be drawn", loc="left", size=style.SMALL)
    figure.text(left / style.WIDTH, 0.1 / figure.get_figheight(), ticks, size=style.SMALL, color=style.QUIET)
    return figure


def _draw_shape(axes: Axes, shape: Sequence[float], base: Sequence[float]) -> None:
    axes.barh(range(len(shape)), shape, 0.66, color=style.DECODE)
    axes.vlines(base, [row - 0.44 for row in range(len(base))], [row + 0.44 for row in range(len(base))],
                color=style.INK, lw=1.4)  # fmt: skip
    for row, value in enumerate(shape):
        if value == 0:
            beyond = base[row] + 0.03 * axes.get_xlim()[1]
            axes.text(beyond, row, "cut", va="center", size=style.SMALL, color=style.QUIET)


@dataclass(frozen=True)
class Loop:
    """The end of a text that repeats itself: from `start` on, every token is the one `period` places before."""

    start: int  # where the first round begins
    period: int
    end: int

    @classmethod
    def find(cls, tokens: Sequence[Any]) -> Loop | None:
        """The longest loop of at least two rounds that ends the text; of equal ones that of the shortest period."""
        loops = [cls(_loops_from(tokens, period), period, len(tokens)) for period in range(1, len(tokens) // 2 + 1)]
        loops = [loop for loop in loops if loop.end - loop.start >= FEWEST * loop.period]
        return min(loops, key=lambda loop: (loop.start, loop.period), default=None)

    @property
    def rounds(self) -> list[range]:
        """The places of every round; the last one may be cut short."""
        return [range(i, min(i + self.period, self.end)) for i in range(self.start, self.end, self.period)]


def _loops_from(tokens: Sequence[Any], period: int) -> int:
    """The first place from which on every token comes again `period` places later, up to the end."""
    start = len(tokens) - period
    while start > 0 and tokens[start - 1] == tokens[start - 1 + period]:
        start -= 1
    return start


@style.SHEET
def entropy_trace(tokens: Sequence[str], entropy: Sequence[float]) -> Figure:
    """How unsure the model was before each token of its text, in bits: 0 for one choice, b for 2^b equal ones.

    Made for up to about fifty tokens. Raises ConfigError where the two do not fit each other.
    """
    _check(tokens, entropy)
    labels = [style.token_label(token) for token in tokens]
    room = (style.text_width("\n".join(labels)) + 8) / 72
    figure = style.new_figure(0.75 + 1.7 + room + 0.1)
    style.add_title(figure, _trace_title(entropy))
    axes = style.add_row(figure, top=0.75, height=1.7, left=0.35)
    _draw_entropy(axes, entropy)
    axes.set_xticks(range(len(labels)), labels, rotation=90)
    axes.tick_params(axis="x", length=0)
    return figure


def _check(tokens: Sequence[Any], entropy: Sequence[float]) -> None:
    if not tokens or len(tokens) != len(entropy):
        raise ConfigError(f"{len(tokens)} tokens and {len(entropy)} entropies: one of each is needed for every token.")


def _trace_title(entropy: Sequence[float]) -> str:
    half, most = sum(entropy) / 2, sorted(entropy, reverse=True)
    needed = next(i for i in range(1, len(most) + 1) if sum(most[:i]) >= half)
    return f"A text hangs on few choices: {needed} of {len(entropy)} tokens hold half of the uncertainty"


def _draw_entropy(axes: Axes, entropy: Sequence[float]) -> None:
    axes.set(xlim=(-0.7, len(entropy) - 0.3), ylim=(0, 1.12 * max(*entropy, 1.0)))
    axes.bar(range(len(entropy)), entropy, 0.8, color=style.DECODE)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_title("entropy before each token, bits", size=style.NORMAL, weight="normal", pad=6)


@style.SHEET
def loop_trace(tokens: Sequence[str], entropy: Sequence[float]) -> Figure:
    """A text that goes in circles: entropy before each token, below it the rounds, and what each of them says.

    Raises ConfigError for a text that does not end in a loop.
    """
    _check(tokens, entropy)
    loop = Loop.find(tokens)
    if loop is None:
        raise ConfigError("This text does not end in a loop. Write a longer one, greedily.")
    means = [sum(entropy[i] for i in one) / len(one) for one in loop.rounds if len(one) == loop.period]
    figure = style.new_figure(3.4)
    style.add_title(figure, _loop_title(loop, means))
    axes = style.add_row(figure, top=0.75, height=1.5, left=0.35)
    _draw_entropy(axes, entropy)
    axes.set_xlabel("new token", loc="right")
    lane = style.add_row(figure, top=2.7, height=0.3, left=0.35)
    lane.set(xlim=axes.get_xlim(), ylim=(0, 1))
    style.bare(lane)
    _draw_rounds(lane, loop)
    said = "".join(style.token_label(token) + " " for token in tokens[loop.start : loop.start + loop.period])
    words = f"each round says: {said.strip()}"
    while style.text_width(words) > 72 * (style.WIDTH - 2 * style.MARGIN - 0.35):
        words = words[:-2] + "…"
    figure.text((style.MARGIN + 0.35) / style.WIDTH, 0.14 / figure.get_figheight(), words, size=style.SMALL)
    return figure


def _loop_title(loop: Loop, means: Sequence[float]) -> str:
    what = f"Greedy decoding runs in a circle of {loop.period} token" + "s" * (loop.period > 1)
    surer = means[-1] < means[0]
    return f"{what}{', and gets surer' if surer else ''}: {means[0]:.1f} bits a token, then {means[-1]:.1f}"


def _draw_rounds(lane: Axes, loop: Loop) -> None:
    """A cell for each round, with its number where there is room."""
    points = style.points_per_unit(lane)
    for number, one in enumerate(loop.rounds, 1):
        look: Any = {"facecolor": SHADES[number % 2], "edgecolor": "white", "linewidth": 0.8}
        lane.add_patch(Rectangle((one.start - 0.5, 0), len(one), 1, **look))
        if len(one) * points > style.text_width(str(number)) + 4:
            middle = one.start - 0.5 + len(one) / 2
            lane.text(middle, 0.5, str(number), ha="center", va="center_baseline", size=style.SMALL)


@style.SHEET
def repetition(
    temperatures: Sequence[float], repeated: Sequence[float], surprise: Sequence[float], expected: Sequence[float]
) -> Figure:
    """What temperature trades: how much a text repeats itself (left) against how much it surprises the model (right).

    repeated: share of runs of four tokens that were said before. surprise: bits of the tokens that were drawn, under
    the model at temperature 1; expected: the same before the draw, from the distributions that were drawn from.
    """
    figure = style.new_figure(3.3)
    hot = f"hot text is noise: {surprise[-1]:.0f} bits a token instead of {surprise[0]:.0f}"
    style.add_title(figure, f"Cold text repeats itself ({repeated[0]:.0%}), {hot}")
    width = (style.WIDTH - 2 * style.MARGIN - 0.4 - 0.6) / 2
    panels: tuple[tuple[str, Sequence[float], Sequence[float]], ...] = (
        ("runs of four tokens said before, %", [100 * one for one in repeated], []),
        ("surprise, bits per token. Line: expected", surprise, expected),
    )
    for place, (words, points, line) in enumerate(panels):
        left = style.MARGIN + 0.4 + place * (width + 0.6)
        axes = style.add_axes(figure, left=left, top=0.75, width=width, height=1.95)
        axes.plot(temperatures, points, "o", color=style.DECODE_INK, ms=6)
        if line:
            axes.plot(temperatures, line, color=style.INK, lw=1.2)
        axes.set_ylim(0, 1.12 * max(*points, *line, 1e-9))
        axes.set_xlabel("temperature", loc="right")
        axes.set_title(words, size=style.NORMAL, weight="normal")
    return figure
