"""Which drafts are accepted: speculative sampling, exactly the target's distribution.

A step gives the target's distribution p at each of k drafts and behind the last one. Speculative sampling (Leviathan
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

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Generator, Tensor

from minillm.engine.proposer import Draft
from minillm.sampling import sample

Marks = dict[tuple[int, int], Tensor]  # (sequence, row) -> the state of its random stream before that row


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


def verify(
    target: Tensor,
    drafts: Sequence[Draft],
    generators: Sequence[Generator | None],
    *,
    given: Callable[..., Tensor] = given_draft,
    draw: Callable[..., Tensor] = sample,
    accepted: Callable[..., int] = num_accepted,
) -> list[list[int]]:
    """The new tokens of each sequence: the drafts that are accepted, then the recovered or the bonus token.

    target [rows, vocab]: for each sequence the processed distributions of its 1 + k next positions, packed. Sequences
    may have any number of drafts, none included. Tokens come to the host in one transfer. Rows behind a rejected draft
    are drawn in vain, so the random stream goes back to where it would be without them: what a sequence draws next
    does not depend on how many of its guesses were wrong.

    Three rules, each a parameter: what is drawn from once a draft is `given`, the `draw`, how many are `accepted`.
    """
    marks: Marks = {}
    drawn = draw(given_drafts(target, drafts, given), _streams(drafts, generators, marks)).tolist()
    tokens = []
    for index, (draft, generator) in enumerate(zip(drafts, generators, strict=True)):
        rows, drawn = drawn[: 1 + len(draft)], drawn[1 + len(draft) :]
        count = 1 + accepted(draft.tokens, rows)
        tokens.append(rows[:count])
        if generator is not None and (index, count) in marks:
            generator.set_state(marks[index, count])
    return tokens


def _streams(
    drafts: Sequence[Draft], generators: Sequence[Generator | None], marks: Marks
) -> Iterator[Generator | None]:
    """The generator of each row, noting its state before every row that may turn out to be void.

    `draw` draws a row before it asks for the next generator.
    """
    for index, (draft, generator) in enumerate(zip(drafts, generators, strict=True)):
        for row in range(1 + len(draft)):
            if row and generator is not None:
                marks[index, row] = generator.get_state()
            yield generator


def given_drafts(target: Tensor, drafts: Sequence[Draft], given: Callable[..., Tensor]) -> Tensor:
    """`target` [rows, vocab] with each row that has a drawn draft replaced by `given(target, proposal, drafts)`."""
    rows, tokens, start = list[int](), list[int](), 0
    for draft in drafts:
        if draft.probs is not None:
            rows += range(start, start + len(draft))
            tokens += draft.tokens
        start += 1 + len(draft)
    if not rows:
        return target
    where, guesses = torch.tensor([rows, tokens], device=target.device)
    proposal = torch.cat([draft.probs for draft in drafts if draft.probs is not None])
    return target.index_copy(0, where, given(target[where], proposal, guesses))
