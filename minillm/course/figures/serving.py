"""Many requests at once: what the arrival of one does to the others.

The picture for ITL and chunked prefill: each mark is a token that somebody got, and a stall is where no marks are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minillm.course.figures import style
from minillm.errors import ConfigError

TOLERABLE = 3  # times the usual gap: what the best lane keeps to
LEFT = 0.75  # inches for the labels of a y axis
LANE, GAP = 0.62, 0.34  # inches: height of a lane, and the air above it for its words


class Arrival(Protocol):
    """One prompt that arrived among running requests; times in seconds since it came."""

    @property
    def ttft(self) -> float: ...
    @property
    def others(self) -> Sequence[Sequence[float]]: ...
    @property
    def worst_itl(self) -> float: ...


class Choice(Protocol):
    """One way to schedule and its arrivals; `spread` gives (low, median, high) in seconds, of "ratio" without unit."""

    @property
    def policy(self) -> str: ...
    @property
    def budget(self) -> int: ...
    @property
    def arrivals(self) -> Sequence[Arrival]: ...
    def spread(self, name: str) -> tuple[float, float, float]: ...


@style.SHEET
def stall_figure(choices: Sequence[Choice], prompt: int, bounds: Sequence[tuple[float, float]] = ()) -> Figure:
    """Who waits while a prompt of `prompt` tokens is computed: tokens over time, and the trade of every choice.

    The lanes show the first arrival under up to three choices: the prompt goes first, one in the middle, and the
    largest budget that keeps everybody's gaps below three times the usual one. bounds: for each choice, the TTFT and
    the longest gap in seconds that the machine allows at best; drawn as a line. Raises ConfigError without arrivals.
    """
    if not choices or not all(choice.arrivals for choice in choices):
        raise ConfigError("There is no arrival to draw. Measure with repeats >= 1.")
    lanes = _lanes(choices)
    top = 0.42 + len(lanes) * (GAP + LANE)
    figure = style.new_figure(top + 3.4)
    style.add_title(figure, _title(choices, prompt))
    end = 1.02 * max(times[-1] for lane in lanes for times in lane.arrivals[0].others)
    start = min(times[0] for lane in lanes for times in lane.arrivals[0].others)
    for number, lane in enumerate(lanes):
        axes = style.add_row(figure, top=0.42 + GAP + number * (GAP + LANE), height=LANE)
        axes.set_xlim(start, end)
        _draw_lane(axes, lane, last=number == len(lanes) - 1)
    axes = _draw_trade(figure, choices, bounds, top=top + 0.95)
    _draw_usual_gap(axes, choices)
    _label_points(axes, choices)
    return figure


def _title(choices: Sequence[Choice], prompt: int) -> str:
    running = len(choices[0].arrivals[0].others)
    who = f"A prompt of {prompt:,} tokens arrives: {running} others stall"
    return f"{who}, unless it comes in chunks" if _ratio(_best(choices)) <= TOLERABLE else f"{who}, less if it is cut"


def _ratio(choice: Choice) -> float:
    """How many times as long as usual the longest gap was, in the median arrival."""
    return choice.spread("ratio")[1]


def _best(choices: Sequence[Choice]) -> Choice:
    """The largest budget that keeps all gaps tolerable; if there is none, what comes nearest to it."""
    good = [choice for choice in choices if _ratio(choice) <= TOLERABLE] or [min(choices, key=_ratio)]
    return max(good, key=lambda choice: choice.budget)


def _lanes(choices: Sequence[Choice]) -> list[Choice]:
    """A choice that lets the prompt go first (or else the worst one), the best one, and one in the middle."""
    best, ordered = _best(choices), sorted(choices, key=_ratio, reverse=True)
    worst = next((choice for choice in ordered if choice.policy != "mixed"), ordered[0])
    between = [choice for choice in ordered if _ratio(best) < _ratio(choice) < _ratio(worst)]
    lanes = [worst, *between[len(between) // 2 :][:1], best]
    return lanes[:1] if worst is best else lanes


def _draw_lane(axes: Axes, choice: Choice, *, last: bool) -> None:
    """A row of marks for each running request, the newcomer's prefill below them, and the longest gap in words."""
    arrival = choice.arrivals[0]
    rows = len(arrival.others)
    axes.set_ylim(-2.4, rows)
    for row, times in enumerate(arrival.others):
        axes.vlines(times, row + 0.1, row + 0.9, color=style.DECODE, linewidth=1.0)
    axes.barh(-1.2, arrival.ttft, 1.6, left=0, color=style.PREFILL)
    axes.axvline(0, color=style.QUIET, linewidth=0.8)
    words = f"{choice.policy}, {choice.budget} tokens a step: longest gap {_time(arrival.worst_itl)}"
    axes.set_title(
        f"{words}, newcomer's first token after {_time(arrival.ttft)}", size=style.NORMAL, weight="normal", pad=3
    )
    style.bare(axes, keep="bottom" if last else "")
    if last:
        axes.xaxis.set_major_formatter("{x:g} s")
        axes.set_xlabel(
            "since the prompt arrived. Blue: its prefill. Amber: a token of a running request, one row each"
        )


