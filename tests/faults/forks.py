"""Runs scripts, one for each line of stdin, in copies of a process that has imported PyTorch: the slowest part.

Answers each with a line of JSON: the exit status, and what was printed.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import IO

import transformers  # noqa: F401 - before the fork, like all that is slow

import minillm.cli
import minillm.llm  # noqa: F401


def end_of(script: str) -> tuple[int, str]:
    """Exit status and output of a script."""
    with tempfile.TemporaryFile("w+", encoding="utf8", errors="replace") as out:
        if not hasattr(os, "fork"):
            code = subprocess.run([sys.executable, script], stdout=out, stderr=out, check=False).returncode
        elif (child := os.fork()) == 0:
            _become(script, out)
        else:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        return code, out.read()


def _become(script: str, out: IO[str]) -> None:
    """Be the script until it ends, and never return."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0)  # noqa: SIM115 - until the process ends
    for stream in (1, 2):
        os.dup2(out.fileno(), stream)
    sys.argv, sys.path[0], code = [script], str(Path(script).parent), 1
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", encoding="utf8")
    for line in iter(sys.stdin.readline, ""):
        print(json.dumps(end_of(line.rstrip("\n"))), file=answers, flush=True)
