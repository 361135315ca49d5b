"""Speculation changes nothing but time: enumeration, chi-square, and wrong versions that both must find."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

from minillm.engine.verify import Draft, accept, given_draft, given_drafts, num_accepted
from minillm.sampling import SamplingParams, probs_from_logits, sample
from tests.speculative.chance import (
    GivenDraft,
    chi_square,
    joint,
    limit,
    one_position,
    random_probs,
    speculative_joint,
)

SAMPLES = 20_000
Stream = Callable[[int, int, int], Tensor]


def verify(rows: Tensor, drafts: list[Draft], u: Tensor | None, given: GivenDraft = given_draft) -> list[list[int]]:
    """As the sampler does it: replace the rows of drawn drafts, draw one token for each row, accept."""
    return accept(drafts, sample(given_drafts(rows, drafts, given), u).tolist())


def _recover_from_p(target: Tensor, proposal: Tensor, drafts: Tensor) -> Tensor:
    """Trap 41, too: compare a draw with the guess, and draw once more if they differ."""
    accept = (target / proposal).clamp(max=1).gather(-1, drafts[:, None])
    return ((1 - accept) * target).scatter_add(-1, drafts[:, None], accept)


def _ratio_inverted(target: Tensor, proposal: Tensor, drafts: Tensor) -> Tensor:
    accept = (proposal / target).clamp(max=1).gather(-1, drafts[:, None])
    residual = (target - proposal).clamp(min=0)
    return ((1 - accept) * residual / residual.sum(-1, keepdim=True)).scatter_add(-1, drafts[:, None], accept)


def _ratio_of_untempered_q(target: Tensor, proposal: Tensor, drafts: Tensor) -> Tensor:
    """Drawn from q at some temperature, divided by q at temperature 1."""
    plain = proposal**0.7
    plain = plain / plain.sum(-1, keepdim=True)
    return given_draft(target, plain, drafts)


def _residual_not_renormalised(target: Tensor, proposal: Tensor, drafts: Tensor) -> Tensor:
    accept = (target / proposal).clamp(max=1).gather(-1, drafts[:, None])
    return ((1 - accept) * (target - proposal).clamp(min=0)).scatter_add(-1, drafts[:, None], accept)


MUTANTS: dict[str, GivenDraft] = {
    "recovered from p": _recover_from_p,
    "ratio inverted": _ratio_inverted,
    "ratio from the untempered q": _ratio_of_untempered_q,
    "residual not renormalised": _residual_not_renormalised,
}


# --- exact enumeration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", range(2, 17))
def test_the_sum_over_all_drafts_is_the_target(vocab: int) -> None:
    """With zeros in either distribution, as top-k and top-p leave them."""
    for seed in range(20):
        target, proposal = random_probs(2, vocab, seed=seed, zeros=0.3 * (seed % 2))
        torch.testing.assert_close(
            one_position(given_draft, target, proposal), target, rtol=0, atol=1e-12, msg=f"seed {seed}"
        )


@pytest.mark.parametrize("name", MUTANTS)
def test_enumeration_rejects(name: str) -> None:
    for seed in range(20):
        target, proposal = random_probs(2, 5, seed=seed)
        assert (one_position(MUTANTS[name], target, proposal) - target).abs().max() > 1e-3, seed


@pytest.mark.parametrize("num_drafts", [1, 2, 3])
def test_the_sum_over_all_paths_is_the_joint_distribution(num_drafts: int) -> None:
    """Rounds of several drafts, each position with distributions that depend on the token before."""
    target, proposal = random_probs(2, 3, 3, seed=num_drafts, zeros=0.2)
    for run, chance in speculative_joint(given_draft, target, proposal, 0, num_drafts).items():
        assert abs(chance - joint(target, run, 0)) < 1e-12, run


@pytest.mark.parametrize("name", MUTANTS)
def test_enumeration_of_paths_rejects(name: str) -> None:
    target, proposal = random_probs(2, 3, 3, seed=1)
    chances = speculative_joint(MUTANTS[name], target, proposal, 0, 2)
    assert max(abs(chance - joint(target, run, 0)) for run, chance in chances.items()) > 1e-3


def test_a_guess_that_was_not_drawn_leaves_the_distribution_as_it_is() -> None:
    """Trap 42: with q all on x, accept with probability p(x), else p without x renormalised: together that is p."""
    target = random_probs(8, 16, seed=0)
    guesses = torch.arange(8)
    certain = torch.nn.functional.one_hot(guesses, 16).double()
    torch.testing.assert_close(given_draft(target, certain, guesses), target, rtol=0, atol=1e-12)
    assert (_recover_from_p(target, certain, guesses) - target).abs().max() > 0.1


def test_equal_distributions_accept_everything() -> None:
    """Trap 40: the residual is empty, and nothing is divided by it."""
    probs = random_probs(16, seed=3).expand(16, -1)
    torch.testing.assert_close(given_draft(probs, probs, torch.arange(16)), torch.eye(16, dtype=torch.float64))


# --- sampling --------------------------------------------------------------------------------------------------------


def test_accepted_recovered_and_bonus_tokens_of_a_ragged_batch() -> None:
    """Greedy: every row's distribution is one token."""
    rows = torch.eye(6)[[1, 2, 3, 4, 0, 5, 0, 0, 0]]
    drafts = [Draft([1, 2, 3]), Draft([]), Draft([4, 5]), Draft([])]
    tokens = verify(rows, drafts, None)
    assert tokens == [[1, 2, 3, 4], [0], [5], [0]]
    assert verify(rows[:4], [Draft([1, 5, 3])], None) == [[1, 2]]


