"""The map of the course names every lesson with its question, its minutes and a picture that exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from notebooks.build import FOLDER, sources

MAP = (FOLDER / "README.md").read_text(encoding="utf8")


@pytest.mark.parametrize("source", sources(), ids=lambda path: path.stem)
def test_the_map_says_what_the_lesson_says(source: Path) -> None:
    lesson = source.read_text(encoding="utf8")
    row = next((line for line in MAP.splitlines() if f"({source.stem}.ipynb)" in line), None)
    assert row, f"notebooks/README.md has no row for {source.stem}"
    title, question, minutes = (
        re.search(pattern, lesson, re.MULTILINE)
        for pattern in (r"^# (\d\d · .+)$", r"^\*\*(.+)\*\*$", r"^(\d+) minutes")
    )
    assert title and question and minutes, f"{source.name} begins with a title, a question and its minutes"
    assert f"**{title[1]}**" in row and question[1] in row and f"| {minutes[1]} |" in row
    assert f"thumbnails/{source.stem[:2]}.png" in row


def test_every_exercise_has_its_lesson() -> None:
    exercises = {path.stem.removeprefix("ex") for path in (FOLDER.parent / "solutions").glob("ex*.py")}
    assert {path.stem for path in sources()} <= exercises
