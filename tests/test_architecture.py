"""The page of the house says what is so: its pictures, its rooms, the journey, and the reading order."""

from __future__ import annotations

import ast
import re
import xml.etree.ElementTree as ET
from importlib.util import module_from_spec, spec_from_file_location
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest

from tests import house

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf8")
MAX_FILES = 17  # to follow one decode step


def load() -> ModuleType:
    spec = spec_from_file_location("architecture", ROOT / "docs" / "architecture.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


architecture = load()
PICTURES = {"house.svg": architecture.draw_house(), "journey.svg": architecture.draw_journey()}


@pytest.mark.parametrize("name", PICTURES)
def test_the_committed_picture_is_what_the_script_draws(name: str) -> None:
    committed = (ROOT / "docs" / name).read_text(encoding="utf8")
    assert committed == PICTURES[name], f"docs/{name} shows another house: run `python docs/architecture.py`"
    assert f"]({name})" in PAGE


@pytest.mark.parametrize("name", PICTURES)
def test_everything_in_a_picture_can_be_read(name: str) -> None:
    """Letters of 12 px or more, inside the picture and inside their box; no box on another."""
    drawing = ET.fromstring(PICTURES[name])
    width, height = float(drawing.attrib["width"]), float(drawing.attrib["height"])
    boxes = [tuple(float(r.get(k, 0)) for k in ("x", "y", "width", "height")) for r in each(drawing, "rect")][1:]
    for (x, y, w, h), (x2, y2, w2, h2) in combinations(boxes, 2):
        assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y
    lines = []
    for words in each(drawing, "text"):
        x, y, size = (float(words.attrib[key]) for key in ("x", "y", "font-size"))
        assert size >= 12
        assert 0 < y < height
        long = size * 0.56 * len(words.text or "")
        if "transform" in words.attrib:
            assert size < x < width and long / 2 < y < height - long / 2
            continue
        left = x - long * {"start": 0, "middle": 0.5, "end": 1}[words.attrib["text-anchor"]]
        assert left > 0 and left + long < width, words.text
        lines.append((left, y - size, long, size))
        for bx, by, bw, bh in boxes:
            if bx < x <= bx + bw and by < y < by + bh:
                assert bx < left and left + long < bx + bw and y + 3 < by + bh, words.text
    for (x, y, w, h), (x2, y2, w2, h2) in combinations(lines, 2):
        assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y


def each(drawing: ET.Element, tag: str) -> list[ET.Element]:
    return list(drawing.iter(f"{{http://www.w3.org/2000/svg}}{tag}"))


def test_every_room_is_in_the_picture_and_on_the_page() -> None:
    assert set(architecture.ROOMS) | set(architecture.SAME_DOOR) == house.LEVEL.keys()
    rows = re.findall(r"^\| `(\w+)` \| [A-Z].+\. \| .+\. \|$", PAGE, re.M)
    assert sorted(rows) == sorted(architecture.ROOMS)


def test_contributing_names_the_floors() -> None:
    rows = re.findall(r"^\| (\d) \| (.+?) \|", CONTRIBUTING, re.M)
    named = [{"" if name == "__init__" else name for name in re.findall(r"`(\w+)`", rooms)} for _, rooms in rows]
    assert [int(level) for level, _ in rows] == list(range(len(house.FLOORS)))
    assert named == [set(rooms) for rooms in house.FLOORS]


def test_the_stations_of_the_journey_exist() -> None:
    for station in architecture.JOURNEY:
        path = house.PACKAGE / station.file
        assert path.exists(), f"the journey passes {station.file}, which is not there"
        if station.name:
            assert defines(path, station.name), f"minillm/{station.file} defines no {station.name}"


def defines(path: Path, name: str) -> bool:
    """Whether the file has this function or class, or this method of this class."""
    scope: list[ast.stmt] = ast.parse(path.read_text(encoding="utf8")).body
    for part in name.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef)
        found = [node for node in scope if isinstance(node, kinds) and node.name == part]
        if not found:
            return False
        scope = found[0].body
    return True


def test_one_decode_step_is_followed_in_few_files() -> None:
    """The reading order in CONTRIBUTING.md: files of the core that exist, each once."""
    files = re.findall(r"^\d+\. `minillm/(.+?)`", CONTRIBUTING, re.M)
    assert 0 < len(files) <= MAX_FILES and len(set(files)) == len(files)
    core = {path.relative_to(house.PACKAGE).as_posix() for path in house.core_files()}
    assert set(files) <= core, f"not there, or not core: {sorted(set(files) - core)}"
