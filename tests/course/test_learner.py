"""A learner's file, whatever has become of it: read as Python reads it, or refused with words that help."""

from __future__ import annotations

import ast
import codecs
import os
import random
import time
from importlib.util import decode_source
from pathlib import Path

import pytest

from minillm.course.errors import CourseError, LearnerError
from minillm.course.lab.exercises import Course, find_course
from minillm.course.lab.release import pack, release, reset
from minillm.course.lab.rules import Refusal, read
from minillm.course.learner import SOURCE_BYTES, FileError, text_of, tree_of
from minillm.course.use.files import EXERCISES, load_files
from tests.course.lab.conftest import SOLUTION, course  # noqa: F401

NAME = "ex01_doubling.py"
LETTERS = SOLUTION.replace("Twice x.", "Zweimal é, ü und ß.").replace("·", "-").replace("●○○○○", "o")
ENCODINGS = ["utf-8", "utf-8-sig", "latin-1", "cp1252", "utf-16", "utf-16-le", "utf-32", "shift_jis", "utf-7", "koi8-r"]
DECLARED = [
    "",
    "",
    "utf-8",
    "latin-1",
    "cp1252",
    "utf8",
    "koi8-r",
    "shift_jis",
    "utf-7",
    "utf-16",
    "rot13",
    "nonsense",
    "idna",
]
HIDING = {"utf-7", "utf-16", "rot13", "idna", "utf-16-le", "utf-32"}  # ASCII means something else in them


def damaged(rng: random.Random) -> tuple[bytes, str]:
    """A learner's file in some encoding, with some declaration, damaged somewhere; and what it declares."""
    declared = rng.choice(DECLARED)
    lines = LETTERS.split("\n")
    if declared:
        lines.insert(
            rng.choice([0, 0, 1, 2]),
            rng.choice(["# -*- coding: {} -*-", "# vim: set fileencoding={} :", "#coding={}"]).format(declared),
        )
        if rng.random() < 0.3:
            lines.insert(0, rng.choice(["", "#!/usr/bin/env python", "   # first"]))
    encoding = declared if declared in ENCODINGS and rng.random() < 0.5 else rng.choice(ENCODINGS)
    data = rng.choice(["\n", "\n", "\r\n", "\r"]).join(lines).encode(encoding, "replace")
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        at = rng.randrange(len(data) + 1)
        piece = rng.choice([b"", bytes([rng.randrange(256)]), b"\0", b"((((", b"\xff\xfe", b"\xef\xbb\xbf"])
        data = rng.choice([data[:at], data[:at] + piece + data[at + 1 :], data[:at] + piece + data[at:]])
    return data, declared


def as_python_reads(data: bytes) -> str | None:
    """The oracle: the tree that Python's parser makes of these bytes, None if it refuses them."""
    try:
        return ast.dump(ast.parse(data))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def is_text(data: bytes) -> bool:
    """Whether all bytes are text for Python's importer; its parser does not look at those in comments."""
    try:
        decode_source(data.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))
    except (SyntaxError, ValueError, LookupError):
        return False
    return True


def as_we_read(data: bytes) -> str | FileError:
    try:
        return ast.dump(tree_of(text_of(data, NAME), NAME))
    except FileError as error:
        return error


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_it_is_read_as_python_reads_it(pytestconfig: pytest.Config) -> None:
    """By hand: pytest tests/course/test_learner.py --damages 100000."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    read_by_both = 0
    for case in range(pytestconfig.getoption("--damages")):
        data, declared = damaged(rng)
        ours, theirs = as_we_read(data), as_python_reads(data)
        told = f"{seed=}, {case=}, {declared=}, {data[:80]!r}: {ours}"
        if isinstance(ours, str):
            marked = data.startswith(codecs.BOM_UTF8) and declared  # Python refuses to be told twice; we read UTF-8
            assert ours == theirs or marked, told
            read_by_both += ours == theirs
        else:
            empty = not data.removeprefix(codecs.BOM_UTF8).strip()
            assert theirs is None or not is_text(data) or empty or declared in HIDING, told
            assert NAME in str(ours) and len(str(ours)) < 2000 + len(data), told
    assert read_by_both > pytestconfig.getoption("--damages") // 10


def test_what_was_read_says_utf_8_when_it_is_written_again() -> None:
    """The worker gets text and writes a file: a declaration that stayed would make Python read another program."""
    text = text_of("# coding: latin-1\nx = 'é'\n".encode("latin-1"), NAME)
    assert ast.dump(ast.parse(text.encode("utf8"))) == ast.dump(ast.parse("x = 'é'\n"))


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"", "missing", "is empty"),
        (codecs.BOM_UTF8 + b"\n\t\n", "missing", "is empty"),
        ("x = 1".encode("utf-16"), "unreadable", "not UTF-8 text but UTF-16"),
        ("x = 1".encode("utf-16-be"), "syntax", "line 1: there is a NUL byte"),
        ("x = 1\ny = 'é'".encode("latin-1"), "unreadable", "line 2, byte 11. Save it again as UTF-8"),
        (b"# coding: rot13\nx = 1", "unreadable", "encoding 'rot13'"),
        (b"# coding: utf-7\nx = 1", "unreadable", "encoding 'utf-7'"),
        (b"# coding: ascii\nx = '\xc3\xa9'", "unreadable", "ascii, which it declares"),
        (b"(" * 100_000, "syntax", NAME),
        (b"x = (\n", "syntax", "line 1"),
    ],
)
def test_what_cannot_be_read_is_told(data: bytes, status: str, words: str) -> None:
    error = as_we_read(data)
    assert isinstance(error, FileError) and error.status == status and words in str(error)


def place(kind: str, path: Path) -> None:
    """Put something else where a learner's file should be."""
    path.unlink(missing_ok=True)
    if kind == "a folder":
        path.mkdir()
        (path / "mine.py").write_text("x")
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link to nothing":
        path.symlink_to("nowhere")
    elif kind == "a link to itself":
        path.symlink_to(path.name)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "huge":
        path.write_bytes(b"#" * (SOURCE_BYTES + 1))
    elif kind == "no folder":
        path.parent.rename(path.parent.with_name("elsewhere"))
    elif kind != "deleted":
        path.write_bytes({"empty": b"", "a NUL": b"\0", "UTF-16": "x".encode("utf-16"), "no text": b"\xff" * 99}[kind])


