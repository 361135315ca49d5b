"""The command line within one process: PyTorch is imported once for all calls of a script."""

from __future__ import annotations

import contextlib
import io
import os
from types import SimpleNamespace

from minillm.cli import main


def minillm(*words: str, cwd: str) -> SimpleNamespace:
    """What `subprocess.run(["minillm", …], cwd=…, capture_output=True, text=True)` gives."""
    out, err, before, code = io.StringIO(), io.StringIO(), os.getcwd(), 0
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(words)
    except SystemExit as end:
        code = end.code or 0
    finally:
        os.chdir(before)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())
