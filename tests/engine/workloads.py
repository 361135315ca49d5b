"""Random workloads for the engine: everything that has broken serving engines, small and often.

Prompts end around block boundaries and share beginnings, requests fork, arrive and leave at any moment, pools hold
barely one request, budgets start at one token per step.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from minillm.config import EngineConfig
from minillm.engine.engine import Engine
from minillm.sampling import SamplingParams

VOCAB = 24
EOS = 3
Completions = dict[tuple[str, int], list[int]]


@dataclass(frozen=True)
class Request:
    """One request of a workload; steps are counted from its start."""

    prompt: tuple[int, ...]
    params: SamplingParams
    arrive: int = 0
    abort: int | None = None
    abort_in_flight: bool = False  # in the middle of the step, while the model runs
    salt: str | None = None


@dataclass(frozen=True)
class Workload:
    config: EngineConfig
    requests: tuple[Request, ...]


def random_workload(seed: int, policy: str) -> Workload:
    """The workload that a seed stands for."""
    rng = random.Random(f"{policy} {seed}")
    block_size = rng.choice([1, 2, 4, 8])
    requests = tuple(_random_request(rng, block_size) for _ in range(rng.randint(1, 5)))
    largest = max(-(-(len(r.prompt) + r.params.max_tokens - 1) // block_size) for r in requests)
    config = EngineConfig(
        policy=policy,
        block_size=block_size,
        num_blocks=1 + largest + rng.choice([0, 0, 1, 2, 3, 5, 8, 30]),
        max_num_seqs=max(rng.randint(1, 6), *(r.params.n for r in requests), 1),
        max_num_batched_tokens=rng.choice([1, 3, 8, 16, 64]),
        enable_prefix_caching=rng.random() < 0.8,
        debug=True,
    )
    return Workload(config, requests)


def _random_request(rng: random.Random, block_size: int) -> Request:
    length = max(1, rng.randint(0, 3) * block_size + rng.choice([-1, 0, 0, 1]))
    branch = rng.choice([0, length // 2, length])
    own = random.Random(rng.randrange(4))
    prompt = [5] * branch + [own.randrange(VOCAB) for _ in range(length - branch)]  # alike, then one of four ways
    params = SamplingParams(
        n=rng.choice([1, 1, 1, 2, 3]),
        max_tokens=rng.randint(1, 6),
        temperature=rng.choice([0.0, 0.0, 1.0]),
        top_k=rng.choice([0, 4]),
        seed=rng.randrange(3),
        ignore_eos=rng.random() < 0.5,
        stop_token_ids=rng.choice([None, (7,)]),
    )
    return Request(
        prompt=tuple(prompt),
        params=params,
        arrive=rng.choice([0, 0, rng.randint(0, 8)]),
        abort=rng.choice([None] * 6 + [rng.randint(0, 12)]),
        abort_in_flight=rng.random() < 0.5,
        salt=rng.choice([None] * 5 + ["salt"]),
    )


def play(engine: Engine, workload: Workload, max_steps: int = 5000) -> Completions:
    """Serve a workload, checking every invariant after each step; what each completion got.

    Afterwards every block must be free and no request remembered.
    """
    got: Completions = {}
    for step in range(max_steps):
        for number, request in enumerate(workload.requests):
            if request.arrive == step:
                engine.add(request.prompt, request.params, request_id=str(number), salt=request.salt)
        leaving = [(str(n), r.abort_in_flight) for n, r in enumerate(workload.requests) if r.abort == step]
        for name in [name for name, in_flight in leaving if not in_flight]:
            engine.abort(name)
            engine.scheduler.check()
        with _leaving_in_flight(engine, [name for name, in_flight in leaving if in_flight]):
            events = engine.step()
        poison_free_blocks(engine)
        for event in events:
            got.setdefault((event.request.request_id, event.request.index), []).extend(event.token_ids)
        if not engine.has_unfinished and step >= max(r.arrive for r in workload.requests):
            break
    else:
        raise AssertionError(f"not done after {max_steps} steps")
    assert engine.pool.num_free == engine.pool.num_usable, "blocks leaked"
    assert not engine._live, "requests leaked"
    return got


def poison_free_blocks(engine: Engine) -> None:
    """Fill every block that nobody owns or remembers with NaN: whoever reads what it did not write is found."""
    stale = torch.tensor([b.id for b in engine.pool.blocks if b.ref_count == 0 and b.prefix is None])
    for pool in engine.runner.cache.tensors:
        pool[:, stale] = torch.nan if pool.dtype.is_floating_point else 255  # as float8 that is NaN, too


@contextmanager
def _leaving_in_flight(engine: Engine, names: list[str]) -> Iterator[None]:
    """Abort requests while the model is running."""
    run = engine.runner.run

    def interrupted(batch: Any) -> Any:
        for name in names:
            engine.abort(name)
            engine.scheduler.check()
        return run(batch)

    engine.runner.run = interrupted  # type: ignore[method-assign]
    yield
    engine.runner.run = run  # type: ignore[method-assign]


def compare(got: Completions, want: Completions, workload: Workload) -> None:
    """Every completion as if it had run alone; what an aborted request got must be a beginning of that."""
    for (name, index), tokens in want.items():
        served = got.get((name, index), [])
        if workload.requests[int(name)].abort is not None:
            tokens = tokens[: len(served)]
        assert served == tokens, f"request {name}, completion {index}"
    assert set(got) <= set(want)
