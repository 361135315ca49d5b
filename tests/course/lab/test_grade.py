"""Grading: points for right values alone, and a diagnosis that comes from comparing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from minillm.course.errors import CourseError
from minillm.course.lab.checks import Case, describe, judge
from minillm.course.lab.compare import difference
from minillm.course.lab.exercises import Course, find_course
from minillm.course.lab.grade import Grader
from minillm.course.lab.protocol import Foreign, Reply
from minillm.course.lab.selfcheck import DRAWS, check_course, check_exercise
from tests.course.lab.conftest import SOLUTION


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(seed=7) as grader:
        yield grader


def grade(grader: Grader, course: Course, old: str = "", new: str = ""):
    """The result of the solution with one piece replaced."""
    assert old in SOLUTION
    return grader.grade(course.exercise("ex01"), SOLUTION.replace(old, new).encode())


def test_the_solution_gets_all_points(grader: Grader, course: Course) -> None:
    result = grade(grader, course)
    assert (result.status, result.points, result.max_points) == ("passed", 4, 4)


def test_the_stub_gets_none_and_is_told_what_to_write(grader: Grader, course: Course) -> None:
    result = grader.grade(course.exercise("1"), course.exercise("1").stub.read_bytes())
    assert result.points == 0 and {check.status for check in result.checks} == {"todo"}
    assert result.first_failure.told() == ["Next: double is yours to write."]


def test_what_is_wrong_is_told_before_what_is_not_written(grader: Grader, course: Course) -> None:
    source = SOLUTION.replace("return 2 * x", 'raise NotImplementedError("later")').replace("x // 2", "x // 3")
    result = grader.grade(course.exercise("ex01"), source.encode())
    assert result.checks[0].status == "todo" and result.first_failure.task == "halve"


def test_a_mistake_is_called_by_its_name_however_it_is_written(grader: Grader, course: Course) -> None:
    result = grade(grader, course, "return 2 * x", "y = 4 * x\n    return y - x")
    wrong = result.checks[0]
    assert (wrong.status, wrong.points, wrong.mutant) == ("wrong", 0, "tripled")
    assert "somebody triples" in " ".join(wrong.told()) and "float32[3]" in wrong.calls[0]
    assert result.points == 2, "zero tripled is right, and so is the other function"


def test_an_unknown_mistake_is_not_given_a_name(grader: Grader, course: Course) -> None:
    assert grade(grader, course, "2 * x", "5 * x").checks[0].mutant == ""


def test_an_error_not_raised_is_wrong(grader: Grader, course: Course) -> None:
    check = grade(grader, course, "if x % 2:", "if x > 99:").checks[1]
    assert check.what == "halve(…): expected ValueError, got no error" and check.mutant == "never_odd"


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (None, "missing", "There is no ex01_doubling.py"),
        (b" \n", "missing", "is empty"),
        (b"\xff\xfe\0", "unreadable", "not UTF-8"),
        (b"#" * (1 << 20), "unreadable", "bytes"),
        (b"def f(:\n    pass", "syntax", "line 1"),
        (b"x = '\0'", "syntax", "ex01_doubling.py"),
        (b"import os", "forbidden", "line 1 imports os, but ex01 may import"),
        (b"from minillm.generate import decode", "forbidden", "imports minillm.generate"),
        (b"import torch\nx = torch.add", "forbidden", "line 2 uses add"),
        (b"from torch import add", "forbidden", "uses add"),
        (b"x = eval('1')", "forbidden", "uses eval"),
    ],
)
def test_what_does_not_run_is_told_why(
    grader: Grader, course: Course, data: bytes | None, status: str, words: str
) -> None:
    result = grader.grade(course.exercise("ex01"), data)
    assert (result.status, result.points, result.max_points, result.checks) == (status, 0, 4, ())
    assert words in result.message


def test_banned_operations_hold_without_reading(grader: Grader, course: Course) -> None:
    """getattr hides the name from a reader; the worker sees the call."""
    source = SOLUTION.replace("return 2 * x", "return getattr(torch, 'a' + 'dd')(x, x)")
    result = grader.grade(course.exercise("ex01"), source.encode())
    assert "add is what this exercise is about" in result.checks[0].what


def test_too_many_stops_end_a_submission(course: Course) -> None:
    with Grader(patience=1, diagnoses=0) as grader:
        result = grade(grader, course, "return 2 * x", "while True: pass")
    assert [check.status for check in result.checks] == ["timeout", "given up", "given up"]


def test_fresh_inputs_for_each_seed_and_the_same_for_one(course: Course) -> None:
    exercise = course.exercise("ex01")
    cases = [exercise.checks[0].case(seed).script().tensors["t0"].tolist() for seed in (1, 1, 2)]
    assert cases[0] == cases[1] != cases[2]


def test_a_course_checks_itself(course: Course) -> None:
    findings = list(check_course(course, list(course.exercises.values()), seed=1))
    assert not [finding for finding in findings if not finding.ok or not finding.diagnosed]
    assert sum(finding.kind == "mutant" for finding in findings) == 4


@pytest.mark.parametrize(
    ("file", "old", "new", "kind"),
    [
        ("solutions/ex01_doubling.py", "return 2 * x", "return 3 * x", "solution"),
        ("tests/exercises/ex01/mutants.py", '"3 * x"', '"x * 2"', "mutant"),
        ("tests/exercises/ex01/checks.py", ", hidden=True", "", "author"),
        ("tests/exercises/ex01/checks.py", '"Think.", ', "", "author"),
        ("tests/exercises/ex01/checks.py", 'case.raises("ValueError", case.learner.halve, 3)', "pass", "mutant"),
    ],
)
def test_a_bad_exercise_is_found(course: Course, file: str, old: str, new: str, kind: str) -> None:
    """Mutants of the course: each makes the self-check complain about the right thing."""
    path = course.root / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    if kind == "solution":  # its mutants are pieces of it
        (course.root / "tests/exercises/ex01/mutants.py").write_text("MUTANTS = ()")
    bad = [finding for finding in check_exercise(Course(course.root).exercise("ex01"), 1) if not finding.ok]
    assert kind in {finding.kind for finding in bad}


def test_a_check_that_is_unfair_on_some_draws_is_found(course: Course) -> None:
    path = course.root / "tests/exercises/ex01/checks.py"
    path.write_text(path.read_text().replace("(x), 2 * x", "(x), (2 + (case.integer(0, 2) == 0)) * x"))
    unfair = Course(course.root).exercise("ex01")
    with Grader(diagnoses=0) as grader:
        passed = set()
        for seed in range(DRAWS):
            grader.reseed(seed)
            passed.add(grader.grade(unfair, unfair.solution.read_bytes()).passed)
    assert passed == {True, False}
    (bad,) = [finding for finding in check_exercise(unfair, seed=0) if finding.kind == "solution"]
    assert not bad.ok and "seed" in bad.detail


def test_a_mutant_that_drifted_is_an_error(course: Course) -> None:
    mutant = course.exercise("ex01").mutants[0]
    with pytest.raises(CourseError, match="stands 0 times"):
        mutant.source("def double(x): return x + x")


def test_nothing_to_check_proves_nothing(course: Course) -> None:
    with pytest.raises(CourseError, match="proves nothing"):
        list(check_course(course, []))


def test_there_is_no_such_exercise() -> None:
    with pytest.raises(CourseError, match="There are: ex01"):
        find_course().exercise("ex99")


class TestJudging:
    """Strange values are wrong, and no reason to stop."""

    def test_what_cannot_be_judged_is_wrong(self) -> None:
        case = Case(seed=0)
        case.require(case.learner.f(), lambda got: None if got[0] > 3 else "small")
        assert judge(case, Reply("ok", ([4],))) is None
        for value in (None, Foreign("X"), "text", {}, 3):
            assert "cannot be judged" in judge(case, Reply("ok", (value,))).what

    @pytest.mark.parametrize(
        ("got", "expected", "words"),
        [
            (3, 3.0, None),
            (True, 1, "expected int 1, got bool True"),
            (1, True, "expected bool True"),
            (float("nan"), 1.0, "got nan"),
            (10**400, 1.0, "cannot"),
            ([1, 2], [1, 3], "item 1: expected 3, got 2"),
            ([1], [1, 2], "expected 2 items, got 1"),
            ((1,), [1], "expected a list of 1 items"),
            ({"a": 1}, {"a": 2}, "expected 2, got 1"),
            (Foreign("Liar"), 1, "an object of class Liar"),
            (None, 1, "got None"),
        ],
    )
    def test_differences(self, got, expected, words: str | None) -> None:
        case = Case(seed=0)
        case.expect(case.learner.f(), expected)
        failure = judge(case, Reply("ok", (got,)))
        assert (failure is None) if words is None else (words in failure.what)

    def test_tensors(self) -> None:
        import torch

        a = torch.arange(6.0).view(2, 3)
        assert difference(a, a.clone()) is None
        assert difference(a, a.view(3, 2)) == "expected shape [3, 2], got [2, 3]"
        assert "dtype" in difference(a, a.double())
        assert "1 of 6 numbers differ, first at [1, 1]: expected 4.5 5, got 4 5" in difference(
            a, a + torch.tensor([[0, 0, 0], [0, 0.5, 0]])
        )
        nan = torch.full((2,), float("nan"))
        assert difference(nan, nan) is None and difference(nan, torch.zeros(2))

    def test_calls_are_told_by_shape(self) -> None:
        import torch

        assert describe(torch.zeros(2, 3)) == "float32[2, 3]" and describe([torch.zeros(1)]) == "[float32[1]]"
        case = Case(seed=0)
        case.learner.Cache(4).write(0, torch.zeros(2)).rows[0, :3].sum()
        assert case.calls()[-1] == "write(…).rows[0, :3].sum()"
