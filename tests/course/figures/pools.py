"""Snapshots of a pool in which real requests come and go, for the figures that draw them."""

from __future__ import annotations

from minillm.engine.engine import Engine
from minillm.measure.snapshot import PoolSnapshot
from minillm.sampling import SamplingParams
from tests.engine.scripted import scripted_engine
from tests.engine.workloads import VOCAB


def busy_engine(**changes: object) -> Engine:
    """An engine with 20 blocks of 4 tokens and a scripted model."""
    return scripted_engine(**({"num_blocks": 21, "block_size": 4, "max_num_seqs": 6} | changes))


def add(engine: Engine, name: str, prompt: list[int], max_tokens: int, n: int = 1) -> None:
    params = SamplingParams(temperature=0 if n == 1 else 1, max_tokens=max_tokens, n=n, ignore_eos=True, seed=0)
    engine.add([token % VOCAB for token in prompt], params, request_id=name)


def shot(engine: Engine) -> PoolSnapshot:
    """Every running request by its id, further completions by their number, too."""
    return PoolSnapshot.take(
        engine.pool,
        {
            s.request_id + (str(s.index) if s.index else ""): (s.table, s.tokens[: s.num_computed])
            for s in engine.scheduler.running
        },
    )


def story() -> tuple[list[PoolSnapshot], list[str]]:
    """A and C share two blocks; A ends, C stays; then everybody is gone and the cache remembers."""
    engine, shots = busy_engine(), []
    add(engine, "A", [1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4], 4)
    add(engine, "B", [6, 5, 4, 3, 2], 12)
    for name, steps in (("", 1), ("C", 1), ("", 3), ("", 20)):
        if name:
            add(engine, name, [1, 2, 3, 4, 5, 6, 0, 1, 5, 5, 5, 5, 5], 9)
        for _ in range(steps):
            engine.step()
        shots.append(shot(engine))
    return shots, ["A and B are read", "C begins like A", "A has ended", "all have ended"]


def forked(n: int) -> list[PoolSnapshot]:
    """A prompt read once for n completions, and the step after, in which all but one copy the block they share."""
    engine = busy_engine()
    add(engine, "A", [1, 2, 3, 4, 5, 6], 4, n=n)
    shots = []
    for _ in range(2):
        engine.step()
        shots.append(shot(engine))
    return shots
