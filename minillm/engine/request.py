"""One completion on its way: its tokens, and how many of them have their KV in the cache."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from minillm.cache.blocks import BlockTable, Prefix
from minillm.outputs import FinishReason, Logprob
from minillm.sampling import SamplingParams


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
    arrival_time: float
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
    def width(self) -> int:
        """Completions that this request stands for."""
        return 1 + self.num_forks

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def extend(self, tokens: list[int], end_ids: tuple[int, ...]) -> list[int]:
        """Take over the tokens of a step up to the one that ends the request, if any does; returns those taken."""
        for count, token in enumerate(tokens, 1):
            self.tokens.append(token)
            if self.params.ends_with(token, end_ids):
                self.finish_reason = "stop"
                self.stop_reason = None if token in end_ids and not self.params.ignore_eos else token
            elif self.num_generated >= self.params.max_tokens:
                self.finish_reason = "length"
            if self.finished:
                return tokens[:count]
        return tokens

    def adapt_drafts(self, num_proposed: int, num_accepted: int) -> None:
        """Guess as far as the last guess was right, and one token further; twice as far if all of it was right.

        Saves guesses that are made and checked in vain. Loses where those cost next to nothing (a lookup, one request
        alone): after a wrong guess it takes some rounds to guess far again, and each is a step of the model.
        """
        wanted = 2 * num_proposed if num_accepted == num_proposed else num_accepted + 1
        self.num_drafts = min(wanted, self.max_drafts)

    def spawn(self) -> list[Request]:
        """The other completions of the request, as they begin: same tokens, no blocks yet."""
        arrival, index = self.order
        return [
            replace(
                self,
                order=(arrival, index + 1 + fork),
                tokens=list(self.tokens),
                table=BlockTable(),
                hits=[],
                logprobs=[],
                prompt_logprobs=[],
            )
            for fork in range(self.num_forks)
        ]

    def start_over(self) -> None:
        """Forget blocks and counts, not tokens: the request is computed again from its first token."""
        self.table, self.hits, self.num_computed = BlockTable(), [], 0
        del self.logprobs[self.num_generated :]
