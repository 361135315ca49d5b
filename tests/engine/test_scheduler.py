"""Scheduling, one named test per trap, with a scripted model: no tensors, exact expectations."""

from __future__ import annotations

import random
import sys
import tracemalloc
from collections import Counter
from typing import Any

import pytest

from minillm.cache.blocks import BlockPool
from minillm.engine.engine import Engine, TokenEvent
from minillm.engine.trace import StepRecord
from minillm.errors import ConfigError, RequestError
from minillm.sampling import SamplingParams
from tests.engine.scripted import alone, scripted_engine
from tests.engine.workloads import Completions


def greedy(max_tokens: int = 4, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **options)


def collect(events: list[TokenEvent], got: Completions) -> None:
    for event in events:
        got.setdefault((event.request.request_id, event.request.index), []).extend(event.token_ids)


def run(engine: Engine, max_steps: int = 2000) -> Completions:
    """Step until nobody is left."""
    got: Completions = {}
    for _ in range(max_steps):
        if not engine.has_unfinished:
            assert engine.pool.num_free == engine.pool.num_usable
            return got
        collect(engine.step(), got)
    raise AssertionError(f"not done after {max_steps} steps")


def scheduled(record: StepRecord) -> dict[str, int]:
    return {part.request_id: part.num_scheduled for part in record.requests}


# --- admission -------------------------------------------------------------------------------------------------------


def test_trap_13_a_request_that_can_never_fit_is_refused_and_the_others_go_on() -> None:
    engine = scripted_engine(block_size=4, num_blocks=5)
    good = engine.add([1] * 8, greedy(9))
    with pytest.raises(
        RequestError,
        match=r"max_tokens=10 .* at most 9 after a prompt of 8 tokens: the model has 256 positions, the cache 16",
    ):
        engine.add([1] * 8, greedy(10))
    with pytest.raises(RequestError, match="empty"):
        engine.add([], greedy())
    with pytest.raises(RequestError, match="vocabulary"):
        engine.add([1, 99], greedy())
    with pytest.raises(RequestError, match="max_num_seqs"):
        engine.add([1], greedy(n=65))
    with pytest.raises(RequestError, match="still being served, and not begin with"):
        engine.add([1], greedy(), request_id=good)
    assert run(engine) == {(good, 0): alone((1,) * 8, greedy(9), 0)}


def test_trap_13_a_request_that_just_fits_is_served_beside_others() -> None:
    """Everybody needs the whole pool: they take turns, and nobody waits for ever."""
    engine = scripted_engine(block_size=4, num_blocks=5)
    for _ in range(4):
        engine.add([1] * 8, greedy(9))
    assert run(engine) == {(f"#{i}", 0): alone((1,) * 8, greedy(9), 0) for i in range(4)}


def test_trap_16_max_num_seqs_counts_all_who_run() -> None:
    engine = scripted_engine(max_num_seqs=2, num_blocks=100)
    for _ in range(6):
        engine.add([1, 2, 3], greedy(5))
    run(engine)
    assert max(len(record.requests) for record in engine.trace) == 2


def test_trap_16_completions_still_to_be_spawned_count_too() -> None:
    engine = scripted_engine(max_num_seqs=4, num_blocks=100)
    engine.add([1, 2, 3], greedy(5, n=3))
    engine.add([1, 2, 4], greedy(5, n=2))
    engine.step()
    assert engine.trace[-1].admitted == ("#0",)
    run(engine)
    assert max(len(record.requests) for record in engine.trace) == 3


def test_trap_17_the_budget_is_spent_on_what_the_prefix_cache_leaves() -> None:
    engine = scripted_engine(block_size=4, num_blocks=100, max_num_batched_tokens=8)
    engine.add([1] * 17, greedy(1))
    run(engine)
    engine.add([1] * 17, greedy(1))
    engine.add([1] * 20, greedy(1))
    engine.step()
    assert scheduled(engine.trace[-1]) == {"#1": 1, "#2": 4}