KINDS = [
    *("deleted", "a folder", "a pipe", "a link to nothing", "a link to itself", "a device", "huge", "no folder"),
    *("empty", "a NUL", "UTF-16", "no text"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_course_knows_itself_whatever_a_learner_did(kind: str, course: Course) -> None:  # noqa: F811
    """Facts, a named refusal, and a way back; the same in a course with solutions and in one without."""
    release(course, released := course.root / "released")
    for root in (course.root, released):
        exercise = Course(root).exercise("ex01")
        place(kind, exercise.stub)
        again = Course(root).exercise("ex01")
        assert (again.title, again.minutes, again.difficulty, again.points) == ("Doubling", 5, 1, exercise.points)
        refused = read(again.handed_in(), again)
        assert isinstance(refused, Refusal) and NAME in refused.message
        assert "lab reset ex01" in refused.message or refused.status == "syntax"
        if kind in ("empty", "a NUL", "UTF-16", "no text"):
            assert pack(Course(root), root / "x.zip") == ["ex01"], "what is there is handed in, whatever it is"
        else:
            with pytest.raises((FileError, CourseError), match=f"{NAME}|nothing to submit"):
                pack(Course(root), root / "x.zip")
        kept = reset(again)
        assert again.stub.read_text(encoding="utf8") == again.original() and not again.stub.is_symlink()
        assert (kept is None) == (kind in ("deleted", "no folder"))
        if kind == "a folder":
            assert kept is not None and (kept / "mine.py").read_text() == "x"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("deleted", "no folder")])
