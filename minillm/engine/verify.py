"""Which drafts are accepted: speculative sampling, exactly the target's distribution.

A step gives the target's distribution p at each of k drafts and after the last one. Speculative sampling (Leviathan
et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318) accepts a draft x that was drawn from q with
probability min(1, p(x) / q(x)). Else it draws the token from what p has more of than q, norm(max(p - q, 0)): the
*recovered* token, after which everything that was guessed is void. If all drafts are accepted, a *bonus* token comes
from the last p. Either way a step yields the accepted drafts and one token more.

Accepting and recovering are one draw. Put the probability of accepting on x and spread the rest over the residual: what
is drawn from *that* distribution is x exactly if x is accepted, because the residual is 0 where q has more. Two special
cases need no code:

* A guess that was not drawn (q is all on x): the distribution is p itself. So every row is drawn as if there were no
  draft, and a draft only tells for how many rows that can be done at once.
* Greedy (p is all on one token): the draw is the argmax, and a draft is accepted if it equals that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from minillm.engine.request import Request

T = TypeVar("T")


@dataclass(frozen=True)
class Draft:
    """Guesses at the next tokens of a request, first one first.

    probs [k, vocab_size] float32: the distribution that each token was drawn from, processed by the same parameters as
    the target's. None says that nothing was drawn: a lookup or an argmax. To call such a guess a draw from some other
    distribution would bias the output.
    """

    tokens: list[int] = field(default_factory=list)
    probs: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)


class Proposer(Protocol):
    """Guesses what requests will say next. One proposer serves one engine; who guesses badly costs time, no more."""

    def propose(self, room: Mapping[Request, int]) -> Mapping[Request, Draft]:
        """Drafts for some of the requests in `room`, each of at most that many tokens, after `request.tokens`.

        Requests only grow between two calls: by accepted drafts and the one token after them. Not all of them are
        asked for each time. They are to be read, not changed.
        """
        ...

    def forget(self, request: Request) -> None:
        """The request has ended: drop what is kept for it. It may be unknown."""
        ...

    def reset(self) -> None:
        """A step was interrupted, perhaps within `propose`: drop what is kept for all of them."""
        ...


def by_request(rows: Iterable[T], drafts: Sequence[Draft]) -> list[list[T]]:
    """The rows of each request, which lie one after the other: one for each of its drafts and one more."""
    rest = iter(rows)
    return [list(islice(rest, 1 + len(draft))) for draft in drafts]


def num_accepted(drafts: Sequence[int], drawn: Sequence[int]) -> int:
    """How many drafts stand before the first that differs from what was drawn in its place."""
    pairs = enumerate(zip(drafts, drawn, strict=False))
    return next((place for place, (draft, token) in pairs if draft != token), min(len(drafts), len(drawn)))


def given_draft(target: Tensor, proposal: Tensor, drafts: Tensor) -> Tensor:
    """What row i's token is drawn from once drafts[i] was drawn from proposal[i]; all [rows, vocab], drafts [rows].

    Its mean over proposal is target, whatever proposal is: q(x) min(1, p(x)/q(x)) = min(p(x), q(x)) is accepted, and
    the mass that is missing, 1 - sum min(p, q) = sum max(p - q, 0), times the residual is p - min(p, q). Where the
    residual is empty, p equals q up to rounding, and p takes its place.
    """
    at_draft = drafts[:, None]
    accept = (target.gather(-1, at_draft) / proposal.gather(-1, at_draft)).clamp(max=1)
    residual = (target - proposal).clamp(min=0)
    mass = residual.sum(dim=-1, keepdim=True)
    residual = torch.where(mass > 0, residual / mass, target)
    return ((1 - accept) * residual).scatter_add(-1, at_draft, accept)


def given_drafts(target: Tensor, drafts: Sequence[Draft], given: Callable[..., Tensor]) -> Tensor:
    """`target` [rows, vocab] with each row that has a drawn draft replaced by `given(target, proposal, drafts)`."""
    rows, tokens, proposals = list[int](), list[int](), list[Tensor]()
    for draft, places in zip(drafts, by_request(range(len(target)), drafts), strict=True):
        if draft.probs is not None:
            rows += places[:-1]
            tokens += draft.tokens
            proposals.append(draft.probs)
    if not rows:
        return target
    where, guesses = torch.tensor([rows, tokens], device=target.device)
    return target.index_copy(0, where, given(target[where], torch.cat(proposals), guesses))


def accept(drafts: Sequence[Draft], drawn: list[int], accepted: Callable[..., int] = num_accepted) -> list[list[int]]:
    """The new tokens of each request: the drafts that are accepted, then the recovered or the bonus token.

    Rows after a rejected draft were drawn in vain.
    """
    pairs = zip(drafts, by_request(drawn, drafts), strict=True)
    return [said[: 1 + accepted(draft.tokens, said)] for draft, said in pairs]
