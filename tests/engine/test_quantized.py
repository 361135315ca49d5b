"""Serving from a quantised cache: whoever shares the batch, the tokens are those of the format's definition, alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch

from minillm.cache.formats import FORMATS
from minillm.config import MIN_BLOCK_SIZES, POLICIES
from minillm.engine.engine import Engine
from minillm.generate import choose, extend
from minillm.sampling import SamplingParams
from tests.cache.definition import DefinitionCache
from tests.engine import test_fuzz
from tests.engine.test_fuzz import tiny_model
from tests.engine.workloads import Completions, Workload, compare, play, random_workload
from tests.speculative.test_engine import fuzz, garbage, half_right, ngram, with_a_model

NUM_SEEDS = 12


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few tokens: a sequence of twenty crosses many of their boundaries."""
    monkeypatch.delitem(MIN_BLOCK_SIZES, "int4")


@cache
def stream(prompt: tuple[int, ...], params: SamplingParams, index: int, kv_format: str, block_size: int) -> list[int]:
    """What a completion gets, by definition, if nothing ends it."""
    generator = None if params.greedy else params.generator(index, default_seed=0, device=torch.device("cpu"))
    kv, tokens, pending = DefinitionCache(FORMATS[kv_format], block_size), list(prompt), list(prompt)
    for _ in range(params.max_tokens):
        logits = extend(tiny_model(), torch.tensor(pending), kv)
        pending = [choose(logits, tokens, params, generator)]
        tokens += pending
    return tokens[len(prompt) :]


def alone_all(workload: Workload) -> Completions:
    config = workload.config
    return test_fuzz.alone_all(workload, partial(stream, kv_format=config.kv_format, block_size=config.kv_block_size))


def in_format(workload: Workload, kv_format: str) -> Workload:
    return replace(workload, config=replace(workload.config, kv_format=kv_format))


def check(workload: Workload) -> Counter[str]:
    engine = Engine(tiny_model(), workload.config)
    compare(play(engine, workload), alone_all(workload), workload)
    seen = Counter(preempted=sum(len(record.preempted) for record in engine.trace))
    seen["copies"] = sum(record.num_copies for record in engine.trace)
    seen["hits"] = sum(record.num_cached_blocks > 0 for record in engine.trace)
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
