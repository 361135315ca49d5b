"""The parent's side: a worker process at one of three levels of isolation, its clock, its memory, and its end.

    with Sandbox("namespace") as sandbox:
        reply = sandbox.run(source, script)

The parent owns the clock. It kills the worker with everything around it and starts another when a script takes too
long, too much memory or too many processes; the next script does not notice. Only bytes come back: they are checked
for size and form, and nothing is ever unpickled.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from minillm.errors import GraderError
from minillm.lab.isolation import launch
from minillm.lab.processes import tree_usage
from minillm.lab.worker import LENGTHS, Tensors, frame, unframe, unpack

START_S, LOOK_S = 120.0, 0.05  # patience for importing PyTorch; how often the parent looks at memory and clock
REPLY_BYTES, OUTPUT_BYTES = 64 << 20, 4000


@dataclass(frozen=True)
class Limits:
    """What one script may use. The wall clock is the parent's; the rest is set in the child after PyTorch is there."""

    seconds: float = 10.0
    memory_bytes: int = 512 << 20
    file_bytes: int = 1 << 20
    open_files: int = 64
    processes: int = 16


@dataclass(frozen=True)
class Foreign:
    """Stands for an object that a learner returned and that is no plain data: only the name of its class came over."""

    type_name: str


@dataclass(frozen=True)
class Reply:
    """What came back from one script.

    status: "ok" or "error" (the learner's code raised: see `error`), or how the parent ended it: "timeout", "memory",
    "processes"; "crashed" if the process ended without a word; "garbled" if what came was not a reply.
    """

    status: str
    values: tuple[Any, ...] = ()
    error: dict[str, Any] = field(default_factory=dict)
    output: str = ""


@dataclass(frozen=True)
class Script:
    """Steps for the worker with their tensors, and the source of a helper module that the steps may use."""

    steps: tuple[dict[str, Any], ...]
    tensors: Tensors
    given: str = ""
    banned_modules: tuple[str, ...] = ()
    banned_operations: tuple[str, ...] = ()
    limits: Limits = Limits()


class Stopped(Exception):
    """A script went over one of its limits, or its process is gone; the message is the status of the reply."""


class Sandbox:
    """One worker process at a level of isolation. It starts when it is first needed, or with `start`.

    preload: modules to import once, ahead of every script. Raises GraderError if the level is not available here.
    """

    def __init__(self, level: str = "process", *, preload: Sequence[str] = ()) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="minillm-lab-")
        self._launch = launch(level, self._folder.name, preload)
        self.level = level
        self._process: subprocess.Popen[bytes] | None = None
        self._nonces = count(1)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the worker and return at once: it imports PyTorch while the caller does something else."""
        if self._process is None:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                self._launch.argv,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                cwd=self._folder.name,
                env=self._launch.environment,
                start_new_session=True,
            )
            for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
                assert stream is not None
                os.set_blocking(stream.fileno(), False)
            self._ready = False

    def run(self, source: str, script: Script, name: str = "submission.py") -> Reply:
        """Carry out a script on a learner's source, which the worker sees as a file called `name`."""
        self.wait()
        nonce = next(self._nonces)
        conversation = _Conversation(self._running, _request(nonce, source, name, script, self._launch.nobody))
        try:
            return _reply(conversation.until(nonce, script.limits), conversation.output)
        except Stopped as stop:
            self.close()
            return Reply(status=str(stop), output=conversation.output)

    def close(self) -> None:
        """End the worker and everything that it started."""
        if self._process is not None:
            _kill(self._process)
            self._process = None
            if self._launch.end:
                subprocess.run(self._launch.end, capture_output=True, check=False)

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def wait(self) -> float:
        """Wait until the worker is ready; seconds that it took. Raises GraderError if it does not start."""
        begin = time.monotonic()
        self.start()
        if self._ready:
            return 0.0
        conversation = _Conversation(self._running, b"")
        try:
            conversation.until(None, Limits(seconds=START_S, memory_bytes=1 << 40, processes=1 << 20))
        except Stopped as stop:
            self.close()
            raise GraderError(
                f"The worker ({self.level}) did not start: {stop}. It said:\n{conversation.output or 'nothing'}"
            ) from None
        self._ready = True
        return time.monotonic() - begin


