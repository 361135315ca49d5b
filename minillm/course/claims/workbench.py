"""What the claims are tried on: models, an engine, counters, a stopwatch. Each is made when it is first needed.

Counts come from the embedded model in float32, where equal means equal, or from well-known shapes without memory
(`minillm.measure.stepper.weightless`). Times come from a random model that is large enough to be no toy.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from minillm.cache.contiguous import ContiguousCache
from minillm.config import EngineConfig
from minillm.costs.steps import Step, decode_step, prefill_step, verify_step
from minillm.engine.engine import Engine
from minillm.engine.trace import StepRecord
from minillm.measure.bench import Timing, interleaved
from minillm.measure.bench_latency import Ceilings
from minillm.measure.counters import Counter
from minillm.measure.hardware import Hardware, dtype_name, measure_hardware
from minillm.measure.roof import Roof, ridge_rows
from minillm.measure.stepper import StepRunner, weightless
from minillm.model.decoder import Attend, Decoder
from minillm.model.loader import load_model
from minillm.model.tokenizer import Tokenizer, load_tokenizer
from minillm.sampling import SamplingParams
from minillm.shapes import named_shape

TIMED = "random:smollm2-135m"
REPEATS = 5
CLOSE = 1e-3  # logits that differ by less, in float32, are the same up to rounding


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference between two tensors of logits."""
    return float((ours - theirs).abs().max())


@dataclass(frozen=True)
class Served:
    """What an engine made of some requests: the new tokens of each, in order, and the record of every step."""

    tokens: list[list[int]]
    steps: list[StepRecord]

    @property
    def decodes(self) -> list[StepRecord]:
        """Steps in which somebody decoded."""
        return [step for step in self.steps if any(part.phase == "decode" for part in step.requests)]


class Workbench:
    """Makes the same models and prompts every time; `seed` draws the prompts."""

    def __init__(self, model: str = "tiny", seed: int = 0) -> None:
        self.name, self.seed = model, seed
        self._shapes: dict[str, Decoder] = {}
        self._counted: dict[tuple[int, tuple[tuple[int, int], ...]], Counter] = {}

    # Models

    @cached_property
    def tiny(self) -> Decoder:
        """The embedded model in float32."""
        return load_model(self.name, device="cpu", dtype="float32", progress=False)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""
        tokenizer = load_tokenizer(self.name)
        assert tokenizer is not None
        return tokenizer

    def shape(self, name: str) -> Decoder:
        """A well-known shape without memory, to be counted."""
        if name not in self._shapes:
            self._shapes[name] = weightless(named_shape(name))
        return self._shapes[name]

    def prompt(self, length: int, salt: int = 0) -> list[int]:
        """Random tokens; another `salt` gives others."""
        return random.Random(f"{self.seed}/{salt}").choices(range(self.tiny.config.vocab_size), k=length)

    # Runs

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], attend: Attend | None = None) -> Tensor:
        """Logits [len(tokens), vocab_size] of the tiny model after every token, all in one step."""
        hidden = self.tiny(torch.tensor(tokens), torch.arange(len(tokens)), attend or self.cache(len(tokens)).attend)
        return self.tiny.logits(hidden)

    def cache(self, capacity: int) -> ContiguousCache:
        """An empty contiguous cache for the tiny model."""
        return ContiguousCache(self.tiny.config, capacity=capacity, device=self.tiny.device, dtype=self.tiny.dtype)

    def engine(self, **settings: Any) -> Engine:
        """An engine on the tiny model: 256 blocks of 16 tokens, no prefix cache unless asked for."""
        defaults = {"num_blocks": 256, "block_size": 16, "enable_prefix_caching": False}
        return Engine(self.tiny, EngineConfig(**(defaults | settings)))

    def serve(self, engine: Engine, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Served:
        """Give an engine some prompts at once; each gets exactly so many greedy tokens."""
        before = engine.trace[-1].step if engine.trace else -1
        ids = []
        for prompt, length in zip(prompts, lengths, strict=True):
            ids.append(engine.add(prompt, SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)))
        tokens: dict[str, list[int]] = {request: [] for request in ids}
        for event in engine.run():
            tokens[event.request.request_id] += event.token_ids
        return Served([tokens[request] for request in ids], [step for step in engine.trace if step.step > before])

    def count(self, model: Decoder, step: Step) -> Counter:
        """One step of a model under the counter. Several claims look at the same steps: each is run once."""
        key = id(model), tuple(step)
        if key not in self._counted:
            run = StepRunner(model, step)
            with Counter(model, kv=run.cache) as self._counted[key]:
                run()
        return self._counted[key]

    # Time

    @cached_property
    def hardware(self) -> Hardware:
        """This machine's measured ceilings."""
        return measure_hardware("cpu")

    @cached_property
    def timed(self) -> Decoder:
        """A model whose weights no cache holds, in the dtype that this machine is fast in."""
        return load_model(TIMED, device="cpu", progress=False)

    @property
    def wide(self) -> torch.dtype:
        """A dtype of twice as many bytes as the timed model's."""
        return torch.float32 if self.timed.dtype.itemsize == 2 else torch.float64

    @cached_property
    def knee(self) -> int:
        """T*: rows from which the timed model's largest layers should be bound by computing, on this machine."""
        config, ridge = self.timed.config, self.hardware.roof(dtype_name(self.timed.dtype)).ridge
        rows = ridge_rows(config.hidden_size, 2 * config.intermediate_size, self.timed.dtype.itemsize, ridge)
        return max(4, round(min(rows, 64)))

    @cached_property
    def timed_steps(self) -> dict[str, Step]:
        """The steps that claims about time look at: few rows and many, by prompt and by batch, short and long."""
        few, many = self.knee // 2, 8 * self.knee
        return {
            "decode": decode_step(128),
            "decode, long context": decode_step(1024),
            "decode, batch 16": decode_step(128, 16),
            "prefill, few": prefill_step(few),
            "prefill, many": prefill_step(many),
            "prefill, twice as many": prefill_step(2 * many),
            "verify": verify_step(128, drafts=5),
            "verify, batch 16": verify_step(128, drafts=5, batch=16),
        }

    @cached_property
    def _timings(self) -> tuple[dict[str, Timing], Roof]:
        """Everything that is timed takes turns with reads and products that find the machine's ceilings.

        So times and ceilings come from the same seconds, whatever else goes on. Noise only ever adds time: the best
        repeat counts, of both.
        """
        runs: dict[str, Callable[[], object]] = {
            name: StepRunner(self.timed, step) for name, step in self.timed_steps.items()
        }
        runs["decode, tiny"] = StepRunner(self.tiny, decode_step(128))
        wide = load_model(TIMED, device="cpu", dtype=dtype_name(self.wide), progress=False)
        runs["decode, wide"] = StepRunner(wide, decode_step(128))
        ceilings = Ceilings(self.hardware, self.timed.device, self.timed.dtype)
        with torch.inference_mode():
            timings = interleaved(runs | ceilings.candidates, repeats=REPEATS)
        peak = ceilings.bound(0, 0, timings)
        return timings, Roof(peak.matmul_rate, peak.read_bandwidth)

    @property
    def roof(self) -> Roof:
        """This machine's ceilings in the timed model's dtype, found beside the steps."""
        return self._timings[1]

    def seconds(self, name: str) -> float:
        """The time of one of `timed_steps`, of "decode, tiny", or of "decode, wide"."""
        return self._timings[0][name].best
