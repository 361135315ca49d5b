"""The trace: one record per step, readable by others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minillm.engine.engine import Engine
from minillm.sampling import SamplingParams
from tests.engine.scripted import scripted_engine

PHASES = ["schedule", "pack", "run", "commit"]


@pytest.fixture
def engine() -> Engine:
    """Eleven steps of three requests that push each other out."""
    engine = scripted_engine(block_size=2, num_blocks=11, max_num_batched_tokens=8)
    for i in range(3):
        engine.add([i + 4] * 5, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
    while engine.has_unfinished:
        engine.step()
    return engine


def test_json_lines_hold_every_field_of_every_step(engine: Engine, tmp_path: Path) -> None:
    engine.trace.write_jsonl(tmp_path / "trace.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(engine.trace)))
    for line, record in zip(lines, engine.trace, strict=True):
        assert line["start"] == record.start and line["num_free_blocks"] == record.num_free_blocks
        assert [part["blocks"] for part in line["sequences"]] == [list(part.blocks) for part in record.requests]


def test_the_chrome_trace_has_a_slice_per_phase_and_sequence(engine: Engine, tmp_path: Path) -> None:
    engine.trace.write_chrome(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    parts = [part for record in engine.trace for part in record.requests]
    assert len(slices) == 4 * len(engine.trace) + len(parts)
    rows = {event["args"]["name"]: event["tid"] for event in events if event["ph"] == "M"}
    assert list(rows) == ["engine", "#0/0", "#1/0", "#2/0"]
    assert {event["name"] for event in slices if event["tid"] == rows["#1/0"]} >= {"prefill", "decode"}
    assert [event["name"] for event in slices if event["tid"] == rows["engine"]][:4] == PHASES
    assert all(event["dur"] >= 0 for event in slices)
    assert {event["name"] for event in events if event["ph"] == "C"} == {"running", "waiting", "free blocks"}


def test_phases_bytes_and_shares_follow_from_what_happened(engine: Engine) -> None:
    cache = engine.runner.cache
    for record in engine.trace:
        assert record.kv_bytes_written == record.num_tokens * cache.bytes_per_token
        assert record.kv_bytes_read == sum(part.kv_len for part in record.requests) * cache.bytes_per_token
        assert 0 < record.overhead < 1
    parts = [part for record in engine.trace for part in record.requests]
    assert all((part.phase == "recompute") == (part.num_recomputed > 0) for part in parts)
    assert {part.phase for part in parts if not part.num_recomputed} == {"prefill", "decode"}
    assert sum(part.num_samples for part in parts) == 30


def test_only_the_latest_steps_are_kept() -> None:
    engine = scripted_engine(trace_steps=3, num_blocks=20)
    engine.add([1], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    while engine.has_unfinished:
        engine.step()
    assert [record.step for record in engine.trace] == [5, 6, 7]
    engine.trace.clear()
    assert len(engine.trace) == 0
