"""The house has floors: an import goes down or stays, extras stand apart from the core and from each other.

`house.py` reads the imports. Here the house as it is passes every rule; then one forbidden import of each kind is
planted in a copy of a file, and the rule that is meant for it says so.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests import house

Rule = Callable[[Mapping[str, str]], list[str]]
HOUSE = house.sources()


@pytest.mark.parametrize("rule", house.RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rules(rule: Rule) -> None:
    assert rule(HOUSE) == []


def test_the_seams_lead_to_extras_and_nowhere_else() -> None:
    """`seams.OFFERS` is the one way from the core to an extra, and the one list of strings that no import shows."""
    for seam, devices in house.offers(HOUSE["seams"]).items():
        for device, module in devices.items():
            name = module.removeprefix("minillm.")
            assert house.room(name) in house.EXTRAS, f"seam {seam!r} on {device!r} leads to {module}: that is no extra"
            assert name in HOUSE, f"seam {seam!r} on {device!r} leads to {module}: there is no such module"


def test_every_room_has_a_floor() -> None:
    assert {house.room(module) for module in HOUSE} <= house.LEVEL.keys(), "give it one in tests/house.py, FLOORS"


def test_the_engine_never_sees_transformers_models() -> None:
    """transformers serves tokenizers and configs; its modelling code is a rival to measure, nothing more."""
    for module, source in HOUSE.items():
        if house.room(module) != "measure":
            assert "AutoModel" not in source, module


# The rules have teeth ------------------------------------------------------------------------------------------------

# kind of import: (file of the house, what is planted in it, what the rule must name)
WAYS = {
    "at the top": ("engine/request.py", "from minillm.llm import LLM", "llm"),
    "of a module": ("engine/request.py", "import minillm.llm", "llm"),
    "of a module, renamed": ("engine/request.py", "import minillm.llm as door", "llm"),
    "of a module, from its package": ("costs/steps.py", "from minillm.engine import engine", "engine.engine"),
    "in a function": ("sampling.py", "def later():\n    from minillm.engine.engine import Engine", "engine.engine"),
    "for type checking": ("outputs.py", "if TYPE_CHECKING:\n    from minillm.model.decoder import Decoder", "model"),
    "in a class": (
        "errors.py",
        "class Late:\n    from minillm.config import EngineConfig\n    import minillm.cli",
        "cli",
    ),
    "in a try": ("config.py", "try:\n    import minillm.model.loader\nexcept ImportError:\n    pass", "model.loader"),
    "of a public name": ("cache/blocks.py", "from minillm import LLM", "llm"),
    "of a public name, renamed": ("engine/batch.py", "from minillm import LLM as Door", "llm"),
    "of a public name, as attribute": ("engine/trace.py", "import minillm\nmodel = minillm.LLM('tiny')", "llm"),
    "of a public name, inside": ("errors.py", "def f():\n    from minillm import load_model", "model.loader"),
    "of a room": ("text.py", "from minillm import cli", "cli"),
    "of everything": ("costs/formulas.py", "from minillm.measure import *", "measure"),
    "relative": ("attention/tiled.py", "from ..engine.engine import Engine", "engine.engine"),
    "relative, of a room": ("cache/paged.py", "from .. import llm", "llm"),
    "relative, in a package": ("model/__init__.py", "from ..cache import paged", "cache.paged"),
    "by importlib": (
        "model/rope.py",
        "import importlib\nimportlib.import_module('minillm.cache.paged')",
        "cache.paged",
    ),
    "by import_module": (
        "model/rope.py",
        "from importlib import import_module\nimport_module('minillm.cache.blocks')",
        "cache.blocks",
    ),
    "by importlib, relative": (
        "model/rope.py",
        "import importlib\nimportlib.import_module('..llm', __package__)",
        "llm",
    ),
    "by __import__": ("engine/verify.py", "__import__('minillm.cli.teach')", "cli.teach"),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_import_that_goes_up_is_seen(tmp_path: Path, way: str) -> None:
    file, planted, target = WAYS[way]
    assert_seen(house.upward, tmp_path, file, planted, f" imports {target}")


CORE_LEAKS = {
    "the engine knows an extra": ("engine/engine.py", "from minillm.speculative import attach"),
    "the door knows an extra, which stands below it": ("llm.py", "from minillm.speculative import attach"),
    "the door knows an extra for its types": (
        "llm.py",
        "if TYPE_CHECKING:\n    from minillm.quantization.formats import Format",
    ),
    "attention knows a kernel": ("attention/paged.py", "def f():\n    from minillm.kernels.cpu import grouped"),
    "the engine knows the course": ("engine/engine.py", "from minillm.course.use import Used"),
    "the door knows the course": ("llm.py", "def f():\n    import minillm.course.use"),
    "the public names know the course": ("__init__.py", "from minillm.course import lab"),
    "the closed forms know a measurement": ("costs/formulas.py", "from minillm.measure.hardware import Hardware"),
    "the seams import what they offer": ("seams.py", "import minillm.kernels"),
}


@pytest.mark.parametrize("way", CORE_LEAKS)
def test_a_core_that_knows_what_it_must_not_is_seen(tmp_path: Path, way: str) -> None:
    assert_seen(house.core_leaks, tmp_path, *CORE_LEAKS[way], "is core and imports")


@pytest.mark.parametrize(
    ("file", "planted"),
    [
        ("kernels/__init__.py", "from minillm.quantization.formats import Format"),
        ("quantization/formats.py", "def f():\n    import minillm.kernels.cpu"),
        ("speculative/draft.py", "if TYPE_CHECKING:\n    from minillm.quantization import cache"),
        ("speculative/ngram.py", "from .. import kernels"),
    ],
)
def test_an_extra_that_needs_another_is_seen(tmp_path: Path, file: str, planted: str) -> None:
    assert_seen(house.extra_to_extra, tmp_path, file, planted, "which is another one")


@pytest.mark.parametrize(
    "call", ["import_module(name)", "importlib.import_module('minillm.' + name)", "__import__(f'{n}')"]
)
def test_a_computed_import_is_seen(tmp_path: Path, call: str) -> None:
    assert_seen(house.unreadable, tmp_path, "engine/runner.py", f"def f(name):\n    return {call}", "computed")


@pytest.mark.parametrize(
    ("file", "planted", "circle"),
    [
        ("costs/steps.py", "from minillm.costs.formulas import step_flops", "costs.formulas ↔ minillm.costs.steps"),
        ("errors.py", "if TYPE_CHECKING:\n    from minillm.config import ModelConfig", "config ↔ minillm.errors"),
        (
            "engine/request.py",
            "def f():\n    from minillm.engine.verify import Draft",
            "engine.request ↔ minillm.engine.verify",
        ),
    ],
)
def test_a_circle_is_seen(tmp_path: Path, file: str, planted: str, circle: str) -> None:
    """Also between modules of one floor, and when it closes only for a type checker or inside a function."""
    assert_seen(house.circles, tmp_path, file, planted, circle)


def test_a_package_that_fetches_its_own_module_is_no_circle() -> None:
    """`from minillm.attention import tiled` in `attention/__init__.py`: Python serves it half-loaded, as intended."""
    module = "from minillm.attention import Masks"
    fetching = {"": "_HOME = {}", "attention": "from minillm.attention import tiled", "attention.tiled": module}
    importing = {**fetching, "attention": "from minillm.attention.tiled import merge"}
    assert house.circles(fetching) == []
    assert house.circles(importing) == ["a circle: minillm.attention ↔ minillm.attention.tiled"]


def test_what_goes_down_or_stays_is_allowed(tmp_path: Path) -> None:
    """The other side: none of these is refused, or the rules would catch everything."""
    planted = plant(
        tmp_path, "engine/runner.py", "from minillm.cache import blocks\nfrom ..model.decoder import Decoder"
    )
    for rule in house.RULES:
        assert rule(planted) == rule(HOUSE)


def assert_seen(rule: Rule, folder: Path, file: str, planted: str, message: str) -> None:
    """The rule says one thing more of the house with the planted import than without: where it is, and what it is."""
    before = rule(HOUSE)
    said = [line for line in rule(plant(folder, file, planted)) if line not in before]
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert any(f"minillm.{module}" in line and message in line for line in said), said


def plant(folder: Path, file: str, text: str) -> dict[str, str]:
    """The house, with `text` added at the end of a copy of one of its files."""
    copy = folder / file
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(house.PACKAGE / file, copy)
    copy.write_text(copy.read_text(encoding="utf8") + f"\n{text}\n", encoding="utf8")
    return {**HOUSE, **house.sources(folder)}
