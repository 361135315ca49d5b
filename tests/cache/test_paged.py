"""The pools: bytes against the formula, copies, sizes from a budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from minillm.attention import AttentionMetadata, attention, paged_attention
from minillm.cache.paged import PagedCache, block_bytes, choose_num_blocks
from minillm.config import EngineConfig, ModelConfig
from minillm.errors import ConfigError

CONFIG = ModelConfig("LlamaForCausalLM", 50, 24, 32, 3, 6, 2, 8, max_position_embeddings=100)
CPU = torch.device("cpu")


def make_cache(dtype: torch.dtype = torch.float32, num_blocks: int = 12, config: ModelConfig = CONFIG) -> PagedCache:
    return PagedCache(config, paged_attention, num_blocks=num_blocks, block_size=4, device=CPU, dtype=dtype)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_equal_the_formula(dtype: torch.dtype, size: int) -> None:
    cache = make_cache(dtype)
    per_token = 2 * 3 * 2 * 8 * size  # K and V, layers, KV heads, head_dim
    assert cache.bytes_per_token == per_token
    assert cache.num_bytes == 12 * 4 * per_token
    assert block_bytes(CONFIG, 4, dtype) == 4 * per_token


def test_bytes_read_stop_at_the_window() -> None:
    cache = make_cache(config=replace(CONFIG, sliding_window=9))
    per_token = cache.bytes_per_token
    assert [cache.bytes_read(1, n) // per_token for n in (5, 9, 10, 50)] == [5, 9, 9, 9]
    assert cache.bytes_read(4, 50) // per_token == 12, "the first of four queries sees three keys more"
    assert make_cache().bytes_read(4, 50) == 50 * per_token


def test_trap_33_attend_takes_slices_of_a_fused_projection_and_writes_first() -> None:
    """Two sequences in scattered blocks, computed in two steps, against one-shot attention on plain tensors."""
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
        layout = AttentionMetadata.build(tables, q_lens, list(end), block_size=4)
        outputs.append(cache.attend(layout)(1, *packed).split(q_lens))
    for i in range(2):
        want = attention(q[i], k[i].transpose(0, 1), v[i].transpose(0, 1), scale=8**-0.5)
        torch.testing.assert_close(torch.cat([outputs[0][i], outputs[1][i]]), want, atol=1e-5, rtol=0)
    assert all((pool == 0).all() for pool in (cache.keys[0], cache.values[2])), "other layers are untouched"


def test_copies_read_every_source_before_any_target_is_written() -> None:
    cache = make_cache()
    for pool in cache.keys + cache.values:
        pool.copy_(torch.arange(12.0)[None, :, None, None].expand_as(pool))
    cache.copy([(3, 4), (4, 5), (7, 8)])
    for pool in cache.keys + cache.values:
        assert pool[0, :, 0, 0].tolist() == [0, 1, 2, 3, 3, 4, 6, 7, 7, 9, 10, 11]
    cache.copy([])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_blocks": 77, "cache_bytes": 1}, 77),
        ({"cache_bytes": 10 * 1536}, 10),
        ({"cache_bytes": 10 * 1536 - 1}, 9),
        ({}, 1 + 64 * 25),  # a whole gibibyte is more than 64 sequences of 100 tokens can fill
        ({"max_num_seqs": 2}, 1 + 2 * 25),
    ],
)
def test_num_blocks_follows_the_budget(settings: dict[str, Any], expected: int) -> None:
    engine = EngineConfig(block_size=4, **settings)
    assert choose_num_blocks(CONFIG, engine, CPU, torch.float32) == expected


def test_a_budget_below_one_block_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"2,000 bytes hold 1 blocks of 1,536 bytes.*Raise cache_bytes"):
        choose_num_blocks(CONFIG, EngineConfig(block_size=4, cache_bytes=2000), CPU, torch.float32)


def test_trap_31_memory_of_other_processes_is_not_subtracted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free now is free, however full the device is: 1 MB of 1 GB here, where the others hold 999."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**6, 10**9))
    num_blocks = choose_num_blocks(CONFIG, EngineConfig(block_size=4), torch.device("cuda"), torch.float32)
    assert num_blocks == 900_000 // 1536
