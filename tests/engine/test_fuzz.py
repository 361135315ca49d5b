"""Whoever shares the batch, the tokens are those of running alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

from minillm.config import POLICIES
from minillm.engine.engine import Engine
from minillm.generate import generate
from minillm.model.decoder import Decoder
from minillm.sampling import SamplingParams
from tests.engine import scripted
from tests.engine.scripted import scripted_engine
from tests.engine.workloads import EOS, VOCAB, Completions, Workload, compare, play, random_workload
from tests.families import random_model


@cache
def tiny_model() -> Decoder:
    """Two layers, hidden size 32, float32: as small as a model with grouped heads can be."""
    return random_model(
        "smollm2",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        eos_token_id=EOS,
    )


@cache
def stream(prompt: tuple[int, ...], params: SamplingParams, index: int) -> list[int]:
    """What a completion gets if nothing ends it."""
    return list(generate(tiny_model(), prompt, params, sample_index=index))


Stream = Callable[[tuple[int, ...], SamplingParams, int], list[int]]


def alone(prompt: tuple[int, ...], params: SamplingParams, index: int, stream: Stream = stream) -> list[int]:
    """What a completion gets that has the machine to itself: its stream, up to where its parameters end it."""
    endless = replace(params, max_tokens=6, ignore_eos=True, stop_token_ids=None, n=1)
    if params.greedy:
        endless, index = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), 0
    tokens = stream(prompt, endless, index)[: params.max_tokens]
    ends = [place for place, token in enumerate(tokens) if params.ends_with(token, (EOS,))]
    return tokens[: ends[0] + 1] if ends else tokens


def alone_all(workload: Workload, stream: Stream = stream) -> Completions:
    return {
        (str(number), index): alone(request.prompt, request.params, index, stream)
        for number, request in enumerate(workload.requests)
        for index in range(request.params.n)
    }


@pytest.fixture
def num_seeds(request: pytest.FixtureRequest) -> int:
    """Workloads per policy."""
    return -(-request.config.getoption("--workloads") // len(POLICIES))


@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_are_those_of_running_alone(policy: str, num_seeds: int) -> None:
    """Real attention over real blocks, in float32 on the CPU. Longer by hand: pytest --workloads 100000."""
    for seed in range(num_seeds):
        workload = random_workload(seed, policy)
        try:
            got = play(Engine(tiny_model(), workload.config), workload)
            compare(got, alone_all(workload), workload)
        except Exception as error:
            raise AssertionError(f"seed {seed}, policy {policy}: {error}\n{workload}") from error


@pytest.mark.parametrize("policy", POLICIES)
def test_blocks_and_packing_against_a_scripted_model(policy: str, num_seeds: int) -> None:
    """The same without arithmetic: every slot that is read must hold what was written for this very sequence."""
    for seed in range(num_seeds):
        workload = random_workload(seed, policy)
        try:
            compare(play(scripted_engine(workload.config), workload), scripted.alone_all(workload), workload)
        except Exception as error:
            raise AssertionError(f"seed {seed}, policy {policy}: {error}\n{workload}") from error
