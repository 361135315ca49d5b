"""What comes out of grading: plain data, the same on the screen, in result.json and in every export."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

NOT_RUN = ("missing", "unreadable", "syntax", "forbidden", "fault")


@dataclass(frozen=True)
class CheckResult:
    """How one check ended.

    status: "passed", "wrong" (a value differs), "todo" (not written yet), "error" (the code raised), or how it was
    stopped: "timeout", "memory", "processes", "crashed", "gone", "garbled"; "given up" if that happened too often.
    calls, what, why: what was called, what is wrong with it, why it matters. mutant, diagnosis: the known mistake
    that gives the same output, and its sentence.
    """

    name: str
    task: str
    title: str
    status: str
    points: int
    max_points: int
    hidden: bool = False
    seed: int = 0
    calls: tuple[str, ...] = ()
    what: str = ""
    why: str = ""
    mutant: str = ""
    diagnosis: str = ""
    output: str = ""

    @property
    def passed(self) -> bool:
        """Whether it gave its points."""
        return self.status == "passed"

    @property
    def shown_title(self) -> str:
        """The title, as learners may see it."""
        return "a hidden check" if self.hidden and not self.passed else self.title

    def told(self) -> list[str]:
        """What a check that did not pass says, in lines: what is wrong, what is expected, the likely mistake."""
        if self.status == "todo":
            return [f"Next: {self.what}."]
        said = [self.what]
        said += [f"Checked here: {self.why}."] if self.why else []
        said += [f"This is what comes out when {self.diagnosis}."] if self.diagnosis else []
        return said


@dataclass(frozen=True)
class Result:
    """How one submission to one exercise ended. The maximum is the course's, whatever was submitted.

    status: "passed" (all points) or "failed"; or why nothing ran: "missing", "unreadable", "syntax", "forbidden", or
    "fault", when the grader itself failed.
    """

    exercise: str
    status: str
    points: int
    max_points: int
    checks: tuple[CheckResult, ...] = ()
    message: str = ""
    isolation: str = ""
    seed: int = 0
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """All points."""
        return self.status == "passed"

    @property
    def first_failure(self) -> CheckResult | None:
        """The check that a learner should look at first: what is written and wrong goes before what is not written."""
        failed = [check for check in self.checks if not check.passed]
        return min(failed, key=lambda check: check.status == "todo", default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """The result behind plain data that `to_json` made."""
        known = {field.name for field in fields(cls)}
        checks = tuple(CheckResult(**{**check, "calls": tuple(check["calls"])}) for check in data["checks"])
        return cls(**{**{name: value for name, value in data.items() if name in known}, "checks": checks})
