"""The trace: one record per step."""

from __future__ import annotations

import pytest

from minillm.engine.engine import Engine
from minillm.sampling import SamplingParams
from tests.engine.scripted import scripted_engine


@pytest.fixture
def engine() -> Engine:
    """Eleven steps of three requests that push each other out."""
    engine = scripted_engine(block_size=2, num_blocks=11, max_num_batched_tokens=8)
    for i in range(3):
        engine.add([i + 4] * 5, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
    while engine.has_unfinished:
        engine.step()
    return engine


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
