"""A claim card as a picture: what is said, prediction and measurement side by side, and the verdict."""

from __future__ import annotations

from textwrap import wrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minillm.course.claims.card import Card, Finding
from minillm.course.figures import style

ROW, LINE = 0.34, 0.19  # inches: a number with its bar, and a line of text
NAMES, VALUES = 3.2, 2.1  # inches left of the bars for what is measured, and right of them for the numbers
LONGEST_TITLE, LONGEST_LINE = 78, 100  # characters
SIGNS = {"holds": "✓", "holds when": "◐", "wrong": "✗"}
MEASURED = "#d8dce1"  # a bar of no phase and no part


@style.SHEET
def claim_card(card: Card) -> Figure:
    """One row per number: a bar for what was measured, a tick for what was predicted; rows of one unit share a scale.

    Where the tick stands at the end of the bar, the formula was right. The verdict below was computed from the two.
    """
    title = wrap(f"{card.claim.id}: {card.claim.says}", LONGEST_TITLE)
    verdict = [line for text in _verdict(card) for line in wrap(text, LONGEST_LINE, subsequent_indent="    ")]
    top = 0.3 + 0.2 * len(title)
    height = ROW * len(card.findings)
    figure = style.new_figure(top + height + 0.2 + LINE * len(verdict) + 0.15)
    style.add_title(figure, "\n".join(title))
    axes = style.add_row(figure, top=top, height=height)
    _draw_findings(axes, list(card.findings.values()))
    full = figure.get_figheight()
    start = style.MARGIN / style.WIDTH
    figure.text(start, 1 - (top + height + 0.12) / full, "\n".join(verdict), va="top", linespacing=1.35)
    return figure


def _verdict(card: Card) -> list[str]:
    """The verdict, its cases where it has several, and what is true instead."""
    cases = [f"    {'✓' if holds else '✗'} {name}" for name, holds in card.cases.items()]
    lines = [f"{SIGNS[card.kind]} {card.kind}", *(cases if card.kind == "holds when" else [])]
    return lines if card.kind == "holds" else [*lines, f"    → {card.claim.otherwise}"]


def _draw_findings(axes: Axes, findings: list[Finding]) -> None:
    """Bars in the middle, what they are to the left, the numbers to the right; x is inches from the left margin."""
    width = style.WIDTH - 2 * style.MARGIN
    bars = width - NAMES - VALUES
    axes.set(xlim=(0, width), ylim=(len(findings) - 0.5, -0.5))
    style.bare(axes)
    for row, finding in enumerate(findings):
        scale = bars / _largest(findings, finding.unit)
        axes.barh(row, scale * abs(finding.measured), 0.5, left=NAMES, color=MEASURED)
        axes.text(NAMES - 0.1, row, finding.what, ha="right", va="center")
        number = finding.text(finding.measured)
        if finding.predicted is not None:
            tick = NAMES + scale * abs(finding.predicted)
            axes.vlines(tick, row - 0.38, row + 0.38, color=style.INK, lw=1.6)
            exact = finding.measured == finding.predicted
            number += ", as predicted" if exact else f", predicted {finding.text(finding.predicted)}"
        axes.text(NAMES + bars + 0.1, row, number, va="center")


def _largest(findings: list[Finding], unit: str) -> float:
    """The end of the scale for a unit: the largest number that has it; 100 for per cent."""
    values = [abs(v) for f in findings if f.unit == unit for v in (f.measured, f.predicted) if v is not None]
    return max([*values, 100.0 if unit == "%" else 0.0]) or 1.0
