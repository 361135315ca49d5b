"""How far guesses carry, what that buys, where it costs, and that it changes no probability."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from minillm.course.figures import style
from minillm.errors import ConfigError
from minillm.measure.bench_spec import SpecRow
from minillm.measure.roof import expected_tokens

LOOKS = ((style.DRAFT, "o"), (style.INK, "s"), (style.PETROFF10[5], "^"), (style.QUIET, "D"))  # of sweeps
LEFT, GAP = 0.5, 0.65  # inches: for the labels of a y axis, and between two panels


@dataclass(frozen=True)
class Sweep:
    """What one guesser reached on one kind of text: a row for each number of guesses, or for each batch."""

    name: str
    rows: Sequence[SpecRow]

    @property
    def acceptance(self) -> float:
        """α of all rows together."""
        stats = [row.stats for row in self.rows]
        accepted = sum(one.num_accepted_tokens for one in stats)
        return accepted / max(1, accepted + sum(one.num_drafts - one.num_complete_drafts for one in stats))


@style.SHEET
def acceptance_lengths(sweeps: Sequence[Sweep]) -> Figure:
    """Tokens that a verification brings against guesses: points counted, lines E = (1 - α^(γ+1)) / (1 - α).

    One α serves all points of a line: where they leave it, guesses further ahead are worse than the first ones. Raises
    ConfigError without rows.
    """
    _check(sweeps)
    counts = sorted({row.num_drafts for sweep in sweeps for row in sweep.rows})
    figure = style.new_figure(3.9)
    style.add_title(figure, _lengths_title(sweeps))
    right = max(style.text_width(_with_alpha(sweep)) for sweep in sweeps) / 72 + 0.15
    width = style.WIDTH - 2 * style.MARGIN - LEFT - right
    axes = style.add_axes(figure, left=style.MARGIN + LEFT, top=0.85, width=width, height=2.45)
    highest = max(row.stats.mean_acceptance_length for sweep in sweeps for row in sweep.rows)
    axes.set(xlim=(0, counts[-1] * 1.03), ylim=(0.8, max(3.0, 1.25 * highest)), xticks=[0, *counts])
    axes.plot([0, counts[-1]], [1, 1 + counts[-1]], color=style.QUIET, lw=0.9, ls=":")
    for sweep, (color, marker) in zip(sweeps, LOOKS, strict=False):
        line = [expected_tokens(sweep.acceptance, drafts) for drafts in range(counts[-1] + 1)]
        axes.plot(range(counts[-1] + 1), line, color=color, lw=1.2)
        lengths = [row.stats.mean_acceptance_length for row in sweep.rows]
        axes.plot([row.num_drafts for row in sweep.rows], lengths, marker, color=color, ms=6)
    _name_ends(axes, sweeps, lambda row: row.stats.mean_acceptance_length, _with_alpha)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("γ: tokens guessed at once", loc="right")
    note = "tokens per verification. Points: counted. Lines: formula with one α. Dotted: if all guesses were right"
    axes.set_title(note, size=style.NORMAL, weight="normal")
    return figure


def _check(sweeps: Sequence[Sweep]) -> None:
    if not sweeps or not all(sweep.rows for sweep in sweeps) or len(sweeps) > len(LOOKS):
        raise ConfigError(f"1 to {len(LOOKS)} sweeps with rows can be drawn, not {len(sweeps)}. Measure some first.")


def _with_alpha(sweep: Sweep) -> str:
    return f"{sweep.name}\nα = {sweep.acceptance:.2f}"


def _lengths_title(sweeps: Sequence[Sweep]) -> str:
    best = max((row for sweep in sweeps for row in sweep.rows), key=lambda row: row.stats.mean_acceptance_length)
    most = max(row.num_drafts for sweep in sweeps for row in sweep.rows)
    tokens = f"{best.stats.mean_acceptance_length:.1f} tokens"
    return f"The first wrong guess voids the rest: {tokens} at best from {most} guesses and one"


def _name_ends(
    axes: Axes, sweeps: Sequence[Sweep], value: Callable[[SpecRow], float], name: Callable[[Sweep], str]
) -> None:
    """Each sweep's name right of the axes, at the height of its last point."""
    texts = [name(sweep) for sweep in sweeps]
    lines = max(text.count("\n") for text in texts) + 1
    heights = style.apart(axes, [value(sweep.rows[-1]) for sweep in sweeps], size=(style.SMALL + 3) * lines)
    for text, height, (color, _) in zip(texts, heights, LOOKS, strict=False):
        axes.text(1.02, height, text, transform=axes.transAxes, va="center", color=color, size=style.SMALL)


