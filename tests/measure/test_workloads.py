"""Workloads ask for what they say, the same every time; arrivals are the process that they say."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from statistics import mean, pstdev

import pytest

from minillm.errors import ConfigError
from minillm.measure.workloads import (
    SHAREGPT_LIMITS,
    SHAREGPT_MEANS,
    SampleRequest,
    Workload,
    arrival_times,
    length_range,
)

VOCAB = 49152


def test_nano_vllm_asks_for_the_tokens_that_everybody_quotes() -> None:
    """133,966 output tokens stand in the README of nano-vllm; the mutant draws each output length with its prompt."""
    requests = Workload("nano-vllm").requests(VOCAB)
    assert len(requests) == 256
    assert sum(request.max_tokens for request in requests) == 133_966
    assert all(100 <= len(r.prompt) <= 1024 and 100 <= r.max_tokens <= 1024 for r in requests)
    assert {r.temperature for r in requests} == {0.6}
    rng = random.Random(0)
    mutant = 0
    for _ in range(256):
        for _ in range(rng.randint(100, 1024)):
            rng.randint(0, 10_000)
        mutant += rng.randint(100, 1024)
    assert mutant != 133_966


def test_nano_vllm_keeps_its_lengths_in_a_small_vocabulary() -> None:
    large, small = (Workload("nano-vllm", num_prompts=8).requests(vocab) for vocab in (VOCAB, 131))
    assert [(len(r.prompt), r.max_tokens) for r in small] == [(len(r.prompt), r.max_tokens) for r in large]
    assert all(0 <= token < 131 for r in small for token in r.prompt)


def test_scale_shrinks_lengths_and_keeps_beginnings() -> None:
    full, small = (Workload("nano-vllm", num_prompts=5, scale=scale).requests(VOCAB) for scale in (1, 0.1))
    for one, other in zip(full, small, strict=True):
        assert len(other.prompt) == round(len(one.prompt) / 10) and other.max_tokens == round(one.max_tokens / 10)
        assert one.prompt[: len(other.prompt)] == other.prompt and other.temperature == 0.6
    assert SampleRequest([1, 2, 3], 4).scaled(0.01) == SampleRequest([1], 1)


@pytest.mark.parametrize("name", ["nano-vllm", "random", "shared-prefix", "sharegpt-like"])
def test_same_seed_same_requests_within_the_vocabulary(name: str) -> None:
    workload = Workload(name, num_prompts=9, input_len=20, output_len=7, prefix_len=16, num_groups=2, seed=3)
    requests = workload.requests(131)
    assert requests == workload.requests(131) and len(requests) == 9
    assert requests != Workload(name, 9, 20, 7, prefix_len=16, num_groups=2, seed=4).requests(131)
    assert all(0 <= token < 131 for request in requests for token in request.prompt)
    assert all(request.params.ignore_eos and request.params.max_tokens == request.max_tokens for request in requests)


def test_the_two_conventions_of_a_range() -> None:
    """A nominal length of 100: fixed in one tool is half as long on average in the other."""
    assert length_range(100, 0.0, "vllm") == (100, 100) and length_range(100, 0.0, "sglang") == (1, 100)
    assert length_range(100, 0.3, "vllm") == (70, 130) and length_range(100, 0.3, "sglang") == (30, 100)
    assert length_range(100, 1.0, "vllm") == (1, 200) and length_range(100, 1.0, "sglang") == (100, 100)


@pytest.mark.parametrize("convention, low, high", [("vllm", 8, 12), ("sglang", 2, 10)])
def test_random_lengths_fill_their_range(convention: str, low: int, high: int) -> None:
    ratio = 0.2
    workload = Workload("random", 500, input_len=10, output_len=10, range_ratio=ratio, convention=convention)
    requests = workload.requests(50)
    for lengths in ([len(r.prompt) for r in requests], [r.max_tokens for r in requests]):
        assert set(lengths) == set(range(low, high + 1))


def test_groups_share_their_prefix_and_nothing_else() -> None:
    workload = Workload("shared-prefix", 20, input_len=6, output_len=3, prefix_len=32, num_groups=4)
    requests = workload.requests(1000)
    prefixes = Counter(tuple(request.prompt[:32]) for request in requests)
    assert sorted(prefixes.values()) == [5, 5, 5, 5]
    assert len({tuple(request.prompt[32:]) for request in requests}) == 20
    first = [tuple(request.prompt[:32]) for request in requests[:4]]
    assert len(set(first)) < 4, "groups come in random order, not in turns"


def test_sharegpt_like_has_its_means_and_limits() -> None:
    requests = Workload("sharegpt-like", 4000).requests(100)
    low, high = SHAREGPT_LIMITS
    for lengths, wanted in zip(
        ([len(r.prompt) for r in requests], [r.max_tokens for r in requests]), SHAREGPT_MEANS, strict=True
    ):
        assert low <= min(lengths) and max(lengths) <= high
        assert 0.85 * wanted < mean(lengths) < 1.05 * wanted, "cutting at 1024 takes a little off the mean"


def check_poisson(times: list[float], rate: float) -> None:
    """Exponential gaps have the mean and the standard deviation 1 / rate; 4,000 gaps tell within 6 %."""
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert mean(gaps) == pytest.approx(1 / rate, rel=0.06)
    assert pstdev(gaps) == pytest.approx(1 / rate, rel=0.06)


@pytest.mark.parametrize("convention", ["vllm", "sglang"])
def test_arrivals_are_poisson(convention: str) -> None:
    times = arrival_times(4000, 20.0, convention=convention, seed=1)
    check_poisson(times, 20.0)
    assert times == sorted(times) == arrival_times(4000, 20.0, convention=convention, seed=1)


@pytest.mark.parametrize(
    "mutant",
    [
        lambda n: [i / 20 for i in range(n)],  # even
        lambda n: sorted(random.Random(0).choices(range(n // 200), k=n)),  # bursts on full seconds
        lambda n: arrival_times(n, 1 / 20),  # gaps instead of a rate
    ],
)
def test_what_is_not_poisson_is_noticed(mutant: Callable[[int], list[float]]) -> None:
    with pytest.raises(AssertionError):
        check_poisson(mutant(4000), 20.0)


def test_the_two_conventions_of_arrivals() -> None:
    stretched = arrival_times(50, 4.0, convention="vllm", seed=5)
    plain = arrival_times(50, 4.0, convention="sglang", seed=5)
    assert stretched[-1] == pytest.approx(50 / 4.0, abs=1e-9) and stretched[0] > 0
    assert plain[0] == 0 and plain[-1] != pytest.approx(50 / 4.0, abs=1e-3)


def test_burstiness_is_the_shape_of_the_gaps() -> None:
    """A gamma distribution of shape k has a coefficient of variation of 1 / sqrt(k)."""
    for shape in (0.25, 4.0):
        gaps = [b - a for a, b in pairwise(arrival_times(8000, 5.0, burstiness=shape, seed=2))]
        assert pstdev(gaps) / mean(gaps) == pytest.approx(shape**-0.5, rel=0.1)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert arrival_times(3, math.inf) == [0, 0, 0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "sharegpt"},
        {"convention": "tgi"},
        {"num_prompts": 0},
        {"output_len": 0},
        {"range_ratio": 1.5},
        {"scale": 0.0},
        {"scale": 2.0},
    ],
)
def test_impossible_workloads_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=str(next(iter(wrong)) if "name" not in wrong else "workload")):
        Workload(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate, burstiness", [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (1.0, math.inf), (math.nan, 1.0)])
def test_impossible_arrivals_are_refused(rate: float, burstiness: float) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        arrival_times(3, rate, burstiness=burstiness)