@pytest.mark.parametrize(
    ("drafts", "drawn", "count"),
    [([], [4], 0), ([4], [4, 5], 1), ([4, 5, 6], [4, 5, 6, 7], 3), ([4, 5, 6], [4, 9, 6, 7], 1), ([4, 5], [4], 1)],
)
def test_drafts_are_accepted_up_to_the_first_that_differs(drafts: list[int], drawn: list[int], count: int) -> None:
    """By hand; what was drawn may be cut short, because a text may end inside an accepted run."""
    assert num_accepted(drafts, drawn) == count


def test_rows_of_certain_and_drawn_drafts_are_told_apart() -> None:
    """Only rows at drawn drafts are replaced: not the bonus row, not those of guesses that were not drawn."""
    target, proposal = random_probs(2, 7, 5, seed=0)
    drafts = [Draft([1, 2]), Draft([3], proposal[:1]), Draft(), Draft([4], proposal[1:2])]
    rows = target[[0, 1, 2, 3, 4, 5, 6, 0]]
    got = given_drafts(rows, drafts, given_draft)
    want = rows.clone()
    want[3] = given_draft(rows[3:4], proposal[:1], torch.tensor([3]))[0]
    want[6] = given_draft(rows[6:7], proposal[1:2], torch.tensor([4]))[0]
    assert torch.equal(got, want) and not torch.equal(got, rows)


def draw(rows: Tensor, generator: Generator) -> Tensor:
    return torch.multinomial(rows, 1, generator=generator)[:, 0]


def rounds(
    target: Tensor, proposal: Tensor | None, count: int, start: int, seed: int, given: GivenDraft = given_draft
) -> Tensor:
    """What `count` requests say in three tokens, [count, 3]: batches with 0 to 3 drafts each, all sampled.

    Without a proposal the guesses are fixed. Whoever is short of three tokens draws the rest from the target.
    """
    helper = Generator().manual_seed(seed)
    said = torch.full((count, 4), -1)
    for first in range(0, count, 500):
        places = range(first, min(first + 500, count))
        drafts = _drafts(proposal, len(places), start, helper)
        rows = target[[before for draft in drafts for before in [start, *draft.tokens]]]
        u = torch.rand(len(rows), dtype=torch.float64, generator=helper)
        for place, tokens in zip(places, verify(rows, drafts, u, given), strict=True):
            said[place, : len(tokens)] = torch.tensor(tokens)
    for place in (1, 2):
        said[:, place] = torch.where(said[:, place] < 0, draw(target[said[:, place - 1]], helper), said[:, place])
    return said[:, :3]


def _drafts(proposal: Tensor | None, count: int, start: int, generator: Generator) -> list[Draft]:
    """Drafts of 0, 1, 2, 3, 0, … tokens, drawn one after the other from the proposal."""
    if proposal is None:
        return [Draft([1, 0, 2][: place % 4]) for place in range(count)]
    before = torch.full((count,), start)
    tokens, probs = list[Tensor](), list[Tensor]()
    for _ in range(3):
        probs.append(proposal[before])
        before = draw(probs[-1], generator)
        tokens.append(before)
    said, rows = torch.stack(tokens, 1).tolist(), torch.stack(probs, 1)
    return [Draft(said[i][: i % 4], rows[i, : i % 4]) if i % 4 else Draft() for i in range(count)]


