"""Reading Python, from several threads."""

from __future__ import annotations

import ast
from threading import Lock

_READING = Lock()  # CPython 3.11 counts the depth of all trees being built together: two threads end in a SystemError


def parse(source: str) -> ast.Module:
    """The tree of a source. Raises what `ast.parse` raises."""
    with _READING:
        return ast.parse(source)
