"""How well the guesses were, from the engine's own records. Names and definitions are vLLM's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from minillm.engine.trace import StepRecord


@dataclass(frozen=True)
class SpecDecodingStats:
    """Counts over all verifies of some steps. A verify checks one draft of one request: several tokens at once."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: tuple[int, ...]  # how often the first, the second, … draft token was accepted
    num_complete_drafts: int  # drafts of which every token was accepted, however long they were

    @classmethod
    def of(cls, records: Iterable[StepRecord]) -> SpecDecodingStats:
        """Count what these steps guessed and accepted."""
        parts = [part for record in records for part in record.requests if part.num_drafts]
        longest = max((part.num_drafts for part in parts), default=0)
        return cls(
            num_drafts=len(parts),
            num_draft_tokens=sum(part.num_drafts for part in parts),
            num_accepted_tokens=sum(part.num_accepted for part in parts),
            num_accepted_tokens_per_pos=tuple(
                sum(part.num_accepted > place for part in parts) for place in range(longest)
            ),
            num_complete_drafts=sum(part.num_accepted == part.num_drafts for part in parts),
        )

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens from one verification: the accepted ones, and the one that always comes. 1 if nothing was guessed."""
        return 1 + self.num_accepted_tokens / max(1, self.num_drafts)

    @property
    def acceptance(self) -> float:
        """α of the formulas: accepted tokens among those that were looked at; none stands after a rejected one.

        Tokens after a rejected one are not checked. vLLM has no name for it: its `draft_acceptance_rate` counts all
        tokens that were guessed.
        """
        num_rejected = self.num_drafts - self.num_complete_drafts
        return self.num_accepted_tokens / max(1, self.num_accepted_tokens + num_rejected)

    @property
    def draft_acceptance_rate(self) -> float:
        """Share of the draft tokens that were accepted; those after a rejected one count as rejected."""
        return self.num_accepted_tokens / max(1, self.num_draft_tokens)

    @property
    def acceptance_rate_per_pos(self) -> tuple[float, ...]:
        """Share of the drafts whose first, second, … token was accepted."""
        return tuple(count / self.num_drafts for count in self.num_accepted_tokens_per_pos)
