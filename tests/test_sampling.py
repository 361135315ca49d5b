"""The processed distribution against a brute-force definition, and drawing from it against χ²."""

from __future__ import annotations

import dataclasses
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import sampling
from minillm.errors import RequestError
from minillm.sampling import SamplingParams, adjust, probs_from_logits, sample

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
    u = torch.tensor([SamplingParams(seed=i).random(0, 0) for i in range(20_000)], dtype=torch.float64)
    counts = torch.bincount(sample(probs.expand(20_000, -1), u), minlength=VOCAB).float()
    assert chi_square(counts, probs[0]) < 40
    noise = torch.rand(20_000, VOCAB, generator=torch.Generator().manual_seed(0))
    mutant = torch.bincount((probs * noise).argmax(-1), minlength=VOCAB).float()
    assert chi_square(mutant, probs[0]) > 400


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    rows = [SamplingParams(seed=5), SamplingParams(temperature=0), SamplingParams(seed=7, top_k=4)]
    u = torch.tensor([p.random(0, 0) for p in rows], dtype=torch.float64)
    alone = [
        sample(probs_from_logits(x[None], [p]), u[i : i + 1]).item()
        for i, (x, p) in enumerate(zip(logits, rows, strict=True))
    ]
    together = sample(probs_from_logits(logits, rows), u)
    assert together.tolist() == alone


def first_draw(params: SamplingParams, index: int, **where: int) -> float:
    return params.random(index, 0, **where)


def test_streams_of_neighbours_never_meet() -> None:
    """Seeds of engines, arrivals, explicit seeds, completions and their draft models: each has its own numbers.

    The mutant adds seed and arrival: the second request of an engine with seed 0 is the first of one with seed 1.
    """
    draws: dict[tuple[str | int, ...], float] = {
        ("engine", seed, arrival, index): first_draw(SamplingParams(), index, engine_seed=seed, arrival=arrival)
        for seed in range(-3, 7)
        for arrival in range(10)
        for index in range(-4, 4)
    }
    explicit = [*range(-10, 20), 2**31, 2**32, 2**63, 2**70, -(2**70), 10**5000]
    draws |= {("request", seed, i): first_draw(SamplingParams(seed=seed), i) for seed in explicit for i in range(-4, 4)}
    assert len(set(draws.values())) == len(draws)

    def adds(seed: int, arrival: int) -> float:
        return float(torch.rand((), generator=torch.Generator().manual_seed(seed + arrival)))

    assert adds(0, 1) == adds(1, 0), "the mutant"


def test_an_explicit_seed_is_the_same_stream_in_every_engine() -> None:
    wherever = {first_draw(SamplingParams(seed=7), 1, engine_seed=e, arrival=a) for e in range(3) for a in range(3)}
    assert len(wherever) == 1


def test_random_streams_differ_by_sample_and_repeat_by_seed() -> None:
    """One draw broadcast to all samples is a bug that two engines had."""
    params = SamplingParams(n=4, seed=11)
    draws = [[params.random(i, place) for place in range(3)] for i in range(4)]
    assert len({number for stream in draws for number in stream}) == 12
    assert draws[2] == [params.random(2, place, engine_seed=99, arrival=7) for place in range(3)]
    unseeded = SamplingParams()
    assert unseeded.random(0, 0, arrival=1) != unseeded.random(0, 0, arrival=2)


def test_the_numbers_of_streams_are_uniform_and_independent() -> None:
    """χ² over a 10 by 10 grid of neighbours in position, index and seed: 99 degrees exceed 160 once in 10⁴ runs."""
    for name, pair in {
        "position": lambda i: (SamplingParams(seed=0).random(0, i), SamplingParams(seed=0).random(0, i + 1)),
        "index": lambda i: (SamplingParams(seed=0).random(i, 0), SamplingParams(seed=0).random(i + 1, 0)),
        "seed": lambda i: (SamplingParams(seed=i).random(0, 0), SamplingParams(seed=i + 1).random(0, 0)),
    }.items():
        pairs = [pair(i) for i in range(0, 4000, 2)]
        assert all(0 <= number < 1 for numbers in pairs for number in numbers)
        counts = torch.bincount(torch.tensor([int(10 * a) * 10 + int(10 * b) for a, b in pairs]), minlength=100).float()
        assert chi_square(counts, torch.full((100,), 0.01)) < 160, name


