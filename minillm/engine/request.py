"""One completion on its way: its tokens, and how many of them have their KV in the cache."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from minillm.cache.blocks import BlockTable, Prefix
from minillm.outputs import FinishReason, Logprob
from minillm.sampling import SamplingParams

NO_DISTRIBUTION = "The model's logits or the sampling parameters left no distribution to draw from (NaN)."


@dataclass(eq=False)
class Request:
    """A prompt and what was generated from it.

    There is no state machine: counters say everything. `num_computed` of the `num_tokens` tokens have their KV in the
    cache, and each step moves the first number towards the second. A long prompt, a prefix hit, a request that lost
    its blocks and a running decode differ in nothing but the distance (`num_remaining`).

    A request for n completions is one `Request` until its prompt is computed; then it spawns the other n - 1.
    """

    request_id: str
    order: tuple[int, int]  # (arrival number, index of the completion): smaller goes first
    tokens: list[int]  # the prompt, then what was generated; the last one is never computed before it is sampled from
    num_prompt: int
    params: SamplingParams
    cache_salt: str | None = None  # requests with different salts never share KV
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens that the prefix cache saved when the request first ran
    num_written: int = 0  # tokens whose KV was ever computed: computing one of them again is the price of preemption
    num_preemptions: int = 0
    max_drafts: int = 0  # tokens that may be guessed for it in one step; 0: it never speculates
    num_drafts: int = 0  # tokens to guess next: adapted to how many were right
    table: BlockTable = field(default_factory=BlockTable)
    hits: list[Prefix] = field(default_factory=list)  # blocks that the last look into the prefix cache found
    first_scheduled_time: float | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)  # of each generated token, if asked for
    prompt_logprobs: list[dict[int, Logprob]] = field(default_factory=list)  # of prompt tokens 1, 2, …, if asked for
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None  # why finish_reason is "error"

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
        """Tokens still to be computed: 1 for a request that is level, more for one that is behind.

        Drafts do not count: they are guesses of one step, and belong to its plan.
        """
        return len(self.tokens) - self.num_computed

    @property
    def num_forks(self) -> int:
        """Completions still to be spawned: they come with the first token of completion 0."""
        return self.params.n - 1 if self.index == 0 and self.num_generated == 0 else 0

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def extend(self, tokens: list[int], end_ids: tuple[int, ...]) -> list[int]:
        """Take over the tokens of a step up to the one that ends the request, if any does; returns those taken.

        Takes none if the last is -1: there was no distribution to draw it from.
        """
        if tokens[-1] < 0:
            self.finish_reason, self.error = "error", NO_DISTRIBUTION
            return []
        for count, token in enumerate(tokens, 1):
            self.tokens.append(token)
            self.finish_reason = self._reason_to_end(end_ids)
            if self.finish_reason == "stop" and (token not in end_ids or self.params.ignore_eos):
                self.stop_reason = token
            if self.finished:
                return tokens[:count]
        return tokens

    def _reason_to_end(self, end_ids: tuple[int, ...]) -> FinishReason | None:
        """What the last of the generated tokens says: nothing comes after it, or something does."""
        if self.params.ends_with(self.tokens[-1], end_ids):
            return "stop"
        return "length" if self.num_generated >= self.params.max_tokens else None

    def reopen(self, end_ids: tuple[int, ...]) -> None:
        """Take back an end that nobody was told of, with the token that brought it: it will be drawn again."""
        if self.num_generated and self._reason_to_end(end_ids):
            self.tokens.pop()
        self.finish_reason = self.stop_reason = self.error = None

    def adapt_drafts(self, num_proposed: int, num_accepted: int) -> None:
        """Guess as far as the last guess was right, and one token further; twice as far if all of it was right.

        Saves guesses that are made and checked in vain. Loses where those cost next to nothing (a lookup, one request
        alone): after a wrong guess it takes some rounds to guess far again, and each is a step of the model.
        """
        wanted = 2 * num_proposed if num_accepted == num_proposed else num_accepted + 1
        self.num_drafts = min(wanted, self.max_drafts)

    def spawn(self) -> list[Request]:
        """The other completions of the request, as they begin: same tokens, no blocks yet."""
        return [
            replace(
                self,
                order=(self.order[0], index),
                tokens=list(self.tokens),
                table=BlockTable(),
                hits=[],
                logprobs=[],
                prompt_logprobs=[],
            )
            for index in range(1, 1 + self.num_forks)
        ]

    def start_over(self) -> None:
        """Forget blocks and counts, not tokens: the request is computed again from its first token."""
        self.table, self.hits, self.num_computed = BlockTable(), [], 0
        del self.logprobs[self.num_generated :]
