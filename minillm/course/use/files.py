"""Learners' files as modules: found by path, loaded with messages that help, and what is not written yet in them."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from minillm.course.errors import LearnerError
from minillm.course.learner import read_file, text_of, tree_of

NAME = re.compile(r"(ex\d\d)(_\w+)?\.py")
EXERCISES = (
    *("ex01_two_phases.py", "ex02_attention.py", "ex03_kv_cache.py", "ex04_sampling.py", "ex05_roofline.py"),
    *("ex06_flash_attention.py", "ex07_gpu_kernels.py", "ex08_batching.py", "ex09_paged_kv.py"),
    *("ex10_prefix_caching.py", "ex11_chunked_prefill.py", "ex12_kv_quantization.py"),
    *("ex13_speculative_decoding.py", "ex15_capstone.py"),
)
ERROR_CHARACTERS = 1000


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

    In a folder only the exact names of the exercises count: a copy or a backup beside one is never taken for it. A file
    that is named itself may be called ex06_as_you_like.py. Raises `LearnerError` for a place without exercises, and
    for a file that cannot be read, is no Python or fails when it is imported. A folder may hold exercises whose
    packages are not installed (Triton): they are left out.
    """
    path = Path(place)
    if not os.path.lexists(path):
        raise LearnerError(f"use={str(place)!r}: there is no such file or folder. Give exercises/ or a file in it.")
    if not path.is_dir():
        return {(file := _load(path)).exercise: file}
    paths = [path / name for name in EXERCISES if os.path.lexists(path / name)]
    if not paths:
        raise LearnerError(f"use={str(place)!r}: there is no exercise in it{_alike(path)}.")
    return {file.exercise: file for file in _load_all(paths)}


def _alike(folder: Path) -> str:
    """Which name was expected: of the file that looks like an exercise, if there is one."""
    for found in sorted(folder.glob("ex*.py")):
        for name in EXERCISES:
            if NAME.fullmatch(found.name) and found.name[:4] == name[:4]:
                return f". {found.name} should be called {name}, or be named itself"
    return ", such as ex06_flash_attention.py"


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
    source = text_of(read_file(path, str(path)), str(path))
    tree = tree_of(source, str(path))
    return LearnerFile(name[1], path, _module(path, source, tree), frozenset(_unsolved(tree)))


def _module(path: Path, source: str, tree: ast.Module) -> ModuleType:
    """Run a source under a name of its own, so that a file named torch.py shadows nothing."""
    spec = importlib.util.spec_from_file_location(f"minillm_use_{path.stem}", path)
    assert spec is not None  # a path that ends in .py has one
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except KeyboardInterrupt:
        raise  # it comes from the keyboard
    except ModuleNotFoundError as error:
        raise MissingPackageError(f"{path} needs the package {error.name}, which is not installed.") from error
    except SystemExit as error:
        _check_complete(module, tree, path, error)
    except BaseException as error:
        raise LearnerError(f"{path} cannot be imported. {_where(error, path)}{_said(error)}") from error
    return module


def _check_complete(module: ModuleType, tree: ast.Module, path: Path, error: SystemExit) -> None:
    """A file may end itself below its last function, as programs do. Raises LearnerError if it does so above one."""
    defined = (node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))
    if missing := [name for name in defined if not hasattr(module, name)]:
        where = (
            f"{path} ends itself when it is imported. {_where(error, path)}SystemExit, before {missing[0]} is there."
        )
        raise LearnerError(f"{where} Delete that line.") from error


def _where(error: BaseException, path: Path) -> str:
    """The learner's own line that an error came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) and not lines else lines[-1] if lines else None
    return "" if line is None else f"Line {line}: "


def _said(error: BaseException) -> str:
    """The kind of an error and its message, which may be of any length or fail itself."""
    try:
        message = str(error)[:ERROR_CHARACTERS]
    except Exception:
        message = ""
    return f"{type(error).__name__}: {message}"


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
