"""Throughput: everybody returns the tokens that were asked for, of the right prompts, in the same rounds."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from minillm.config import EngineConfig
from minillm.engine.engine import Engine
from minillm.errors import MinillmError, RequestError
from minillm.measure import bench_throughput as module
from minillm.measure.bench import Timing
from minillm.measure.bench_throughput import (
    CONTINUOUS,
    GENERATE,
    OURS,
    MinillmServer,
    Throughput,
    bench_throughput,
    transformers_servers,
)
from minillm.measure.workloads import SampleRequest
from tests.families import random_model


def requests(count: int, seed: int = 0) -> list[SampleRequest]:
    rng = random.Random(seed)
    return [SampleRequest(rng.choices(range(131), k=rng.randint(3, 40)), rng.randint(2, 9)) for _ in range(count)]


class Recorder:
    def __init__(self) -> None:
        self.served: list[Sequence[SampleRequest]] = []

    def run(self, requests: Sequence[SampleRequest]) -> None:
        self.served.append(requests)


def test_tokens_per_second_and_speedup_are_those_of_the_rounds() -> None:
    timings = {OURS: Timing((2.0, 4.0, 2.5)), "rival": Timing((6.0, 8.0, 10.0))}
    result = Throughput(100, 50, timings, [])
    assert result.tokens_per_second(OURS) == 20 and result.tokens_per_second("rival") == 6.25
    assert result.speedup("rival") == pytest.approx((2.5, 3, 3.5)), "pairs 3, 2, 4"


def test_everybody_takes_turns_with_the_same_requests() -> None:
    engine = Engine(random_model(), EngineConfig(num_blocks=64))
    rivals = {"one": Recorder(), "other": Recorder()}
    turns: list[str] = []
    asked = requests(6)
    result = bench_throughput(engine, asked, rivals, repeats=2, progress=turns.append)
    for rival in rivals.values():
        assert [len(list_) for list_ in rival.served] == [4, 6, 6] and rival.served[1] == asked
    assert turns == [
        *("minillm, warm-up", "one, warm-up", "other, warm-up"),
        *("minillm, round 1 of 2", "one, round 1 of 2", "other, round 1 of 2"),
        *("minillm, round 2 of 2", "one, round 2 of 2", "other, round 2 of 2"),
    ]
    assert result.new_tokens == sum(r.max_tokens for r in asked) and len(result.runs) == 2
    data = json.loads(json.dumps(result.to_json()))
    assert len(data["subjects"]["one"]["times_s"]) == 2 and "speedup" not in data["subjects"][OURS]
    assert data["engine"]["decode_overhead"]["batch"] >= 1


def test_no_round_is_served_from_the_cache_of_another() -> None:
    server = MinillmServer(Engine(random_model(), EngineConfig(num_blocks=64)))
    asked = requests(3)
    for _ in range(2):
        server.run(asked)
    assert [served.num_cached for run in server.runs for served in run.served] == [0] * 6


def test_transformers_serves_all_tokens_both_ways() -> None:
    """Ragged prompts and outputs, in batches of three: `run` raises if a token is missing."""
    model = random_model("qwen3-tied")
    servers = transformers_servers(model, batch_size=3, max_tokens=64)
    for server in servers.values():
        server.run(requests(7))
        server.run([SampleRequest([5, 6, 7], 3, temperature=0.6)])


def test_generate_reads_the_right_prompts() -> None:
    """In a padded batch each request continues as alone: the oracle is `generate` on one prompt without padding."""
    model = random_model()
    server = transformers_servers(model, batch_size=4, max_tokens=64)[GENERATE]
    assert isinstance(server, module.TransformersGenerate)
    outputs: list[list[list[int]]] = []
    generate = server.model.generate

    def note(*arguments: object, **options: object) -> torch.Tensor:
        outputs.append(generate(*arguments, **options).tolist())
        return torch.tensor(outputs[-1])

    server.model.generate = note
    asked = requests(4, seed=3)
    server.run(asked)
    for row, request in zip(outputs[0], asked, strict=True):
        server.run([request])
        alone = outputs[-1][0][len(request.prompt) :]
        width = len(row) - max(r.max_tokens for r in asked)
        assert row[width : width + request.max_tokens] == alone


def test_a_missing_token_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutants: a batch that stops early, and a manager that loses a request."""
    model = random_model()
    servers = transformers_servers(model, batch_size=4, max_tokens=64)
    early = SimpleNamespace(
        device=model.device, generate=lambda tokens, **_: tokens[:, :1].repeat(1, tokens.shape[1] + 2)
    )
    with pytest.raises(MinillmError, match="generate returned"):
        module.TransformersGenerate(early, 4).run([SampleRequest([1, 2], 3)])
    monkeypatch.setattr(module, "_collect", lambda manager, number: {})
    with pytest.raises(MinillmError, match="continuous returned 0 of 3 tokens"):
        servers[CONTINUOUS].run([SampleRequest([1, 2], 3)])
    engine = Engine(model, EngineConfig(num_blocks=4))
    with pytest.raises(RequestError, match="200 tokens"):
        MinillmServer(engine).run([SampleRequest([1], 2), SampleRequest([1] * 200, 3)])
