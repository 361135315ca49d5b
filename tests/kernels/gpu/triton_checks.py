"""The Triton kernels in Triton's interpreter, on the CPU. `test_triton.py` runs this file in a process of its own.

The interpreter's bfloat16 products are wrong, so bfloat16 is tested by upcasting: values rounded to bfloat16, computed
in float32. What only a compiler or a GPU can get wrong is not tested here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minillm.attention import metadata as layout
from minillm.attention.metadata import AttentionMetadata
from minillm.kernels.gpu import decode as triton_decode
from minillm.kernels.gpu import paged as triton_paged
from minillm.kernels.gpu import prefill as triton_prefill
from minillm.kernels.gpu import tiles as triton_tiles
from minillm.kernels.gpu.paged import BACKEND, prepare, triton_write_kv
from minillm.kernels.gpu.tiles import INTERPRETED, Share
from tests.attention.cases import BATCHES, CASES, Case, Packed, mutant, pack, rejected
from tests.attention.test_paged import check_writing

Kernel = Callable[..., None]
SMALL = ["one decode", "prefill, chunk, decode, verify"]


def triton_attention_lse(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, metadata: AttentionMetadata, **options: Any
) -> tuple[Tensor, Tensor]:
    """Prepared for these heads, as the cache does it once per step."""
    prepared = prepare(metadata, q.shape[1] // len(k_pool))
    return triton_paged.triton_attention_lse(q, k_pool, v_pool, prepared, **options)


def attend(batch: Packed, *kernels: Kernel, **options: Any) -> tuple[Tensor, Tensor]:
    """All sequences through the first of the kernels that takes them: decode at most 64 rows, prefill any number."""
    case = batch.cases[0]
    out = torch.full_like(batch.q, float("nan"))
    lse = torch.full(batch.q.shape[:2], float("nan"))
    busy = [i for i, q_len in enumerate(batch.metadata.q_lens) if q_len]
    share = Share.of(batch.metadata, busy)
    for kernel in kernels:
        kernel(
            batch.q, (batch.k_pool,), (batch.v_pool,), batch.metadata, share, out, lse,
            scale=case.scale, sliding_window=case.window, **options,
        )  # fmt: skip
    return out, lse


def check_prefill(cases: list[Case], dtype: torch.dtype = torch.float32) -> None:
    batch = pack(cases, dtype)
    batch.check(*attend(batch, triton_prefill.triton_prefill))


def check_decode(cases: list[Case], dtype: torch.dtype = torch.float32, num_splits: int = 3) -> None:
    batch = pack(cases, dtype)
    batch.check(*attend(batch, triton_decode.triton_decode, num_splits=num_splits))


def check_all() -> None:
    """Both kernels on the cases that find most faults, the likeliest first."""
    names = (
        "window",
        "window, one query",
        "one key, large score",
        "scores of 1e4",
        "fully masked rows",
        "group 3",
        "window wider than a tile",
    )
    for case in map(CASES.__getitem__, names):
        check_prefill([case])
        check_decode([replace(case, q_len=min(case.q_len, 8))])
    check_prefill(BATCHES["windows"])


def test_this_process_interprets() -> None:
    assert INTERPRETED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_prefill_is_the_definition(case: Case, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and case.spread > 1:
        pytest.skip("scores beyond float16")
    check_prefill([case], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_splits", [1, 3, 20])
@pytest.mark.parametrize("name", ["one key", "one query", "fully masked rows", "no keys at all", "group 5", "d 256",
                                  "window, one query", "window of one", "scores of 1e4"])  # fmt: skip
def test_decode_is_the_definition(name: str, num_splits: int, dtype: torch.dtype) -> None:
    """Twenty splits of 37 keys: most of them are empty."""
    case = replace(CASES[name], q_len=min(CASES[name].q_len, 4))
    if dtype == torch.float16 and case.spread > 1:
        pytest.skip("scores beyond float16")
    check_decode([case], dtype, num_splits)


@pytest.mark.parametrize("order", ["shuffled", "adjacent"])
@pytest.mark.parametrize("cases", BATCHES.values(), ids=list(BATCHES))
def test_each_sequence_as_if_alone(cases: list[Case], order: str) -> None:
    """Both kernels on one batch, each on its share. Unowned slots hold NaN."""
    batch = pack(cases, order=order, block_size=16)
    case = cases[0]
    batch.check(
        *triton_attention_lse(
            batch.q, batch.k_pool, batch.v_pool, batch.metadata, scale=case.scale, sliding_window=case.window
        )
    )


@pytest.mark.parametrize("name", ["prefill, chunk, decode, verify", "windows"])
def test_bfloat16_by_upcasting(name: str) -> None:
    batch = pack(BATCHES[name], torch.bfloat16)
    case = batch.cases[0]
    wide = [x.float() for x in (batch.q, batch.k_pool, batch.v_pool)]
    prepared = BACKEND.prepare(batch.metadata, wide[1], wide[0].shape[1] // len(wide[1]))
    out = BACKEND.attend(*wide, prepared, scale=case.scale, sliding_window=case.window)
    batch.check(out.bfloat16())


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 70)), min_size=1, max_size=4),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 8)),
    d=st.integers(1, 40),
    window=st.none() | st.integers(1, 80),
    block_size=st.integers(1, 20),
    seed=st.integers(0, 2**20),
)
def test_any_batch(
    lengths: list[tuple[int, int]], heads: tuple[int, int], d: int, window: int | None, block_size: int, seed: int
) -> None:
    kv_heads, group = heads
    cases = [Case(q, kv, kv_heads * group, kv_heads, d, window, seed=seed) for q, kv in lengths]
    batch = pack(cases, block_size=block_size, seed=seed)
    batch.check(
        *triton_attention_lse(
            batch.q, batch.k_pool, batch.v_pool, batch.metadata, scale=cases[0].scale, sliding_window=window
        )
    )


def test_strides_of_a_fused_projection() -> None:
    batch = pack(BATCHES["prefill, chunk, decode, verify"])
    fused = torch.cat([batch.q, batch.q], dim=1)[:, : batch.q.shape[1]]
    batch.check(*attend(replace(batch, q=fused), triton_prefill.triton_prefill))
    scattered = torch.stack([batch.q, batch.q], dim=-1)[..., 0]
    batch.check(
        triton_attention_lse(scattered, batch.k_pool, batch.v_pool, batch.metadata, scale=batch.cases[0].scale)[0]
    )


def test_lengths_come_from_the_device() -> None:
    """What a CUDA graph replays: launched for the longest sequence, the true lengths read from tensors."""
    cases = [Case(1, n, heads=4, kv_heads=2) for n in (3, 40, 17)]
    batch = pack(cases)
    bound = AttentionMetadata.build([[0] * 40] * 3, [1, 1, 1], [160] * 3, block_size=4)
    bound.block_tables[:, : batch.metadata.block_tables.shape[1]] = batch.metadata.block_tables
    bound.seq_lens.copy_(batch.metadata.seq_lens)
    batch.check(triton_attention_lse(batch.q, batch.k_pool, batch.v_pool, bound, scale=cases[0].scale)[0])


def test_writing() -> None:
    check_writing(triton_write_kv, batches=SMALL)


def test_what_the_benchmark_measures_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    from attention_work import Decodes, Prompt

    cpu = torch.device("cpu")
    prompt = Prompt.random("smollm2-135m", 64, torch.float32, cpu)
    assert prompt.error(prompt.call("triton")()) < 1e-5
    decodes = Decodes.random("smollm2-135m", 2, 32, "scattered", torch.float32, cpu, cold_bytes=1)
    assert decodes.error(decodes.call("triton")()) < 1e-5


HUGE = 2**31 // 1024 + 7  # of blocks of 16 x 64 numbers: the last ones begin past 2^31


def check_far_blocks() -> None:
    """A pool of more than 2^31 numbers, of which only the pages of two blocks are ever touched.

    It is the end of a buffer twice as long: an offset that wraps around reads wrong numbers instead of crashing.
    """
    case = Case(2, 20, d=64)
    q, k, v = case.tensors(torch.float16)
    pool = torch.empty(2**31 + HUGE * 1024, dtype=torch.float16)[2**31 :].view(1, HUGE, 16, 64)
    table = [HUGE - 1, HUGE - 3]
    whole = AttentionMetadata.build([table], [20], [20], block_size=16)
    triton_write_kv(k.transpose(0, 1), v.transpose(0, 1), pool, pool, whole)
    step = AttentionMetadata.build([table], [2], [20], block_size=16)
    out, _ = triton_attention_lse(q, pool, pool, step, scale=case.scale)
    assert (pool[0, HUGE - 1] == v[0, :16]).all() and (pool[0, HUGE - 3, :4] == v[0, 16:]).all()
    wanted, _ = triton_attention_lse(q, v[:, None], v[:, None], one_block(case), scale=case.scale)
    torch.testing.assert_close(out, wanted)


def one_block(case: Case) -> AttentionMetadata:
    """A contiguous sequence: one block that holds all of it."""
    return AttentionMetadata.build([[0]], [case.q_len], [case.kv_len], block_size=case.kv_len)


def test_blocks_beyond_two_billion_numbers() -> None:
    check_far_blocks()


MUTANTS = {
    "O is not rescaled": (triton_tiles, "out *= rescale[:, None]", "out *= 1.0"),
    "l is not rescaled": (triton_tiles, "l = l * rescale +", "l = l +"),
    "m starts at 0": (triton_tiles, 'tl.full([q.shape[0]], float("-inf")', "tl.full([q.shape[0]], 0.0"),
    "base of a hidden row": (triton_tiles, 'tl.where(m_new == float("-inf"), 0.0, m_new)', "m_new"),
    "window off by one": (triton_tiles, "> position[:, None] - window", ">= position[:, None] - window"),
    "causal off by one": (triton_tiles, "<= position[:, None]", "< position[:, None]"),
    "too many tiles without a mask": (triton_tiles, "tl.minimum(hi, first + 1)", "tl.minimum(hi, last + 1)"),
    "window's edge without a mask": (triton_tiles, "last - window + 1 - lo, 0", "first - window + 1 - lo, 0"),
    "prefill aligned top-left": (triton_prefill, "offset = kv_len - q_len", "offset = kv_len * 0"),
    "decode aligned top-left": (triton_decode, "offset = kv_len - q_len", "offset = kv_len * 0"),
    "merge without the maximum": (triton_decode, 'tl.where(largest == float("-inf"), 0.0, largest)', "largest * 0"),
    "a split too short": (triton_decode, "lo = oldest + split * share", "lo = oldest + split * share + split"),
    "heads of a group mixed up": (triton_prefill, "kv_head * GROUP + row % GROUP", "kv_head + row % GROUP"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_the_oracle_rejects(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, old, new = MUTANTS[name]
    wrong = mutant(module, old, new, tmp_path)
    for target, attribute in (
        (triton_prefill, "attend_keys"),
        (triton_decode, "attend_keys"),
        (triton_prefill, "triton_prefill"),
        (triton_decode, "triton_decode"),
    ):
        if hasattr(wrong, attribute) and (module is triton_tiles or module is target):
            monkeypatch.setattr(target, attribute, getattr(wrong, attribute))
    assert rejected(check_all)


def test_reading_past_the_length_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """37 keys in blocks of 4: the slot behind the last key exists, belongs to nobody and holds NaN."""
    wrong = mutant(triton_tiles, "inside = key < hi", "inside = key <= hi", tmp_path)
    for module, kernel in ((triton_prefill, check_prefill), (triton_decode, check_decode)):
        monkeypatch.setattr(module, "attend_keys", wrong.attend_keys)
        assert rejected(lambda kernel=kernel: kernel([CASES["one query"]]))


def test_32_bit_block_offsets_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = mutant(
        triton_tiles,
        "head_block + tl.load(table + key // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)",
        "tl.load(table + key // BLOCK_SIZE, mask=inside, other=0)",
        tmp_path,
    )
    monkeypatch.setattr(triton_decode, "attend_keys", wrong.attend_keys)
    assert rejected(check_far_blocks)


def test_32_bit_slots_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = mutant(
        triton_paged, "slot = tl.load(slots_ptr + token)", "slot = tl.load(slots_ptr + token).to(tl.int32)", tmp_path
    )
    monkeypatch.setattr("tests.kernels.gpu.triton_checks.triton_write_kv", wrong.triton_write_kv)
    assert rejected(check_far_blocks)


def test_slot_minus_one_is_rejected(tmp_path: Path) -> None:
    """A padding token at slot -1 overwrites the last slot of the head before."""
    wrong = mutant(layout, "np.where(position < 0, 0, block)", "np.where(position < 0, -1, block)", tmp_path)
    assert rejected(lambda: check_writing(triton_write_kv, wrong.AttentionMetadata.build, SMALL))
