"""What a learner has done so far: `.minillm/state.json` in the course's folder. It survives restarts and crashes."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from minillm.course.errors import CourseError
from minillm.course.lab.exercises import Course, Exercise
from minillm.course.lab.results import Result

SCHEMA = 1


@dataclass
class Standing:
    """Where a learner stands with one exercise. Passed once is passed; `hints` counts those seen, by task."""

    points: int = 0
    max_points: int = 0
    passed: bool = False
    given_up: bool = False
    tries: int = 0
    hints: dict[str, int] = field(default_factory=dict)
    stuck_at: str = ""  # the task of the first check that does not pass

    def __post_init__(self) -> None:
        """Somebody may have edited the file. Raises TypeError for what cannot be."""
        numbers = (self.points, self.max_points, self.tries, *self.hints.values())
        if not all(type(number) is int for number in numbers) or type(self.stuck_at) is not str:
            raise TypeError("a standing with values of another type")

    @property
    def sign(self) -> str:
        """One word for a list."""
        return "passed" if self.passed else "given up" if self.given_up else "begun" if self.tries else "to do"


class Progress:
    """The standings of all exercises, kept in a file that is always written whole."""

    def __init__(self, course: Course) -> None:
        self.path = course.root / ".minillm" / "state.json"
        self.standings: dict[str, Standing] = self._load()

    def of(self, exercise: Exercise) -> Standing:
        """The standing of one exercise."""
        return self.standings.setdefault(exercise.id, Standing())

    def record(self, exercise: Exercise, result: Result) -> None:
        """Remember how a test ended."""
        standing = self.of(exercise)
        standing.points, standing.max_points = result.points, result.max_points
        standing.passed |= result.passed
        standing.tries += 1
        standing.stuck_at = result.first_failure.task if result.first_failure else ""
        self.save()

    def save(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(exist_ok=True)
        data = {"schema": SCHEMA, "exercises": {id: asdict(standing) for id, standing in self.standings.items()}}
        write_whole(self.path, json.dumps(data, indent=1))

    def _load(self) -> dict[str, Standing]:
        try:
            data = json.loads(self.path.read_text(encoding="utf8"))
            if data["schema"] != SCHEMA:
                raise ValueError(f"schema {data['schema']}")
            return {id: Standing(**standing) for id, standing in data["exercises"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = f"{self.path} cannot be read ({type(error).__name__}: {error})"
            raise CourseError(f"{what}. Delete it to begin anew: your files stay.") from None


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its old version, then put it in its place: half a file never exists."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf8")
    beside.replace(path)


def next_exercise(course: Course, progress: Progress) -> Exercise | None:
    """The first exercise that is neither passed nor given up; None when all are."""
    for exercise in course.exercises.values():
        standing = progress.of(exercise)
        if not (standing.passed or standing.given_up):
            return exercise
    return None
