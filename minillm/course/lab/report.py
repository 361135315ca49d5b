"""Results for others: tables for a spreadsheet, Gradescope, JUnit, and a page of feedback for each student.

All of them are pure functions of the results. The maximum is always the course's. Cells that a spreadsheet would take
for a formula are made text. What students see of a hidden check is its task and its points.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from minillm.course.lab.bulk import Graded
from minillm.course.lab.results import CheckResult

FORMULA = ("=", "+", "-", "@", "\t", "\r")


def wide_csv(graded: Sequence[Graded]) -> str:
    """One row per submission, one column of points per exercise. With the mark that Excel needs for UTF-8."""
    ids = [result.exercise for result in graded[0].results]
    head = ["entry", "student", *ids, "points", "max_points", "flags"]
    rows = [
        [one.entry, one.student, *(r.points for r in one.results), one.points, one.max_points, "; ".join(one.flags)]
        for one in graded
    ]
    return _csv([head, *rows])


def long_csv(graded: Sequence[Graded]) -> str:
    """One row per submission and check; a submission that did not run has a row with its status."""
    head = [
        "entry",
        "student",
        "exercise",
        "check",
        "task",
        "hidden",
        "status",
        "points",
        "max_points",
        "mutant",
        "what",
    ]
    rows: list[list[Any]] = []
    for one in graded:
        for result in one.results:
            start = [one.entry, one.student, result.exercise]
            if not result.checks:
                rows.append([*start, "", "", "", result.status, 0, result.max_points, "", result.message])
            for check in result.checks:
                facts = [check.name, check.task, check.hidden, check.status, check.points, check.max_points]
                rows.append([*start, *facts, check.mutant, check.what])
    return _csv([head, *rows])


def gradescope(graded: Graded) -> str:
    """A `results.json` as Gradescope reads it: one test per check, hidden ones visible to teachers only."""
    tests = []
    for result in graded.results:
        if not result.checks:
            facts = {"score": 0, "max_score": result.max_points, "output": result.message, "visibility": "visible"}
            tests.append({"name": f"{result.exercise}: {result.status}", **facts})
        for check in result.checks:
            visibility = "hidden" if check.hidden else "visible"
            name = f"{result.exercise} {check.task}: {check.title}"
            facts = {"score": check.points, "max_score": check.max_points, "output": _told(check)}
            tests.append(
                {"name": name, "status": "passed" if check.passed else "failed", "visibility": visibility, **facts}
            )
    score = {"score": graded.points, "output": "; ".join(graded.flags), "output_format": "text", "tests": tests}
    return json.dumps(score, indent=1, ensure_ascii=False)


def junit(graded: Sequence[Graded]) -> str:
    """JUnit XML, which every CI reads: a suite per submission and exercise, a case per check."""
    root = ElementTree.Element("testsuites")
    for one in graded:
        for result in one.results:
            failures = sum(not check.passed for check in result.checks)
            suite = ElementTree.SubElement(root, "testsuite", name=_xml(f"{one.student} {result.exercise}"))
            suite.set("tests", str(max(len(result.checks), 1)))
            suite.set("failures", str(failures or int(not result.checks)))
            for check in result.checks:
                case = ElementTree.SubElement(suite, "testcase", name=check.name, classname=result.exercise)
                if not check.passed:
                    ElementTree.SubElement(case, "failure", message=_xml(_told(check).partition("\n")[0]))
            if not result.checks:
                case = ElementTree.SubElement(suite, "testcase", name="submission", classname=result.exercise)
                ElementTree.SubElement(case, "failure", message=_xml(f"{result.status}: {result.message}"))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def feedback(graded: Graded) -> str:
    """What a student gets back, in Markdown: points, and for each failed public check what is wrong and why."""
    lines = [f"# {graded.student}", "", f"{graded.points} of {graded.max_points} points", ""]
    for result in graded.results:
        lines += [f"## {result.exercise}: {result.points} of {result.max_points} points", ""]
        lines += [*_quoted(result.message), ""] if result.message else []
        for check in result.checks:
            title = "a hidden check" if check.hidden else check.title
            lines.append(f"* {'✓' if check.passed else '✗'} {check.task}: {title} ({check.points}/{check.max_points})")
            if not check.passed and not check.hidden:
                lines += [""] + _quoted(_told(check)) + [""]
        lines.append("")
    return "\n".join(lines)


def _told(check: CheckResult) -> str:
    return "" if check.passed else "\n".join(check.told())


def _quoted(text: str) -> list[str]:
    """Lines that stay as they are in Markdown, whatever is in them."""
    return [f"      {line}" for line in text.splitlines()]


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    file = io.StringIO()
    csv.writer(file).writerows([_cell(value) for value in row] for row in rows)
    return "\ufeff" + file.getvalue()


def _cell(value: Any) -> Any:
    """A cell that no spreadsheet computes: text that begins like a formula gets an apostrophe."""
    text = value.replace("\0", "").replace("\r", " ") if isinstance(value, str) else value
    return f"'{text}" if isinstance(text, str) and text.lstrip().startswith(FORMULA) else text


def _xml(text: str) -> str:
    """Text without the characters that XML cannot hold."""
    return "".join(
        char for char in text if char >= " " and not "\ud800" <= char <= "\udfff" and char not in "\ufffe\uffff"
    )
