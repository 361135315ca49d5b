"""The house, read from its source: who imports whom, on which floor a room stands, and how long the core is.

`test_floors.py`, `test_core.py`, `test_alone.py` and `docs/architecture.py` (the picture) all read it here. Nothing is
imported to find out: `ast` reads the files, so an import that never runs counts like any other.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import minillm

PACKAGE = Path(minillm.__file__).parent

# From the ground up. A room is a file or a folder of minillm/; "" is minillm/__init__.py.
FLOORS = (
    ("errors", "outputs", "config", "sampling", "prompts", "seams"),
    ("costs", "attention"),
    ("model",),
    ("cache",),
    ("engine", "generate", "text"),
    ("kernels", "quantization", "speculative", "chat", "shapes"),
    ("llm", ""),
    ("measure",),
    ("course",),
    ("cli", "__main__"),
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
EXTRAS = frozenset(("kernels", "quantization", "speculative", "chat", "shapes"))
CORE = frozenset(room for rooms in FLOORS[:7] for room in rooms) - EXTRAS
# Files that import a module whose name they compute. The names are read where they stand: seams.OFFERS is the one way
# from the core to an extra, __init__._HOME the list of public names; the lab's worker imports what a learner may use.
COMPUTED = frozenset(("seams", "", "course.lab.worker"))


class Import(NamedTuple):
    """One import: the module that it needs, without `minillm.`; and whether a package fetches a module of its own."""

    line: int
    target: str
    own: bool = False


def sources(package: Path = PACKAGE) -> dict[str, str]:
    """Dotted name, without `minillm.`, to source text; a folder's `__init__.py` has the folder's name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf8")
    return found


def room(module: str) -> str:
    return module.split(".")[0]


def imports(module: str, house: Mapping[str, str]) -> tuple[Import, ...]:
    """Every import of a minillm module in the source of `module`, wherever it stands and however it is written."""
    return _imports(module, house[module], frozenset(house), _public_names(house[""]))


@cache
def tree(source: str) -> ast.Module:
    return ast.parse(source)


@cache
def _public_names(source: str) -> tuple[tuple[str, str], ...]:
    """The names that `from minillm import …` serves, with the module of each: `_HOME` of `minillm/__init__.py`."""
    for node in tree(source).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "_HOME" for t in node.targets):
            return tuple(ast.literal_eval(node.value).items())
    raise AssertionError("minillm/__init__.py has no _HOME: say here where its public names are listed now")


@cache
def _imports(
    module: str, source: str, known: frozenset[str], public: tuple[tuple[str, str], ...]
) -> tuple[Import, ...]:
    package = module if _is_package(module, known) else module.rpartition(".")[0]
    aliases = set(_aliases(tree(source)))
    found = []
    for node in ast.walk(tree(source)):
        for name in _names(node, package, aliases):
            target = _module(name, known, dict(public))
            own = isinstance(node, ast.ImportFrom) and package == module and name == target and _parent(name) == module
            found.append(Import(node.lineno, target, own))  # type: ignore[attr-defined]
    return tuple(sorted(set(found)))


def _is_package(module: str, known: frozenset[str]) -> bool:
    return module == "" or any(_parent(other) == module for other in known if other)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _aliases(file: ast.Module) -> Iterator[str]:
    """What `import minillm` is called in this file, so that `minillm.LLM` is seen too."""
    for node in ast.walk(file):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "minillm" or (room(alias.name) == "minillm" and alias.asname is None):
                    yield alias.asname or "minillm"


