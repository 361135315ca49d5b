"""What can be said about a submission by reading it: is it text, does it compile, and does it keep the rules?

Reading is a courtesy to the honest: it answers at once and names the line. It protects nothing by itself; whoever
hides an import from it meets the sandbox.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

from minillm.course.lab.exercises import Exercise
from minillm.course.learner import FileError, check_size, text_of, tree_of

WAYS_AROUND = ("__import__", "eval", "exec", "compile", "globals", "breakpoint", "open")


@dataclass(frozen=True)
class Refusal:
    """Why a submission was not run: a status of a result, and a sentence for its author."""

    status: str  # "missing", "unreadable", "syntax" or "forbidden"
    message: str


def read(data: bytes | FileError | None, exercise: Exercise, *, strict: bool = True) -> str | Refusal:
    """The source of a submission that may be run, or why it may not. Without `strict` it may break the rules.

    data: what was handed in; None if nothing was, a FileError if the file could not be read.
    """
    name = exercise.file_name
    try:
        if data is None:
            raise FileError("missing", f"There is no {name}.")
        if isinstance(data, FileError):
            raise data
        source = text_of(check_size(data, name), name)
        tree = tree_of(source, name)
    except FileError as error:
        advice = "" if error.status == "syntax" else f" `minillm lab reset {exercise.id}` gives you a new one."
        return Refusal(error.status, f"{error}{advice}")
    return (strict and forbidden(tree, exercise)) or source


def forbidden(tree: ast.AST, exercise: Exercise) -> Refusal | None:
    """The first line that breaks a rule of the exercise. A function of one's own may have a banned one's name."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        for name in _imported(node):
            if name.partition(".")[0] not in exercise.allowed:
                return _refuse(node, exercise, f"imports {name}", f"may import: {', '.join(exercise.allowed[1:])}")
        name = _named(node)
        if name in exercise.banned_operations and not (isinstance(node, ast.Name) and name in own):
            return _refuse(node, exercise, f"uses {name}", "asks you to write that yourself")
        if name in WAYS_AROUND and isinstance(node, ast.Name):
            return _refuse(node, exercise, f"uses {name}", "needs no such thing")
    return None


def _named(node: ast.AST) -> str:
    """The name that a node uses: a variable, an attribute, or what `from … import` takes."""
    if isinstance(node, ast.alias):
        return node.name
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _imported(node: ast.AST) -> list[str]:
    """The modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return ["." * node.level + (node.module or "")]
    return []


def _refuse(node: ast.AST, exercise: Exercise, what: str, rule: str) -> Refusal:
    line = getattr(node, "lineno", 0)
    return Refusal("forbidden", f"{exercise.file_name}, line {line} {what}, but {exercise.id} {rule}.")
