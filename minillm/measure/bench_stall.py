"""`minillm bench stall`: how long others wait when a long prompt arrives, and how long the prompt waits if they do not.

Some requests decode; a long prompt arrives. If all of it goes into the next step, all others wait for it: one gap
between two of their tokens is as long as a prefill. If a step has a budget of tokens and takes decodes first
(Sarathi-Serve, Agrawal et al. 2024), the gaps stay short and the newcomer waits longer. The budget chooses between the
two; here all choices take turns in one run.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from minillm.config import EngineConfig, ModelConfig
from minillm.costs.steps import chunk_steps, decode_step
from minillm.engine.engine import Engine
from minillm.errors import ConfigError
from minillm.measure.bench import Quartiles, quartiles
from minillm.measure.roof import Roof, step_seconds
from minillm.model.decoder import Decoder
from minillm.sampling import SamplingParams

QUIET_STEPS, TAIL_STEPS = 16, 8  # steps before the arrival, and after its first token


@dataclass(frozen=True)
class Arrival:
    """One prompt that arrived among running decodes; times in seconds since its arrival."""

    ttft: float  # of the newcomer
    others: tuple[tuple[float, ...], ...]  # when each of the others got its tokens, from before the arrival on

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """(start, end) of every gap between two tokens of the others."""
        return [gap for times in self.others for gap in pairwise(times)]

    @property
    def quiet_itl(self) -> float:
        """The median gap of the others before the prompt arrived."""
        return median(end - start for start, end in self.gaps if end <= 0)

    @property
    def worst_itl(self) -> float:
        """The longest gap of the others during the newcomer's prefill."""
        return max(end - start for start, end in self.gaps if end > 0 and start < self.ttft)

    @property
    def ratio(self) -> float:
        """The longest gap as a multiple of the usual one."""
        return self.worst_itl / self.quiet_itl


@dataclass(frozen=True)
class StallRow:
    """One way to schedule, and everything that happened under it."""

    policy: str
    budget: int
    arrivals: list[Arrival] = field(default_factory=list)

    def spread(self, name: str) -> Quartiles:
        """Quartiles over the arrivals of "ttft", "worst_itl", "quiet_itl" (seconds) or "ratio"."""
        return quartiles([getattr(arrival, name) for arrival in self.arrivals])

    def to_json(self, *, detailed: bool = False) -> dict[str, Any]:
        """Quartiles [low, median, high] in ms, of "ratio" without unit; `detailed` adds all token times."""
        spreads = {f"{name}_ms": [1e3 * q for q in self.spread(name)] for name in ("ttft", "worst_itl", "quiet_itl")}
        setting = {"policy": self.policy, "max_num_batched_tokens": self.budget}
        arrivals = {"arrivals": [asdict(arrival) for arrival in self.arrivals]} if detailed else {}
        return setting | spreads | {"ratio": list(self.spread("ratio"))} | arrivals


