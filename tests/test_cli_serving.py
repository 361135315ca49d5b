"""The serving benchmarks as people call them: small runs, what they print, what they write, what they refuse."""

# ruff: noqa: F811 (a fixture is imported, and a parameter has its name)

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from minillm.attention.paged import REFERENCE
from minillm.cache.paged import PagedCache
from minillm.cli.settings import HELP
from minillm.config import EngineConfig
from minillm.engine.engine import Engine
from minillm.errors import ConfigError
from minillm.model.decoder import Decoder
from tests.test_cli import folder, run, surroundings  # noqa: F401

COMMANDS = [["bench", name] for name in ("serve", "throughput", "stall", "prefix")]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_fits_80_columns(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command, "--help") == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def bench(name: str, folder: Path, file: Path, *options: str) -> dict[str, Any]:
    """Run a benchmark on the test model and read its file."""
    assert run("bench", name, "--model", folder, "--threads", "1", "--json", file, *options) == 0
    report = json.loads(file.read_text(), parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert report["benchmark"] == name and report["hardware"]["machine"]["threads"] == 1
    assert report["weights"] == "checkpoint" and {"command", "versions", "date", "model_id", "dtype"} <= report.keys()
    return dict(report)


def check_width(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines()[1:])) <= 80
    assert "…" not in text, "nothing is cut off"
    return text


