"""`minillm bench latency`: TTFT by prompt length and TPOT by context, next to what the machine allows.

Every row is one run of `interleaved`: minillm, its rival and the machine's own ceilings take turns. So the speed-up
and the share of the bound compare what ran on the same machine in the same seconds, whatever else goes on there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from minillm.config import ModelConfig
from minillm.costs import formulas
from minillm.costs.steps import Step, decode_step, prefill_step
from minillm.errors import ConfigError
from minillm.measure.bench import Quartiles, Timing, interleaved, pair_ratio
from minillm.measure.bench_subjects import MinillmSubject, Subject
from minillm.measure.hardware import Hardware, dtype_name, matmul_patterns, matmul_size, read_buffer, read_patterns
from minillm.model.decoder import Decoder

DECODE_STEPS = 8  # tokens per repeat of decode: one alone is too short to time well, and its caches are cold
OURS = "minillm"


@dataclass(frozen=True)
class Bound:
    """What a phase must do, and what the machine could do in the same rounds."""

    bytes_read: int
    flops: int
    read_bandwidth: float  # byte/s
    matmul_rate: float  # FLOP/s
    cache_bytes: int = 0  # of the last-level cache, whose bandwidth is not what was measured

    @property
    def from_memory(self) -> bool:
        """Whether the bytes must come from memory; what fits into the largest cache may stay there."""
        return self.bytes_read > self.cache_bytes

    @property
    def seconds(self) -> float:
        """No program is faster: all bytes at the read bandwidth, or all FLOPs at the matmul rate."""
        reading = self.bytes_read / self.read_bandwidth if self.from_memory else 0.0
        return max(reading, self.flops / self.matmul_rate)


@dataclass(frozen=True)
class LatencyRow:
    """One prompt length, or one context: who took how long, and the bound."""

    phase: Literal["prefill", "decode"]
    tokens: int  # in the prompt; in the cache before the first decoded token
    timings: dict[str, Timing]  # seconds per prefill (TTFT), or per decoded token (TPOT), by subject
    bound: Bound

    def share_of_bound(self, subject: str = OURS) -> float:
        """How near a subject comes to the bound: 1.0 reaches it, 0.5 takes twice as long."""
        return self.bound.seconds / self.timings[subject].median

    def speedup(self, rival: str) -> Quartiles:
        """How many times as long as minillm the rival takes, pair by pair."""
        return pair_ratio(self.timings[rival], self.timings[OURS])

    def to_json(self) -> dict[str, Any]:
        """All repeats in milliseconds, their quartiles, and everything that the bound is computed from."""
        return {
            "phase": self.phase,
            "tokens": self.tokens,
            "bound_ms": 1e3 * self.bound.seconds,
            "bound": vars(self.bound),
            "speedup": {name: self.speedup(name)._asdict() for name in self.timings if name != OURS},
            "subjects": {name: self._subject_json(name) for name in self.timings},
        }

    def _subject_json(self, name: str) -> dict[str, Any]:
        timing = self.timings[name]
        quartiles = {f"{key}_ms": 1e3 * getattr(timing, key) for key in ("low", "median", "high")}
        return quartiles | {"share_of_bound": self.share_of_bound(name), "times_ms": [1e3 * t for t in timing.times]}


class Ceilings:
    """Reads and products that run in the same rounds as the subjects; their best repeat is the machine's peak."""

    def __init__(self, hardware: Hardware, device: torch.device, dtype: torch.dtype) -> None:
        buffer = read_buffer(hardware.machine, device)
        rates = hardware.matmul_rate
        size = matmul_size(rates.get(dtype_name(dtype), rates["float32"]))
        self.cache_bytes = hardware.machine.last_level_cache
        self.bytes_read, self.flops = buffer.nbytes, 2 * size**3
        self.reads, self.products = read_patterns(buffer), matmul_patterns(size, dtype, device)

    @property
    def candidates(self) -> dict[str, Callable[[], object]]:
        """What to hand to `interleaved` beside the subjects."""
        return self.reads | self.products

    def bound(self, bytes_read: int, flops: int, timings: Mapping[str, Timing]) -> Bound:
        """The bound of a phase that reads and computes this much, from the peaks found in these rounds."""
        bandwidth = self.bytes_read / min(timings[name].best for name in self.reads)
        rate = self.flops / min(timings[name].best for name in self.products)
        return Bound(bytes_read, flops, bandwidth, rate, self.cache_bytes)


