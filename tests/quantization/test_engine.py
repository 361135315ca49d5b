"""Serving from a quantised cache: whoever shares the batch, the tokens are those of the format's definition, alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch

from minillm.config import POLICIES
from minillm.engine.engine import Engine
from minillm.quantization.cache import QuantizedCache
from minillm.quantization.formats import FORMATS
from minillm.sampling import SamplingParams
from tests.cache.definition import DefinitionCache, generate_in
from tests.engine import test_fuzz
from tests.engine.test_fuzz import tiny_model
from tests.engine.workloads import Completions, Workload, compare, play, random_workload
from tests.speculative.test_engine import fuzz, garbage, half_right, ngram, with_a_model

NUM_SEEDS = 6


@cache
def stream(prompt: tuple[int, ...], params: SamplingParams, index: int, kv_format: str) -> list[int]:
    """What a completion gets, by definition, if nothing ends it."""
    return generate_in(DefinitionCache(FORMATS[kv_format]), tiny_model(), prompt, params, index)


def alone_all(workload: Workload) -> Completions:
    return test_fuzz.alone_all(workload, partial(stream, kv_format=workload.config.kv_format))


def in_format(workload: Workload, kv_format: str) -> Workload:
    return replace(workload, config=replace(workload.config, kv_format=kv_format))


def check(workload: Workload) -> Counter[str]:
    engine = Engine(tiny_model(), workload.config)
    compare(play(engine, workload), alone_all(workload), workload)
    seen = Counter(preempted=sum(len(record.preempted) for record in engine.trace))
    seen["copies"] = sum(record.num_copies for record in engine.trace)
    admitted = [part for record in engine.trace for part in record.requests if part.request_id in record.admitted]
    seen["hits"] = sum(part.num_computed > 0 for part in admitted)
    return seen


@pytest.mark.parametrize("kv_format", FORMATS)
def test_tokens_are_those_of_the_definition(kv_format: str) -> None:
    seen: Counter[str] = Counter()
    for seed in range(NUM_SEEDS):
        for policy in POLICIES:
            workload = in_format(random_workload(seed, policy), kv_format)
            try:
                seen += check(workload)
            except Exception as error:
                raise AssertionError(f"seed {seed}, policy {policy}: {error}\n{workload}") from error
    assert min(seen[what] for what in ("preempted", "copies", "hits")) > 5, seen


@pytest.mark.parametrize("make", [garbage, half_right, ngram])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_speculation_rolls_back(kv_format: str, make: Any) -> None:
    def serve(workload: Workload, proposer: Any) -> Engine:
        return with_a_model(in_format(workload, kv_format), proposer)

    fuzz(serve, make, lambda workload: alone_all(in_format(workload, kv_format)), num_seeds=4)


def test_formats_share_no_blocks() -> None:
    """The format is part of a prefix's name, as the model is: the same tokens, other KV."""
    configs = (replace(random_workload(0, "mixed").config, kv_format=name) for name in ("auto", *FORMATS))
    engines = [Engine(tiny_model(), config) for config in configs]
    assert len({engine.pool.open([1, 2, 3], [])[0].prefix for engine in engines}) == 1 + len(FORMATS)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_a_hit_costs_one_token(kv_format: str) -> None:
    """Every token is stored by itself, so a known prompt goes on behind any of them: only its last is computed."""
    config = replace(random_workload(0, "mixed").config, kv_format=kv_format, block_size=4, num_blocks=20)
    engine = Engine(tiny_model(), replace(config, enable_prefix_caching=True, max_num_batched_tokens=64))
    for _ in range(2):
        engine.add(list(range(12)), SamplingParams(max_tokens=1))
        events = []
        while engine.has_unfinished:
            events += engine.step()
    assert events[-1].request.num_cached == 11


# Wrong versions


def _copies_codes_only(self: QuantizedCache, copies: list[tuple[int, int]]) -> None:
    for source, target in copies:
        for tensor in self.tensors:
            if tensor.dtype == torch.uint8:
                tensor[:, target] = tensor[:, source]


MUTANTS: dict[str, tuple[str, Any]] = {
    "trap 48: ranges are not copied": ("int8", _copies_codes_only),
    "trap 48: ranges are not copied, in int4": ("int4", _copies_codes_only),
    "trap 48: nothing is copied": ("fp8", lambda self, copies: None),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_fuzz_kills(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kv_format, wrong = MUTANTS[mutant]
    monkeypatch.setattr(QuantizedCache, "copy", wrong)

    def serve(workload: Workload, proposer: Any) -> Engine:
        return with_a_model(in_format(workload, kv_format), proposer)

    with pytest.raises(AssertionError):  # rejected guesses first, then everything else
        fuzz(serve, garbage, lambda workload: alone_all(in_format(workload, kv_format)), num_seeds=8)
        for seed in range(30):
            for policy in POLICIES:
                check(in_format(random_workload(seed, policy), kv_format))
