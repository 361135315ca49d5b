"""`minillm teach`: what makers of the course and teachers do."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.progress import BarColumn, TimeElapsedColumn
from rich.table import Table

from minillm.cli.screen import Commands, check_destination, err, out, plain, words

if TYPE_CHECKING:
    from minillm.course.lab.bulk import Graded
    from minillm.course.lab.selfcheck import Finding

FAILED, GRADER_FAULT = 1, 3
teach = Commands(help="For teachers: generate, check, release, grade, export.", no_args_is_help=True)

Names = Annotated[list[str] | None, typer.Argument(help="Exercises, such as ex03; all by default.", metavar="[ID]…")]
Jobs = Annotated[int, typer.Option(min=1, help="How many at a time.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print plain data.")]
Seed = Annotated[int | None, typer.Option(help="Draw the same inputs again; by default a new secret seed.")]


@teach.command()
def sync(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if anything differs.")] = False,
) -> None:
    """Generate exercises/ from solutions/."""
    from minillm.course.lab.exercises import find_course
    from minillm.course.lab.release import sync

    stale = sync(find_course(), write=not check)
    for path in stale:
        out.print("differs" if check else "written", plain(str(path)), soft_wrap=True)
    if not stale:
        out.print("All stubs agree with their solutions.")
    raise typer.Exit(FAILED if check and stale else 0)


@teach.command()
def check(
    names: Names = None,
    jobs: Jobs = 2,
    seed: Seed = None,
    zoo: Annotated[bool, typer.Option(help="Also hand in what cheats (tests/exercises/dishonest).")] = True,
    as_json: AsJson = False,
) -> None:
    """Prove that grades are right: stubs get 0, solutions 100 %, mutants are caught and named, cheats get 0."""
    from minillm.course.lab.exercises import find_course
    from minillm.course.lab.selfcheck import check_course, dishonest

    course = find_course()
    exercises = [course.exercise(name) for name in names] if names else list(course.exercises.values())
    findings = list(_shown(check_course(course, exercises, seed=seed, jobs=jobs), quiet=as_json))
    cheats = course.root / "tests" / "exercises" / "dishonest"
    if zoo and cheats.is_dir() and not names:
        findings += _shown(dishonest(course, cheats, seed=seed, jobs=jobs), quiet=as_json)
    if as_json:
        out.data([asdict(finding) for finding in findings])
    else:
        out.print(_sums(findings))
    raise typer.Exit(0 if _holds(findings) else FAILED)


def _shown(findings: Iterable[Finding], *, quiet: bool) -> list[Finding]:
    """All findings; the bad ones are printed as they come."""
    seen = []
    with err.bar(words(), BarColumn(), transient=True, disable=quiet) as progress:
        task = progress.add_task("Trying …", total=None)
        for finding in findings:
            progress.update(task, advance=1, description=f"{finding.exercise} {finding.kind} {finding.subject}")
            seen.append(finding)
            if not quiet and (not finding.ok or not finding.diagnosed):
                sign = "✗" if finding.ok is False else "–" if finding.ok is None else "?"
                out.print(plain(f"{sign} {finding.exercise} {finding.kind} {finding.subject}: {finding.detail}"))
    return seen


def _sums(findings: list[Finding]) -> Table:
    from minillm.course.lab.selfcheck import DIAGNOSED

    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("what was handed in", "how many", "as it must be"):
        table.add_column(heading, justify="left" if heading.startswith("what") else "right")
    kinds = {"author": "demands on authors", "stub": "stubs: 0 points", "solution": "solutions: all points"}
    kinds |= {"mutant": "mutants: not all points", "dishonest": "cheats: 0 points"}
    for kind, name in kinds.items():
        of_kind = [finding for finding in findings if finding.kind == kind]
        table.add_row(name, str(len(of_kind)), str(sum(finding.ok is True for finding in of_kind)))
    mutants = [finding for finding in findings if finding.kind == "mutant"]
    named = sum(finding.diagnosed for finding in mutants)
    table.add_row(f"mutants: called by their name (at least {DIAGNOSED:.0%})", str(len(mutants)), str(named))
    return table


def _holds(findings: list[Finding]) -> bool:
    from minillm.course.lab.selfcheck import DIAGNOSED

    mutants = [finding.diagnosed for finding in findings if finding.kind == "mutant"]
    return all(finding.ok is not False for finding in findings) and sum(mutants) >= DIAGNOSED * len(mutants)


@teach.command()
def release(to: Annotated[Path, typer.Argument(help="A new folder.")]) -> None:
    """Write a course for learners: stubs and public checks; no solutions, mutants or hidden checks."""
    from minillm.course.lab.exercises import find_course
    from minillm.course.lab.release import release

    written = release(find_course(), check_destination(to, folder=True))
    out.print(plain(f"{to} holds {len(written)} files. Learners run minillm lab there."), soft_wrap=True)


@teach.command()
def grade(
    submissions: Annotated[Path, typer.Argument(help="A folder with a zip, a folder or a .py file per student.")],
    to: Annotated[Path, typer.Option(help="Where results go; a second start continues.")] = Path("graded"),
    only: Annotated[str, typer.Option(help="Some exercises, such as ex03,ex05.", metavar="ID,…")] = "",
    isolation: Annotated[str, typer.Option(help="process, namespace or container.")] = "namespace",
    jobs: Jobs = 2,
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Grade a class. Exit code 0: everything was graded, 3: the grader itself failed somewhere."""
    from minillm.course.lab.bulk import Run, read_results
    from minillm.course.lab.exercises import find_course
    from minillm.course.lab.submissions import collect

    check_destination(to, folder=True)
    course = find_course()
    exercises = [course.exercise(id) for id in only.split(",")] if only else list(course.exercises.values())
    run = Run(to, exercises, isolation, seed)
    entries = collect(course, submissions)
    with err.bar(words(), BarColumn(), TimeElapsedColumn(), disable=as_json) as progress:
        shown = progress.add_task("Grading …", total=len(entries))
        for graded in run.grade(entries, jobs=jobs):
            progress.update(shown, advance=1, description=f"{graded.student}: {graded.points}/{graded.max_points}")
    kept = read_results(to)
    done = [kept[entry.entry] for entry in entries if entry.entry in kept]
    faults = sum(result.status == "fault" for one in done for result in one.results)
    sums = {"submissions": len(entries), "graded": len(done), "faults": faults, "isolation": isolation}
    out.data(sums) if as_json else out.print(_class_view(done, sums))
    raise typer.Exit(GRADER_FAULT if faults or len(done) < len(entries) else 0)


