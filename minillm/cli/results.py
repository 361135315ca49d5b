"""How results of exercises look in a terminal of 80 columns."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from minillm.cli.screen import plain
from minillm.course.lab.exercises import Course, Exercise
from minillm.course.lab.progress import Progress
from minillm.course.lab.results import CheckResult, Result

SIGNS = {"passed": ("✓", "green"), "todo": ("·", "dim")}  # everything else: a red cross
CALLS = 4  # lines of the last calls before a difference
DOTS = "●●●●●○○○○○"


def result_view(exercise: Exercise, result: Result, *, path: str) -> Group:
    """A result as a learner sees it: all checks, then what to do about the first that failed."""
    parts: list[RenderableType] = [plain(f"{exercise.id} · {exercise.title}", style="bold")]
    if result.checks:
        parts.append(_checks(result))
    if result.message:
        parts.append(Padding(plain(result.message, style="red"), (1, 2)))
    if failure := result.first_failure:
        parts.append(Padding(failure_view(failure), (0, 2)))
    parts.append(_summary(exercise, result, path))
    return Group(*parts)


def failure_view(check: CheckResult) -> Group:
    """What was called, what was returned, why that matters, and the probable cause."""
    if check.status == "todo":
        return Group(*map(plain, check.told()))
    parts: list[RenderableType] = [plain(check.shown_title, style="bold red")]
    if check.calls:
        more = [f"… {len(check.calls) - CALLS} calls before"] if len(check.calls) > CALLS else []
        calls = "\n".join([*more, *check.calls[-CALLS:]])
        parts += [plain(f"Called (seed {check.seed}):", style="dim"), Padding(plain(calls), (0, 0, 0, 2))]
    what, *rest = check.told()
    parts += [plain(what), *(plain(line, style="yellow") for line in rest)]
    if check.output:
        parts += [plain("Your code printed:", style="dim"), Padding(plain(check.output), (0, 0, 0, 2))]
    return Group(*parts)


def course_view(course: Course, progress: Progress, *, narrow: bool = False) -> Table:
    """All exercises with their standing; where it is narrow, without difficulty and minutes."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    headings = ("", "exercise", "points", "") if narrow else ("", "exercise", "", "min", "points", "")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in ("min", "points") else "left")
    for exercise in course.exercises.values():
        standing = progress.of(exercise)
        sign, style = SIGNS.get(standing.sign, ("·", "dim" if standing.sign == "to do" else "yellow"))
        dots = DOTS[5 - exercise.difficulty : 10 - exercise.difficulty]
        effort = () if narrow else (dots, str(exercise.minutes))
        points = f"{standing.points}/{exercise.points}"
        table.add_row(plain(sign, style), f"{exercise.id} {exercise.title}", *effort, points, standing.sign)
    return table


def _checks(result: Result) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(width=1)
    table.add_column(ratio=1)
    table.add_column(justify="right")
    for check in result.checks:
        sign, style = SIGNS.get(check.status, ("✗", "red"))
        status = "" if check.status in ("passed", "wrong", "todo") else f" ({check.status})"
        table.add_row(plain(sign, style), f"{check.shown_title}{status}", f"{check.points}/{check.max_points}")
    return table


def _summary(exercise: Exercise, result: Result, path: str) -> Text:
    score = f"{result.points} of {result.max_points} points"
    if result.passed:
        return plain(f"{score}. All checks passed. Compare with ours: minillm lab solution {exercise.id}", "green")
    return plain(f"{score}. Edit {path}   Stuck? minillm lab hint {exercise.id}")
