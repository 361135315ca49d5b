"""The house has floors: an import goes down or stays, never up, and nothing forms a circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import minillm

PACKAGE = Path(minillm.__file__).parent
FLOORS = [
    ["errors"],
    ["config", "outputs"],
    ["sampling"],
    ["attention"],
    ["model"],
    ["cache"],
    ["engine", "generate"],
    ["speculative"],
    ["text", "llm", "use"],
    ["measure"],
    ["claims"],
    ["viz", "lab"],
    ["cli", "__main__"],
]
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}


def modules() -> dict[str, Path]:
    """Dotted name (without the package's own) to file; a package's `__init__` has the package's name."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(path: Path, *, top_level_only: bool) -> set[str]:
    """The minillm modules that a file imports, at its top level (type-checking blocks aside) or anywhere."""
    tree = ast.parse(path.read_text(encoding="utf8"))
    nodes = list(tree.body) if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("minillm."):
            found.add(node.module.removeprefix("minillm."))
        elif isinstance(node, ast.ImportFrom) and node.module == "minillm":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("minillm.") for alias in node.names if alias.name.startswith("minillm.")}
    return found


@pytest.mark.parametrize("name", [name for name in modules() if name])
def test_imports_never_go_up(name: str) -> None:
    own = name.split(".")[0]
    assert own in FLOOR, f"minillm/{own} has no floor yet: give it one in this test and in CONTRIBUTING.md"
    for target in imports(modules()[name], top_level_only=False):
        other = target.split(".")[0]
        if other in FLOOR:
            assert FLOOR[other] <= FLOOR[own], f"{name} (floor {FLOOR[own]}) imports {target} (floor {FLOOR[other]})"


def test_no_circles() -> None:
    """A package that fetches one of its own modules (`from minillm.attention import paged`) is none."""
    known = modules()
    graph = {name: (imports(path, top_level_only=True) & known.keys()) - {name} for name, path in known.items() if name}
    TopologicalSorter(graph).prepare()


def test_the_engine_never_sees_transformers_models() -> None:
    """transformers serves tokenizers and configs; its modelling code is a rival to measure, nothing more."""
    for name, path in modules().items():
        if not name.startswith("measure."):
            assert "AutoModel" not in path.read_text(encoding="utf8"), name


def test_a_mutant_is_caught(tmp_path: Path) -> None:
    """The check itself: an import inside a function, of a higher floor, is seen."""
    file = tmp_path / "sampling.py"
    file.write_text("def f():\n    from minillm.engine.engine import Engine\n")
    assert imports(file, top_level_only=False) == {"engine.engine"}
    assert imports(file, top_level_only=True) == set()
