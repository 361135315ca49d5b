"""The core runs by itself: with every extra, the course and their packages blocked, it serves and passes its own tests.

Each test is a fresh process (`alone.py`), because what is loaded once cannot be taken away again.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import alone, house

ROOT = Path(__file__).parents[1]


def run(*task: str) -> str:
    """What `python -m tests.alone TASK` prints, on a machine without a GPU."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.alone", *task]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def test_without_any_extra_it_writes_the_same() -> None:
    """The definitions in PyTorch write what the faster ways write: float32, token for token."""
    assert json.loads(run("without-any").splitlines()[-1]) == alone.serve()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each round imports minillm afresh in a fork")
def test_without_any_one_of_them_it_serves_and_says_what_is_missing() -> None:
    run("without-one")


def test_without_any_extra_its_own_tests_pass() -> None:
    assert " passed" in run("tests")


def test_import_is_light() -> None:
    """PyTorch takes seconds and `minillm --help` needs none of it; the packages of the extras wait until asked for."""
    loaded = json.loads(run("loaded"))
    assert loaded["import"] == []
    assert not {"triton", "numba", "matplotlib", "transformers", *alone.ABOVE} & set(loaded["LLM"]), loaded


def test_a_test_of_the_core_says_if_it_needs_more() -> None:
    """Every test in the core's folders imports the core alone, or stands in `alone.WITH_EXTRAS` with its reason."""
    HOUSE = house.sources()
    need = set()
    for folder in alone.FOLDERS:
        for path in sorted((ROOT / "tests" / folder).glob("test_*.py")):
            source = path.read_text(encoding="utf8")
            rooms = {house.room(found.target) for found in house.imports("cli", {**HOUSE, "cli": source})}
            if not rooms <= house.CORE:
                need.add(f"{folder}/{path.name}")
    assert need == set(alone.WITH_EXTRAS)


def test_what_is_blocked_is_as_if_it_were_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At the name and below it, with the name in the error, and for those who look first."""
    (tmp_path / "planted" / "part").mkdir(parents=True)
    (tmp_path / "planted" / "part" / "inner.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", sys.meta_path)
    alone.block(["planted.part"])
    assert importlib.util.find_spec("planted.part") is None
    for name in ("planted.part", "planted.part.inner"):
        with pytest.raises(ModuleNotFoundError) as raised:
            importlib.import_module(name)
        assert raised.value.name == "planted.part"
    with pytest.raises(AssertionError, match="too late"):
        alone.block(["pytest"])
