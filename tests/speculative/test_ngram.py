"""Prompt lookup against brute force, and its cost against a scan's."""

from __future__ import annotations

import random

import pytest

from minillm.engine.request import Request
from minillm.sampling import SamplingParams
from minillm.speculative.ngram import NgramProposer, SuffixIndex, continuation


def text(tokens: list[int]) -> Request:
    return Request("0", (0, 0), tokens, len(tokens), SamplingParams())


def earlier_ends(tokens: list[int], length: int) -> list[int]:
    """The places after the earlier occurrences of the last `length` tokens."""
    return [end for end in range(length, len(tokens)) if tokens[end - length : end] == tokens[len(tokens) - length :]]


def longest_match(tokens: list[int]) -> int:
    return max(length for length in range(len(tokens)) if earlier_ends(tokens, length))


@pytest.mark.parametrize("vocab", [1, 2, 3, 8])
def test_the_longest_repeated_end_is_found(vocab: int) -> None:
    """After every token of a random text: its length, and a place where it really stands."""
    for seed in range(12):
        rng = random.Random(seed)
        index, tokens = SuffixIndex(), list[int]()
        for _ in range(60):
            tokens.append(rng.randrange(vocab))
            index.append(tokens[-1])
            assert index.num_tokens == len(tokens)
            assert index.num_matched == longest_match(tokens), (seed, tokens)
            assert index.source in earlier_ends(tokens, index.num_matched) or index.num_matched == 0, (seed, tokens)


def test_a_mutant_that_never_splits_states_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SuffixIndex, "_exactly", lambda self, state, token: self._next[state][token])
    with pytest.raises(AssertionError):
        test_the_longest_repeated_end_is_found(2)


def test_what_followed_is_proposed() -> None:
    proposer = NgramProposer()
    one = text([1, 2, 3, 4, 5, 9, 1, 2, 3])
    assert proposer.propose({one: 3})[one].tokens == [4, 5, 9]
    assert proposer.propose({one: 1})[one].tokens == [4]
    one.tokens += [4, 7]
    assert proposer.propose({one: 4}) == {}, "7 is new"
    one.tokens += [2, 3]
    assert proposer.propose({one: 2})[one].tokens == [4, 7], "the latest occurrence counts"


def test_the_longer_match_wins() -> None:
    one = text([1, 2, 3, 4, 8, 8, 2, 3, 5, 8, 1, 2, 3])
    assert NgramProposer().propose({one: 1})[one].tokens == [4]


def test_a_guess_goes_on_with_itself_where_the_text_ends() -> None:
    assert continuation([7, 1, 2, 1, 2], 3, 5) == [1, 2, 1, 2, 1]
    assert continuation([4, 4, 4], 2, 3) == [4, 4, 4]


def test_short_matches_are_no_reason_to_guess() -> None:
    tokens = [1, 2, 3, 1, 2]
    assert NgramProposer(min_match=2).propose({(one := text(tokens)): 1})[one].tokens == [3]
    assert NgramProposer(min_match=3).propose({text(tokens): 1}) == {}


def test_requests_do_not_mix_and_are_forgotten() -> None:
    proposer = NgramProposer()
    a, b = text([1, 2, 3, 1, 2]), text([1, 2, 4, 1, 2])
    drafts = proposer.propose({a: 1, b: 1})
    assert (drafts[a].tokens, drafts[b].tokens) == ([3], [4])
    proposer.forget(a)
    proposer.forget(a)
    assert set(proposer._indices) == {b}


def test_a_token_costs_the_same_at_any_length() -> None:
    """Counted, not timed: what 100,000 tokens of repetitive text leave behind. A scan would compare 5e9 pairs."""
    rng = random.Random(0)
    pieces = [[rng.randrange(50) for _ in range(rng.randrange(3, 40))] for _ in range(200)]
    tokens = [token for _ in range(8000) for token in rng.choice(pieces)][:100_000]
    index = SuffixIndex()
    for token in tokens:
        index.append(token)
    assert len(index._link) <= 2 * len(tokens)
    assert sum(map(len, index._next)) <= 3 * len(tokens), "at most 3n - 4 transitions, each made once"
