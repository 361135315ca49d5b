"""The Triton kernels on quantised caches, in the interpreter: equal to their PyTorch twin, whatever the batch.

`test_triton.py` runs this file in a process of its own. Keys and values come through the real cache, so that codes,
ranges and tails lie as the engine lays them; what belongs to no token is poisoned with NaN.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from minillm.attention import AttentionMetadata
from minillm.errors import ConfigError
from minillm.kernels.gpu import decode as triton_decode
from minillm.kernels.gpu import prefill as triton_prefill
from minillm.kernels.gpu import tiles as triton_tiles
from minillm.kernels.gpu.paged import triton_attention
from minillm.kernels.gpu.tiles import INTERPRETED
from minillm.quantization.attention import quantized_attention
from minillm.quantization.cache import QuantizedCache
from minillm.quantization.formats import FORMATS, QuantizedPool
from tests.attention.cases import BATCHES, Case, mutant, rejected, tolerance
from tests.families import random_model

NAMES = list(FORMATS)


def attend_both(cases: list[Case], form: str, block_size: int = 32, dtype: torch.dtype = torch.float32) -> None:
    """Lay down all earlier tokens, then compare twin and kernels on the step. Raises AssertionError if they differ."""
    cases = [replace(case, seed=case.seed + 1000 * i) for i, case in enumerate(cases)]
    counts = [ceil(case.kv_len / block_size) for case in cases]
    order = 1 + torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0))
    tables = [part.tolist() for part in order.split(counts)]
    cache = poisoned_cache(cases[0], form, 1 + sum(counts), block_size, dtype)
    tensors = [case.tensors(dtype) for case in cases]
    before = [max(0, case.kv_len - case.q_len) for case in cases]
    cache.attention = lambda q, *_, **__: q
    run(cache, tables, tensors, before, before)
    outs: list[Tensor] = []
    cache.attention = partial(compared, outs, cases[0])
    run(cache, tables, tensors, [case.q_len for case in cases], [case.kv_len for case in cases])
    twin, kernels = outs
    worst = (twin - kernels).abs().max().item() if twin.numel() else 0.0
    assert worst <= tolerance(cases[0], dtype), f"{form}, {block_size=}, {dtype}: off by {worst:.3g} in {cases}"


def run(
    cache: QuantizedCache,
    tables: list[list[int]],
    tensors: list[tuple[Tensor, Tensor, Tensor]],
    q_lens: list[int],
    kv_lens: list[int],
) -> None:
    """One step: the last `q_len` of the first `kv_len` tokens of each sequence; those before its begin are padding."""
    parts = []
    for (q, k, v), q_len, kv_len in zip(tensors, q_lens, kv_lens, strict=True):
        q = pad(q, (0, 0, 0, 0, max(0, q_len - len(q)), 0))
        k, v = (pad(x[:, :kv_len], (0, 0, max(0, q_len - kv_len), 0)) for x in (k, v))
        parts.append((q[len(q) - q_len :], *(x[:, x.shape[1] - q_len :].transpose(0, 1) for x in (k, v))))
    layout = AttentionMetadata.build(tables, q_lens, kv_lens, block_size=cache.block_size)
    cache.attend(layout)(0, *(torch.cat(x) for x in zip(*parts, strict=True)))


def compared(
    outs: list[Tensor], case: Case, q: Tensor, keys: Any, values: Any, layout: AttentionMetadata, **options: Any
) -> Tensor:
    """What the twin and the kernels make of the same arguments, left in `outs`."""
    options |= {"scale": case.scale, "sliding_window": case.window}
    outs[:] = [one(q, keys, values, layout, **options) for one in (quantized_attention, triton_attention)]
    return outs[0]


def poisoned_cache(case: Case, form: str, num_blocks: int, block_size: int, dtype: torch.dtype) -> QuantizedCache:
    """One layer; ranges and tails are NaN until somebody writes them."""
    heads = {"num_attention_heads": case.heads, "num_key_value_heads": case.kv_heads, "head_dim": case.d}
    config = random_model("llama2", num_hidden_layers=1, **heads).config
    cache = QuantizedCache(
        config, quantized_attention, FORMATS[form],
        num_blocks=num_blocks, block_size=block_size, device=torch.device("cpu"), dtype=dtype,
    )  # fmt: skip
    for tensor in [
        *cache.keys[0].tensors[1:],
        *cache.values[0].tensors[1:],
        *(cache.tails.keys if cache.tails else []),
    ]:
        tensor.fill_(torch.nan)
    return cache


def test_this_process_interprets() -> None:
    assert INTERPRETED


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("name", ["one decode", "prefill, chunk, decode, verify", "padding rows", "windows"])
def test_kernels_are_the_twin(name: str, form: str) -> None:
    attend_both(BATCHES[name], form)


@pytest.mark.parametrize("form", NAMES)
def test_in_float16(form: str) -> None:
    attend_both(BATCHES["prefill, chunk, decode, verify"], form, dtype=torch.float16)


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 50)), min_size=1, max_size=3),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 5)),
    d=st.integers(1, 20).map(lambda half: 2 * half),
    window=st.none() | st.integers(1, 60),
    block_size=st.integers(1, 20),
    form=st.sampled_from(NAMES),
    seed=st.integers(0, 2**20),
)
def test_any_batch(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    d: int,
    window: int | None,
    block_size: int,
    form: str,
    seed: int,
) -> None:
    kv_heads, group = heads
    attend_both([Case(q, kv, kv_heads * group, kv_heads, d, window, seed=seed) for q, kv in lengths], form, block_size)


def test_every_code_of_float8_is_read_exactly() -> None:
    """One key and one value whose codes are all 254 finite e4m3 numbers: the output is the value."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()]
    pool = QuantizedPool(FORMATS["fp8"].values, (1, 1, 1, len(numbers)), torch.device("cpu"))
    pool.write(numbers[None, None], torch.tensor([0]))
    layout = AttentionMetadata.build([[0]], [1], [1], block_size=1)
    out = triton_attention(torch.ones(1, 1, len(numbers)), pool, pool, layout, scale=1.0)
    assert torch.equal(out[0, 0], numbers)


