"""One completion on its way: its tokens, and how many of them have their KV in the cache."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace

from torch import Generator

from minillm.cache.blocks import BlockTable
from minillm.outputs import FinishReason
from minillm.sampling import SamplingParams


@dataclass(eq=False)
class Request:
    """A prompt and what was generated from it.

    There is no state machine: counters say everything. `num_computed` of the `num_tokens` tokens have their KV in the
    cache, and each step moves the first number towards the second. A long prompt, a prefix hit, a sequence that lost
    its blocks and a running decode differ in nothing but the distance (`num_remaining`).

    A request for n completions is one sequence until its prompt is computed; then it spawns the other n - 1.
    """

    request_id: str
    order: tuple[int, int]  # (arrival number of the request, index of the completion): smaller goes first
    tokens: list[int]  # the prompt, then what was generated; the last one is never computed before it is sampled from
    num_prompt: int
    params: SamplingParams
    seed: int  # the engine's: with the arrival number it serves if params.seed is None
    arrival_time: float
    salt: Hashable = None  # requests with different salts never share KV
    num_forks: int = 0  # completions still to be spawned
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens that the prefix cache saved when the sequence first ran
    num_written: int = 0  # tokens whose KV was ever computed: computing one of them again is the price of preemption
    num_preemptions: int = 0
    max_drafts: int = 0  # tokens that may be guessed for it in one step; 0: it never speculates
    num_drafts: int = 0  # tokens to guess next: adapted to how many were right
    table: BlockTable = field(default_factory=BlockTable)
    generator: Generator | None = None  # made when first needed, kept through preemptions
    first_scheduled_time: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def index(self) -> int:
        """Which of its request's completions this is."""
        return self.order[1]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_remaining(self) -> int:
        """Tokens still to be computed: 1 for a sequence that is level, more for one that is behind.

        Drafts do not count: they are guesses of one step, and belong to its plan.
        """
        return len(self.tokens) - self.num_computed

    @property
    def width(self) -> int:
        """Completions that this sequence stands for."""
        return 1 + self.num_forks

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def extend(self, tokens: list[int], eos_token_ids: tuple[int, ...]) -> list[int]:
        """Take over the tokens of a step up to the one that ends the sequence, if any does; returns those taken."""
        for count, token in enumerate(tokens, 1):
            self._append(token, eos_token_ids)
            if self.finished:
                return tokens[:count]
        return tokens

    def _append(self, token: int, eos_token_ids: tuple[int, ...]) -> None:
        self.tokens.append(token)
        if self.params.ends_with(token, eos_token_ids):
            self.finish_reason = "stop"
            self.stop_reason = token if token in (self.params.stop_token_ids or ()) else None
        elif self.num_generated >= self.params.max_tokens:
            self.finish_reason = "length"

    def adapt_drafts(self, num_proposed: int, num_accepted: int) -> None:
        """Guess as far as the last guess was right, and one token further; twice as far if all of it was right.

        Saves guesses that are made and checked in vain. Loses where those cost next to nothing (a lookup, one request
        alone): after a wrong guess it takes some rounds to guess far again, and each is a step of the model.
        """
        wanted = 2 * num_proposed if num_accepted == num_proposed else num_accepted + 1
        self.num_drafts = min(wanted, self.max_drafts)

    def spawn(self) -> list[Request]:
        """The other completions of the request, as they begin: same tokens, no blocks yet."""
        order, index = self.order
        return [
            replace(
                self,
                order=(order, index + 1 + fork),
                tokens=list(self.tokens),
                num_forks=0,
                table=BlockTable(),
                generator=None,
            )
            for fork in range(self.num_forks)
        ]
