"""Shapes that break attention kernels, an oracle that owes nothing to them, and a way to make wrong versions."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from minillm.attention.metadata import AttentionMetadata


@dataclass(frozen=True)
class Case:
    """One request's attention. `spread` is about how large the scores get."""

    q_len: int
    kv_len: int
    heads: int = 2
    kv_heads: int = 1
    d: int = 64
    window: int | None = None
    spread: float = 1.0
    seed: int = 0

    @property
    def scale(self) -> float:
        return float(self.d**-0.5)

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q `[q_len, heads, d]`, k and v `[kv_heads, kv_len, d]`: the same values in every dtype, up to rounding."""
        generator = torch.Generator().manual_seed(self.seed)
        q = torch.randn(self.q_len, self.heads, self.d, generator=generator)
        k, v = torch.randn(2, self.kv_heads, self.kv_len, self.d, generator=generator)
        return (q * self.spread).to(dtype), k.to(dtype), v.to(dtype)


CASES = {
    "one key": Case(1, 1),
    "one key, large score": Case(4, 1, spread=3e3),
    "one query": Case(1, 37, heads=3),
    "square": Case(16, 16),
    "no multiple of any tile": Case(131, 259, heads=6, kv_heads=2),
    "query shorter than keys": Case(5, 130, heads=4, kv_heads=4),
    "fully masked rows": Case(9, 5, heads=4, kv_heads=2),
    "no keys at all": Case(3, 0),
    "d 80": Case(33, 70, d=80),
    "d 96": Case(20, 40, heads=3, kv_heads=3, d=96),
    "d 128": Case(17, 50, d=128),
    "d 256": Case(7, 30, d=256),
    "group 3": Case(40, 40, heads=9, kv_heads=3),
    "group 5": Case(3, 77, heads=15, kv_heads=3),
    "group 7": Case(30, 61, heads=14, kv_heads=2),
    "group 8": Case(25, 25, heads=8),
    "window": Case(70, 150, window=20),
    "window, square": Case(40, 40, window=7),
    "window, one query": Case(1, 50, heads=3, window=5),
    "window of one": Case(10, 20, window=1),
    "window wider than a tile": Case(100, 300, heads=6, kv_heads=3, window=90),
    "window, fully masked rows": Case(12, 7, window=3),
    "scores of 1e4": Case(30, 80, spread=3e3),
}


def exact_attention(q: Tensor, k: Tensor, v: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64, one query and one head at a time, straight from the definition."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float64)
    group = case.heads // case.kv_heads
    for i in range(case.q_len):
        stop = case.kv_len - case.q_len + i + 1
        start = 0 if case.window is None else max(0, stop - case.window)
        if stop <= 0:
            continue
        for head in range(case.heads):
            keys, values = k[head // group, start:stop], v[head // group, start:stop]
            scores = keys @ q[i, head] * case.scale
            out[i, head] = torch.softmax(scores, 0) @ values
            lse[i, head] = torch.logsumexp(scores, 0)
    return out, lse


@cache
def expected(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the case's own tensors."""
    return exact_attention(*case.tensors(dtype), case)


def tolerance(case: Case, dtype: torch.dtype) -> float:
    """Rounding error to allow: a score of size s is known to eps · s, and its weight is as uncertain as that."""
    largest = max(1.0, case.spread * 5)
    return {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype] * largest


def check(out: Tensor, wanted: Tensor, case: Case, dtype: torch.dtype, what: str = "output") -> None:
    """Raise AssertionError with the case, seed included, if `out` is not `wanted` up to rounding."""
    assert out.shape == wanted.shape, f"{what} {tuple(out.shape)}, expected {tuple(wanted.shape)}: {case}"
    out, same = out.double(), out.double() == wanted
    error = (out - wanted).abs().where(~same, 0.0)  # equal infinities have no difference
    worst = error.max().item() if error.numel() else 0.0
    assert worst <= tolerance(case, dtype), f"{what} is wrong by {worst:.3g} in {dtype}: {case}"


