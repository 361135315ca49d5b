"""Where tokens stand, against a definition in plain Python; and what making it costs the host."""

from __future__ import annotations

import random
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.attention.metadata import AttentionMetadata
from minillm.errors import ConfigError

Shape = tuple[list[list[int]], list[int], list[int], int]  # block tables, q_lens, kv_lens, block_size


def random_shape(seed: int) -> Shape:
    """Requests that own blocks all over a pool; some tables are longer than they need be, some rows are padding."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4, 5, 16])
    free = list(range(1, 500))
    rng.shuffle(free)
    tables, q_lens, kv_lens = list[list[int]](), list[int](), list[int]()
    for _ in range(rng.randint(0, 6)):
        kv_len = rng.choice([0, 1, block_size, rng.randint(1, 5 * block_size), 4 * block_size + 1])
        tables.append([free.pop() for _ in range(-(-kv_len // block_size) + rng.choice([0, 0, 1, 3]))])
        kv_lens.append(kv_len)
        q_lens.append(rng.choice([0, 1, 1, kv_len, rng.randint(0, kv_len), kv_len + rng.randint(1, 2 * block_size)]))
    return tables, q_lens, kv_lens, block_size


def defined_slots(tables: list[list[int]], q_lens: list[int], kv_lens: list[int], block_size: int) -> list[int]:
    """Token by token. Those before position 0 stand in block 0, at the offset that their position has."""
    slots = []
    for table, q_len, kv_len in zip(tables, q_lens, kv_lens, strict=True):
        for position in range(kv_len - q_len, kv_len):
            block = table[position // block_size] if position >= 0 else 0
            slots.append(block * block_size + position % block_size)
    return slots


def check_metadata(build: Callable[..., AttentionMetadata], shape: Shape) -> None:
    tables, q_lens, kv_lens, block_size = shape
    made = build([array("i", table) for table in tables], q_lens, kv_lens, block_size=block_size)
    needed = [-(-kv_len // block_size) for kv_len in kv_lens]
    width = max(needed, default=0)
    rows = [[*table[:count], *[0] * (width - count)] for table, count in zip(tables, needed, strict=True)]
    assert made.block_tables.tolist() == made.tables.tolist() == rows, "tables"
    assert made.block_tables.shape == made.tables.shape == (len(tables), width), "tables"
    assert made.seq_lens.tolist() == kv_lens, "lengths"
    assert made.cu_seqlens_q.tolist() == [sum(q_lens[:count]) for count in range(len(q_lens) + 1)], "beginnings"
    assert made.slot_mapping.tolist() == defined_slots(*shape), "slots"
    assert (made.q_lens, made.kv_lens, made.block_size) == (tuple(q_lens), tuple(kv_lens), block_size)
    assert [t.dtype for t in (made.block_tables, made.seq_lens, made.cu_seqlens_q)] == [torch.int32] * 3
    assert made.slot_mapping.dtype == torch.int64


@pytest.mark.parametrize("seed", range(200))
def test_metadata_is_the_definition(seed: int) -> None:
    check_metadata(AttentionMetadata.build, random_shape(seed))


def test_the_random_shapes_have_padding_and_empty_batches() -> None:
    shapes = [random_shape(seed) for seed in range(200)]
    assert any(not tables for tables, *_ in shapes)
    rows = [row for _, q_lens, kv_lens, _ in shapes for row in zip(q_lens, kv_lens, strict=True)]
    assert any(q_len > kv_len > 0 for q_len, kv_len in rows) and any(q_len > kv_len == 0 for q_len, kv_len in rows)
    assert any(0 == q_len < kv_len for q_len, kv_len in rows)


def test_an_empty_batch() -> None:
    made = AttentionMetadata.build([], [], [], block_size=4)
    assert made.block_tables.shape == (0, 0) and made.cu_seqlens_q.tolist() == [0]
    assert made.slot_mapping.shape == made.seq_lens.shape == (0,) and made.q_lens == ()
    check_metadata(AttentionMetadata.build, ([], [], [], 4))


def test_a_mixed_batch_by_hand() -> None:
    """A chunk of 3 after 4 tokens, a decode, and a padding row of 2 without keys; blocks of 4."""
    built = AttentionMetadata.build([[5, 2], [7, 9, 1], []], [3, 1, 2], [7, 5, 0], block_size=4)
    assert built.slot_mapping.tolist() == [2 * 4 + 0, 2 * 4 + 1, 2 * 4 + 2, 9 * 4 + 0, 2, 3]
    assert built.block_tables.tolist() == [[5, 2], [7, 9], [0, 0]]
    assert built.cu_seqlens_q.tolist() == [0, 3, 4, 6] and built.seq_lens.tolist() == [7, 5, 0]
    assert built.q_lens == (3, 1, 2) and built.kv_lens == (7, 5, 0)


def test_a_table_that_is_too_short_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"A block table of 2 blocks of 4 cannot hold 12 tokens\. Allocate"):
        AttentionMetadata.build([[1, 2]], [1], [9], block_size=4)


# --- wrong versions --------------------------------------------------------------------------------------------------


def wrong_slots(wrong: Callable[[AttentionMetadata], Tensor]) -> Callable[..., AttentionMetadata]:
    def build(*args: Any, **sizes: Any) -> AttentionMetadata:
        right = AttentionMetadata.build(*args, **sizes)
        return replace(right, slot_mapping=wrong(right))

    return build


def _positions_from_zero(right: AttentionMetadata) -> Tensor:
    """The chunk stands where the request begins."""
    build, lens = AttentionMetadata.build, [min(pair) for pair in zip(right.q_lens, right.kv_lens, strict=True)]
    moved = build(right.tables.tolist(), right.q_lens, lens, block_size=right.block_size)
    return moved.slot_mapping


def _padding_into_the_last_block(right: AttentionMetadata) -> Tensor:
    """What Python makes of a negative index."""
    slots, start = right.slot_mapping.clone(), 0
    for row, q_len, kv_len in zip(right.tables.tolist(), right.q_lens, right.kv_lens, strict=True):
        for place in range(max(0, q_len - kv_len)):
            slots[start + place] += (row[-1] if row else 0) * right.block_size
        start += q_len
    return slots


def _blocks_without_offset(right: AttentionMetadata) -> Tensor:
    return right.slot_mapping // right.block_size * right.block_size


@pytest.mark.parametrize("wrong", [_positions_from_zero, _padding_into_the_last_block, _blocks_without_offset])
def test_wrong_slots_are_found(wrong: Callable[[AttentionMetadata], Tensor]) -> None:
    with pytest.raises(AssertionError, match="slots"):
        for seed in range(200):
            check_metadata(wrong_slots(wrong), random_shape(seed))


def _whole_tables(tables: list[Any], *lengths: list[int], block_size: int) -> AttentionMetadata:
    """Entries that the request does not need yet are not left out."""
    right = AttentionMetadata.build(tables, *lengths, block_size=block_size)
    width = max(map(len, tables), default=0)
    rows = [[*table, *[0] * (width - len(table))] for table in tables]
    return replace(right, block_tables=torch.tensor(rows, dtype=torch.int32).view(len(tables), width))


def test_tables_that_are_not_cut_are_found() -> None:
    with pytest.raises(AssertionError, match="tables"):
        for seed in range(200):
            check_metadata(_whole_tables, random_shape(seed))


# --- what it costs ---------------------------------------------------------------------------------------------------


def count_calls(make: Callable[[], object]) -> int:
    """Calls of Python functions and of built-in ones that `make` leads to."""
    calls = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        make()
    finally:
        sys.setprofile(None)
    return calls


def calls_per_step(build: Callable[..., object], kv_len: int) -> int:
    """For 256 requests that decode."""
    tables = [array("i", range(1, 1 + -(-kv_len // 16))) for _ in range(256)]
    return count_calls(lambda: build(tables, [1] * 256, [kv_len] * 256, block_size=16))


def test_the_work_of_the_host_does_not_grow_with_the_context() -> None:
    """256 requests of 8,192 tokens cost no call more than 256 requests of 64."""
    calls_per_step(AttentionMetadata.build, 64)  # what happens only the first time
    short, long = (calls_per_step(AttentionMetadata.build, kv_len) for kv_len in (64, 8192))
    assert long <= short and short < 256 * 10


def test_calls_for_each_block_would_be_counted() -> None:
    def naming(tables: list[Any], *lengths: list[int], block_size: int) -> object:
        return [divmod(block, block_size) for table in tables for block in table]

    assert calls_per_step(naming, 8192) > calls_per_step(naming, 64)


class Watched(array):
    """A block table that notes how many of its numbers were looked at one by one."""

    looked_at = 0

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return Watched("i", array.__getitem__(self, key))
        Watched.looked_at += 1
        return array.__getitem__(self, key)

    def __iter__(self) -> Iterator[int]:
        Watched.looked_at += len(self)
        return array.__iter__(self)


def numbers_looked_at(build: Callable[..., object]) -> int:
    tables = [Watched("i", range(1, 513)) for _ in range(4)]
    Watched.looked_at = 0
    build(tables, [1] * 4, [8192] * 4, block_size=16)
    return Watched.looked_at


def test_tables_are_copied_as_arrays() -> None:
    """Not number by number, inside or outside of Python."""
    assert numbers_looked_at(AttentionMetadata.build) == 0
    assert numbers_looked_at(lambda tables, *lengths, block_size: list(map(list, tables))) == 4 * 512