@style.SHEET
def speedups(by_drafts: Sequence[Sweep], by_batch: Sequence[Sweep], crossover: float | None = None) -> Figure:
    """Speed-up against guesses at one batch (left) and against batch at one number of guesses (right).

    Points: measured, with quartiles. Line: the formula E / (γc + 1), to which checking is free. Dashes: the same with
    what checking cost here. crossover: the batch from which checking is predicted to cost. Raises ConfigError without
    rows.
    """
    _check(by_drafts)
    _check(by_batch)
    figure = style.new_figure(4.15)
    style.add_title(figure, _speed_title([*by_drafts, *by_batch]))
    width = (style.WIDTH - 2 * style.MARGIN - LEFT - GAP) / 2
    top = 1.15 * max(max(row.speedup.high, row.formula) for sweep in (*by_drafts, *by_batch) for row in sweep.rows)
    for place, sweeps in enumerate((by_drafts, by_batch)):
        left = style.MARGIN + LEFT + place * (width + GAP)
        axes = style.add_axes(figure, left=left, top=1.0, width=width, height=2.45)
        axes.set_ylim(0, top)
        _draw_speedups(axes, sweeps, "num_drafts" if place == 0 else "batch")
        axes.axhline(1, color=style.INK, lw=0.9, zorder=0)
        if place and crossover is not None and axes.get_xlim()[0] < crossover < axes.get_xlim()[1]:
            axes.axvline(crossover, color=style.QUIET, lw=0.9, ls=":", zorder=0)
    first, other = by_drafts[0].rows[0].batch, by_batch[0].rows[0].num_drafts
    figure.axes[0].set_title(f"batch {first}: speed-up against γ", size=style.NORMAL, weight="normal")
    figure.axes[1].set_title(f"γ = {other}: speed-up against batch", size=style.NORMAL, weight="normal")
    _draw_keys(figure, [*by_drafts, *by_batch], crossover)
    return figure


def _speed_title(sweeps: Sequence[Sweep]) -> str:
    medians = [row.speedup.median for sweep in sweeps for row in sweep.rows]
    best, worst = max(medians), min(medians)
    where = "where it loses" if worst < 1 else "at worst"
    return f"Guessing ahead: {best:.1f} times as fast at best, {worst:.2f} times {where}"


def _draw_speedups(axes: Axes, sweeps: Sequence[Sweep], name: str) -> None:
    """Points over both formulas; x is that attribute of the rows, to the base of 2."""
    axes.set_xscale("log", base=2)
    for sweep, (color, marker) in zip(sweeps, LOOKS, strict=False):
        x = [getattr(row, name) for row in sweep.rows]
        speed = [row.speedup for row in sweep.rows]
        spread = [[one.median - one.low for one in speed], [one.high - one.median for one in speed]]
        axes.errorbar(x, [one.median for one in speed], spread, fmt=marker, color=color, ms=6, lw=1.2)
        axes.plot(x, [row.formula for row in sweep.rows], color=color, lw=1.2)
        axes.plot(x, [row.formula_as_served for row in sweep.rows], color=color, lw=1.0, ls="--")
    values = sorted({getattr(row, name) for sweep in sweeps for row in sweep.rows})
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()
    axes.set_xlim(values[0] / 1.3, values[-1] * 1.3)
    axes.set_xlabel("γ: tokens guessed at once" if name == "num_drafts" else "requests side by side", loc="right")