def test_token_zero_can_be_drawn() -> None:
    probs = torch.tensor([[1.0, 0.0, 0.0]])
    assert sample(probs, torch.tensor([0.5], dtype=torch.float64)).item() == 0


def test_repetition_penalty_moves_seen_tokens_down_once() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 3.0])
    penalized = adjust(logits, SamplingParams(repetition_penalty=2.0), [0, 1], [1, 0, 0])
    assert penalized.tolist() == [1.0, -2.0, 0.5, 3.0]
    assert logits.tolist() == [2.0, -1.0, 0.5, 3.0]


def test_stop_tokens() -> None:
    assert SamplingParams().ends_with(2, [2, 3])
    assert not SamplingParams(ignore_eos=True).ends_with(2, [2, 3])
    assert SamplingParams(ignore_eos=True, stop_token_ids=[2]).ends_with(2, [2, 3])
    assert SamplingParams(stop="a").stop == ("a",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def by_definition(
    logits: list[float], params: SamplingParams, prompt: list[int], output: list[int], end_ids: list[int]
) -> list[float]:
    """What each parameter is documented to do, one token after another, in Python floats."""
    result = []
    for token, score in enumerate(logits):
        for word in params.bad_words_token_ids or ():
            if [*output, token][-len(word) :] == list(word):
                score = -math.inf
        if len(output) < params.min_tokens and token in {*end_ids, *(params.stop_token_ids or ())}:
            score = -math.inf
        score += dict(params.logit_bias or ()).get(token, 0.0)
        if token in prompt or token in output:
            score = score / params.repetition_penalty if score > 0 else score * params.repetition_penalty
        score -= params.frequency_penalty * output.count(token)
        score -= params.presence_penalty * (token in output)
        result.append(score)
    return result


tokens_strategy = st.lists(st.integers(0, VOCAB - 1), max_size=6)


@settings(max_examples=300, deadline=None)
@given(
    params=st.builds(
        SamplingParams,
        repetition_penalty=st.sampled_from([0.5, 1.0, 1.3]),
        presence_penalty=st.sampled_from([-2, 0, 0.7]),
        frequency_penalty=st.sampled_from([-0.6, 0, 2]),
        logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=16), max_size=3),
        bad_words_token_ids=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=3),
        stop_token_ids=st.lists(st.integers(0, 2 * VOCAB), max_size=2),
        ignore_eos=st.booleans(),
        min_tokens=st.integers(0, 5),
    ),
    prompt=tokens_strategy,
    output=st.lists(st.integers(0, 3), max_size=6),
    end_ids=st.lists(st.integers(0, VOCAB - 1), max_size=2),
    seed=st.integers(0, 10**6),
)
def test_adjusted_scores_equal_their_definition(
    params: SamplingParams, prompt: list[int], output: list[int], end_ids: list[int], seed: int
) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    before = logits.clone()
    scores = adjust(logits, params, prompt, output, end_ids)
    expected = torch.tensor(by_definition(logits.tolist(), params, prompt, output, end_ids))
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(logits, before), "changed in place"
    assert params.adjusts or torch.equal(scores, logits)


ADJUSTMENTS: dict[
    str, tuple[dict[str, Any], dict[str, Any]]
] = {  # what is asked for, and what somebody else makes of it
    "presence counts how often": ({"presence_penalty": 1}, {"frequency_penalty": 1}),
    "frequency does not count": ({"frequency_penalty": 1}, {"presence_penalty": 1}),
    "the bias comes after the penalty": ({"logit_bias": {1: -9.0}, "repetition_penalty": 2}, {"logit_bias": {1: -4.5}}),
    "a bad word is its last token": ({"bad_words_token_ids": [[5, 1]]}, {"bad_words_token_ids": [[1]]}),
    "min_tokens counts one too many": (
        {"min_tokens": 4, "stop_token_ids": [2]},
        {"min_tokens": 3, "stop_token_ids": [2]},
    ),
}


