"""Exercise 13 · Speculative decoding: can the big model check instead of write?

A decode step waits for memory, so checking five tokens takes hardly longer than writing one. Somebody cheap guesses a
few tokens ahead, the model checks all of them in one step, and keeps those that it agrees with. Done right, the text is
exactly what the model would have written alone. You write the guessing and the checking.

Lesson: 13_speculative_decoding · 60 minutes · difficulty ●●●●○
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw(probs: Tensor, u: float) -> int:
    """The token that a random number 0 <= u < 1 falls on: exercise 04's `sample`. Given."""
    sums = probs.double().cumsum(dim=0)
    return int(torch.searchsorted(sums, u * sums[-1], right=True))


def propose_ngram(tokens: list[int], count: int, min_match: int = 2, max_match: int = 8) -> list[int]:
    """Guess `count` tokens by looking back: what followed when the text last stood like this?

    Take the longest end of the text, of `max_match` tokens down to `min_match`, that also stands earlier in it (the two
    may overlap), at the latest such place. Propose what followed there. Where that runs into the end of the text, go on
    with your own guesses, so that a repetition is continued. No such place: no guess, [].

    >>> propose_ngram([5, 6, 7, 8, 9, 5, 6], count=3)
    [7, 8, 9]
    >>> propose_ngram([1, 2, 1, 2, 1, 2], count=3)
    [1, 2, 1]
    >>> propose_ngram([1, 2, 3, 4], count=3)
    []
    """
    raise NotImplementedError("propose_ngram is yours to write")


def verify_greedy(drafts: list[int], choices: list[int]) -> list[int]:
    """The new tokens of a step that checked `drafts`, when the model always takes its most likely token.

    `choices` has one entry more than `drafts`: `choices[i]` is what the model says after the first i drafts. Drafts are
    accepted up to the first that differs from the model's choice. Then comes the model's own token in that place, or,
    if all were right, the *bonus* token behind them. What the model said behind a wrong draft is void. So every step
    brings at least one token, and never a wrong one.

    >>> verify_greedy([4, 5, 6], choices=[4, 5, 9, 3])
    [4, 5, 9]
    >>> verify_greedy([4, 5], choices=[4, 5, 6])
    [4, 5, 6]
    """
    raise NotImplementedError("verify_greedy is yours to write")


def acceptance_probability(p: Tensor, q: Tensor, token: int) -> float:
    """With which probability to keep a draft `token` that was drawn from q, when the model's distribution is p.

    min(1, p(token) / q(token)); p and q `[vocab]`. Tokens that the draft model likes too much are kept less often.

    >>> p, q = torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.5])
    >>> acceptance_probability(p, q, 0), acceptance_probability(p, q, 1)
    (0.5, 1.0)
    """
    raise NotImplementedError("acceptance_probability is yours to write")


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What to draw from after a rejection: max(p - q, 0), renormalised; `[vocab]`.

    It makes up for what the draft model proposes too rarely, so that a token comes out with exactly the probability p,
    whatever q is. Where p equals q nothing is left: return p.

    >>> residual(torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.5]))
    tensor([0., 1.])
    """
    raise NotImplementedError("residual is yours to write")


def rejection_sample(drafts: list[int], p: Tensor, q: Tensor, accept_u: list[float], draw_u: float) -> list[int]:
    """The new tokens of a step that checked drafts drawn from q: together they are distributed as p alone would say.

    p `[k + 1, vocab]`: the model's distributions in the place of each of the k drafts, and behind the last. q
    `[k, vocab]`: what the drafts were drawn from. Draft i is accepted if `accept_u[i]` is below its acceptance
    probability. The first that is not is replaced by a token from the residual there, and the rest are void; if all are
    accepted, a bonus token comes from the last row of p. `draw(…, draw_u)` draws that one token.

    >>> p = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    >>> q = torch.tensor([[0.5, 0.5]])
    >>> rejection_sample([0], p, q, accept_u=[0.4], draw_u=0.9), rejection_sample([0], p, q, accept_u=[0.6], draw_u=0.9)
    ([0, 1], [1])
    """
    raise NotImplementedError("rejection_sample is yours to write")