@dataclass(frozen=True)
class Packed:
    """Several requests in one pool. What no request owns is poisoned with NaN, the dummy block included."""

    cases: list[Case]
    tables: list[list[int]]
    q: Tensor
    k_pool: Tensor
    v_pool: Tensor
    metadata: AttentionMetadata

    def check(self, out: Tensor, lse: Tensor | None = None) -> None:
        """Raise AssertionError unless each request's output (and log-sum-exp) is that of the request alone."""
        lengths = [case.q_len for case in self.cases]
        for index, (what, got) in enumerate((("output", out), ("log-sum-exp", lse))):
            parts = [] if got is None else got.split(lengths)
            for case, part in zip(self.cases, parts, strict=bool(parts)):
                check(part, expected(case, self.q.dtype)[index], case, self.q.dtype, what)


def pack(
    cases: list[Case],
    dtype: torch.dtype = torch.float32,
    *,
    block_size: int = 4,
    order: str = "shuffled",
    seed: int = 0,
) -> Packed:
    """Put requests of the same head shape into blocks: "shuffled" all over the pool, or "adjacent" in order.

    Keys and values are laid down by plain indexing, so that reading is tested without trusting the writing.
    """
    cases = [replace(case, seed=case.seed + 1000 * i) for i, case in enumerate(cases)]
    counts = [-(-case.kv_len // block_size) for case in cases]
    free = torch.arange(1, sum(counts) + 4)
    if order == "shuffled":
        free = free[torch.randperm(len(free), generator=torch.Generator().manual_seed(seed))]
    tables = [part.tolist() for part in free[: sum(counts)].split(counts)]
    shape = (cases[0].kv_heads, sum(counts) + 4, block_size, cases[0].d)
    k_pool, v_pool = torch.full((2, *shape), float("nan"), dtype=dtype)
    queries = []
    for case, table in zip(cases, tables, strict=True):
        q, k, v = case.tensors(dtype)
        queries.append(q)
        for position in range(case.kv_len):
            block, offset = table[position // block_size], position % block_size
            k_pool[:, block, offset], v_pool[:, block, offset] = k[:, position], v[:, position]
    metadata = AttentionMetadata.build(
        tables, [case.q_len for case in cases], [case.kv_len for case in cases], block_size=block_size
    )
    return Packed(cases, tables, torch.cat(queries), k_pool, v_pool, metadata)


BATCHES = {
    "one decode": [Case(1, 9)],
    "decodes of different lengths": [Case(1, n, heads=6, kv_heads=2) for n in (1, 3, 4, 5, 17, 40, 200, 300)],
    "decodes of one length": [Case(1, 130, heads=4, kv_heads=4) for _ in range(6)],
    "prefill, chunk, decode, verify": [
        Case(q, kv, heads=10, kv_heads=2) for q, kv in ((30, 30), (13, 45), (1, 70), (5, 33), (1, 4))
    ],
    "no queries, no keys": [Case(0, 5), Case(1, 8), Case(1, 0), Case(0, 0), Case(2, 2)],
    "padding rows": [Case(3, 1), Case(1, 600), Case(2, 0)],
    "d 80, group 7": [Case(q, kv, heads=7, d=80) for q, kv in ((1, 30), (1, 600), (2, 700), (40, 90))],
    "windows": [Case(q, kv, window=7) for q, kv in ((1, 3), (1, 90), (1, 600), (30, 70), (4, 12))],
    "long decodes alone": [Case(1, 700, d=96), Case(1, 900, d=96)],
}


def mutant(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """The module with one piece of its source replaced: a wrong version that the tests must reject."""
    source = Path(str(module.__file__)).read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__file__}, not once."
    path = folder / f"mutant_{module.__name__.rpartition('.')[2]}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    wrong = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = wrong  # dataclasses look their module up
    spec.loader.exec_module(wrong)
    return wrong


def rejected(run: Callable[[], None]) -> bool:
    """Whether a check finds fault with a wrong version; crashing is finding fault as well."""
    try:
        run()
    except (AssertionError, IndexError, RuntimeError):
        return True
    return False
