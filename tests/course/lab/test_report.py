"""Exports: safe cells, the course's maximum, and nothing of a hidden check for students."""

from __future__ import annotations

import csv
import io
import json
from xml.etree import ElementTree

import pytest

from minillm.course.lab.bulk import Graded
from minillm.course.lab.report import feedback, gradescope, junit, long_csv, wide_csv
from minillm.course.lab.results import CheckResult, Result

EVIL = ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", 'a,b\n"c"', "\x00=1", "\x1b[31m", "\ud800", "ünï"]
CHECKS = (
    CheckResult("a", "t1", "Public right", "passed", 2, 2),
    CheckResult("b", "t1", "Public wrong", "wrong", 0, 3, what="=2+3 differs", why="why", mutant="m", diagnosis="d"),
    CheckResult("c", "t2", "SECRET TITLE", "wrong", 0, 5, hidden=True, what="SECRET VALUE", output="SECRET PRINT"),
)


def graded(student: str = "ada") -> Graded:
    """One submission: an exercise half right, and one that did not run."""
    ran = Result("ex01", "failed", 2, 10, CHECKS)
    return Graded(
        f"{student}.zip", student, "0", (ran, Result("ex02", "missing", 0, 7, message="-nothing")), ("=flag",)
    )


def rows(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text.removeprefix("\ufeff"))))


@pytest.mark.parametrize("name", EVIL)
def test_no_cell_is_a_formula(name: str) -> None:
    for text in (wide_csv([graded(name)]), long_csv([graded(name)])):
        cells = [cell for row in rows(text) for cell in row]
        assert not [cell for cell in cells if cell.strip().startswith(("=", "+", "-", "@"))]


def test_totals_are_the_course_s() -> None:
    head, row = rows(wide_csv([graded()]))
    assert dict(zip(head, row, strict=True)) == {
        "entry": "ada.zip",
        "student": "ada",
        "ex01": "2",
        "ex02": "0",
        "points": "2",
        "max_points": "17",
        "flags": "'=flag",
    }
    assert len(rows(long_csv([graded()]))) == 1 + 3 + 1


def test_gradescope() -> None:
    page = json.loads(gradescope(graded()))
    assert page["score"] == 2 == sum(test["score"] for test in page["tests"])
    assert sum(test["max_score"] for test in page["tests"]) == 17
    assert [test["visibility"] for test in page["tests"]] == ["visible", "visible", "hidden", "visible"]


@pytest.mark.parametrize("name", EVIL)
def test_junit_is_xml(name: str) -> None:
    root = ElementTree.fromstring(junit([graded(name)]).encode("utf8"))
    assert [suite.get("failures") for suite in root] == ["2", "1"]
    assert len(root.findall(".//testcase")) == 4 and len(root.findall(".//failure")) == 3


def test_feedback_keeps_hidden_checks_hidden() -> None:
    page = feedback(graded())
    assert "2 of 17 points" in page and "This is what comes out when d." in page
    assert "SECRET" not in page and "a hidden check (0/5)" in page


def test_results_survive_json() -> None:
    for one in map(graded, EVIL):
        from dataclasses import asdict

        assert Graded.from_json(json.loads(json.dumps(asdict(one)))) == one