def test_trap_17_a_preempted_sequence_hits_its_own_blocks() -> None:
    """nano-vllm #211: preemption and prefix hit together. What is still in the cache is not computed again."""
    engine = scripted_engine(block_size=4, num_blocks=9, max_num_batched_tokens=64)
    for first in (1, 2, 5):
        engine.add([first] * 8, greedy(12))
    got = run(engine)
    assert got == {(f"#{i}", 0): alone((first,) * 8, greedy(12), 0) for i, first in enumerate((1, 2, 5))}
    assert sum(len(record.preempted) for record in engine.trace) > 0


def test_nobody_overtakes() -> None:
    """The small request behind a large one waits with it: else the large one might wait for ever."""
    engine = scripted_engine(block_size=4, num_blocks=6, max_num_batched_tokens=64)
    engine.add([1] * 8, greedy(6))
    engine.add([2] * 16, greedy(2))
    engine.add([5] * 1, greedy(2))
    run(engine)
    admitted = [name for record in engine.trace for name in record.admitted]
    assert admitted == sorted(admitted)


def test_ten_thousand_waiting_cost_a_step_no_more_than_a_hundred() -> None:
    """Counted in function calls of the scheduler, not in time."""
    calls = {}
    for number in (100, 10_000):
        engine = scripted_engine(num_blocks=20, max_num_seqs=4, debug=False)
        for _ in range(number):
            engine.add([1, 2, 3], greedy())
        engine.step()
        calls[number] = _count_calls(engine)
        assert not any(request.table.blocks for request in engine.scheduler.waiting.values())
    assert calls[100] == calls[10_000]


def _count_calls(engine: Engine) -> int:
    counter = Counter[str]()
    sys.setprofile(lambda frame, event, arg: counter.update([event]))
    try:
        plan = engine.scheduler.schedule()
    finally:
        sys.setprofile(None)
    assert plan.scheduled
    return counter["call"] + counter["c_call"]


def test_ten_thousand_waiting_take_little_memory() -> None:
    engine = scripted_engine(num_blocks=20)
    tracemalloc.start()
    for _ in range(10_000):
        engine.add([1] * 100, greedy())
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used / 10_000 < 4096, "bytes per waiting request of 100 tokens"
    for number in range(10_000):
        engine.abort(f"#{number}")
    assert not engine.has_unfinished and not engine.requests


# --- order -----------------------------------------------------------------------------------------------------------


def serve_a_stream_of_arrivals(policy: str, num_steps: int = 30) -> Engine:
    """One sequence decodes; a new prompt arrives before every step."""
    engine = scripted_engine(policy=policy, num_blocks=200, max_num_batched_tokens=16)
    engine.add([1, 2], greedy(60), request_id="old")
    engine.step()
    for _ in range(num_steps):
        engine.add([1] * 12, greedy(1))
        engine.step()
    return engine


def test_trap_15_arrivals_do_not_starve_decodes() -> None:
    engine = serve_a_stream_of_arrivals("mixed")
    assert all("old" in scheduled(record) for record in engine.trace)


def test_trap_15_prefill_first_shows_the_stall() -> None:
    """The mutant of the test above is a policy: it stays, as a lesson."""
    engine = serve_a_stream_of_arrivals("prefill_first")
    assert sum("old" in scheduled(record) for record in engine.trace) == 1


def test_mixed_fills_the_budget_with_chunks() -> None:
    engine = scripted_engine(num_blocks=200, max_num_batched_tokens=10)
    for _ in range(3):
        engine.add([1], greedy(40))
    engine.step()
    engine.add([2] * 20, greedy(2), request_id="long")
    for _ in range(4):
        engine.step()
    assert [scheduled(record).get("long", 0) for record in engine.trace] == [0, 7, 7, 6, 1]


def test_static_lets_nobody_join_until_the_batch_is_done() -> None:
    engine = scripted_engine(policy="static", num_blocks=200, max_num_seqs=2, max_num_batched_tokens=4)
    for length, max_tokens in ((6, 2), (5, 7), (3, 3), (1, 1)):
        engine.add([1] * length, greedy(max_tokens))
    run(engine)
    groups = [set(scheduled(record)) for record in engine.trace]
    assert all(group <= {"#0", "#1"} or group <= {"#2", "#3"} for group in groups)
    assert engine.trace[0].num_waiting == 3, "prompts that exceed the budget join one after the other"


