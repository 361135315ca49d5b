"""Whole requests and batches as steps: how many there are, and what the cache saves."""

from __future__ import annotations

import random

import pytest

from minillm.costs import formulas
from minillm.course.lessons import schedules as steps
from minillm.course.lessons.schedules import recompute_steps, request_steps
from minillm.errors import ConfigError
from minillm.shapes import named_shape

LLAMA, SMOL = named_shape("llama-3.1-8b"), named_shape("smollm2-135m")


def test_m_tokens_take_one_prefill_and_m_minus_1_decodes() -> None:
    request = steps.request_steps(prompt=10, new_tokens=4)
    assert request == [[(10, 10)], [(1, 11)], [(1, 12)], [(1, 13)]]
    assert len(request) - 1 == 3, "the mutant counts a decode for every token"


def test_without_a_cache_every_token_is_a_prefill() -> None:
    assert steps.recompute_steps(prompt=10, new_tokens=3) == [[(10, 10)], [(11, 11)], [(12, 12)]]


def test_a_whole_request_in_one_line() -> None:
    """M tokens behind N: one prefill, M - 1 decodes; attention sees (M - 1) N + M (M - 1) / 2 keys in all of these."""
    n, m = 300, 40
    steps = request_steps(n, m)
    decodes = [formulas.step_flops(LLAMA, step) for step in steps[1:]]
    assert len(decodes) == m - 1
    per_key = 4 * LLAMA.num_layers * LLAMA.num_heads * LLAMA.head_dim
    assert sum(f.attention for f in decodes) == per_key * ((m - 1) * n + m * (m - 1) // 2)
    linear = 2 * formulas.matmul_parameters(LLAMA)
    assert all(f.total - f.attention == linear for f in decodes)


def test_recomputing_costs_what_the_cache_saves() -> None:
    """Without a cache the layers see n + (n + 1) + … tokens instead of n + m - 1."""
    n, m = 30, 20
    cached, recomputed = (
        sum(formulas.step_flops(SMOL, step).mlp for step in steps)
        for steps in (request_steps(n, m), recompute_steps(n, m))
    )
    assert recomputed * (n + m - 1) == cached * (m * n + m * (m - 1) // 2)


@pytest.mark.parametrize("function", [steps.static_batch_steps, steps.continuous_batch_steps])
def test_less_than_one_slot_is_refused(function: object) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        function([3], 0)  # type: ignore[operator]


def test_known_schedules() -> None:
    lengths = [1, 9, 1, 1, 1, 9]
    assert steps.static_batch_steps(lengths, 2) == 9 + 1 + 9
    assert steps.continuous_batch_steps(lengths, 2) == 9 + 4  # the second 9 starts when four short ones are through


def test_continuous_batching_is_between_its_bounds() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for _ in range(200):
        lengths = [rng.randint(1, 50) for _ in range(rng.randint(1, 30))]
        slots = rng.randint(1, 8)
        continuous = steps.continuous_batch_steps(lengths, slots)
        assert max(max(lengths), -(-sum(lengths) // slots)) <= continuous, f"{seed=}"
        assert continuous <= steps.static_batch_steps(lengths, slots) <= sum(lengths), f"{seed=}"
    assert steps.continuous_batch_steps([3, 4, 5], 1) == 12 == steps.static_batch_steps([3, 4, 5], 1)
