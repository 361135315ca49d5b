"""The engine's trace as a file: JSON lines for programs, or the format of trace viewers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minillm.engine.trace import StepRecord


def write_jsonl(trace: Iterable[StepRecord], path: str | Path) -> None:
    """One JSON object per step, with the fields of `StepRecord`."""
    Path(path).write_text("".join(f"{json.dumps(asdict(record))}\n" for record in trace), encoding="utf-8")


def write_chrome(trace: Iterable[StepRecord], path: str | Path) -> None:
    """The Trace Event Format of chrome://tracing and ui.perfetto.dev: a row for the engine, one per completion."""
    records = list(trace)
    slices = [event for record in records for event in _slices(record)]
    rows = {name: number for number, name in enumerate(dict.fromkeys(event["tid"] for event in slices))}
    for event in slices:
        event["tid"] = rows[event["tid"]]
    names = [{"ph": "M", "pid": 0, "tid": i, "name": "thread_name", "args": {"name": n}} for n, i in rows.items()]
    counters = [event for record in records for event in _counters(record)]
    text = json.dumps({"traceEvents": names + slices + counters, "displayTimeUnit": "ms"})
    Path(path).write_text(text, encoding="utf-8")


def _slices(record: StepRecord) -> Iterator[dict[str, Any]]:
    """What was going on for how long, microseconds: the engine's phases, and during `run` the requests."""
    start = record.start * 1e6
    for phase in ("schedule", "propose", "pack", "run", "commit"):
        if phase == "propose" and record.propose_time == 0:
            continue
        span = {"ph": "X", "pid": 0, "ts": start, "dur": getattr(record, f"{phase}_time") * 1e6}
        yield span | {"tid": "engine", "name": phase, "args": {"step": record.step, "tokens": record.num_tokens}}
        start += span["dur"]
        for part in record.requests if phase == "run" else ():
            args = {"tokens": part.num_scheduled, "keys": part.kv_len, "recomputed": part.num_recomputed}
            yield span | {"tid": f"{part.request_id}/{part.index}", "name": part.phase, "args": args}


def _counters(record: StepRecord) -> Iterator[dict[str, Any]]:
    values = {"running": record.num_running, "waiting": record.num_waiting, "free blocks": record.num_free_blocks}
    for name, value in values.items():
        yield {"ph": "C", "pid": 0, "name": name, "ts": record.start * 1e6, "args": {name: value}}
