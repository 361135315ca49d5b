"""One request, round by round: what was guessed, and what came of it. The engine's records count; here stands what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from minillm.engine.engine import Engine
from minillm.engine.request import Request
from minillm.engine.verify import Draft, Proposer, num_accepted
from minillm.errors import ConfigError
from minillm.sampling import SamplingParams


@dataclass(frozen=True)
class Round:
    """One step of a request: its guesses and the tokens that it got, the accepted ones first. Times in seconds."""

    guesses: list[int]
    said: list[int]
    propose_time: float
    run_time: float

    @property
    def num_accepted(self) -> int:
        """Guesses that were right. The token after them is the model's own; a text may end before it comes."""
        return num_accepted(self.guesses, self.said)


class Overheard:
    """A proposer that remembers what another one proposed last."""

    def __init__(self, proposer: Proposer) -> None:
        self.proposer = proposer
        self.drafts: Mapping[Request, Draft] = {}

    def propose(self, room: Mapping[Request, int]) -> Mapping[Request, Draft]:
        self.drafts = self.proposer.propose(room)
        return self.drafts

    def forget(self, request: Request) -> None:
        self.proposer.forget(request)

    def reset(self) -> None:
        self.proposer.reset()


def rounds(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> Iterator[Round]:
    """Serve one request alone, and tell what each step brought it. Whoever stops listening ends the request.

    Raises `ConfigError` if nobody guesses for the engine, if it keeps no records, or if it serves others already.
    """
    if engine.proposer is None or engine.has_unfinished or not engine.config.trace_bytes:
        raise ConfigError(
            "Rounds are told of one request in an engine with a proposer and a trace. Attach a proposer, finish the "
            "other requests, and leave trace_bytes above 0."
        )
    request_id = engine.add(prompt, params)
    overheard = Overheard(engine.proposer)
    engine.proposer = overheard
    try:
        for event in engine.run():
            record = engine.trace[-1]
            guesses = overheard.drafts.get(event.request, Draft()).tokens[: record.requests[0].num_drafts]
            yield Round(guesses, event.token_ids, record.propose_time, record.run_time)
    finally:
        engine.abort(request_id)
        engine.proposer = overheard.proposer
