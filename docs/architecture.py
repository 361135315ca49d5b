"""Draws the two pictures of `docs/architecture.md`: `python docs/architecture.py` writes house.svg and journey.svg.

The house is drawn from the imports that stand in the source (`tests/house.py` reads them, and `tests/test_floors.py`
refuses those that go up), so it changes when the house does. Plain SVG: no library draws it, and a diff shows what
has moved.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import house  # noqa: E402 — the project's root is not on the path of a script in docs/

WIDTH = 840
SIZE = 12  # of the smallest letters
LINE = 16
PAD = 9
LETTER = 7.0  # width of a letter at most, on average over a line, at SIZE
INK, QUIET, PAPER = "#1b1f24", "#57606a", "#ffffff"

# room -> (name on its door, what is in it)
ROOMS = {
    "errors": ("errors", "named errors"),
    "outputs": ("outputs", "what comes back"),
    "config": ("config", "all settings"),
    "sampling": ("sampling", "logits to tokens"),
    "prompts": ("prompts", "what may be asked"),
    "seams": ("seams", "who offers what"),
    "costs": ("costs", "FLOPs and bytes in closed form"),
    "attention": ("attention", "the definition, tiles, one metadata object per step"),
    "model": ("model", "decoder, linear layers, rotary embeddings, loader, tokenizer"),
    "cache": ("cache", "keys and values: blocks and who holds them, paged tensors, one request alone"),
    "engine": ("engine", "many requests, step by step: schedule, run, commit"),
    "generate": ("generate", "one request: prefill, decode"),
    "text": ("text", "tokens to text, stop strings"),
    "kernels": ("kernels", "the same, faster on this machine"),
    "quantization": ("quantization", "keys and values in fewer bytes"),
    "speculative": ("speculative", "guesses tokens, which are then checked"),
    "shapes": ("shapes", "known models with random weights, to measure"),
    "chat": ("chat", "messages to a prompt, by the model's template"),
    "llm": ("llm, __init__", "the front door: prompts in, text out"),
    "measure": ("measure", "benchmarks, counters, what this machine can do"),
    "course": ("course", "lessons, claims, figures, exercises and their grading, training"),
    "cli": ("cli, __main__", "the command line: parses, calls, prints"),
}
SAME_DOOR = {"": "llm", "__main__": "cli"}  # two rooms that are drawn as one
WALLS = {"core": ("#ddf4ff", "2.5", ""), "extra": ("#fff8c5", "1.5", "6 4"), "above": ("#f6f8fa", "1", "")}


class Station(NamedTuple):
    """One stop of a request: file and name in it, what happens there, and what is handed on."""

    file: str
    name: str
    does: str
    hands_on: str
    in_loop: bool = False


JOURNEY = (
    Station("llm.py", "LLM.generate", "takes prompts and sampling parameters", "prompts"),
    Station("prompts.py", "", "makes token ids of each prompt, or refuses it by name", "token ids"),
    Station("engine/engine.py", "Engine.add", "checks that it can ever fit, and queues it", "Request"),
    Station("engine/scheduler.py", "Scheduler.schedule", "who computes how many tokens", "StepPlan", True),
    Station("engine/batch.py", "Batch", "tensors, and the metadata of attention", "Batch", True),
    Station("engine/runner.py", "ModelRunner.run", "the decoder; K and V go to their blocks", "logits", True),
    Station("sampling.py", "sample", "draws a token, or verifies guesses (engine/verify.py)", "tokens", True),
    Station(
        "engine/scheduler.py",
        "Scheduler.commit",
        "counts what is computed, ends who is done; then a StepRecord",
        "new tokens",
        True,
    ),
    Station("text.py", "TextStream", "writes text, looks for stop strings", "text"),
    Station("outputs.py", "RequestOutput", "text, token ids, why it ended, when", ""),
)


def main() -> None:
    for name, picture in (("house.svg", draw_house()), ("journey.svg", draw_journey())):
        (ROOT / "docs" / name).write_text(picture, encoding="utf8")


# The house -----------------------------------------------------------------------------------------------------------


def needs() -> dict[str, list[str]]:
    """Room -> the rooms that it imports, from the ground up."""
    files = house.sources()
    order = {name: place for place, name in enumerate(ROOMS)}
    found: dict[str, set[str]] = {name: set() for name in ROOMS}
    for module in files:
        own = SAME_DOOR.get(house.room(module), house.room(module))
        for each in house.imports(module, files):
            other = SAME_DOOR.get(house.room(each.target), house.room(each.target))
            found[own] |= {other} - {own}
    return {name: sorted(others, key=order.__getitem__) for name, others in found.items()}


def draw_house() -> str:
    left, right, y = 48, WIDTH - 48, 100
    used = needs()
    parts = [
        polygon([(left - 14, y - 10), (WIDTH / 2, 14), (right + 14, y - 10)], "#f6f8fa"),
        text(WIDTH / 2, 62, "minillm/", 20, bold=True, anchor="middle"),
        text(WIDTH / 2, 82, "drawn from its imports", SIZE, QUIET, anchor="middle"),
    ]
    tops: dict[str, tuple[float, float]] = {}  # room -> top and bottom
    for floor in reversed(house.FLOORS):
        rooms = [name for name in floor if name in ROOMS]
        gap = 10
        widths = share(rooms, right - left - gap * (len(rooms) - 1))
        lines = [room_lines(name, used[name], width) for name, width in zip(rooms, widths, strict=True)]
        height = PAD + 20 + LINE * max(map(len, lines)) + PAD
        x: float = left
        for name, width, written in zip(rooms, widths, lines, strict=True):
            parts += draw_room(name, written, x, y, width, height)
            tops[name] = (y, y + height)
            x += width + gap
        y += height + 12
    parts += way_down(24, tops["cli"][0], tops["errors"][1])
    parts += way_up(right, sum(tops["seams"]) / 2, sum(tops[house.FLOORS[5][-1]]) / 2)
    parts += legend(left, y + 6)
    return svg(y + 62, "The house of minillm: its rooms by floor, and what each room imports", parts)


def share(rooms: list[str], width: float) -> list[float]:
    """Widths of the rooms of a floor: the engine is the largest room of its floor, else all are equal."""
    weights = [2.0 if name == "engine" else 1.0 for name in rooms]
    return [width * weight / sum(weights) for weight in weights]


def room_lines(name: str, used: list[str], width: float) -> list[tuple[str, str]]:
    """The lines of a room with their colours: what is in it, what it imports, and the seams at which it plugs in."""
    seams = sorted(seam for seam, places in offers().items() if name in places)
    words = [(ROOMS[name][1], INK), ("needs " + (", ".join(used) or "nothing"), QUIET)]
    words += [("seams: " + ", ".join(seams), QUIET)] if seams else []
    return [(line, colour) for sentence, colour in words for line in wrapped(sentence, width - 2 * PAD)]


def offers() -> dict[str, set[str]]:
    """Seam -> rooms that offer it."""
    table = house.offers(house.sources()["seams"])
    return {seam: {house.room(p.removeprefix("minillm.")) for p in places.values()} for seam, places in table.items()}


def kind(name: str) -> str:
    return "core" if name in house.CORE else "extra" if name in house.EXTRAS else "above"


def draw_room(name: str, lines: list[tuple[str, str]], x: float, y: float, width: float, height: float) -> list[str]:
    what = kind(name)
    parts = [box(x, y, width, height, what), text(x + PAD, y + PAD + 13, ROOMS[name][0], 15, bold=True)]
    if what != "above" and width > 170:
        parts.append(text(x + width - PAD, y + PAD + 12, what, SIZE, QUIET, anchor="end"))
    for row, (line, colour) in enumerate(lines):
        parts.append(text(x + PAD, y + PAD + 20 + LINE * row + 12, line, SIZE, colour))
    return parts


def way_down(x: float, top: float, bottom: float) -> list[str]:
    words = "an import goes down, or stays on its floor"
    return [arrow([(x, top), (x, bottom)]), turned(x - 8, (top + bottom) / 2, words)]


def way_up(right: float, bottom: float, top: float) -> list[str]:
    """From the seams up to the extras: the one way up, by a name in a table, when it is asked for."""
    x = right + 20
    words = "seams: by name, when asked for"
    return [
        arrow([(right, bottom), (x, bottom), (x, top), (right + 2, top)], dashed=True),
        turned(x + 15, (bottom + top) / 2, words),
    ]


def legend(x: float, y: float) -> list[str]:
    rows = {
        "core": "core: runs by itself",
        "extra": "extra: can be deleted",
        "above": "the rest: uses the engine",
    }
    parts = []
    for what, words in rows.items():
        parts += [box(x, y, 26, 18, what), text(x + 34, y + 13, words, SIZE)]
        x += 50 + LETTER * len(words)
    return parts


# The journey ---------------------------------------------------------------------------------------------------------


def draw_journey() -> str:
    left, width, height, gap = 150, 500, 56, 34
    y = 20
    parts = []
    loop: list[float] = []
    for station in JOURNEY:
        parts += draw_station(station, left, y, width, height)
        loop += [y + height / 2] if station.in_loop else []
        if station.hands_on:
            middle = left + width / 2
            parts += [arrow([(middle, y + height), (middle, y + height + gap - 2)])]
            parts += [text(middle + 10, y + height + gap / 2 + 4, station.hands_on, 13, bold=True)]
        y += height + gap
    x = left - 40
    parts.append(arrow([(left, loop[-1]), (x, loop[-1]), (x, loop[0]), (left - 2, loop[0])]))
    parts.append(turned(x - 10, (loop[0] + loop[-1]) / 2, "one step; the next, while any request is unfinished"))
    return svg(y - gap + 20, "The journey of one request through minillm, from prompt to text", parts)


def draw_station(station: Station, x: float, y: float, width: float, height: float) -> list[str]:
    name = station.name or station.file
    parts = [box(x, y, width, height, "core"), text(x + 12, y + 23, name, 15, bold=True)]
    if station.name:
        parts.append(text(x + width - 12, y + 23, station.file, SIZE, QUIET, anchor="end"))
    return [*parts, text(x + 12, y + 43, station.does, 13)]


# Shapes --------------------------------------------------------------------------------------------------------------


def svg(height: float, title: str, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" '
        f'font-family="DejaVu Sans, Verdana, sans-serif" role="img">'
    )
    tip = '<marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">'
    marker = f'<defs>{tip}<path d="M0 0L10 5L0 10z" fill="{INK}"/></marker></defs>'
    ground = f'<rect width="{WIDTH}" height="{height:g}" fill="{PAPER}"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", marker, ground, *parts, "</svg>", ""])


def box(x: float, y: float, width: float, height: float, what: str) -> str:
    fill, stroke, dashes = WALLS[what]
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"'
    return f'<rect {place} fill="{fill}" stroke="{INK}" stroke-width="{stroke}"{dashed}/>'


def text(
    x: float, y: float, words: str, size: int, colour: str = INK, *, bold: bool = False, anchor: str = "start"
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    place = f'x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}"{weight}>{escape(words)}</text>'


def turned(x: float, y: float, words: str) -> str:
    """Words that run from the bottom to the top, centred."""
    place = f'x="{x:g}" y="{y:g}" font-size="{SIZE}" text-anchor="middle" transform="rotate(-90 {x:g} {y:g})"'
    return f'<text {place} fill="{INK}">{escape(words)}</text>'


def arrow(points: list[tuple[float, float]], *, dashed: bool = False) -> str:
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="1.5"{dashes} marker-end="url(#tip)"/>'


def polygon(points: list[tuple[float, float]], fill: str) -> str:
    corners = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polygon points="{corners}" fill="{fill}" stroke="{INK}" stroke-width="1.5"/>'


def wrapped(sentence: str, width: float) -> list[str]:
    lines = [""]
    for word in sentence.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and len(longer) * LETTER > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


if __name__ == "__main__":
    main()
