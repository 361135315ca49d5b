"""`minillm lab`: what learners do."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.padding import Padding
from rich.progress import BarColumn
from rich.syntax import Syntax

from minillm.cli.console import facts
from minillm.cli.screen import Commands, check_destination, err, out, plain, words

if TYPE_CHECKING:
    from minillm.course.lab.exercises import Course, Exercise
    from minillm.course.lab.grade import Grader
    from minillm.course.lab.results import Result

FAILED = 1
ROOMY = 60  # columns
lab = Commands(help="Exercises: write a part of the engine, test it, get hints.", no_args_is_help=True)

Name = Annotated[str | None, typer.Argument(help="An exercise, such as ex03; by default the next one.", metavar="[ID]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print plain data.")]


@lab.command("list")
def list_exercises(as_json: AsJson = False) -> None:
    """Show all exercises and where you stand."""
    from minillm.cli.results import course_view
    from minillm.course.lab.progress import Progress, next_exercise

    course = _course()
    progress = Progress(course)
    if as_json:
        rows = [{"id": e.id, "title": e.title, **vars(progress.of(e))} for e in course.exercises.values()]
        out.data(rows)
        return
    out.print(course_view(course, progress, narrow=out.width < ROOMY))
    following = next_exercise(course, progress)
    out.print(f"Next: minillm lab test {following.id}" if following else "All done: minillm lab status")


@lab.command("next")
def show_next() -> None:
    """Say what to do next: the exercise, its file, its tasks."""
    exercise = _exercise(None)
    out.print(plain(f"{exercise.id} · {exercise.title}", style="bold"))
    out.print(
        f"{exercise.minutes} minutes, {exercise.points} points, difficulty {exercise.difficulty} of 5", style="dim"
    )
    for number, task in enumerate(exercise.tasks, start=1):
        points = sum(check.points for check in exercise.checks if check.task == task.name)
        out.print(f"  {number}. {task.title} ({points} point{'s' * (points != 1)})")
    out.print(f"Open   {_shown(exercise.stub)}", soft_wrap=True)
    out.print(f"Run    minillm lab test {exercise.id}   or minillm lab watch {exercise.id}, which runs when you save")
    out.print(f"Stuck? minillm lab hint {exercise.id}")


@lab.command()
def test(name: Name = None, as_json: AsJson = False) -> None:
    """Run the checks of an exercise on your file. Exit code 0: all passed; 1: not yet."""
    from minillm.course.lab.grade import Grader

    exercise = _exercise(name)
    with Grader(diagnoses=1) as grader:
        result = _tested(exercise, grader, quiet=as_json)
    if as_json:
        out.data(result.to_json())
    raise typer.Exit(0 if result.passed else FAILED)


@lab.command()
def watch(name: Name = None) -> None:
    """Test an exercise whenever you save its file; go on to the next when it passes. Ctrl-C ends it."""
    import watchfiles

    from minillm.course.lab.grade import Grader

    exercise = _exercise(name)
    with Grader(diagnoses=1) as grader:
        _tested(exercise, grader)
        out.print(f"Watching {_shown(exercise.stub)} …  Ctrl-C ends this.", style="dim", soft_wrap=True)
        for _ in watchfiles.watch(exercise.stub.parent, watch_filter=lambda _, path: Path(path) == exercise.stub):
            out.clear()
            if _tested(exercise, grader).passed:
                return


@lab.command()
def hint(name: Name = None) -> None:
    """Show the next hint for the first task that does not pass yet."""
    from minillm.course.lab.progress import Progress

    exercise = _exercise(name)
    progress = Progress(_course())
    standing = progress.of(exercise)
    known = {task.name: task for task in exercise.tasks}
    task = known.get(standing.stuck_at, exercise.tasks[0])  # a course may have changed since
    seen = standing.hints.get(task.name, 0)
    for number, text in enumerate(task.hints[: seen + 1], start=1):
        out.print(plain(f"Hint {number} of {len(task.hints)} · {task.title}", style="bold"))
        out.print(Padding(plain(text), (0, 2, 1, 2)))
    standing.hints[task.name] = min(seen + 1, len(task.hints))
    progress.save()
    if seen + 1 >= len(task.hints):
        out.print(f"That was the last one. minillm lab solution {exercise.id} --give-up shows ours.", style="dim")


@lab.command()
def diff(name: Name = None) -> None:
    """Show what you changed since the exercise was new."""
    from minillm.course.learner import FileError, text_of

    exercise = _exercise(name)
    data = exercise.handed_in()
    if isinstance(data, FileError):
        raise data
    before, after = (text.splitlines() for text in (exercise.original(), text_of(data, exercise.file_name)))
    lines = list(difflib.unified_diff(before, after, "as given", _shown(exercise.stub), lineterm=""))
    out.print(Syntax("\n".join(lines), "diff", background_color="default") if lines else "Nothing is changed yet.")


@lab.command()
def solution(
    name: Name = None,
    give_up: Annotated[
        bool, typer.Option("--give-up", help="Show it though your checks do not pass; recorded.")
    ] = False,
) -> None:
    """Show our solution: after yours passes, or when you give up."""
    from minillm.course.errors import CourseError
    from minillm.course.lab.progress import Progress

    exercise = _exercise(name)
    progress = Progress(_course())
    standing = progress.of(exercise)
    if not exercise.solution.exists():
        raise CourseError(f"This copy of the course has no solutions. Ask your teacher about {exercise.id}.")
    if not (standing.passed or standing.given_up or give_up):
        raise CourseError(
            f"The solution of {exercise.id} opens when your checks pass (minillm lab test {exercise.id}), "
            "or with --give-up, which is recorded."
        )
    if not standing.passed:
        standing.given_up = True
        progress.save()
    out.print(Syntax(exercise.solution.read_text(encoding="utf8"), "python", background_color="default"))


@lab.command()
def reset(name: Annotated[str, typer.Argument(help="An exercise, such as ex03.", metavar="ID")]) -> None:
    """Bring an exercise back as it was given. Your file is kept aside."""
    from minillm.course.lab.release import reset

    exercise = _exercise(name)
    if kept := reset(exercise):
        out.print(plain(f"Your file is kept as {_shown(kept)}"), soft_wrap=True)
    out.print(plain(f"{_shown(exercise.stub)} is as new."), soft_wrap=True)


@lab.command()
def status(as_json: AsJson = False) -> None:
    """Sum up: exercises passed, points."""
    from minillm.course.lab.progress import Progress

    course = _course()
    progress = Progress(course)
    standings = [progress.of(exercise) for exercise in course.exercises.values()]
    sums = {
        "exercises": len(standings),
        "passed": sum(standing.passed for standing in standings),
        "given_up": sum(standing.given_up for standing in standings),
        "points": sum(standing.points for standing in standings),
        "max_points": sum(exercise.points for exercise in course.exercises.values()),
    }
    if as_json:
        out.data(sums)
        return
    out.print("{passed} of {exercises} exercises passed, {points} of {max_points} points.".format(**sums))


@lab.command()
def doctor() -> None:
    """Check that this machine can run the exercises, and what would help if not."""
    from minillm.course.lab.exercises import find_course
    from minillm.course.lab.isolation import LEVELS, unavailable
    from minillm.course.lab.sandbox import Sandbox

    course = find_course()
    rows = [("course", str(course.root)), ("exercises", str(len(course.exercises)))]
    with err.waiting("Starting a worker …"), Sandbox() as sandbox:
        rows.append(("worker", f"answers after {sandbox.wait():.1f} s"))
    rows += [(f"level {level}", unavailable(level) or "available") for level in LEVELS]
    out.print(facts("minillm lab", rows))


@lab.command()
def submit(to: Annotated[Path, typer.Option(help="Where to write the zip.")] = Path("submission.zip")) -> None:
    """Pack your files into a zip for your teacher."""
    from minillm.course.lab.release import pack

    to = check_destination(to, endings=(".zip",))
    names = pack(_course(), to)
    out.print(plain(f"{to.resolve()} holds {', '.join(names)}."), soft_wrap=True)


def _course() -> Course:
    from minillm.course.lab.exercises import find_course

    return find_course()


def _exercise(name: str | None) -> Exercise:
    """The exercise of this name, or the next one."""
    from minillm.course.errors import CourseError
    from minillm.course.lab.progress import Progress, next_exercise

    course = _course()
    if name is not None:
        return course.exercise(name)
    following = next_exercise(course, Progress(course))
    if following is None:
        raise CourseError("All exercises are done. Name one to come back to it: minillm lab test ex03.")
    return following


def _tested(exercise: Exercise, grader: Grader, *, quiet: bool = False) -> Result:
    """Grade a learner's file, remember how it went, and show it."""
    from minillm.cli.results import result_view
    from minillm.course.errors import GraderError
    from minillm.course.lab.progress import Progress

    with err.bar(words(), BarColumn(), transient=True, disable=quiet) as bar:
        shown = bar.add_task("Starting a worker …", total=len(exercise.checks))
        try:
            result = grader.grade(
                exercise,
                exercise.handed_in(),
                progress=lambda check: bar.update(shown, advance=1, description=check.title),
            )
        except OSError as error:  # such as no room for the worker's folder
            raise GraderError(f"Nothing can be graded here: {error}. Your file is not at fault.") from error
    Progress(_course()).record(exercise, result)
    if not quiet:
        out.print(result_view(exercise, result, path=_shown(exercise.stub)))
    return result


def _shown(path: Path) -> str:
    """A path as short as it can be typed."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
