"""Sampling with speculation inside the engine has the target's distribution: chi-square over 20,000 tokens.

With a sliding window of one token a model sees nothing but the current token. So all transitions of all completions
are independent draws from one table, which a single pass computes. Wrong rules of acceptance are found in
tests/engine/test_verify.py; here are the ways to break a right rule.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.config import EngineConfig
from minillm.engine.engine import Engine
from minillm.engine.request import Request
from minillm.engine.scheduler import StepPlan
from minillm.engine.verify import Proposer
from minillm.generate import prefill
from minillm.model.decoder import Decoder
from minillm.sampling import SamplingParams, probs_from_logits
from minillm.speculative.draft import DraftModelProposer, Twin
from minillm.speculative.ngram import NgramProposer
from tests.families import random_model
from tests.speculative.chance import chi_square, limit

VOCAB = 5
PARAMS = SamplingParams(n=64, temperature=0.9, top_p=0.95, max_tokens=41, ignore_eos=True)
CONFIG = EngineConfig(num_speculative_tokens=3, block_size=4, num_blocks=900, max_num_batched_tokens=256)


@cache
def bigram(seed: int) -> Decoder:
    """A model of five tokens that sees one of them."""
    shape: dict[str, Any] = dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, sliding_window=1)
    return random_model("mistral", seed, vocab_size=VOCAB, **shape)


@cache
def table() -> Tensor:
    """What follows each token; [VOCAB, VOCAB]."""
    logits = torch.stack([prefill(bigram(0), [token])[0] for token in range(VOCAB)])
    return probs_from_logits(logits, [PARAMS] * VOCAB)


def run(proposer: Proposer | None, requests: int = 8) -> tuple[Tensor, Engine]:
    """Counts [VOCAB, VOCAB] of all transitions of 64 completions per request, and the engine that made them."""
    engine = Engine(bigram(0), CONFIG, proposer)
    finished: dict[tuple[str, int], Request] = {}
    for _ in range(requests):
        engine.add([1, 2, 3, 4, 0], PARAMS)
        for event in engine.run():
            finished[event.request.request_id, event.request.index] = event.request
    runs = torch.tensor([request.tokens[4:] for request in finished.values()])
    pairs = runs[:, :-1] * VOCAB + runs[:, 1:]
    return torch.bincount(pairs.flatten(), minlength=VOCAB**2).view(VOCAB, VOCAB), engine


def stray(counts: Tensor) -> float:
    """Chi-square of all five rows together, over its limit: below 1 is as expected."""
    total = sum(chi_square(row, expected) for row, expected in zip(counts, table(), strict=True))
    return total / limit(VOCAB * (VOCAB - 1) + 1)


def draft_model() -> DraftModelProposer:
    return DraftModelProposer(bigram(1), CONFIG)


@pytest.mark.parametrize("make", [draft_model, lambda: NgramProposer(min_match=1)], ids=["draft", "ngram"])
def test_chi_square_of_the_engine(make: type[Proposer]) -> None:
    """64 side by side, each with its own number of drafts and acceptances."""
    counts, engine = run(make())
    parts = [part for record in engine.trace for part in record.requests if part.num_drafts]
    accepted = {part.num_accepted for part in parts}
    assert counts.sum() >= 20_000 and accepted == {0, 1, 2, 3}, "ragged"
    assert stray(counts) < 1


def test_chi_square_rejects_drafts_from_the_stream_that_judges_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft is drawn with the very number that its row will be drawn with."""
    monkeypatch.setattr(Twin, "index", property(lambda self: self.order[1]))
    assert stray(run(draft_model(), requests=3)[0]) > 1


@pytest.mark.parametrize(("power", "requests"), [(0.5, 8), (2.0, 3)])
def test_chi_square_rejects_a_draft_at_another_temperature(
    power: float, requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant that uses the untempered q: what is told is not what was drawn from, but flatter or sharper."""
    right = DraftModelProposer._draw

    def untempered(
        self: DraftModelProposer, plan: StepPlan, logits: Tensor, drawn: dict[Request, list[Tensor]]
    ) -> None:
        right(self, plan, logits, drawn)
        for rows in drawn.values():
            rows[-1:] = [row**power / (row**power).sum() for row in rows[-1:]]

    monkeypatch.setattr(DraftModelProposer, "_draw", untempered)
    assert stray(run(draft_model(), requests)[0]) > 1
