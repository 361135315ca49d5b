"""The summary is vLLM's, to 1e-9 on a trace whose answer is known; people's usual mistakes give other numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import accumulate, pairwise
from statistics import mean
from typing import Any

import pytest

from minillm.errors import ConfigError
from minillm.measure import summary as module
from minillm.measure.bench_serve import Served, ServeRun, StepCost
from minillm.measure.summary import engine_summary, parse_goodput, peak_concurrency, summarize
from minillm.measure.workloads import SampleRequest
from minillm.outputs import RequestMetrics


def served(due: float, token_times: list[float], *, prompt: int = 5, start: float | None = None) -> Served:
    """A request that got all its tokens at these times."""
    metrics = RequestMetrics(due if start is None else start, [token_times], due)
    return Served(SampleRequest([0] * prompt, len(token_times)), due, metrics)


def known_run() -> ServeRun:
    """Two requests: sent at 0 and 0.5 s, four and two tokens."""
    return ServeRun([served(0.0, [1.0, 1.1, 1.3, 1.6]), served(0.5, [2.0, 2.1])], start=0.0, end=2.1)


KNOWN = {
    "duration": 2.1,
    "completed": 2,
    "failed": 0,
    "total_input_tokens": 10,
    "total_output_tokens": 6,
    "request_throughput": 2 / 2.1,
    "output_throughput": 6 / 2.1,
    "total_token_throughput": 16 / 2.1,
    "request_goodput": 1 / 2.1,
    "mean_ttft_ms": 1250,
    "median_ttft_ms": 1250,
    "std_ttft_ms": 250,
    "p99_ttft_ms": 1495,  # linear interpolation: 1000 + 0.99 * 500
    "mean_tpot_ms": 150,
    "std_tpot_ms": 50,
    "p99_tpot_ms": 199,
    "mean_itl_ms": 175,
    "median_itl_ms": 150,
    "p99_itl_ms": 297,
    "mean_e2el_ms": 1600,
    "std_e2el_ms": 0,
    "max_output_tokens_per_s": 4,  # tokens at 1.0, 1.1, 1.3, 1.6
    "max_concurrent_requests": 2,
}


def check_known_answer() -> None:
    result = summarize(known_run(), goodput={"ttft": 1200})
    assert {key: result[key] for key in KNOWN} == pytest.approx(KNOWN, abs=1e-9)


def test_the_known_trace() -> None:
    check_known_answer()
    assert summarize(known_run())["request_goodput"] is None


def _tpot_over_all_tokens(metrics: RequestMetrics) -> float:
    times = metrics.token_times[0]
    return (times[-1] - times[0]) / len(times)


def _tpot_with_ttft(metrics: RequestMetrics) -> float:
    return (metrics.token_times[0][-1] - metrics.arrival_time) / len(metrics.token_times[0])


def _itl_per_request(metrics: RequestMetrics) -> list[float]:
    times = metrics.token_times[0]
    return [mean(later - earlier for earlier, later in pairwise(times))]


def _itl_with_ttft(metrics: RequestMetrics) -> list[float]:
    times = [metrics.arrival_time, *metrics.token_times[0]]
    return [later - earlier for earlier, later in pairwise(times)]


@pytest.mark.parametrize(
    "name, mutant",
    [
        ("tpot", _tpot_over_all_tokens),
        ("tpot", _tpot_with_ttft),
        ("itl", _itl_per_request),
        ("itl", _itl_with_ttft),
        ("ttft", lambda metrics: metrics.token_times[0][0]),  # since the start of the load
        ("e2el", lambda metrics: metrics.token_times[0][-1] - metrics.token_times[0][0]),
    ],
)
def test_wrong_latencies_are_noticed(
    name: str, mutant: Callable[[RequestMetrics], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RequestMetrics, name, property(mutant))
    with pytest.raises(AssertionError):
        check_known_answer()


@pytest.mark.parametrize(
    "name, mutant",
    [
        ("keeps", lambda served, goodput: True),
        ("keeps", lambda served, goodput: served.metrics.ttft <= goodput["ttft"]),  # seconds against ms
        ("peak_tokens_per_second", lambda done: sum(len(s.token_times) for s in done) / 2.1),  # the mean
        ("peak_concurrency", lambda done: len(done) + 1),
    ],
)
def test_wrong_counts_are_noticed(name: str, mutant: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, name, mutant)
    with pytest.raises(AssertionError):
        check_known_answer()


def test_a_single_token_has_no_tpot_but_counts_in_goodput() -> None:
    run = ServeRun([served(0.0, [0.5]), served(0.0, [0.5, 0.7])], 0.0, 1.0)
    result = summarize(run, goodput={"tpot": 100, "ttft": 500})
    assert result["mean_tpot_ms"] == pytest.approx(200) and result["mean_itl_ms"] == pytest.approx(200)
    assert result["request_goodput"] == 1, "the single token keeps tpot:100, the other request does not"
    assert summarize(run, goodput={"ttft": 499})["request_goodput"] == 0


def test_failed_requests_are_counted_and_nothing_else() -> None:
    refused = Served(SampleRequest([0] * 900, 4), 0.0, RequestMetrics(0.0, [[]]), error="too long")
    good = known_run()
    result = summarize(ServeRun([refused, *good.served], 0.0, 2.1), goodput={"ttft": 1200}, detailed=True)
    assert result["failed"] == 1
    assert {key: result[key] for key in KNOWN if key != "failed"} == pytest.approx(
        {key: value for key, value in KNOWN.items() if key != "failed"}
    )
    assert result["errors"] == ["too long", "", ""]
    assert result["input_lens"] == [900, 5, 5] and result["output_lens"] == [0, 4, 2]
    assert result["ttfts"] == pytest.approx([0, 1, 1.5]) and result["latencies"] == pytest.approx([0, 1.6, 1.6])
    assert [len(gaps) for gaps in result["itls"]] == [0, 3, 1] and result["start_times"] == [0, 0, 0.5]


def test_nothing_served_is_zero_everywhere() -> None:
    refused = Served(SampleRequest([0], 4), 0.0, RequestMetrics(0.0, [[]]), error="no")
    result = summarize(ServeRun([refused], 0.0, 0.5))
    assert result["completed"] == 0 and result["mean_ttft_ms"] == 0 and result["max_concurrent_requests"] == 0
    json.dumps(result | engine_summary(ServeRun([refused], 0.0, 0.5)))


def test_a_client_queue_is_told_apart() -> None:
    """Due at 0, started at 2 because of the concurrency limit: vLLM's latencies count from the start."""
    result = summarize(ServeRun([served(0.0, [2.5, 2.6], start=2.0)], 0.0, 2.6), detailed=True)
    assert result["mean_ttft_ms"] == pytest.approx(500) and result["mean_e2el_ms"] == pytest.approx(600)
    assert result["mean_client_queue_time_ms"] == pytest.approx(2000) and result["queue_times"] == [2.0]
    assert result["mean_e2el_including_client_queue_ms"] == pytest.approx(2600)


