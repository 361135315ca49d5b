"""A few of the damaged folders of `loaders.py`, which builds 230; by hand all of them: `python tests/faults/loaders.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_folders_are_right_or_named(seed: int) -> None:
    command = [sys.executable, str(HERE / "loaders.py"), "--sample", "12", str(seed)]
    run = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
