"""Rounds tell what was guessed: they add up to the text, agree with the engine's records, and leave no trace."""

from __future__ import annotations

from dataclasses import replace

import pytest

from minillm.config import EngineConfig
from minillm.course.lessons.rounds import Round, rounds
from minillm.engine.engine import Engine
from minillm.errors import ConfigError
from minillm.generate import generate
from minillm.sampling import SamplingParams
from minillm.speculative.draft import DraftModelProposer
from minillm.speculative.ngram import NgramProposer
from tests.engine.test_fuzz import tiny_model
from tests.speculative.test_engine import draft_model

PROMPT = [5, 6, 7, 5, 6]
CONFIG = EngineConfig(num_blocks=60, num_speculative_tokens=3)


@pytest.mark.parametrize("temperature", [0, 1])
def test_rounds_add_up_to_the_text(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=30, ignore_eos=True)
    engine = Engine(tiny_model(), CONFIG, NgramProposer(min_match=1))
    told = list(rounds(engine, PROMPT, params))
    assert [token for one in told for token in one.said] == list(generate(tiny_model(), PROMPT, params))
    records = [record.requests[0] for record in engine.trace]
    assert [len(one.guesses) for one in told] == [part.num_drafts for part in records]
    assert [one.num_accepted for one in told] == [part.num_accepted for part in records]
    assert isinstance(engine.proposer, NgramProposer)


def test_guesses_are_the_proposers() -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    engine = Engine(tiny_model(), CONFIG, DraftModelProposer(draft_model(), CONFIG))
    text = list(PROMPT)
    for one in rounds(engine, PROMPT, params):
        greedy = SamplingParams(temperature=0, max_tokens=max(1, len(one.guesses)), ignore_eos=True)
        assert not one.guesses or one.guesses == list(generate(draft_model(), text, greedy))
        text += one.said


def test_accepted_guesses_are_counted() -> None:
    assert [Round([1, 2], said, 0, 0).num_accepted for said in ([1, 2, 3], [1, 3], [3], [1])] == [2, 1, 0, 1]


def test_whoever_stops_listening_leaves_no_request_behind() -> None:
    engine = Engine(tiny_model(), CONFIG, NgramProposer(min_match=1))
    told = rounds(engine, PROMPT, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    next(told)
    del told
    assert not engine.has_unfinished and engine.pool.num_free == engine.pool.num_usable
    assert isinstance(engine.proposer, NgramProposer) and not engine.proposer._indices


def test_an_engine_without_a_guesser_or_without_records_or_with_other_requests_is_refused() -> None:
    silent = Engine(tiny_model(), replace(CONFIG, trace_bytes=0), NgramProposer())
    busy = Engine(tiny_model(), CONFIG, NgramProposer())
    busy.add(PROMPT)
    for engine in (Engine(tiny_model(), CONFIG), silent, busy):
        with pytest.raises(ConfigError, match="an engine with a proposer and a trace"):
            next(rounds(engine, PROMPT, SamplingParams()))
