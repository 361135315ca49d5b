"""The packed batch: layout, writing, and reading through block tables that are shared, permuted and poisoned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minillm.attention import (
    LOSES,
    AttentionMetadata,
    PagedAttention,
    get_backend,
    paged,
    write_kv,
)
from minillm.attention import metadata as layout
from minillm.attention import reference as naive
from minillm.attention.paged import attend_spans, paged_attention
from minillm.errors import ConfigError
from minillm.kernels.cpu import contiguous, grouped
from minillm.kernels.cpu.grouped import CpuPlan
from tests.attention.cases import BATCHES, Case, Packed, mutant, pack, rejected

CPU_BACKENDS = {name: get_backend(name, "cpu") for name in LOSES if name != "triton"}


def attend(backend: PagedAttention, batch: Packed) -> Tensor:
    case = batch.cases[0]
    return backend(batch.q, batch.k_pool, batch.v_pool, batch.layout, scale=case.scale, sliding_window=case.window)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("order", ["shuffled", "adjacent"])
@pytest.mark.parametrize("cases", BATCHES.values(), ids=list(BATCHES))
@pytest.mark.parametrize("backend", CPU_BACKENDS.values(), ids=list(CPU_BACKENDS))
def test_each_sequence_as_if_alone(backend: PagedAttention, cases: list[Case], order: str, dtype: torch.dtype) -> None:
    """All unowned slots hold NaN: one that leaks is seen."""
    batch = pack(cases, dtype, order=order)
    batch.check(attend(backend, batch))


@pytest.mark.parametrize("cases", BATCHES.values(), ids=list(BATCHES))
@pytest.mark.parametrize("fused_rows", [0, 10**9])
def test_groups_either_way(fused_rows: int, cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through SDPA, and as two matrix products."""
    monkeypatch.setattr(grouped, "FUSED_ROWS", fused_rows)
    batch = pack(cases, torch.float64)
    batch.check(attend(paged_attention, batch))


@pytest.mark.parametrize("cases", BATCHES.values(), ids=list(BATCHES))
def test_bfloat16(cases: list[Case]) -> None:
    batch = pack(cases, torch.bfloat16, block_size=16)
    batch.check(attend(paged_attention, batch))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 90)), min_size=1, max_size=8),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 5)),
    window=st.none() | st.integers(1, 100),
    block_size=st.integers(1, 20),
    seed=st.integers(0, 2**20),
)
def test_any_batch(
    lengths: list[tuple[int, int]], heads: tuple[int, int], window: int | None, block_size: int, seed: int
) -> None:
    kv_heads, group = heads
    cases = [Case(q, kv, kv_heads * group, kv_heads, 8, window, seed=seed) for q, kv in lengths]
    batch = pack(cases, torch.float64, block_size=block_size, seed=seed)
    batch.check(attend(paged_attention, batch))


@pytest.mark.parametrize("backend", CPU_BACKENDS.values(), ids=list(CPU_BACKENDS))
def test_where_blocks_lie_changes_nothing_at_all(backend: PagedAttention) -> None:
    """Bitwise: the same keys in the same order through the same operators."""
    cases = BATCHES["decodes of different lengths"] + [Case(30, 70, heads=6, kv_heads=2)]
    first, second = (attend(backend, pack(cases, seed=seed)) for seed in (1, 2))
    assert torch.equal(first, second)


def test_sequences_may_share_blocks() -> None:
    """Two sequences with a common beginning, held once: as if each had its own copy."""
    case = Case(1, 600, heads=6, kv_heads=2)
    one = pack([case])
    table, (q, _, _) = one.tables[0], case.tensors(torch.float32)
    shared = AttentionMetadata.build([table, table, table[:100]], [1, 1, 1], [600, 600, 400], block_size=4)
    batch = Packed([case], [table], torch.cat([q, q, q]), one.k_pool, one.v_pool, shared)
    out = attend(paged_attention, batch)
    one.check(out[:1])
    one.check(out[1:2])
    _, k, v = case.tensors(torch.float32)
    shorter = attend_spans(q, k[:, :400, None], v[:, :400, None], tokens_as_blocks(400), scale=case.scale)
    torch.testing.assert_close(out[2:], shorter)


