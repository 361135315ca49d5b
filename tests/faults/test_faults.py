"""Small inputs that once failed: each script exits 0 if the product is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def forks() -> Iterator[subprocess.Popen[str]]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [sys.executable, "-m", "tests.faults.forks"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(
        command, cwd=HERE.parents[1], env={**os.environ, "PATH": path}, encoding="utf8", **pipes
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize("script", sorted(path.name for path in HERE.glob("fault_*.py")))
def test_fault_is_mended(script: str, forks: subprocess.Popen[str]) -> None:
    assert forks.stdin is not None and forks.stdout is not None
    print(HERE / script, file=forks.stdin, flush=True)
    status, printed = json.loads(forks.stdout.readline())
    assert status == 0, printed[-4000:]
