"""The core is read in an afternoon: what belongs to it, how long it may be, and how much of it explains the rest.

Counted are lines with code on them, lines of docstrings, and all lines. `GOAL` leaves 150 of 2,600 lines of code to
what server and parallelism will need. It is not reached yet; `REACHED` is what is, and may only fall. `BEFORE` is
the core of the first edition (f23a726), counted in the same way: the files that did then what the core does now, closed
forms included.
"""

from __future__ import annotations

import ast

import pytest

from tests import house

GOAL = house.Size(code=2_450, all=3_900, doc=0)
REACHED = house.Size(code=2_600, all=4_295, doc=0)
MAX_FUNCTION = 40
BEFORE = house.Size(code=3_036, all=4_886, doc=983)

FILES = house.core_files()
SOURCES = {file.relative_to(house.PACKAGE).as_posix(): file.read_text(encoding="utf8") for file in FILES}
SIZES = {name: house.size(source) for name, source in SOURCES.items()}
TOTAL = house.total(SIZES.values())


def table() -> str:
    """What a failing test shows: the size of each file, the longest first."""
    rows = sorted(SIZES.items(), key=lambda row: -row[1].code)
    lines = [f"{size.code:6} {size.all:6} {size.doc:6}  {name}" for name, size in [*rows, ("the core", TOTAL)]]
    return "\n".join(["", "  code    all    doc  minillm/", *lines])


def test_the_core_is_these_rooms() -> None:
    """By name, so that nothing leaves the core by being moved, and nothing joins it unseen."""
    files = ("", "llm", "generate", "sampling", "prompts", "text", "config", "outputs", "errors", "seams")
    folders = ("costs", "model", "attention", "cache", "engine")
    assert set(files + folders) == house.CORE
    rooms = {name.split("/")[0].removesuffix(".py").replace("__init__", "") for name in SOURCES}
    assert rooms == house.CORE, "a room of the core is empty, or a file has another name"


def test_the_core_gets_no_longer() -> None:
    """Once it is down to `GOAL`, that takes the place of `REACHED`."""
    assert TOTAL.code <= REACHED.code, f"{TOTAL.code} of code, {REACHED.code} before, {GOAL.code} wanted.{table()}"
    assert TOTAL.all <= REACHED.all, f"{TOTAL.all} lines, {REACHED.all} so far, {GOAL.all} wanted.{table()}"


def test_the_core_explains_itself_as_much_as_before() -> None:
    share, before = TOTAL.doc / TOTAL.all, BEFORE.doc / BEFORE.all
    assert share >= before, f"{share:.2%} of the core's lines are docstrings, {before:.2%} before.{table()}"


def test_its_functions_fit_on_a_screen() -> None:
    """Signature and body, without the docstring."""
    lengths = [
        (lines, f"{name}: {function}")
        for name, source in SOURCES.items()
        for function, lines in house.functions(source)
    ]
    long = [f"{where} has {lines} lines" for lines, where in sorted(lengths, reverse=True) if lines > MAX_FUNCTION]
    assert not long, f"{MAX_FUNCTION} at most: " + ", ".join(long)


def test_no_line_hides_two() -> None:
    """Lines are not saved by joining them: one statement on a line, and none after a colon."""
    for name, source in SOURCES.items():
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
        starts = [node.lineno for node in nodes if ast.unparse(node) != "..."]  # the body of a protocol's method
        doubled = {line for line in starts if starts.count(line) > 1}
        assert not doubled, f"minillm/{name}, lines {sorted(doubled)}: two statements on one line"


# The counter is right ------------------------------------------------------------------------------------------------

SAMPLE = '''"""A docstring
of two lines."""

import os  # a comment beside code


# a comment alone
class A:
    """One line."""

    name = """a string
    that is no docstring"""

    @property
    def f(self) -> int:
        """Two

        and a blank one."""
        value = (
            1,
            2,
        )

        return len(value)
'''


def test_lines_are_counted_by_what_stands_on_them() -> None:
    assert house.size(SAMPLE) == house.Size(code=11, all=24, doc=6)


def test_a_function_is_counted_without_its_docstring() -> None:
    assert house.functions(SAMPLE) == [("f", 7)]


@pytest.mark.parametrize(
    ("added", "code", "doc"),
    [("\n\n", 0, 0), ("# words\n", 0, 0), ("x = 1\n", 1, 0), ("def g():\n    'why'\n", 1, 1), ("(\n1,\n\n)\n", 3, 0)],
)
def test_what_is_added_is_counted(added: str, code: int, doc: int) -> None:
    before, after = house.size(SAMPLE), house.size(SAMPLE + added)
    assert (after.code - before.code, after.doc - before.doc) == (code, doc)
    assert after.all - before.all == added.count("\n")
