"""Grade one submission: read it, run its checks in a sandbox, judge what comes back, say what probably went wrong."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from minillm.course.lab.checks import Case, Check, Failure, judge
from minillm.course.lab.diagnosis import Diagnosis, draw, run
from minillm.course.lab.exercises import Exercise
from minillm.course.lab.isolation import check_available
from minillm.course.lab.protocol import Reply
from minillm.course.lab.results import CheckResult, Result
from minillm.course.lab.rules import Refusal, read
from minillm.course.lab.sandbox import Sandbox
from minillm.course.learner import FileError

Progress = Callable[[Check], None]

KILLED = ("timeout", "memory", "processes", "gone", "garbled")
EXPLICABLE = ("wrong", "error", "timeout")
STOPPED = {
    "timeout": "no answer in time ({0.seconds:g} s). Is there a loop without an end?",
    "memory": "it took more than {megabytes} MB of memory. How large is the largest tensor you make?",
    "processes": "it started more than {0.processes} processes",
    "crashed": "your code ended the process that ran it; nothing came back",
    "gone": "your code ended the process that waited for it",
    "garbled": "what came back was not an answer",
    "given up": "not run: the checks before had to be stopped too often",
}


class Grader:
    """Grades submissions at one level of isolation, on inputs drawn from one seed: a secret one unless it is given.

    What is graded shares a sandbox, until `next_person`: one person's tries and exercises need not wait for PyTorch
    again, and different people never meet. patience: how often the worker of a submission may have to be killed; the
    checks that are left then do not run. seconds: for a check at most, if that is less than its own. diagnoses: how
    many failures of a submission are explained. Raises GraderError if the level is not available.
    """

    def __init__(
        self,
        isolation: str = "process",
        *,
        seed: int | None = None,
        patience: int = 4,
        seconds: float = math.inf,
        diagnoses: int = 1000,
    ) -> None:
        check_available(isolation)
        self.isolation, self.patience, self.seconds, self.diagnoses = isolation, patience, seconds, diagnoses
        self.seed = secrets.randbits(32) if seed is None else seed
        self._diagnosis = Diagnosis(self.seed)
        self._open: dict[tuple[str, ...], Sandbox] = {}

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *error: object) -> None:
        self._diagnosis.close()
        self.next_person()

    def reseed(self, seed: int) -> None:
        """Draw the inputs of what is graded next from another seed. The workers stay."""
        self._diagnosis.close()
        self.seed, self._diagnosis = seed, Diagnosis(seed)

    def next_person(self) -> None:
        """End the workers: what is graded next meets new ones."""
        while self._open:
            self._open.popitem()[1].close()

    def grade(
        self,
        exercise: Exercise,
        data: bytes | FileError | None,
        *,
        strict: bool = True,
        progress: Progress | None = None,
    ) -> Result:
        """Grade the bytes of a submitted file (None: there is none; or why they could not be read).

        Without `strict` a source is not refused for what it imports or names: the sandbox has to hold alone.
        """
        begin = time.monotonic()
        source = read(data, exercise, strict=strict)
        if isinstance(source, Refusal):
            return self._result(exercise, source.status, message=source.message)
        checks = self._run(exercise, source, progress)
        status = "passed" if checks and all(check.passed for check in checks) else "failed"
        return self._result(exercise, status, checks=checks, seconds=round(time.monotonic() - begin, 2))

    def _result(self, exercise: Exercise, status: str, checks: tuple[CheckResult, ...] = (), **facts: Any) -> Result:
        points = sum(check.points for check in checks)
        return Result(
            exercise.id, status, points, exercise.points, checks, isolation=self.isolation, seed=self.seed, **facts
        )

    def _run(self, exercise: Exercise, source: str, progress: Progress | None) -> tuple[CheckResult, ...]:
        cases, replies = dict[Check, Case](), dict[Check, Reply]()
        sandbox = self._sandbox(exercise)
        sandbox.start()
        for check in exercise.checks:
            if progress:
                progress(check)
            cases[check] = draw(exercise, check, self.seed)
            tired = sum(reply.status in KILLED for reply in replies.values()) >= self.patience
            replies[check] = (
                Reply("given up") if tired else run(sandbox, exercise, check, cases[check], source, self.seconds)
            )
        results = {check: _judged(check, cases[check], replies[check]) for check in exercise.checks}
        explicable = [check for check, result in results.items() if result.status in EXPLICABLE]
        for check in explicable[: self.diagnoses]:
            if mutant := self._diagnosis.likely(exercise, replies, check):
                results[check] = replace(results[check], mutant=mutant.name, diagnosis=mutant.explanation)
        return tuple(results.values())

    def _sandbox(self, exercise: Exercise) -> Sandbox:
        if exercise.preload not in self._open:
            self._open[exercise.preload] = Sandbox(self.isolation, preload=exercise.preload, hide=(exercise.root,))
        return self._open[exercise.preload]


def _judged(check: Check, case: Case, reply: Reply) -> CheckResult:
    """What a reply is worth. Points are for values that are all as expected; there is no other way to them."""
    failure = judge(case, reply)
    status = "wrong" if failure else reply.status
    if status == "ok":
        status = "passed" if len(reply.values) == len(case.expectations) else "garbled"
    if status == "error":
        status, failure = _raised(case, reply)
    elif status in STOPPED:
        sentence = STOPPED[status].format(check.limits, megabytes=check.limits.memory_bytes >> 20)
        failure = Failure(case.calls(), sentence)
    return CheckResult(
        check.name,
        check.task,
        check.title,
        status,
        check.points if status == "passed" else 0,
        check.points,
        hidden=check.hidden,
        seed=case.seed,
        output=reply.output,
        **(asdict(failure) if failure else {}),
    )


def _raised(case: Case, reply: Reply) -> tuple[str, Failure]:
    """An error that the learner's code raised: what it says, and the learner's own line."""
    error = {"type": "an error", "message": "", "code": "", "function": "", **reply.error}
    calls, message = case.calls(reply.step), error["message"]
    if error["type"] == "NotImplementedError":
        return "todo", Failure(calls, message)
    if error["type"] == "MemoryError" or "can't allocate memory" in message:
        return "memory", Failure(calls, f"there is not enough memory: {message}")
    where = f"\n  line {error['line']}, in {error['function']}:  {error['code']}" if "line" in error else ""
    return "error", Failure(calls, f"{error['type']}: {message}{where}")
