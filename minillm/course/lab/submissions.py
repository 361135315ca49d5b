"""What students hand in: folders, zips and single files, whatever a learning platform made of them.

Nothing is ever unpacked to disk. Of each archive only the files of the course are read, up to a size, into memory: a
path that leads elsewhere, a link, a bomb or a file in the wrong place can do nothing there.
"""

from __future__ import annotations

import re
import stat
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from minillm.course.errors import CourseError
from minillm.course.lab.exercises import Course
from minillm.course.learner import SOURCE_BYTES

MEMBERS, ARCHIVE_BYTES = 2000, 32 << 20
Candidate = tuple[str, Callable[[], bytes]]  # a path inside a submission, and how to read it


@dataclass(frozen=True)
class Submission:
    """What one entry of a folder holds: sources by exercise, and what was strange about it.

    entry: the name of the file or folder, unique; student: the same without its ending. problem: why nothing at all
    could be read.
    """

    entry: str
    student: str
    files: dict[str, bytes] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    problem: str = ""


def collect(course: Course, folder: Path) -> list[Submission]:
    """All submissions in a folder, by name. Raises CourseError if there are none."""
    if not folder.is_dir():
        raise CourseError(f"{folder} is no folder. Name the one that holds a zip, a folder or a .py file per student.")
    entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    if not entries:
        raise CourseError(f"{folder} is empty: a run without submissions proves nothing.")
    return [_submission(course, path) for path in entries]


def _submission(course: Course, path: Path) -> Submission:
    """One entry. What cannot be read is a submission, too: with a problem."""
    student = path.name if path.is_dir() else path.stem
    flags: list[str] = []
    try:
        candidates = list(_candidates(path, flags))
        files = _assigned(course, candidates, flags)
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        return Submission(path.name, student, problem=f"{path.name} cannot be read: {error}")
    return Submission(path.name, student, files, tuple(flags))


def _candidates(path: Path, flags: list[str]) -> Iterator[Candidate]:
    """All regular files of an entry. Links and other special files are named in the flags and left alone."""
    mode = path.lstat().st_mode
    if stat.S_ISDIR(mode):
        for below in sorted(path.rglob("*")):
            if stat.S_ISREG(below.lstat().st_mode) and not _through_link(below, path):
                yield below.relative_to(path).as_posix(), partial(_read, below)
            elif not below.is_dir() or below.is_symlink():
                flags.append(f"{below.name} is no regular file")
    elif not stat.S_ISREG(mode):
        raise ValueError("it is a link or a special file")
    elif zipfile.is_zipfile(path) or path.suffix.lower() == ".zip":
        yield from _members(path, flags)
    else:
        yield path.name, partial(_read, path)


def _members(path: Path, flags: list[str]) -> Iterator[Candidate]:
    """The regular files of a zip."""
    if path.stat().st_size > ARCHIVE_BYTES:
        raise ValueError(f"it has more than {ARCHIVE_BYTES >> 20} MiB")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if len(members) > MEMBERS:
        raise ValueError(f"it holds {len(members)} files; {MEMBERS} is the most")
    for member in members:
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            flags.append(f"{member.filename} is no regular file")
        elif ".." in PurePosixPath(member.filename).parts or member.filename.startswith("/"):
            flags.append(f"{member.filename} leads out of the archive")
        elif not member.is_dir():
            yield member.filename, partial(_read_member, path, member.filename)


def _assigned(course: Course, candidates: list[Candidate], flags: list[str]) -> dict[str, bytes]:
    """Which file is whose exercise: by its name, and for what is called otherwise by its first line."""
    found: dict[str, tuple[tuple[bool, int, str], bytes]] = {}
    for name, read in candidates:
        path = PurePosixPath(name)
        if path.suffix.lower() != ".py" or any(part == "__MACOSX" or part.startswith(".") for part in path.parts):
            continue  # what systems and editors keep for themselves
        data = read()
        named = re.match(r"ex\d\d", path.name.lower())
        headed = re.match(rb'\s*"""Exercise (\d\d)', data)
        id = named[0] if named else f"ex{headed[1].decode()}" if headed else ""
        if id not in course.exercises:
            flags.append(f"{name} belongs to no exercise")
            continue
        rank = path.name != course.exercises[id].file_name, len(path.parts), name
        if id in found:
            flags.append(f"there are several files for {id}")
        found[id] = min(found.get(id, (rank, data)), (rank, data))
    return {id: data for id, (_, data) in found.items()}


def _read(path: Path) -> bytes:
    """At most one byte more than a source may have: enough to refuse it."""
    with path.open("rb") as file:
        return file.read(SOURCE_BYTES + 1)


def _read_member(archive: Path, name: str) -> bytes:
    with zipfile.ZipFile(archive) as opened, opened.open(name) as file:
        return file.read(SOURCE_BYTES + 1)


def _through_link(path: Path, top: Path) -> bool:
    return any(parent.is_symlink() for parent in path.parents if parent.is_relative_to(top) and parent != top)
