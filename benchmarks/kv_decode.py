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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from attention_work import COLD_BYTES, SHAPES, Call
from recording import record
from torch import Tensor

from minillm.attention import AttentionMetadata, PagedAttention, get_backend, get_quantized_backend
from minillm.measure.bench import interleaved, pair_ratio, quartiles
from minillm.quantization.attention import Tails, quantized_attention
from minillm.quantization.formats import FORMATS, QuantizedPool

BLOCK_SIZE = 32  # of int4; the others take it as well, so that only the format differs
PLAIN, DECODED_FIRST = "plain", "int8 decoded first"
DEFAULTS = {
    "shapes": ["llama-3.1-8b"],
    "contexts": [1024 * 2**i for i in range(8)],
    "batches": [1, 16],
    "candidates": [PLAIN, *FORMATS, DECODED_FIRST],
}


@dataclass(frozen=True)
class KvDecodes:
    """One new token for each of `batch` sequences, in several layers whose caches hold the same numbers in a format.

    Blocks are scattered. `layers` are keys and values: pools `[kv_heads, num_blocks, BLOCK_SIZE, d]`, or codes.
    """

    name: str  # a candidate
    q: Tensor  # [batch, heads, d]
    layers: list[tuple[Any, Any]]
    layout: AttentionMetadata
    tails: Tails | None

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
        build = partial(AttentionMetadata.build, block_size=BLOCK_SIZE, device=device)
        layout = build(tables, [1] * batch, [context] * batch)
        tails = None
        if name in FORMATS and FORMATS[name].needs_tails:
            newest = torch.tensor([table[-1] for table in tables], device=device)
            exact = torch.cat([keys[:, :1] * 0, keys[:, newest]], dim=1)
            tail_tables = [[0] * (count - 1) + [1 + i] for i in range(batch)]
            tails = Tails(exact, build(tail_tables, [1] * batch, [context] * batch))
        return cls(name, q, [layer, *(_stored(name, keys, values) for _ in range(num_layers - 1))], layout, tails)

    @property
    def bytes(self) -> int:
        """Codes and ranges of one layer's keys and values: what a step has to read."""
        return sum(map(_nbytes, self.layers[0]))

    def call(self, backend: str = "auto") -> Call:
        """All layers, one after the other, by a backend of `minillm.attention`; returns the output of the last."""
        if self.name == DECODED_FIRST:
            return partial(self._run, partial(_decoded_first, get_backend(backend, self.q.device)))
        find = get_quantized_backend if self.name in FORMATS else get_backend
        return partial(self._run, find(backend, self.q.device))

    def _run(self, backend: PagedAttention) -> Tensor:
        options: dict[str, Any] = {"tails": self.tails} if self.name in FORMATS else {}
        for keys, values in self.layers:
            out = backend(self.q, keys, values, self.layout, scale=self.q.shape[2] ** -0.5, **options)
        return out

    def error(self, out: Tensor) -> float:
        """Largest difference from the twin in float32; of the unquantised pools from the twin of theirs."""
        keys, values = self.layers[-1]
        scale, q = self.q.shape[2] ** -0.5, self.q.float()
        if self.name == PLAIN:
            exact = get_backend("naive", q.device)(q, keys.float(), values.float(), self.layout, scale=scale)
        else:
            exact = quantized_attention(q, keys, values, self.layout, scale=scale, tails=self.tails)
        return (out.float() - exact).abs().max().item()


def _stored(name: str, keys: Tensor, values: Tensor) -> tuple[Any, Any]:
    """Keys and values `[kv_heads, num_blocks, BLOCK_SIZE, d]` in memory of their own, as the candidate keeps them."""
    if name == PLAIN:
        return keys.clone(), values.clone()
    form = FORMATS[name.split()[0]]
    pools = []
    for codec, x in ((form.keys, keys), (form.values, values)):
        kv_heads, num_blocks, block_size, d = x.shape
        pool = QuantizedPool(codec, (kv_heads, num_blocks, block_size, d), x.device)
        for some in torch.arange(num_blocks, device=x.device).split(1024):
            pool.write_blocks(x[:, some], some)
        pools.append(pool)
    return pools[0], pools[1]


def _nbytes(pool: Any) -> int:
    return sum(tensor.nbytes for tensor in ((pool,) if isinstance(pool, Tensor) else pool.tensors))


def _decoded_first(
    backend: PagedAttention, q: Tensor, keys: Any, values: Any, layout: AttentionMetadata, **options: Any
) -> Tensor:
    """What formats must not be: every block decoded, whatever is read of it."""
    everything = torch.arange(keys.tensors[0].shape[1])
    pools = (pool.read(everything).to(q.dtype) for pool in (keys, values))
    return backend(q, *pools, layout, **options)


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
                "bits": 8 * work.bytes / (2 * works[args.candidates[0]].layers[0][0].numel()),
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
