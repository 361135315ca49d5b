"""Hand exercises out and take them in: stubs, a course without answers, a learner's zip."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import time
import zipfile
from pathlib import Path

from minillm.course.errors import CourseError
from minillm.course.lab.exercises import ORIGINAL, Course, Exercise
from minillm.course.lab.stubs import make_stub
from minillm.course.lab.syntax import parse
from minillm.course.learner import FileError, read_file, text_of

PACKAGES = ("minillm-course", "torch")


def sync(course: Course, *, write: bool = True) -> list[Path]:
    """Generate all stubs; returns those that were missing or different."""
    stale = []
    for solution in sorted((course.root / "solutions").glob("ex*.py")):
        path = course.root / "exercises" / solution.name
        stub = make_stub(solution.read_text(encoding="utf8"), solution.name)
        if not _holds(path, stub):
            stale.append(path)
            if write:
                path.parent.mkdir(exist_ok=True)
                path.write_text(stub, encoding="utf8")
    return stale


def _holds(path: Path, text: str) -> bool:
    """Whether a file is this text and nothing else, but for line ends and a byte order mark."""
    try:
        return text_of(read_file(path, path.name), path.name) == text
    except FileError:
        return False


def reset(exercise: Exercise) -> Path | None:
    """Put the exercise's file back as it was given, whatever is in its place now; that is moved to .minillm/kept.

    Returns where it is kept; None if there was nothing that differs from the original. What is there is not read for
    this: a folder, a pipe and a file that nobody may read are moved, too.
    """
    path, original, kept = exercise.stub, exercise.original(), None
    if os.path.lexists(path) and not _holds(path, original):
        kept = _free(exercise.root / ".minillm" / "kept" / f"{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}{path.suffix}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, kept)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(original, encoding="utf8")
    return kept


def _free(path: Path) -> Path:
    """The path, or one like it that nothing has yet: two files of one second are both kept."""
    names = (path, *(path.with_stem(f"{path.stem}-{number}") for number in range(2, 1000)))
    return next(name for name in names if not os.path.lexists(name))


def pack(course: Course, to: Path) -> list[str]:
    """Zip all exercises that differ from their originals, with a manifest of hashes and versions. Returns their ids.

    Raises CourseError if there are none, and FileError for a file that cannot be read: better to know it before
    handing in. A file that cannot be understood is packed as it is. The manifest helps to find mistakes; nothing is
    graded by it.
    """
    touched = list[tuple[Exercise, bytes]]()
    for exercise in course.exercises.values():
        data = exercise.handed_in()
        if isinstance(data, bytes) and not _holds(exercise.stub, exercise.original()):
            touched.append((exercise, data))
        elif isinstance(data, FileError) and data.status != "missing":
            raise data
    if not touched:
        raise CourseError("There is nothing to submit: no exercise differs from how it was given.")
    manifest = {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "sha256": {exercise.file_name: hashlib.sha256(data).hexdigest() for exercise, data in touched},
    }
    packed = io.BytesIO()  # in memory first: half a zip is never handed in
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for exercise, data in touched:
            archive.writestr(exercise.file_name, data)
        archive.writestr("manifest.json", json.dumps(manifest, indent=1))
    to.write_bytes(packed.getvalue())
    return [exercise.id for exercise, _ in touched]


def release(course: Course, to: Path) -> list[Path]:
    """Write a course for learners into a new folder: stubs and public checks; no solutions, mutants or hidden checks.

    Returns the files. Raises CourseError if the folder has something in it.
    """
    if to.exists() and any(to.iterdir()):
        raise CourseError(f"{to} is not empty. Name a new folder: nothing there is overwritten.")
    written = []
    for exercise in course.exercises.values():
        checks = exercise.folder / "checks.py"
        folder = to / "tests" / "exercises" / exercise.id
        texts = {
            to / "exercises" / exercise.file_name: exercise.original(),
            folder / ORIGINAL: exercise.original(),
            folder / "checks.py": without_hidden(checks.read_text(encoding="utf8")),
            **({folder / "given.py": exercise.given} if exercise.given else {}),
        }
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf8")
            written.append(path)
    return written


def without_hidden(checks: str) -> str:
    """The source of checks without the functions decorated with `@check(…, hidden=True)`."""
    lines = checks.splitlines(keepends=True)
    for node in reversed(parse(checks).body):
        if isinstance(node, ast.FunctionDef) and any(map(_hides, node.decorator_list)):
            del lines[node.decorator_list[0].lineno - 1 : node.end_lineno]
    return "".join(lines)


def _hides(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and any(
        keyword.arg == "hidden" and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
        for keyword in decorator.keywords
    )