def test_who_starts_when_another_ends_does_not_meet_it() -> None:
    assert peak_concurrency([served(0.0, [1.0]), served(1.0, [2.0]), served(0.5, [1.5])]) == 2
    assert peak_concurrency([]) == 0


def test_percentiles_have_vllms_names() -> None:
    result = summarize(known_run(), percentiles=(50, 99.9))
    assert result["p50_itl_ms"] == pytest.approx(150) and "p99.9_ttft_ms" in result and "p99_ttft_ms" not in result


def test_goodput_limits_are_read() -> None:
    assert parse_goodput(["ttft:500", "tpot:30.5"]) == {"ttft": 500, "tpot": 30.5}
    for wrong in ("itl:3", "ttft", "ttft:", "ttft:-1", "ttft:x", "ttft:nan", ":3"):
        with pytest.raises(ConfigError, match="milliseconds"):
            parse_goodput([wrong])


def step(wall: float, run: float, decodes: int, sequences: int, recomputed: int = 0) -> StepCost:
    return StepCost(wall, 0.1 * wall, 0.05 * wall, run, 0.0, sequences, decodes, sequences, recomputed)


def test_the_engine_tells_what_its_steps_cost() -> None:
    """A prefill of 10 s, and decodes of two whose overheads are 10, 20 and 60 %; the batch of one does not count."""
    steps = [
        step(10, 10, 0, 1),
        step(1, 0.9, 2, 2),
        step(1, 0.8, 2, 2, recomputed=3),
        step(1, 0.4, 2, 2),
        step(1, 0, 1, 1),
    ]
    run = ServeRun(known_run().served, 0.0, 14.0, steps)
    run.served[0].num_cached, run.served[1].num_preemptions = 4, 2
    result = engine_summary(run)
    assert result["prefix_hit_rate"] == 0.4 and result["num_preemptions"] == 2 and result["num_recomputed_tokens"] == 3
    assert result["overhead_share"] == pytest.approx(1 - 12.1 / 14)
    assert result["decode_overhead"] == pytest.approx(
        {"batch": 2, "steps": 3, "step_ms": 1000, "schedule": 0.1, "pack": 0.05, "commit": 0, "overhead": 0.2}
    )


def test_times_add_up() -> None:
    """TTFT + (n - 1) TPOT = E2EL for every request, and all its ITLs together are E2EL - TTFT."""
    rng = random.Random(0)
    for _ in range(50):
        times = list(accumulate(rng.random() for _ in range(rng.randint(2, 9))))
        metrics = served(0.0, times).metrics
        assert metrics.ttft is not None and metrics.tpot is not None and metrics.e2el is not None
        assert metrics.ttft + (len(times) - 1) * metrics.tpot == pytest.approx(metrics.e2el)
        assert sum(metrics.itl) == pytest.approx(metrics.e2el - metrics.ttft)
