"""Decode attention on quantised caches: time of one layer against bits per number, context and batch.

    python benchmarks/kv_decode.py                    # a GPU: contexts of 1k to 128k tokens, batches of 1 and 16
    python benchmarks/kv_decode.py --device cpu --contexts 256 --shapes smollm2-135m --cold-bytes 1 --repeats 3

Each format is checked against its PyTorch twin in float32 before it is timed. Formats take turns; medians are kept with
their quartiles, and the speed-up is the median over pairs of turns. "decoded first" is what formats must not be: the
whole cache decoded to the model's dtype before each step, then attention as ever. Everything goes into a JSON file with
the machine, its ceilings and the date.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from attention_work import COLD_BYTES, SHAPES, Call, paged_backend
from recording import record
from torch import Tensor

from minillm import seams
from minillm.attention.metadata import AttentionMetadata
from minillm.attention.paged import Backend, paged_attention
from minillm.attention.reference import naive_attention
from minillm.measure.bench import interleaved, pair_ratio, quartiles
from minillm.quantization import attention as twin
from minillm.quantization.formats import FORMATS, decode

BLOCK_SIZE = 16
PLAIN, DECODED_FIRST = "plain", "int8 decoded first"
Parts = tuple[Tensor, ...]  # what keys or values are stored in
DEFAULTS = {
    "shapes": ["llama-3.1-8b"],
    "contexts": [1024 * 2**i for i in range(8)],
    "batches": [1, 16],
    "candidates": [PLAIN, *FORMATS, DECODED_FIRST],
}


@dataclass(frozen=True)
class KvDecodes:
    """One new token for each of `batch` sequences, in several layers whose caches hold the same numbers in a format.

    Blocks are scattered. `layers` are keys and values, each the parts that it is stored in: a pool
    `[kv_heads, num_blocks, BLOCK_SIZE, d]`, or codes and ranges.
    """

    name: str  # a candidate
    q: Tensor  # [batch, heads, d]
    layers: list[tuple[Parts, Parts]]
    metadata: AttentionMetadata

    @classmethod
    def random(
        cls, name: str, shape: str, batch: int, context: int, device: torch.device, cold_bytes: int = COLD_BYTES
    ) -> KvDecodes:
        """The same numbers for every candidate. As many layers as hold `cold_bytes`: more than any cache."""
        torch.manual_seed(0)
        heads, kv_heads, d = SHAPES[shape]
        count, dtype = context // BLOCK_SIZE, torch.bfloat16 if device.type == "cuda" else torch.float32
        q = torch.randn(batch, heads, d, dtype=dtype, device=device)
        size = (kv_heads, batch * count, BLOCK_SIZE, d)
        keys, values = (torch.randn(size, dtype=dtype, device=device) for _ in range(2))
        layer = _stored(name, keys, values)
        num_layers = max(1, cold_bytes // sum(map(_nbytes, layer)))
        tables = torch.randperm(batch * count).view(batch, count).tolist()
        lengths = [1] * batch, [context] * batch
        metadata = AttentionMetadata.build(tables, *lengths, block_size=BLOCK_SIZE, device=device)
        return cls(name, q, [layer, *(_stored(name, keys, values) for _ in range(num_layers - 1))], metadata)

    @property
    def bytes(self) -> int:
        """Codes and ranges of one layer's keys and values: what a step has to read."""
        return sum(map(_nbytes, self.layers[0]))

    def call(self, backend: str = "auto") -> Call:
        """All layers, one after the other; returns the output of the last. Plain pools by this backend."""
        keys = self.layers[0][0]
        group = self.q.shape[1] // len(keys[0])
        if self.name in (PLAIN, DECODED_FIRST):
            plain, pool = paged_backend(backend, self.q.device), self._pool(keys)
            return partial(self._run, partial(self._plain, plain), plain.prepare(self.metadata, pool, group))
        device = "cuda" if backend == "triton" else self.q.device.type
        reader: Any = seams.offer("quantized_attention", device) or twin
        return partial(self._run, reader.quantized_attention, reader.prepare(self.metadata, group))

    def _run(self, attention: Callable[..., Tensor], metadata: AttentionMetadata) -> Tensor:
        for keys, values in self.layers:
            out = attention(self.q, keys, values, metadata, scale=self.q.shape[2] ** -0.5)
        return out

    def _plain(self, backend: Backend, q: Tensor, keys: Parts, values: Parts, *rest: Any, scale: float) -> Tensor:
        return backend.attend(q, self._pool(keys), self._pool(values), *rest, scale=scale)

    def _pool(self, parts: Parts) -> Tensor:
        """A pool as it is, or what formats must not be: every block decoded, whatever is read of it."""
        return parts[0] if self.name == PLAIN else decode(*parts).to(self.q.dtype)

    def error(self, out: Tensor) -> float:
        """Largest difference from the twin in float32; of the unquantised pools from the twin of theirs."""
        keys, values = self.layers[-1]
        scale, q = self.q.shape[2] ** -0.5, self.q.float()
        if self.name == PLAIN:
            pools = keys[0].float(), values[0].float()
            exact = paged_attention(q, *pools, self.metadata, scale=scale, kernel=naive_attention)
        else:
            exact = twin.quantized_attention(q, keys, values, self.metadata, scale=scale)
        return (out.float() - exact).abs().max().item()


