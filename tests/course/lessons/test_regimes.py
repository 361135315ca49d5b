"""Each term of a step is what its closed form says, the largest is the regime, and what does not fit has none."""

from __future__ import annotations

import pytest

from minillm.costs.formulas import kv_bytes_per_token, step_flops, weight_bytes
from minillm.costs.steps import decode_step
from minillm.course.lessons.crossovers import kv_crossover
from minillm.course.lessons.regimes import TERMS, Site
from minillm.measure.roof import Roof
from minillm.shapes import named_shape

LLAMA = named_shape("llama-3.1-8b")
SITE = Site("H200", LLAMA, 2, Roof(9.89e14, 4.8e12), 141e9, overhead=1e-5)


def test_terms_are_bytes_and_flops_over_the_roof() -> None:
    terms = SITE.terms(8, 1000)
    assert tuple(terms) == TERMS
    assert terms["weights"] == weight_bytes(LLAMA, 2, 8) / 4.8e12
    assert terms["KV cache"] == 8 * 999 * kv_bytes_per_token(LLAMA, 2) / 4.8e12
    assert terms["arithmetic"] == step_flops(LLAMA, decode_step(1000, 8)).total / 9.89e14
    assert terms["overhead"] == 1e-5


@pytest.mark.parametrize(
    ("batch", "context", "regime"),
    [(1, 1000, "weights"), (512, 128, "arithmetic"), (16, 32000, "KV cache"), (512, 32000, "capacity")],
)
def test_the_largest_term_is_the_regime(batch: int, context: int, regime: str) -> None:
    assert SITE.regime(batch, context) == regime
    assert SITE.regimes([batch], [context]) == [[regime]]


def test_a_slow_interpreter_is_a_regime() -> None:
    assert Site("slow", LLAMA, 2, SITE.roof, 141e9, overhead=1.0).regime(1, 1000) == "overhead"


def test_the_cache_takes_over_where_the_formula_says() -> None:
    crossover = kv_crossover(LLAMA, 2)
    regimes = [SITE.regime(1, round(factor * crossover)) for factor in (0.97, 1.03)]
    assert regimes == ["weights", "KV cache"]


def test_a_larger_batch_never_leaves_the_cache() -> None:
    """Where KV is most of the bytes, both it and the arithmetic grow with the batch: the regime stays."""
    big = Site("with endless memory", LLAMA, 2, SITE.roof, 1e18)
    assert {big.regime(batch, 32000) for batch in (16, 256, 4096, 65536)} == {"KV cache"}


def test_memory_ends_where_weights_and_caches_fill_it() -> None:
    room = (141e9 - weight_bytes(LLAMA, 2, 0)) // kv_bytes_per_token(LLAMA, 2)
    assert SITE.fits(1, int(room)) and not SITE.fits(1, int(room) + 1)
