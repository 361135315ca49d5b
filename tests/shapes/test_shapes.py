"""The named shapes have exactly the published number of parameters, and serve without a tokenizer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minillm import LLM, SamplingParams
from minillm.errors import CheckpointError, ConfigError, RequestError
from minillm.model.decoder import Decoder
from minillm.model.loader import layout, load_model
from minillm.shapes import SHAPES, named_shape

PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
}
KV_BYTES_PER_TOKEN = {
    "smollm2-135m": 23_040,
    "smollm2-1.7b": 196_608,
    "qwen2.5-0.5b": 12_288,
    "qwen3-0.6b": 114_688,
    "qwen3-4b": 147_456,
    "tinyllama-1.1b": 22_528,
    "llama-3.2-1b": 32_768,
    "llama-3.1-8b": 131_072,
}


def test_every_shape_has_a_published_count() -> None:
    assert PARAMETERS.keys() == SHAPES.keys()


@pytest.mark.parametrize("name", SHAPES)
def test_parameter_count(name: str) -> None:
    """Counted twice: in the checkpoint's layout and in the decoder itself (whose query and key norms have one row
    per head, so those are counted once)."""
    config = named_shape(name)
    pieces = layout(config)
    in_files = sum(torch.Size(shape).numel() for piece in pieces for shape in piece.sources.values())
    assert in_files == PARAMETERS[name]
    with torch.device("meta"):
        model = Decoder(config)
    repeated = config.num_layers * (config.num_heads + config.num_kv_heads - 2) * config.head_dim * config.qk_norm
    assert sum(p.numel() for p in model.parameters()) - repeated == PARAMETERS[name]


@pytest.mark.parametrize("name", KV_BYTES_PER_TOKEN)
def test_kv_bytes_per_token(name: str) -> None:
    from minillm.cache.contiguous import ContiguousCache

    cache = ContiguousCache(named_shape(name), capacity=1, device=torch.device("meta"), dtype=torch.bfloat16)
    assert cache.keys.nbytes + cache.values.nbytes == KV_BYTES_PER_TOKEN[name]


def test_unknown_shape_is_refused_with_the_list() -> None:
    with pytest.raises(CheckpointError, match=r"No shape is called 'gpt-5'.*qwen3-0\.6b"):
        named_shape("gpt-5")


def test_random_model_has_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    small = dict(num_hidden_layers=1, hidden_size=32, intermediate_size=32, vocab_size=64, head_dim=8)
    monkeypatch.setitem(SHAPES, "small", SHAPES["qwen3-0.6b"] | small)
    llm = LLM("random:small", device="cpu", num_blocks=10)
    result = llm.generate([1, 2, 3], greedy, progress=False)[0].outputs[0]
    assert result.text == "" and len(result.token_ids) == 12
    wishes = (("text", greedy), ([1, 2], replace(greedy, stop="a")), ([1], replace(greedy, bad_words=["a"])))
    for prompt, params in wishes:
        with pytest.raises(RequestError, match=r"no tokenizer\. Give token ids"):
            llm.generate(prompt, params)


def test_without_the_extra_the_loader_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillm.seams.offer", lambda seam, device="any": None)
    with pytest.raises(ConfigError, match=r"'random:qwen3-0\.6b' needs the extra minillm\.shapes"):
        load_model("random:qwen3-0.6b", progress=False)


def test_a_seed_draws_the_same_weights_again(monkeypatch: pytest.MonkeyPatch) -> None:
    small = dict(num_hidden_layers=1, hidden_size=32, intermediate_size=32, vocab_size=64, head_dim=8)
    monkeypatch.setitem(SHAPES, "small", SHAPES["qwen3-0.6b"] | small)
    weights = [
        load_model("random:small", device="cpu", seed=seed, progress=False).embedding.weight for seed in (5, 5, 6)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
