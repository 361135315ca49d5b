"""A worker process at one of three levels of isolation: its start, its scripts, its end.

    with Sandbox("namespace") as sandbox:
        reply = sandbox.run(source, script)

The parent owns the clock. It kills the worker with everything around it and starts another when a script takes too
long, too much memory or too many processes; the next script does not notice.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from minillm.course.errors import GraderError
from minillm.course.lab.conversation import Conversation, Stopped
from minillm.course.lab.isolation import Launch, check_available, launch
from minillm.course.lab.processes import tree_usage
from minillm.course.lab.protocol import Limits, Reply, Script, reply_in, request

PATIENCE = Limits(seconds=120.0, memory_bytes=1 << 40, processes=1 << 10)  # for importing PyTorch: our code, not theirs


class Sandbox:
    """One worker process at a level of isolation. It starts when it is first needed, or with `start`.

    preload: modules to import once, ahead of every script. hide: folders that must not be seen in a namespace, beside
    this package. Raises GraderError if the level is not available here.
    """

    def __init__(self, level: str = "process", *, preload: Sequence[str] = (), hide: Sequence[Path] = ()) -> None:
        check_available(level)
        self.level, self.preload, self.hide = level, preload, hide
        self._worker: _Worker | None = None
        self._nonces = count(1)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> _Worker:
        """Start the worker and return at once: it imports PyTorch while the caller does something else."""
        if self._worker is None:
            self._worker = _Worker(self)
        return self._worker

    def wait(self) -> float:
        """Wait until the worker is ready; seconds that it took. Raises GraderError if it does not start."""
        begin, worker = time.monotonic(), self.start()
        if not worker.ready:
            conversation = Conversation(worker.process, b"")
            try:
                conversation.until(None, PATIENCE)
            except Stopped as stop:
                self.close()
                said = conversation.output or "nothing"
                raise GraderError(f"The worker ({self.level}) did not start: {stop}. It said:\n{said}") from None
            worker.ready, worker.idle = True, tree_usage(worker.process.pid)
        return time.monotonic() - begin

    def run(self, source: str, script: Script, name: str = "submission.py") -> Reply:
        """Carry out a script on a learner's source, which the worker sees as a file called `name`."""
        self.wait()
        worker, nonce = self.start(), next(self._nonces)
        conversation = Conversation(worker.process, request(nonce, source, name, script, nobody=worker.launch.nobody))
        try:
            return reply_in(conversation.until(nonce, script.limits, worker.idle), conversation.output)
        except Stopped as stop:
            self.close()
            return Reply(status=str(stop), output=conversation.output)

    def close(self) -> None:
        """End the worker and everything that it started."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None


class _Worker:
    """A running worker: its process, its folder, and whether it has said that it is ready."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.ready, self.idle = False, (0, 0)
        self.folder = tempfile.TemporaryDirectory(prefix="minillm-lab-", ignore_cleanup_errors=True)
        self.launch: Launch = launch(sandbox.level, self.folder.name, sandbox.preload, sandbox.hide)
        self.process = subprocess.Popen(
            self.launch.argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.folder.name,
            env=self.launch.environment,
            start_new_session=True,
        )
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)

    def end(self) -> None:
        """Kill the process group. In a namespace the end of its first process is the end of all others."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()
        if self.launch.end:
            subprocess.run(self.launch.end, capture_output=True, check=False)
        self.folder.cleanup()
