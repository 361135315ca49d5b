"""The packed batch: layout, writing, and reading through block tables that are shared, permuted and poisoned."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minillm.attention import paged
from minillm.attention import reference as naive
from minillm.attention.metadata import AttentionMetadata
from minillm.attention.paged import REFERENCE, Backend, paged_attention, write_kv
from minillm.kernels import sdpa
from minillm.kernels.cpu import attention as one_by_one
from minillm.kernels.cpu import paged as grouped
from minillm.kernels.cpu.paged import BACKEND, prepare
from tests.attention.cases import BATCHES, Case, Packed, mutant, pack


def with_kernel(kernel: Callable[..., Tensor]) -> Backend:
    """Request by request."""
    return Backend(partial(paged_attention, kernel=kernel), write_kv)


CPU_BACKENDS = {
    "auto": BACKEND,
    "reference": REFERENCE,
    "naive": with_kernel(naive.naive_attention),
    "sdpa": with_kernel(sdpa.attention),
}


def attend(backend: Backend, batch: Packed) -> Tensor:
    case, metadata = batch.cases[0], backend.prepare(batch.metadata, batch.k_pool)
    window = case.window
    return backend.attend(batch.q, batch.k_pool, batch.v_pool, metadata, scale=case.scale, sliding_window=window)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("order", ["shuffled", "adjacent"])
@pytest.mark.parametrize("cases", BATCHES.values(), ids=list(BATCHES))
@pytest.mark.parametrize("backend", CPU_BACKENDS.values(), ids=list(CPU_BACKENDS))
def test_each_request_as_if_alone(backend: Backend, cases: list[Case], order: str, dtype: torch.dtype) -> None:
    """All unowned slots hold NaN: one that leaks is seen."""
    batch = pack(cases, dtype, order=order)
    batch.check(attend(backend, batch))


@pytest.mark.parametrize("cases", BATCHES.values(), ids=list(BATCHES))
@pytest.mark.parametrize("fused_rows", [0, 10**9])
def test_groups_either_way(fused_rows: int, cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through SDPA, and as two matrix products."""
    monkeypatch.setattr(grouped, "FUSED_ROWS", fused_rows)
    batch = pack(cases, torch.float64)
    batch.check(attend(BACKEND, batch))


@pytest.mark.parametrize("cases", BATCHES.values(), ids=list(BATCHES))
def test_bfloat16(cases: list[Case]) -> None:
    batch = pack(cases, torch.bfloat16, block_size=16)
    batch.check(attend(BACKEND, batch))


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
    batch.check(attend(BACKEND, batch))


@pytest.mark.parametrize("backend", CPU_BACKENDS.values(), ids=list(CPU_BACKENDS))
def test_where_blocks_lie_changes_nothing_at_all(backend: Backend) -> None:
    """Bitwise: the same keys in the same order through the same operators."""
    cases = BATCHES["decodes of different lengths"] + [Case(30, 70, heads=6, kv_heads=2)]
    first, second = (attend(backend, pack(cases, seed=seed)) for seed in (1, 2))
    assert torch.equal(first, second)


def test_requests_may_share_blocks() -> None:
    """Two requests with a common beginning, held once: as if each had its own copy."""
    case = Case(1, 600, heads=6, kv_heads=2)
    one = pack([case])
    table, (q, k, v) = one.tables[0], case.tensors(torch.float32)
    shared = AttentionMetadata.build([table, table, table[:100]], [1, 1, 1], [600, 600, 400], block_size=4)
    batch = Packed([case], [table], torch.cat([q, q, q]), one.k_pool, one.v_pool, shared)
    shorter = naive.naive_attention(q, k[:, :400], v[:, :400], scale=case.scale)
    for backend in CPU_BACKENDS.values():
        out = attend(backend, batch)
        one.check(out[:1])
        one.check(out[1:2])
        torch.testing.assert_close(out[2:], shorter)


def test_decodes_are_grouped_with_little_padding() -> None:
    lengths = [1000, 200, 990, 150, 64, 250, 1024]
    batch = pack([Case(1, n, d=8) for n in lengths] + [Case(5, 5, d=8)])
    bytes_per_key = batch.k_pool[:, 0, 0].nbytes
    for max_keys, wanted in (
        (8192, {(4,): 64, (3, 1, 5): 256, (2, 0, 6): 1024}),  # 64 is not padded to 192
        (2048, {(4,): 64, (3, 1, 5): 256, (2, 0): 1024, (6,): 1024}),
        (512, {(4,): 64, (3, 1): 256, (5,): 256, (2,): 1024, (0,): 1024, (6,): 1024}),
    ):
        plan = prepare(batch.metadata, batch.k_pool, group_bytes=max_keys * bytes_per_key)
        assert {tuple(group.queries.tolist()): group.rows.shape[2] for group in plan.groups} == wanted
        assert plan.rest == (7,)


def test_one_decode_of_adjacent_blocks_is_not_gathered() -> None:
    batch = pack([Case(1, 500), Case(9, 9)], order="adjacent")
    plan = prepare(batch.metadata, batch.k_pool)
    assert not plan.groups and plan.rest == (0, 1)


def test_an_empty_batch() -> None:
    pool, nothing = torch.zeros(1, 2, 4, 8), AttentionMetadata.build([], [], [], block_size=4)
    for backend in CPU_BACKENDS.values():
        out = backend.attend(torch.zeros(0, 2, 8), pool, pool, backend.prepare(nothing, pool), scale=1.0)
        assert out.shape == (0, 2, 8)


