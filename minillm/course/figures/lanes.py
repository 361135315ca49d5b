"""Speculation round by round: a lane of guesses, and below it what the model makes of them in one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minillm.course.figures import style
from minillm.course.lessons.rounds import Round
from minillm.errors import ConfigError

LANE, PITCH, GAP = 0.25, 0.68, 0.03  # inches: height of a lane, from one round to the next, between two cells
NUMBERS, FACTS = 0.3, 1.75  # inches for the number of a round, and for what came of it
WIDEST = 1.05  # inches of a cell
VOID = "#c9ccd1"  # frame of guesses that nobody looks at any more


class Mark(NamedTuple):
    """What became of a token, and how it is drawn: a letter always says what the colour says."""

    letter: str
    meaning: str
    fill: str
    edge: str
    ink: str


ACCEPTED = Mark("A", "accepted", style.DRAFT, style.DRAFT, "white")
REJECTED = Mark("✗", "rejected", "white", style.REJECTED, style.INK)
SKIPPED = Mark("–", "void: after a rejected one", "white", VOID, style.QUIET)
RECOVERED = Mark("R", "recovered", style.DECODE, style.DECODE, style.INK)
BONUS = Mark("B", "bonus", style.DECODE, style.DECODE, style.INK)
ALONE = Mark("", "decoded: nobody guessed", style.DECODE, style.DECODE, style.INK)


@style.SHEET
def verification_lanes(rounds: Sequence[Round], texts: Mapping[int, str]) -> Figure:
    """Rounds of one request: above what was guessed, below what the model says instead or after, in one step.

    texts: what each token says. Raises ConfigError where nothing was guessed.
    """
    if not any(one.guesses for one in rounds):
        raise ConfigError("Nothing was guessed in these rounds, so there is nothing to draw. Serve with a proposer.")
    room = style.WIDTH - 2 * style.MARGIN - NUMBERS - FACTS
    cell = min(WIDEST, room / max(max(len(one.guesses) + 1, len(one.said)) for one in rounds))
    figure = style.new_figure(0.95 + PITCH * len(rounds))
    said = sum(len(one.said) for one in rounds)
    style.add_title(figure, f"Guesses are checked together: {said} tokens in {len(rounds)} steps of the model")
    axes = style.add_row(figure, top=0.9, height=PITCH * len(rounds))
    axes.set(xlim=(0, style.WIDTH - 2 * style.MARGIN), ylim=(PITCH * len(rounds), 0))
    style.bare(axes)
    _draw_keys(axes)
    for number, one in enumerate(rounds):
        _draw_round(axes, one, number, cell, texts)
    return figure


def marks(one: Round) -> tuple[list[Mark], list[Mark]]:
    """What became of each guess, and what the model's own tokens after the accepted ones are."""
    accepted, own = one.num_accepted, len(one.said) - one.num_accepted
    rejected = [REJECTED][: len(one.guesses) - accepted if own else 0]
    guesses = [ACCEPTED] * accepted + rejected
    guesses += [SKIPPED] * (len(one.guesses) - len(guesses))
    return guesses, [RECOVERED if rejected else BONUS if one.guesses else ALONE] * own


def _draw_keys(axes: Axes) -> None:
    """What the letters mean, above the lanes."""
    x = NUMBERS
    for mark in (ACCEPTED, REJECTED, SKIPPED, RECOVERED, BONUS):
        _draw_cell(axes, x, -0.4, 0.25, "", mark)
        axes.text(x + 0.29, -0.4 + LANE / 2, mark.meaning, va="center_baseline", size=style.SMALL)
        x += 0.29 + style.text_width(mark.meaning) / 72 + 0.25


def _draw_round(axes: Axes, one: Round, number: int, cell: float, texts: Mapping[int, str]) -> None:
    """Two lanes, and beside them how many guesses were right and what both models took."""
    top = number * PITCH
    guessed, own = marks(one)
    for place, (token, mark) in enumerate(zip(one.guesses, guessed, strict=True)):
        _draw_cell(axes, NUMBERS + place * cell, top, cell, texts[token], mark)
    for place, (token, mark) in enumerate(zip(one.said[one.num_accepted :], own, strict=True), one.num_accepted):
        _draw_cell(axes, NUMBERS + place * cell, top + LANE + GAP, cell, texts[token], mark)
    axes.text(0, top + LANE, str(number + 1), va="center_baseline", color=style.QUIET)
    edge = style.WIDTH - 2 * style.MARGIN
    axes.text(edge, top + LANE, _facts(one), ha="right", va="center", size=style.SMALL, linespacing=1.3)


def _facts(one: Round) -> str:
    brought = "1 token" if len(one.said) == 1 else f"{len(one.said)} tokens"
    if not one.guesses:
        return f"no guess: {brought}\ncheck {1e3 * one.run_time:.1f} ms"
    times = f"guess {1e3 * one.propose_time:.1f}, check {1e3 * one.run_time:.1f} ms"
    return f"{one.num_accepted} of {len(one.guesses)} right: {brought}\n{times}"


def _draw_cell(axes: Axes, x: float, y: float, width: float, text: str, mark: Mark) -> None:
    """A token with the letter of what became of it; a rejected one is struck out."""
    width -= GAP
    box: Any = {"facecolor": mark.fill, "edgecolor": mark.edge, "linewidth": 1.0}
    axes.add_patch(Rectangle((x, y), width, LANE, clip_on=False, **box))
    if mark is REJECTED:
        axes.plot([x, x + width], [y + LANE, y], color=style.REJECTED, lw=1.2, clip_on=False)
    place: Any = {"va": "center_baseline", "size": style.SMALL, "color": mark.ink}
    axes.text(x + 0.05, y + LANE / 2, mark.letter, weight="bold", **place)
    if mark is REJECTED:
        place["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # the stroke passes behind the word
    axes.text(x + (0.16 + width) / 2, y + LANE / 2, _fit(text, width - 0.22), ha="center", **place)


def _fit(text: str, inches: float) -> str:
    """As much of a token's text as a cell takes."""
    label = style.token_label(text)
    while label and style.text_width(label) > 72 * inches:
        label = label[:-2] + "…" if len(label) > 1 else ""
    return label
