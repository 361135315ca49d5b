"""`minillm bench spec` as people call it: speed-up beside its formula, vLLM's counts, and where it loses."""

# ruff: noqa: F811 (a fixture is imported, and a parameter has its name)

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_cli import folder, run, surroundings  # noqa: F401
from tests.test_cli_serving import bench

SMALL = ["--prompts", "1", "--prompt", "40", "--tokens", "9", "--drafts", "2", "--batches", "1,2", "--repeats", "1"]


def test_help_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "spec", "--help") == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_bench_spec(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--proposers", f"ngram,{folder}", "--texts", "repetitive", "--adaptive"]
    rows = bench("spec", folder, tmp_path / "spec.json", *SMALL, *options)["rows"]
    assert [(row["proposer"], row["adaptive"], row["batch"]) for row in rows] == [
        (name, rule, batch) for name in ("ngram", str(folder)) for rule in (False, True) for batch in (1, 2)
    ]
    for row in rows[4:6]:
        assert row["num_accepted_tokens"] == row["num_draft_tokens"] > 0, "the model agrees with itself"
        assert (
            row["acceptance"] == row["draft_acceptance_rate"] == 1 and row["num_complete_drafts"] == row["num_drafts"]
        )
        assert sum(row["num_accepted_tokens_per_pos"]) == row["num_accepted_tokens"]
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines()[1:])) <= 80
    words = " ".join(text.split())
    batch = "Predicted batch from which checking takes time"
    for said in ("speed-up formula served", "E / (γc + 1)", batch, "Slower than"):
        assert said in words


def test_what_cannot_be_measured_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "spec", "--model", "random:smollm2-135m") == 2
    assert "has random weights: its acceptance rates mean nothing" in " ".join(capsys.readouterr().err.split())
