"""Who takes part in which step: seats and requests over time, and the tokens of every step, from the engine's trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from minillm.course.figures import style
from minillm.engine.trace import RequestStep, StepRecord
from minillm.errors import ConfigError

TITLE, CAPTION, SEAT, LEFT = 0.35, 0.42, 0.3, 0.62  # inches: title, a run's caption, a seat's row, room for names
TALLEST, LOWEST = 2.0, 0.6  # inches: the highest step of all runs, and the least height of axes
LOOKS: dict[str, Any] = {  # of a phase in a step
    "prefill": {"facecolor": style.PREFILL},
    "recompute": {"facecolor": style.PREFILL, "hatch": "xxx"},
    "decode": {"facecolor": style.DECODE},
    "verify": {"facecolor": style.DRAFT},
}


@dataclass
class Stay:
    """A request in a seat: from the step in which it sat down to the last one in which it took part."""

    name: str
    seat: int
    parts: list[tuple[int, str]] = field(default_factory=list)  # (step, phase)

    @property
    def start(self) -> int:
        return self.parts[0][0]

    @property
    def end(self) -> int:
        """One after its last step."""
        return self.parts[-1][0] + 1


def stays(trace: Sequence[StepRecord]) -> list[Stay]:
    """Give every completion of a trace the lowest free seat, from its first step to its last or to its preemption.

    Steps are counted from the first one of the trace.
    """
    last = {_name(part): step for step, record in enumerate(trace) for part in record.requests}
    sitting: dict[str, Stay] = {}
    found: list[Stay] = []
    for step, record in enumerate(trace):
        for name in [name for name, stay in sitting.items() if stay.name in record.preempted or last[name] < step]:
            del sitting[name]
        for part in record.requests:
            name = _name(part)
            if name not in sitting:
                taken = {stay.seat for stay in sitting.values()}
                seat = next(seat for seat in range(len(taken) + 1) if seat not in taken)
                sitting[name] = Stay(name, seat)
                found.append(sitting[name])
            sitting[name].parts.append((step, part.phase))
    return found


def _name(part: RequestStep) -> str:
    """A request's id; a further completion of it has its number after it."""
    return part.request_id if part.index == 0 else f"{part.request_id}.{part.index}"


def idle_share(trace: Sequence[StepRecord], seats: int) -> float:
    """Part of all seats and steps in which a seat stood empty."""
    return 1 - sum(stay.end - stay.start for stay in stays(trace)) / (seats * len(trace))


@style.SHEET
def seat_gantt(runs: Mapping[str, Sequence[StepRecord]], seats: int) -> Figure:
    """Request by step, one row per seat, one panel per run: prefill blue, decode amber, empty seats hatched.

    runs: traces of the same work by what they are called. A white gap within a request is a step that left it out.
    Raises ConfigError without steps.
    """
    if not runs or not all(runs.values()):
        raise ConfigError(
            "A run without steps cannot be drawn. Give the engine trace_bytes above 0, and something to do."
        )
    panel = CAPTION + seats * SEAT
    figure = style.new_figure(TITLE + len(runs) * panel + 0.6)
    style.add_title(figure, _gantt_title(runs, seats))
    longest = max(map(len, runs.values()))
    for row, (caption, trace) in enumerate(runs.items()):
        axes = style.add_row(figure, top=TITLE + row * panel + CAPTION, height=seats * SEAT, left=LEFT)
        axes.set(xlim=(0, longest), ylim=(seats, 0))
        empty = f"{100 * idle_share(trace, seats):.0f} % of the seats empty (hatched)"
        axes.set_title(f"{caption}: {len(trace)} steps, {empty}", size=style.NORMAL, weight="normal", pad=4)
        _draw_seats(axes, trace, seats)
        style.bare(axes, keep="bottom" if row == len(runs) - 1 else "")
        axes.set_yticks([seat + 0.5 for seat in range(seats)], [f"seat {seat + 1}" for seat in range(seats)])
        axes.tick_params(axis="y", length=0)
    axes.set_xlabel("engine step. Blue: its prompt. Amber: a new token each step", loc="left")
    return figure


def _gantt_title(runs: Mapping[str, Sequence[StepRecord]], seats: int) -> str:
    lengths = {caption: len(trace) for caption, trace in runs.items()}
    best, worst = min(lengths, key=lambda name: lengths[name]), max(lengths, key=lambda name: lengths[name])
    count = len({stay.name for stay in stays(runs[best])})  # whoever was preempted sat down twice
    if lengths[best] == lengths[worst]:
        return f"{count} requests on {seats} seats take {lengths[best]} steps"
    return f"The same {count} requests: {lengths[worst]} steps or {lengths[best]}, with {seats} seats"


