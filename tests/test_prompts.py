"""The door for prompts: each form is read to the same values, everything else is refused before anything is queued."""

from __future__ import annotations

import array
import random
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from minillm.errors import RequestError
from minillm.prompts import Prompt, read_prompts
from minillm.sampling import SamplingParams

IDS = Prompt(token_ids=(3, 0, 7))
TEXT = Prompt(text="def")

ONE: list[tuple[Any, Prompt]] = [
    ("def", TEXT),
    ("", Prompt(text="")),
    ([3, 0, 7], IDS),
    ((3, 0, 7), IDS),
    (np.array([3, 0, 7]), IDS),
    (np.array([3, 0, 7], dtype=np.uint8), IDS),
    (torch.tensor([3, 0, 7]), IDS),
    (torch.tensor([3, 0, 7], dtype=torch.int32), IDS),
    ([np.int64(3), torch.tensor(0), 7], IDS),
    (array.array("q", [3, 0, 7]), IDS),
    ({"prompt": "def"}, TEXT),
    (MappingProxyType({"prompt": "def"}), TEXT),
    ({"prompt": "def", "prompt_token_ids": None}, TEXT),
    ({"prompt_token_ids": torch.tensor([3, 0, 7])}, IDS),
    ({"prompt": "def", "prompt_token_ids": [3, 0, 7]}, Prompt("def", (3, 0, 7))),
    ({"prompt": "def", "cache_salt": "mine"}, Prompt("def", None, "mine")),
    ({"prompt_token_ids": (3, 0, 7), "cache_salt": "mine"}, Prompt(None, (3, 0, 7), "mine")),
    ({"prompt": "def", "cache_salt": None}, TEXT),
    ({"prompt": "def", "cache_salt": ""}, TEXT),
]


@pytest.mark.parametrize(("given", "prompt"), ONE, ids=str)
def test_one_prompt_in_each_form(given: Any, prompt: Prompt) -> None:
    """By itself, as the only one of a list, and as any of several; the values are plain and can be keys."""
    params = SamplingParams(seed=1)
    assert read_prompts(given, params) == [(prompt, params)]
    assert read_prompts([given]) == [(prompt, SamplingParams())]
    assert [one for one, _ in read_prompts(("x", given, [1]))] == [Prompt(text="x"), prompt, Prompt(token_ids=(1,))]
    (read,) = {one for one, _ in read_prompts(given)}
    assert read.token_ids is None or all(type(token) is int for token in read.token_ids)


