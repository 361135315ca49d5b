"""A learner's sampler (exercise 04) and speculation (exercise 13) in the engine's place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillm.course.errors import LearnerError
from minillm.course.use.beside import Beside, known
from minillm.engine.request import Request
from minillm.engine.verify import Draft, given_draft, num_accepted
from minillm.errors import shown
from minillm.sampling import SamplingParams, probs_from_logits, sample
from minillm.speculative.ngram import NgramProposer

if TYPE_CHECKING:
    from minillm.llm import LLM

PROBABILITY = 1e-5  # tolerance


def put_process(module: Any, llm: LLM) -> None:
    """Temperature, top-k, top-p and min-p, one after the other, make the distribution of each row."""

    def theirs(logits: Tensor, params: SamplingParams) -> Tensor:
        probs = module.top_k(module.apply_temperature(logits, params.temperature), max(0, params.top_k))
        probs = module.min_p(module.top_p(probs, params.top_p), params.min_p)
        return probs

    def ours(logits: Tensor, params: SamplingParams) -> Tensor:
        return probs_from_logits(logits[None], [params])[0]

    beside = Beside("ex04 apply_temperature, top_k, top_p, min_p", theirs, ours, PROBABILITY)

    def process(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
        return torch.stack([beside(row, p) for row, p in zip(logits, params, strict=True)])

    llm.engine.sampler.process = process


def put_sample(module: Any, llm: LLM) -> None:
    """The learner's `sample` gets the random numbers that the engine's would get."""

    def ours(probs: Tensor, u: float) -> int:
        return int(sample(probs[None], torch.tensor([u], dtype=torch.float64, device=probs.device)))

    beside = Beside("ex04 sample", module.sample, ours)

    def draw(probs: Tensor, u: Tensor | None) -> Tensor:
        numbers = [0.0] * len(probs) if u is None else u.tolist()
        tokens = [beside(row, number) for row, number in zip(probs, numbers, strict=True)]
        return torch.tensor(tokens, dtype=torch.int64, device=probs.device)

    llm.engine.sampler.draw = draw


class LearnerProposer:
    """Guesses by a learner. They are not compared: whatever is guessed, the text is the same."""

    def __init__(self, propose: Callable[[list[int], int], list[int]], vocab_size: int) -> None:
        self._propose = Beside("ex13 propose_ngram", propose, known)
        self.vocab_size = vocab_size

    def propose(self, room: Mapping[Request, int]) -> dict[Request, Draft]:
        """A draft for each request for which the learner has one."""
        drafts = {request: self._draft(request.tokens, count) for request, count in room.items()}
        return {request: draft for request, draft in drafts.items() if draft}

    def _draft(self, tokens: list[int], count: int) -> Draft:
        guesses = self._propose.call(tokens, count)
        few = isinstance(guesses, list | tuple) and len(guesses) <= count
        if not few or not all(isinstance(token, int) and 0 <= token < self.vocab_size for token in guesses):
            raise LearnerError(
                f"ex13 propose_ngram: {shown(guesses)} is no list of at most {count} tokens of the vocabulary, which "
                f"are integers below {self.vocab_size}."
            )
        return Draft(list(guesses))

    def forget(self, request: Request) -> None:
        """Nothing is kept."""

    def reset(self) -> None:
        """Nothing is kept."""


def put_proposer(module: Any, llm: LLM) -> str | None:
    """Guesses come from the learner; the engine checks them as ever."""
    if not isinstance(llm.engine.proposer, NgramProposer):
        return "the engine does not guess by looking back; see speculative='ngram'"
    llm.engine.proposer = LearnerProposer(module.propose_ngram, llm.engine.model.config.vocab_size)
    return None


def put_verify_greedy(module: Any, llm: LLM) -> None:
    """How many guesses are accepted, once the tokens in their places are drawn."""

    def ours(drafts: list[int], drawn: list[int]) -> list[int]:
        return drawn[: 1 + num_accepted(drafts, drawn)]

    beside = Beside("ex13 verify_greedy", module.verify_greedy, ours)
    llm.engine.sampler.accepted = lambda drafts, drawn: len(beside(drafts, drawn)) - 1


def put_residual(module: Any, llm: LLM) -> None:
    """What a token is drawn from in the place of a guess that was itself drawn, by a draft model."""

    def theirs(p: Tensor, q: Tensor, token: int) -> Tensor:
        accept = module.acceptance_probability(p, q, token)
        probs = (1 - accept) * module.residual(p, q)
        probs[token] += accept
        return probs

    def ours(p: Tensor, q: Tensor, token: int) -> Tensor:
        return given_draft(p[None], q[None], torch.tensor([token], device=p.device))[0]

    beside = Beside("ex13 acceptance_probability and residual", theirs, ours, PROBABILITY)

    def given(target: Tensor, proposal: Tensor, drafts: Tensor) -> Tensor:
        return torch.stack([beside(*row) for row in zip(target, proposal, drafts.tolist(), strict=True)])

    llm.engine.sampler.given = given
