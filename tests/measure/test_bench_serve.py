"""The client: whom it sends when, on a clock that only moves when the engine steps; then a real engine."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from minillm.config import EngineConfig
from minillm.engine.engine import Engine
from minillm.errors import ConfigError, RequestError
from minillm.measure import bench_serve as module
from minillm.measure.bench_serve import ServeRun, serve, warm_up
from minillm.measure.summary import engine_summary, summarize
from minillm.measure.workloads import SampleRequest, Workload, arrival_times
from minillm.sampling import SamplingParams
from tests.families import random_model


class Clock:
    """Stands in for the module `time`: it moves when somebody sleeps or works."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class OneSecondEngine:
    """Every step takes a second and gives every request a token; a prompt of more than 9 tokens is refused."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.live: dict[str, Any] = {}
        self.added: list[float] = []  # what the clock showed
        self.most = 0
        record = dict(schedule_time=0.1, pack_time=0.1, run_time=0.5, commit_time=0.1, requests=(), num_tokens=1)
        self.trace = deque([SimpleNamespace(**record)], maxlen=1)

    def add(self, prompt: list[int], params: SamplingParams, *, cache_salt: str | None) -> str:
        if len(prompt) > 9:
            raise RequestError("too long")
        name = str(len(self.added))
        self.added.append(self.clock.now)
        self.live[name] = SimpleNamespace(
            request_id=name, left=params.max_tokens, first_scheduled_time=None, num_cached=0, num_preemptions=0
        )
        self.most = max(self.most, len(self.live))
        return name

    def step(self) -> list[Any]:
        assert self.live, "the client never steps an idle engine"
        self.clock.now += 1
        events = []
        for name, request in list(self.live.items()):
            request.first_scheduled_time = request.first_scheduled_time or self.clock.now - 1
            request.left -= 1
            reason = None if request.left else "length"
            events.append(SimpleNamespace(request=request, token_ids=[7], time=self.clock.now, finish_reason=reason))
            if reason:
                del self.live[name]
        return events


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> OneSecondEngine:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return OneSecondEngine(clock)


def run(engine: OneSecondEngine, tokens: list[int], due: list[float], **options: Any) -> ServeRun:
    return serve(engine, [SampleRequest([1], n) for n in tokens], due, **options)  # type: ignore[arg-type]


def metrics(result: ServeRun, name: str) -> list[float]:
    return [getattr(served.metrics, name) for served in result.served]


def check_open_loop(engine: OneSecondEngine) -> None:
    """Requests of three tokens due at 0, 0.5 and 10 s. The second waits for the step in flight: that is its latency."""
    result = run(engine, [3, 3, 3], [0.0, 0.5, 10.0])
    assert metrics(result, "ttft") == pytest.approx([1, 1.5, 1])
    assert metrics(result, "e2el") == pytest.approx([3, 3.5, 3])
    assert metrics(result, "queue_time") == pytest.approx([0, 0.5, 0])
    assert engine.added == pytest.approx([100, 101, 110])
    assert result.duration == pytest.approx(13) and len(result.steps) == 7
    assert result.steps[0].overhead == pytest.approx(0.5)


def test_an_open_loop_waits_for_nobody(engine: OneSecondEngine) -> None:
    check_open_loop(engine)


def test_counting_from_sending_is_noticed(engine: OneSecondEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant is coordinated omission: the clock starts when the client finds time to send."""
    send = module.Client._send

    def late(client: module.Client, served: Any) -> None:
        send(client, served)
        served.metrics.arrival_time = engine.clock.now

    monkeypatch.setattr(module.Client, "_send", late)
    with pytest.raises(AssertionError):
        check_open_loop(engine)


def check_closed_loop(engine: OneSecondEngine) -> None:
    """Two slots, four requests at once: the others start when a slot is free, and their latency counts from there."""
    result = run(engine, [2, 3, 1, 1], [0.0] * 4, max_concurrency=2)
    assert engine.most == 2
    assert [served.metrics.arrival_time - 100 for served in result.served] == pytest.approx([0, 0, 2, 3])
    assert metrics(result, "ttft") == pytest.approx([1, 1, 1, 1])
    assert summarize(result)["max_concurrent_requests"] == 2
    assert [served.metrics.arrival_time - served.due for served in result.served] == pytest.approx([0, 0, 2, 3])


def test_a_closed_loop_keeps_to_its_slots(engine: OneSecondEngine) -> None:
    check_closed_loop(engine)


