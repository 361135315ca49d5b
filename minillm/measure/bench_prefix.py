"""`minillm bench prefix`: how the time to first token falls with the share of the prompt that the cache knows.

What the cache knows is not computed again, so the work that is left falls with the share. The last token is always
computed, because its logits are needed, and its attention reads all cached tokens.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from minillm.config import ModelConfig
from minillm.engine.engine import Engine
from minillm.errors import ConfigError
from minillm.measure.bench import Quartiles, Timing, pair_ratio
from minillm.measure.bench_serve import serve
from minillm.measure.roof import Roof, step_seconds
from minillm.measure.workloads import SampleRequest

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class PrefixRow:
    """Prompts that share their beginning with one that was served before."""

    num_prompt: int
    num_shared: int
    num_cached: int  # what the cache found, in whole blocks
    timing: Timing  # TTFT, seconds

    def share_of_time(self, cold: PrefixRow) -> Quartiles:
        """TTFT as a share of the TTFT of a prompt that the cache does not know, round by round."""
        return pair_ratio(self.timing, cold.timing)

    def bound(self, config: ModelConfig, element_bytes: int, roof: Roof) -> float:
        """Seconds that the remaining tokens take at least, in one step after those that the cache knew."""
        left = [(self.num_prompt - self.num_cached, self.num_prompt)]
        return step_seconds(config, left, element_bytes, roof)

    def to_json(self) -> dict[str, Any]:
        times = {f"{name}_ms": 1e3 * getattr(self.timing, name) for name in ("low", "median", "high")}
        counts = {"num_prompt": self.num_prompt, "num_shared": self.num_shared, "num_cached": self.num_cached}
        return counts | times | {"ttfts": self.timing.times}


def bench_prefix(
    engine: Engine,
    *,
    prompt: int = 1024,
    shares: Sequence[float] = SHARES,
    repeats: int = 5,
    seed: int = 0,
    progress: Callable[[str], object] = lambda turn: None,
) -> list[PrefixRow]:
    """TTFT of prompts of `prompt` random tokens, the first `share` of which were served before; one row per share.

    The shares take turns, `repeats` rounds after one that does not count. What a prompt does not share is new each
    time. Raises `ConfigError` for a share outside 0 to 1.
    """
    if not all(0 <= share <= 1 for share in shares) or prompt < 1 or repeats < 1:
        raise ConfigError(
            f"prompt={prompt}, shares={list(shares)}, repeats={repeats}: choose shares from 0 to 1, and the others at "
            "least 1."
        )
    rng = random.Random(seed)
    lengths = [round(share * prompt) for share in shares]
    known = _tokens(engine, rng, prompt)
    _serve_one(engine, known)
    found = defaultdict[int, list[tuple[float, int]]](list)  # (TTFT, cached) by shared length
    for number in range(repeats + 1):
        progress(f"round {number} of {repeats}" if number else "warm-up")
        for length in lengths:
            found[length].append(_serve_one(engine, known[:length] + _tokens(engine, rng, prompt - length)))
    return [_row(prompt, length, found[length][1:]) for length in lengths]


def _tokens(engine: Engine, rng: random.Random, count: int) -> list[int]:
    return rng.choices(range(engine.model.config.vocab_size), k=count)


def _serve_one(engine: Engine, tokens: list[int]) -> tuple[float, int]:
    """TTFT and cached tokens of a prompt that has the engine to itself. Raises `ConfigError` if it does not fit."""
    (served,) = serve(engine, [SampleRequest(tokens, max_tokens=1)]).served
    if served.metrics.ttft is None:
        raise ConfigError(f"A prompt of {len(tokens)} tokens cannot be measured. {served.error}")
    return served.metrics.ttft, served.num_cached


def _row(prompt: int, shared: int, found: Sequence[tuple[float, int]]) -> PrefixRow:
    times, cached = zip(*found, strict=True)
    return PrefixRow(prompt, shared, min(cached), Timing(times))