def test_a_budget_of_one_token_serves_everybody() -> None:
    for policy in ("mixed", "prefill_first", "static"):
        engine = scripted_engine(policy=policy, num_blocks=30, max_num_batched_tokens=1)
        for i in range(5):
            engine.add([i + 4] * 5, greedy(3))
        assert run(engine) == {(f"#{i}", 0): alone((i + 4,) * 5, greedy(3), 0) for i in range(5)}
        assert {record.num_tokens for record in engine.trace} == {1}


# --- sampling and spawning -------------------------------------------------------------------------------------------


def test_trap_18_nothing_is_sampled_before_the_prompt_is_complete() -> None:
    engine = scripted_engine(num_blocks=30, max_num_batched_tokens=4)
    engine.add([1] * 10, greedy(2))
    assert [len(engine.step()) for _ in range(4)] == [0, 0, 1, 1]
    assert [record.requests[0].num_samples for record in engine.trace] == [0, 0, 1, 1]


def test_spawned_completions_share_the_blocks_of_the_prompt() -> None:
    engine = scripted_engine(block_size=4, num_blocks=30)
    engine.add([1] * 10, greedy(3, n=3))
    events = engine.step()
    assert [event.request.index for event in events] == [0, 1, 2]
    tables = [event.request.table.blocks for event in events]
    assert tables[0] == tables[1] == tables[2] and len(tables[0]) == 3
    engine.step()
    assert engine.trace[-1].num_copies == 2, "the last owner keeps the block"
    assert len({table[0] for table in tables}) == 1 and len({table[2] for table in tables}) == 3
    assert run(engine).keys() == {("#0", 0), ("#0", 1), ("#0", 2)}


def test_a_prompt_that_fills_its_last_block_is_forked_without_a_copy() -> None:
    engine = scripted_engine(block_size=4, num_blocks=30)
    engine.add([1] * 8, greedy(3, n=3))
    run(engine)
    assert sum(record.num_copies for record in engine.trace) == 0


# --- preemption ------------------------------------------------------------------------------------------------------


def crowded(**options: Any) -> Engine:
    """Four sequences that fit one at a time towards their end."""
    engine = scripted_engine(**({"block_size": 2, "num_blocks": 13, "max_num_batched_tokens": 8} | options))
    for i in range(4):
        engine.add([i + 4] * 5, greedy(16))
    return engine


def test_trap_14_a_step_that_preempts_admits_nobody_and_the_oldest_gets_on() -> None:
    engine = crowded()
    finished = 0
    while engine.has_unfinished:
        events = engine.step()
        record = engine.trace[-1]
        assert not (record.preempted and record.admitted)
        assert f"#{finished}" in scheduled(record) and f"#{finished}" not in record.preempted
        finished += sum(event.finish_reason is not None for event in events)
    assert any(record.preempted for record in engine.trace)


@pytest.mark.parametrize("caching", [True, False])
def test_trap_14_recomputed_tokens_are_counted(caching: bool) -> None:
    """Against a count from scratch: positions that a sequence computes for a second time."""
    engine = crowded(enable_prefix_caching=caching)
    run(engine)
    seen, again = set[tuple[str, int]](), 0
    for record in engine.trace:
        for part in record.requests:
            places = {(part.request_id, p) for p in range(part.num_computed, part.num_computed + part.num_scheduled)}
            again += len(places & seen)
            seen |= places
    assert sum(part.num_recomputed for record in engine.trace for part in record.requests) == again > 0


