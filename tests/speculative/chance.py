"""Oracles about chance: exact enumeration, and how far counts may stray from what is expected."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

GivenDraft = Callable[[Tensor, Tensor, Tensor], Tensor]


def random_probs(*shape: int, seed: int, zeros: float = 0.0) -> Tensor:
    """Random float64 distributions over the last dimension; some entries (never a whole row) are 0."""
    rng = torch.Generator().manual_seed(seed)
    weights = torch.randn(shape, generator=rng, dtype=torch.float64).mul(1.5).exp()
    gone = torch.rand(shape, generator=rng) < zeros
    gone.scatter_(-1, weights.argmax(-1, keepdim=True), False)
    weights = weights.masked_fill(gone, 0)
    return weights / weights.sum(-1, keepdim=True)


def one_position(given_draft: GivenDraft, target: Tensor, proposal: Tensor) -> Tensor:
    """The distribution of the token that comes out, summed over every draft that the proposal can draw; [vocab]."""
    possible = proposal.nonzero()[:, 0]
    rows = len(possible)
    out = given_draft(target.expand(rows, -1), proposal.expand(rows, -1), possible)
    return proposal[possible] @ (out / out.sum(-1, keepdim=True))


def joint(target: Tensor, tokens: tuple[int, ...], start: int) -> float:
    """Probability of a run of tokens under a first-order model target [vocab, vocab], after token `start`."""
    chance = 1.0
    for before, after in zip((start, *tokens), tokens, strict=False):
        chance *= float(target[before, after])
    return chance


def speculative_joint(
    given_draft: GivenDraft, target: Tensor, proposal: Tensor, start: int, num_drafts: int
) -> dict[tuple[int, ...], float]:
    """Chance of each run of 1 + num_drafts tokens, summed over all paths of drafting, accepting and recovering.

    What a round leaves open (it stopped at a rejected draft) is drawn from the target itself.
    """
    vocab = target.shape[-1]
    chances = dict.fromkeys(product(range(vocab), repeat=num_drafts + 1), 0.0)
    for drafts in product(range(vocab), repeat=num_drafts):
        reached = joint(proposal, drafts, start)
        if reached == 0:
            continue
        for run in chances:
            chances[run] += reached * _of_run(given_draft, target, proposal, start, drafts, run)
    return chances


def _of_run(
    given_draft: GivenDraft, target: Tensor, proposal: Tensor, start: int, drafts: tuple[int, ...], run: tuple[int, ...]
) -> float:
    chance, before = 1.0, start
    for place, (draft, token) in enumerate(zip(drafts, run, strict=False)):
        row = given_draft(target[before][None], proposal[before][None], torch.tensor([draft]))[0]
        chance *= float(row[token] / row.sum())
        before = token
        if token != draft:
            return chance * joint(target, run[place + 1 :], before)
    return chance * joint(target, run[len(drafts) :], before)


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """Pearson's statistic. `expected` are probabilities; infinite if something impossible happened."""
    if counts[expected == 0].sum() > 0:
        return float("inf")
    counts, expected = counts[expected > 0].double(), expected[expected > 0].double()
    mean = expected * counts.sum()
    return float(((counts - mean) ** 2 / mean).sum())


def limit(cells: int) -> float:
    """What chi-square exceeds in far fewer than one of 10,000 right runs: its mean plus six deviations."""
    return cells - 1 + 6 * (2 * (cells - 1)) ** 0.5
