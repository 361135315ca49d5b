"""The draft model's side: after whatever happened to its drafts, it goes on as if it had read the text afresh."""

from __future__ import annotations

import random

import pytest
import torch

from minillm.config import EngineConfig
from minillm.engine.request import Request
from minillm.generate import generate, prefill
from minillm.sampling import SamplingParams, adjust, probs_from_logits
from minillm.speculative.draft import DraftModelProposer, Twin
from tests.engine.test_fuzz import tiny_model
from tests.engine.workloads import VOCAB
from tests.families import random_model

GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)


def request(tokens: list[int], params: SamplingParams = GREEDY, number: int = 0) -> Request:
    return Request(str(number), (number, 0), tokens, len(tokens), params)


def afresh(tokens: list[int], count: int) -> list[int]:
    """What the model says after these tokens if it reads them for the first time."""
    return list(generate(tiny_model(), tokens, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)))


def go_on(proposer: DraftModelProposer, rng: random.Random, rounds: int = 12) -> None:
    """Rounds for three requests, drafts accepted to any extent, or not asked for; each is as if read afresh."""
    requests = [request([rng.randrange(VOCAB) for _ in range(length)], number=length) for length in (1, 4, 9)]
    for _ in range(rounds):
        room = {one: rng.randint(1, 4) for one in requests if rng.random() < 0.7}
        drafts = proposer.propose(room)
        for one in requests:
            said = drafts[one].tokens if one in drafts else [rng.randrange(VOCAB) for _ in range(rng.randint(0, 3))]
            assert one not in drafts or said == afresh(one.tokens, room[one])
            one.tokens += [*said[: rng.randint(0, len(said))], rng.randrange(VOCAB)]
    for one in requests:
        proposer.forget(one)
    proposer.pool.check([])
    assert proposer.pool.num_free == proposer.pool.num_usable


@pytest.mark.parametrize("block_size", [1, 2, 8])
def test_drafts_are_those_of_a_fresh_start(block_size: int) -> None:
    """Trap 43: after full acceptance, rejection anywhere, and rounds without being asked."""
    for seed in range(4):
        go_on(
            DraftModelProposer(tiny_model(), EngineConfig(block_size=block_size, num_blocks=400)), random.Random(seed)
        )


def _never_rolls_back(self: DraftModelProposer, one: Request) -> Twin:
    computed = self._twins[one].num_computed if one in self._twins else 0
    twin = _right(self, one)
    twin.num_computed = max(twin.num_computed, min(computed, twin.num_given - 1))
    return twin


def _counts_the_last_draft(self: DraftModelProposer, one: Request) -> Twin:
    """gpt-fast had this: after full acceptance the last draft's KV is missing."""
    twin = self._twins.get(one)
    if twin is not None and one.tokens[: twin.num_tokens] == twin.tokens:
        twin.num_computed = twin.num_tokens
    return _right(self, one)


_right = DraftModelProposer._in_step


@pytest.mark.parametrize("wrong", [_never_rolls_back, _counts_the_last_draft])
def test_a_draft_model_out_of_step_is_found(wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DraftModelProposer, "_in_step", wrong)
    with pytest.raises(AssertionError):
        test_drafts_are_those_of_a_fresh_start(2)


def test_a_long_prompt_is_read_in_chunks() -> None:
    proposer = DraftModelProposer(tiny_model(), EngineConfig(num_blocks=40, max_num_batched_tokens=8))
    one = request([5, 6, 7, 8] * 8)
    lengths = [len(proposer.propose({one: 3})[one]) for _ in range(2)]
    assert lengths == [0, 3], "24 tokens are read in three passes, the last 8 in a fourth"
    again = proposer.propose({one: 3})[one]
    assert again.tokens == afresh(one.tokens, 3) and again.probs is None, "greedy: nothing was drawn"


def test_idle_requests_give_up_their_blocks() -> None:
    """A pool for one: each is served when it is asked, and whoever lost its blocks starts over."""
    proposer = DraftModelProposer(tiny_model(), EngineConfig(block_size=4, num_blocks=5))
    one, two = request([1, 2, 4] * 3), request([5, 6, 7] * 3, number=1)
    for current in (one, two, one):
        assert proposer.propose({current: 3})[current].tokens == afresh(current.tokens, 3)
    drafts = proposer.propose({one: 3, two: 3})
    assert drafts[one].tokens == afresh(one.tokens, 3) and len(drafts[two]) == 0


def test_drafts_end_where_the_positions_end() -> None:
    model = random_model(vocab_size=VOCAB, max_position_embeddings=12)
    proposer = DraftModelProposer(model, EngineConfig(num_blocks=10))
    assert [len(proposer.propose({(one := request([1] * n)): 4})[one]) for n in (9, 11, 12, 13)] == [4, 2, 1, 0]


def test_probs_are_what_the_drafts_were_drawn_from() -> None:
    """The processed distribution at each draft, the repetition penalty of earlier drafts included."""
    params = SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.3, max_tokens=9)
    one = request([5, 6, 7, 5], params)
    draft = DraftModelProposer(tiny_model(), EngineConfig(num_blocks=40)).propose({one: 3})[one]
    assert draft.probs is not None
    for place, token in enumerate(draft.tokens):
        before = one.tokens + draft.tokens[:place]
        logits, _ = prefill(tiny_model(), before)
        (want,) = probs_from_logits(adjust(logits, params, before, [])[None], [params])
        torch.testing.assert_close(draft.probs[place], want, rtol=1e-4, atol=1e-5)
        assert draft.probs[place, token] > 0


def test_the_same_tokens_whoever_is_asked_too() -> None:
    params = SamplingParams(seed=3, max_tokens=9)
    one, two = request([5, 6, 7], params), request([8, 9], params, number=1)
    alone = DraftModelProposer(tiny_model(), EngineConfig(num_blocks=40)).propose({one: 3})[one].tokens
    both = DraftModelProposer(tiny_model(), EngineConfig(num_blocks=40)).propose({two: 3, one: 3})
    assert both[one].tokens == alone
