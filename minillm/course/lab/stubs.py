"""From a solution to the stub that a learner edits.

    # BEGIN SOLUTION        the lines up to
    # END SOLUTION          become `raise NotImplementedError("…")`, at the same indentation

Only comments that stand alone on their line count, so a marker in a string does nothing. Signatures, docstrings and
everything outside of the markers stay.
"""

from __future__ import annotations

import ast
import io
import tokenize

from minillm.course.errors import CourseError
from minillm.course.lab.syntax import parse

BEGIN, END = "# BEGIN SOLUTION", "# END SOLUTION"


def make_stub(solution: str, name: str = "solution") -> str:
    """The stub of a solution. Raises CourseError for markers that do not pair, or a stub that does not compile."""
    lines, kept, after = solution.splitlines(), list[str](), 0
    for begin, end in _blocks(solution, name):
        kept += lines[after:begin]
        indent = lines[begin][: len(lines[begin]) - len(lines[begin].lstrip())]
        kept.append(f'{indent}raise NotImplementedError("{_function(solution, begin + 1)} is yours to write")')
        after = end + 1
    stub = "\n".join([*kept, *lines[after:]]) + "\n"
    try:
        parse(stub)
    except SyntaxError as error:
        raise CourseError(f"The stub of {name} does not compile (line {error.lineno}): {error.msg}.") from None
    return stub


def _blocks(source: str, name: str) -> list[tuple[int, int]]:
    """First and last line (from 0) of each block between markers."""
    blocks, begin = [], None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.line.strip() not in (BEGIN, END):
            continue
        if (token.string == BEGIN) == (begin is not None):
            raise CourseError(f"{name}, line {token.start[0]}: {token.string!r} without its other half.")
        if begin is None:
            begin = token.start[0] - 1
        else:
            blocks.append((begin, token.start[0] - 1))
            begin = None
    if begin is not None or not blocks:
        raise CourseError(f"{name} has {'an open block' if begin is not None else 'no block'}: {BEGIN} … {END}.")
    return blocks


def _function(source: str, line: int) -> str:
    """Name of the innermost function around a line."""
    around = [
        node
        for node in ast.walk(parse(source))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    return max(around, key=lambda node: node.lineno).name if around else "this"
