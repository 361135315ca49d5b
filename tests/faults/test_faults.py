"""Small inputs that once failed: each script exits 0 if the product is right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("script", sorted(path.name for path in HERE.glob("fault_*.py")))
def test_fault_is_mended(script: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    run = subprocess.run(
        [sys.executable, str(HERE / script)],
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
