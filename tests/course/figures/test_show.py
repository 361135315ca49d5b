"""What a lesson puts on its page: pictures carry their text, explorers have two faces, guesses are compared."""

from __future__ import annotations

from base64 import b64decode
from io import BytesIO
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from minillm.course.claims import CLAIMS, Card, Finding
from minillm.course.figures import show as module
from minillm.course.figures import style
from minillm.course.figures.show import explore, predict, show, show_card, this_machine
from minillm.errors import ConfigError

WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What is displayed: the faces of each output, and their metadata."""
    shown: list[tuple[dict[str, Any], dict[str, Any]]] = []
    monkeypatch.setattr(module, "display", lambda faces, raw, metadata: shown.append((faces, metadata)))
    return shown


def strip(red: float = 0.0, wide: bool = True) -> Figure:
    """A figure of one colour, an inch high."""
    return Figure(figsize=(style.WIDTH if wide else style.WIDTH / 2, 1), facecolor=(red, 0, 0))


def picture(faces: dict[str, Any]) -> Image.Image:
    return Image.open(BytesIO(b64decode(faces["image/png"]))).convert("RGB")


def test_a_figure_is_shown_with_its_text_and_its_size(page: list[Any]) -> None:
    show(strip(1.0), alt="A red strip, an inch high.")
    faces, metadata = page[0]
    assert metadata == {"image/png": {"alt": "A red strip, an inch high.", "width": 902, "height": 110}}
    assert picture(faces).size == (1804, 220)
    assert picture(faces).getpixel((9, 9)) == (255, 0, 0)


def test_a_text_that_says_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="says too little"):
        show(strip(), alt="figure")


def test_an_explorer_is_a_widget_and_a_picture(page: list[Any]) -> None:
    explore(
        lambda red, wide: strip(red, wide), alt="Strips, more and more red.", red=[0, 0.2, 0.5, 0.7, 1], wide=[1, 0]
    )
    faces, _ = page[0]
    assert {WIDGET, "image/png", "text/plain"} <= set(faces)
    frames = [picture(faces).getpixel((9, 220 * row + 9))[0] for row in range(4)]
    assert frames == sorted(set(frames)) and frames[0] == 0 and frames[-1] == 255, "first and last value are shown"


def test_narrow_frames_stand_side_by_side(page: list[Any]) -> None:
    explore(lambda red: strip(red, wide=False), alt="Strips, more and more red.", red=[0, 0.2, 0.6, 1])
    sheet = picture(page[0][0])
    assert sheet.size == (1804, 440)
    assert [sheet.getpixel((x, y))[0] for y in (9, 230) for x in (9, 910)] == sorted((0, 51, 153, 255))


def test_moving_a_slider_draws_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []

    def plot(red: float) -> Figure:
        drawn.append(red)
        return strip(red)

    box = module._sliders(plot, {"red": [0.0, 0.5, 1.0]})
    slider, image = box.children
    before = image.value
    slider.value = 1.0
    assert drawn == [0.0, 1.0] and image.value != before
    assert Image.open(BytesIO(image.value)).convert("RGB").getpixel((9, 9)) == (255, 0, 0)


@pytest.mark.parametrize("controls", [{}, {"red": [1.0]}])
def test_an_explorer_without_a_choice_is_refused(controls: dict[str, list[float]]) -> None:
    with pytest.raises(ConfigError, match="at least one control"):
        explore(lambda **_: strip(), alt="A strip and nothing to choose.", **controls)


def test_a_card_says_its_numbers_in_words(page: list[Any]) -> None:
    show_card(Card(CLAIMS["A2"], {"decodes": Finding("decode steps", 11, 12)}, {"always": False}))
    alt = page[0][1]["image/png"]["alt"]
    assert "A2" in alt and "decode steps: 12, predicted 11" in alt and "Verdict: wrong" in alt


@pytest.mark.parametrize(
    ("value", "measured", "words"),
    [
        (10, 40, "Your guess: 10 ×. Measured: 40.0 ×: 4.0 times too low."),
        (50, 40, "Your guess: 50 ×. Measured: 40.0 ×: 1.2 times too high."),
        (38, 40, "Measured: 40.0 ×: well guessed."),
        (..., 40, "You had no guess"),
    ],
)
def test_a_guess_is_compared(value: Any, measured: float, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    predict("How many times?", value, "×").against(measured)
    assert words in capsys.readouterr().out


def test_the_machine_is_named() -> None:
    assert this_machine().startswith("this machine: ") and "PyTorch" in this_machine()
