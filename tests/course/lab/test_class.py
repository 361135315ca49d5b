"""A whole class, graded in parallel, killed in the middle, and gone on with.

pytest -n 0 tests/course/lab/test_class.py --submissions 200
"""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minillm.course.lab.bulk import RESULTS, read_results
from minillm.course.lab.isolation import unavailable
from minillm.course.lab.report import FORMULA, wide_csv
from tests.course.lab.classroom import COURSE, fill

ISOLATION = "process" if unavailable("namespace") else "namespace"


def test_every_submission_ends_with_its_own_result(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Also after a kill: whoever was graded before it is not graded again, and nobody is lost."""
    (submissions := tmp_path / "in").mkdir()
    expected = fill(submissions, request.config.getoption("--submissions"))
    command = [sys.executable, "-m", "minillm", "teach", "grade", str(submissions), "--to", str(tmp_path / "out")]
    command += ["--only", "ex03", "--jobs", "2", "--isolation", ISOLATION, "--json"]
    before = killed_in_the_middle(command, tmp_path / "out" / RESULTS, lines=len(expected) // 3)
    ended = subprocess.run(command, cwd=COURSE.root, capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout) == {
        "submissions": len(expected),
        "graded": len(expected),
        "faults": 0,
        "isolation": ISOLATION,
    }

    lines = (tmp_path / "out" / RESULTS).read_bytes().splitlines()
    assert [line for line in lines if line in before] == before, "what was graded before the kill is graded again"
    graded = {one.student: one for one in read_results(tmp_path / "out").values()}
    assert graded.keys() == expected.keys()
    most = COURSE.exercise("ex03").points
    for student, (points, status) in expected.items():
        (result,) = graded[student].results
        told = f"{student}: {result.points} points, {result.status}, {result.message}"
        assert {"all": result.points == most, "some": result.points < most, "none": result.points == 0}[points], told
        assert status in (None, result.status), told
        assert result.max_points == most and result.points == sum(check.points for check in result.checks), told

    rows = list(csv.reader(io.StringIO(wide_csv(list(graded.values())).removeprefix("\ufeff"))))
    assert len(rows) == len(expected) + 1 and all(len(row) == 6 for row in rows)
    assert not [cell for row in rows for cell in row if cell.startswith(FORMULA)]
    assert sum(int(row[3]) for row in rows[1:]) == sum(one.points for one in graded.values())


def killed_in_the_middle(command: list[str], results: Path, *, lines: int) -> list[bytes]:
    """Run a command until it has written some lines of results, kill it, and return these lines."""
    process = subprocess.Popen(command, cwd=COURSE.root, stdout=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and (not results.exists() or results.read_bytes().count(b"\n") < lines):
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = results.read_bytes().split(b"\n")
    with results.open("ab") as file:
        file.write(b'{"entry": "half a li')  # the worst moment for a kill
    return [line for line in kept if line]
