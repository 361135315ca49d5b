"""Speculation through the front door: the same text, stop strings inside an accepted run, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models

from minillm import LLM, SamplingParams
from minillm.course.training.checkpoint import save_checkpoint
from minillm.errors import ConfigError
from minillm.model.tokenizer import Tokenizer
from minillm.outputs import RequestOutput
from minillm.speculative import SpecDecodingStats
from tests.model.test_loader import unpacked
from tests.test_llm import byte_tokenizer

PROMPTS = ["def f(x):\n    return x\n" * 3, "import os", "aaaa"]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a smaller one with its vocabulary, and one with another."""
    root = tmp_path_factory.mktemp("models")
    save_checkpoint(unpacked("qwen3", vocab_size=256), root / "target", dtype=torch.float32)
    save_checkpoint(unpacked("smollm2", vocab_size=256, num_hidden_layers=1), root / "draft", dtype=torch.float32)
    save_checkpoint(unpacked("qwen3", vocab_size=99), root / "foreign", dtype=torch.float32)
    return root


@pytest.fixture(autouse=True)
def bytes_as_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for caller in ("llm", "speculative"):
        monkeypatch.setattr(f"minillm.{caller}.load_tokenizer", lambda name: byte_tokenizer())


def make(root: Path, speculative: str | None, **settings: bool | int) -> LLM:
    common = dict(device="cpu", dtype="float32", num_blocks=60, debug=True, speculative=speculative)
    return LLM(root / "target", **(common | settings))  # type: ignore[arg-type]


def texts(outputs: list[RequestOutput]) -> list[tuple[str, list[int], str | None, int | str | None]]:
    return [(o.text, o.token_ids, o.finish_reason, o.stop_reason) for request in outputs for o in request.outputs]


@pytest.mark.parametrize("name", ["ngram", "target", "draft"])
def test_the_text_is_the_same(root: Path, name: str) -> None:
    plain, speculative = make(root, None), make(root, name if name == "ngram" else str(root / name))
    want, got = (llm.generate(PROMPTS, GREEDY, progress=False) for llm in (plain, speculative))
    assert texts(got) == texts(want)
    stats = SpecDecodingStats.of(speculative.engine.trace)
    assert stats.num_draft_tokens > 0 and SpecDecodingStats.of(plain.engine.trace).num_drafts == 0
    if name == "target":
        assert stats.draft_acceptance_rate == 1


def test_a_stop_string_inside_an_accepted_run_ends_the_text_before_it(root: Path) -> None:
    """One step brings more than the text takes; the rest is dropped."""
    plain, speculative = make(root, None), make(root, str(root / "target"))
    text = plain.generate(PROMPTS[0], GREEDY, progress=False)[0].outputs[0].text
    for start in (3, 6, 9):
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=text[start : start + 2])
        want, got = (llm.generate(PROMPTS[0], params, progress=False) for llm in (plain, speculative))
        assert texts(got) == texts(want) and got[0].outputs[0].finish_reason == "stop"
        assert len(got[0].metrics.token_times[0]) == len(got[0].outputs[0].token_ids)


def test_statistics_have_vllms_names_and_meanings(root: Path) -> None:
    llm = make(root, str(root / "draft"))
    llm.generate(PROMPTS, GREEDY, progress=False)
    stats = SpecDecodingStats.of(llm.engine.trace)
    parts = [part for record in llm.engine.trace for part in record.requests if part.num_drafts]
    assert stats.num_drafts == len(parts)
    assert stats.num_accepted_tokens == sum(stats.num_accepted_tokens_per_pos)
    assert list(stats.acceptance_rate_per_pos) == sorted(stats.acceptance_rate_per_pos, reverse=True)
    assert stats.mean_acceptance_length == 1 + stats.num_accepted_tokens / stats.num_drafts


def test_a_draft_model_with_other_tokens_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="has 99 tokens in its vocabulary, but the model that it guesses for has 256"):
        make(root, str(root / "foreign"))


def spelled(*swapped: tuple[str, str], extra: str = "") -> Tokenizer:
    """`byte_tokenizer` with letters that have changed places, and maybe a special token behind them."""
    letters = {index: letter for letter, index in byte_tokenizer()._backend.get_vocab().items()}
    numbers = {letter: index for index, letter in letters.items()}
    for one, other in swapped:
        numbers[one], numbers[other] = numbers[other], numbers[one]
    backend = Backend(models.BPE(vocab=numbers, merges=[]))
    if extra:
        backend.add_special_tokens([extra])
    return Tokenizer(backend)


def test_a_vocabulary_of_the_right_size_with_other_tokens_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minillm.speculative.load_tokenizer", lambda name: spelled(("a", "q"), ("b", "7")))
    with pytest.raises(ConfigError, match=r"Token 22 is 'b' for the draft model .*/draft', but '7' .*; 4 of 256"):
        make(root, str(root / "draft"))
    make(root, "ngram")


def test_tokens_that_only_one_of_two_models_has_do_no_harm(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillm.speculative.load_tokenizer", lambda name: spelled(extra="<tool>"))
    assert make(root, str(root / "draft")).engine.proposer is not None


@pytest.mark.parametrize("adaptive", [True, False])
def test_how_far_to_guess_is_a_setting(root: Path, adaptive: bool) -> None:
    """With a proposer that is mostly wrong: guesses shrink, or stay as long as they may be."""
    llm = make(root, str(root / "draft"), adaptive_drafts=adaptive, num_speculative_tokens=6)
    llm.generate(PROMPTS, GREEDY, progress=False)
    guessed = [part.num_drafts for record in llm.engine.trace for part in record.requests if part.num_drafts]
    assert guessed.count(6) > len(guessed) / 2 if not adaptive else guessed.count(1) > len(guessed) / 2


def test_acceptance_is_counted_right_when_drafts_have_many_lengths(root: Path) -> None:
    """α against a count by hand: a draft that was accepted whole met no rejection, however short it was."""
    llm = make(root, str(root / "draft"), num_speculative_tokens=5)
    llm.generate(PROMPTS, GREEDY, progress=False)
    parts = [part for record in llm.engine.trace for part in record.requests if part.num_drafts]
    assert len({part.num_drafts for part in parts}) > 1
    looked_at = sum(min(part.num_accepted + 1, part.num_drafts) for part in parts)
    assert SpecDecodingStats.of(llm.engine.trace).acceptance == sum(part.num_accepted for part in parts) / looked_at
