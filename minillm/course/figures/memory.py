"""What blocks cost and what they buy: empty places against block size, and how many requests a cache holds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minillm.course.figures import style
from minillm.course.lessons.paging import Paging
from minillm.errors import ConfigError
from minillm.measure.units import number

LEFT, PANEL, GAP = 0.95, 3.05, 0.95  # inches: room for labels, width of a panel, room for its neighbour's labels


@style.SHEET
def paging_figure(rows: Sequence[Paging]) -> Figure:
    """Waste per request and requests that fit, against block size: points counted, lines predicted.

    The largest block stands for a cache without blocks: it sets aside the same for everybody. Raises ConfigError for
    fewer than two block sizes.
    """
    if len(rows) < 2:
        raise ConfigError(f"{len(rows)} block sizes make no curve. Measure at least two.")
    rows = sorted(rows, key=lambda row: row.block_size)
    figure = style.new_figure(3.75)
    style.add_title(figure, _title(rows))
    waste, fit = (
        style.add_axes(figure, left=LEFT + place * (PANEL + GAP), top=0.85, width=PANEL, height=2.25)
        for place in range(2)
    )
    _draw(waste, rows, [row.waste for row in rows], [row.waste_predicted for row in rows])
    waste.set_title("Empty places per request", size=style.NORMAL)
    waste.set(ylabel="tokens")
    _label_shares(waste, rows)
    _draw(fit, rows, [row.num_fit for row in rows], [row.fit_predicted for row in rows])
    fit.set_title(f"Requests in {number(rows[0].num_places / 1000)}k places", size=style.NORMAL)
    fit.set_ylim(0, 1.25 * max(row.num_fit for row in rows))
    fit.annotate(
        f"one block each: {rows[-1].num_fit}", (rows[-1].block_size, rows[-1].num_fit), (-7, 3),
        textcoords="offset points", ha="right", size=style.SMALL,
    )  # fmt: skip
    lengths = rows[0].lengths
    note = f"{len(lengths)} lengths, {number(fmean(lengths))} tokens on average. Points: allocated. Lines: predicted"
    figure.text(
        1 - style.MARGIN / style.WIDTH, 1 - 0.42 / figure.get_figheight(), note,
        ha="right", va="top", size=style.SMALL, color=style.QUIET,
    )  # fmt: skip
    return figure


def _title(rows: Sequence[Paging]) -> str:
    """The usual block size, or the one nearest to it, against one block for everything."""
    usual, whole = min(rows, key=lambda row: abs(row.block_size - 16)), rows[-1]
    return (
        f"In blocks of {usual.block_size}, {100 * usual.waste_share:.0f} % of the memory is empty instead of "
        f"{100 * whole.waste_share:.0f} %: {number(usual.num_fit / max(1, whole.num_fit))}× the requests fit"
    )


def _draw(axes: Axes, rows: Sequence[Paging], measured: Sequence[float], predicted: Sequence[float]) -> None:
    sizes = [row.block_size for row in rows]
    axes.plot(sizes, predicted, color=style.QUIET, lw=1.2, zorder=1)
    axes.plot(sizes, measured, "o", color=style.KV_CACHE, ms=5, zorder=2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) if place % 2 == 0 or len(sizes) < 9 else "" for place, size in enumerate(sizes)])
    axes.minorticks_off()
    axes.set_xlabel("block size, tokens")


def _label_shares(axes: Axes, rows: Sequence[Paging]) -> None:
    """A logarithmic axis of places (none at all stands at the bottom), and at some points the share of what is held."""
    axes.set_yscale("symlog", linthresh=0.5, linscale=0.4)
    axes.set_ylim(-0.08, 6 * max(row.waste for row in rows))
    ticks = [tick for tick in (0, 1, 10, 100, 1000, 10_000) if tick <= 6 * max(row.waste for row in rows)]
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    for row in rows[-1::-2]:
        axes.annotate(
            f"{100 * row.waste_share:.0f} %", (row.block_size, row.waste), (-5, 6), textcoords="offset points",
            ha="right", size=style.SMALL,
        )  # fmt: skip
