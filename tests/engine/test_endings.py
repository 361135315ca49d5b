"""Ending a request from outside, when giving back its blocks fails: nothing of it stays."""

from __future__ import annotations

import pytest

from minillm.sampling import SamplingParams
from tests.engine.scripted import alone, scripted_engine


def test_an_abort_that_fails_leaves_nothing() -> None:
    """Blocks that cannot be given back are an error; the request and its completions are gone all the same."""
    engine = scripted_engine(num_blocks=20)
    engine.add([1, 2, 3], SamplingParams(temperature=0, n=2, max_tokens=8, ignore_eos=True), request_id="a")
    engine.step()
    engine.pool.release = None  # type: ignore[method-assign, assignment]
    with pytest.raises(TypeError):
        engine.abort("a")
    assert not engine.requests and not list(engine.scheduler)


def test_an_abort_takes_what_ended_in_a_step_that_failed() -> None:
    engine = scripted_engine(num_blocks=20)
    engine.add([1, 2, 3], SamplingParams(temperature=0, max_tokens=1), request_id="a")
    release, engine.pool.release = engine.pool.release, None  # type: ignore[method-assign, assignment]
    with pytest.raises(TypeError):
        engine.step()
    engine.pool.release = release  # type: ignore[method-assign]
    engine.abort("a")
    assert not engine.requests and not list(engine.scheduler)


@pytest.mark.parametrize("n", [1, 3])
def test_what_ended_in_a_step_that_failed_ends_in_the_next_one(n: int) -> None:
    """Nobody was told of its last token, so it comes again."""
    params = SamplingParams(temperature=0, n=n, max_tokens=1)
    engine = scripted_engine(num_blocks=20)
    engine.add([1, 2, 3], params, request_id="a")
    release, engine.pool.release = engine.pool.release, None  # type: ignore[method-assign, assignment]
    with pytest.raises(TypeError):
        engine.step()
    engine.pool.release = release  # type: ignore[method-assign]
    events = engine.step()
    assert [event.token_ids for event in events] == [alone((1, 2, 3), params, index) for index in range(n)]
    assert all(event.finish_reason for event in events) and not engine.requests