def _stored(name: str, keys: Tensor, values: Tensor) -> tuple[Parts, Parts]:
    """Keys and values `[kv_heads, num_blocks, BLOCK_SIZE, d]` in memory of their own, as the candidate keeps them."""
    if name == PLAIN:
        return (keys.clone(),), (values.clone(),)
    return _encoded(name.split()[0], keys), _encoded(name.split()[0], values)


def _encoded(name: str, x: Tensor) -> Parts:
    """Codes and ranges, a thousand blocks at a time: what encoding needs in between is much larger than these."""
    parts = [FORMATS[name].encode(some) for some in x.split(1024, 1)]
    return tuple(
        torch.cat([one.view(torch.uint8) for one in part], 1).view(part[0].dtype) for part in zip(*parts, strict=True)
    )


def _nbytes(parts: Parts) -> int:
    return sum(part.nbytes for part in parts)


def measure(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """One row per shape, batch and context; seconds are for one layer."""
    sync = torch.cuda.synchronize if device.type == "cuda" else None
    for shape, batch, context in product(args.shapes, args.batches, args.contexts):
        works = {n: KvDecodes.random(n, shape, batch, context, device, args.cold_bytes) for n in args.candidates}
        calls = {name: work.call() for name, work in works.items()}
        errors = {name: work.error(calls[name]()) for name, work in works.items()}
        timings = interleaved(calls, repeats=args.repeats, sync=sync)
        per_layer = {name: timing.per(len(works[name].layers)) for name, timing in timings.items()}
        plain = per_layer[args.candidates[0]]
        found = {
            name: {
                "bits": 8 * work.bytes / (2 * works[args.candidates[0]].layers[0][0][0].numel()),
                "bytes": work.bytes,
                "layers": len(work.layers),
                "max_error": errors[name],
                "seconds": quartiles(per_layer[name].times),
                "byte_per_s": work.bytes / per_layer[name].median,
                "speedup": pair_ratio(plain, per_layer[name]),
            }
            for name, work in works.items()
        }
        yield {"shape": shape, "batch": batch, "tokens": context, "candidates": found}


def describe(row: dict[str, Any]) -> str:
    """A row as lines of text."""
    lines = [f"{row['shape']}, batch {row['batch']}, context {row['tokens']}"]
    for name, one in row["candidates"].items():
        low, median, high = (1e6 * seconds for seconds in one["seconds"])
        lines.append(
            f"  {name:18} {one['bits']:5.2f} bits {median:9.1f} µs ({low:.1f} to {high:.1f}), "
            f"{one['byte_per_s'] / 1e9:7.1f} GB/s, speed-up {one['speedup'].median:.2f}, error {one['max_error']:.1e}"
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options, with defaults for a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    for name, values in DEFAULTS.items():
        parser.add_argument(f"--{name}", nargs="*", type=type(values[0]), default=values)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--cold-bytes", type=int, default=COLD_BYTES, help="of keys and values, over all layers")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/kv_decode_<device>.json")
    args = parser.parse_args(arguments)
    if args.candidates[0] != PLAIN:
        parser.error(f"the first candidate is {PLAIN!r}: all others are compared with it")
    return args


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    """Check and measure, print row by row, write the file."""
    args = parse(arguments)
    record("kv_decode", measure(args, torch.device(args.device)), describe, args)


if __name__ == "__main__":
    main()
