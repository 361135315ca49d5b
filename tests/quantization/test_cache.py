"""The quantised cache as a container: bytes, sizes from a budget, copies, and what opens it."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minillm import seams
from minillm.cache.paged import choose_num_blocks
from minillm.config import EngineConfig, ModelConfig
from minillm.costs.formulas import kv_bytes_per_token
from minillm.errors import ConfigError
from minillm.quantization import attention, cache
from minillm.quantization.cache import FORMATS, QuantizedCache, open_cache
from minillm.quantization.formats import element_bytes

CONFIG = ModelConfig("LlamaForCausalLM", 50, 24, 32, 3, 6, 2, 64, max_position_embeddings=4000)
CPU = torch.device("cpu")


def opened(name: str, config: ModelConfig = CONFIG, num_blocks: int = 12, block_size: int = 16) -> QuantizedCache:
    return open_cache(config, name, num_blocks=num_blocks, block_size=block_size, device=CPU, dtype=torch.bfloat16)


def occupied(cache: QuantizedCache) -> int:
    return sum(tensor.nbytes for tensor in cache.tensors)


def shaped(head_dim: int) -> ModelConfig:
    return ModelConfig("LlamaForCausalLM", 50, 24, 32, 3, 6, 2, head_dim, max_position_embeddings=4000)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("name", FORMATS)
def test_a_cache_occupies_what_the_formula_says(name: str, head_dim: int) -> None:
    """Integers, and nothing else: codes and ranges, whatever the size of a block."""
    config = shaped(head_dim)
    per_token = kv_bytes_per_token(config, element_bytes(name, head_dim))
    for block_size in (1, 7, 16):
        made = opened(name, config, 5, block_size)
        assert made.bytes_per_token == per_token and occupied(made) == 5 * block_size * per_token
        assert cache.block_bytes(config, block_size, name) == block_size * per_token


def test_bytes_per_token_by_hand() -> None:
    """3 layers, keys and values, 2 heads of 64: 8 bits and one scale; 4 bits and two ranges of two ends."""
    sizes = {name: opened(name).bytes_per_token for name in FORMATS}
    assert sizes == {"fp8": 12 * (64 + 2), "int8": 12 * (64 + 2), "int4": 12 * (32 + 2 * 2 * 2)}
    assert opened("int4", shaped(80)).bytes_per_token == 12 * (40 + 3 * 2 * 2), "groups of 27, 27 and 26"


@pytest.mark.parametrize("budget", [200_000, 2_000_000, 20_000_000])
@pytest.mark.parametrize("name", FORMATS)
def test_a_budget_is_filled(name: str, budget: int) -> None:
    """As many blocks as fit, and not one more."""
    engine = EngineConfig(kv_format=name, cache_bytes=budget, max_num_seqs=8)
    num_blocks = choose_num_blocks(CONFIG, engine, CPU, cache.block_bytes(CONFIG, 16, name))
    most = 1 + 8 * -(-4000 // 16)
    assert occupied(opened(name, num_blocks=num_blocks)) <= budget
    assert num_blocks == most or occupied(opened(name, num_blocks=num_blocks + 1)) > budget


@pytest.mark.parametrize("name", FORMATS)
def test_a_token_lies_in_its_slot(name: str) -> None:
    """And nowhere else: what was there before stays, the dummy block included."""
    rng, generator = random.Random(5), torch.Generator().manual_seed(5)
    made = opened(name, num_blocks=6, block_size=4)
    slots = torch.tensor(rng.sample(range(24), 9))
    k, v = torch.randn(2, 9, 2, 64, generator=generator)
    metadata = SimpleNamespace(slot_mapping=slots)
    made.prepare, made.attention = (lambda *_: None), (lambda q, *_, **__: q)
    made.attend(metadata)(1, torch.zeros(9, 6, 64), k, v)  # type: ignore[arg-type]
    for stored, x in ((made.keys, k), (made.values, v)):
        found = FORMATS[name].decode(*stored[1]).flatten(1, 2)
        expected = torch.zeros(2, 24, 64)
        expected[:, slots] = FORMATS[name].decode(*FORMATS[name].encode(x)).transpose(0, 1)
        assert torch.equal(found, expected)
        assert all(not tensor.float().any() for layer in (0, 2) for tensor in stored[layer])


def test_unknown_formats_are_refused_by_name() -> None:
    for make in (lambda: opened("int2"), lambda: cache.block_bytes(CONFIG, 16, "int2")):
        with pytest.raises(ConfigError, match=r"kv_format='int2' is unknown\. Choose one of: auto, fp8, int8, int4"):
            make()


def test_who_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's kernels if there are any; the definition if there are none, or if it is asked for."""
    assert opened("int4").attention is attention.quantized_attention
    offered = SimpleNamespace(prepare=lambda *_: None, quantized_attention=lambda *_, **__: None)
    monkeypatch.setattr(seams, "offer", lambda seam, device: {("quantized_attention", "cpu"): offered}[seam, device])
    assert opened("int4").attention is offered.quantized_attention
    assert opened("int4").prepare is offered.prepare
    sizes: dict[str, Any] = {"num_blocks": 2, "block_size": 4, "device": CPU, "dtype": torch.float32}
    assert open_cache(CONFIG, "int4", **sizes, kernels="reference").attention is attention.quantized_attention


def test_the_seam_offers_the_formats() -> None:
    assert seams.offer("kv_format") is cache and list(cache.FORMATS) == ["fp8", "int8", "int4"]