class StallBench:
    """Engines that differ only in policy and budget, and the same prompts for all of them.

    choices: (policy, token budget per step). num_running sequences of `context` prompt tokens decode when `prompt`
    tokens arrive. Raises `ConfigError` for a budget that leaves the newcomer nothing, and for lengths that the model
    has no positions for.
    """

    def __init__(
        self,
        model: Decoder,
        choices: Sequence[tuple[str, int]],
        *,
        num_running: int = 8,
        context: int = 128,
        prompt: int = 2048,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.max_tokens = _longest_run(model.config, min(budget for _, budget in choices), num_running, context, prompt)
        rng, vocabulary = random.Random(seed), range(model.config.vocab_size)
        self.running = [rng.choices(vocabulary, k=context) for _ in range(num_running)]
        self.newcomer = rng.choices(vocabulary, k=prompt)
        self.rows = [StallRow(policy, budget) for policy, budget in choices]
        self.engines = [self._engine(row) for row in self.rows]

    def _engine(self, row: StallRow, block_size: int = 16) -> Engine:
        """An engine with enough blocks for all: a preemption would be another kind of stall."""
        longest = [len(prompt) + self.max_tokens for prompt in self.running] + [len(self.newcomer) + self.max_tokens]
        num_blocks = 2 + sum(-(-length // block_size) for length in longest)
        return Engine(
            self.model,
            EngineConfig(
                policy=row.policy,
                max_num_batched_tokens=row.budget,
                max_num_seqs=len(self.running) + 1,
                num_blocks=num_blocks,
                block_size=block_size,
                trace_bytes=0,
            ),
        )

    def bound(self, row: StallRow, roof: Roof) -> tuple[float, float]:
        """(TTFT, longest gap) in seconds that no program on this roof beats, when `row` schedules.

        `mixed` adds the decodes to each chunk and pays for the longest step; otherwise the gap is the whole prefill.
        """
        config, element_bytes = self.model.config, self.model.dtype.itemsize
        decodes = decode_step(len(self.running[0]) + QUIET_STEPS, len(self.running))
        mixed = row.policy == "mixed"
        chunks = chunk_steps(len(self.newcomer), row.budget - len(decodes) if mixed else row.budget)
        steps = [[*decodes, *chunk] if mixed else chunk for chunk in chunks]
        seconds = [step_seconds(config, step, element_bytes, roof) for step in steps]
        after = step_seconds(config, decodes, element_bytes, roof)
        return sum(seconds), max(seconds) if mixed else sum(seconds) + after

    def run(self, repeats: int, progress: Callable[[str], object] = lambda turn: None) -> list[StallRow]:
        """Let the prompt arrive `repeats` times under each choice, in turns, after a first time that does not count."""
        for number in range(repeats + 1):
            for row, engine in zip(self.rows, self.engines, strict=True):
                progress(f"{row.policy} {row.budget}, {f'round {number} of {repeats}' if number else 'warm-up'}")
                arrival = arrive(engine, self.running, self.newcomer, self.max_tokens, cache_salt=str(number))
                row.arrivals.extend([arrival] if number else [])
        return self.rows


def _longest_run(config: ModelConfig, budget: int, running: int, context: int, prompt: int) -> int:
    """Tokens that a running sequence may need under the tightest budget, from its start to the end of the tail."""
    if budget <= running:
        raise ConfigError(
            f"A budget of {budget} tokens per step is used up by {running} decodes, and no token is left for a prompt. "
            "Choose larger budgets or fewer running sequences."
        )
    steps = -(-(running * context + prompt) // (budget - running)) + QUIET_STEPS + TAIL_STEPS + 2
    needed = max(context, prompt) + steps
    if needed > config.max_position_embeddings:
        raise ConfigError(
            f"With a budget of {budget}, {needed} positions may be needed; the model has "
            f"{config.max_position_embeddings} positions. Choose a shorter prompt or larger budgets."
        )
    return steps


def arrive(
    engine: Engine, running: Sequence[list[int]], newcomer: list[int], max_tokens: int, *, cache_salt: str | None = None
) -> Arrival:
    """Start the running requests, decode a few tokens, add the newcomer, and decode a few tokens more.

    The newcomer arrives between two steps. `cache_salt`: choose another each time, or the prefix cache has its prompt.
    """
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    tokens: dict[str, list[float]] = defaultdict(list)  # times by request

    def step_until(ids: Sequence[str], count: int) -> None:
        while min(len(tokens[i]) for i in ids) < count:
            for event in engine.step():
                tokens[event.request.request_id].append(event.time)

    ids = [engine.add(prompt, params) for prompt in running]
    step_until(ids, QUIET_STEPS)
    before = min(len(tokens[i]) for i in ids)
    for times in tokens.values():
        del times[:-before]
    arrival = time.perf_counter()
    new = engine.add(newcomer, params, cache_salt=cache_salt)
    step_until([new], 1 + TAIL_STEPS)
    for request_id in [*ids, new]:
        engine.abort(request_id)
    since = {i: tuple(at - arrival for at in times) for i, times in tokens.items()}
    return Arrival(since[new][0], tuple(since[i] for i in ids))
