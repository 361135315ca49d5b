"""What a lesson puts on its page: a figure and its text, a claim card, a slider, and what the reader guessed.

    show(figure, alt="What somebody who does not see it should know.")
    explore(plot, alt="…", batch=[1, 4, 16, 64])   # a slider over plot(batch=…) -> Figure
    guess = predict("How many times as long?", ..., "×")  # later: guess.against(measured)

A page without a kernel (GitHub, a print) shows no slider. So an explorer is one output with two faces: the widget, and
a picture of a few of its values side by side. A page shows the best that it can.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from types import EllipsisType
from typing import Any

import ipywidgets as widgets
import torch
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

from minillm.course.claims import Card
from minillm.course.figures import style
from minillm.course.figures.cards import claim_card
from minillm.errors import ConfigError
from minillm.measure.machine import describe_machine
from minillm.measure.units import number

SHARP = 2  # pixels of the picture for one on the page, in each direction: screens are that fine today
DPI = 110  # pixels on the page per inch: the course's width is 900 of them
COLORS = 128  # of a picture: more cannot be told apart in flat drawings, fewer show in soft edges
FRAMES = 4  # values of an explorer that its picture shows
SHORTEST_ALT = 20  # characters


def show(figure: Figure, *, alt: str) -> None:
    """Put a figure on the page, as a picture whose text is `alt`: what it shows, for those who do not see it.

    Raises ConfigError where `alt` is too short to say anything.
    """
    _display_picture(_picture(figure), alt)


def show_card(card: Card) -> None:
    """Put a claim card on the page; its text is what stands on it."""
    numbers = "; ".join(_in_words(finding) for finding in card.findings.values())
    show(claim_card(card), alt=f"Claim {card.claim.id}: {card.claim.says} {numbers}. Verdict: {card.verdict}.")


def _in_words(finding: Any) -> str:
    said = f"{finding.what}: {finding.text(finding.measured)}"
    return said if finding.predicted is None else f"{said}, predicted {finding.text(finding.predicted)}"


def explore(plot: Callable[..., Figure], *, alt: str, **controls: Sequence[Any]) -> None:
    """Put a slider for each control above plot(control=value, …), which draws from what was recorded.

    Where there is no kernel, the page shows some values of the first control below each other (or side by side, where
    figures are narrow); the other controls keep their first value. So let the figure's title name its values. Raises
    ConfigError where nothing can be chosen.
    """
    if not controls or not all(len(values) > 1 for values in controls.values()):
        raise ConfigError("An explorer needs at least one control, and each control at least two values.")
    first, values = next(iter(controls.items()))
    others = {name: rest[0] for name, rest in controls.items()}
    frames = [_picture(plot(**(others | {first: value}))) for value in _spread(values, FRAMES)]
    _display_picture(_contact_sheet(frames), alt, _sliders(plot, controls)._repr_mimebundle_())


def _sliders(plot: Callable[..., Figure], controls: dict[str, Sequence[Any]]) -> widgets.VBox:
    """The live face: moving a slider draws anew."""
    look = {"description_width": "initial"}
    sliders = {
        name: widgets.SelectionSlider(options=list(values), description=name.replace("_", " "), style=look)
        for name, values in controls.items()
    }
    image = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))

    def draw(*_: object) -> None:
        picture = _picture(plot(**{name: slider.value for name, slider in sliders.items()}))
        image.width, image.value = str(picture.width // SHARP), _png(picture)

    for slider in sliders.values():
        slider.observe(draw, "value")
    draw()
    return widgets.VBox([*sliders.values(), image])


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the values, first and last among them, evenly spread."""
    last = len(values) - 1
    return [values[i] for i in sorted({round(last * i / (count - 1)) for i in range(count)})]


def _contact_sheet(frames: Sequence[Image.Image]) -> Image.Image:
    """Pictures in reading order, as many in a row as the page is wide."""
    columns = max(1, round(SHARP * DPI * style.WIDTH) // max(frame.width for frame in frames))
    rows = [frames[start : start + columns] for start in range(0, len(frames), columns)]
    heights = [max(frame.height for frame in row) for row in rows]
    sheet = Image.new("RGB", (max(sum(frame.width for frame in row) for row in rows), sum(heights)), "white")
    for index, row in enumerate(rows):
        for place, frame in enumerate(row):
            sheet.paste(frame, (sum(left.width for left in row[:place]), sum(heights[:index])))
    return sheet


def _picture(figure: Figure) -> Image.Image:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=SHARP * DPI)
    return Image.open(buffer).convert("RGB")


def _png(picture: Image.Image) -> bytes:
    """Flat drawings need few colours, and so a quarter of the bytes."""
    buffer = BytesIO()
    picture.quantize(COLORS, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _display_picture(picture: Image.Image, alt: str, other_faces: dict[str, Any] | None = None) -> None:
    """One output: the picture with its text and its size on the page, and whatever else a page may show instead."""
    if len(alt.strip()) < SHORTEST_ALT:
        raise ConfigError(f"alt={alt!r} says too little: tell in a sentence what the figure shows.")
    size = {"width": picture.width // SHARP, "height": picture.height // SHARP}
    faces = {**(other_faces or {}), "image/png": b64encode(_png(picture)).decode(), "text/plain": alt}
    display(faces, raw=True, metadata={"image/png": {"alt": alt, **size}})


def fold(summary: str, text: str) -> None:
    """Put a text on the page that opens on a click: for answers whose numbers a cell computes. `text` is Markdown."""
    details = f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"
    display({"text/markdown": details, "text/plain": f"{summary}: {text}"}, raw=True, metadata={})


@dataclass(frozen=True)
class Guess:
    """What the reader expects of a number that will be measured; None before anything was written down."""

    question: str
    value: float | None
    unit: str

    def against(self, measured: float) -> None:
        """Print the guess beside what was measured."""
        found = f"{number(measured)} {self.unit}".strip()
        if self.value is None:
            print(f"{self.question}\nMeasured: {found}. You had no guess: write one in place of the three dots.")
            return
        guess = f"{self.value:g} {self.unit}".strip()
        print(f"{self.question}\nYour guess: {guess}. Measured: {found}{self._miss(measured)}.")

    def _miss(self, measured: float) -> str:
        """How far off, as a factor where both are above zero."""
        if self.value is None or min(self.value, measured) <= 0:
            return ""
        factor = max(self.value / measured, measured / self.value)
        way = "low" if self.value < measured else "high"
        return ": well guessed" if factor < 1.25 else f": {factor:.{0 if factor >= 10 else 1}f} times too {way}"


def predict(question: str, value: float | EllipsisType, unit: str = "") -> Guess:
    """Write a guess down before the measurement; `...` stands for one that is still to be made."""
    guess = Guess(question, None if value is ... else float(value), unit)
    print(f"{question}\nYour guess: {'...' if guess.value is None else f'{guess.value:g} {unit}'}")
    return guess


def this_machine() -> str:
    """The machine that times were taken on, in a few words."""
    machine = describe_machine(torch.device("cpu"))
    threads = "1 thread" if machine.threads == 1 else f"{machine.threads} threads"
    return f"this machine: {machine.name}, {threads}, PyTorch {machine.torch_version}"
