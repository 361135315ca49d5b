"""The child's side of the grader: carries out a script of calls on a learner's file and sends plain data back.

It runs as `python -I worker.py` in a sandbox, needs PyTorch and safetensors and nothing of this project, and never
sees an answer. PyTorch is imported once; each script gets a fresh fork, so that scripts cannot disturb each other.

Frames go both ways: the lengths of a JSON header and of a safetensors blob (4 bytes each), then the two.
"""

from __future__ import annotations

import gc
import importlib.abc
import importlib.util
import json
import linecache
import os
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

LENGTHS = struct.Struct("<II")
PLAIN = (bool, int, float, str, type(None))
NOBODY = 65534

Tensors = dict[str, Tensor]
Json = Any


def pack(value: Any, tensors: Tensors, other: Callable[[Any], Json]) -> Json:
    """A value as JSON; its tensors go to `tensors`. What is neither plain nor a container is up to `other`."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__ if type(value) is list else "tuple": [pack(v, tensors, other) for v in value]}
    if isinstance(value, (set, frozenset)):
        return {"set": [pack(v, tensors, other) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[pack(part, tensors, other) for part in item] for item in value.items()]}
    return other(value)


def unpack(data: Json, tensors: Tensors, other: Callable[[Json], Any]) -> Any:
    """The value behind JSON that `pack` made."""
    if not isinstance(data, dict):
        return data
    kind, content = next(iter(data.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {unpack(k, tensors, other): unpack(v, tensors, other) for k, v in content}
    if kind in ("list", "tuple", "set"):
        return {"list": list, "tuple": tuple, "set": set}[kind](unpack(part, tensors, other) for part in content)
    return other(data)


def frame(header: Json, tensors: Tensors) -> bytes:
    """The bytes of one message."""
    head, blob = json.dumps(header).encode(), save(tensors) if tensors else b""
    return LENGTHS.pack(len(head), len(blob)) + head + blob


def unframe(head: bytes, blob: bytes) -> tuple[Json, Tensors]:
    """The message in the two parts of a frame. Raises ValueError (or safetensors' error) for anything else."""
    return json.loads(head), load(blob) if blob else {}


def main() -> None:
    """Serve scripts from standard input until it ends; what learners print goes to standard error."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    _count(torch.mm, [torch.ones(1, 1)] * 2, {})  # what libraries import at their first use, they import now, for all
    frame({}, {"t": torch.ones(1)})  # forks: once for counting, once for sending
    for module in sys.argv[1:]:
        __import__(module)
    gc.freeze()  # what is here now is never looked at again: a fork then copies few pages
    replies.write(frame({"ready": os.getpid()}, {}))
    while lengths := requests.read(LENGTHS.size):
        sizes = LENGTHS.unpack(lengths)
        script, tensors = unframe(*(requests.read(size) for size in sizes))
        replies.write(frame({"nonce": script["nonce"], "ended": _in_a_fork(script, tensors, requests, replies)}, {}))


def _in_a_fork(script: Json, tensors: Tensors, requests: BinaryIO, replies: BinaryIO) -> int:
    """Run one script in a child; its exit code, or minus the signal that ended it."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        requests.close()
        header, values = run(script, tensors)
        sys.stdout.flush()
        replies.write(frame({"nonce": script["nonce"], **header}, values))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(script: Json, tensors: Tensors) -> tuple[Json, Tensors]:
    """Carry out a script: the values that it sends, up to the first error, and that error."""
    sent: list[Json] = []
    values: Tensors = {}
    path, at = Path(script["name"]).resolve(), -1
    try:
        path.write_text(script["source"], encoding="utf8")
        limit(script["limits"])
        sys.meta_path.insert(0, Banned(script["banned_modules"]))
        with BannedOperations(script["banned_operations"]):
            things = {"torch": torch, "given": module_of("given", script["given"]), "learner": _load(path)}
            for step in script["steps"]:
                at += 1
                _take(step, things, tensors, sent, values)
    except BaseException as error:  # SystemExit, too: nothing that a learner's code raises may end the worker
        return {"sent": sent, "error": {**_described(error, str(path)), "step": at}}, values
    return {"sent": sent}, values


def _take(step: Json, things: dict[Any, Any], tensors: Tensors, sent: list[Json], values: Tensors) -> None:
    """One step. Its result is a thing under the step's number, so that later steps can refer to it."""

    def other(data: Json) -> Any:
        return slice(*data["slice"]) if "slice" in data else things[data["ref"]]

    kind, *rest = step["do"], *(unpack(part, tensors, other) for part in step["with"])
    if kind == "send":
        sent.append(pack(rest[0], values, lambda thing: {"object": type(thing).__name__}))
    else:
        things[step["id"]] = ACTIONS[kind](*rest)


def _call(function: Any, args: Any, kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _catch(function: Any, args: Any, kwargs: Any) -> list[str]:
    """Names of the classes of the error that a call raises; none if it returns. A stub is no answer."""
    try:
        function(*args, **kwargs)
    except NotImplementedError:
        raise
    except Exception as error:
        return [cls.__name__ for cls in type(error).__mro__]
    return []


def _count(function: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """What a call cost: FLOPs of matrix products, elements of the largest new tensor; and what it returned."""
    with Largest() as largest, FlopCounterMode(display=False) as flops:
        out = function(*args, **kwargs)
    return {"flops": flops.get_total_flops(), "largest": largest.numel, "out": out}


ACTIONS: dict[str, Callable[..., Any]] = {
    "get": getattr,
    "set": setattr,
    "item": lambda thing, key: thing[key],
    "call": _call,
    "catch": _catch,
    "count": _count,
}


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operator gave back."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and look at what it made."""
        out = func(*args, **(kwargs or {}))
        made = (t.numel() for t in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(t, Tensor))
        self.numel = max(self.numel, *made, 0)
        return out


class Banned(importlib.abc.MetaPathFinder):
    """Refuses to import some packages: those that hold the answer."""

    def __init__(self, packages: list[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Refuse a banned package; leave all others to the next finder."""
        if name.partition(".")[0] in self.packages:
            raise ImportError(f"{name} is not available in this exercise")


class BannedOperations(TorchFunctionMode):
    """Refuses some of PyTorch's functions: those that are the exercise."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function of PyTorch unless its name is banned."""
        if self.names and (name := (resolve_name(func) or func.__name__).rpartition(".")[2]) in self.names:
            raise PermissionError(f"{name} is what this exercise is about")
        return func(*args, **(kwargs or {}))


def limit(limits: dict[str, int]) -> None:
    """Give up privileges, and bound what this process may use from here on.

    Memory counts from what PyTorch already took: set any earlier, a limit would break its import.
    """
    import resource

    def bound(kind: int, value: int) -> None:
        resource.setrlimit(kind, (value, value))

    bound(resource.RLIMIT_CORE, 0)
    bound(resource.RLIMIT_CPU, limits["cpu_s"])
    bound(resource.RLIMIT_FSIZE, limits["file_bytes"])
    bound(resource.RLIMIT_NOFILE, limits["open_files"])
    if "processes" in limits:
        bound(resource.RLIMIT_NPROC, limits["processes"])
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        bound(resource.RLIMIT_AS, pages * resource.getpagesize() + limits["memory_bytes"])
    if limits.get("nobody"):
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def _load(path: Path) -> ModuleType:
    """The learner's file as a module, under its own path: a file named torch.py shadows nothing."""
    spec = importlib.util.spec_from_file_location("learner", path)
    assert spec is not None and spec.loader is not None  # a path that ends in .py always has both
    module = sys.modules["learner"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def module_of(name: str, source: str) -> ModuleType:
    """A module of some source without a file. Its lines are kept for whoever asks for them, as Triton does."""
    module, file = ModuleType(name), f"<{name}>"
    sys.modules[name] = module
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    exec(compile(source, file, "exec"), module.__dict__)
    return module


def _described(error: BaseException, path: str) -> dict[str, Any]:
    """An error as data: its kind, its message, and the learner's own line that it came from."""
    if type(error).__name__ == "InterpreterError" and error.__cause__ is not None:
        error = error.__cause__  # Triton's interpreter wraps what a kernel raises
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    where = frames[-1] if frames else None
    return {
        "type": type(error).__name__,
        "message": _message(error),
        "line": where.lineno if where else None,
        "code": where.line if where else None,
        "function": where.name if where else None,
    }


def _message(error: BaseException) -> str:
    try:
        return str(error)[:2000]
    except BaseException:  # a learner's exception class may fail in __str__
        return ""


if __name__ == "__main__":
    main()
