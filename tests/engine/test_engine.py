"""The engine with a real (tiny, random) model: values, sharing, and what callers rely on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from minillm.config import EngineConfig
from minillm.engine.engine import Engine, TokenEvent
from minillm.errors import RequestError
from minillm.generate import generate, prefill
from minillm.model.decoder import Decoder
from minillm.outputs import Logprob
from minillm.sampling import SamplingParams
from tests.families import FAMILIES, random_model


def make_engine(model: Decoder | None = None, **changes: Any) -> Engine:
    return Engine(
        model or random_model(), EngineConfig(**({"block_size": 4, "num_blocks": 64, "debug": True} | changes))
    )


def random_prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 131, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(engine: Engine) -> list[TokenEvent]:
    return list(engine.run())


def tokens_of(events: list[TokenEvent], request_id: str, index: int = 0) -> list[int]:
    mine = [e for e in events if (e.request.request_id, e.request.index) == (request_id, index)]
    return [token for event in mine for token in event.token_ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_tokens_of_running_alone(family: str) -> None:
    """Windows, groups of three, norms on queries: through blocks, chunks and a shared batch."""
    model = random_model(family)
    engine = make_engine(model, max_num_batched_tokens=12)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    prompts = [random_prompt(length, seed=length) for length in (1, 7, 19, 30)]
    names = [engine.add(prompt, params) for prompt in prompts]
    events = run(engine)
    for name, prompt in zip(names, prompts, strict=True):
        assert tokens_of(events, name) == list(generate(model, prompt, params))


@pytest.mark.parametrize("length", [15, 16, 17])
def test_trap_1_a_known_prompt_costs_one_token_and_gives_the_same_logits(length: int) -> None:
    """All of the candidates' log-probabilities, hit against miss and against one-shot prefill."""
    engine = make_engine()
    prompt = random_prompt(length)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
    for _ in range(2):
        engine.add(prompt, params)
        (event,) = run(engine)
        scores = prefill(engine.model, prompt)[0].log_softmax(-1)
        for token, candidate in event.request.logprobs[0].items():
            assert candidate.logprob == pytest.approx(float(scores[token]), abs=1e-5)
    assert event.request.num_cached == min(length // 4 * 4, length - 1)
    assert engine.trace[-1].num_tokens == length - event.request.num_cached


def test_prefill_work_falls_with_the_share_that_hits() -> None:
    engine = make_engine(num_blocks=200)
    base = random_prompt(64)
    engine.add(base, SamplingParams(max_tokens=1))
    run(engine)
    for share in (0, 16, 32, 48, 64):
        engine.add(base[:share] + random_prompt(64 - share, seed=share + 1), SamplingParams(max_tokens=1))
        run(engine)
    assert [record.num_tokens for record in engine.trace] == [64, 64, 48, 32, 16, 1]


def test_room_is_the_largest_max_tokens_that_is_served_to_its_end() -> None:
    """The last token is handed out and never computed: it needs no position and no slot."""
    for num_blocks, most in ((6, 5 * 4), (200, random_model().config.max_position_embeddings)):
        engine = make_engine(num_blocks=num_blocks)
        for length in (1, 7, most - 1, most):
            room = engine.room(length)
            assert room == most + 1 - length
            engine.add(random_prompt(length), SamplingParams(temperature=0, max_tokens=room, ignore_eos=True))
            assert sum(len(event.token_ids) for event in run(engine)) == room
            with pytest.raises(RequestError, match="at most"):
                engine.check(random_prompt(length), SamplingParams(max_tokens=room + 1))
        assert engine.room(most + 1) == 0


def test_salted_requests_do_not_share() -> None:
    engine = make_engine()
    prompt = random_prompt(16)
    for salt in (None, "tenant", "tenant", None):
        engine.add(prompt, SamplingParams(max_tokens=1), cache_salt=salt)
        run(engine)
    assert [record.num_tokens for record in engine.trace] == [16, 16, 1, 1]


def test_two_engines_in_one_process() -> None:
    """Interleaved step by step, of different shapes: as if each were alone."""
    models = random_model("qwen3", seed=0), random_model("mistral", seed=1)
    engines = make_engine(models[0]), make_engine(models[1], block_size=3)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    prompt = random_prompt(11)
    for engine in engines:
        engine.add(prompt, params)
    events: list[list[TokenEvent]] = [[], []]
    while any(engine.has_unfinished for engine in engines):
        for engine, mine in zip(engines, events, strict=True):
            mine += engine.step()
    for model, mine in zip(models, events, strict=True):
        assert tokens_of(mine, "#0") == list(generate(model, prompt, params))


def test_completions_draw_from_their_own_streams() -> None:
    engine = make_engine()
    params = SamplingParams(n=4, seed=3, max_tokens=12, ignore_eos=True)
    prompt = random_prompt(9)
    engine.add(prompt, params)
    events = run(engine)
    drawn = [tokens_of(events, "#0", index) for index in range(4)]
    assert drawn == [list(generate(engine.model, prompt, params, sample_index=index)) for index in range(4)]
    assert len({tuple(tokens) for tokens in drawn}) == 4


def test_requests_without_a_seed_differ_and_repeat() -> None:
    """Not even a refused request before them shifts what they draw."""

    def draw(refused: int) -> list[list[int]]:
        engine = make_engine(seed=5)
        for _ in range(refused):
            with pytest.raises(RequestError):
                engine.add([], SamplingParams())
        for _ in range(3):
            engine.add(random_prompt(5), SamplingParams(max_tokens=10, ignore_eos=True))
        events = run(engine)
        return [tokens_of(events, f"#{i}") for i in range(3)]

    first = draw(refused=0)
    assert first == draw(refused=2) and len({tuple(tokens) for tokens in first}) == 3


def test_repetition_penalty_sees_prompt_and_output() -> None:
    engine = make_engine()
    params = SamplingParams(temperature=0, repetition_penalty=5.0, max_tokens=10, ignore_eos=True)
    prompt = random_prompt(6)
    engine.add(prompt, params)
    engine.add(prompt, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
    events = run(engine)
    assert tokens_of(events, "#0") == list(generate(engine.model, prompt, params)) != tokens_of(events, "#1")


def test_logprobs_are_those_of_the_raw_logits() -> None:
    """Under a temperature, a cut and a penalty, what is reported is still the model's own distribution."""
    engine = make_engine()
    prompt = random_prompt(6)
    params = SamplingParams(temperature=3.0, top_k=60, repetition_penalty=2.0, seed=1, max_tokens=1, logprobs=3)
    engine.add(prompt, params)
    (event,) = run(engine)
    scores = prefill(engine.model, prompt)[0].log_softmax(-1)
    order = scores.argsort(descending=True).tolist()
    reported, token = event.request.logprobs[0], event.token_ids[0]
    assert set(reported) == {token, *order[:3]}
    for candidate, logprob in reported.items():
        assert logprob == Logprob(pytest.approx(float(scores[candidate]), abs=1e-5), order.index(candidate) + 1)


def test_reasons_and_times() -> None:
    engine = make_engine()
    endless = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    greedy = list(generate(engine.model, random_prompt(5), endless))
    stop = replace(endless, stop_token_ids=[greedy[2]])
    added = time.perf_counter()
    engine.add(random_prompt(5), endless)
    engine.add(random_prompt(5), stop)
    events = run(engine)
    assert [e.finish_reason for e in events if e.request.request_id == "#0"] == [None] * 5 + ["length"]
    stopped = [e for e in events if e.request.request_id == "#1"][-1]
    where = greedy.index(greedy[2])
    assert (stopped.finish_reason, stopped.request.stop_reason) == ("stop", greedy[2])
    assert tokens_of(events, "#1") == greedy[: where + 1]
    times = [event.time for event in events]
    assert times == sorted(times)
    assert all(added <= e.request.first_scheduled_time <= e.time for e in events)


def test_the_models_end_token_ends_a_completion_without_a_stop_reason() -> None:
    model = random_model()
    token = next(generate(model, random_prompt(5), SamplingParams(temperature=0)))
    engine = make_engine(random_model(eos_token_id=[130, token]))
    engine.add(random_prompt(5), SamplingParams(temperature=0))
    (event,) = run(engine)
    assert (event.token_ids, event.finish_reason, event.request.stop_reason) == ([token], "stop", None)


READS = ["item", "tolist", "numpy", "cpu", "__int__", "__float__", "__bool__", "__index__", "nonzero"]


@contextmanager
def counted_reads() -> Iterator[Counter[str]]:
    """Count every way in which Python makes the host wait for a value on the device.

    On a CPU nothing waits, and `tolist` of a CPU tensor is no operator. So the methods themselves are counted.
    """
    counts: Counter[str] = Counter()

    def counting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return method(self, *args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
        yield counts


def busy_engine() -> Engine:
    """Greedy and sampled requests, cut and penalised ones, with many log-probabilities, of prompts too."""
    engine = make_engine(max_num_batched_tokens=24)
    for seed in range(4):
        engine.add(random_prompt(9, seed), SamplingParams(temperature=seed / 2, top_p=0.9, max_tokens=4, logprobs=20))
    engine.add(random_prompt(9, 5), SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=20))
    engine.add(random_prompt(9, 6), SamplingParams(repetition_penalty=2, presence_penalty=1, max_tokens=4, n=2))
    return engine


def test_trap_32_a_step_waits_for_the_device_once() -> None:
    """Tokens and log-probabilities come to the host in one transfer, at the end of the step."""
    engine = busy_engine()
    while engine.has_unfinished:
        with counted_reads() as reads:
            engine.step()
        assert reads == {"tolist": 1}


@pytest.mark.parametrize("read", [lambda x: x.item(), float, int, bool, lambda x: x.tolist(), lambda x: x.cpu()])
def test_the_counter_sees_a_step_that_reads_more(read: Callable[[torch.Tensor], Any]) -> None:
    engine = busy_engine()
    process = engine.sampler.process

    def reading(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
        read(logits[0, 0])
        return process(logits, params)

    engine.sampler.process = reading
    with counted_reads() as reads:
        engine.step()
    assert reads.total() == 2


def test_bf16_stays_near_float32() -> None:
    """Tokens may differ in bf16 between batch shapes, on any engine; the distribution may not go far."""
    prompt = random_prompt(20)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
    reported = []
    for dtype in (torch.float32, torch.bfloat16):
        engine = make_engine(random_model(dtype=dtype), max_num_batched_tokens=7)
        engine.add(prompt, params)
        (event,) = run(engine)
        reported.append(event.request.logprobs[0])
    common = reported[0].keys() & reported[1].keys()
    assert len(common) > 10
    assert max(abs(reported[0][t].logprob - reported[1][t].logprob) for t in common) < 0.25
