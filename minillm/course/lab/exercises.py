"""The course on disk: its exercises, each with a solution, a stub, checks, mutants and hints.

    solutions/ex03_kv_cache.py            the only version written by hand
    exercises/ex03_kv_cache.py            generated from it: what a learner edits
    tests/exercises/ex03/checks.py        EXERCISE (an instance of `Exercise`) and the checks
    tests/exercises/ex03/mutants.py       MUTANTS: wrong versions that people write
    tests/exercises/ex03/given.py         optional: a module that checks lend to the learner's code; without it they
                                          lend the stub, for the toys that are given in it

A released course has neither solutions nor mutants, and no hidden checks; beside its checks it keeps stub.py, the
original of what learners edit.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from minillm.course.lab.checks import Check
from minillm.course.lab.stubs import make_stub
from minillm.course.lab.worker import module_of
from minillm.errors import CourseError

ALLOWED = (
    *("__future__", "abc", "bisect", "collections", "contextlib", "copy", "dataclasses", "enum", "functools"),
    *("hashlib", "heapq", "itertools", "math", "operator", "random", "statistics", "torch", "typing"),
)
ORIGINAL = "stub.py"
BANNED_MODULES = ("minillm", "transformers", "vllm", "flash_attn")
PACKAGE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Task:
    """One thing to write: a function or a few that belong together. Hints go from a nudge to nearly the solution."""

    name: str
    title: str
    hints: tuple[str, ...]


@dataclass(frozen=True)
class Mutant:
    """A wrong version that people really write: pieces of the solution, each replaced by another.

    explanation: completes "This is what comes out when …".
    """

    name: str
    explanation: str
    pieces: Mapping[str, str]

    def source(self, solution: str) -> str:
        """The solution with the mistake. Raises CourseError unless each piece is there exactly once."""
        for old, new in self.pieces.items():
            if solution.count(old) != 1:
                raise CourseError(f"Mutant {self.name!r}: {old!r} stands {solution.count(old)} times in the solution.")
            solution = solution.replace(old, new)
        return solution


@dataclass(frozen=True)
class Exercise:
    """What an author says about an exercise, and where `Course` found it.

    allowed: packages that a submission may import. banned_operations: functions of PyTorch that would be the answer.
    preload: modules that take long to import, such as triton.
    """

    tasks: tuple[Task, ...]
    allowed: tuple[str, ...] = ALLOWED
    banned_modules: tuple[str, ...] = BANNED_MODULES
    banned_operations: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    # filled in by the course
    id: str = ""
    slug: str = ""
    title: str = ""
    question: str = ""
    minutes: int = 0
    difficulty: int = 0  # 1 to 5
    root: Path = Path()
    checks: tuple[Check, ...] = ()
    mutants: tuple[Mutant, ...] = ()
    given: str = ""

    @property
    def file_name(self) -> str:
        """Name of the learner's file."""
        return f"{self.id}_{self.slug}.py"

    @property
    def stub(self) -> Path:
        """The learner's file."""
        return self.root / "exercises" / self.file_name

    @property
    def solution(self) -> Path:
        """The solution; a released course has none."""
        return self.root / "solutions" / self.file_name

    @property
    def folder(self) -> Path:
        """Where its checks are."""
        return self.root / "tests" / "exercises" / self.id

    @property
    def points(self) -> int:
        """Points of all checks."""
        return sum(check.points for check in self.checks)

    def task(self, name: str) -> Task:
        """The task of this name."""
        return next(task for task in self.tasks if task.name == name)

    def helpers(self) -> ModuleType:
        """What `given` defines, on the parent's side."""
        return module_of(f"given_{self.id}", self.given)

    def original(self) -> str:
        """The learner's file as it was given."""
        if self.solution.exists():
            return make_stub(self.solution.read_text(encoding="utf8"), self.file_name)
        return (self.folder / ORIGINAL).read_text(encoding="utf8")


@dataclass(frozen=True)
class Course:
    """All exercises below a folder."""

    root: Path

    @cached_property
    def exercises(self) -> dict[str, Exercise]:
        """Exercises by id, in order."""
        folders = sorted((self.root / "tests" / "exercises").glob("ex*/checks.py"))
        return {path.parent.name: _load(self.root, path.parent) for path in folders}

    def exercise(self, name: str) -> Exercise:
        """An exercise by its id, its number or its file: ex03, 3, exercises/ex03_kv_cache.py. Raises CourseError."""
        found = re.match(r"(?:ex)?(\d+)", Path(name).name)
        key = f"ex{int(found[1]):02d}" if found else name
        if key not in self.exercises:
            raise CourseError(f"There is no exercise {name!r}. There are: {', '.join(self.exercises)}.")
        return self.exercises[key]


def find_course(start: Path | None = None) -> Course:
    """The course around a folder (by default the current one), else the one that this package lies in.

    Raises CourseError if there is none: a package from the index comes without exercises.
    """
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents, PACKAGE.parent):
        if (folder / "tests" / "exercises").is_dir():
            return Course(folder)
    raise CourseError(f"{here} is not in a course. Go to the folder that holds exercises/ and tests/exercises/.")


def _load(root: Path, folder: Path) -> Exercise:
    """One exercise with everything that belongs to it. Raises CourseError if its parts do not fit together."""
    module = _run(folder / "checks.py")
    header = _header(root, folder.name)
    checks = tuple(thing for thing in vars(module).values() if isinstance(thing, Check))
    mutants, given = folder / "mutants.py", folder / "given.py"
    exercise = replace(
        module.EXERCISE,
        id=folder.name,
        **header,
        root=root,
        checks=checks,
        mutants=tuple(_run(mutants).MUTANTS) if mutants.exists() else (),
    )
    exercise = replace(exercise, given=given.read_text(encoding="utf8") if given.exists() else exercise.original())
    if unknown := {check.task for check in checks} - {task.name for task in exercise.tasks}:
        raise CourseError(f"{folder / 'checks.py'} has checks of unknown tasks: {', '.join(sorted(unknown))}.")
    return exercise


def _header(root: Path, id: str) -> dict[str, Any]:
    """What the first lines of a solution (or its stub) say: slug, title, minutes, difficulty."""
    paths = [*(root / "solutions").glob(f"{id}_*.py"), *(root / "exercises").glob(f"{id}_*.py")]
    text = paths[0].read_text(encoding="utf8") if paths else ""
    found = re.search(r'^"""Exercise \d+ · (.+?)\n.*?^Lesson: \S+ · (\d+) minutes · difficulty (●+)', text, re.M | re.S)
    if not found:
        raise CourseError(
            f"{id} has checks, but no solutions/{id}_….py whose docstring begins 'Exercise {id[2:]} · …' and "
            "has a line 'Lesson: … · 45 minutes · difficulty ●●○○○'."
        )
    title, minutes, dots = found.groups()
    return {
        "slug": paths[0].stem.partition("_")[2],
        "title": title.partition(":")[0].rstrip("."),
        "question": title.partition(":")[2].strip(),
        "minutes": int(minutes),
        "difficulty": len(dots),
    }


def _run(path: Path) -> ModuleType:
    """A file of the course as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"minillm_course_{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