@pytest.mark.parametrize("mutant", ADJUSTMENTS)
def test_the_definition_tells_near_misses_apart(mutant: str) -> None:
    """A confusion of two parameters is not the same numbers on an output that repeats a token three times."""
    right, wrong = (SamplingParams(**fields) for fields in ADJUSTMENTS[mutant])
    logits, output = torch.linspace(-2, 3, VOCAB), [1, 1, 1]
    expected = torch.tensor(by_definition(logits.tolist(), right, [4], output, [3]))
    torch.testing.assert_close(adjust(logits, right, [4], output, [3]), expected)
    assert not torch.allclose(adjust(logits, wrong, [4], output, [3]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_are_float32_whatever_the_model_computes_in(dtype: torch.dtype) -> None:
    scores = adjust(torch.ones(4, dtype=dtype), SamplingParams(logit_bias={1: 0.001}), [], [])
    assert scores.dtype == torch.float32 and scores[1] == pytest.approx(1.001)


def test_all_tokens_impossible_is_no_distribution() -> None:
    scores = adjust(torch.zeros(2), SamplingParams(bad_words_token_ids=[[0], [1]]), [], [])
    for params in (SamplingParams(), SamplingParams(temperature=0)):
        assert sample(probs_from_logits(scores[None], [params]), None).item() == -1


def test_bad_words_are_spelled_at_the_start_and_after_a_space() -> None:
    spelled = SamplingParams(bad_words=["no", " way"]).with_bad_words(lambda text: list(text.encode()))
    words = {bytes(word) for word in spelled.bad_words_token_ids or ()}
    assert words == {b"no", b" no", b"way", b" way"}
    assert spelled.with_bad_words(lambda text: list(text.encode())) == spelled
    assert SamplingParams().with_bad_words(lambda text: pytest.fail("nothing to spell")) == SamplingParams()


def test_tokens_of_another_vocabulary_are_refused_by_name() -> None:
    SamplingParams(logit_bias={9: 1}, bad_words_token_ids=[[9]], stop_token_ids=[99]).check(10)
    wrongs: list[dict[str, Any]] = [{"logit_bias": {3: 1, 10: 1}}, {"bad_words_token_ids": [[1, 10]]}]
    for wrong in wrongs:
        with pytest.raises(RequestError, match=r"10 is not possible: it must be below the vocabulary's size, 10"):
            SamplingParams(**wrong).check(10)
    with pytest.raises(RequestError, match="bad_words need a tokenizer"):
        SamplingParams(bad_words=["x"]).check(10)


EXTREME_ROWS = {
    "one finite": [-math.inf, 2.0, -math.inf, -math.inf],
    "all equal": [7.0] * 4,
    "huge": [1e4, -1e4, 9999.0, 0.0],
    "the ends of float32": [1.7e38, -1.7e38, 0.0, 1.6e38],
    "one infinite": [0.0, math.inf, 5.0, -math.inf],
    "two infinite": [math.inf, 1.0, math.inf, -3.0],
    "subnormal": [1e-45, 0.0, -1e-45, 2e-45],
    "small": [1e-4, 2e-4, 3e-4, -1e-4],
}
EXTREME_PARAMS: list[dict[str, Any]] = [
    {"top_p": 1e-37},
    {"top_p": 1.0},
    {"min_p": 0.0},
    {"min_p": 1.0},
    {"top_k": 2**31 - 1},
    {"top_k": 1},
    {"top_p": 0.5, "min_p": 1e-37, "top_k": 3},
]


def in_the_limit(row: list[float], temperature: float) -> list[float]:
    """The distribution of softmax(row / temperature) in Python's double precision; infinite logits share all mass."""
    top = max(row)
    weights = [1.0 if x == top else math.exp(max((x - top) / temperature, -1e6)) if x > -math.inf else 0.0 for x in row]
    return [0.0 if math.isinf(top) and x < top else w / sum(weights) for x, w in zip(row, weights, strict=True)]


@pytest.mark.parametrize("temperature", [0, 1.2e-38, 1e-20, 1e-5, 1.0, 1e5, 1e38])
@pytest.mark.parametrize("name", EXTREME_ROWS)
def test_the_ends_of_float32(name: str, temperature: float) -> None:
    """Every row that has a largest logit is a distribution, the right one, and only tokens with mass are drawn."""
    row = EXTREME_ROWS[name]
    logits = torch.tensor([row])
    plain = probs_from_logits(logits, [SamplingParams(temperature=temperature)])
    if temperature > 0:
        expected = torch.tensor([in_the_limit(logits[0].tolist(), temperature)])
        torch.testing.assert_close(plain, expected, atol=1e-5, rtol=1e-4)
    for fields in EXTREME_PARAMS:
        probs = probs_from_logits(logits, [SamplingParams(temperature=temperature, **fields)])
        assert probs.sum() == pytest.approx(1, abs=1e-5) and bool((probs >= 0).all()), fields
        assert probs.argmax() == logits.argmax() or probs[0, logits.argmax()] == probs.max(), fields
        if fields.get("top_k") == 1:
            assert probs[0].tolist() == [float(i == logits.argmax()) for i in range(4)], "the most likely, in any heat"
        for u in (0.0, 0.3, 1 - 2**-53):
            token = int(sample(probs, torch.tensor([u], dtype=torch.float64)))
            assert probs[0, token] > 0


@pytest.mark.parametrize("row", [[math.nan, 1.0, 2.0], [-math.inf] * 3, [math.inf, math.nan, 0.0]], ids=str)
@pytest.mark.parametrize("fields", [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5, "min_p": 0.1}], ids=str)
def test_a_row_that_is_no_distribution_answers_minus_one(row: list[float], fields: dict[str, Any]) -> None:
    """Beside rows that are, which are drawn as if it were not there."""
    logits = torch.tensor([[0.0, 9.0, 1.0], row, [8.0, 0.0, 1.0]])
    params = [SamplingParams(**{**fields, "temperature": 0}), SamplingParams(**fields), SamplingParams(temperature=0)]
    probs = probs_from_logits(logits, params)
    assert probs[1].isnan().any() and probs[[0, 2]].isfinite().all()
    assert sample(probs, None).tolist() == [1, -1, 0]
    assert sample(probs, torch.full((3,), 0.5, dtype=torch.float64)).tolist() == [1, -1, 0]


def test_the_largest_number_never_reaches_past_the_last_possible_token() -> None:
    """The sum of float32 probabilities may be a little off 1; the largest u, 1 - 2^-53, stays below it all the same."""
    rng = torch.Generator().manual_seed(0)
    probs = torch.rand(2000, 9, generator=rng) * 10 ** (torch.rand(2000, 1, generator=rng) * 6 - 3)
    probs[:, 7:] = 0
    assert sample(probs, torch.full((2000,), 1 - 2**-53, dtype=torch.float64)).unique().tolist() == [6]


STRANGE: list[Any] = [
    True, False, 0, 1, -1, 2, 3, 20, 21, 2.0, 2.5, -0.0, 0.5, 1e-300, -1e-300, 1e-50, 1e-40, 1e-30, 1e30,
    1e38, 1e39, 1e300, math.nan, math.inf, -math.inf, 2**31, 2**63, 2**70, -(2**70), 10**5000, "", "a", "1",
    b"a", None, [], [1], ["a"], [""], [True], [1.0], [[1]], [[]], ("a",), (3, 5), {1}, {"a"}, {}, {1: 2}, {1:
    1000}, {1: math.nan}, {-1: 1}, {"1": 1}, {True: 1}, {1: True}, [(1, 2.0)], [(1, 2, 3)], object(), str, 1j,
    Fraction(1, 2), Decimal("0.5"), range(2), iter([1]), "\ud800", np.float32(0.5), np.float64(math.nan),
    np.int64(3), np.bool_(True), np.array(2), np.array([1, 2]), np.array([0.5]), np.array("a"), np.str_("a"),
    {np.int64(2): np.float32(0.5)}, torch.tensor(2), torch.tensor(0.5), torch.tensor(True), torch.tensor([1,
    2]), torch.tensor(math.inf), torch.tensor(1j), torch.tensor([[1]]),
]  # fmt: skip
PLAIN = (bool, int, float, str, type(None))


def is_plain(value: object) -> bool:
    return type(value) in PLAIN or (type(value) is tuple and all(is_plain(item) for item in value))


@pytest.mark.parametrize("name", [one.name for one in dataclasses.fields(SamplingParams)])
def test_whatever_is_handed_in_is_refused_by_name_or_frozen(name: str) -> None:
    """Accepted values are plain, immutable, finite in float32, survive a second round, and can be computed with."""
    kind = type(getattr(SamplingParams(), name))
    for strange in STRANGE:
        try:
            params = SamplingParams(**{name: strange})
        except RequestError as error:
            assert str(error).startswith((f"{name}=", "min_tokens=")), strange
            continue
        value = getattr(params, name)
        assert is_plain(value) and hash(params) == hash(dataclasses.replace(params)), strange
        assert dataclasses.replace(params) == params, strange
        assert value is None or kind is type(None) or type(value) is kind, (strange, value)
        if type(value) is float:
            assert math.isfinite(torch.tensor(value, dtype=torch.float32).item()), strange
            assert (torch.tensor(value, dtype=torch.float32) == 0) == (value == 0), strange
        scores = adjust(torch.tensor([1.0, -1.0, 0.0, 2.0]), params, [1], [2], [3])
        assert not scores.isnan().any(), strange
        assert float(torch.nansum(probs_from_logits(scores[None], [params]))) == pytest.approx(1, abs=1e-5), strange


def test_small_temperatures_are_told_to_be_greedy() -> None:
    with pytest.raises(RequestError, match=r"temperature=1e-300 is not possible: .* float32 takes it for 0. Use 0\.$"):
        SamplingParams(temperature=1e-300)


def test_equal_wishes_are_equal() -> None:
    one = SamplingParams(stop="a", stop_token_ids=[1], logit_bias={5: 1, 2: -1}, temperature=1)
    two = SamplingParams(
        stop=["a"],
        stop_token_ids=np.array([1]),
        logit_bias={2: -1.0, 5: torch.tensor(1.0).item()},
        temperature=np.float64(1),
    )
    assert one == two and hash(one) == hash(two) and one.logit_bias == ((2, -1.0), (5, 1.0))


def test_a_list_that_changes_later_changes_nothing() -> None:
    stops = ["a"]
    params = SamplingParams(stop=stops)
    stops.append("")
    assert params.stop == ("a",)


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
        {"logprobs": 2.5},
        {"logprobs": 2.0},
        {"prompt_logprobs": 1.5},
        {"top_k": 2**63},
        {"stop": 5},
        {"stop": {"a": 1}},
        {"stop_token_ids": 5},
        {"stop_token_ids": [-1]},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"logit_bias": {1: 101}},
        {"logit_bias": [1, 2]},
        {"bad_words": ""},
        {"bad_words": [""]},
        {"bad_words_token_ids": [[]]},
        {"min_tokens": 17},
        {"ignore_eos": 1},
        {"skip_special_tokens": None},
        {"repetition_penalty": 1e-300},
        {"top_p": 1e-50},
        {"n": 10**9},
    ],
    ids=str,
)
def test_impossible_parameters_are_refused(wrong: dict[str, Any]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(RequestError, match=rf"{name}=.* is not possible: it must be"):
        SamplingParams(**wrong)
    assert isinstance(value, object)


def test_the_ends_of_the_unit_interval_pick_possible_tokens() -> None:
    """Tokens without probability stand first, last and in between; u = 0 and the largest u below 1 avoid them."""
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]] * 2)
    u = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sampling.sample(probs, u).tolist() == [1, 3]


def test_greedy_rows_get_their_token_with_and_without_company() -> None:
    """A step of greedy rows alone takes a short cut; beside a row that draws, the running sums serve all."""
    best = torch.tensor([3, 0, 4])
    probs = torch.nn.functional.one_hot(best, 5).float()
    assert sampling.sample(probs, None).tolist() == best.tolist()
    assert sampling.sample(probs, torch.full((3,), 0.5, dtype=torch.float64)).tolist() == best.tolist()


def test_the_tail_of_a_large_vocabulary_is_reached() -> None:
    """A token of probability 1e-9 behind 100,000 others owns its share of the unit interval; float32 sums lose it."""
    probs = torch.full((100_001,), 1e-5)
    probs[-1] = 1e-9
    sums = probs.cumsum(-1, dtype=torch.float64)
    inside = (sums[-2] + sums[-1]) / 2
    assert int(torch.searchsorted(sums, inside, right=True)) == 100_000
    mutant = probs.cumsum(-1, dtype=torch.float32)
    assert mutant[-1] == mutant[-2]
