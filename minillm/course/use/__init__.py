"""The engine runs with functions that a learner wrote, in place of its own.

    llm = LLM("tiny", dtype="float32")
    used = plug_in(llm, "exercises/ex06_flash_attention.py")
    llm.generate(...)          # the same text, token for token; or the run stops
    for row in used: ...       # what was plugged in where, and what was not and why

The engine's own function runs beside each of the learner's and must say the same. At the first difference the run stops
with a `LearnerError` that names the function, the call, its arguments and what differs. Functions that are not written
yet keep the engine's own. A learner's file is run in this process, with all that it may do: use your own.

Costs the time of both functions: this is for seeing one's own code at work, not for speed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from minillm.course.errors import LearnerError
from minillm.course.use.files import LearnerFile, load_files
from minillm.course.use.table import PLUGS, Plug

if TYPE_CHECKING:
    from minillm.llm import LLM

__all__ = ["Used", "plug_in"]

UNWRITTEN = "not written yet"


@dataclass(frozen=True)
class Used:
    """What became of some tasks of an exercise: `why_not` is None if they are in place."""

    exercise: str
    tasks: tuple[str, ...]
    place: str
    why_not: str | None


def plug_in(llm: LLM, place: str | Path) -> list[Used]:
    """Replace functions of an engine that has served nobody yet by those of an exercise or a folder of exercises.

    The engine knows nothing of it: objects that it looks up at each step are replaced from outside. CUDA graphs would
    not look them up, so they are switched off. In 16 bits two right ways to compute attention may write different
    tokens: use dtype="float32".

    Returns what became of every task that has a place in the engine. Raises `LearnerError` as `load_files` does, if
    nothing could be plugged in, and if a rehearsal fails; the `llm` should not be used then.
    """
    files = load_files(place)
    llm.engine.runner.graphs = None
    rows = [_install(plug, files[plug.exercise], llm) for plug in PLUGS if plug.exercise in files]
    if all(row.why_not for row in rows):
        raise LearnerError(f"use={str(place)!r}: {_reasons(rows)}")
    return _latest(rows)


def _reasons(rows: list[Used]) -> str:
    """Why nothing could be plugged in."""
    if not rows:
        return "it has no place in the engine; docs/use.md lists what has. It is graded: minillm lab test"
    if all((row.why_not or "").startswith(UNWRITTEN) for row in rows):
        return f"nothing of it is written yet. Begin with {rows[0].tasks[0]}: minillm lab next"
    return "this engine has no place for it. " + " ".join(f"{', '.join(row.tasks)}: {row.why_not}." for row in rows)


def _install(plug: Plug, file: LearnerFile, llm: LLM) -> Used:
    missing = file.missing(plug.tasks)
    why_not = f"{UNWRITTEN}: {', '.join(missing)}" if missing else plug.install(file.module, llm)
    return Used(plug.exercise, plug.tasks, plug.place, why_not)


def _latest(rows: list[Used]) -> list[Used]:
    """Where several exercises wrote for one place, the last of them has it."""
    holder = {row.place: row.exercise for row in rows if row.why_not is None}
    return [
        row
        if row.why_not or holder[row.place] == row.exercise
        else replace(row, why_not=f"{holder[row.place]} has this place")
        for row in rows
    ]
