"""The trace as files that others read: every field of every step, and a slice per phase and completion."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest

from minillm.engine.engine import Engine
from minillm.engine.request import Request
from minillm.engine.verify import Draft
from minillm.measure.export import write_chrome, write_jsonl
from minillm.sampling import SamplingParams
from tests.engine.scripted import scripted_engine

PHASES = ["schedule", "pack", "run", "commit"]


class Zeros:
    """A proposer that guesses token 0, once for each request."""

    def propose(self, room: Mapping[Request, int]) -> dict[Request, Draft]:
        return {request: Draft([0]) for request in room}

    def forget(self, request: Request) -> None:
        pass

    def reset(self) -> None:
        pass


def serve(engine: Engine) -> Engine:
    """Three requests that preempt each other."""
    for i in range(3):
        engine.add([i + 4] * 5, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
    list(engine.run())
    return engine


@pytest.fixture
def engine() -> Engine:
    return serve(scripted_engine(block_size=2, num_blocks=11, max_num_batched_tokens=8))


def test_json_lines_hold_every_field_of_every_step(engine: Engine, tmp_path: Path) -> None:
    write_jsonl(engine.trace, tmp_path / "trace.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(engine.trace)))
    for line, record in zip(lines, engine.trace, strict=True):
        assert line.keys() == vars(record).keys()
        assert line["start"] == record.start and line["num_free_blocks"] == record.num_free_blocks
        assert [tuple(one) for one in line["finished"]] == list(record.finished)
        for part, known in zip(line["requests"], record.requests, strict=True):
            assert part | {"blocks": tuple(part["blocks"])} == vars(known)


def test_the_chrome_trace_has_a_slice_per_phase_and_request(engine: Engine, tmp_path: Path) -> None:
    write_chrome(engine.trace, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    parts = [part for record in engine.trace for part in record.requests]
    assert len(slices) == 4 * len(engine.trace) + len(parts)
    rows = {event["args"]["name"]: event["tid"] for event in events if event["ph"] == "M"}
    assert list(rows) == ["engine", "#0/0", "#1/0", "#2/0"]
    assert {event["name"] for event in slices if event["tid"] == rows["#1/0"]} >= {"prefill", "decode"}
    assert "recompute" in {event["name"] for event in slices}, "somebody was preempted"
    assert [event["name"] for event in slices if event["tid"] == rows["engine"]][:4] == PHASES
    assert all(event["dur"] >= 0 for event in slices)
    assert {event["name"] for event in events if event["ph"] == "C"} == {"running", "waiting", "free blocks"}


def test_guessing_is_a_phase_of_its_own(tmp_path: Path) -> None:
    """With a proposer there is a fifth phase, and the phases of a step follow each other without a gap."""
    engine = serve(scripted_engine(proposer=Zeros(), num_blocks=40))
    write_chrome(engine.trace, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    phases = [event for event in events if event["ph"] == "X" and event["tid"] == 0]
    for record in engine.trace:
        own = [event for event in phases if event["args"]["step"] == record.step]
        guessed = ["propose"] if record.propose_time else []
        assert [event["name"] for event in own] == ["schedule", *guessed, *PHASES[1:]]
        for before, after in pairwise(own):
            assert after["ts"] == pytest.approx(before["ts"] + before["dur"])
    assert "propose" in {event["name"] for event in phases}
