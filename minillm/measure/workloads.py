"""What a benchmark asks for: which requests, of which lengths, and when they come.

A workload is its fields and its seed, nothing else: the same fields give the same tokens on every machine. Prompts are
random token ids, and no request ends before its `max_tokens`: this is about time, never about text.

There are two conventions for generating a load, and numbers of one cannot be compared with numbers of the other. Both
are here by name, `convention="vllm"` and `convention="sglang"`:

|                     | vllm                                     | sglang                         |
|---------------------|------------------------------------------|--------------------------------|
| a length of nominal | uniform in [(1 - r) len, (1 + r) len]:   | uniform in [r len, len]:       |
| `len`, ratio `r`    | r = 0 is fixed                           | r = 0 has the mean len / 2     |
| arrivals            | stretched so that the last of N comes at | as drawn, the first at 0       |
|                     | exactly N / rate, the first after a gap  |                                |
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from minillm.errors import ConfigError
from minillm.sampling import SamplingParams

CONVENTIONS = ("vllm", "sglang")
NANO_VLLM_TOKENS = 10_000  # its script draws ids from 0 to this number
SHAREGPT_MEANS = 161, 338  # tokens in and out of ShareGPT's first turns (Kwon et al. 2023, arXiv:2309.06180, figure 11)
SHAREGPT_SPREAD = 1.1, 0.9  # of the logarithms: our choice, which is why this workload is called synthetic
SHAREGPT_LIMITS = 4, 1024


@dataclass(frozen=True)
class SampleRequest:
    """A prompt and how many tokens are wanted, no fewer and no more."""

    prompt: list[int]
    max_tokens: int
    temperature: float = 0.0

    @property
    def params(self) -> SamplingParams:
        """What to ask the engine for: exactly `max_tokens` tokens."""
        return SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens, ignore_eos=True)

    def scaled(self, factor: float) -> SampleRequest:
        """The same request with both lengths times `factor`, at least 1: the beginning of the prompt stays."""
        length, max_tokens = (max(1, round(factor * n)) for n in (len(self.prompt), self.max_tokens))
        return SampleRequest(self.prompt[:length], max_tokens, self.temperature)


@dataclass(frozen=True)
class Workload:
    """Requests by name. Fields that a workload does not use are ignored.

    * "nano-vllm": the workload that small engines quote: 256 prompts and outputs of 100 to 1024 tokens, temperature
      0.6. Drawn in the order of its script, with Python's generator: for each prompt its length, then its ids out of
      0 to 10000; when all prompts are there, all output lengths. Seed 0 asks for 133,966 tokens. Ids wrap around in
      smaller vocabularies; `num_prompts` other than 256 draws fewer or more in the same order.
    * "random": `input_len` and `output_len`, spread by `range_ratio` (see `convention` above).
    * "shared-prefix": as "random", after `num_groups` different system prompts of `prefix_len` tokens, in random order.
    * "sharegpt-like": synthetic. Log-normal lengths with the means of ShareGPT, cut at 4 and 1024 tokens.

    `scale` multiplies all lengths after drawing. `request_rate` and `burstiness`: see `arrival_times`.
    Raises `ConfigError` for values that make no sense.
    """

    name: str = "random"
    num_prompts: int = 256
    input_len: int = 512
    output_len: int = 128
    range_ratio: float = 0.0
    convention: str = "vllm"
    prefix_len: int = 512
    num_groups: int = 8
    scale: float = 1.0
    request_rate: float = math.inf
    burstiness: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _choose("workload", self.name, tuple(_DRAW))
        _choose("convention", self.convention, CONVENTIONS)
        for field in ("num_prompts", "input_len", "output_len", "prefix_len", "num_groups"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}={getattr(self, field)!r}: at least 1 is needed.")
        if not 0 <= self.range_ratio <= 1:
            raise ConfigError(f"range_ratio={self.range_ratio!r}: choose a number between 0 and 1.")
        if not 0 < self.scale <= 1:
            raise ConfigError(f"scale={self.scale!r}: choose a number above 0, up to 1 for the full lengths.")
        self.due()  # refuses impossible arrivals

    def requests(self, vocab_size: int) -> list[SampleRequest]:
        """Draw the requests for a model with this vocabulary."""
        drawn = _DRAW[self.name](self, random.Random(self.seed), vocab_size)
        return drawn if self.scale == 1 else [request.scaled(self.scale) for request in drawn]

    def due(self) -> list[float]:
        """Seconds after the start at which each of the requests comes."""
        return arrival_times(
            self.num_prompts,
            self.request_rate,
            burstiness=self.burstiness,
            convention=self.convention,
            seed=self.seed,
        )

    def to_json(self) -> dict[str, Any]:
        """All fields; an infinite rate is the string "inf", as in vLLM's files."""
        fields = asdict(self) | {"request_rate": self.request_rate if self.request_rate < math.inf else "inf"}
        return {"workload": fields.pop("name"), **fields}