@teach.command()
def export(
    graded: Annotated[Path, typer.Argument(help="The folder that `teach grade` wrote.")],
    kind: Annotated[str, typer.Option("--format", help="csv, checks, junit, gradescope or json.")] = "csv",
    to: Annotated[Path | None, typer.Option(help="A file (gradescope, json: a folder).")] = None,
) -> None:
    """Write results for a spreadsheet, a CI or a learning platform."""
    from minillm.course.errors import CourseError
    from minillm.course.lab import report

    done = _done(graded)
    tables = {
        "csv": (report.wide_csv, "marks.csv"),
        "checks": (report.long_csv, "checks.csv"),
        "junit": (report.junit, "junit.xml"),
    }
    pages = {"gradescope": report.gradescope, "json": lambda one: json.dumps(asdict(one), indent=1, ensure_ascii=False)}
    if kind in tables:
        make, name = tables[kind]
        _write({to or graded / name: make(done)})
    elif kind in pages:
        folder = to or graded / kind
        _write({folder / f"{one.entry}.json": pages[kind](one) for one in done})
    else:
        raise CourseError(f"--format {kind} is none of: {', '.join([*tables, *pages])}.")


@teach.command()
def feedback(
    graded: Annotated[Path, typer.Argument(help="The folder that `teach grade` wrote.")],
    to: Annotated[Path | None, typer.Option(help="A folder for one page per submission.")] = None,
) -> None:
    """Write a page for each student: points, what is wrong, why; hidden checks by task and points only."""
    from minillm.course.lab.report import feedback

    folder = to or graded / "feedback"
    _write({folder / f"{one.entry}.md": feedback(one) for one in _done(graded)})


def _done(graded: Path) -> list[Graded]:
    """What was graded in a folder, by entry."""
    from minillm.course.errors import CourseError
    from minillm.course.lab.bulk import read_results

    done = read_results(graded)
    if not done:
        raise CourseError(f"{graded} holds no results. Name the folder that `minillm teach grade` wrote (--to).")
    return [done[entry] for entry in sorted(done)]


def _write(texts: dict[Path, str]) -> None:
    """Write some files; their folders are made. Raises ConfigError before the first if one of them cannot be."""
    for folder in {path.parent for path in texts}:
        check_destination(folder, folder=True)
    for path in texts:
        if path.parent.exists():
            check_destination(path)
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf8", errors="backslashreplace", newline="")
    out.print(plain(f"{len(texts)} written: {', '.join(map(str, list(texts)[:3]))}{' …' if len(texts) > 3 else ''}"))


def _class_view(done: list[Graded], sums: dict[str, Any]) -> Table:
    """How many submissions passed, failed or did not run, for each exercise."""
    table = Table(box=box.SIMPLE, pad_edge=False, title="{graded} of {submissions} graded ({isolation})".format(**sums))
    for heading in ("exercise", "passed", "failed", "not run", "mean points", "of"):
        table.add_column(heading, justify="left" if heading == "exercise" else "right")
    for results in zip(*(one.results for one in done), strict=True):
        passed, failed = (sum(r.status == status for r in results) for status in ("passed", "failed"))
        mean = sum(r.points for r in results) / len(results)
        rest = len(results) - passed - failed
        row = (passed, failed, rest, f"{mean:.1f}", results[0].max_points)
        table.add_row(results[0].exercise, *map(str, row))
    return table
