"""The trace: one record per step, bounded in bytes; what it says is what happened."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import pytest

from minillm.config import EngineConfig
from minillm.engine.engine import Engine
from minillm.engine.trace import RequestStep, StepRecord, Trace
from minillm.sampling import SamplingParams
from tests.engine.scripted import scripted_engine
from tests.engine.workloads import play, random_workload


@pytest.fixture
def engine() -> Engine:
    """Three requests that preempt each other."""
    engine = scripted_engine(block_size=2, num_blocks=11, max_num_batched_tokens=8)
    for i in range(3):
        engine.add([i + 4] * 5, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
    list(engine.run())
    return engine


def test_phases_times_and_shapes_follow_from_what_happened(engine: Engine) -> None:
    assert [record.step for record in engine.trace] == list(range(len(engine.trace)))
    for record, later in pairwise(engine.trace):
        busy = record.schedule_time + record.propose_time + record.pack_time + record.run_time + record.commit_time
        assert record.start + busy <= later.start
    for record in engine.trace:
        assert record.shape == [
            (part.num_scheduled, part.num_computed + part.num_scheduled) for part in record.requests
        ]
        assert sum(q_len for q_len, _ in record.shape) == record.num_tokens <= 8
    parts = [part for record in engine.trace for part in record.requests]
    assert all((part.phase == "recompute") == (part.num_recomputed > 0) for part in parts)
    assert {part.phase for part in parts if not part.num_recomputed} == {"prefill", "decode"}
    assert sum(part.num_samples for part in parts) == 30


def test_a_decode_names_one_block_whatever_the_context() -> None:
    engine = scripted_engine(block_size=2, num_blocks=60)
    engine.add([4] * 80, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    list(engine.run())
    prompt, *decodes = [record.requests[0] for record in engine.trace]
    assert (prompt.first_block, len(prompt.blocks)) == (0, 40)
    assert [(part.first_block, len(part.blocks)) for part in decodes] == [(p // 2, 1) for p in range(80, 99)]


@pytest.mark.parametrize("policy", ["mixed", "prefill_first", "static"])
def test_every_completion_ends_once(policy: str) -> None:
    """Whatever ends it: its last token, or an abort before, after or while its step runs."""
    for seed in range(40):
        workload = random_workload(seed, policy)
        engine = scripted_engine(workload.config)
        got = play(engine, workload)
        ended = [name for record in engine.trace for name in record.finished]
        assert len(set(ended)) == len(ended), seed
        served = {name for name in got if workload.requests[int(name[0])].abort is None}
        assert served <= set(ended), seed


def test_an_end_from_outside_is_told_by_the_next_record() -> None:
    engine = scripted_engine(num_blocks=20)
    names = [engine.add([4], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)) for _ in range(2)]
    engine.step()
    engine.finish(names[0], 0, "a stop string")
    list(engine.run())
    assert [record.finished for record in engine.trace] == [(), ((names[0], 0),), (), ((names[1], 0),)]


# Memory


def record(step: int, num_requests: int = 1, num_blocks: int = 1) -> StepRecord:
    """A step of decodes; the numbers are as large as they get, so that each is an object of its own."""
    parts = tuple(
        RequestStep(
            request_id=f"#{i}",
            index=0,
            num_prompt=4000 + i,
            num_computed=4096 + step,
            num_scheduled=1,
            num_recomputed=0,
            num_samples=1,
            num_drafts=0,
            num_accepted=0,
            first_block=300 + step // 16,
            blocks=tuple(300 + step + i + block for block in range(num_blocks)),
        )
        for i in range(num_requests)
    )
    times = [1e-4 * step + i for i in range(6)]
    return StepRecord(step, *times, parts, (), (), (), 0, num_requests, 1000 + step, 9000 + step)


def test_64_requests_for_2000_steps_at_4k_context_take_at_most_trace_bytes() -> None:
    limit = EngineConfig().trace_bytes
    tracemalloc.start()
    try:
        trace, before = Trace(limit), tracemalloc.get_traced_memory()[0]
        for step in range(2000):
            trace.append(record(step, 64))
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert limit / 2 < taken <= limit
    assert trace[-1].step == 1999 and len(trace) > 100


def test_admissions_of_long_prompts_take_at_most_trace_bytes() -> None:
    tracemalloc.start()
    try:
        trace, before = Trace(2**22), tracemalloc.get_traced_memory()[0]
        for step in range(60):
            trace.append(record(step, 4, num_blocks=1000))
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert taken <= 2**22


def test_the_latest_records_are_kept() -> None:
    engine = scripted_engine(trace_bytes=3 * record(0).num_bytes, num_blocks=20)
    engine.add([1], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    list(engine.run())
    assert [one.step for one in engine.trace] == [5, 6, 7]
    engine.trace.clear()
    assert len(engine.trace) == 0
    engine.add([1], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    list(engine.run())
    assert [one.step for one in engine.trace] == [13, 14, 15]


def test_no_bytes_no_trace() -> None:
    engine = scripted_engine(trace_bytes=0, num_blocks=20)
    engine.add([1], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    list(engine.run())
    assert len(engine.trace) == 0
    assert not engine._ended
