"""TTFT by the share of the prompt that the cache knows: what it finds, and how much work is left."""

from __future__ import annotations

import json
import math

import pytest

from minillm.config import EngineConfig
from minillm.costs.formulas import step_flops
from minillm.engine.engine import Engine
from minillm.errors import ConfigError
from minillm.measure.bench import Timing
from minillm.measure.bench_prefix import PrefixRow, bench_prefix
from minillm.measure.roof import Roof
from tests.families import random_model


def engine(**settings: object) -> Engine:
    return Engine(random_model(), EngineConfig(**({"num_blocks": 200, "block_size": 8} | settings)))  # type: ignore[arg-type]


def test_the_cache_finds_what_was_shared() -> None:
    """96 tokens in blocks of 8. A whole hit recomputes one token; what is no whole block is not found."""
    rows = bench_prefix(engine(), prompt=96, shares=(0.0, 0.25, 0.3, 1.0), repeats=2)
    assert [(row.num_shared, row.num_cached) for row in rows] == [(0, 0), (24, 24), (29, 24), (96, 95)]
    assert all(len(row.timing.times) == 2 and row.timing.best > 0 for row in rows)


def test_what_is_found_is_not_computed() -> None:
    """The trace is the oracle: tokens computed are those of the prompt that were not found."""
    one = engine()
    rows = bench_prefix(one, prompt=64, shares=(0.0, 0.5, 1.0), repeats=1)
    computed = [record.num_tokens for record in one.trace][-3:]
    assert computed == [row.num_prompt - row.num_cached for row in rows] == [64, 32, 1]


def test_the_bound_is_that_of_what_is_left() -> None:
    """One step of the 64 - 48 tokens behind 48; the mutant prices a prompt of 16 that sees nothing before it."""
    config, roof = random_model().config, Roof(1.0, math.inf)
    bound = PrefixRow(64, 50, 48, Timing((1.0,))).bound(config, 4, roof)
    assert bound == step_flops(config, [(16, 64)]).total != step_flops(config, [(16, 16)]).total


def test_without_the_cache_nothing_is_found() -> None:
    """The mutant of the engine: every share costs the whole prompt."""
    one = engine(enable_prefix_caching=False)
    rows = bench_prefix(one, prompt=64, shares=(0.5, 1.0), repeats=1)
    assert [row.num_cached for row in rows] == [0, 0]
    assert {record.num_tokens for record in one.trace} == {64}


def test_ratios_are_pairs_of_one_round() -> None:
    cold, warm = PrefixRow(8, 0, 0, Timing((1.0, 2.0, 4.0))), PrefixRow(8, 4, 4, Timing((0.5, 0.5, 3.0)))
    assert warm.share_of_time(cold) == pytest.approx((0.375, 0.5, 0.625))
    data = json.loads(json.dumps(warm.to_json()))
    assert data["median_ms"] == 500 and data["num_cached"] == 4 and len(data["ttfts"]) == 3


@pytest.mark.parametrize(
    "wrong, words", [({"shares": (1.2,)}, "0 to 1"), ({"prompt": 0}, "at least"), ({"prompt": 600}, "512 positions")]
)
def test_what_cannot_be_measured_is_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        bench_prefix(engine(), **wrong)  # type: ignore[arg-type]
