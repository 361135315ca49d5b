"""`minillm claims` and `minillm roofline` as people meet them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillm.cli import main, screen
from minillm.course.training.checkpoint import save_checkpoint
from minillm.measure import hardware, roofline
from tests.measure.test_hardware import HARDWARE
from tests.model.test_loader import unpacked


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """80 columns, and ceilings that take no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hardware, "_measure", lambda machine, device: replace(HARDWARE, machine=machine))
    monkeypatch.setattr(hardware, "MATMUL_SIZES", (32,))
    monkeypatch.setattr(roofline, "read_buffer", lambda *_: torch.ones(2**21, dtype=torch.bfloat16))
    screen.out.width = screen.err.width = 80


def test_claims_show_prediction_measurement_and_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    main_and_return(["claims", "--only", "a2, A19,A6"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.index("A2 ") < shown.index("A19 ") < shown.index("A6 ")
    assert "predicted" in shown and "measured" in shown and "decode steps for 12 new tokens" in shown
    for verdict in ("✓ holds", "✗ wrong", "→ the same FLOPs", "◐ holds when", "✓ one request runs", "✗ several run"):
        assert verdict in shown
    assert "3 claims. Hold: 1, under a condition: 1, wrong: 1." in shown


def test_claims_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    main_and_return(["claims", "--only", "A2", "--json"])
    (card,) = json.loads(capsys.readouterr().out)
    assert card["kind"] == "holds" and card["cases"] == {"always": True}
    assert card["findings"]["decodes"]["predicted"] == card["findings"]["decodes"]["measured"] == 11


def test_an_unknown_claim_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["claims", "--only", "A2,C1"])
    assert end.value.code == 2 and "no claim C1" in " ".join(capsys.readouterr().err.split())


def test_roofline_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(unpacked("qwen3"), tmp_path / "model")
    plot, file = tmp_path / "roof.png", tmp_path / "roof.json"
    arguments = ["--prompts", "4,9", "--batch", "1,2", "--context", "12", "--repeats", "1"]
    main_and_return(
        ["roofline", "--model", str(tmp_path / "model"), *arguments, "--plot", str(plot), "--json", str(file)]
    )
    shown = capsys.readouterr().out
    assert "decode 2 × 12" in shown and "FLOP/byte" in shown and "formula: weights + KV" in shown
    assert plot.read_bytes().startswith(b"\x89PNG")
    points = json.loads(file.read_text())["points"]
    assert [point["batch"] for point in points] == [1, 1, 1, 2]


def main_and_return(arguments: list[str]) -> None:
    """Run a command that ends well."""
    try:
        main(arguments)
    except SystemExit as end:
        assert not end.code