class LatencyBench:
    """A model, its rivals and the machine's ceilings, ready to take turns.

    `hardware` gives only sizes; the peaks are measured again in every row. Prompts are random tokens of `seed`.
    """

    def __init__(
        self,
        model: Decoder,
        hardware: Hardware,
        rivals: Mapping[str, Subject] | None = None,
        *,
        repeats: int = 10,
        seed: int = 0,
    ) -> None:
        self.config, self.repeats, self.seed = model.config, repeats, seed
        self.element_bytes = model.dtype.itemsize
        self.subjects: dict[str, Subject] = {OURS: MinillmSubject(model), **(rivals or {})}
        self.ceilings = Ceilings(hardware, model.device, model.dtype)
        self.sync = torch.cuda.synchronize if model.device.type == "cuda" else None

    @torch.inference_mode()
    def prefill(self, tokens: int) -> LatencyRow:
        """TTFT of a prompt of `tokens` tokens: the whole first step, head included."""
        prompt = self._prompt(tokens)
        timings = self._take_turns({name: partial(s.prefill, prompt) for name, s in self.subjects.items()})
        bound = self._bound(prefill_step(tokens), timings)
        return LatencyRow("prefill", tokens, {name: timings[name] for name in self.subjects}, bound)

    @torch.inference_mode()
    def decode(self, context: int) -> LatencyRow:
        """TPOT after `context` cached tokens: the mean of `DECODE_STEPS` steps; the bound is for the middle one."""
        prompt = self._prompt(context)
        for subject in self.subjects.values():
            subject.prefill(prompt)
        turns = {name: partial(s.decode, context, DECODE_STEPS) for name, s in self.subjects.items()}
        timings = self._take_turns(turns)
        bound = self._bound(decode_step(context + (DECODE_STEPS + 1) // 2), timings)
        return LatencyRow("decode", context, {name: timings[name].per(DECODE_STEPS) for name in self.subjects}, bound)

    def _bound(self, step: Step, timings: Mapping[str, Timing]) -> Bound:
        bytes_read = formulas.least_bytes(self.config, step, self.element_bytes)
        return self.ceilings.bound(bytes_read, formulas.step_flops(self.config, step).total, timings)

    def _prompt(self, tokens: int) -> list[int]:
        return random.Random(self.seed).choices(range(self.config.vocab_size), k=tokens)

    def _take_turns(self, turns: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
        return interleaved({**turns, **self.ceilings.candidates}, repeats=self.repeats, sync=self.sync)


def bench_latency(bench: LatencyBench, *, prompts: Sequence[int], contexts: Sequence[int]) -> Iterator[LatencyRow]:
    """Measure prefill at each prompt length, then decode at each context; yield each row as soon as it is known.

    Raises `ConfigError`, before anything runs, for lengths that the model has no positions for.
    """
    check_lengths(bench.config, [*prompts, *(context + DECODE_STEPS for context in contexts)])
    return (measure(n) for measure, counts in ((bench.prefill, prompts), (bench.decode, contexts)) for n in counts)


def check_lengths(config: ModelConfig, lengths: Sequence[int]) -> None:
    """Refuse sequences that this model has no positions for."""
    wrong = [length for length in lengths if not 1 <= length <= config.max_position_embeddings]
    if wrong:
        raise ConfigError(
            f"A sequence of {wrong[0]} tokens cannot be measured: this model has {config.max_position_embeddings} "
            f"positions, and decode needs {DECODE_STEPS} of them after its context. Choose shorter lengths, at least 1."
        )
