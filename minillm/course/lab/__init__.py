"""Exercises and grading: what a learner writes runs in a process of its own and is judged from outside.

from minillm.course.lab import check
check("ex03")                       # in a notebook: the same result as `minillm lab test ex03`
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minillm.course.lab.notebook import Shown

__all__ = ["check"]


def check(name: str) -> Shown:
    """Test a learner's file (`exercises/exNN_slug.py`) and show the result as a small table.

    name: "ex03", "3", or the file. Never fails a notebook: an exercise that is still to do is shown as that. Raises
    CourseError for an exercise that does not exist.
    """
    from minillm.course.lab.notebook import tested

    return tested(name)
