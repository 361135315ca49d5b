"""A result in a notebook: a table for the eye, the same words as text for everybody else."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from minillm.course.foreign import visible
from minillm.course.lab.exercises import Exercise, find_course
from minillm.course.lab.grade import Grader
from minillm.course.lab.progress import Progress
from minillm.course.lab.results import Result

SIGNS = {"passed": "✓", "todo": "·"}


@dataclass(frozen=True)
class Shown:
    """A result that a notebook shows by itself when it is the last line of a cell."""

    exercise: Exercise
    result: Result

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{sign}</td><td style='text-align:left'>{escape(title)}</td><td>{points}</td></tr>"
            for sign, title, points in self._rows()
        )
        told = "".join(f"<p>{escape(line)}</p>" for line in self._told())
        return f"<b>{escape(self._heading())}</b><table>{rows}</table>{told}"

    def __repr__(self) -> str:
        rows = [f"{sign} {title} {points}" for sign, title, points in self._rows()]
        return "\n".join([self._heading(), *rows, *self._told()])

    def _heading(self) -> str:
        result = self.result
        return f"{self.exercise.id} · {self.exercise.title} {result.points} of {result.max_points} points"

    def _rows(self) -> list[tuple[str, str, str]]:
        checks = self.result.checks
        return [(SIGNS.get(c.status, "✗"), c.shown_title, f"{c.points}/{c.max_points}") for c in checks]

    def _told(self) -> list[str]:
        """What to do next."""
        if self.result.passed:
            return ["All checks passed."]
        failure = self.result.first_failure
        told = failure.told() if failure else [self.result.message]
        return [*map(visible, told), f"Stuck? minillm lab hint {self.exercise.id}"]


def tested(name: str) -> Shown:
    """Grade a learner's file, remember how it went, and give back what shows it."""
    course = find_course()
    exercise = course.exercise(name)
    with Grader(diagnoses=1) as grader:
        result = grader.grade(exercise, exercise.handed_in())
    Progress(course).record(exercise, result)
    return Shown(exercise, result)
