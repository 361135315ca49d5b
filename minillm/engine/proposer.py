"""What the engine knows about whoever guesses the next tokens: the protocol, and what a guess is.

The engine never imports a proposer. It asks for drafts, checks them in one step together with everything else, and
accepts those that the model agrees with (`minillm.engine.verify`). Who guesses badly costs time, never a wrong token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from minillm.engine.request import Request


@dataclass(frozen=True)
class Draft:
    """Guesses at the next tokens of a sequence, first one first.

    probs [k, vocab_size] float32: the distribution that each token was drawn from, processed by the same parameters as
    the target's. None says that nothing was drawn: a lookup or an argmax. To call such a guess a draw from some other
    distribution would bias the output.
    """

    tokens: list[int] = field(default_factory=list)
    probs: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)


class Proposer(Protocol):
    """Guesses what sequences will say next. One proposer serves one engine."""

    def propose(self, room: Mapping[Request, int]) -> Mapping[Request, Draft]:
        """Drafts for some of the sequences in `room`, each of at most that many tokens, behind `sequence.tokens`.

        Sequences only grow between two calls: by accepted drafts and the one token behind them. Not all of them are
        asked for each time. They are to be read, not changed.
        """
        ...

    def forget(self, sequence: Request) -> None:
        """The sequence has ended: drop what is kept for it. It may be unknown."""
        ...