def _names(node: ast.AST, package: str, aliases: set[str]) -> Iterator[str]:
    """The dotted names below `minillm` that one node of the tree reaches for; the last part may be no module."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield from _below(alias.name)
    elif isinstance(node, ast.ImportFrom):
        base = ".".join(part for part in (_base(node.level, package), node.module) if part)
        for alias in node.names:
            yield from _below(f"{base}.{alias.name}" if alias.name != "*" else base)
    elif isinstance(node, ast.Call) and node.args and _called(node.func) in ("import_module", "__import__"):
        name = node.args[0]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            rest = name.value.lstrip(".")
            base = _base(len(name.value) - len(rest), package)
            yield from _below(f"{base}.{rest}" if base else rest)
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
        yield node.attr


def _base(dots: int, package: str) -> str:
    """The package that the leading dots of a relative name stand for; without dots, nothing."""
    parts = ["minillm", *package.split(".")] if package else ["minillm"]
    return ".".join(parts[: len(parts) - dots + 1]) if dots else ""


def _below(name: str) -> Iterator[str]:
    first, _, rest = name.partition(".")
    if first == "minillm" and rest:
        yield rest


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _module(name: str, known: frozenset[str], public: Mapping[str, str]) -> str:
    """The module that a dotted name stands in: itself, the home of a public name, or what comes before it."""
    while name not in known:
        if name in public:
            return public[name]
        if "." not in name:
            return name if name in LEVEL else ""  # a room that is not there yet, or a name of minillm/__init__.py
        name = _parent(name)
    return name


@cache
def computed(source: str) -> list[int]:
    """Lines on which a module is imported whose name is no constant: nobody can read there where it leads."""
    calls = (node for node in ast.walk(tree(source)) if isinstance(node, ast.Call))
    asks = (call for call in calls if _called(call.func) in ("import_module", "__import__"))
    return [call.lineno for call in asks if not (call.args and isinstance(call.args[0], ast.Constant))]


def offers(source: str) -> dict[str, dict[str, str]]:
    """`seams.OFFERS` as it is written: seam -> device -> module."""
    for node in tree(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == "OFFERS" for t in targets):
            constants = {"ANY": "any"}
            table = node.value  # type: ignore[attr-defined]
            return {
                seam.value: {
                    constants.get(getattr(device, "id", ""), getattr(device, "value", "")): place.value
                    for device, place in zip(offer.keys, offer.values, strict=True)
                }
                for seam, offer in zip(table.keys, table.values, strict=True)
            }
    raise AssertionError("minillm/seams.py has no OFFERS: say here where the seams are listed now")


# The rules -----------------------------------------------------------------------------------------------------------


def upward(house: Mapping[str, str]) -> list[str]:
    """Imports that go up: a lower floor that needs a higher one."""
    return [
        f"{_place(module, found)} imports {found.target or 'minillm'}: from floor {LEVEL[room(module)]} up to floor "
        f"{LEVEL[room(found.target)]}"
        for module, found in _all(house)
        if LEVEL[room(module)] < LEVEL[room(found.target)]
    ]


def core_leaks(house: Mapping[str, str]) -> list[str]:
    """Imports of the core that leave it: an extra, a measurement, the course, the command line."""
    return [
        f"{_place(module, found)} is core and imports {found.target}, which is not: ask `seams.offer` for it"
        for module, found in _all(house)
        if room(module) in CORE and room(found.target) not in CORE
    ]


def extra_to_extra(house: Mapping[str, str]) -> list[str]:
    """Imports between two extras: deleting one of them would take the other with it."""
    return [
        f"{_place(module, found)} is an extra and imports {found.target}, which is another one"
        for module, found in _all(house)
        if room(module) != room(found.target) and {room(module), room(found.target)} <= EXTRAS
    ]


def unreadable(house: Mapping[str, str]) -> list[str]:
    """Imports of a name that is computed, outside the files that may."""
    return [
        f"minillm.{module}:{line} imports a module whose name is computed. Write the name, or go through minillm.seams"
        for module, source in house.items()
        if module not in COMPUTED
        for line in computed(source)
    ]


def circles(house: Mapping[str, str]) -> list[str]:
    """Modules that need each other, each group once, by every import there is; see `Import.own` for the exception."""
    graph = {module: {i.target for i in imports(module, house) if not i.own} - {module} for module in house}
    reach = {module: _reachable(module, graph) for module in graph}
    groups = {tuple(sorted({m, *(o for o in reach[m] if m in reach[o])})) for m in graph if m in reach[m]}
    return ["a circle: " + " ↔ ".join(f"minillm.{module}" for module in group) for group in sorted(groups)]


RULES = (upward, core_leaks, extra_to_extra, unreadable, circles)


def _all(house: Mapping[str, str]) -> Iterator[tuple[str, Import]]:
    for module in house:
        assert room(module) in LEVEL, f"minillm/{room(module)} has no floor: give it one in tests/house.py, FLOORS"
        for found in imports(module, house):
            yield module, found


def _place(module: str, found: Import) -> str:
    return f"minillm.{module or '__init__'}:{found.line}"


def _reachable(start: str, graph: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        new = graph.get(todo.pop(), set()) - seen
        seen |= new
        todo += new
    return seen


# The size of the core ------------------------------------------------------------------------------------------------


class Size(NamedTuple):
    """Lines of one file: those with code on them, all of them, and those of docstrings."""

    code: int
    all: int
    doc: int

    def __add__(self, other: object) -> Size:  # type: ignore[override]
        assert isinstance(other, Size)
        return Size(self.code + other.code, self.all + other.all, self.doc + other.doc)


NO_CODE = frozenset(
    (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
)


def core_files(package: Path = PACKAGE) -> list[Path]:
    """The files of the core: those of its rooms that are there."""
    places = [package / (name or "__init__") for name in sorted(CORE)]
    files = [place.with_suffix(".py") for place in places if place.with_suffix(".py").is_file()]
    return files + [file for place in places for file in sorted(place.rglob("*.py"))]


def size(source: str) -> Size:
    """Count one file. A line has code if a token stands on it, comments and docstrings aside."""
    documentation = {
        line
        for node in ast.walk(tree(source))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and ast.get_docstring(node, clean=False) is not None
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {n for t in tokens if t.type not in NO_CODE for n in range(t.start[0], t.end[0] + 1)}
    return Size(len(lines - documentation), len(source.splitlines()), len(documentation))


def total(sizes: Iterable[Size]) -> Size:
    return sum(sizes, Size(0, 0, 0))


def functions(source: str) -> list[tuple[str, int]]:
    """(name, lines) of every function, its docstring not counted and its decorators neither."""
    found = []
    for node in ast.walk(tree(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0]
            doc = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(node) is not None else 0
            found.append((node.name, (node.end_lineno or 0) - node.lineno + 1 - doc))
    return found