def tokens_as_blocks(kv_len: int) -> AttentionMetadata:
    """A contiguous sequence is a paged one: each token a block of its own, all neighbours."""
    return AttentionMetadata.build([list(range(kv_len))], [1], [kv_len], block_size=1)


def test_decodes_are_grouped_with_little_padding() -> None:
    lengths = [1000, 200, 990, 150, 64, 250, 1024]
    batch = pack([Case(1, n, d=8) for n in lengths] + [Case(5, 5, d=8)])
    bytes_per_key = batch.k_pool[:, 0, 0].nbytes
    for max_keys, wanted in (
        (8192, {(4,): 64, (3, 1, 5): 256, (2, 0, 6): 1024}),  # 64 is not padded to 192
        (2048, {(4,): 64, (3, 1, 5): 256, (2, 0): 1024, (6,): 1024}),
        (512, {(4,): 64, (3, 1): 256, (5,): 256, (2,): 1024, (0,): 1024, (6,): 1024}),
    ):
        plan = CpuPlan.make(batch.layout, batch.k_pool, max_keys * bytes_per_key)
        assert {tuple(group.queries.tolist()): group.rows.shape[2] for group in plan.groups} == wanted
        assert [span.index for span in plan.spans] == [7]


def test_one_decode_of_neighbouring_blocks_is_not_gathered() -> None:
    batch = pack([Case(1, 500), Case(9, 9)], order="adjacent")
    plan = CpuPlan.make(batch.layout, batch.k_pool)
    assert not plan.groups and len(plan.spans) == 2


def test_a_layer_plans_once_per_step() -> None:
    batch = pack(BATCHES["decodes of one length"])
    attend(paged_attention, batch)
    (plan,) = batch.layout.memo.values()
    attend(paged_attention, batch)
    assert list(batch.layout.memo.values()) == [plan]


def test_layout_of_a_mixed_batch() -> None:
    """By hand: a chunk of 3 behind 4 tokens, a decode, and a padding row of 2 without keys; blocks of 4."""
    built = AttentionMetadata.build([[5, 2], [7, 9, 1], []], [3, 1, 2], [7, 5, 0], block_size=4)
    assert built.slot_mapping.tolist() == [2 * 4 + 0, 2 * 4 + 1, 2 * 4 + 2, 9 * 4 + 0, 2, 3]
    assert built.block_tables.tolist() == [[5, 2], [7, 9], [0, 0]]
    assert built.cu_seqlens_q.tolist() == [0, 3, 4, 6] and built.seq_lens.tolist() == [7, 5, 0]
    assert built.q_lens == (3, 1, 2) and built.kv_lens == (7, 5, 0)
    assert [t.dtype for t in (built.block_tables, built.seq_lens, built.cu_seqlens_q)] == [torch.int32] * 3
    assert built.slot_mapping.dtype == torch.int64


def test_a_table_that_is_too_short_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot hold 9 tokens; 3 blocks are needed"):
        AttentionMetadata.build([[1, 2]], [1], [9], block_size=4)


def test_an_empty_batch() -> None:
    pool = torch.zeros(1, 2, 4, 8)
    out = paged_attention(
        torch.zeros(0, 2, 8), pool, pool, AttentionMetadata.build([], [], [], block_size=4), scale=1.0
    )
    assert out.shape == (0, 2, 8)


def check_writing(write: Any, build: Any = AttentionMetadata.build, batches: Iterable[str] = BATCHES) -> None:
    """Written through the slots, the pools equal those laid down by plain indexing; nothing else is touched.

    Memory before the pools is ours as well: a negative slot shows there, or in the head before.
    """
    for cases in map(BATCHES.__getitem__, batches):
        batch = pack(cases)
        tensors = [case.tensors(torch.float32) for case in batch.cases]
        k, v = (torch.cat([t[i] for t in tensors], dim=1).transpose(0, 1) for i in (1, 2))
        guard, *pools = guarded = torch.full((3, *batch.k_pool.shape), float("nan"))
        lengths = [case.kv_len for case in cases]
        write(k, v, *pools, build(batch.tables, lengths, lengths, block_size=4))
        assert_same(guarded, torch.stack([guard, batch.k_pool, batch.v_pool]))
        padding = torch.ones(2, *k.shape[1:])
        write(padding, padding, *pools, build([[]], [2], [0], block_size=4))
        assert guard.isnan().all()
        assert_same(guarded[:, :, 1:], torch.stack([guard, batch.k_pool, batch.v_pool])[:, :, 1:])
        assert (guarded[:, :, 0] == 1).sum() == padding.numel() * 2


