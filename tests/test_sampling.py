"""The processed distribution against a brute-force definition, and drawing from it against χ²."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import sampling
from minillm.errors import RequestError
from minillm.sampling import SamplingParams, penalize_repetition, probs_from_logits, sample

VOCAB = 13


def brute_force(logits: list[float], params: SamplingParams) -> list[float]:
    """The definition, one token at a time, in Python floats."""
    if params.temperature == 0:
        return [float(i == logits.index(max(logits))) for i in range(len(logits))]
    weights = [math.exp((x - max(logits)) / params.temperature) for x in logits]
    probs = {i: w / sum(weights) for i, w in enumerate(weights)}
    order = sorted(probs, key=lambda i: (-probs[i], i))
    if params.top_k > 0:
        order = order[: params.top_k]
    total = sum(probs[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass >= params.top_p and params.top_p < 1:
            break
        kept.append(i)
        mass += probs[i] / total
    kept = [i for i in kept if probs[i] >= params.min_p * probs[kept[0]]]
    total = sum(probs[i] for i in kept)
    return [probs[i] / total if i in kept else 0.0 for i in range(len(logits))]


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([-1, 0, 1, 3, VOCAB, 100]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.07, 0.5, 1.0]),
)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(params_strategy, min_size=1, max_size=5), seed=st.integers(0, 10**6))
def test_distribution_equals_its_definition_row_by_row(rows: list[SamplingParams], seed: int) -> None:
    """Rows with different parameters in one call: a mask shared by rows would show."""
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    probs = probs_from_logits(logits, rows)
    expected = torch.tensor([brute_force(row.tolist(), p) for row, p in zip(logits, rows, strict=True)])
    torch.testing.assert_close(probs, expected, atol=1e-5, rtol=0)


def _drops_the_crossing_token(ranked: torch.Tensor, top_p: float) -> torch.Tensor:
    return ranked.cumsum(-1) <= top_p


def test_top_p_keeps_the_token_that_crosses() -> None:
    """0.5 + 0.3 + 0.2 with p = 0.6 keeps two tokens. The mutant compares the mass including the token, keeps one."""
    probs = torch.tensor([[0.5, 0.3, 0.2]])
    kept = probs_from_logits(probs.log(), [SamplingParams(top_p=0.6)])
    torch.testing.assert_close(kept, torch.tensor([[0.625, 0.375, 0.0]]))
    mutant = _drops_the_crossing_token(probs, 0.6)
    assert mutant.sum() == 1 != (kept > 0).sum()


def test_temperature_comes_before_top_p() -> None:
    """At temperature 2 the distribution is flatter, so more tokens are needed to reach p."""
    logits = torch.tensor([[4.0, 2.0, 0.0, -2.0]])
    cold, hot = (probs_from_logits(logits, [SamplingParams(temperature=t, top_p=0.9)]) for t in (1.0, 2.0))
    assert (cold > 0).sum() == 2 and (hot > 0).sum() == 3


def test_greedy_takes_the_first_of_equals_and_survives_huge_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [1e30, -1e30, 1e29]])
    probs = probs_from_logits(logits, [SamplingParams(temperature=0)] * 2)
    assert probs.tolist() == [[0, 1, 0], [1, 0, 0]]


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    expected = probs * counts.sum()
    seen = probs > 0
    assert counts[~seen].sum() == 0
    return float((((counts - expected) ** 2)[seen] / expected[seen]).sum())


def test_samples_follow_the_distribution() -> None:
    """20,000 draws over 13 tokens: χ² with 12 degrees of freedom exceeds 40 once in 14,000 runs; the seed is fixed.
    A mutant that takes the largest of p times a uniform number, and so likely tokens too often, is far outside."""
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3))
    probs = probs_from_logits(logits, [SamplingParams(temperature=0.8)])
    generators = [torch.Generator().manual_seed(i) for i in range(20_000)]
    counts = torch.bincount(sample(probs.expand(20_000, -1), generators), minlength=VOCAB).float()
    assert chi_square(counts, probs[0]) < 40
    noise = torch.rand(20_000, VOCAB, generator=torch.Generator().manual_seed(0))
    mutant = torch.bincount((probs * noise).argmax(-1), minlength=VOCAB).float()
    assert chi_square(mutant, probs[0]) > 400


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    rows = [SamplingParams(seed=5), SamplingParams(temperature=0), SamplingParams(seed=7, top_k=4)]
    alone = [
        sample(probs_from_logits(x[None], [p]), [p.generator(0)]).item() for x, p in zip(logits, rows, strict=True)
    ]
    together = sample(probs_from_logits(logits, rows), [p.generator(0) for p in rows])
    assert together.tolist() == alone


def test_random_streams_differ_by_sample_and_repeat_by_seed() -> None:
    """One draw broadcast to all samples is a bug that two engines had."""
    params = SamplingParams(n=4, seed=11)
    draws = [torch.rand(3, generator=params.generator(i)).tolist() for i in range(4)]
    assert len({tuple(d) for d in draws}) == 4
    assert draws[2] == torch.rand(3, generator=params.generator(2, engine_seed=99, arrival=7)).tolist()
    unseeded = SamplingParams()
    assert unseeded.generator(0, arrival=1).initial_seed() != unseeded.generator(0, arrival=2).initial_seed()


def test_token_zero_can_be_drawn() -> None:
    probs = torch.tensor([[1.0, 0.0, 0.0]])
    assert sample(probs, [torch.Generator().manual_seed(0)]).item() == 0


def test_repetition_penalty_moves_seen_tokens_down_once() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 3.0])
    penalized = penalize_repetition(logits, torch.tensor([0, 1, 1, 0, 0]), 2.0)
    assert penalized.tolist() == [1.0, -2.0, 0.5, 3.0]
    assert logits.tolist() == [2.0, -1.0, 0.5, 3.0]


def test_stop_tokens() -> None:
    assert SamplingParams().ends_with(2, [2, 3])
    assert not SamplingParams(ignore_eos=True).ends_with(2, [2, 3])
    assert SamplingParams(ignore_eos=True, stop_token_ids=[2]).ends_with(2, [2, 3])
    assert SamplingParams(stop="a").stop_strings == ("a",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": "warm"},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": -1},
        {"top_k": -2},
        {"top_k": 1.5},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"n": 0},
        {"n": True},
        {"max_tokens": 0},
        {"max_tokens": 2.0},
        {"seed": "x"},
        {"stop": ["ok", ""]},
        {"stop_token_ids": ["a"]},
        {"logprobs": 21},
        {"logprobs": -1},
    ],
    ids=str,
)
def test_impossible_parameters_are_refused(wrong: dict[str, Any]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(RequestError, match=rf"{name}=.* is not possible: it must be"):
        SamplingParams(**wrong)
    assert isinstance(value, object)


def test_the_ends_of_the_unit_interval_pick_possible_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens without probability stand first, last and in between; u = 0 and the largest u below 1 avoid them."""
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]] * 2)
    draws = iter([0.0, 1 - 2**-53])
    monkeypatch.setattr(sampling, "uniform", lambda generator, device: torch.tensor(next(draws), dtype=torch.float64))
    assert sampling.sample(probs, [torch.Generator()] * 2).tolist() == [1, 3]


def test_greedy_rows_get_their_token_with_and_without_company() -> None:
    """A step of greedy rows alone takes a short cut; beside a row that draws, the running sums serve all."""
    best = torch.tensor([3, 0, 4])
    probs = torch.nn.functional.one_hot(best, 5).float()
    assert sampling.sample(probs, [None] * 3).tolist() == best.tolist()
    assert sampling.sample(probs, [None, torch.Generator(), None]).tolist() == best.tolist()


def test_the_tail_of_a_large_vocabulary_is_reached() -> None:
    """A token of probability 1e-9 behind 100,000 others owns its share of the unit interval; float32 sums lose it."""
    probs = torch.full((100_001,), 1e-5)
    probs[-1] = 1e-9
    sums = probs.cumsum(-1, dtype=torch.float64)
    inside = (sums[-2] + sums[-1]) / 2
    assert int(torch.searchsorted(sums, inside, right=True)) == 100_000
    mutant = probs.cumsum(-1, dtype=torch.float32)
    assert mutant[-1] == mutant[-2]
