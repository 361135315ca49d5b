"""One request over time: a block of prefill, then a comb of decode steps.

The picture for TTFT and TPOT: all prompt tokens cost one step together, every new token costs a step of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon

from minillm.course.figures import style
from minillm.errors import RequestError
from minillm.outputs import RequestMetrics

Step = tuple[float, float]  # start and end, in ms since the request arrived

AIR = 5.0  # points between a token's text and the edges of its step
FEWEST, MOST = 4, 24  # steps that are worth magnifying
ARROW = 1.14  # height of the arrows; the bar fills 0 to 1


@style.SHEET
def request_timeline(metrics: RequestMetrics, *, prompt_tokens: int, texts: Sequence[str] = ()) -> Figure:
    """Draw the first completion of a request, to scale, from the times at which its tokens left.

    texts: what each new token says. It is written into the token's step; where the steps are too narrow for it, the
    first of them are drawn again below, magnified. Raises RequestError for a request without tokens.
    """
    if not metrics.token_times or not metrics.token_times[0]:
        raise RequestError("This request has no tokens yet, so there is nothing to draw. Draw it when it has finished.")
    times = [1e3 * (time - metrics.arrival_time) for time in metrics.token_times[0]]  # ms since arrival
    labels = [style.token_label(text) for text in texts[: len(times)]]
    steps = list(pairwise(times))
    magnified = 0 if _all_fit(labels, steps, (0, times[-1])) else _magnifiable(labels, steps)
    figure = style.new_figure(3.4 if magnified else 2.2)
    style.add_title(figure, _title(prompt_tokens, len(times)))
    axes = _strip(figure, (0, times[-1]), top=0.95, height=0.85)
    _draw_phases(axes, times, 1e3 * (metrics.queue_time or 0))
    _draw_spans(axes, metrics, times, prompt_tokens)
    if magnified:
        _magnify(figure, axes, steps[:magnified], labels)
    else:
        _write_labels(axes, steps, labels[1:])
    return figure


def _title(prompt_tokens: int, new_tokens: int) -> str:
    if new_tokens == 1:
        return f"{_count(prompt_tokens, 'prompt token')} in one step give the first new token"
    return f"One step for {_count(prompt_tokens, 'prompt token')}, then one step for every new token"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _all_fit(labels: Sequence[str], steps: Sequence[Step], window: Step) -> bool:
    """Whether each decode step, drawn over this window, is wide enough for its label. No labels always fit."""
    points = 72 * (style.WIDTH - 2 * style.MARGIN) / (window[1] - window[0])
    return all(_fits(label, points * (end - start)) for label, (start, end) in zip(labels[1:], steps, strict=False))


def _fits(label: str, points: float) -> bool:
    return style.text_width(label) + AIR <= points


def _magnifiable(labels: Sequence[str], steps: Sequence[Step]) -> int:
    """How many of the first steps can be drawn wide enough for their labels; 0 where it would not be worth it."""
    for count in range(min(MOST, len(steps)), FEWEST - 1, -1):
        if _all_fit(labels[: count + 1], steps[:count], _window(steps[:count])):
            return count
    return 0


def _window(steps: Sequence[Step]) -> Step:
    """What is magnified: the steps, and as much of prefill before them as the first step is long."""
    (start, end) = steps[0]
    return start - min(start, end - start), steps[-1][1]


def _strip(figure: Figure, window: Step, *, top: float, height: float) -> Axes:
    """Axes for a bar that fills them: time in ms to the right."""
    axes = style.add_row(figure, top=top, height=height)
    axes.set_xlim(*window)
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_formatter("{x:g} ms")
    style.bare(axes, keep="bottom")
    return axes


def _draw_phases(axes: Axes, times: Sequence[float], queued: float) -> None:
    """Waiting white, prefill blue, decode amber with a cut between two tokens."""
    axes.barh(0.5, queued, 1, left=0, facecolor="white", edgecolor=style.QUIET, linewidth=0.8)
    axes.barh(0.5, times[0] - queued, 1, left=queued, color=style.PREFILL)
    cut = min(0.8, 0.15 * style.points_per_unit(axes) * (times[-1] - times[0]) / max(1, len(times) - 1))
    steps = [(start, end - start) for start, end in pairwise(times)]
    axes.broken_barh(steps, (0, 1), facecolor=style.DECODE, edgecolor="white", linewidth=cut)


def _draw_spans(axes: Axes, metrics: RequestMetrics, times: Sequence[float], prompt_tokens: int) -> None:
    """TTFT and the decode steps as arrows with their numbers, which add up to the end-to-end latency."""
    queued = 1e3 * (metrics.queue_time or 0)
    waited = f", {_ms(queued)} of it in the queue" if queued > 0.1 * times[0] else ""
    ttft = [f"prefill: {_count(prompt_tokens, 'token')} at once", f"TTFT {_ms(times[0])}{waited}"]
    _draw_span(axes, (0, times[0]), ttft, style.PREFILL_INK)
    if len(times) > 1:
        steps = len(times) - 1
        tpot = ["decode: one token a step", f"{steps} × TPOT {_ms((times[-1] - times[0]) / steps)}"]
        _draw_span(axes, (times[0], times[-1]), tpot, style.DECODE_INK)


def _draw_span(axes: Axes, span: Step, lines: list[str], color: str) -> None:
    """An arrow over a span of time; its words stand in the middle, or at the figure's edge where it is short."""
    wide = style.text_width("\n".join(lines), style.NORMAL) <= style.points_per_unit(axes) * (span[1] - span[0])
    place, align = (
        ((span[0] + span[1]) / 2, "center") if wide else (span[0], "left") if span[0] == 0 else (span[1], "right")
    )
    axes.annotate(
        "",
        (span[0], ARROW),
        (span[1], ARROW),
        annotation_clip=False,
        arrowprops={"arrowstyle": "<->", "color": color, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 8},
    )
    axes.text(place, ARROW + 0.1, "\n".join(lines), color=color, ha=align, va="bottom", linespacing=1.35)


def _write_labels(axes: Axes, steps: Sequence[Step], labels: Sequence[str], color: str = style.INK) -> None:
    """Each label in the middle of its step, but for those that would stick out of it."""
    scale = style.points_per_unit(axes)
    for (start, end), label in zip(steps, labels, strict=False):
        if _fits(label, scale * (end - start)):
            axes.text((start + end) / 2, 0.5, label, color=color, size=style.SMALL, ha="center", va="center_baseline")


def _magnify(figure: Figure, whole: Axes, steps: Sequence[Step], labels: Sequence[str]) -> None:
    """Draw the first steps once more with their labels, and a shadow that shows where they come from."""
    window = _window(steps)
    detail = _strip(figure, window, top=2.4, height=0.6)
    _draw_phases(detail, [start for start, _ in steps] + [steps[-1][1]], 0.0)
    _write_labels(detail, steps, labels[1:])
    _write_labels(detail, [(window[0], steps[0][0])], labels[:1], color="white")
    to_figure = figure.transFigure.inverted().transform
    corners = [
        to_figure(axes.transData.transform((x, y)))
        for axes, x, y in ((whole, window[0], 0), (whole, window[1], 0), (detail, window[1], 1), (detail, window[0], 1))
    ]
    figure.add_artist(Polygon(corners, closed=True, facecolor="#eef0f2", zorder=-1))


def _ms(milliseconds: float) -> str:
    """A time with no more digits than it deserves: 0.87 ms, 2.1 ms, 53 ms."""
    digits = 2 if milliseconds < 1 else 1 if milliseconds < 10 else 0
    return f"{milliseconds:.{digits}f} ms"
