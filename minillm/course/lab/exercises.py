"""The course on disk: its exercises, each with a solution, a stub, checks, mutants and hints.

    solutions/ex03_kv_cache.py            the only version written by hand
    exercises/ex03_kv_cache.py            generated from it: what a learner edits
    tests/exercises/ex03/checks.py        EXERCISE (an instance of `Exercise`) and the checks
    tests/exercises/ex03/mutants.py       MUTANTS: wrong versions that people write
    tests/exercises/ex03/given.py         optional: a module that checks lend to the learner's code; without it they
                                          lend the stub, for the toys that are given in it

A released course has neither solutions nor mutants, and no hidden checks; beside its checks it keeps stub.py, the
original of what learners edit.

What learners edit is never asked about the course. Its facts come from EXERCISE and from the solution or stub.py. An
exercise has one file, whose name is exact: a copy beside it is no exercise.
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

from minillm.course.errors import CourseError
from minillm.course.lab.checks import Check
from minillm.course.lab.stubs import make_stub
from minillm.course.lab.worker import module_of
from minillm.course.learner import FileError, read_file

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

    slug: the rest of its file's name, as kv_cache in ex03_kv_cache.py. allowed: packages that a submission may import.
    banned_operations: functions of PyTorch that would be the answer.
    preload: modules that take long to import, such as triton.
    """

    tasks: tuple[Task, ...]
    slug: str = ""
    allowed: tuple[str, ...] = ALLOWED
    banned_modules: tuple[str, ...] = BANNED_MODULES
    banned_operations: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    # filled in by the course
    id: str = ""
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

    def helpers(self) -> ModuleType:
        """What `given` defines, on the parent's side."""
        return module_of(f"given_{self.id}", self.given)

    def handed_in(self) -> bytes | FileError:
        """What is in the learner's file, or why it cannot be read."""
        try:
            return read_file(self.stub, self.file_name)
        except FileError as error:
            return error

    def original(self) -> str:
        """The learner's file as it was given. Raises CourseError if the course has lost it."""
        if self.solution.exists():
            return make_stub(_text(self.solution), self.file_name)
        return _text(self.folder / ORIGINAL)


@dataclass(frozen=True)
class Course:
    """All exercises below a folder."""

    root: Path

    @cached_property
    def exercises(self) -> dict[str, Exercise]:
        """Exercises by id, in order."""
        folders = sorted((self.root / "tests" / "exercises").glob("ex[0-9][0-9]/checks.py"))
        return {path.parent.name: _load(self.root, path.parent) for path in folders}

    def exercise(self, name: str) -> Exercise:
        """An exercise by its id, its number or its file: ex03, 3, exercises/ex03_kv_cache.py. Raises CourseError."""
        number = re.fullmatch(r"(?:ex)?(\d{1,4})", name.strip(), re.ASCII | re.IGNORECASE)
        files = {exercise.file_name: id for id, exercise in self.exercises.items()}
        key = f"ex{int(number[1]):02d}" if number else files.get(Path(name).name, "")
        if key in self.exercises:
            return self.exercises[key]
        like = self.exercises.get(Path(name).name[:4])
        hint = f"The file of {like.id} is exercises/{like.file_name}." if like else ""
        raise CourseError(f"There is no exercise {name!r}. {hint or f'There are: {self._ids()}.'}")

    def _ids(self) -> str:
        return ", ".join(self.exercises)


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
    checks = tuple(thing for thing in vars(module).values() if isinstance(thing, Check))
    mutants, given = folder / "mutants.py", folder / "given.py"
    exercise = replace(
        module.EXERCISE,
        id=folder.name,
        root=root,
        checks=checks,
        mutants=tuple(_run(mutants).MUTANTS) if mutants.exists() else (),
    )
    if not re.fullmatch(r"\w+", exercise.slug, re.ASCII):
        why = f"The exercise's file is then {folder.name}_kv_cache.py."
        raise CourseError(f'{folder / "checks.py"}: EXERCISE needs a slug of letters, such as slug="kv_cache". {why}')
    exercise = replace(exercise, given=_text(given) if given.exists() else exercise.original(), **_header(exercise))
    if unknown := {check.task for check in checks} - {task.name for task in exercise.tasks}:
        raise CourseError(f"{folder / 'checks.py'} has checks of unknown tasks: {', '.join(sorted(unknown))}.")
    return exercise


def _header(exercise: Exercise) -> dict[str, Any]:
    """What the first lines of a solution, or of the stub as it was given, say: title, minutes, difficulty."""
    path = exercise.solution if exercise.solution.exists() else exercise.folder / ORIGINAL
    start = r'\A"""Exercise \d+ · (.+?)\n.*?^Lesson: \S+ · (\d+) minutes · difficulty (●+)'
    found = re.search(start, _text(path), re.M | re.S)
    if not found:
        raise CourseError(
            f"{path} has no docstring that begins 'Exercise {exercise.id[2:]} · …' and has a line "
            "'Lesson: … · 45 minutes · difficulty ●●○○○'."
        )
    title, minutes, dots = found.groups()
    return {
        "title": title.partition(":")[0].rstrip("."),
        "question": title.partition(":")[2].strip(),
        "minutes": int(minutes),
        "difficulty": len(dots),
    }


def _text(path: Path) -> str:
    """A file of the course, which nobody edits but its authors. Raises CourseError if it is lost or damaged."""
    try:
        return path.read_text(encoding="utf8")
    except (OSError, ValueError) as error:
        raise CourseError(f"{path} belongs to the course and cannot be read ({error}). Copy it anew.") from None


def _run(path: Path) -> ModuleType:
    """A file of the course as a module of its own. Raises CourseError if it fails."""
    spec = importlib.util.spec_from_file_location(f"minillm_course_{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise CourseError(f"{path} belongs to the course and does not load ({what}). Copy it anew.") from error
    return module