def assert_same(pools: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(pools, wanted, equal_nan=True, rtol=0, atol=0)


def test_writing() -> None:
    check_writing(write_kv)


def run_all(backend: PagedAttention, build: Any = AttentionMetadata.build) -> None:
    for cases in BATCHES.values():
        for order in ("shuffled", "adjacent"):
            batch = pack(cases, order=order)
            lengths = [case.q_len for case in cases], [case.kv_len for case in cases]
            batch = replace(batch, layout=build(batch.tables, *lengths, block_size=4))
            batch.check(attend(backend, batch))


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        (layout, ".flatten()[: self.kv_len]", ".flatten()"),  # reads the table past the length
        (layout, "slice(first, first + self.kv_len)", "slice(first, first + self.block_size * len(self.table))"),
        (layout, "not self.table or self.table == list(range(self.table[0]", "True or list(range(self.table[0]"),
        (naive, "kv_len - q_len - sliding_window + 1", "kv_len - q_len - sliding_window + 2"),
        (grouped, "slice(-sliding_window, None)", "slice(-sliding_window - 1, None)"),
        (grouped, "masked_fill_(key < 0, NEG_INF)", "masked_fill_(key < 0, 0.0)"),
        (grouped, "masked_fill_(key < 0, NEG_INF)", "masked_fill_(key <= 0, NEG_INF)"),
        (grouped, "real % block_size", "0"),
        (grouped, "behind=rows.numel()", "behind=0"),  # values overwrite the keys before they are used
        (grouped, "* (num_blocks * block_size)", "* 0"),
        (grouped, "== 1 <= span.kv_len", "<= 2 <= span.kv_len"),
    ],
)
def test_the_oracle_rejects(module: ModuleType, old: str, new: str, tmp_path: Path, monkeypatch: Any) -> None:
    wrong = mutant(module, old, new, tmp_path)
    monkeypatch.setattr(paged, "CpuPlan", getattr(wrong, "CpuPlan", paged.CpuPlan))
    monkeypatch.setattr(paged, "oldest_key", getattr(wrong, "oldest_key", paged.oldest_key))
    build = wrong.AttentionMetadata.build if module is layout else AttentionMetadata.build
    assert rejected(partial(run_all, paged_attention, build))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("scores += bias", "scores += 0"),
        ("view(num_seqs, len(k), -1, d).transpose(0, 1)", "view(len(k), num_seqs, -1, d)"),
        ("* scale\n", "\n"),
    ],
)
def test_two_products_reject(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = mutant(contiguous, old, new, tmp_path)
    monkeypatch.setattr(grouped, "FUSED_ROWS", 0)
    monkeypatch.setattr(grouped, "decode_weights", wrong.decode_weights)
    assert rejected(partial(run_all, paged_attention))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("if position >= 0 else 0", "if position >= 0 else -1"),  # slot -1 is the last slot of the pool
        ("block * block_size + position % block_size", "block * block_size + position % block_size - 1"),
        ("range(kv_len - q_len, kv_len)", "range(q_len)"),
    ],
)
def test_writing_rejects(old: str, new: str, tmp_path: Path) -> None:
    wrong = mutant(layout, old, new, tmp_path)

    def run() -> None:
        check_writing(write_kv, wrong.AttentionMetadata.build)
        chunk = wrong.AttentionMetadata.build([[5, 2]], [3], [7], block_size=4)
        assert chunk.slot_mapping.tolist() == [8, 9, 10]

    assert rejected(run)
