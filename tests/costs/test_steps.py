"""Steps: how many there are, and that cutting work into steps loses none of it."""

from __future__ import annotations

import pytest

from minillm.costs import steps
from minillm.errors import ConfigError


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


def test_chunks_of_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        steps.chunk_steps(3, 0)
