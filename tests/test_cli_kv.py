"""`minillm bench kv` as people call it: what it prints, writes and draws, and what it does not claim."""

# ruff: noqa: F811 (a fixture is imported, and a parameter has its name)

from __future__ import annotations

from pathlib import Path

import pytest

from minillm.shapes import SHAPES
from tests.test_cli import folder, run, surroundings  # noqa: F401
from tests.test_cli_serving import bench, check_width

SMALL = ["--contexts", "32,64", "--repeats", "2", "--texts", "1", "--text", "40"]


def test_help_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "kv", "--help") == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_bench_kv(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = bench("kv", folder, tmp_path / "kv.json", *SMALL, "--plot", str(tmp_path / "kv.png"))
    rows, quality = report["rows"], report["quality"]
    assert [row["format"] for row in rows] == ["auto", "fp8", "int8", "int4"]
    assert all(row["bytes_per_token"] == row["predicted_bytes_per_token"] for row in rows)
    assert [step["context"] for step in rows[0]["steps"]] == [32, 64] and len(rows[0]["steps"][0]["times_ms"]) == 2
    assert [one["format"] for one in quality] == ["auto", "fp8", "int8", "int4", "int4 per token"]
    assert set(quality[-1]["errors"]) == {"Gaussian", "outliers", "trained"}
    text = check_width(capsys)
    for name in ("kv.png", "kv-quality.png"):
        assert (tmp_path / name).stat().st_size > 10_000 and name in text.replace("\n", "")


def test_random_weights_have_no_quality(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = SHAPES["smollm2-135m"] | {"num_hidden_layers": 2, "vocab_size": 200}
    monkeypatch.setitem(SHAPES, "small", small)
    shape = ["--model", "random:small", "--threads", "1", "--contexts", "8", "--repeats", "1"]
    assert run("bench", "kv", *shape) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "random:small has random weights, which say nothing about it" in text and "perplexity" not in text


def test_a_wrong_context_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "kv", "--model", folder, "--contexts", "100000") == 2
    assert "positions" in capsys.readouterr().err
