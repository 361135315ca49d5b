"""`minillm teach`: what makers of the course and teachers do."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from minillm.cli.console import err, out

if TYPE_CHECKING:
    from minillm.lab.selfcheck import Finding

FAILED = 1
teach = typer.Typer(help="For teachers: generate, check, release, grade, export.", no_args_is_help=True)

Names = Annotated[list[str] | None, typer.Argument(help="Exercises, such as ex03; all by default.", metavar="[ID]…")]
Jobs = Annotated[int, typer.Option(min=1, help="How many at a time.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print plain data.")]
Seed = Annotated[int | None, typer.Option(help="Draw the same inputs again; secret and fresh by default.")]


@teach.command()
def sync(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if anything differs.")] = False,
) -> None:
    """Generate exercises/ from solutions/."""
    from minillm.lab.exercises import find_course
    from minillm.lab.release import sync

    stale = sync(find_course(), write=not check)
    for path in stale:
        out.print("differs" if check else "written", Text(str(path)), soft_wrap=True)
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
    """Prove that the course grades rightly: stubs 0, solutions 100 %, mutants caught and named, cheats 0."""
    from minillm.lab.exercises import find_course
    from minillm.lab.selfcheck import check_course, dishonest

    course = find_course()
    exercises = [course.exercise(name) for name in names] if names else list(course.exercises.values())
    findings = list(_shown(check_course(course, exercises, seed=seed, jobs=jobs), quiet=as_json))
    cheats = course.root / "tests" / "exercises" / "dishonest"
    if zoo and cheats.is_dir() and not names:
        findings += _shown(dishonest(course, cheats, seed=seed, jobs=jobs), quiet=as_json)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1, ensure_ascii=False))
    else:
        out.print(_sums(findings))
    raise typer.Exit(0 if _holds(findings) else FAILED)


def _shown(findings: Iterable[Finding], *, quiet: bool) -> list[Finding]:
    """All findings; the bad ones are printed as they come."""
    seen = []
    with Progress(console=err, transient=True, disable=quiet) as progress:
        task = progress.add_task("Trying …", total=None)
        for finding in findings:
            progress.update(task, advance=1, description=f"{finding.exercise} {finding.kind} {finding.subject}")
            seen.append(finding)
            if not quiet and (not finding.ok or not finding.diagnosed):
                sign = "✗" if finding.ok is False else "–" if finding.ok is None else "?"
                out.print(Text(f"{sign} {finding.exercise} {finding.kind} {finding.subject}: {finding.detail}"))
    return seen


def _sums(findings: list[Finding]) -> Table:
    from minillm.lab.selfcheck import DIAGNOSED

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
    from minillm.lab.selfcheck import DIAGNOSED

    mutants = [finding.diagnosed for finding in findings if finding.kind == "mutant"]
    return all(finding.ok is not False for finding in findings) and sum(mutants) >= DIAGNOSED * len(mutants)
