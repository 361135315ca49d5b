"""What can go wrong around exercises, submissions and their grading, by name: like `minillm.errors`, for the course."""

from __future__ import annotations

from minillm.errors import MinillmError


class CourseError(MinillmError, ValueError):
    """An exercise, a submission or a file of the course that is missing, unknown or inconsistent."""


class GraderError(MinillmError):
    """The grader itself cannot work: the isolation that was asked for is not there, or a worker does not start."""


class LearnerError(MinillmError):
    """A learner's function that cannot take the place of the engine's own: missing, failing, or of another opinion."""
