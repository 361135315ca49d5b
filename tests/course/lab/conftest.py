"""A course of one small exercise, and sandboxes that tests share: importing PyTorch takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from minillm.course.lab.exercises import Course
from minillm.course.lab.isolation import unavailable
from minillm.course.lab.release import sync
from minillm.course.lab.sandbox import Sandbox

SOLUTION = '''"""Exercise 01 · Doubling: how much is twice as much?

Lesson: 01_doubling · 5 minutes · difficulty ●○○○○
"""

import torch


class Toy:
    """Given: nothing to do here."""

    def value(self) -> int:
        return 42


def double(x):
    """Twice x.

    >>> double(2)
    4
    """
    # BEGIN SOLUTION
    return 2 * x
    # END SOLUTION


def halve(x):
    """Half of x; ValueError for what is odd."""
    # BEGIN SOLUTION
    if x % 2:
        raise ValueError("odd")
    return x // 2
    # END SOLUTION
'''
CHECKS = '''
from minillm.course.lab.checks import check
from minillm.course.lab.exercises import Exercise, Task

HINTS = ("Think.", "Multiply.", "return 2 * x")
EXERCISE = Exercise(slug="doubling", tasks=(Task("double", "Double", HINTS), Task("halve", "Halve", HINTS)),
                    banned_operations=("add",))


@check("double", points=2, seconds=3)
def tensors(case):
    """Tensors are doubled"""
    x = case.randn(3)
    case.expect(case.learner.double(x), 2 * x, "every number is doubled")


@check("halve", points=1)
def numbers(case):
    """Even numbers are halved, odd ones refused"""
    case.expect(case.learner.halve(case.given.Toy().value()), 21)
    case.raises("ValueError", case.learner.halve, 3)


@check("double", points=1, hidden=True)
def secret_zero(case):
    """Zero stays zero"""
    case.expect(case.learner.double(0), 0)
'''
MUTANTS = """
from minillm.course.lab.exercises import Mutant

MUTANTS = (
    Mutant("tripled", "somebody triples", {"2 * x": "3 * x"}),
    Mutant("squared", "somebody squares", {"2 * x": "x * x"}),
    Mutant("never_odd", "nobody looks whether x is odd", {"if x % 2:": "if False:"}),
    Mutant("float", "/ divides where // should", {"x // 2": "x / 2"}),
)
"""


@pytest.fixture
def course(tmp_path: Path) -> Course:
    """The course, with its stub."""
    folder = tmp_path / "tests" / "exercises" / "ex01"
    folder.mkdir(parents=True)
    (tmp_path / "solutions").mkdir()
    (tmp_path / "solutions" / "ex01_doubling.py").write_text(SOLUTION, encoding="utf8")
    (folder / "checks.py").write_text(CHECKS, encoding="utf8")
    (folder / "mutants.py").write_text(MUTANTS, encoding="utf8")
    sync(Course(tmp_path))
    return Course(tmp_path)


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    """A worker at the strongest level that this machine has."""
    with Sandbox("process" if unavailable("namespace") else "namespace") as opened:
        yield opened
