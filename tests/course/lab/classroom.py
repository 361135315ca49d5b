"""A class as graders meet it: right, wrong, dishonest and broken submissions, with what each must get."""

from __future__ import annotations

import io
import re
import stat
import zipfile
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

from minillm.course.lab.exercises import Exercise, find_course

COURSE = find_course(Path(__file__).parent)
CHEATS = COURSE.root / "tests" / "exercises" / "dishonest"
IMPORT = '__builtins__["__im" + "port__"]'


class Expected(NamedTuple):
    """What a submission must get: all points, none, or something between; and, if it is sure, how it ends."""

    points: str  # "all", "some" or "none"
    status: str | None = None


Write = Callable[[Path, str], None]  # puts one submission into a folder, under a student's name


def fill(folder: Path, count: int) -> dict[str, Expected]:
    """Write `count` submissions of all kinds into a folder. Returns what each student must get."""
    expected = {}
    for number, (kind, write, result) in enumerate(islice(_kinds(COURSE.exercise("ex03")), count)):
        student = f"{number:03d}-{kind}"
        write(folder, student)
        expected[student] = result
    return expected


def disguised(source: str) -> str:
    """A cheat that reading does not recognise: its imports and calls of builtins are put together at run time."""
    source = re.sub(
        r"^( *)from (\S+) import (\w+)(?: as (\w+))?",
        lambda m: f'{m[1]}{m[4] or m[3]} = getattr({IMPORT}("{m[2]}", None, None, ["{m[3]}"]), "{m[3]}")',
        source,
        flags=re.M,
    )
    source = re.sub(r"^( *)import (\w+)", rf'\1\2 = {IMPORT}("\2")', source, flags=re.M)
    return re.sub(r"\b(open|exec)\(", lambda m: f'__builtins__["{m[1][:2]}" + "{m[1][2:]}"](', source)


def zipped(members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    """A zip of files and of symbolic links."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        for name, target in (links or {}).items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, target)
    return file.getvalue()


def _kinds(exercise: Exercise) -> Iterator[tuple[str, Write, Expected]]:
    """Kinds of submissions, one after the other, without end: rare ones among the usual."""
    solution, name = exercise.solution.read_bytes(), exercise.file_name
    bomb = zipped({name: b"0" * (300 << 20)})
    none, everything = Expected("none"), Expected("all", "passed")
    odd = [
        ("folder", _folder({name: solution}), everything),
        ("zip", _file(".zip", zipped({f"my work/{name}": solution})), everything),
        ("stub", _file(".py", exercise.original().encode()), Expected("none", "failed")),
        ("broken-zip", _file(".zip", b"PK\x03\x04 and then nothing"), Expected("none", "unreadable")),
        ("empty-zip", _file(".zip", zipped({})), Expected("none", "missing")),
        ("empty-file", _folder({name: b""}), Expected("none", "missing")),
        ("empty-folder", _folder({}), Expected("none", "missing")),
        ("utf16", _folder({name: solution.decode().encode("utf-16")}), Expected("none", "unreadable")),
        ("null-bytes", _folder({name: b"\0" * 100}), Expected("none", "syntax")),
        ("syntax", _folder({name: b"def write(:\n"}), Expected("none", "syntax")),
        ("zip-slip", _file(".zip", zipped({f"../../{name}": solution})), Expected("none", "missing")),
        ("zip-link", _file(".zip", zipped({}, {name: str(exercise.solution)})), Expected("none", "missing")),
        ("zip-bomb", _file(".zip", bomb), Expected("none", "unreadable")),
        ("link", _link(exercise.solution), Expected("none", "unreadable")),
        ("renamed", _folder({"solution (1).py": solution}), everything),
        ("with-torch", _folder({name: solution, "torch.py": b"raise SystemExit(0)"}), everything),
    ]
    right = solution.decode()
    wrong = cycle(
        (m.name, _file(".py", m.source(right).encode()), Expected("some", "failed")) for m in exercise.mutants
    )
    cheats = cycle(
        (path.stem, _folder({name: disguised(path.read_text(encoding="utf8")).encode()}), none)
        for path in sorted(CHEATS.glob("*.py"))
    )
    for strange in cycle(odd):
        yield strange
        yield next(cheats)
        yield next(wrong)
        yield next(cheats)


def _file(ending: str, data: bytes) -> Write:
    """One file; a `.py` keeps its heading, by which it is known."""
    return lambda folder, student: (folder / f"{student}{ending}").write_bytes(data)


def _folder(members: dict[str, bytes]) -> Write:
    def write(folder: Path, student: str) -> None:
        (folder / student).mkdir()
        for name, data in members.items():
            (folder / student / name).write_bytes(data)

    return write


def _link(target: Path) -> Write:
    return lambda folder, student: (folder / f"{student}.py").symlink_to(target)
