"""The course checks itself: a grader is worth what it refuses, so all that it must refuse is handed in to it.

For each exercise: the stub gets 0 points and a friendly message, the solution all of them, on several draws of the
inputs; every mutant loses some and is called by its name; and its author has written enough of everything. `dishonest`
hands in what cheats.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minillm.course.errors import CourseError
from minillm.course.lab.diagnosis import OURS_S
from minillm.course.lab.exercises import Course, Exercise
from minillm.course.lab.grade import Grader
from minillm.course.lab.isolation import LEVELS, unavailable
from minillm.course.lab.release import sync
from minillm.course.lab.syntax import parse

MUTANTS, HINTS, TASKS, DIAGNOSED = 4, 3, range(2, 6), 0.8
DRAWS = 8  # seeds that a solution is graded with
Kind = Literal["author", "stub", "solution", "mutant", "dishonest"]


@dataclass(frozen=True)
class Finding:
    """One thing that was tried. ok: None if it could not be tried here; detail says why, or what came out."""

    exercise: str
    kind: Kind
    subject: str
    ok: bool | None
    detail: str = ""
    diagnosed: bool = True  # a mutant: whether its own name was the diagnosis


def check_course(
    course: Course, exercises: Sequence[Exercise], *, seed: int | None = None, jobs: int = 1
) -> Iterator[Finding]:
    """Try everything for some exercises, `jobs` at a time, as it is found."""
    if not exercises:
        raise CourseError("A course without exercises proves nothing.")
    for path in sync(course, write=False):
        yield Finding(path.stem[:4], "author", path.name, False, "differs from its solution: run `minillm teach sync`")
    with ThreadPoolExecutor(jobs) as pool:
        for findings in pool.map(lambda exercise: list(check_exercise(exercise, seed)), exercises):
            yield from findings


def check_exercise(exercise: Exercise, seed: int | None = None) -> Iterator[Finding]:
    """Try the stub, the solution and the mutants of one exercise."""
    solution = exercise.solution.read_text(encoding="utf8")
    yield from _author(exercise)
    with Grader(seed=seed, seconds=OURS_S) as grader:
        yield _stub(exercise, grader)
        yield _solution(exercise, grader)
        for mutant in exercise.mutants:
            result = grader.grade(exercise, mutant.source(solution).encode())
            names = sorted({check.mutant for check in result.checks if check.mutant})
            detail = f"{result.points} of {result.max_points} points, taken for: {', '.join(names) or 'nothing known'}"
            ok = bool(result.checks) and not result.passed
            yield Finding(exercise.id, "mutant", mutant.name, ok, detail, diagnosed=names == [mutant.name])


def dishonest(course: Course, folder: Path, *, seed: int | None = None, jobs: int = 1) -> Iterator[Finding]:
    """Hand in every file of a folder to the exercise, and at the level, that its docstring names.

    The rules that are checked by reading are switched off, so that the sandbox has to hold alone. After each cheat the
    same grader gets the solution: it must still be worth all points.
    """
    cheats = defaultdict(list)
    for path in sorted(folder.glob("*.py")):
        exercise, level = claim(course, path)
        cheats[level].append((exercise, path))
    pieces = [(level, files[first::jobs]) for level, files in cheats.items() for first in range(jobs)]
    with ThreadPoolExecutor(jobs) as pool:
        for findings in pool.map(lambda piece: list(_handed_in(piece[0], piece[1], seed)), pieces):
            yield from findings


def _handed_in(level: str, cheats: Sequence[tuple[Exercise, Path]], seed: int | None) -> Iterator[Finding]:
    """What each cheat gets at a level, and the solution after it."""
    if reason := unavailable(level):
        yield from (Finding(e.id, "dishonest", path.stem, None, f"not tried: {reason}") for e, path in cheats)
        return
    with Grader(level, seed=seed, patience=1, diagnoses=0) as grader:
        for exercise, path in cheats:
            result = grader.grade(exercise, path.read_bytes(), strict=False)
            honest = grader.grade(exercise, exercise.solution.read_bytes())
            ends = sorted({check.status for check in result.checks}) or [result.status]
            detail = f"{level}: {result.points} points ({', '.join(ends)}), then {honest.points} for the solution"
            yield Finding(exercise.id, "dishonest", path.stem, result.points == 0 and honest.passed, detail)


def _stub(exercise: Exercise, grader: Grader) -> Finding:
    """A stub gets no points, and each check says which function is still to be written."""
    result = grader.grade(exercise, exercise.handed_in())
    unfriendly = [check.name for check in result.checks if check.status != "todo"]
    ok = bool(result.checks) and result.points == 0 and not unfriendly
    return Finding(exercise.id, "stub", exercise.stub.name, ok, f"not as 'to do': {unfriendly}" if unfriendly else "")


def _solution(exercise: Exercise, grader: Grader) -> Finding:
    """The solution gets all points whatever is drawn: a check that sometimes draws nonsense is unfair to a class."""
    first = grader.seed
    for seed in range(first, first + DRAWS):
        grader.reseed(seed)
        result = grader.grade(exercise, exercise.solution.read_bytes())
        if not result.passed:
            break
    grader.reseed(first)
    failed = result.first_failure
    detail = f"seed {result.seed}: {failed.name}: {failed.what}" if failed else result.message
    return Finding(exercise.id, "solution", exercise.file_name, result.passed, detail)


def _author(exercise: Exercise) -> Iterator[Finding]:
    """What is missing for an exercise to be complete."""
    tested = {check.task for check in exercise.checks}
    demands = {
        f"{min(TASKS)} to {max(TASKS)} tasks": len(exercise.tasks) in TASKS,
        f"{MUTANTS} mutants": len(exercise.mutants) >= MUTANTS,
        f"{HINTS} hints for each task": all(len(task.hints) >= HINTS for task in exercise.tasks),
        "a check for each task": tested == {task.name for task in exercise.tasks},
        "a public and a hidden check": {check.hidden for check in exercise.checks} == {True, False},
    }
    for demand, ok in demands.items():
        yield Finding(exercise.id, "author", demand, ok)


def claim(course: Course, path: Path) -> tuple[Exercise, str]:
    """The exercise and the level in the last line of a cheat's docstring: `ex03, stopped by: namespace`."""
    last = (ast.get_docstring(parse(path.read_text(encoding="utf8"))) or "").splitlines()[-1:]
    name, _, level = last[0].partition(", stopped by: ") if last else ("", "", "")
    if level not in LEVELS:
        raise CourseError(f"{path} must say in the last line of its docstring: ex03, stopped by: {' | '.join(LEVELS)}.")
    return course.exercise(name), level