def test_trap_14_a_margin_keeps_sequences_from_joining_just_to_be_preempted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the spare blocks at admission, the same work throws more away."""

    def recomputed(seed: int) -> int:
        rng = random.Random(seed)
        engine = scripted_engine(block_size=4, num_blocks=20, max_num_batched_tokens=64)
        for _ in range(24):
            engine.add([rng.randrange(24)] * rng.randint(1, 19), greedy(rng.randint(1, 25)))
        run(engine)
        return sum(part.num_recomputed for record in engine.trace for part in record.requests)

    with_margin = sum(map(recomputed, range(4)))
    fits = BlockPool.fits
    monkeypatch.setattr(BlockPool, "fits", lambda self, hits, num_tokens, spare=0: fits(self, hits, num_tokens))
    assert with_margin < sum(map(recomputed, range(4)))


def test_trap_19_a_resumed_sequence_is_computed_like_a_prompt() -> None:
    """It has output already, and still many tokens to go: no phase can be read off its output."""
    engine = crowded(enable_prefix_caching=False)
    got = run(engine)
    parts = [part for record in engine.trace for part in record.requests]
    assert any(part.num_scheduled > 1 and part.kv_len > part.num_prompt for part in parts)
    assert got == {(f"#{i}", 0): alone((i + 4,) * 5, greedy(16), 0) for i in range(4)}


def test_trap_20_a_preempted_request_keeps_its_tokens() -> None:
    engine = crowded()
    preempted = None
    while preempted is None:
        before = {request.order: list(request.tokens) for request in engine.scheduler}
        engine.step()
        preempted = next((s for s in engine.scheduler.waiting.values() if s.num_preemptions), None)
    assert preempted.tokens == before[preempted.order] and preempted.num_generated > 0
    assert preempted.num_computed == 0 and not preempted.table.blocks


def test_trap_22_positions_end_where_the_model_ends() -> None:
    """The last token is never computed, so prompt + max_tokens may be one more than there are positions."""
    engine = scripted_engine(num_blocks=1000)
    last = engine.model.config.max_position_embeddings
    with pytest.raises(RequestError, match=r"max_tokens=4 .* at most 3"):
        engine.add([1] * (last - 2), greedy(4))
    engine.add([1] * (last - 2), greedy(3))
    run(engine)
    assert max(part.kv_len for record in engine.trace for part in record.requests) == last


# --- leaving ---------------------------------------------------------------------------------------------------------


def test_abort_at_any_moment_frees_everything() -> None:
    for moment in range(12):
        engine = scripted_engine(block_size=4, num_blocks=20, max_num_batched_tokens=4, max_num_seqs=4)
        for length in (3, 9, 5, 4):
            engine.add([1] * length, greedy(4, n=2))
        for _ in range(moment):
            engine.step()
        for name in ("#0", "#1", "#2", "#3"):
            engine.abort(name)
            engine.scheduler.check()
        assert not engine.has_unfinished and engine.pool.num_free == engine.pool.num_usable
        assert engine.step() == []


def test_trap_21_blocks_of_a_step_in_flight_are_freed_when_it_comes_back() -> None:
    engine = scripted_engine(block_size=4, num_blocks=20)
    engine.add([1] * 9, greedy(4))
    plan = engine.scheduler.schedule()
    free = engine.pool.num_free
    engine.abort("#0")
    assert engine.pool.num_free == free, "the step that runs still writes there"
    engine.scheduler.check()
    assert engine.scheduler.commit(plan, [[7]]) == [], "an aborted sequence gets no token"
    assert engine.pool.num_free == engine.pool.num_usable
    engine.scheduler.check()


def test_finish_ends_one_completion_and_leaves_the_others() -> None:
    engine = scripted_engine(num_blocks=20)
    engine.add([1] * 5, greedy(6, n=3))
    engine.step()
    engine.finish("#0", 1, "END")
    ended = next(s for s in engine.trace[0].requests)
    assert ended.num_samples == 3
    got = run(engine)
    assert len(got["#0", 0]) == len(got["#0", 2]) == 5 and ("#0", 1) not in got
    engine.finish("#0", 1)
    engine.abort("nobody")


def test_a_failed_step_loses_nobody() -> None:
    """Ctrl-C in the middle of a step: the engine stays usable and everybody starts over."""
    engine = crowded()
    got: Completions = {}
    for _ in range(6):
        collect(engine.step(), got)
    work = engine.runner.run
    engine.runner.run = _interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.runner.run = work  # type: ignore[method-assign]
    engine.scheduler.check()
    for key, tokens in run(engine).items():
        got.setdefault(key, []).extend(tokens)
    assert got == {(f"#{i}", 0): alone((i + 4,) * 5, greedy(16), 0) for i in range(4)}


def _interrupt(batch: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "wrong",
    [{"block_size": 0}, {"num_blocks": 1}, {"max_num_seqs": 0}, {"max_num_batched_tokens": True}, {"policy": "fifo"}],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        scripted_engine(**wrong)