def chi_square_of_runs(said: Tensor, target: Tensor, start: int) -> float:
    vocab = target.shape[-1]
    counts = torch.bincount(said @ torch.tensor([vocab**2, vocab, 1]), minlength=vocab**3)
    expected = torch.einsum("a,ab,bc->abc", target[start], target, target).flatten()
    return chi_square(counts, expected)


def tables() -> tuple[Tensor, Tensor]:
    """A target and a proposal, first-order models of five tokens under one and the same processing."""
    logits = torch.randn(2, 5, 5, generator=Generator().manual_seed(0))
    params = SamplingParams(temperature=0.8, top_p=0.97)
    target, proposal = (probs_from_logits(table, [params] * 5) for table in logits)
    return target, proposal


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn drafts", "fixed guesses"])
def test_chi_square_of_ragged_batches(drawn: bool) -> None:
    target, proposal = tables()
    said = rounds(target, proposal if drawn else None, SAMPLES, start=0, seed=1)
    assert chi_square_of_runs(said, target, 0) < limit(125)


@pytest.mark.parametrize("name", MUTANTS)
def test_chi_square_rejects(name: str) -> None:
    target, proposal = tables()
    said = rounds(target, proposal, SAMPLES, start=0, seed=1, given=MUTANTS[name])
    assert chi_square_of_runs(said, target, 0) > limit(125)


def test_chi_square_rejects_drafts_that_were_drawn_from_something_else() -> None:
    """Trap 39: drafts drawn from the plain proposal, while the ratio uses the processed one."""
    target, proposal = tables()
    plain = (proposal + 0.1) / 1.5

    def lying(target: Tensor, probs: Tensor, drafts: Tensor) -> Tensor:
        return given_draft(target, 1.5 * probs - 0.1, drafts)

    said = rounds(target, plain, SAMPLES, start=0, seed=1, given=lying)
    assert chi_square_of_runs(said, target, 0) > limit(125)


# --- random streams --------------------------------------------------------------------------------------------------


def numbers(seed: int, start: int, count: int) -> Tensor:
    """The numbers of output tokens `start`, `start` + 1, … of the request with this seed, float64 [count]."""
    params = SamplingParams(seed=seed)
    return torch.tensor([params.random(0, start + i) for i in range(count)], dtype=torch.float64)


def say(target: Tensor, count: int, guess: random.Random | None, seed: int, stream: Stream = numbers) -> list[int]:
    """`count` tokens of a first-order model, with guesses of which about half are right, or without."""
    plain = say(target, count + 4, None, seed) if guess else []
    tokens = [0]
    while len(tokens) <= count:
        draft = Draft()
        if guess:
            right = plain[len(tokens) - 1 :][: guess.randrange(4)]
            draft = Draft([token if guess.random() < 0.6 else guess.randrange(len(target)) for token in right])
        u = stream(seed, len(tokens) - 1, 1 + len(draft))
        tokens += verify(target[[tokens[-1], *draft.tokens]], [draft], u)[0]
    return tokens[1 : count + 1]


def test_guesses_do_not_shift_the_random_stream() -> None:
    """Whoever guesses, however well, and however many there was room for: the same tokens as without."""
    target = tables()[0]
    for seed in range(30):
        assert say(target, 40, random.Random(seed), seed) == say(target, 40, None, seed), seed


def test_rows_drawn_in_vain_would_shift_it() -> None:
    """A stream that is counted by what was drawn, not by what was said."""
    target, drawn = tables()[0], 0

    def in_turn(seed: int, start: int, count: int) -> Tensor:
        nonlocal drawn
        drawn += count
        return numbers(seed, drawn - count, count)

    different = 0
    for seed in range(30):
        drawn = 0
        different += say(target, 40, random.Random(seed), seed, in_turn) != say(target, 40, None, seed)
    assert different > 15


def test_a_request_does_not_depend_on_its_neighbours() -> None:
    target, proposal = tables()
    for seed in range(20):
        drafts = _drafts(proposal, 4, 0, Generator().manual_seed(seed))
        rows = [target[[0, *draft.tokens]] for draft in drafts]
        u = [numbers(4 * seed + place, 0, len(row)) for place, row in enumerate(rows)]
        alone = [verify(row, [draft], numbers)[0] for row, draft, numbers in zip(rows, drafts, u, strict=True)]
        assert verify(torch.cat(rows), drafts, torch.cat(u)) == alone, seed
