"""The results of a served load, in vLLM's names, definitions and JSON keys (`vllm bench serve`).

* TTFT: first token - start. TPOT: (last token - first) / (n - 1) of one request, none if n is 1. ITL: the gaps between
  tokens, of all requests in one pool. E2EL: last token - start. Lists in seconds, summaries in milliseconds.
* AIPerf calls our TPOT "inter token latency" and our ITL "inter chunk latency"; LLMPerf's "inter token latency" is
  E2EL / n, which includes the TTFT and cannot be compared with anything here. Where one step brings several tokens,
  the gaps between them are zero, so the ITL is smaller than what a user sees.
* A statistic without samples is 0, as in vLLM. Failed requests are counted, and are left out of everything else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minillm.errors import ConfigError
from minillm.measure.bench import quartiles
from minillm.measure.bench_serve import Served, ServeRun, StepCost

GOODPUT_NAMES = ("ttft", "tpot", "e2el")


def summarize(
    run: ServeRun,
    *,
    goodput: Mapping[str, float] | None = None,
    percentiles: Sequence[float] = (99,),
    detailed: bool = False,
) -> dict[str, Any]:
    """The result of `vllm bench serve` for this run.

    goodput: limits in ms by "ttft", "tpot", "e2el"; `request_goodput` counts the requests per second that keep all of
    them (a single token has TPOT 0 here). detailed: add each request's lengths, times and error, failed ones with
    zeros, in the order of the requests. Raises `ConfigError` for a percentile outside 0 to 100.
    """
    if not all(0 <= percentile <= 100 for percentile in percentiles):
        raise ConfigError(f"percentiles={list(percentiles)}: choose numbers from 0 to 100.")
    done = [served for served in run.served if served.completed]
    total_input = sum(len(served.request.prompt) for served in done)
    total_output = sum(len(served.token_times) for served in done)
    good = None if not goodput else sum(keeps(served, goodput) for served in done) / run.duration
    totals = {
        "duration": run.duration,
        "completed": len(done),
        "failed": len(run.served) - len(done),
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "request_throughput": len(done) / run.duration,
        "request_goodput": good,
        "output_throughput": total_output / run.duration,
        "total_token_throughput": (total_input + total_output) / run.duration,
        "max_output_tokens_per_s": peak_tokens_per_second(done),
        "max_concurrent_requests": peak_concurrency(done),
    }
    return totals | _latencies(done, percentiles) | (_details(run.served) if detailed else {})


def _latencies(done: Sequence[Served], percentiles: Sequence[float]) -> dict[str, float]:
    """Mean, median, standard deviation and percentiles of every latency, in ms."""
    samples: dict[str, list[Any]] = {
        "ttft": [served.metrics.ttft for served in done],
        "tpot": [served.metrics.tpot for served in done if served.metrics.tpot is not None],
        "itl": [gap for served in done for gap in served.metrics.itl],
        "e2el": [served.metrics.e2el for served in done],
        "client_queue_time": [served.metrics.arrival_time - served.due for served in done],
        "e2el_including_client_queue": [served.token_times[-1] - served.due for served in done],
    }
    return {key: value for name, x in samples.items() for key, value in _statistics(name, x, percentiles).items()}


def _statistics(name: str, seconds: list[Any], percentiles: Sequence[float]) -> dict[str, float]:
    values = 1e3 * np.array(seconds or [0.0], dtype=float)
    parts = {"mean": values.mean(), "median": np.median(values), "std": values.std()}
    parts |= {f"p{p:g}": np.percentile(values, p) for p in percentiles}
    return {f"{part}_{name}_ms": float(value) for part, value in parts.items()}


def keeps(served: Served, goodput: Mapping[str, float]) -> bool:
    """Whether a completed request keeps all limits, in ms."""
    return all(1e3 * (getattr(served.metrics, name) or 0.0) <= limit for name, limit in goodput.items())


def peak_tokens_per_second(done: Sequence[Served]) -> float:
    """Most output tokens in one second; seconds are counted from the first start."""
    first = min((served.metrics.arrival_time for served in done), default=0.0)
    buckets = Counter(int(time - first) for served in done for time in served.token_times)
    return float(max(buckets.values(), default=0))


def peak_concurrency(done: Sequence[Served]) -> int:
    """Most requests at one moment. If one starts at the moment when another ends, they do not overlap."""
    starts = [(served.metrics.arrival_time, 1) for served in done]
    ends = [(served.token_times[-1], -1) for served in done]
    changes = [change for _, change in sorted(starts + ends)]  # at the same moment, -1 sorts first
    return int(max(np.cumsum(changes), default=0))


def _details(served: Sequence[Served]) -> dict[str, list[Any]]:
    return {
        "input_lens": [len(s.request.prompt) for s in served],
        "output_lens": [len(s.token_times) for s in served],
        "ttfts": [s.metrics.ttft or 0.0 for s in served],
        "itls": [s.metrics.itl for s in served],
        "latencies": [s.metrics.e2el or 0.0 for s in served],
        "start_times": [s.metrics.arrival_time for s in served],
        "queue_times": [s.metrics.arrival_time - s.due for s in served],
        "errors": [s.error for s in served],
    }


def engine_summary(run: ServeRun) -> dict[str, Any]:
    """What only the engine knows, under keys of our own: cache hits, the cost of preemption, time outside the model."""
    done = [served for served in run.served if served.completed]
    prompts = sum(len(served.request.prompt) for served in done)
    return {
        "prefix_hit_rate": sum(served.num_cached for served in done) / max(1, prompts),
        "num_preemptions": sum(served.num_preemptions for served in done),
        "num_recomputed_tokens": sum(step.num_recomputed for step in run.steps),
        "num_steps": len(run.steps),
        "overhead_share": 1 - sum(s.run for s in run.steps) / max(1e-9, sum(s.wall for s in run.steps)),
        "decode_overhead": decode_overhead(run.steps),
    }


def decode_overhead(steps: Sequence[StepCost]) -> dict[str, float] | None:
    """Where the time of a full decode step goes: shares of the wall time, medians over the largest pure decode batch.

    None if no step was pure decode.
    """
    pure = [step for step in steps if step.num_decodes == step.num_sequences]
    batch = max((step.num_sequences for step in pure), default=0)
    full = [step for step in pure if step.num_sequences == batch]
    if not full:
        return None
    parts = {
        name: quartiles([getattr(s, name) / s.wall for s in full]).median for name in ("schedule", "pack", "commit")
    }
    overhead = quartiles([step.overhead for step in full]).median
    wall = quartiles([step.wall for step in full]).median
    return {"batch": batch, "steps": len(full), "step_ms": 1e3 * wall, **parts, "overhead": overhead}


def parse_goodput(limits: Sequence[str]) -> dict[str, float]:
    """`["ttft:500", "tpot:30"]` as {"ttft": 500.0, "tpot": 30.0}, in ms. Raises `ConfigError` for anything else."""
    return dict(map(_limit, limits))


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition(":")
    try:
        milliseconds = float(value)
    except ValueError:
        milliseconds = -1.0
    if name not in GOODPUT_NAMES or not milliseconds >= 0:
        raise ConfigError(
            f"Goodput limit {text!r}: write name:milliseconds, such as ttft:500. Names are {', '.join(GOODPUT_NAMES)}."
        )
    return name, milliseconds
