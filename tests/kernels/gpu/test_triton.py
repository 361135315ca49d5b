"""Checks the Triton kernels in a process of their own: the interpreter is chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["triton_checks.py", "triton_quantized_checks.py"])
def test_the_kernels_in_the_interpreter(name: str) -> None:
    pytest.importorskip("triton")
    checks = Path(__file__).with_name(name)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-o", "addopts=", str(checks)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