def test_what_the_benchmark_measures_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    from kv_decode import DECODED_FIRST, PLAIN, KvDecodes

    for name in (PLAIN, *NAMES, DECODED_FIRST):
        work = KvDecodes.random(name, "smollm2-135m", 2, 64, torch.device("cpu"), cold_bytes=1)
        assert work.error(work.call("triton")()) < 1e-5 < work.error(work.q), name


def test_int4_keys_want_their_tails() -> None:
    form = FORMATS["int4"]
    pools = [QuantizedPool(codec, (1, 2, 4, 8), torch.device("cpu")) for codec in (form.keys, form.values)]
    with pytest.raises(ConfigError, match="tails"):
        triton_attention(torch.ones(1, 1, 8), *pools, AttentionMetadata.build([[1]], [1], [1], block_size=4), scale=1.0)


MUTANTS = {
    "step of a range": ("(high - low) / 15", "(high - low) / 16"),
    "largest int8 code": ("127.0 if FORMAT", "128.0 if FORMAT"),
    "bias of float8's exponent": ("448.0 / 256", "448.0 / 128"),
    "sign of float8": ("(bits & 0x80) << 8 |", "(bits & 0x80) << 9 |"),
    "halves of a byte swapped": ("(dim // half * 4)", "(4 - dim // half * 4)"),
    "channels beside each other": ("(dim % half)[None, :]", "(dim // 2)[None, :]"),
    "low of the values forgotten": ("out += tl.sum(weights * low[None, :], 1)[:, None]", "out += 0.0"),
    "low before the rescale": ("tl.sum(weights * low", "tl.sum(weights * rescale[:, None] * low"),
    "steps of the values forgotten": ("weights *= step[None, :]", "weights *= 1.0"),
    "keys' steps of the wrong block": ("block[:, None] * HEAD_DIM", "(block[:, None] + 1) * HEAD_DIM"),
    "own block as it is stored": ("tl.maximum(lo, seen_by_all), hi,", "hi, hi,"),
    "own block twice": (
        "seen = seen & (key[None, :] // BLOCK_SIZE < position",
        "seen = seen & (key[None, :] // BLOCK_SIZE <= position",
    ),
    "earlier blocks twice": (
        "seen = seen & (key[None, :] // BLOCK_SIZE == position",
        "seen = seen & (key[None, :] // BLOCK_SIZE <= position",
    ),
    "tails of the wrong head": ("tail = head_tail +", "tail = head_tail * 0 +"),
    "codes of the wrong head": ("block = head_block +", "block = head_block * 0 +"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_the_twin_rejects(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = mutant(triton_tiles, *MUTANTS[name], tmp_path)
    for module in (triton_prefill, triton_decode):
        monkeypatch.setattr(module, "attend_keys", wrong.attend_keys)
    assert rejected(check_all)


def test_the_twin_accepts_what_is_right() -> None:
    check_all()


def check_all() -> None:
    """Two heads; queries in a block of their own, in the middle of one, and across two."""
    for form in NAMES:
        attend_both([Case(3, 11, 4, 2, 16), Case(40, 40, 4, 2, 16)], form, block_size=8)
    test_every_code_of_float8_is_read_exactly()