def where_blocks_lie(kernel: Callable[..., Tensor]) -> None:
    """`read` gives a request's own keys: straight from the pool or gathered, from the oldest visible one on."""
    for cases in BATCHES.values():
        for order in ("shuffled", "adjacent"):
            batch = pack(cases, order=order)
            for index, case in enumerate(batch.cases):
                oldest = 0 if case.window is None else max(0, case.kv_len - case.q_len - case.window + 1)
                _, k, v = case.tensors(torch.float32)
                for pool, want in ((batch.k_pool, k), (batch.v_pool, v)):
                    got = kernel(pool, batch.metadata, index, case.window)
                    assert got.shape == want[:, oldest:].shape and torch.equal(got, want[:, oldest:]), case


def test_a_request_reads_its_own_keys() -> None:
    where_blocks_lie(paged.read)


def test_adjacent_blocks_are_read_where_they_lie() -> None:
    """No copy of a long context: a view into the pool."""
    for order, shared in (("adjacent", True), ("shuffled", False)):
        batch = pack([Case(1, 500)], order=order)
        keys = paged.read(batch.k_pool, batch.metadata, 0)
        assert (keys.untyped_storage().data_ptr() == batch.k_pool.untyped_storage().data_ptr()) == shared


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


def run_all(backend: Backend) -> None:
    for cases in BATCHES.values():
        for order in ("shuffled", "adjacent"):
            batch = pack(cases, order=order)
            batch.check(attend(backend, batch))


def _whole_blocks(pool: Tensor, metadata: AttentionMetadata, index: int, window: int | None = None) -> Tensor:
    """Past the length, to the end of the last block."""
    count = -(-metadata.kv_lens[index] // metadata.block_size)
    return pool[:, torch.from_numpy(metadata.tables[index, :count])].flatten(1, 2)


def _from_the_first(pool: Tensor, metadata: AttentionMetadata, index: int, window: int | None = None) -> Tensor:
    """As if all blocks lay side by side."""
    first = int(metadata.tables[index, 0]) if metadata.kv_lens[index] else 0
    return pool.flatten(1, 2)[:, first * metadata.block_size :][:, : metadata.kv_lens[index]]


def _short_window(pool: Tensor, metadata: AttentionMetadata, index: int, window: int | None = None) -> Tensor:
    return _right_read(pool, metadata, index, window and window - 1)


_right_read = paged.read


@pytest.mark.parametrize("wrong", [_whole_blocks, _from_the_first, _short_window])
def test_wrong_reading_is_found(wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        where_blocks_lie(wrong)
    monkeypatch.setattr(paged, "read", wrong)
    with pytest.raises(AssertionError):
        run_all(with_kernel(naive.naive_attention))


@pytest.mark.parametrize(
    "old_and_new", [("kv_len - q_len - sliding_window + 1", "kv_len - q_len - sliding_window + 2")]
)
def test_a_key_that_is_left_out_is_found(old_and_new: tuple[str, str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(paged, "oldest_key", mutant(naive, *old_and_new, tmp_path).oldest_key)
    with pytest.raises(AssertionError):
        run_all(REFERENCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("slice(-sliding_window, None)", "slice(-sliding_window - 1, None)"),
        ("masked_fill_(key < 0, NEG_INF)", "masked_fill_(key < 0, 0.0)"),
        ("masked_fill_(key < 0, NEG_INF)", "masked_fill_(key <= 0, NEG_INF)"),
        ("real % block_size", "0"),
        ("metadata.buffer[rows.numel() :]", "metadata.buffer"),  # values overwrite the keys before they are used
        ("* (num_blocks * block_size)", "* 0"),
        ("q_len == 1 <= kv_lens[index]", "q_len <= 2 <= kv_lens[index]"),
    ],
)
def test_the_oracle_rejects(old: str, new: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        run_all(mutant(grouped, old, new, tmp_path).BACKEND)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("scores += bias", "scores += 0"),
        ("view(num_seqs, len(k), -1, d).transpose(0, 1)", "view(num_seqs, -1, len(k), d).permute(2, 0, 1, 3)"),
        ("* scale\n", "\n"),
    ],
)
def test_two_products_reject(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = mutant(one_by_one, old, new, tmp_path)
    monkeypatch.setattr(grouped, "FUSED_ROWS", 0)
    monkeypatch.setattr(grouped, "decode_weights", wrong.decode_weights)
    with pytest.raises(AssertionError):
        run_all(BACKEND)


def _slots(wrong: Callable[[AttentionMetadata, Tensor], Tensor]) -> Callable[..., AttentionMetadata]:
    """Metadata whose slots are changed by `wrong`."""

    def build(*args: Any, **sizes: Any) -> AttentionMetadata:
        right = AttentionMetadata.build(*args, **sizes)
        return replace(right, slot_mapping=wrong(right, right.slot_mapping))

    return build


def _padding_to_the_end(metadata: AttentionMetadata, slots: Tensor) -> Tensor:
    """Slot -1 is the last one of the pool: so NumPy and PyTorch read a negative index."""
    padding = [i for i, (q, kv) in enumerate(zip(metadata.q_lens, metadata.kv_lens, strict=True)) if q > kv]
    return slots.where(torch.tensor(not padding), -1)


WRITING = {
    "padding goes to the end of the pool": _padding_to_the_end,
    "one slot too early": lambda metadata, slots: slots - 1,
    "in the order of the blocks' numbers": lambda metadata, slots: slots.sort()[0],
}


@pytest.mark.parametrize("name", WRITING)
def test_wrong_writing_is_found(name: str) -> None:
    build = _slots(WRITING[name])

    def at_any_slot(k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, metadata: AttentionMetadata) -> None:
        for x, pool in ((k, k_pool), (v, v_pool)):
            pool.flatten(1, 2)[:, metadata.slot_mapping] = x.transpose(0, 1)

    check_writing(at_any_slot)
    with pytest.raises(AssertionError):
        check_writing(at_any_slot, build)
