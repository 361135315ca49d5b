"""What really happened, step by step: the one record that figures, benchmarks, claims and tests read."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minillm.engine.scheduler import Scheduled


@dataclass(frozen=True)
class RequestStep:
    """One sequence's part in a step, as it stood before the step ran."""

    request_id: str
    index: int
    num_prompt: int
    num_computed: int  # tokens in the cache before
    num_scheduled: int  # tokens computed now: the query length
    num_recomputed: int  # of these, how many had been computed before a preemption threw them away
    num_samples: int  # completions that draw a token: 0 while it stays behind
    num_drafts: int  # tokens that were guessed behind its last one and verified: part of num_scheduled
    num_accepted: int  # of these, how many the model agreed with; it then adds one of its own
    blocks: tuple[int, ...]

    @property
    def kv_len(self) -> int:
        """Keys that its last query sees."""
        return self.num_computed + self.num_scheduled

    @property
    def phase(self) -> str:
        """A name for display, derived from what happened; the engine never asks."""
        if self.num_recomputed:
            return "recompute"
        if self.num_computed < self.num_prompt:
            return "prefill"
        return "verify" if self.num_drafts else "decode"

    @classmethod
    def of(cls, part: Scheduled, num_accepted: int = 0) -> RequestStep:
        sequence = part.request
        again = min(sequence.num_written, sequence.num_computed + part.num_tokens) - sequence.num_computed
        return cls(
            request_id=sequence.request_id,
            index=sequence.index,
            num_prompt=sequence.num_prompt,
            num_computed=sequence.num_computed,
            num_scheduled=part.q_len,
            num_recomputed=max(0, again),
            num_samples=len(part.samplers),
            num_drafts=len(part.draft),
            num_accepted=num_accepted,
            blocks=tuple(sequence.table.blocks),
        )


@dataclass(frozen=True)
class StepRecord:
    """One step: who took part, what the pool looked like, where the time went (seconds, one monotonic clock)."""

    step: int
    start: float
    schedule_time: float
    propose_time: float  # guessing; 0 without a proposer
    pack_time: float
    run_time: float  # model and sampling, until the tokens are on the host
    commit_time: float
    sequences: tuple[RequestStep, ...]
    admitted: tuple[str, ...]
    preempted: tuple[str, ...]
    num_copies: int
    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_cached_blocks: int
    kv_bytes_written: int
    kv_bytes_read: int

    @property
    def num_tokens(self) -> int:
        """Tokens computed: the rows of every matrix product of the step."""
        return sum(part.num_scheduled for part in self.requests)

    @property
    def overhead(self) -> float:
        """Share of the step that was no model, neither the target nor a draft: scheduling, packing and committing."""
        busy = self.schedule_time + self.pack_time + self.commit_time
        return busy / (busy + self.propose_time + self.run_time)


class Trace(deque[StepRecord]):
    """The latest `maxlen` step records, oldest first."""

    def write_jsonl(self, path: str | Path) -> None:
        """One JSON object per step."""
        lines = [json.dumps(asdict(record)) for record in self]
        Path(path).write_text("".join(f"{line}\n" for line in lines))

    def write_chrome(self, path: str | Path) -> None:
        """The Trace Event Format of chrome://tracing and ui.perfetto.dev: a row for the engine, one per sequence."""
        slices = [event for record in self for event in _slices(record)]
        rows = {name: number for number, name in enumerate(dict.fromkeys(event["tid"] for event in slices))}
        for event in slices:
            event["tid"] = rows[event["tid"]]
        names = [{"ph": "M", "pid": 0, "tid": i, "name": "thread_name", "args": {"name": n}} for n, i in rows.items()]
        counters = [event for record in self for event in _counters(record)]
        Path(path).write_text(json.dumps({"traceEvents": names + slices + counters, "displayTimeUnit": "ms"}))


def _slices(record: StepRecord) -> Iterator[dict[str, Any]]:
    """What was going on for how long, microseconds: the engine's phases, and during `run` the sequences."""
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
