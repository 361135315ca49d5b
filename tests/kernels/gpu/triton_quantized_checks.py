"""The Triton kernels on quantised caches, in the interpreter: equal to their PyTorch twin, whatever the batch.

`test_triton.py` runs this file in a process of its own. Keys and values come through the real cache, so that codes,
ranges lie as the engine lays them; what belongs to no token is poisoned with NaN.
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

from minillm.attention.metadata import AttentionMetadata
from minillm.kernels.gpu import decode as triton_decode
from minillm.kernels.gpu import prefill as triton_prefill
from minillm.kernels.gpu import tiles as triton_tiles
from minillm.kernels.gpu.quantized import prepare, quantized_attention
from minillm.kernels.gpu.tiles import INTERPRETED
from minillm.quantization.attention import quantized_attention as twin_attention
from minillm.quantization.cache import QuantizedCache
from minillm.quantization.formats import FORMATS
from tests.attention.cases import BATCHES, Case, mutant, tolerance
from tests.families import random_model

NAMES = list(FORMATS)


def attend_both(cases: list[Case], form: str, block_size: int = 32, dtype: torch.dtype = torch.float32) -> None:
    """Lay down all earlier tokens, then compare twin and kernels on the step. Raises AssertionError if they differ."""
    cases = [replace(case, seed=case.seed + 1000 * i) for i, case in enumerate(cases)]
    counts = [ceil(case.kv_len / block_size) for case in cases]
    order = 1 + torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0))
    tables = [part.tolist() for part in order.split(counts)]
    cache = poisoned_cache(cases[0], form, 1 + sum(counts), block_size)
    tensors = [case.tensors(dtype) for case in cases]
    before = [max(0, case.kv_len - case.q_len) for case in cases]
    cache.attention = lambda q, *_, **__: q
    run(cache, tables, tensors, before, before)
    outs: list[Tensor] = []
    cache.attention = partial(compared, outs)
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
    metadata = AttentionMetadata.build(tables, q_lens, kv_lens, block_size=cache.block_size)
    cache.attend(metadata)(0, *(torch.cat(x) for x in zip(*parts, strict=True)))


def compared(outs: list[Tensor], q: Tensor, keys: Any, values: Any, metadata: Any, **options: Any) -> Tensor:
    """What the twin and the kernels make of the same arguments, left in `outs`."""
    plan = prepare(metadata, q.shape[1] // len(keys[0]))
    outs[:] = (
        twin_attention(q, keys, values, metadata, **options),
        quantized_attention(q, keys, values, plan, **options),
    )
    return outs[0]


def poisoned_cache(case: Case, form: str, num_blocks: int, block_size: int) -> QuantizedCache:
    """One layer; ranges are NaN until somebody writes them."""
    heads = {"num_attention_heads": case.heads, "num_key_value_heads": case.kv_heads, "head_dim": case.d}
    config = random_model("llama2", num_hidden_layers=1, **heads).config
    config = replace(config, sliding_window=case.window)
    cache = QuantizedCache(
        config, FORMATS[form], num_blocks=num_blocks, block_size=block_size, device=torch.device("cpu")
    )
    for tensor in [*cache.keys[0][1:], *cache.values[0][1:]]:
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
    d=st.integers(1, 50).map(lambda half: 2 * half),
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
    stored = FORMATS["fp8"].encode(numbers[None, None, None])  # one head, one block, one token
    plan = prepare(AttentionMetadata.build([[0]], [1], [1], block_size=1), 1)
    out = quantized_attention(torch.ones(1, 1, len(numbers)), stored, stored, plan, scale=1.0)
    assert torch.equal(out[0, 0], numbers)


def test_what_the_benchmark_measures_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    from kv_decode import DECODED_FIRST, PLAIN, KvDecodes

    for name in (PLAIN, *NAMES, DECODED_FIRST):
        work = KvDecodes.random(name, "smollm2-135m", 2, 64, torch.device("cpu"), cold_bytes=1)
        assert work.error(work.call("triton")()) < 1e-5 < work.error(work.q), name


MUTANTS = {
    "step of a range": ("(high - low) / 15", "(high - low) / 16"),
    "largest int8 code": ("127.0 if FORMAT", "128.0 if FORMAT"),
    "bias of float8's exponent": ("448.0 / 256", "448.0 / 128"),
    "sign of float8": ("(bits & 0x80) << 8 |", "(bits & 0x80) << 9 |"),
    "halves of a byte swapped": ("(dim // half * 4)", "(4 - dim // half * 4)"),
    "channels beside each other": ("(dim % half)[None, :]", "(dim // 2)[None, :]"),
    "low end of a range forgotten": ("numbers = low + code", "numbers = code"),
    "ranges of another group": ("(dim // group)[None, :]", "(GROUPS - 1 - dim // group)[None, :]"),
    "one range for all groups": ("(dim // group)[None, :]", "(dim * 0)[None, :]"),
    "groups as large as a warp": ("(HEAD_DIM + GROUPS - 1) // GROUPS", "32"),
    "ranges of another token": ("place = token[:, None] * GROUPS", "place = token[:, None]"),
    "steps of the keys forgotten": ("scores *= _step(", "scores *= 0.01 + 0.0 * _step("),
    "steps of the values forgotten": ("weights *= _step(", "weights *= 1.0 + 0.0 * _step("),
    "codes of the wrong head": ("block = head_block +", "block = head_block * 0 +"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_the_twin_rejects(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = mutant(triton_tiles, *MUTANTS[name], tmp_path)
    for module in (triton_prefill, triton_decode):
        monkeypatch.setattr(module, "attend_keys", wrong.attend_keys)
    with pytest.raises(AssertionError):
        check_all()


def test_the_twin_accepts_what_is_right() -> None:
    check_all()


def check_all() -> None:
    """Two heads of 40 channels, groups of 20; queries in a block of their own, in the middle of one, and across two."""
    for form in NAMES:
        attend_both([Case(3, 11, 4, 2, 40), Case(40, 40, 4, 2, 40)], form, block_size=8)
    test_every_code_of_float8_is_read_exactly()
