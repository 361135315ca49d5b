"""The quantised caches as containers: bytes, sizes from a budget, copies, growth, truncation."""

from __future__ import annotations

import random

import pytest
import torch

from minillm.cache import contiguous
from minillm.cache.contiguous import ContiguousCache, QuantizedContiguousCache, new_cache
from minillm.cache.paged import block_bytes, choose_num_blocks, choose_num_tails, tail_bytes
from minillm.config import EngineConfig, ModelConfig
from minillm.costs.formulas import format_element_bytes, kv_bytes_per_token
from minillm.errors import ConfigError
from minillm.generate import extend, generate
from minillm.quantization.attention import quantized_attention
from minillm.quantization.cache import QuantizedCache
from minillm.quantization.formats import FORMATS
from minillm.sampling import SamplingParams
from tests.cache.definition import DefinitionCache
from tests.families import random_model

CONFIG = ModelConfig("LlamaForCausalLM", 50, 24, 32, 3, 6, 2, 64, max_position_embeddings=4000)
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", FORMATS)
def test_a_cache_occupies_what_the_formula_says(name: str) -> None:
    """Blocks by the formula, tails in the model's dtype, and nothing else."""
    sizes = {"num_blocks": 12, "block_size": 32}
    cache = QuantizedCache(
        CONFIG, quantized_attention, FORMATS[name], **sizes, num_tails=5, device=CPU, dtype=torch.bfloat16
    )
    per_element = format_element_bytes(name, head_dim=64, block_size=32)
    assert cache.bytes_per_token == kv_bytes_per_token(CONFIG, per_element)
    tails = 5 * 32 * 3 * 2 * 64 * 2 if name == "int4" else 0
    assert cache.num_bytes == 12 * 32 * cache.bytes_per_token + tails
    assert tails in (0, 5 * tail_bytes(CONFIG, 32, torch.bfloat16))
    assert block_bytes(CONFIG, 32, torch.bfloat16, FORMATS[name]) == 32 * cache.bytes_per_token


@pytest.mark.parametrize("budget", [200_000, 2_000_000, 20_000_000])
@pytest.mark.parametrize("name", FORMATS)
def test_a_budget_pays_for_blocks_and_tails(name: str, budget: int) -> None:
    """As many blocks as fit, and not one more."""
    engine = EngineConfig(kv_format=name, cache_bytes=budget, max_num_seqs=8, max_num_batched_tokens=64)
    num_blocks = choose_num_blocks(CONFIG, engine, CPU, torch.bfloat16)

    def occupied(num_blocks: int) -> int:
        sizes = {"num_blocks": num_blocks, "block_size": engine.kv_block_size}
        tails = choose_num_tails(engine, num_blocks)
        return QuantizedCache(
            CONFIG, quantized_attention, FORMATS[name], **sizes, num_tails=tails, device=CPU, dtype=torch.bfloat16
        ).num_bytes

    most = 1 + 8 * -(-4000 // engine.kv_block_size)
    assert occupied(num_blocks) <= budget and (num_blocks == most or occupied(num_blocks + 1) > budget)


def test_block_sizes_suit_the_format() -> None:
    sizes = {name: EngineConfig(kv_format=name).kv_block_size for name in ("auto", *FORMATS)}
    assert sizes == {"auto": 16, "fp8": 16, "int8": 16, "int4": 32}
    assert EngineConfig(kv_format="int4", block_size=64).kv_block_size == 64
    with pytest.raises(ConfigError, match=r"block_size=16 is too small for kv_format='int4'.*Use 32 or more"):
        EngineConfig(kv_format="int4", block_size=16)


# One sequence


@pytest.mark.parametrize("name", FORMATS)
def test_one_sequence_is_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Growing from one token, taken in chunks, rolled back: each layer sees what the format's definition says."""
    monkeypatch.setattr(contiguous, "CHUNK", 7)
    config = ModelConfig("LlamaForCausalLM", 8, 8, 8, 3, 6, 2, 8, 999)
    for seed in range(3):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        cache = QuantizedContiguousCache(
            config, FORMATS[name], capacity=1, block_size=4, device=CPU, dtype=torch.float32
        )
        oracle = DefinitionCache(FORMATS[name], 4)
        for _ in range(12):
            new = rng.choice([1, 1, 2, 5, 20])
            for layer in range(config.num_layers):
                q, k, v = torch.randn(new, 10, 8, generator=generator).split([6, 2, 2], dim=1)
                got, wanted = (one.attend(layer, q, k, v) for one in (cache, oracle))
                where = f"seed {seed}, layer {layer}, {new} tokens behind {cache.num_tokens}"
                torch.testing.assert_close(got, wanted, atol=2e-5, rtol=0, msg=where)
            for one in (cache, oracle):
                one.num_tokens += new
            keep = cache.num_tokens - rng.randrange(min(4, new) + 1)
            for one in (cache, oracle):
                one.truncate(keep)


def test_truncation_into_quantised_keys_is_refused() -> None:
    """int4 goes on at the beginning of a block, or where the last step was; other formats anywhere."""
    model = random_model("llama3", seed=2)
    for name in FORMATS:
        cache = new_cache(model.config, FORMATS[name], capacity=100, device=CPU, dtype=torch.float32)
        for _ in range(3):
            extend(model, torch.arange(30), cache)
        cache.truncate(70)
        if name == "int4":
            with pytest.raises(ValueError, match=r"Cannot go on behind token 20: .*Truncate to 0"):
                cache.truncate(20)
        else:
            cache.truncate(35)
        cache.truncate(32)
        with pytest.raises(ValueError, match="Cannot truncate a cache of 32 tokens to 33"):
            cache.truncate(33)


def test_generate_in_any_format() -> None:
    """Of a random model every format chooses tokens of its own; int8 is close enough to choose the same."""
    model = random_model("qwen3", seed=3)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    plain, int8 = (list(generate(model, range(40), params, kv_format=name)) for name in ("auto", "int8"))
    assert plain == int8
    assert len(list(generate(model, range(40), params, kv_format="int4"))) == 12
    assert isinstance(new_cache(model.config, None, capacity=1, device=CPU, dtype=torch.float32), ContiguousCache)
    with pytest.raises(ConfigError, match="kv_format='q4' is unknown"):
        list(generate(model, [1], params, kv_format="q4"))


def test_memory_for_exact_keys_does_not_grow_with_the_prompt() -> None:
    model = random_model("qwen3", seed=4)
    held = []
    for length in (600, 1200):
        cache = new_cache(model.config, FORMATS["int4"], capacity=length, device=CPU, dtype=torch.float32)
        extend(model, torch.zeros(length, dtype=torch.int64), cache)
        assert isinstance(cache, QuantizedContiguousCache) and cache.blocks.tails
        held.append(cache.blocks.tails.num_bytes)
    assert held[0] == held[1]
