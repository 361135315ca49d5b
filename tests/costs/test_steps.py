"""Steps: how many there are, and that cutting work into steps loses none of it."""

from __future__ import annotations

import random

import pytest

from minillm.costs import steps
from minillm.errors import ConfigError


def test_m_tokens_take_one_prefill_and_m_minus_1_decodes() -> None:
    request = steps.request_steps(prompt=10, new_tokens=4)
    assert request == [[(10, 10)], [(1, 11)], [(1, 12)], [(1, 13)]]
    assert len(request) - 1 == 3, "the mutant counts a decode for every token"


def test_without_a_cache_every_token_is_a_prefill() -> None:
    assert steps.recompute_steps(prompt=10, new_tokens=3) == [[(10, 10)], [(11, 11)], [(12, 12)]]


@pytest.mark.parametrize("tokens, chunk", [(1, 1), (7, 3), (8, 4), (5, 100), (64, 1)])
def test_chunks_are_the_prompt(tokens: int, chunk: int) -> None:
    chunks = [sequence for step in steps.chunk_steps(tokens, chunk) for sequence in step]
    assert len(chunks) == -(-tokens // chunk) and all(q_len <= chunk for q_len, _ in chunks)
    ends = 0
    for q_len, kv_len in chunks:
        ends += q_len
        assert kv_len == ends
    assert ends == tokens


def test_batches_and_verifications() -> None:
    assert steps.prefill_step(5, batch=2) == [(5, 5), (5, 5)]
    assert steps.decode_step(9, batch=3) == [(1, 9)] * 3
    assert steps.verify_step(9, drafts=4) == [(5, 9)]
    assert steps.num_tokens(steps.verify_step(9, drafts=4, batch=2)) == 10


@pytest.mark.parametrize("step", [[(0, 3)], [(4, 3)], [(1, 1), (-1, 2)]])
def test_impossible_steps_are_refused(step: steps.Step) -> None:
    with pytest.raises(ConfigError, match="q_len <= kv_len"):
        steps.num_tokens(step)


@pytest.mark.parametrize("function", [steps.chunk_steps, lambda n, k: steps.static_batch_steps([n], k)])
def test_sizes_below_one_are_refused(function: object) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        function(3, 0)  # type: ignore[operator]


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
