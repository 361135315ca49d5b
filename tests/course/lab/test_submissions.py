"""Collecting: whatever a learning platform makes of a submission, and whatever somebody put into a zip."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from minillm.course.errors import CourseError
from minillm.course.lab.exercises import Course
from minillm.course.lab.submissions import MEMBERS, Submission, collect
from minillm.course.learner import SOURCE_BYTES
from tests.course.lab.classroom import zipped

NAME, SOURCE = "ex01_doubling.py", b"x = 1\n"


def one(course: Course, folder: Path) -> Submission:
    """The only submission in a folder."""
    (submission,) = collect(course, folder)
    return submission


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    (folder := tmp_path / "in").mkdir()
    return folder


@pytest.mark.parametrize(
    ("members", "found", "flag"),
    [
        ({NAME: SOURCE}, True, ""),
        ({f"a/b/{NAME}": SOURCE}, True, ""),
        ({"EX01_Doubling (1).PY": SOURCE}, True, ""),
        ({"final_FINAL.py": b'"""Exercise 01 \xc2\xb7 Doubling\n"""'}, True, ""),
        ({NAME: SOURCE, "ex01_old.py": b"y"}, True, "several files for ex01"),
        ({"notes.txt": b"x", "__MACOSX/._ex01.py": b"x"}, False, ""),
        ({"ex77_other.py": b"x"}, False, "belongs to no exercise"),
        ({f"../{NAME}": SOURCE}, False, "leads out"),
        ({f"/abs/{NAME}": SOURCE}, False, "leads out"),
    ],
)
def test_files_find_their_exercise(
    course: Course, inbox: Path, members: dict[str, bytes], found: bool, flag: str
) -> None:
    (inbox / "ada.zip").write_bytes(zipped(members))
    submission = one(course, inbox)
    assert (submission.student, submission.problem) == ("ada", "")
    assert set(submission.files) == ({"ex01"} if found else set())
    assert submission.files.get("ex01") in (SOURCE, None, members.get("final_FINAL.py"))
    assert flag in " ".join(submission.flags)


def test_links_are_left_alone(course: Course, inbox: Path) -> None:
    secret = course.root / "solutions" / NAME
    (inbox / "a").mkdir()
    (inbox / "a" / NAME).symlink_to(secret)
    (inbox / "a" / "folder").symlink_to(secret.parent)
    (inbox / "b.py").symlink_to(secret)
    (inbox / "c.zip").write_bytes(zipped({}, {NAME: str(secret)}))
    os.mkfifo(inbox / "a" / "ex01.py")
    assert [submission.files for submission in collect(course, inbox)] == [{}, {}, {}]


def test_bombs_are_read_to_a_limit(course: Course, inbox: Path) -> None:
    (inbox / "a.zip").write_bytes(zipped({NAME: b"0" * (64 << 20)}))
    (inbox / "b.zip").write_bytes(zipped({f"{i}.txt": b"" for i in range(MEMBERS + 1)}))
    big, many = collect(course, inbox)
    assert len(big.files["ex01"]) == SOURCE_BYTES + 1
    assert "files" in many.problem


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", zipped({NAME: SOURCE})[:-30], b"not a zip"])
def test_broken_zips_are_a_problem_of_their_own(course: Course, inbox: Path, data: bytes) -> None:
    (inbox / "a.zip").write_bytes(data)
    (inbox / "b.zip").write_bytes(zipped({NAME: SOURCE}))
    broken, fine = collect(course, inbox)
    assert "cannot be read" in broken.problem and fine.files == {"ex01": SOURCE}


def test_a_damaged_member_is_a_problem(course: Course, inbox: Path) -> None:
    data = bytearray(zipped({NAME: os.urandom(1000)}))
    data[100] ^= 255
    (inbox / "a.zip").write_bytes(data)
    assert "CRC" in one(course, inbox).problem


def test_nothing_handed_in_is_an_error(course: Course, inbox: Path) -> None:
    with pytest.raises(CourseError, match="proves nothing"):
        collect(course, inbox)
    with pytest.raises(CourseError, match="no folder"):
        collect(course, inbox / "missing")