@pytest.mark.parametrize("wrap", [list, tuple, iter, lambda many: (one for one in many)])
def test_several_prompts_in_any_iterable_are_read_once(wrap: Callable[[list[Any]], Any]) -> None:
    forms = [given for given, _ in ONE]
    assert [one for one, _ in read_prompts(wrap(forms))] == [prompt for _, prompt in ONE]


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ([], []),
        ((), []),
        ({}.values(), []),
        ([[]], [Prompt(token_ids=())]),
        ([1, 2], [Prompt(token_ids=(1, 2))]),
        ([[1], [2]], [Prompt(token_ids=(1,)), Prompt(token_ids=(2,))]),
        ([[1, 2]], [Prompt(token_ids=(1, 2))]),
        (((1, 2), (3,)), [Prompt(token_ids=(1, 2)), Prompt(token_ids=(3,))]),
        (range(3), [Prompt(token_ids=(0, 1, 2))]),
        ((token for token in [4, 5]), [Prompt(token_ids=(4, 5))]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_one_prompt_is_and_what_several(given: Any, prompts: list[Prompt]) -> None:
    assert [one for one, _ in read_prompts(given)] == prompts


WRONG: list[Any] = [
    None, 5, 1.5, True, 1j, b"def", bytearray(b"def"), memoryview(b"def"), {"def"}, frozenset([1]), Path("x"),
    object(), str, len, {}, {"prompt": 5}, {"prompt": None}, {"prompt": b"def"}, {"text": "def"}, {"prompt":
    "def", "images": []}, {"prompt_token_ids": "def"}, {"prompt_token_ids": 5}, {"prompt_token_ids": [1.0]},
    {"prompt_token_ids": {1}}, {"prompt_token_ids": [[1]]}, {"prompt": "def", "cache_salt": 1}, {"prompt":
    "def", "cache_salt": b"x"}, {"cache_salt": "x"}, {5: "def"}, [1.0, 2.0], [True, False], [1, "a"], [1, None],
    [1, 2.0], [1, [2]], np.array([1.0]), np.array([True]), np.array(["a"]), np.array([[1, 2]]), np.array(5),
    np.array([None]), torch.tensor([1.0]), torch.tensor([True]), torch.tensor([[1, 2]]), torch.tensor(5),
    torch.tensor([1j]), "half \ud800 a character", {"prompt": "\udfff"}, {"prompt": "def", "cache_salt":
    "\ud800"}, 10**5000,
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: type(wrong).__name__)
def test_everything_else_is_refused_saying_which(wrong: Any) -> None:
    with pytest.raises(RequestError, match=r"^Prompt 1 of 1\b"):
        read_prompts(wrong)
    for place in range(1, 4):
        several: list[Any] = ["a", [1], {"prompt": "b"}]
        several.insert(place, wrong)
        with pytest.raises(RequestError, match=rf"^Prompt {place + 1} of 4\b"):
            read_prompts(several)


def test_the_message_says_what_is_allowed_and_stays_short() -> None:
    with pytest.raises(RequestError) as caught:
        read_prompts([b"x" * 10_000])
    assert "Give a string, token ids" in str(caught.value) and len(str(caught.value)) < 300


def test_parameters_for_all_or_for_each() -> None:
    one, two = SamplingParams(seed=1), SamplingParams(seed=2)
    for each in ([one, two], (one, two), iter([one, two])):
        assert [params for _, params in read_prompts(["a", "b"], each)] == [one, two]
    assert [params for _, params in read_prompts(["a", "b"], one)] == [one, one]
    assert [params for _, params in read_prompts("a", [two])] == [two]
    assert read_prompts([], one) == [] == read_prompts([], [])


@pytest.mark.parametrize(
    "wrong", [5, "x", b"x", {}, {"seed": 1}, [None] * 2, [SamplingParams(), 1], SamplingParams], ids=str
)
def test_other_parameters_are_refused(wrong: Any) -> None:
    with pytest.raises(RequestError, match=r"sampling_params=.* is not possible"):
        read_prompts(["a", "b"], wrong)
    with pytest.raises(RequestError, match=r"sampling_params=.* is not possible"):
        read_prompts(["a", "b"], {SamplingParams(), SamplingParams(seed=1)})  # no order


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_parameters_as_prompts(count: int) -> None:
    with pytest.raises(RequestError, match=f"2 prompts, but {count} sampling_params"):
        read_prompts(["a", "b"], [SamplingParams()] * count)


def test_random_calls_end_as_prompts_or_as_a_named_error() -> None:
    """Right and wrong forms at random, nested at random: the oracle is whether any wrong one is among them."""
    wraps: list[Callable[[list[Any]], Any]] = [list, tuple, iter]
    for seed in range(300):
        rng = random.Random(seed)
        many = rng.choices(ONE, k=rng.randint(1, 6))
        wrong = rng.random() < 0.5
        given = [one for one, _ in many]
        if wrong:
            given[rng.randrange(len(given))] = rng.choice(WRONG)
        numbers = isinstance(given[0], (int, float)) or getattr(given[0], "shape", None) == ()  # then one prompt's ids
        try:
            read = [prompt for prompt, _ in read_prompts(rng.choice(wraps)(given))]
        except RequestError:
            assert wrong, (seed, given)
        else:
            assert read == [prompt for _, prompt in many] or (numbers and wrong), (seed, given)