def test_serve(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--workload", "shared-prefix", "--num-prompts", "6", "--input-len", "9", "--output-len", "4"]
    more = ["--prefix-len", "32", "--num-groups", "2", "--request-rate", "200", "--max-concurrency", "2"]
    limits = ["--goodput", "ttft:60000 tpot:60000", "--percentiles", "50,99", "--detailed"]
    report = bench("serve", folder, tmp_path / "serve.json", *load, *more, *limits)
    assert report["completed"] == 6 and report["failed"] == 0 and report["output_lens"] == [4] * 6
    assert report["request_goodput"] == pytest.approx(report["request_throughput"])
    assert report["max_concurrent_requests"] <= 2 and report["max_concurrency"] == 2
    assert (report["workload"], report["request_rate"], report["seed"]) == ("shared-prefix", 200, 0)
    assert report["prefix_hit_rate"] > 0 and report["p50_ttft_ms"] == report["median_ttft_ms"]
    text = check_width(capsys)
    assert "6 completed, 0 failed" in text and "within all limits" in text and "TPOT" in text


def test_serve_tells_what_failed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model has 512 positions: some of these requests need more, and the others are served."""
    load = ["--num-prompts", "8", "--input-len", "500", "--range-ratio", "0.5", "--output-len", "2"]
    report = bench("serve", folder, tmp_path / "serve.json", *load)
    assert report["failed"] > 0 and report["completed"] == 8 - report["failed"] > 0
    assert report["request_rate"] == "inf" and report["request_goodput"] is None and "ttfts" not in report
    assert f"{report['failed']} failed" in check_width(capsys)


def test_throughput(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--num-prompts", "3", "--input-len", "20", "--output-len", "3", "--range-ratio", "0.4", "--repeats", "2"]
    report = bench("throughput", folder, tmp_path / "throughput.json", *load, "--against", "transformers")
    assert list(report["subjects"]) == ["minillm", "transformers generate", "transformers continuous"]
    for name, subject in report["subjects"].items():
        assert len(subject["times_s"]) == 2 and ("speedup" in subject) == (name != "minillm")
    text = check_width(capsys)
    assert "transformers continuous" in text and "speed-up" in text and "outside the model" in text


def test_throughput_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--workload", "nano-vllm", "--num-prompts", "3", "--scale", "0.02"]
    report = bench("throughput", folder, tmp_path / "throughput.json", *load)
    assert list(report["subjects"]) == ["minillm"] and report["workload"] == "nano-vllm" and report["scale"] == 0.02
    assert "transformers" not in check_width(capsys)


def test_stall(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "stall.png"
    sizes = ["--running", "3", "--context", "8", "--prompt", "64", "--repeats", "1", "--budgets", "12,67"]
    report = bench("stall", folder, tmp_path / "stall.json", *sizes, "--plot", str(figure))
    rows = [(row["policy"], row["max_num_batched_tokens"]) for row in report["rows"]]
    assert rows == [("mixed", 12), ("mixed", 67), ("prefill_first", 512)]
    assert all(row["bound_ttft_ms"] > 0 and row["bound_itl_ms"] > 0 for row in report["rows"])
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "worst ÷ usual" in check_width(capsys)


def test_prefix(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = bench(
        "prefix", folder, tmp_path / "prefix.json", "--prompt", "64", "--repeats", "1", "--shares", "0,50,100"
    )
    assert [row["num_cached"] for row in report["rows"]] == [0, 32, 63]
    assert "found" in check_width(capsys)


@pytest.mark.parametrize("name", ["trace.json", "trace.jsonl"])
def test_a_trace_of_every_step(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--num-prompts", "3", "--input-len", "9", "--output-len", "4", "--trace", str(tmp_path / name)]
    report = bench("serve", folder, tmp_path / "serve.json", *load)
    text = (tmp_path / name).read_text()
    if name == "trace.jsonl":
        steps = len(text.splitlines())
    else:
        steps = sum(event["name"] == "schedule" for event in json.loads(text)["traceEvents"])
    assert steps == report["num_steps"] > 3
    assert f"Trace of {steps} of {steps} steps:" in capsys.readouterr().out


# Engine settings


SETTINGS: dict[str, tuple[list[str], object]] = {
    "kernels": (["--kernels", "reference"], "reference"),
    "kv_format": (["--kv-format", "int8"], "int8"),
    "policy": (["--policy", "static"], "static"),
    "max_num_seqs": (["--max-num-seqs", "3"], 3),
    "max_num_batched_tokens": (["--max-num-batched-tokens", "17"], 17),
    "enable_prefix_caching": (["--no-prefix-caching"], False),
    "cache_bytes": (["--cache-gib", "0.25"], 2**28),
}


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings that a benchmark was asked for, with the seed of its weights; it ends before it loads a model."""
    asked: list[dict[str, Any]] = []

    class Noting(EngineConfig):
        def __post_init__(self) -> None:
            super().__post_init__()
            asked.append(asdict(self))
            raise ConfigError("noted")

    monkeypatch.setattr("minillm.cli.serving.EngineConfig", Noting)
    return asked


def test_without_options_the_fields_keep_their_defaults(configs: list[dict[str, Any]]) -> None:
    for name in ("serve", "throughput"):
        assert run("bench", name) == 2
    assert configs == [asdict(EngineConfig())] * 2


@pytest.mark.parametrize("name", HELP)
def test_an_option_sets_its_field_and_no_other(name: str, configs: list[dict[str, Any]]) -> None:
    options, value = SETTINGS[name]
    assert run("bench", "serve", *options, "--seed", "5") == 2
    assert configs == [asdict(EngineConfig(seed=5)) | {name: value}]


def test_reference_kernels_reach_the_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: list[str] = []
    right = Engine.__init__

    def noting(engine: Engine, model: Decoder, *rest: Any) -> None:
        right(engine, model, *rest)
        kernels.append(model.kernels)
        assert isinstance(engine.runner.cache, PagedCache)
        kernels.append("reference" if engine.runner.cache.backend is REFERENCE else "auto")

    monkeypatch.setattr(Engine, "__init__", noting)
    load = ["--num-prompts", "1", "--input-len", "9", "--output-len", "2"]
    for choice in ("reference", "auto"):
        assert run("bench", "serve", "--model", folder, *load, "--kernels", choice) == 0
    assert kernels == ["reference", "reference", "auto", "auto"]


WRONG = {
    "an unknown workload": (["serve", "--workload", "sonnet"], "workload='sonnet' is unknown"),
    "an unknown convention": (["serve", "--convention", "tgi"], "convention='tgi'"),
    "no rate": (["serve", "--request-rate", "0"], "request_rate=0"),
    "a limit without a number": (["serve", "--goodput", "ttft"], "Goodput limit 'ttft'"),
    "a percentile above 100": (["serve", "--num-prompts", "1", "--percentiles", "101"], "percentiles=[101]"),
    "an unknown policy": (["serve", "--policy", "lifo"], "policy='lifo' is not possible: it must be one of 'mixed'"),
    "unknown kernels": (["throughput", "--kernels", "sdpa"], "kernels='sdpa' is not possible"),
    "a setting that is none": (["serve", "--trace-steps", "3"], "--trace-steps"),
    "no sequences": (["throughput", "--max-num-seqs", "0"], "max_num_seqs=0 is not possible"),
    "an endless cache": (["serve", "--cache-gib", "inf"], "--cache-gib"),
    "letters for a cache": (["serve", "--cache-gib", "much"], "--cache-gib"),
    "a cache of nothing": (["serve", "--cache-gib", "0"], "cache_bytes=0 is not possible"),
    "no folder for the trace": (["serve", "--trace", "/nowhere/x.json"], "/nowhere/x.json cannot be written"),
    "an unknown rival": (["throughput", "--against", "vllm"], "Choose transformers, or leave it out"),
    "requests that do not fit": (["throughput", "--input-len", "600", "--num-prompts", "1"], "512 positions"),
    "a budget for nobody": (["stall", "--budgets", "8", "--prompt", "32"], "used up by 8 decodes"),
    "too long a prompt": (["stall", "--prompt", "600"], "512 positions"),
    "no budgets": (["stall", "--budgets", "12,x"], "--budgets '12,x' is no list"),
    "no folder for the figure": (["stall", "--plot", "/nowhere/x.png"], "/nowhere/x.png cannot be written"),
    "more than everything": (["prefix", "--shares", "120", "--prompt", "32"], "0 to 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_clear_message(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (name, *options), expected = WRONG[case]
    assert run("bench", name, "--model", folder, *options) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err + printed.out
    assert expected in " ".join(printed.err.replace("│", " ").split())
