"""benchmarks/attention.py runs, on sizes that take no time, and checks what it measures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = {"shapes": "smollm2-135m", "lengths": 64, "contexts": 32, "batches": 3, "dtypes": "float32", "repeats": 2}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module, with the machine's ceilings and the fresh processes left out."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import attention
    import recording

    from minillm.measure.hardware import Hardware
    from minillm.measure.machine import describe_machine

    known = Hardware(describe_machine(torch.device("cpu")), 1.0, 1.0, {"float32": 1.0}, 1.0, "2000-01-01")
    monkeypatch.setattr(recording, "measure_hardware", lambda device: known)
    monkeypatch.setattr(attention, "peak_bytes", lambda name, shape, n, dtype, device: n)
    yield attention
    for name in ("attention", "attention_work", "recording"):
        sys.modules.pop(name)


def run(benchmark: ModuleType, out: Path, *arguments: str) -> list[dict[str, Any]]:
    tiny = [f"--{name}={value}" for name, value in TINY.items()]
    benchmark.main([*tiny, "--cold-bytes=1", *arguments, "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["hardware"]["machine"]["device"] == "cpu" and result["repeats"] == 2
    return list(result["rows"])


def test_every_row_is_right_and_complete(benchmark: ModuleType, tmp_path: Path) -> None:
    rows = run(benchmark, tmp_path / "out.json")
    assert [(row["phase"], row.get("blocks")) for row in rows] == [
        ("prefill", None), ("decode", "neighbours"), ("decode", "scattered"),
    ]  # fmt: skip
    assert [list(row["candidates"]) for row in rows] == [["tiled", "sdpa", "naive"]] + [["auto", "contiguous"]] * 2
    for row in rows:
        for result in row["candidates"].values():
            low, median, high = result["seconds"]
            assert 0 < low <= median <= high and result["max_error"] < 1e-5


def test_the_error_is_seen(benchmark: ModuleType) -> None:
    prompt = benchmark.Prompt.random("smollm2-135m", 64, torch.float32, torch.device("cpu"))
    assert prompt.error(prompt.call("tiled")()) < 1e-5 < prompt.error(prompt.q)
    work = benchmark.Decodes.random("smollm2-135m", 2, 32, "scattered", torch.float32, torch.device("cpu"), 1)
    assert work.error(work.call("auto")()) < 1e-5 < work.error(work.q)


def test_a_backend_that_refuses_is_left_out(benchmark: ModuleType, tmp_path: Path, capsys: Any) -> None:
    rows = run(benchmark, tmp_path / "out.json", "--prefill", "sdpa", "cudnn", "--contexts")
    assert [list(row["candidates"]) for row in rows] == [["sdpa"]]
    assert "left out:" in capsys.readouterr().err


def test_peak_memory_of_the_textbook_form_is_its_scores() -> None:
    """In a process of its own: 9 heads of 1024 x 1024 scores, in float32 and several times at once."""
    code = "import attention; print(attention._cpu_peak('{}', 'smollm2-135m', 1024, 'float32'))"
    naive, tiled = (peak(code.format(name)) for name in ("naive", "tiled"))
    scores = 9 * 1024 * 1024 * 4
    assert scores < naive < 8 * scores and tiled < scores


def peak(code: str) -> int:
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_defaults_of_a_gpu(benchmark: ModuleType) -> None:
    args = benchmark.parse(["--device", "cuda"])
    assert args.lengths[0] == 512 and args.lengths[-1] == 32768 and args.contexts[-1] == 131072
    assert args.prefill == ["triton", "flash", "cudnn", "naive"] and args.out is None
    assert sys.modules["recording"].result_file("attention", args).name == "attention_cuda.json"


def test_decodes_of_quantised_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, benchmark: ModuleType) -> None:
    """Every candidate is right, and the file says how many bits it read."""
    import kv_decode

    sizes = ["--contexts=64", "--shapes=smollm2-135m", "--batches=2", "--cold-bytes=1", "--repeats=2"]
    kv_decode.main(["--device=cpu", *sizes, "--out", str(tmp_path / "out.json")])
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    bits = {name: one["bits"] for name, one in row["candidates"].items()}
    assert bits == {"plain": 32, "fp8": 8.25, "int8": 8.25, "int4": 5, "int8 decoded first": 8.25}
    assert all(one["max_error"] < 1e-5 and one["seconds"][1] > 0 for one in row["candidates"].values())
    sys.modules.pop("kv_decode")


def test_the_comparison_begins_with_the_plain_cache(benchmark: ModuleType) -> None:
    import kv_decode

    with pytest.raises(SystemExit):
        kv_decode.parse(["--candidates", "int8"])
    sys.modules.pop("kv_decode")