def _draw_seats(axes: Axes, trace: Sequence[StepRecord], seats: int) -> None:
    """Hatched seats, and the stays on top of them; a request's name where it fits."""
    axes.barh(
        [seat + 0.5 for seat in range(seats)],
        len(trace),
        0.78,
        facecolor="white",
        edgecolor="#c3c8cf",
        hatch="////",
        lw=0,
    )
    scale = style.points_per_unit(axes)
    for stay in stays(trace):
        y = stay.seat + 0.5
        axes.barh(y, stay.end - stay.start, 0.78, left=stay.start, facecolor="white", edgecolor=style.QUIET, lw=0.8)
        for phase, steps in _spans(stay):
            axes.broken_barh(
                steps, (y - 0.39, 0.78), edgecolor="white", linewidth=min(0.8, 0.1 * scale), **LOOKS[phase]
            )
        text = f"request {stay.name}" if scale * (stay.end - stay.start) > 60 else stay.name
        if style.text_width(text) + 4 < scale * (stay.end - stay.start):
            axes.text((stay.start + stay.end) / 2, y, text, size=style.SMALL, ha="center", va="center_baseline")


def _spans(stay: Stay) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """The steps of each phase, as (start, width), one per step."""
    for phase, parts in groupby(sorted(stay.parts, key=lambda part: part[1]), key=lambda part: part[1]):
        yield phase, [(step, 1.0) for step, _ in parts]


@style.SHEET
def budget_figure(runs: Mapping[str, Sequence[StepRecord]], budgets: Sequence[int]) -> Figure:
    """The tokens of every step, stacked by request, one panel per run; the budget as a line.

    runs: traces of the same work by what they are called; budgets: the tokens per step that each of them allows.
    Raises ConfigError without steps, and unless there is one budget for each run.
    """
    if not runs or not all(runs.values()) or len(budgets) != len(runs):
        raise ConfigError(
            f"{len(runs)} runs with {len(budgets)} budgets: give one budget for each run, and runs with steps."
        )
    scale = TALLEST / max(record.num_tokens for trace in runs.values() for record in trace)  # inches per token
    heights = [max(LOWEST, 1.08 * scale * max(record.num_tokens for record in trace)) for trace in runs.values()]
    figure = style.new_figure(TITLE + len(runs) * CAPTION + sum(heights) + 0.6)
    style.add_title(figure, _budget_title(runs))
    longest, top = max(map(len, runs.values())), TITLE
    for (caption, trace), budget, height in zip(runs.items(), budgets, heights, strict=True):
        axes = style.add_row(figure, top=top + CAPTION, height=height, left=LEFT)
        axes.set(xlim=(-0.6, longest), ylim=(0, height / scale), ylabel="tokens")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(max(1, round(2.5 * height)), integer=True))
        largest = max(record.num_tokens for record in trace)
        axes.set_title(f"{caption}: at most {largest} tokens in a step", size=style.NORMAL, weight="normal", pad=4)
        _draw_towers(axes, trace, 72 * scale)
        if budget <= axes.get_ylim()[1]:
            _draw_budget(axes, budget)
        top += CAPTION + height
    axes.set_xlabel("engine step. Blue: tokens of a prompt. Amber: decodes, one token each", loc="left")
    return figure


def _draw_budget(axes: Axes, budget: int) -> None:
    axes.axhline(budget, color=style.INK, lw=0.8, ls="--")
    place, offset = (axes.get_xlim()[1], budget), (-2, 2)
    words = f"budget {budget}"
    axes.annotate(words, place, offset, textcoords="offset points", ha="right", va="bottom", size=style.SMALL)


def _budget_title(runs: Mapping[str, Sequence[StepRecord]]) -> str:
    """Whether cutting changed the tokens that are computed, or only their steps."""
    again = max(sum(part.num_recomputed for record in trace for part in record.requests) for trace in runs.values())
    if again:
        return f"Where blocks run out, {again} tokens are computed a second time (crossed)"
    totals = {sum(record.num_tokens for record in trace) for trace in runs.values()}
    same = "The same tokens, cut into steps" if len(totals) == 1 else "Tokens cut into steps"
    return f"{same} of a size that everybody can wait for" if len(runs) > 1 else "What each step computes, and for whom"


def _draw_towers(axes: Axes, trace: Sequence[StepRecord], tall: float) -> None:
    """Decodes at the foot, prompts above them, each with its request's name where it fits; `tall` points per token."""
    scale = style.points_per_unit(axes)
    for step, record in enumerate(trace):
        foot = 0
        for part in sorted(record.requests, key=lambda part: part.phase != "decode"):
            look = LOOKS[part.phase]
            cut = min(0.6, 0.2 * tall * part.num_scheduled)
            axes.bar(step, part.num_scheduled, 0.86, bottom=foot, edgecolor="white", linewidth=cut, **look)
            name = _name(part)
            if part.phase != "decode" and tall * part.num_scheduled > 10 and scale * 0.86 > style.text_width(name) + 2:
                axes.text(
                    step, foot + part.num_scheduled / 2, name, color="white", size=style.SMALL, ha="center", va="center"
                )
            foot += part.num_scheduled
