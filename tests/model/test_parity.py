"""The oracle of the whole model: `transformers` computes the same logits from the same files, for every family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from minillm.generate import decode, extend, generate, prefill
from minillm.model import rope
from minillm.model.decoder import Decoder
from minillm.model.loader import load_model
from minillm.sampling import SamplingParams
from tests.families import FAMILIES

TOLERANCE = 1e-4
transformers.logging.set_verbosity_error()


def write_checkpoint(folder: Path, family: str, seed: int = 0, shard: str = "1GB") -> torch.nn.Module:
    """Random weights of a family, saved by transformers in its own words; returns its model in eager float32."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{k: v for k, v in FAMILIES[family].items() if v is not None})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():  # biases and norms start as 0 and 1: make them count
        if "norm" in name or "bias" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Decoder, torch.nn.Module]:
    reference = write_checkpoint(tmp_path, request.param)
    return load_model(tmp_path, device="cpu", dtype="float32", progress=False), reference


def random_prompt(length: int, seed: int, vocab: int = 131) -> list[int]:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def reference_logits(reference: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return reference(torch.tensor([tokens])).logits[0]


def all_logits(model: Decoder, tokens: list[int], chunks: list[int]) -> torch.Tensor:
    """Logits at every position, computed in steps of the given lengths."""
    from minillm.cache.contiguous import ContiguousCache

    cache = ContiguousCache(model.config, capacity=4, device=model.device, dtype=model.dtype)
    rows = []
    with torch.inference_mode():
        for part in torch.tensor(tokens).split(chunks):
            positions = torch.arange(cache.num_tokens, cache.num_tokens + len(part))
            rows.append(model.logits(model(part, positions, cache.attend)))
            cache.num_tokens += len(part)
    return torch.cat(rows)


@pytest.mark.parametrize(
    "chunks", [[96], [1] * 96, [5, 1, 64, 2, 24], [95, 1]], ids=["whole", "steps", "mixed", "last"]
)
def test_logits_equal_transformers_at_every_position(pair: tuple[Decoder, torch.nn.Module], chunks: list[int]) -> None:
    model, reference = pair
    tokens = random_prompt(96, seed=1)
    torch.testing.assert_close(
        all_logits(model, tokens, chunks), reference_logits(reference, tokens), atol=TOLERANCE, rtol=0
    )


def test_prefill_and_decode_equal_transformers(pair: tuple[Decoder, torch.nn.Module]) -> None:
    model, reference = pair
    tokens = random_prompt(40, seed=2)
    expected = reference_logits(reference, tokens)
    logits, cache = prefill(model, tokens[:17])
    torch.testing.assert_close(logits, expected[16], atol=TOLERANCE, rtol=0)
    for position in range(17, 40):
        logits = decode(model, tokens[position], cache)
        torch.testing.assert_close(logits, expected[position], atol=TOLERANCE, rtol=0)
    assert cache.num_tokens == 40


def test_greedy_tokens_equal_transformers_generate(pair: tuple[Decoder, torch.nn.Module]) -> None:
    model, reference = pair
    prompt = random_prompt(12, seed=3)
    ours = list(generate(model, prompt, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)))
    reference.generation_config.eos_token_id = None
    theirs = reference.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=64, do_sample=False
    )
    assert ours == theirs[0, len(prompt) :].tolist()


def test_sharded_checkpoint_equals_single_file(tmp_path: Path) -> None:
    reference = write_checkpoint(tmp_path / "sharded", "qwen3", shard="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    model = load_model(tmp_path / "sharded", device="cpu", dtype="float32", progress=False)
    tokens = random_prompt(20, seed=4)
    torch.testing.assert_close(
        all_logits(model, tokens, [20]), reference_logits(reference, tokens), atol=TOLERANCE, rtol=0
    )


def test_old_and_new_rope_keys_are_the_same(tmp_path: Path) -> None:
    """transformers 5 moved rope_theta and rope_scaling into rope_parameters; both must give the same model."""
    reference = write_checkpoint(tmp_path, "llama3")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope_keys = config.pop("rope_parameters", None) or FAMILIES["llama3"]["rope_scaling"] | {"rope_theta": 10000.0}
    tokens = random_prompt(96, seed=5)
    expected = reference_logits(reference, tokens)
    for form in ({"rope_parameters": rope_keys}, {"rope_scaling": rope_keys, "rope_theta": rope_keys["rope_theta"]}):
        path.write_text(json.dumps(config | form))
        model = load_model(tmp_path, device="cpu", dtype="float32", progress=False)
        torch.testing.assert_close(all_logits(model, tokens, [96]), expected, atol=TOLERANCE, rtol=0)


def _unstretched(frequencies: torch.Tensor, scaling: object) -> torch.Tensor:
    return frequencies


def _interleaved(x: torch.Tensor, turn: rope.Rotation) -> torch.Tensor:
    swapped = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * turn.cos + swapped * turn.sin.abs()


def _positions_from_zero(model: Decoder, tokens: torch.Tensor, cache: object) -> torch.Tensor:
    return model.logits(model(tokens, torch.arange(len(tokens)), cache.attend)[-1:])[0]  # type: ignore[attr-defined]


def test_mutants_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong versions that people really write; each must move the logits by more than the tolerance allows."""
    reference = write_checkpoint(tmp_path, "llama3")
    tokens = random_prompt(96, seed=6)
    expected = reference_logits(reference, tokens)
    for module, name, mutant in [
        (rope, "_stretch", _unstretched),
        ("minillm.model.decoder", "rotate", _interleaved),
    ]:
        with monkeypatch.context() as patch:
            target = f"{module}.{name}" if isinstance(module, str) else f"{module.__name__}.{name}"
            patch.setattr(target, mutant)
            model = load_model(tmp_path, device="cpu", dtype="float32", progress=False)
            assert (all_logits(model, tokens, [96]) - expected).abs().max() > 100 * TOLERANCE, name
    model = load_model(tmp_path, device="cpu", dtype="float32", progress=False)
    _, cache = prefill(model, tokens[:50])
    with torch.inference_mode():
        wrong = _positions_from_zero(model, torch.tensor(tokens[50:60]), cache)
    assert (wrong - expected[59]).abs().max() > 100 * TOLERANCE
    right = extend(model, torch.tensor(tokens[50:60]), cache)
    torch.testing.assert_close(right, expected[59], atol=TOLERANCE, rtol=0)
