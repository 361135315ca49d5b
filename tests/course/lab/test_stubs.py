"""Stubs keep what is the course's and lose what is the answer."""

from __future__ import annotations

import ast

import pytest

from minillm.course.errors import CourseError
from minillm.course.lab.exercises import find_course
from minillm.course.lab.release import sync, without_hidden
from minillm.course.lab.stubs import make_stub

SOLUTIONS = sorted((find_course().root / "solutions").glob("ex*.py"))


def test_a_block_becomes_one_line() -> None:
    source = "def f(x):\n    '''Doc.'''\n    # BEGIN SOLUTION\n    y = x\n    return y\n    # END SOLUTION\n\n\nz = 1\n"
    stub = "def f(x):\n    '''Doc.'''\n    raise NotImplementedError(\"f is yours to write\")\n\n\nz = 1\n"
    assert make_stub(source) == stub


def test_markers_in_strings_are_strings() -> None:
    source = "def f():\n    # BEGIN SOLUTION\n    return '''\n# END SOLUTION\n'''\n    # END SOLUTION\n"
    assert make_stub(source).count("\n") == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\n", "no block"),
        ("# BEGIN SOLUTION\nx = 1\n", "open block"),
        ("# BEGIN SOLUTION\n# BEGIN SOLUTION\n# END SOLUTION\n", "line 2"),
        ("# END SOLUTION\n", "line 1"),
        ("def f():\n    # BEGIN SOLUTION\n    (\n    # END SOLUTION\n    )\n", "does not compile"),
    ],
)
def test_markers_that_do_not_fit_are_refused(source: str, message: str) -> None:
    with pytest.raises(CourseError, match=message):
        make_stub(source)


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_no_line_of_an_answer_is_left(path) -> None:
    """Except for what stands outside of the markers, too: returning the stub's own helper is no secret."""
    source = path.read_text(encoding="utf8")
    stub = make_stub(source)
    outside, answers, inside = [], [], False
    for line in map(str.strip, source.splitlines()):
        inside = line != "# END SOLUTION" and (inside or line == "# BEGIN SOLUTION")
        (answers if inside else outside).append(line)
    left = {line for line in answers if len(line) > 12} & set(map(str.strip, stub.splitlines())) - set(outside)
    assert not left


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_signatures_and_docstrings_stay(path) -> None:
    source = path.read_text(encoding="utf8")
    stub, solution = public(ast.parse(make_stub(source))), public(ast.parse(source))
    assert stub.items() <= solution.items()
    assert {name for name in solution if not name.startswith("_")} - stub.keys() <= {"bound"}


def public(tree: ast.Module) -> dict[str, tuple[str, str | None]]:
    """Arguments and docstring of every function with a docstring."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)]
    return {node.name: (ast.unparse(node.args), ast.get_docstring(node)) for node in functions}


def test_the_committed_stubs_are_generated() -> None:
    stale = sync(find_course(), write=False)
    assert not stale, f"run minillm teach sync: {stale}"


def test_hidden_checks_are_cut_out() -> None:
    public = "@check('a')\ndef one(case):\n    pass\n\n\n"
    hidden = "@check('a', hidden=True)\ndef two(case):\n    '''Doc.'''\n    pass\n"
    assert without_hidden(public + hidden + public) == public + public
    assert without_hidden("@check('a', hidden=False)\ndef one(case):\n    pass\n").startswith("@check")
