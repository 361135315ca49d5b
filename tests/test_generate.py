"""The two phases: how many steps they take, where they stop, what they refuse."""

from __future__ import annotations

import pytest
import torch

import minillm.generate as phases
from minillm.errors import RequestError
from minillm.generate import decode, generate, prefill
from minillm.sampling import SamplingParams
from tests.families import random_model

GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)


def test_m_tokens_take_one_prefill_and_m_minus_one_decode_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    run = phases.extend
    monkeypatch.setattr(phases, "extend", lambda m, tokens, c: (lengths.append(len(tokens)), run(m, tokens, c))[1])
    assert len(list(generate(random_model(), [5, 6, 7], GREEDY))) == 9
    assert lengths == [3] + [1] * 8


def test_greedy_equals_recomputing_everything_at_each_step() -> None:
    """The oracle without any cache."""
    model = random_model("qwen2", seed=2)
    tokens = [3, 1, 4, 1, 5]
    for token in generate(model, [3, 1, 4, 1, 5], GREEDY):
        logits, _ = prefill(model, tokens)
        assert token == int(logits.argmax())
        tokens.append(token)


def test_tokens_come_one_by_one() -> None:
    stream = generate(random_model(), [1], GREEDY)
    first = next(stream)
    assert [first, *stream] == list(generate(random_model(), [1], GREEDY))


def test_end_tokens_stop_and_are_part_of_the_output() -> None:
    plain = list(generate(random_model(), [5, 6, 7], GREEDY))
    stop = next(t for i, t in enumerate(plain) if i > 0 and t not in plain[:i])
    cut = plain[: plain.index(stop) + 1]
    assert list(generate(random_model(), [5, 6, 7], SamplingParams(temperature=0, stop_token_ids=[stop]))) == cut
    ending = random_model(eos_token_id=[stop, 130])
    assert list(generate(ending, [5, 6, 7], SamplingParams(temperature=0))) == cut
    assert list(generate(ending, [5, 6, 7], GREEDY)) == plain


def test_seeds_repeat_and_samples_differ() -> None:
    params = SamplingParams(seed=1, max_tokens=12, ignore_eos=True)
    runs = [list(generate(random_model(initializer_range=0.02), [1, 2], params, sample_index=i)) for i in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_repetition_penalty_reaches_the_prompt_and_the_output() -> None:
    model = random_model()
    params = SamplingParams(temperature=0, repetition_penalty=1e9, max_tokens=20, ignore_eos=True)
    tokens = [1, 2, *generate(model, [1, 2], params)]
    assert len(set(tokens)) == len(tokens)


def test_generation_ends_where_the_positions_end() -> None:
    """12 positions and a prompt of 10: one token from prefill, then steps at positions 10 and 11."""
    model = random_model(max_position_embeddings=12)
    assert len(list(generate(model, list(range(10)), SamplingParams(temperature=0, max_tokens=50)))) == 3


def test_bad_prompts_are_refused() -> None:
    model = random_model(max_position_embeddings=12)
    with pytest.raises(RequestError, match="prompt is empty"):
        prefill(model, [])
    with pytest.raises(RequestError, match="13 tokens, the model has 12 positions"):
        prefill(model, [1] * 13)
    for token in (131, -1):
        with pytest.raises(RequestError, match=f"Token id {token} is outside the vocabulary of 131"):
            prefill(model, [1, token])


def test_logits_are_float32_and_of_the_last_position_only() -> None:
    logits, cache = prefill(random_model(dtype=torch.bfloat16), [1, 2, 3])
    assert logits.shape == (131,) and logits.dtype == torch.float32
    assert decode(random_model(dtype=torch.bfloat16), 4, cache).shape == (131,)
