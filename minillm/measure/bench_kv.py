"""`minillm bench kv`: what each format of the KV cache buys, and what it costs.

It buys capacity: tokens per GB, ranges and all. It buys bytes: a decode step reads less. Whether that buys *time*
depends on what the machine waits for. The bytes that shrink are KV alone, so the whole step gains little where weights
are most of it (Amdahl), and decoding codes costs arithmetic that a machine must have to spare. What it costs in quality
is measured on a trained model or not at all: see `minillm.measure.kv_quality`.

Prediction stands beside measurement: bytes per token and per step in closed form, next to the pools that were allocated
and the operators that ran.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from minillm.config import EngineConfig
from minillm.costs.formulas import Bytes, kv_bytes_per_token, step_bytes
from minillm.costs.steps import decode_step
from minillm.engine.runner import open_cache
from minillm.errors import ConfigError
from minillm.measure.bench import Quartiles, Timing, interleaved, pair_ratio
from minillm.measure.counters import Counter
from minillm.measure.kv_quality import COMPARED, drawn_sample, fidelity, output_error, trained_samples
from minillm.measure.stepper import StepRunner
from minillm.model.decoder import Decoder
from minillm.quantization.formats import FORMATS, Codec, element_bytes

GB = 10**9


@dataclass(frozen=True)
class KvStep:
    """A decode step of some sequences at one context: bytes by formula and by counter, and its time in seconds."""

    context: int
    predicted: Bytes
    counted: Bytes
    timing: Timing
    plain: Timing  # the same step unquantised, in the same rounds

    @property
    def speedup(self) -> Quartiles:
        """How many times as long the step takes without quantisation, round by round. Below 1 the format loses."""
        return pair_ratio(self.plain, self.timing)

    def to_json(self) -> dict[str, Any]:
        return {
            "context": self.context,
            "predicted": self.predicted._asdict(),
            "counted": self.counted._asdict(),
            "speedup": self.speedup._asdict(),
            "times_ms": [1e3 * seconds for seconds in self.timing.times],
        }


@dataclass(frozen=True)
class KvRow:
    """What a format takes: bytes per token in all layers, by formula and as allocated, and its decode steps."""

    format: str
    predicted_bytes: int
    allocated_bytes: int
    steps: list[KvStep]

    @property
    def tokens_per_gb(self) -> int:
        """Tokens whose keys and values fit into 10⁹ bytes."""
        return GB // self.allocated_bytes

    def to_json(self) -> dict[str, Any]:
        counts = {"predicted_bytes_per_token": self.predicted_bytes, "bytes_per_token": self.allocated_bytes}
        steps = [step.to_json() for step in self.steps]
        return {"format": self.format, **counts, "tokens_per_gb": self.tokens_per_gb, "steps": steps}


@dataclass(frozen=True)
class KvQuality:
    """What reading through a format does to a trained model."""

    format: str
    bits: float  # per number of the cache, ranges included
    perplexity: float
    divergence: float  # from the unquantised distributions, nats per token; see `kv_quality.fidelity`
    errors: dict[str, float]  # relative error of attention's output, by kind of keys; none without quantisation

    def loss(self, plain: KvQuality) -> float:
        """By how much the perplexity is above the unquantised one, as a share of it."""
        return self.perplexity / plain.perplexity - 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def bench_kv(
    model: Decoder,
    *,
    contexts: Sequence[int],
    batch: int = 1,
    repeats: int = 10,
    progress: Callable[[str], object] = lambda what: None,
) -> list[KvRow]:
    """Capacity, and decode steps of `batch` sequences at each context: a row per format, the model's dtype first.

    Formats take turns at each context. Raises ConfigError for contexts that the model has no positions for.
    """
    limit = model.config.max_position_embeddings
    if batch < 1 or repeats < 1 or not contexts or not all(1 <= context <= limit for context in contexts):
        raise ConfigError(
            f"batch={batch}, repeats={repeats}, contexts={list(contexts)}: all are at least 1, and this model has "
            f"{limit} positions."
        )
    steps: dict[str, list[KvStep]] = {name: [] for name in ("auto", *FORMATS)}
    for context in contexts:
        progress(f"context {context}")
        for name, step in _decode(model, context, batch, repeats).items():
            steps[name].append(step)
    return [_row(model, name, done) for name, done in steps.items()]


def _decode(model: Decoder, context: int, batch: int, repeats: int) -> dict[str, KvStep]:
    """The same step in each format, in turns."""
    step = decode_step(context, batch)
    runners = {name: StepRunner(model, step, kv_format=name) for name in ("auto", *FORMATS)}
    sync = torch.cuda.synchronize if model.device.type == "cuda" else None
    timings = interleaved(runners, repeats=repeats, sync=sync)
    found = {}
    for name, run in runners.items():
        with Counter(model, kv=run.cache) as counted:
            run()
        size, kv_size = model.dtype.itemsize, _element_bytes(model, name)
        predicted = step_bytes(model.config, step, size, kv_element_bytes=kv_size)
        found[name] = KvStep(context, predicted, counted.total.bytes, timings[name], timings["auto"])
    return found


def _row(model: Decoder, name: str, steps: list[KvStep]) -> KvRow:
    predicted = kv_bytes_per_token(model.config, _element_bytes(model, name))
    cache = open_cache(model, EngineConfig(kv_format=name, num_blocks=2))
    return KvRow(name, predicted, cache.bytes_per_token, steps)


def _element_bytes(model: Decoder, name: str) -> float:
    """Bytes per number of the cache by formula, ranges included."""
    if name == "auto":
        return model.dtype.itemsize
    return element_bytes(name, model.config.head_dim)


def bench_quality(
    model: Decoder, rows: Tensor, *, progress: Callable[[str], object] = lambda what: None
) -> list[KvQuality]:
    """Perplexity on rows of held-out tokens `[count, length]`, and errors of attention: the model's dtype first.

    The last is int4 with one range per token: nearly the same bits, shared the wrong way.
    """
    data = {"Gaussian": [drawn_sample()], "outliers": [drawn_sample(outliers=True)]}
    data["trained"] = trained_samples(model, rows[0].tolist())
    found = []
    codecs: dict[str, Codec | None] = {"auto": None, **COMPARED}
    progress("quality of all formats")
    qualities = fidelity(model, rows, codecs)
    for name, codec in codecs.items():
        errors = {kind: output_error(samples, codec) for kind, samples in data.items()} if codec else {}
        found.append(KvQuality(name, _bits(model, codec), *qualities[name], errors))
    return found


def _bits(model: Decoder, codec: Codec | None) -> float:
    """Bits per number, counted in the tensors of a token."""
    if codec is None:
        return 8 * model.dtype.itemsize
    d = model.config.head_dim
    return 8 * sum(part.nbytes for part in codec.encode(torch.zeros(d))) / d
