"""`minillm lab` and `minillm teach`, as learners and teachers type them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from minillm.cli import main
from minillm.course.lab import check
from minillm.course.lab.exercises import Course
from tests.course.lab.conftest import SOLUTION

WRONG = SOLUTION.replace("2 * x", "3 * x")


@pytest.fixture(autouse=True)
def at_home(course: Course, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The commands run in the folder of the small course."""
    monkeypatch.chdir(course.root)
    monkeypatch.setenv("COLUMNS", "80")
    return course.root


def run(*words: str) -> int:
    """The exit code of one command; 0 for a command that just returns."""
    try:
        main(words)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, as one line of words."""
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).replace("│", " ").split())


def write(root: Path, source: str) -> None:
    (root / "exercises" / "ex01_doubling.py").write_text(source, encoding="utf8")


def test_a_learner_s_way(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the list to the solution, and nothing is lost on the way."""
    assert run("lab", "next") == 0 and "minillm lab test ex01" in said(capsys)
    assert run("lab", "test") == 1
    assert "Next: double is yours to write." in said(capsys)
    assert run("lab", "solution", "ex01") == 2 and "opens when your checks pass" in said(capsys)

    write(at_home, WRONG)
    assert run("lab", "test", "1") == 1
    words = said(capsys)
    assert "This is what comes out when somebody triples." in words and "Traceback" not in words
    assert run("lab", "diff") == 0 and "+ return 3 * x" in said(capsys)
    for hint in ("Hint 1 of 3", "Hint 2 of 3", "That was the last one"):
        assert run("lab", "hint") == 0 and hint in said(capsys)

    write(at_home, SOLUTION)
    assert run("lab", "test", "--json") == 0
    assert json.loads(capsys.readouterr().out)["points"] == 4
    assert run("lab", "status") == 0 and "1 of 1 exercises passed, 4 of 4 points" in said(capsys)
    assert run("lab", "list") == 0 and "All done" in said(capsys)
    assert run("lab", "solution", "ex01") == 0
    assert run("lab", "submit") == 0
    assert zipfile.ZipFile("submission.zip").namelist() == ["ex01_doubling.py", "manifest.json"]
    assert run("lab", "reset", "ex01") == 0 and "kept as" in said(capsys)
    assert (at_home / "exercises" / "ex01_doubling.py").read_text() == Course(at_home).exercise("1").original()
    assert next((at_home / ".minillm" / "kept").iterdir()).read_text() == SOLUTION
    assert run("lab", "submit") == 2 and "nothing to submit" in said(capsys)


def test_giving_up_is_recorded(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("lab", "solution", "ex01", "--give-up") == 0 and "return 2 * x" in said(capsys)
    assert json.loads((at_home / ".minillm" / "state.json").read_text())["exercises"]["ex01"]["given_up"]
    assert run("lab", "list") == 0 and "given up" in said(capsys)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def double(:\n", "line 1: "),
        ("", "is empty"),
        ("import os\n", "line 1 imports os"),
        ("1 / 0\n", "ZeroDivisionError"),
    ],
)
def test_what_does_not_run_is_told_in_words(
    at_home: Path, capsys: pytest.CaptureFixture[str], source: str, words: str
) -> None:
    write(at_home, source)
    assert run("lab", "test") == 1
    text = said(capsys)
    assert words in text and "Traceback" not in text


def test_exit_codes(at_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """2: a wrong word. 3: the grader itself failed, in a way it knows or does not know."""
    assert run("lab", "test", "ex99") == 2 and "There are: ex01" in said(capsys)
    monkeypatch.setattr(
        "minillm.course.lab.isolation.unavailable", lambda level: "" if level == "process" else "no such thing"
    )
    (at_home / "in").mkdir()
    (at_home / "in" / "ada.py").write_text(SOLUTION)
    assert run("teach", "grade", "in") == 3 and "not available here" in said(capsys)
    monkeypatch.setattr("minillm.course.lab.grade.read", lambda *_, **__: 1 / 0)
    assert run("lab", "test") == 3 and "should not happen" in said(capsys)


def test_a_damaged_state_is_told(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (at_home / ".minillm").mkdir()
    (at_home / ".minillm" / "state.json").write_text("{")
    assert run("lab", "list") == 2 and "Delete it to begin anew" in said(capsys)


def test_in_a_notebook(at_home: Path) -> None:
    write(at_home, WRONG)
    shown = check("ex01")
    assert "somebody triples" in repr(shown) and "<table>" in shown._repr_html_() and "2 of 4 points" in repr(shown)


def test_a_teacher_s_way(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (at_home / "in" / "ada").mkdir(parents=True)
    (at_home / "in" / "ada" / "ex01_doubling.py").write_text(WRONG)
    (at_home / "in" / "bob.zip").write_bytes(b"broken")
    assert run("teach", "grade", "in", "--isolation", "process", "--json") == 0
    assert json.loads(capsys.readouterr().out)["graded"] == 2
    for kind in ("csv", "checks", "junit", "gradescope", "json"):
        assert run("teach", "export", "graded", "--format", kind) == 0
    assert run("teach", "export", "graded", "--format", "pdf") == 2
    assert run("teach", "feedback", "graded") == 0
    assert "2 of 4 points" in (at_home / "graded" / "feedback" / "ada.md").read_text()
    capsys.readouterr()
    assert run("teach", "grade", "in", "--isolation", "process", "--seed", "1") == 2 and "another run" in said(capsys)


def test_sync_and_check(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("teach", "sync", "--check") == 0
    write(at_home, "mine")
    assert run("teach", "sync", "--check") == 1 and "differs" in said(capsys)
    assert run("teach", "sync") == 0 and run("teach", "check") == 0


def test_a_released_course_works_without_answers(
    at_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("teach", "release", "released") == 0
    texts = "".join(path.read_text() for path in (at_home / "released").rglob("*.py"))
    assert "2 * x" in texts and "SOLUTION" not in texts and "secret_zero" not in texts and "triples" not in texts
    monkeypatch.chdir("released")
    assert run("lab", "test") == 1
    write(at_home / "released", WRONG)
    assert run("lab", "test") == 1 and "numbers differ" in said(capsys)
    assert run("lab", "solution", "ex01", "--give-up") == 2 and "Ask your teacher" in said(capsys)
    assert run("lab", "reset", "ex01") == 0 and run("lab", "hint") == 0
    assert run("teach", "release", str(at_home)) == 2 and "not empty" in said(capsys)
