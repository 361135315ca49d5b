"""Serving from a quantised cache: whoever shares the batch, the tokens are those of the format's definition, alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch

from minillm.cache.blocks import BlockPool
from minillm.config import MIN_BLOCK_SIZES, POLICIES
from minillm.engine.engine import Engine
from minillm.generate import choose, extend
from minillm.quantization.cache import QuantizedCache
from minillm.quantization.formats import FORMATS
from minillm.quantization.tails import TailPool
from minillm.sampling import SamplingParams
from tests.cache.definition import DefinitionCache
from tests.engine import test_fuzz
from tests.engine.test_fuzz import tiny_model
from tests.engine.workloads import Completions, Workload, compare, play, random_workload
from tests.speculative.test_engine import fuzz, garbage, half_right, ngram, target_itself, with_a_model

NUM_SEEDS = 6


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few tokens: a sequence of twenty crosses many of their boundaries."""
    monkeypatch.delitem(MIN_BLOCK_SIZES, "int4")


@cache
def stream(prompt: tuple[int, ...], params: SamplingParams, index: int, kv_format: str, block_size: int) -> list[int]:
    """What a completion gets, by definition, if nothing ends it."""
    generator = None if params.greedy else params.generator(index)
    kv, tokens, pending = DefinitionCache(FORMATS[kv_format], block_size), list(prompt), list(prompt)
    for _ in range(params.max_tokens):
        logits = extend(tiny_model(), torch.tensor(pending), kv)
        pending = [choose(logits, tokens, params, generator, num_prompt=len(prompt))]
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


def test_a_draft_model_keeps_its_own_keys_exact() -> None:
    """Its twins roll back further than one step, so its cache is not quantised."""

    def serve(workload: Workload, proposer: Any) -> Engine:
        assert proposer.runner.cache.tails is None
        return with_a_model(in_format(workload, "int4"), proposer)

    alone = lambda workload: alone_all(in_format(workload, "int4"))  # noqa: E731
    fuzz(serve, target_itself, alone, only_greedy=True, num_seeds=2)


def test_formats_share_no_blocks() -> None:
    """The format is part of a prefix's name, as the model is: the same tokens, other KV."""
    configs = (replace(random_workload(0, "mixed").config, kv_format=name) for name in ("auto", *FORMATS))
    engines = [Engine(tiny_model(), config) for config in configs]
    assert len({engine.pool.open([1, 2, 3])[0].prefix for engine in engines}) == 1 + len(FORMATS)


def test_a_hit_goes_on_where_a_block_begins() -> None:
    """In int4 a query of the last block wants that block's keys exactly: all of its tokens are computed again."""
    for kv_format, num_cached in (("int8", 11), ("int4", 8)):
        config = replace(random_workload(0, "mixed").config, kv_format=kv_format, block_size=4, num_blocks=20)
        engine = Engine(tiny_model(), replace(config, enable_prefix_caching=True, max_num_batched_tokens=64))
        for _ in range(2):
            engine.add(list(range(12)), SamplingParams(max_tokens=1))
            while engine.has_unfinished:
                engine.step()
        assert engine.trace[-1].sequences[0].kv_len - engine.trace[-1].sequences[0].num_scheduled == num_cached


# Wrong versions


def _forgets_completed(self: TailPool, layout: Any) -> Any:
    """Tails are taken back as soon as their block is complete: guesses that are rejected take its keys with them."""
    step = _right_begin(self, layout)
    for block in step.blocks.tolist():
        self._free.insert(0, self._tails.pop(block))
    return step


_right_begin = TailPool.begin


def _copies_codes_only(self: QuantizedCache, copies: list[tuple[int, int]]) -> None:
    for source, target in copies:
        for tensor in self.tensors:
            if tensor.dtype == torch.uint8:
                tensor[:, target] = tensor[:, source]
    if self.tails:
        self.tails.copy(copies)


def _goes_on_anywhere(self: BlockPool, tokens: list[int], salt: object = None) -> Any:
    self.stride = 1
    return _right_open(self, tokens, salt)


_right_open = BlockPool.open


def test_a_hit_within_a_block_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockPool, "open", _goes_on_anywhere)
    with pytest.raises(AssertionError):
        test_a_hit_goes_on_where_a_block_begins()


MUTANTS: dict[str, tuple[str, type, str, Any]] = {
    "a tail is gone when its block is complete": ("int4", TailPool, "begin", _forgets_completed),
    "tails are not copied": ("int4", TailPool, "copy", lambda self, copies: None),
    "all tails are taken back": ("int4", TailPool, "keep", lambda self, blocks: _right_keep(self, [])),
    "trap 48: ranges are not copied": ("int8", QuantizedCache, "copy", _copies_codes_only),
    "trap 48: nothing is copied": ("fp8", QuantizedCache, "copy", lambda self, copies: None),
}
_right_keep = TailPool.keep


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_fuzz_kills(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kv_format, owner, name, wrong = MUTANTS[mutant]
    monkeypatch.setattr(owner, name, wrong)

    def serve(workload: Workload, proposer: Any) -> Engine:
        return with_a_model(in_format(workload, kv_format), proposer)

    with pytest.raises(AssertionError):  # rejected guesses first, then everything else
        fuzz(serve, garbage, lambda workload: alone_all(in_format(workload, kv_format)), num_seeds=8)
        for seed in range(30):
            for policy in POLICIES:
                check(in_format(random_workload(seed, policy), kv_format))