def test_use_refuses_the_same(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "exercises" / "ex04_sampling.py"
    path.parent.mkdir()
    path.write_text("x = 1")
    place(kind, path)
    if kind == "a folder":  # as a place of its own it is a folder without exercises
        with pytest.raises(LearnerError, match="is a folder and no file"):
            load_files(path.parent)
    for where in (path, path.parent):
        with pytest.raises(LearnerError, match="ex04_sampling"):
            load_files(where)


def test_two_resets_in_a_second_keep_both(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    exercise = course.exercise("ex01")
    for text in ("first", "second", "third"):
        exercise.stub.write_text(text)
        reset(exercise)
    kept = (course.root / ".minillm" / "kept").iterdir()
    assert sorted(path.read_text() for path in kept) == ["first", "second", "third"]


COPIES = [
    *(
        "ex01.py",
        "ex01_a.py",
        "ex01_copy.py",
        "ex01_doubling_old.py",
        "ex01_doubling (1).py",
        "ex01_zz.py",
        "Ex01_doubling.PY",
    ),
    *("ex01_doubling.py~", ".ex01_doubling.py.swp", "#ex01_doubling.py#", "ex01_doubling.py.bak", "ex01_doubling.pyc"),
    *(".ipynb_checkpoints/ex01_doubling-checkpoint.py", "._ex01_doubling.py", "old/ex01_doubling.py", "ex01_/x.py"),
]


def test_a_copy_beside_it_is_never_the_exercise(course: Course) -> None:  # noqa: F811
    """Copies with anything in them, in exercises/ and of the folder with the checks; untouched and edited ones."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    exercise = course.exercise("ex01")
    mine = exercise.original() + "\n# my work\n"
    for name in rng.sample(COPIES, len(COPIES)):
        copy = exercise.stub.parent / name
        copy.parent.mkdir(exist_ok=True, parents=True)
        copy.write_bytes(rng.choice([b"", b"\xff\0", b"# a backup\n", exercise.original().encode()]))
        exercise.stub.write_text(mine, encoding="utf8")
        again = Course(course.root)
        assert list(again.exercises) == ["ex01"], f"{seed=}"
        assert again.exercise("ex01").handed_in() == mine.encode(), f"{seed=}"
        assert pack(again, course.root / "x.zip") == ["ex01"], f"{seed=}"
        before = copy.read_bytes()
        reset(again.exercise("1"))
        assert copy.read_bytes() == before and exercise.stub.read_text(encoding="utf8") == exercise.original()
    (course.root / "tests" / "exercises" / "ex01_backup").mkdir()
    (course.root / "tests" / "exercises" / "ex01_backup" / "checks.py").write_text("1 / 0")
    assert list(Course(course.root).exercises) == ["ex01"]


@pytest.mark.parametrize("name", ["ex01", "1", "01", " EX1 ", NAME, f"exercises/{NAME}", f"/somewhere/{NAME}"])
def test_an_exercise_has_names(name: str, course: Course) -> None:  # noqa: F811
    assert course.exercise(name).id == "ex01"


@pytest.mark.parametrize(
    "name", ["", "ex01_a.py", "ex01_doubling", "ex011", "-1", "1.0", "9" * 5000, "ex٠١", "ex1\n2", "\0", "../ex01"]
)
def test_what_is_no_name_of_an_exercise_is_told(name: str, course: Course) -> None:  # noqa: F811
    with pytest.raises(CourseError, match="There is no exercise"):
        course.exercise(name)


def test_what_belongs_to_the_course_and_is_lost_is_named(course: Course) -> None:  # noqa: F811
    release(course, released := course.root / "released")
    for path, damage in (("stub.py", None), ("stub.py", "no header"), ("checks.py", "1 / 0"), ("checks.py", "(")):
        file = released / "tests" / "exercises" / "ex01" / path
        whole = file.read_text(encoding="utf8")
        file.unlink() if damage is None else file.write_text(damage)
        with pytest.raises(CourseError, match=path):
            Course(released).exercise("ex01")
        file.write_text(whole, encoding="utf8")
    assert Course(released).exercise("ex01").title == "Doubling"


# In the engine's place


def test_use_knows_the_names_of_the_course() -> None:
    assert tuple(exercise.file_name for exercise in find_course().exercises.values()) == EXERCISES


@pytest.mark.parametrize(
    ("source", "encoding"),
    [
        ("", "utf-8-sig"),
        ("# coding: latin-1\n", "latin-1"),
        ("#!python\n# coding: cp1252\n", "cp1252"),
        ("\r\n", "utf8"),
    ],
)
def test_use_reads_what_the_lab_reads(source: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "ex04_sampling.py"
    path.write_bytes((source + "NAME = 'é'\ndef top_k(x):\n    return x\n").encode(encoding))
    (file,) = load_files(tmp_path).values()
    assert file.module.NAME == "é" and file.missing(["top_k", "top_p"]) == ["top_p"]


def test_use_takes_the_exact_name_or_what_is_named(tmp_path: Path) -> None:
    for name in ("ex04_zz_backup.py", "ex04.py", "ex04_a.py"):
        (tmp_path / name).write_text(f"NAME = {name!r}\n")
    with pytest.raises(LearnerError, match=r"ex04.py should be called ex04_sampling.py"):
        load_files(tmp_path)
    assert load_files(tmp_path / "ex04_a.py")["ex04"].module.NAME == "ex04_a.py"
    (tmp_path / "ex04_sampling.py").write_text("NAME = 'mine'\n")
    assert load_files(tmp_path)["ex04"].module.NAME == "mine"


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("import sys\nsys.exit('bye')\n", "Line 2: SystemExit, before top_k is there"),
        ("raise SystemExit\n", "before top_k"),
        ("exit()\n", "before top_k"),
        ("raise GeneratorExit\n", "Line 1: GeneratorExit"),
        ("class Mine(BaseException):\n    def __str__(self): 1 / 0\nraise Mine\n", "Line 3: Mine: "),
        ("raise ValueError('x' * 9999)\n", "ValueError: xxx"),
        ("return 1\n", "Line 1: SyntaxError"),
        ("from __future__ import nonsense\n", "SyntaxError"),
        ("import torch\ntorch.ones(2) @ torch.ones(3)\n", "Line 2: RuntimeError"),
    ],
)
def test_a_file_that_does_not_get_to_its_functions_is_named(ending: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "ex04_sampling.py"
    path.write_text(f"{ending}def top_k(x): return x\n")
    with pytest.raises(LearnerError) as caught:
        load_files(path)
    assert words in str(caught.value) and len(str(caught.value)) < 2000


def test_a_file_that_ends_itself_below_its_functions_has_them(tmp_path: Path) -> None:
    path = tmp_path / "ex04_sampling.py"
    path.write_text("import sys\ndef top_k(x): return x\nsys.exit(0)\n")
    assert load_files(path)["ex04"].module.top_k(3) == 3


def test_ctrl_c_passes(tmp_path: Path) -> None:
    path = tmp_path / "ex04_sampling.py"
    path.write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_files(path)
