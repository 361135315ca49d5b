"""Learners' files as modules: found by path, loaded with messages that help, and what is not written yet in them."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from minillm.errors import LearnerError

NAME = re.compile(r"(ex\d\d)(_\w+)?\.py")


class MissingPackageError(LearnerError):
    """A learner's file that imports what is not installed."""


@dataclass(frozen=True)
class LearnerFile:
    """One exercise as somebody solved it; or tried to: `unsolved` names the functions that still raise."""

    exercise: str  # such as "ex06"
    path: Path
    module: ModuleType
    unsolved: frozenset[str]

    def missing(self, tasks: Iterable[str]) -> list[str]:
        """Those of the tasks that are not written yet."""
        return [task for task in tasks if task in self.unsolved or not hasattr(self.module, task)]


def load_files(place: str | Path) -> dict[str, LearnerFile]:
    """The exercises in a folder, or the one in a file, by name ("ex06"). This runs the learner's code, in this process.

    Raises `LearnerError` for a place without exercises, and for a file that is no Python or fails when it is imported.
    A folder may hold exercises whose packages are not installed (Triton): they are left out.
    """
    path = Path(place)
    if not path.exists():
        raise LearnerError(f"use={str(place)!r}: there is no such file or folder. Give exercises/ or a file in it.")
    if path.is_file():
        return {(file := _load(path)).exercise: file}
    paths = [found for found in sorted(path.glob("ex*.py")) if NAME.fullmatch(found.name)]
    if not paths:
        raise LearnerError(f"use={str(place)!r}: there is no exercise in it, such as ex06_flash_attention.py.")
    return {file.exercise: file for file in _load_all(paths)}


def _load_all(paths: Iterable[Path]) -> Iterator[LearnerFile]:
    for path in paths:
        try:
            yield _load(path)
        except MissingPackageError:
            continue


def _load(path: Path) -> LearnerFile:
    name = NAME.fullmatch(path.name)
    if name is None:
        raise LearnerError(f"{path} is no exercise: its name should be like ex06_flash_attention.py.")
    try:
        tree = ast.parse(path.read_text(encoding="utf8"))
    except SyntaxError as error:
        raise LearnerError(f"{path}, line {error.lineno}: {error.msg}. Python cannot read the file.") from None
    except UnicodeDecodeError as error:
        raise LearnerError(f"{path} is not UTF-8 text ({error.reason}). Save it again as UTF-8.") from None
    return LearnerFile(name[1], path, _module(path), frozenset(_unsolved(tree)))


def _module(path: Path) -> ModuleType:
    """Import a file by its path, under a name of its own, so that a file named torch.py shadows nothing."""
    spec = importlib.util.spec_from_file_location(f"minillm_use_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a path that ends in .py has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise MissingPackageError(f"{path} needs the package {error.name}, which is not installed.") from error
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise LearnerError(f"{path} cannot be imported. Line {at.lineno}: {type(error).__name__}: {error}") from error
    return module


def _unsolved(tree: ast.Module) -> Iterator[str]:
    """Functions, and classes with a method, that end in `raise NotImplementedError`."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and any(_raises(part) for part in ast.walk(node)):
            yield node.name


def _raises(node: ast.AST) -> bool:
    if not isinstance(node, ast.Raise) or node.exc is None:
        return False
    error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    return isinstance(error, ast.Name) and error.id == "NotImplementedError"
