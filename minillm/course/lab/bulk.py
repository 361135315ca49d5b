"""Grade a whole class: in parallel, resumable, and so that every submission ends with a result.

Each line of OUT/results.jsonl is one submission with the results of its exercises. It is written in one piece when
the submission is through, so a run that is killed loses at most what it was working on, and goes on when it is
started again. OUT/run.json keeps the secret seed, so that both halves of a run see the same inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

from minillm.course.errors import CourseError
from minillm.course.lab.exercises import Exercise
from minillm.course.lab.grade import Grader
from minillm.course.lab.progress import write_whole
from minillm.course.lab.results import Result
from minillm.course.lab.submissions import Submission

SCHEMA = 1
RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Graded:
    """One submission with its results, one for each exercise of the run. sha256: of what was graded."""

    entry: str
    student: str
    sha256: str
    results: tuple[Result, ...]
    flags: tuple[str, ...] = ()

    @property
    def points(self) -> int:
        """Points of all exercises."""
        return sum(result.points for result in self.results)

    @property
    def max_points(self) -> int:
        """What the course gives at most."""
        return sum(result.max_points for result in self.results)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Graded:
        """The graded submission in a line of results.jsonl."""
        results = tuple(Result.from_json(result) for result in data["results"])
        return cls(**{**data, "results": results, "flags": tuple(data["flags"])})


class Run:
    """A run of the grader in a folder of its own. Opening the folder again goes on with the same run.

    Raises CourseError if the folder holds a run with other exercises or another isolation.
    """

    def __init__(self, out: Path, exercises: Sequence[Exercise], isolation: str, seed: int | None = None) -> None:
        self.out, self.exercises, self.isolation = out, exercises, isolation
        self.lines = out / RESULTS
        self._lock = Lock()
        out.mkdir(parents=True, exist_ok=True)
        self._mend()
        settings = {"schema": SCHEMA, "isolation": isolation, "exercises": [exercise.id for exercise in exercises]}
        path = out / "run.json"
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf8"))
            self.seed = kept.pop("seed")
            if kept != settings or seed not in (None, self.seed):
                raise CourseError(f"{out} holds another run ({kept}). Name a new folder, or the same settings.")
        else:
            self.seed = secrets.randbits(32) if seed is None else seed
            write_whole(path, json.dumps({**settings, "seed": self.seed}))

    def grade(self, submissions: Sequence[Submission], *, jobs: int = 1) -> Iterator[Graded]:
        """Grade what is not done yet or has changed since, `jobs` at a time; each as it is through."""
        done = read_results(self.out)
        todo = [s for s in submissions if s.entry not in done or done[s.entry].sha256 != digest(s)]
        graders: SimpleQueue[Grader] = SimpleQueue()
        with ExitStack() as stack, ThreadPoolExecutor(jobs) as pool:
            for _ in range(jobs):
                graders.put(stack.enter_context(Grader(self.isolation, seed=self.seed)))
            yield from pool.map(lambda submission: self._one(submission, graders), todo)

    def _one(self, submission: Submission, graders: SimpleQueue[Grader]) -> Graded:
        """Grade one submission and write its line."""
        grader = graders.get()
        try:
            results = tuple(self._result(grader, exercise, submission) for exercise in self.exercises)
        finally:
            grader.next_person()
            graders.put(grader)
        graded = Graded(submission.entry, submission.student, digest(submission), results, submission.flags)
        self._append(graded)
        return graded

    def _result(self, grader: Grader, exercise: Exercise, submission: Submission) -> Result:
        """A result, whatever happens: what the grader did not foresee is its own fault and no one else's."""
        facts = dict(isolation=self.isolation, seed=self.seed)
        if submission.problem:
            return Result(exercise.id, "unreadable", 0, exercise.points, message=submission.problem, **facts)
        try:
            return grader.grade(exercise, submission.files.get(exercise.id))
        except Exception as error:
            message = f"The grader failed: {type(error).__name__}: {error}"
            return Result(exercise.id, "fault", 0, exercise.points, message=message, **facts)

    def _append(self, graded: Graded) -> None:
        line = json.dumps(asdict(graded), ensure_ascii=False).encode("utf8", "backslashreplace")
        with self._lock, self.lines.open("ab", buffering=0) as file:
            file.write(line + b"\n")
            os.fsync(file.fileno())

    def _mend(self) -> None:
        """End a line that a kill has cut off, so that the next one begins on its own."""
        if self.lines.exists() and not self.lines.read_bytes().endswith(b"\n"):
            with self.lines.open("ab") as file:
                file.write(b"\n")


def read_results(out: Path) -> dict[str, Graded]:
    """What a run has graded so far, by entry. A line that was cut off by a kill counts for nothing."""
    graded, path = {}, out / RESULTS
    for line in path.read_text(encoding="utf8").split("\n") if path.exists() else ():
        try:
            one = Graded.from_json(json.loads(line))
        except (ValueError, KeyError, TypeError):
            continue
        graded[one.entry] = one
    return graded


def digest(submission: Submission) -> str:
    """A hash of everything that is graded of a submission."""
    sha = hashlib.sha256(submission.problem.encode("utf8", "backslashreplace"))
    for id, data in sorted(submission.files.items()):
        sha.update(id.encode() + len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()