def _draw_keys(figure: Figure, sweeps: Sequence[Sweep], crossover: float | None) -> None:
    """Names of the sweeps above the panels, and below them what lines mean."""
    full, x = figure.get_figheight(), style.MARGIN + LEFT
    for name, (color, marker) in zip(dict.fromkeys(sweep.name for sweep in sweeps), LOOKS, strict=False):
        figure.text(x / style.WIDTH, 1 - 0.62 / full, f"{_SIGNS[marker]} {name}", color=color, va="center")
        x += style.text_width(f"{_SIGNS[marker]} {name}", style.NORMAL) / 72 + 0.35
    words = "Points: measured. Lines: E / (γc + 1). Dashes: with what checking costs. At 1: as fast as without"
    words += "" if crossover is None else f". Predicted to cost from batch {crossover:.1f}"
    look: Any = {"size": style.SMALL, "color": style.QUIET}
    figure.text((style.MARGIN + LEFT) / style.WIDTH, 0.12 / full, words, **look)


_SIGNS = {"o": "●", "s": "■", "^": "▲", "D": "◆"}


@style.SHEET
def output_distributions(target: Tensor, draft: Tensor, rules: Mapping[str, Tensor], names: Sequence[str]) -> Figure:
    """What comes out under each rule of acceptance, exactly enumerated: bars; where the target says, ticks.

    target, draft and each of `rules` [vocab]: probabilities; names: what each token says. Circles: what the draft model
    would have said alone. Raises ConfigError where the sizes differ.
    """
    if not rules or any(len(one) != len(names) for one in (target, draft, *rules.values())):
        raise ConfigError(f"Distributions over {len(names)} named tokens are needed, and at least one rule.")
    figure = style.new_figure(0.65 + 1.75 * len(rules))
    errors = {name: float((out - target).abs().max()) for name, out in rules.items()}
    style.add_title(figure, _distribution_title(errors))
    highest = 1.15 * max(float(one.max()) for one in (target, draft, *rules.values()))
    for place, (name, out) in enumerate(rules.items()):
        axes = style.add_row(figure, top=0.75 + 1.75 * place, height=1.15, left=LEFT)
        axes.set(xlim=(-0.6, len(names) - 0.4), ylim=(0, highest))
        axes.bar(range(len(names)), out.tolist(), 0.62, color=style.DECODE)
        axes.hlines(target.tolist(), [i - 0.42 for i in range(len(names))], [i + 0.42 for i in range(len(names))],
                    color=style.INK, lw=1.6)  # fmt: skip
        axes.plot(range(len(names)), draft.tolist(), "o", mec=style.DRAFT, mfc="white", ms=5)
        style.bare(axes, keep="left bottom")
        axes.set_xticks(range(len(names)), names)
        axes.tick_params(axis="x", length=0)
        axes.yaxis.set_major_locator(MaxNLocator(3))
        off = f"off by at most {errors[name]:.2g}"
        axes.set_title(f"{name}: {off}", size=style.NORMAL, weight="normal", pad=6)
    note = "Bars: what comes out, summed over all paths. Ticks: the target. Circles: the draft model alone"
    look: Any = {"size": style.SMALL, "color": style.QUIET}
    figure.text((style.MARGIN + LEFT) / style.WIDTH, 0.12 / figure.get_figheight(), note, **look)
    return figure


def _distribution_title(errors: Mapping[str, float]) -> str:
    best, worst = min(errors.values()), max(errors.values())
    if worst > 1e-9 > best:
        return f"The right rule gives the target's distribution; another is off by {worst:.2g}"
    return f"What comes out differs from the target by at most {worst:.2g}"