@pytest.mark.parametrize("slots", [1, 3])
def test_wrong_slots_are_noticed(engine: OneSecondEngine, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = module.Client.__init__

    def start(client: module.Client, *arguments: Any) -> None:
        original(client, *arguments[:3], slots, *arguments[4:])

    monkeypatch.setattr(module.Client, "__init__", start)
    with pytest.raises(AssertionError):
        check_closed_loop(engine)


def test_a_free_slot_costs_nothing(engine: OneSecondEngine) -> None:
    """Due long after a slot became free: the request starts when it is due."""
    result = run(engine, [1, 1], [0.0, 7.5], max_concurrency=1)
    assert metrics(result, "ttft") == pytest.approx([1, 1]) and metrics(result, "arrival_time") == [100, 107.5]


def test_requests_may_come_in_any_order(engine: OneSecondEngine) -> None:
    result = run(engine, [1, 1], [5.0, 0.0])
    assert metrics(result, "arrival_time") == [105, 100], "results stand in the order of the requests"


def test_a_refused_request_fails_alone(engine: OneSecondEngine) -> None:
    requests = [SampleRequest([1] * 10, 2), SampleRequest([1], 2), SampleRequest([1] * 10, 2)]
    result = serve(engine, requests, max_concurrency=1)  # type: ignore[arg-type]
    assert [served.error for served in result.served] == ["too long", "", "too long"]
    assert [served.completed for served in result.served] == [False, True, False]
    assert summarize(result)["failed"] == 2


def test_progress_counts_what_is_finished(engine: OneSecondEngine) -> None:
    seen: list[int] = []
    run(engine, [1, 2, 2], [0.0, 0.0, 4.0], progress=seen.append)
    assert seen == [1, 2, 2, 2, 3], "the fourth is the sleep before the last arrival"


@pytest.mark.parametrize("call", [lambda e: run(e, [1], [0.0, 1.0]), lambda e: run(e, [1], [0.0], max_concurrency=0)])
def test_impossible_loads_are_refused(engine: OneSecondEngine, call: Callable[[OneSecondEngine], object]) -> None:
    with pytest.raises(ConfigError):
        call(engine)
    assert engine.added == []


def test_a_real_engine_serves_every_token() -> None:
    model = random_model()
    engine = Engine(model, EngineConfig(num_blocks=64, max_num_batched_tokens=24, debug=True))
    workload = Workload("shared-prefix", 10, input_len=9, output_len=6, range_ratio=0.5, prefix_len=32, num_groups=2)
    requests = workload.requests(model.config.vocab_size)
    warm_up(engine, requests)
    assert len(engine.trace) == 0 and len(engine.pool.cached) >= 0
    result = serve(engine, requests, arrival_times(10, 500.0), max_concurrency=4)
    assert all(served.completed and not served.error for served in result.served)
    figures = summarize(result, detailed=True) | engine_summary(result)
    assert figures["output_lens"] == [request.max_tokens for request in requests]
    assert figures["max_concurrent_requests"] <= 4 and figures["num_steps"] == len(result.steps)
    hits = [served.num_cached for served in result.served]
    assert sum(hits) >= 8 * 32 - 4 * 32, "all but those that ran beside the first of their group find its prefix"
    assert figures["prefix_hit_rate"] == sum(hits) / sum(len(request.prompt) for request in requests)


def test_an_engine_without_a_trace_is_refused() -> None:
    """However small a trace is, its latest record is there; off, it has none."""
    assert serve(Engine(random_model(), EngineConfig(num_blocks=8, trace_bytes=1)), [SampleRequest([1], 1)]).steps
    with pytest.raises(ConfigError, match="trace_bytes=0 "):
        serve(Engine(random_model(), EngineConfig(num_blocks=8, trace_bytes=0)), [SampleRequest([1], 1)])


def test_another_salt_is_another_load() -> None:
    model = random_model()
    engine = Engine(model, EngineConfig(num_blocks=64))
    prompt = random.Random(0).choices(range(model.config.vocab_size), k=48)
    hits = [serve(engine, [SampleRequest(prompt, 2)], cache_salt=salt).served[0].num_cached for salt in "112"]
    assert hits == [0, 47, 0]


def test_preemption_is_counted() -> None:
    model = random_model()
    engine = Engine(model, EngineConfig(num_blocks=9, block_size=4, enable_prefix_caching=False))
    result = serve(engine, [SampleRequest([1] * 8, 16), SampleRequest([2] * 8, 16)])
    assert all(served.completed for served in result.served)
    figures = engine_summary(result)
    assert figures["num_preemptions"] > 0 and figures["num_recomputed_tokens"] > 0