def _draw_trade(
    figure: Figure, choices: Sequence[Choice], bounds: Sequence[tuple[float, float]], *, top: float
) -> Axes:
    """The newcomer's TTFT against the others' longest gap: points with quartiles, bounds of `mixed` as a line."""
    axes = style.add_row(figure, top=top, height=figure.get_figheight() - top - 0.5, left=LEFT - style.MARGIN)
    axes.set(xscale="log", yscale="log", xlabel="newcomer's TTFT, s", ylabel="others' longest gap, ms")
    for choice in choices:
        low, ttft, high = choice.spread("ttft")
        small, worst, large = (1e3 * value for value in choice.spread("worst_itl"))
        mixed = choice.policy == "mixed"
        spreads: Any = {"xerr": [[ttft - low], [high - ttft]], "yerr": [[worst - small], [large - worst]]}
        axes.errorbar(
            ttft, worst, fmt="o" if mixed else "D", color=style.INK, mfc=style.INK if mixed else "white", **spreads
        )
    pairs = zip(choices, bounds, strict=False)
    curve = sorted((ttft, 1e3 * gap) for choice, (ttft, gap) in pairs if choice.policy == "mixed")
    axes.plot(*zip(*curve, strict=True), color=style.QUIET, linewidth=1.0, zorder=0)
    line = ". Line: no faster on this machine" if curve else ""
    axes.set_title(f"The budget trades one against the other{line}", loc="left", size=style.NORMAL)
    return axes


def _draw_usual_gap(axes: Axes, choices: Sequence[Choice]) -> None:
    """Make room, then draw the gap that everybody is used to, and what is tolerable, as lines."""
    usual = 1e3 * sorted(choice.spread("quiet_itl")[1] for choice in choices)[len(choices) // 2]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    axes.set_xlim(left / 1.3, right * 1.3)
    axes.set_ylim(min(low, 0.75 * usual), max(high, TOLERABLE * usual) * 1.6)
    for axis in (axes.xaxis, axes.yaxis):
        style.plain_log(axis)
    for factor, words, line in ((1, "usual gap", "-"), (TOLERABLE, f"{TOLERABLE}×", "--")):
        axes.axhline(factor * usual, color=style.DECODE_INK, linewidth=0.8, linestyle=line, zorder=0)
        place, look = (right * 1.3, factor * usual), {"color": style.DECODE_INK, "size": style.SMALL}
        axes.annotate(words, place, (-2, 2), textcoords="offset points", ha="right", **look)  # type: ignore[arg-type]


def _label_points(axes: Axes, choices: Sequence[Choice]) -> None:
    """The budget beside each point, right or left of it: where it stays inside and meets no label before it."""
    inches = 72 / axes.get_figure(root=True).dpi  # type: ignore[union-attr]
    frame = axes.get_window_extent()
    inside = inches * frame.x0, inches * frame.x1 - style.text_width("usual gap")
    taken: list[tuple[float, float, float]] = []  # left, right, height, in points
    for choice in choices:
        text = str(choice.budget) if choice.policy == "mixed" else f"{choice.policy}, {choice.budget}"
        point = choice.spread("ttft")[1], 1e3 * choice.spread("worst_itl")[1]
        x, y = inches * axes.transData.transform(point)
        width = style.text_width(text) + 10
        for align, left in (("left", x), ("right", x - width)):
            free = all(left > end or left + width < start or abs(y - at) > 11 for start, end, at in taken)
            if free and inside[0] <= left and left + width <= inside[1]:
                offset = (6 if align == "left" else -6, 4)
                axes.annotate(text, point, offset, textcoords="offset points", ha=align, size=style.SMALL)
                taken.append((left, left + width, y))
                break


def _time(seconds: float) -> str:
    """With no more digits than it deserves: 48 ms, 1.7 s."""
    return f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
