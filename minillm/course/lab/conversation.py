"""One request to a worker and what comes back: the parent never waits for a stranger without limits."""

from __future__ import annotations

import os
import selectors
import subprocess
import time
from typing import Any

from minillm.course.lab.processes import Usage, tree_usage
from minillm.course.lab.protocol import Frame, Limits
from minillm.course.lab.worker import LENGTHS, unframe

LOOK_S = 0.05  # how often the parent looks at clock, memory and processes
REPLY_BYTES, OUTPUT_BYTES = 16 << 20, 4000
FRAMES = 2  # of one script: its values, its end


class Stopped(Exception):
    """A script went over one of its limits, or its process is gone; the message is the status of the reply."""


class Conversation:
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

    def until(self, nonce: int | None, limits: Limits, idle: Usage = (0, 0)) -> list[Frame]:
        """All frames up to the one that says that script `nonce` ended (None: that the worker is ready).

        idle: processes and resident bytes of the worker before the script.
        """
        watch = _Watch(self.process.pid, limits, idle)
        frames: list[Frame] = []
        with selectors.DefaultSelector() as selector:
            selector.register(self.stdout, selectors.EVENT_READ)
            selector.register(self.stderr, selectors.EVENT_READ)
            selector.register(self.stdin, selectors.EVENT_WRITE) if self.request else None
            while not frames or not _is_last(frames[-1][0], nonce):
                for key, _ in selector.select(LOOK_S):
                    self._move(key.fd, selector)
                frames += self._complete()
                if len(frames) > FRAMES:
                    raise Stopped("garbled")
                watch.look()
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
            raise Stopped("gone")
        if not data:
            selector.unregister(fd)
        elif fd == self.stdout:
            self.received += data
        elif len(self.printed) <= OUTPUT_BYTES:
            self.printed += data

    def _complete(self) -> list[Frame]:
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

    def _drain(self) -> None:
        """Read what a script printed just before its end."""
        try:
            while data := os.read(self.stderr, 1 << 16):
                self.printed += data
                if len(self.printed) > OUTPUT_BYTES:
                    return
        except BlockingIOError:
            return


class _Watch:
    """Looks at the clock, the memory and the number of processes below one, from the moment it is made."""

    def __init__(self, pid: int, limits: Limits, idle: Usage) -> None:
        self.pid, self.limits = pid, limits
        self.processes, self.resident = idle
        self.last = self.begin = time.monotonic()

    def look(self) -> None:
        """Raise Stopped if a limit is passed; not more often than every `LOOK_S`."""
        now = time.monotonic()
        if now - self.begin > self.limits.seconds:
            raise Stopped("timeout")
        if now - self.last < LOOK_S:
            return
        self.last = now
        processes, resident = tree_usage(self.pid)
        if processes - self.processes > self.limits.processes:
            raise Stopped("processes")
        # a fork shares PyTorch's pages with the worker, and /proc counts them for both
        if resident - self.resident > self.limits.memory_bytes + 2 * self.resident:
            raise Stopped("memory")


def _write(fd: int, data: memoryview) -> int:
    try:
        return os.write(fd, data)
    except BrokenPipeError:
        raise Stopped("gone") from None


def _is_last(header: Any, nonce: int | None) -> bool:
    if not isinstance(header, dict):
        raise Stopped("garbled")
    return "ready" in header if nonce is None else "ended" in header and header.get("nonce") == nonce
