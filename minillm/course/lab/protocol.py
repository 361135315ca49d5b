"""What parent and worker say to each other: a script goes there, a reply comes back.

A reply is whatever a stranger's process chose to send. It is taken apart here, checked for form, and turned into plain
data; what is no plain data is a `Foreign`, and what is no reply is "garbled".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from minillm.course.lab.worker import Tensors, frame, unpack

Frame = tuple[Any, Tensors]
ERROR_CHARACTERS = 2000
CPU_SPARE_S = 5  # the wall clock ends a script first, so that what is said about it is right


@dataclass(frozen=True)
class Limits:
    """What one script may use. The wall clock is the parent's; the rest is set in the child after PyTorch is there."""

    seconds: float = 10.0
    memory_bytes: int = 512 << 20
    file_bytes: int = 1 << 20
    open_files: int = 64
    processes: int = 16


@dataclass(frozen=True)
class Script:
    """Steps for the worker with their tensors, and the source of a helper module that the steps may use."""

    steps: tuple[dict[str, Any], ...]
    tensors: Tensors
    given: str = ""
    banned_modules: tuple[str, ...] = ()
    banned_operations: tuple[str, ...] = ()
    limits: Limits = Limits()


@dataclass(frozen=True)
class Foreign:
    """Stands for an object that a learner returned and that is no plain data: only the name of its class came over."""

    type_name: str


@dataclass(frozen=True)
class Reply:
    """What came back from one script.

    status: "ok" or "error" (the learner's code raised: see `error`), or how the parent ended it: "timeout", "memory",
    "processes"; "crashed" if its process ended without a word, "gone" if the worker did; "garbled" if what came was
    not a reply. error: type, message, and the learner's line, code and function, as text; step: the step that
    raised, -1 for the import.
    """

    status: str
    values: tuple[Any, ...] = ()
    error: dict[str, str] = field(default_factory=dict)
    step: int = -1
    output: str = ""


def request(nonce: int, source: str, name: str, script: Script, *, nobody: bool) -> bytes:
    """The bytes that ask a worker to carry out a script. nobody: give up root, and bound the number of processes."""
    limits = script.limits
    bounds = {
        "cpu_s": int(limits.seconds) + CPU_SPARE_S,
        "memory_bytes": limits.memory_bytes,
        "file_bytes": limits.file_bytes,
        "open_files": limits.open_files,
        **({"nobody": True, "processes": limits.processes} if nobody else {}),
    }
    header = {
        "nonce": nonce,
        "name": name,
        "source": source,
        "steps": script.steps,
        "given": script.given,
        "banned_modules": script.banned_modules,
        "banned_operations": script.banned_operations,
        "limits": bounds,
    }
    return frame(header, script.tensors)


def reply_in(frames: list[Frame], output: str) -> Reply:
    """The reply in the frames of one script: one with its values, then the worker's own that it ended."""
    if len(frames) == 1:
        return Reply("crashed", output=output)
    try:
        ((header, tensors), (end, _)) = frames
        if header["nonce"] != end["nonce"]:
            raise ValueError("a frame of another script")
        values = tuple(unpack(data, tensors, lambda other: Foreign(str(other["object"]))) for data in header["sent"])
        told = header.get("error", {})
        error = {str(key): str(value)[:ERROR_CHARACTERS] for key, value in told.items() if value is not None}
        return Reply("error" if error else "ok", values, error, int(told.get("step", -1)), output)
    except Exception:  # whatever taking apart made-up data may raise
        return Reply("garbled", output=output)
