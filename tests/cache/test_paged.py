"""The pools: bytes against the formula, copies, sizes from a budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minillm.attention.metadata import AttentionMetadata
from minillm.attention.paged import REFERENCE
from minillm.attention.tiled import attention
from minillm.cache.paged import PagedCache, choose_num_blocks
from minillm.config import EngineConfig, ModelConfig
from minillm.costs.formulas import kv_bytes_per_token
from minillm.errors import ConfigError

CONFIG = ModelConfig("LlamaForCausalLM", 50, 24, 32, 3, 6, 2, 8, max_position_embeddings=100)
CPU = torch.device("cpu")
PER_BLOCK = 1536  # bytes of a block of 4 tokens in float32


def make_cache(dtype: torch.dtype = torch.float32, num_blocks: int = 12, config: ModelConfig = CONFIG) -> PagedCache:
    return PagedCache(config, REFERENCE, num_blocks=num_blocks, block_size=4, device=CPU, dtype=dtype)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_equal_the_formula(dtype: torch.dtype, size: int) -> None:
    cache = make_cache(dtype)
    per_token = 2 * 3 * 2 * 8 * size  # K and V, layers, KV heads, head_dim
    assert cache.bytes_per_token == per_token
    assert sum(pool.nbytes for pool in cache.keys + cache.values) == 12 * 4 * per_token == 12 * PER_BLOCK * size // 4
    assert kv_bytes_per_token(CONFIG, dtype.itemsize) == per_token


def test_trap_33_attend_takes_slices_of_a_fused_projection_and_writes_first() -> None:
    """Two requests in scattered blocks, computed in two steps, against one-shot attention on plain tensors."""
    generator = torch.Generator().manual_seed(0)
    lengths, tables = (7, 10), ([5, 2], [7, 1, 9])
    fused = [torch.randn(n, 10, 8, generator=generator) for n in lengths]
    q, k, v = zip(*(qkv.split([6, 2, 2], dim=1) for qkv in fused), strict=True)
    cache = make_cache()
    cut = (3, 6)
    outputs = []
    for start, end in (((0, 0), cut), (cut, lengths)):
        packed = torch.cat([qkv[a:b] for qkv, a, b in zip(fused, start, end, strict=True)]).split([6, 2, 2], dim=1)
        q_lens = [b - a for a, b in zip(start, end, strict=True)]
        metadata = AttentionMetadata.build(tables, q_lens, list(end), block_size=4)
        outputs.append(cache.attend(metadata)(1, *packed).split(q_lens))
    for i in range(2):
        want = attention(q[i], k[i].transpose(0, 1), v[i].transpose(0, 1), scale=8**-0.5)
        torch.testing.assert_close(torch.cat([outputs[0][i], outputs[1][i]]), want, atol=1e-5, rtol=0)
    assert all((pool == 0).all() for pool in (cache.keys[0], cache.values[2])), "other layers are untouched"


def test_copies_read_every_source_before_any_target_is_written() -> None:
    cache = make_cache()
    for pool in cache.keys + cache.values:
        pool.copy_(torch.arange(12.0)[None, :, None, None].expand_as(pool))
    cache.copy(torch.tensor([(3, 4), (4, 5), (7, 8)]))
    for pool in cache.keys + cache.values:
        assert pool[0, :, 0, 0].tolist() == [0, 1, 2, 3, 3, 4, 6, 7, 7, 9, 10, 11]
    cache.copy(torch.empty(0, 2, dtype=torch.int64))
    assert cache.keys[0][0, :, 0, 0].tolist() == [0, 1, 2, 3, 3, 4, 6, 7, 7, 9, 10, 11]


def numbered(dtype: torch.dtype, num_blocks: int, start: int) -> PagedCache:
    """A cache in which no two numbers are equal: bit patterns `start`, `start` + 1, … that stand for finite numbers."""
    cache = make_cache(dtype, num_blocks)
    whole = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    for pool in cache.keys + cache.values:
        pool.view(whole).copy_(torch.arange(start, start + pool.numel(), dtype=whole).view_as(pool))
        start += pool.numel()
    return cache


def bits(cache: PagedCache) -> list[list[Any]]:
    """Every pool as nested lists of integers, [pool][head][block][offset][dim]."""
    whole = {4: torch.int32, 2: torch.int16}[cache.keys[0].element_size()]
    return [pool.view(whole).tolist() for pool in cache.keys + cache.values]


def check_moving(dtype: torch.dtype) -> None:
    """Blocks 7, 2 and 5 of one cache become blocks 3, 1 and 8 of another, in all layers, and nothing else changes."""
    source, target = numbered(dtype, 12, 1), numbered(dtype, 9, 9000)
    before, sent, moves = bits(target), bits(source), {3: 7, 1: 2, 8: 5}
    parcel = source.gather(torch.tensor(list(moves.values())))
    assert parcel.shape == (3, 4 * kv_bytes_per_token(CONFIG, dtype.itemsize)) and parcel.dtype == torch.uint8
    target.scatter(torch.tensor(list(moves)), parcel)
    got = bits(target)
    for pool in range(6):
        for head in range(2):
            for block in range(9):
                want = sent[pool][head][moves[block]] if block in moves else before[pool][head][block]
                assert got[pool][head][block] == want, (pool, head, block)
    assert bits(source) == sent, "gathering changes nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_move_to_another_cache(dtype: torch.dtype) -> None:
    check_moving(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_blocks_move_as_well(dtype: torch.dtype) -> None:
    source, target = numbered(dtype, 12, 1), numbered(dtype, 9, 9000)
    before, none = bits(target), torch.empty(0, dtype=torch.int64)
    target.scatter(none, source.gather(none))
    assert bits(target) == before


def _layer_after_layer(self: PagedCache, blocks: torch.Tensor) -> torch.Tensor:
    """The values of a layer right after its keys."""
    pools = [pool for pair in zip(self.keys, self.values, strict=True) for pool in pair]
    parts = [pool[:, blocks].transpose(0, 1).contiguous().view(torch.uint8).flatten(1) for pool in pools]
    return torch.cat(parts, dim=1)


def _heads_and_blocks_swapped(self: PagedCache, blocks: torch.Tensor) -> torch.Tensor:
    parts = [tensor[:, blocks].contiguous().view(torch.uint8).reshape(len(blocks), -1) for tensor in self.tensors]
    return torch.cat(parts, dim=1)


def _in_order(self: PagedCache, blocks: torch.Tensor) -> torch.Tensor:
    return _right_gather(self, blocks.sort()[0])


_right_gather = PagedCache.gather


@pytest.mark.parametrize("wrong", [_layer_after_layer, _heads_and_blocks_swapped, _in_order])
def test_blocks_that_are_mixed_up_on_the_way_are_found(wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PagedCache, "gather", wrong)
    with pytest.raises(AssertionError):
        check_moving(torch.float32)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_blocks": 77, "cache_bytes": 1}, 77),
        ({"cache_bytes": 10 * 1536}, 10),
        ({"cache_bytes": 10 * 1536 - 1}, 9),
        ({}, 1 + 64 * 25),  # a whole gibibyte is more than 64 requests of 100 tokens can fill
        ({"max_num_seqs": 2}, 1 + 2 * 25),
    ],
)
def test_num_blocks_follows_the_budget(settings: dict[str, Any], expected: int) -> None:
    engine = EngineConfig(block_size=4, **settings)
    assert choose_num_blocks(CONFIG, engine, CPU, PER_BLOCK) == expected


def test_a_budget_below_one_block_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cache_bytes=2000 .* at least 3072, two blocks"):
        choose_num_blocks(CONFIG, EngineConfig(block_size=4, cache_bytes=2000), CPU, PER_BLOCK)


def test_trap_31_memory_of_other_processes_is_not_subtracted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free now is free, however full the device is: 1 MB of 1 GB here, where the others hold 999."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**6, 10**9))
    num_blocks = choose_num_blocks(CONFIG, EngineConfig(block_size=4), torch.device("cuda"), PER_BLOCK)
    assert num_blocks == 900_000 // 1536
