"""Prefills and decodes of a model as points under this machine's roof, and what each of them moved.

Every point and both ceilings take turns in one run, so that they see the machine at the same speed. The slope of the
roof is the bandwidth of reading as many bytes as the model has: a model that fits into a cache is compared with the
cache, not with memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from minillm.costs.formulas import Bytes, least_bytes, step_bytes, step_flops, weight_bytes
from minillm.costs.steps import Step, decode_step, prefill_step
from minillm.measure.bench import Timing, interleaved
from minillm.measure.bench_latency import check_lengths
from minillm.measure.counters import Counter
from minillm.measure.hardware import Hardware, dtype_name, matmul_patterns, matmul_size, read_buffer, read_patterns
from minillm.measure.roof import Roof
from minillm.measure.stepper import StepRunner
from minillm.model.decoder import Decoder

NEAR = 0.5  # share of the roof: a step below it is slow for another reason than the roof
READS = 3  # of the buffer in a row: what fits into a cache is then read from there, as the bound assumes


@dataclass(frozen=True)
class Point:
    """One step that was timed and counted."""

    phase: Literal["prefill", "decode"]
    batch: int
    context: int  # tokens of each sequence, the new ones included
    timing: Timing
    flops: int  # by formula: those that the step needs
    least_bytes: int  # that no program can avoid to read
    predicted: Bytes  # by formula, without activations
    counted: Bytes  # as it ran, activations included

    @property
    def intensity(self) -> float:
        """FLOP per unavoidable byte."""
        return self.flops / self.least_bytes

    @property
    def flop_rate(self) -> float:
        """Useful FLOP/s of the fastest repeat: noise only adds time."""
        return self.flops / self.timing.best

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data; times in milliseconds."""
        return {
            "phase": self.phase,
            "batch": self.batch,
            "context": self.context,
            "times_ms": [1e3 * seconds for seconds in self.timing.times],
            "flops": self.flops,
            "least_bytes": self.least_bytes,
            "predicted_bytes": self.predicted._asdict(),
            "counted_bytes": self.counted._asdict(),
        }


@dataclass(frozen=True)
class RooflineRun:
    """A model on a machine: the roof found in the same rounds, and the points under it."""

    model: str
    machine: str
    dtype: str
    roof: Roof
    weight_bytes: int
    in_cache: bool  # whether the weights fit into the machine's largest cache
    points: list[Point]

    def share_of_roof(self, point: Point) -> float:
        """How near a point is to the roof above it: 1 reaches it."""
        return point.flop_rate / self.roof.flop_rate(point.intensity)

    def waits_for(self, point: Point) -> str | None:
        """The side of the roof that a point is near, "bytes" or "arithmetic"; None if it stays far below."""
        if self.share_of_roof(point) < NEAR:
            return None
        return "arithmetic" if point.intensity > self.roof.ridge else "bytes"

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        points = [point.to_json() | {"share_of_roof": self.share_of_roof(point)} for point in self.points]
        return vars(self) | {"roof": self.roof._asdict(), "points": points}


def measure_roofline(
    model: Decoder,
    hardware: Hardware,
    *,
    name: str,
    prompts: Sequence[int],
    batches: Sequence[int],
    contexts: Sequence[int],
    repeats: int = 5,
) -> RooflineRun:
    """Time a prefill of each prompt length, and a decode step of each batch at each context.

    Raises `ConfigError` for lengths that the model has no positions for.
    """
    check_lengths(model.config, [*prompts, *contexts])
    shapes: list[tuple[Literal["prefill", "decode"], int, int]] = [("prefill", 1, n) for n in prompts]
    shapes += [("decode", batch, context) for context in contexts for batch in batches]
    steps = [prefill_step(c, b) if phase == "prefill" else decode_step(c, b) for phase, b, c in shapes]
    timings, roof = _take_turns(model, hardware, steps, repeats)
    weights = weight_bytes(model.config, model.dtype.itemsize, 0)
    return RooflineRun(
        model=name,
        machine=hardware.machine.name,
        dtype=dtype_name(model.dtype),
        roof=roof,
        weight_bytes=weights,
        in_cache=weights <= hardware.machine.last_level_cache,
        points=[_point(model, *one) for one in zip(shapes, steps, timings, strict=True)],
    )


def _point(model: Decoder, shape: tuple[Literal["prefill", "decode"], int, int], step: Step, timing: Timing) -> Point:
    run, width = StepRunner(model, step), model.dtype.itemsize
    with Counter(model, kv=run.cache) as counted:
        run()
    return Point(
        *shape,
        timing,
        flops=step_flops(model.config, step).total,
        least_bytes=least_bytes(model.config, step, width),
        predicted=step_bytes(model.config, step, width),
        counted=counted.total.bytes,
    )


@torch.inference_mode()
def _take_turns(model: Decoder, hardware: Hardware, steps: Sequence[Step], repeats: int) -> tuple[list[Timing], Roof]:
    """The times of all steps, and the best read and product of the same rounds."""
    size = matmul_size(hardware.matmul_rate.get(dtype_name(model.dtype), hardware.matmul_rate["float32"]))
    buffer = read_buffer(hardware.machine, model.device)
    buffer = buffer[: max(2**19, weight_bytes(model.config, 2, 0) // 2) // 2048 * 2048]
    reads = {name: _again(read) for name, read in read_patterns(buffer).items()}
    products = matmul_patterns(size, model.dtype, model.device)
    runs: dict[str, Callable[[], object]] = {f"step {i}": StepRunner(model, step) for i, step in enumerate(steps)}
    sync = torch.cuda.synchronize if model.device.type == "cuda" else None
    timings = interleaved(runs | reads | products, repeats=repeats, sync=sync)
    roof = Roof(
        flops_per_second=2 * size**3 / min(timings[name].best for name in products),
        bytes_per_second=READS * buffer.nbytes / min(timings[name].best for name in reads),
    )
    return [timings[name] for name in runs], roof


def _again(read: Callable[[], object]) -> Callable[[], object]:
    def reads() -> None:
        for _ in range(READS):
            read()

    return reads