def _nano_vllm(workload: Workload, rng: random.Random, vocab_size: int) -> list[SampleRequest]:
    def prompt() -> list[int]:
        return [rng.randint(0, NANO_VLLM_TOKENS) % vocab_size for _ in range(rng.randint(100, 1024))]

    prompts = [prompt() for _ in range(workload.num_prompts)]
    return [SampleRequest(ids, rng.randint(100, 1024), temperature=0.6) for ids in prompts]


def _random(workload: Workload, rng: random.Random, vocab_size: int) -> list[SampleRequest]:
    ends = [
        length_range(n, workload.range_ratio, workload.convention) for n in (workload.input_len, workload.output_len)
    ]
    lengths = [tuple(rng.randint(*end) for end in ends) for _ in range(workload.num_prompts)]
    return [SampleRequest(_ids(rng, length, vocab_size), max_tokens) for length, max_tokens in lengths]


def _shared_prefix(workload: Workload, rng: random.Random, vocab_size: int) -> list[SampleRequest]:
    prefixes = [_ids(rng, workload.prefix_len, vocab_size) for _ in range(workload.num_groups)]
    tails = _random(workload, rng, vocab_size)
    requests = [SampleRequest(prefixes[i % len(prefixes)] + r.prompt, r.max_tokens) for i, r in enumerate(tails)]
    rng.shuffle(requests)
    return requests


def _sharegpt_like(workload: Workload, rng: random.Random, vocab_size: int) -> list[SampleRequest]:
    def length(mean: float, spread: float) -> int:
        low, high = SHAREGPT_LIMITS
        return min(high, max(low, round(rng.lognormvariate(math.log(mean) - spread**2 / 2, spread))))

    lengths = [tuple(map(length, SHAREGPT_MEANS, SHAREGPT_SPREAD)) for _ in range(workload.num_prompts)]
    return [SampleRequest(_ids(rng, n, vocab_size), max_tokens) for n, max_tokens in lengths]


_DRAW: dict[str, Callable[[Workload, random.Random, int], list[SampleRequest]]] = {
    "nano-vllm": _nano_vllm,
    "random": _random,
    "shared-prefix": _shared_prefix,
    "sharegpt-like": _sharegpt_like,
}


def _ids(rng: random.Random, length: int, vocab_size: int) -> list[int]:
    return rng.choices(range(vocab_size), k=length)


def length_range(nominal: int, ratio: float, convention: str) -> tuple[int, int]:
    """The shortest and the longest length that can be drawn, for a nominal length and a range ratio."""
    if convention == "sglang":
        return max(1, int(nominal * ratio)), nominal
    return max(1, math.floor(nominal * (1 - ratio))), math.ceil(nominal * (1 + ratio))


def arrival_times(
    count: int, rate: float, *, burstiness: float = 1.0, convention: str = "vllm", seed: int = 0
) -> list[float]:
    """When each of `count` requests comes, seconds after the start: an open loop, which waits for no other request.

    rate: requests per second on average; infinity sends all at once. burstiness: shape of the gamma distribution of
    the gaps; 1 is a Poisson process, less comes in bursts, more comes evenly. Raises `ConfigError` unless both are
    positive.
    """
    _choose("convention", convention, CONVENTIONS)
    if not rate > 0 or not 0 < burstiness < math.inf:
        raise ConfigError(
            f"request_rate={rate}, burstiness={burstiness}: both must be positive, and burstiness finite."
        )
    if rate == math.inf:
        return [0.0] * count
    rng = random.Random(seed)
    gaps = [rng.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(count)]
    if convention == "sglang":
        return list(accumulate(gaps[1:], initial=0.0))
    stretch = count / rate / sum(gaps)
    return [stretch * time for time in accumulate(gaps)]


def _choose(what: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise ConfigError(f"{what}={given!r} is unknown. Choose one of {', '.join(map(repr, allowed))}.")
