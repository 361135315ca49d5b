"""How fast attention is: prompts in tiles against SDPA and the textbook, decodes through blocks against contiguous.

    python benchmarks/attention.py                    # this CPU, a few minutes
    python benchmarks/attention.py --device cuda      # prompts of 512 to 32k tokens, contexts to 128k
    python benchmarks/attention.py --lengths 256 --contexts 128 --repeats 3

Candidates take turns; medians are kept with their quartiles, and a ratio is the median over pairs of turns. Each result
is checked against float32 in the same run. Everything goes into a JSON file, with the machine and its ceilings.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
from collections.abc import Iterator
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from attention_work import BLOCK_SIZE, COLD_BYTES, Call, Decodes, Prompt
from recording import record

from minillm.measure.bench import interleaved, pair_ratio, quartiles

NAIVE_LIMIT = 4096  # the longest prompt whose score matrix fits into memory with ease
CPU: dict[str, list[Any]] = {
    "shapes": ["smollm2-135m", "qwen3-0.6b"],
    "lengths": [2048, 4096, 8192],
    "contexts": [1024],
    "batches": [1, 16],
    "blocks": ["neighbours", "scattered"],
    "dtypes": ["bfloat16", "float32"],
    "prefill": ["tiled", "sdpa", "naive"],
    "decode": ["auto", "contiguous"],
}
CUDA = CPU | {
    "shapes": ["smollm2-135m", "llama-3.1-8b"],
    "lengths": [512 * 2**i for i in range(7)],
    "contexts": [1024 * 2**i for i in range(8)],
    "dtypes": ["bfloat16"],
    "prefill": ["triton", "flash", "cudnn", "naive"],
    "decode": ["triton", "contiguous"],
}


def measure(names: list[str], work: Prompt | Decodes, repeats: int, device: torch.device) -> dict[str, Any]:
    """Errors, quartiles of the times in seconds, and how many times as long each takes as the first candidate."""
    calls = {name: call for name in names if (call := runnable(work.call(name)))}
    errors = {name: work.error(call()) for name, call in calls.items()}
    timings = interleaved(calls, repeats=repeats, sync=torch.cuda.synchronize if device.type == "cuda" else None)
    first = next(iter(timings))
    return {
        name: {
            "max_error": errors[name],
            "seconds": quartiles(timing.times),
            f"times_as_long_as_{first}": pair_ratio(timing, timings[first]),
        }
        for name, timing in timings.items()
    }


def runnable(call: Call) -> Call | None:
    """The call if it runs here; SDPA's backends refuse shapes and devices that they do not support."""
    try:
        call()
    except RuntimeError as refusal:
        print(f"  left out: {str(refusal).splitlines()[0]}", file=sys.stderr)
        return None
    return call


def prefill_rows(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """One row per dtype, shape and length of prompt."""
    for dtype, shape, n in product(args.dtypes, args.shapes, args.lengths):
        names = [name for name in args.prefill if name != "naive" or n <= NAIVE_LIMIT]
        prompt = Prompt.random(shape, n, getattr(torch, dtype), device)
        results = measure(names, prompt, args.repeats, device)
        for name, result in results.items():
            result["flop_per_s"] = prompt.flops / result["seconds"][1]
            result["peak_bytes"] = peak_bytes(name, shape, n, dtype, device)
        yield {"phase": "prefill", "dtype": dtype, "shape": shape, "tokens": n, "candidates": results}


def decode_rows(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """One row per dtype, shape, batch, context and order of blocks; seconds are for one layer."""
    for dtype, shape, batch, context, blocks in product(
        args.dtypes, args.shapes, args.batches, args.contexts, args.blocks
    ):
        work = Decodes.random(shape, batch, context, blocks, getattr(torch, dtype), device, args.cold_bytes)
        results = measure(args.decode, work, args.repeats, device)
        for result in results.values():
            result["seconds"] = [seconds / len(work.layers) for seconds in result["seconds"]]
            result["byte_per_s"] = work.bytes / result["seconds"][1]
        cell = {"dtype": dtype, "shape": shape, "batch": batch, "tokens": context, "blocks": blocks}
        yield {"phase": "decode", **cell, "layers": len(work.layers), "candidates": results}


def peak_bytes(name: str, shape: str, n: int, dtype: str, device: torch.device) -> int:
    """Most memory taken at once beyond the inputs; on a CPU in a fresh process, where nothing is left to reuse."""
    if device.type == "cuda":
        return _cuda_peak(Prompt.random(shape, n, getattr(torch, dtype), device).call(name))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_cpu_peak, (name, shape, n, dtype))


def _cuda_peak(call: Call) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


@torch.inference_mode()
def _cpu_peak(name: str, shape: str, n: int, dtype: str) -> int:
    """A small prompt first: threads and libraries take their memory with the first call."""
    Prompt.random(shape, 2 * BLOCK_SIZE, getattr(torch, dtype), torch.device("cpu")).call(name)()
    call = Prompt.random(shape, n, getattr(torch, dtype), torch.device("cpu")).call(name)
    before = _resident_peak()
    call()
    return _resident_peak() - before


def _resident_peak() -> int:
    """Bytes. Linux tells it for the process alone in /proc; `getrusage` inherits the parent's peak there."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def describe(row: dict[str, Any]) -> str:
    """A row as lines of text."""
    lines = [", ".join(f"{key} {value}" for key, value in row.items() if key != "candidates")]
    for name, result in row["candidates"].items():
        low, median, high = (1000 * seconds for seconds in result["seconds"])
        speed = "flop_per_s" if "flop_per_s" in result else "byte_per_s"
        ratio = next(value for key, value in result.items() if key.startswith("times_as_long"))
        lines.append(
            f"  {name:10} {median:9.3f} ms ({low:.3f} to {high:.3f}), {result[speed] / 1e9:8.1f} G{speed[:4]}/s, "
            f"{ratio.median:.2f} times as long ({ratio.low:.2f} to {ratio.high:.2f}), error {result['max_error']:.1e}"
            + (f", peak {result['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in result else "")
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options; what is not given depends on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    for name, values in CPU.items():
        parser.add_argument(f"--{name}", nargs="*", type=type(values[0]))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--cold-bytes", type=int, default=COLD_BYTES, help="of keys and values, over all layers")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/attention_<device>.json")
    args = parser.parse_args(arguments)
    for name, values in (CPU if args.device == "cpu" else CUDA).items():
        if getattr(args, name) is None:
            setattr(args, name, values)
    return args


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    """Measure, print row by row, write the file."""
    args = parse(arguments)
    device = torch.device(args.device)
    torch.manual_seed(0)
    record("attention", chain(prefill_rows(args, device), decode_rows(args, device)), describe, args)


if __name__ == "__main__":
    main()
