"""Hand exercises out and take them in: stubs, a course without answers, a learner's zip."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import platform
import shutil
import time
import zipfile
from pathlib import Path

from minillm.course.lab.exercises import ORIGINAL, Course, Exercise
from minillm.course.lab.stubs import make_stub
from minillm.course.lab.syntax import parse
from minillm.errors import CourseError

PACKAGES = ("minillm-course", "torch")


def sync(course: Course, *, write: bool = True) -> list[Path]:
    """Generate all stubs; returns those that were missing or different."""
    stale = []
    for solution in sorted((course.root / "solutions").glob("ex*.py")):
        path = course.root / "exercises" / solution.name
        stub = make_stub(solution.read_text(encoding="utf8"), solution.name)
        if not path.exists() or path.read_text(encoding="utf8") != stub:
            stale.append(path)
            if write:
                path.parent.mkdir(exist_ok=True)
                path.write_text(stub, encoding="utf8")
    return stale


def put_aside(exercise: Exercise) -> Path | None:
    """Keep a copy of the learner's file in .minillm/kept; None if there is nothing that differs from the original."""
    if not exercise.stub.exists() or exercise.stub.read_bytes() == exercise.original().encode():
        return None
    kept = exercise.root / ".minillm" / "kept" / f"{exercise.stub.stem}-{time.strftime('%Y%m%d-%H%M%S')}.py"
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(exercise.stub, kept)
    return kept


def pack(course: Course, to: Path) -> list[str]:
    """Zip all exercises that differ from their originals, with a manifest of hashes and versions. Returns their ids.

    Raises CourseError if there are none. The manifest helps to find mistakes; nothing is graded by it.
    """
    touched = [e for e in course.exercises.values() if e.stub.exists() and e.stub.read_text("utf8") != e.original()]
    if not touched:
        raise CourseError("There is nothing to submit: no exercise differs from how it was given.")
    manifest = {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "sha256": {e.file_name: hashlib.sha256(e.stub.read_bytes()).hexdigest() for e in touched},
    }
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as archive:
        for exercise in touched:
            archive.write(exercise.stub, exercise.file_name)
        archive.writestr("manifest.json", json.dumps(manifest, indent=1))
    return [exercise.id for exercise in touched]


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