class _Conversation:
    """One request, and the frames that come back until its end; what learners print is kept up to a limit."""

    def __init__(self, process: subprocess.Popen[bytes], request: bytes) -> None:
        assert process.stdin and process.stdout and process.stderr
        self.process, self.request, self.received, self.printed = process, memoryview(request), bytearray(), bytearray()
        self.stdin, self.stdout, self.stderr = (s.fileno() for s in (process.stdin, process.stdout, process.stderr))

    @property
    def output(self) -> str:
        """What the script printed."""
        text = bytes(self.printed[:OUTPUT_BYTES]).decode("utf8", "replace")
        return text + "\n… (cut off)" if len(self.printed) > OUTPUT_BYTES else text

    def until(self, nonce: int | None, limits: Limits) -> list[tuple[Any, Tensors]]:
        """All frames up to the one that says that script `nonce` ended (None: that the worker is ready)."""
        deadline, base = time.monotonic() + limits.seconds, tree_usage(self.process.pid)
        frames: list[tuple[Any, Tensors]] = []
        with selectors.DefaultSelector() as selector:
            selector.register(self.stdout, selectors.EVENT_READ)
            selector.register(self.stderr, selectors.EVENT_READ)
            selector.register(self.stdin, selectors.EVENT_WRITE) if self.request else None
            while not frames or not _is_last(frames[-1][0], nonce):
                for key, _ in selector.select(LOOK_S):
                    self._move(key.fd, selector)
                frames += self._complete()
                self._check(deadline, base, limits)
        self._drain()
        return frames

    def _move(self, fd: int, selector: selectors.BaseSelector) -> None:
        """Write some of the request, or read some of what came."""
        if fd == self.stdin:
            self.request = self.request[_write(fd, self.request) :]
            if not self.request:
                selector.unregister(fd)
            return
        data = os.read(fd, 1 << 16)
        if not data and fd == self.stdout:
            raise Stopped("crashed")
        if not data:
            selector.unregister(fd)
        elif fd == self.stdout:
            self.received += data
        elif len(self.printed) <= OUTPUT_BYTES:
            self.printed += data

    def _complete(self) -> list[tuple[Any, Tensors]]:
        """Take the frames that have come completely."""
        frames = []
        while len(self.received) >= LENGTHS.size:
            head, blob = LENGTHS.unpack_from(self.received)
            end = LENGTHS.size + head + blob
            if end > REPLY_BYTES:
                raise Stopped("garbled")
            if len(self.received) < end:
                break
            content = bytes(self.received[LENGTHS.size : end])
            del self.received[:end]
            try:
                frames.append(unframe(content[:head], content[head:]))
            except Exception:  # whatever a parser may raise on bytes that somebody made up
                raise Stopped("garbled") from None
        return frames

    def _check(self, deadline: float, base: tuple[int, int], limits: Limits) -> None:
        if time.monotonic() > deadline:
            raise Stopped("timeout")
        processes, resident = (now - before for now, before in zip(tree_usage(self.process.pid), base, strict=True))
        if processes > limits.processes:
            raise Stopped("processes")
        if resident > 2 * limits.memory_bytes:  # the fork shares PyTorch's pages, and /proc counts them again
            raise Stopped("memory")

    def _drain(self) -> None:
        """Read what a script printed just before its end."""
        try:
            while data := os.read(self.stderr, 1 << 16):
                self.printed += data
                if len(self.printed) > OUTPUT_BYTES:
                    return
        except BlockingIOError:
            return


def _write(fd: int, data: memoryview) -> int:
    try:
        return os.write(fd, data)
    except BrokenPipeError:
        raise Stopped("crashed") from None


def _is_last(header: Any, nonce: int | None) -> bool:
    if not isinstance(header, dict):
        raise Stopped("garbled")
    return "ready" in header if nonce is None else "ended" in header and header.get("nonce") == nonce


def _request(nonce: int, source: str, name: str, script: Script, nobody: bool) -> bytes:
    limits = script.limits
    bounds = {
        "cpu_s": int(limits.seconds) + 5,
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


def _reply(frames: list[tuple[Any, Tensors]], output: str) -> Reply:
    """The reply in the frames of one script: the first with its values, before the one that tells its end."""
    ended = frames[-1][0]["ended"]
    if len(frames) != 2 or frames[0][0].get("nonce") != frames[-1][0]["nonce"]:
        return Reply(status="crashed" if len(frames) == 1 else "garbled", error={"exit": ended}, output=output)
    header, tensors = frames[0]
    try:
        values = tuple(unpack(data, tensors, lambda other: Foreign(str(other["object"]))) for data in header["sent"])
        error = dict(header.get("error", {}))
    except Exception:  # somebody made this reply up
        return Reply(status="garbled", output=output)
    return Reply("error" if error else "ok", values, error, output)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process group. In a namespace the end of its first process is the end of all others."""
    for kill in (lambda: os.killpg(process.pid, signal.SIGKILL), process.kill):
        try:
            kill()
        except ProcessLookupError:
            continue
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            try:
                stream.close()
            except BrokenPipeError:
                continue
