"""Ctrl-C, or any other error, at any line: afterwards nothing of the call is left, and the next call is right.

By hand, many more: `pytest tests/engine/test_interrupts.py --interrupts 10000`.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import minillm
from minillm.config import EngineConfig
from minillm.engine.engine import Engine
from minillm.errors import RequestError
from minillm.llm import LLM
from minillm.sampling import SamplingParams
from minillm.speculative import NgramProposer
from minillm.text import OutputProcessor
from tests.engine.test_fuzz import tiny_model
from tests.engine.workloads import EOS, VOCAB

HOME = str(Path(minillm.__file__).parent)
RECOVERY = {"_start_over", "drop", "guarded"}  # what runs only after an error, or around everything
PROMPTS = [[1, 2, 4, 5, 6, 7, 8, 9], [1, 2, 4, 5, 6, 7, 8, 9, 10], [1, 2, 4, 5, 11], [4, 4, 4, 4, 4, 4]]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=6, ignore_eos=True),
    SamplingParams(seed=1, n=2, max_tokens=5, logprobs=2, ignore_eos=True),
    SamplingParams(seed=2, max_tokens=7, stop_token_ids=[EOS], prompt_logprobs=1),
    SamplingParams(temperature=0, max_tokens=6, presence_penalty=1.0),
]


def make_llm() -> Any:
    """Preemption, prefix hits, speculation and n = 2, without a tokenizer."""
    llm = LLM.__new__(LLM)
    config = EngineConfig(block_size=4, num_blocks=9, max_num_batched_tokens=12, debug=True)
    llm.tokenizer, llm.engine = None, Engine(tiny_model(), config, NgramProposer(min_match=1))
    llm.processor = OutputProcessor(llm.engine, None)
    return llm


def serve(llm: Any) -> list[list[list[int]]]:
    return [[c.token_ids for c in output.outputs] for output in llm.generate(PROMPTS, PARAMS, progress=False)]


@cache
def right() -> list[list[list[int]]]:
    return serve(make_llm())


def interrupt(llm: Any, call: Callable[[Any], object], line: int) -> bool:
    """Raise KeyboardInterrupt at line number `line` that runs in the package; False if there were fewer."""
    left = line

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(HOME) or recovering(frame):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call(llm)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def recovering(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name in RECOVERY - {"guarded"}:
            return True
        frame = frame.f_back
    return False


def check_untouched(llm: Any) -> None:
    engine = llm.engine
    engine.scheduler.check()
    assert not engine.requests and not llm.processor._live and not engine.has_unfinished
    assert engine.pool.num_free == engine.pool.num_usable
    assert serve(llm) == right()


@pytest.fixture
def num_interrupts(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--interrupts"))


def test_the_workload_has_what_breaks() -> None:
    llm = make_llm()
    serve(llm)
    records = list(llm.engine.trace)
    assert any(record.preempted for record in records) and any(part.num_drafts for r in records for part in r.requests)
    serve(llm)
    assert any(part.num_computed for record in llm.engine.trace for part in record.requests if part.first_block == 0)


def test_an_interrupt_at_any_line_leaves_the_engine_as_it_was(num_interrupts: int) -> None:
    """`guarded` itself is no recovery before its handler: it is interrupted, too."""
    llm, lines = make_llm(), 4000
    rng = random.Random(0)
    hits = 0
    for _ in range(num_interrupts):
        line = rng.randint(1, lines)
        hits += interrupt(llm, serve, line)
        check_untouched(llm)
    assert hits > num_interrupts / 2


def test_a_stream_of_another_caller_goes_on_after_an_interrupt() -> None:
    """Its tokens are those of being alone, whatever line of the other's call was interrupted."""
    rng = random.Random(1)
    alone = serve(make_llm())[0]
    for _ in range(10):
        llm = make_llm()
        stream = llm.stream(PROMPTS[0], PARAMS[0])
        result = next(stream)
        interrupt(llm, lambda llm: llm.generate(PROMPTS[1:], PARAMS[1:], progress=False), rng.randint(1, 3000))
        for later in stream:
            result = later
        assert [c.token_ids for c in result.outputs] == alone and result.finished
        check_untouched(llm)


def test_what_fails_while_requests_are_queued_leaves_nothing() -> None:
    llm = make_llm()
    for prompts in ([[1, 2], []], [[1, 2], None], [[1], [VOCAB]], [[1], [1.5]], [[1], "text"]):
        with pytest.raises(RequestError):
            llm.generate(prompts, progress=False)
    check_untouched(llm)


def test_one_request_without_a_distribution_ends_alone() -> None:
    """NaN logits for one request: it ends with an error that says so, its neighbours get their tokens."""
    llm = make_llm()
    process = llm.engine.sampler.process

    def broken(logits: Any, params: list[SamplingParams]) -> Any:
        logits = logits.clone()
        for row, one in enumerate(params):
            if one is PARAMS[1]:
                logits[row] = float("nan")
        return process(logits, params)

    llm.engine.sampler.process = broken
    outputs = llm.generate(PROMPTS, PARAMS, progress=False)
    assert [c.finish_reason for c in outputs[1].outputs] == ["error", "error"]
    assert all("distribution" in c.error and not c.token_ids for c in outputs[1].outputs)
    served = [[c.token_ids for c in output.outputs] for output in outputs]
    assert served[0] == right()[0] and served[2:] == right()[2:]
    llm.engine.sampler.process = process
    check_untouched(llm)
