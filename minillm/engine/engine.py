"""The engine: requests in, tokens out, one step at a time.

    engine = Engine(model, EngineConfig(policy="mixed"))
    request_id = engine.add(prompt_token_ids, SamplingParams(max_tokens=64))
    for event in engine.run():                             # or: while engine.has_unfinished: events = engine.step()
        event.request.request_id, event.request.index      # which completion of which request
        event.token_ids                                    # its new tokens (one, or several with a proposer)
        event.time, event.finish_reason                    # when they were on the host; why it ended, if it did

The engine knows token ids and no text. Whoever does (`minillm.text`) may end a completion early, for instance at a stop
string, with `finish(request_id, index, "stop", stop_reason=...)`. Everything about a completion can be read from
`event.request`: `logprobs`, `arrival_time`, `num_cached`, `num_preemptions`. All times are `time.perf_counter` seconds.

Several engines live in one process without knowing of each other: nothing is global. One engine may be called from
several threads: they take turns. Whatever ends a call (an error, Ctrl-C at any line), the engine is usable afterwards:
`requests` says who is unfinished and what each has said, and all else is made anew from it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import count
from typing import Any, ParamSpec, TypeVar

from minillm.cache.blocks import BlockPool
from minillm.config import EngineConfig, check_prompt
from minillm.engine.batch import Batch
from minillm.engine.request import Request
from minillm.engine.runner import ModelRunner
from minillm.engine.sampler import Sampler
from minillm.engine.scheduler import Scheduler, StepPlan
from minillm.engine.trace import RequestStep, StepRecord, Trace
from minillm.engine.verify import Proposer
from minillm.errors import RequestError
from minillm.model.decoder import Decoder
from minillm.outputs import FinishReason
from minillm.sampling import SamplingParams

P = ParamSpec("P")
R = TypeVar("R")
OWN = "#"  # what the ids begin with that the engine makes
NO_DISTRIBUTION = "The model's logits or the sampling parameters left no distribution to draw from (NaN)."


def exclusive(method: Callable[P, R]) -> Callable[P, R]:
    """One thread at a time; and if the method does not come to its end, the engine is made anew.

    No context manager of our own: Ctrl-C may come at any line of it, and the lock must be given back.
    """

    @wraps(method)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        engine: Any = args[0]
        with engine._lock:
            try:
                return method(*args, **kwargs)
            except BaseException:
                engine._start_over()
                raise

    return guarded


@dataclass(frozen=True)
class TokenEvent:
    """New tokens of one completion: what a step brought it."""

    request: Request  # to be read, not changed
    token_ids: list[int]
    time: float
    finish_reason: FinishReason | None  # "stop", "length" or "error" if these tokens are its last


class Engine:
    """Serves many requests with one model: continuous batching over a paged, shared KV cache.

    `proposer`: who guesses tokens ahead, so that several can be checked in one step (`minillm.speculative`).
    """

    def __init__(self, model: Decoder, config: EngineConfig | None = None, proposer: Proposer | None = None) -> None:
        self.model = model
        self.config = config or EngineConfig()
        self.proposer = proposer
        self.runner = ModelRunner(model, self.config)
        self.pool = BlockPool(
            self.runner.cache.num_blocks,
            self.runner.cache.block_size,
            identity=(model.config, model.dtype, self.config.kv_format),
            enable_prefix_caching=self.config.enable_prefix_caching,
        )
        self.scheduler = Scheduler(self.config, self.pool, model.config.eos_token_ids)
        self.sampler = Sampler(self.config.seed, model.config.eos_token_ids)
        self.requests: dict[str, list[Request]] = {}  # the registry: unfinished completions by request
        self.trace = Trace(self.config.trace_bytes)
        self._late: list[Request] = []  # finished in a step that was interrupted: the next one tells
        self._num_names = self._num_added = 0
        self._ended: list[tuple[str, int]] = []  # completions that the next record tells of
        self._steps = count()
        self._lock = threading.RLock()

    @property
    def has_unfinished(self) -> bool:
        return bool(self.requests)

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        cache_salt: str | None = None,
        arrival_time: float | None = None,
        num_speculative_tokens: int | None = None,
    ) -> str:
        """Queue a request and return its id. Requests with different `cache_salt` never share KV.

        `num_speculative_tokens` overrides the engine's setting for this request; 0: guess nothing.

        Raises `RequestError` at once for a request that could never be served (see `check`), or for an id that is in
        use. Others are not affected.
        """
        params = params or SamplingParams()
        self.check(prompt, params)
        name = self.new_id() if request_id is None else request_id
        drafts = self.config.num_speculative_tokens if num_speculative_tokens is None else num_speculative_tokens
        with self._lock:
            self._check_names(name, cache_salt)
            request = Request(
                request_id=name,
                order=(self._num_added, 0),
                tokens=list(prompt),
                num_prompt=len(prompt),
                params=params,
                arrival_time=time.perf_counter() if arrival_time is None else arrival_time,
                cache_salt=cache_salt,
                max_drafts=drafts,
                num_drafts=drafts,
            )
            self._queue(request)
        return name

    def new_id(self) -> str:
        """A name for a request that no other request has or will have."""
        with self._lock:
            self._num_names += 1
            return f"{OWN}{self._num_names - 1}"

    @exclusive
    def _queue(self, request: Request) -> None:
        self._num_added += 1
        self.requests[request.request_id] = [request]
        self.scheduler.add(request)

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise `RequestError` for a prompt the model cannot read or a request that no empty engine could hold.

        Reads only what never changes, so any thread may ask. What must fit is everything but the last token: that one
        is handed out and never computed.
        """
        check_prompt(prompt, self.model.config)
        params.check(self.model.config.vocab_size)
        if params.max_tokens > self.room(len(prompt)):
            positions, slots = self.model.config.max_position_embeddings, self.pool.num_usable * self.pool.block_size
            raise RequestError(
                f"A prompt of {len(prompt)} tokens and max_tokens={params.max_tokens} need "
                f"{len(prompt) + params.max_tokens - 1} positions; the model has {positions}, the cache holds {slots}. "
                "Shorten the prompt, lower max_tokens, or raise num_blocks or cache_bytes."
            )
        if params.n > self.config.max_num_seqs:
            raise RequestError(
                f"n={params.n} completions at once, but at most max_num_seqs={self.config.max_num_seqs} requests run. "
                "Lower n or raise max_num_seqs."
            )

    def room(self, num_prompt: int) -> int:
        """The largest max_tokens that a prompt of so many tokens can have; less than 1 if it is too long itself."""
        slots = self.pool.num_usable * self.pool.block_size
        return min(self.model.config.max_position_embeddings, slots) - num_prompt + 1

    def _check_names(self, request_id: str, cache_salt: str | None) -> None:
        for name, value in (("request_id", request_id), ("cache_salt", cache_salt)):
            if not isinstance(value, str | None):
                raise RequestError(f"{name}={value!r} is not possible: it must be a string. Use str() on it.")
        number = request_id.removeprefix(OWN)
        given = number == request_id or (number.isdecimal() and int(number) < self._num_names)
        if request_id in self.requests or not given:
            raise RequestError(
                f"request_id={request_id!r} is still being served, or is one of the engine's own, which begin with "
                f"{OWN!r}. Choose another, or leave it out."
            )

    def run(self) -> Iterator[TokenEvent]:
        """Step until nothing is left to do, and yield what each step brings."""
        while self.has_unfinished:
            yield from self.step()

    @exclusive
    def step(self) -> list[TokenEvent]:
        """Run one step and return what it brought to whom; nothing if no request is unfinished.

        If the step fails or is interrupted, its requests go back to the queue and the error goes on to the caller: the
        next call starts them over.
        """
        late = [request for request in self._late if request in self.requests.get(request.request_id, [])]
        self._late = []
        if late or not self.requests:
            return [self._event(request, [], time.perf_counter()) for request in late]
        start = time.perf_counter()
        plan = self.scheduler.schedule()
        scheduled = proposed = time.perf_counter()
        if self.proposer and (room := self.scheduler.draft_room(plan)):
            self.scheduler.add_drafts(plan, self.proposer.propose(room))
            proposed = time.perf_counter()
        self._check_invariants()
        batch = Batch.pack(plan, self.pool.block_size, self.model.device)
        packed = time.perf_counter()
        tokens = self.sampler.sample(plan, self.runner.run(batch))
        ran = time.perf_counter()
        parts = _parts(plan, tokens)
        events = self._commit(plan, tokens, start, ran)
        self._record(
            plan,
            parts,
            start=start,
            schedule_time=scheduled - start,
            propose_time=proposed - scheduled,
            pack_time=packed - proposed,
            run_time=ran - packed,
            commit_time=time.perf_counter() - ran,
        )
        self._check_invariants()
        return events

    def _commit(self, plan: StepPlan, tokens: list[list[int]], start: float, ran: float) -> list[TokenEvent]:
        """Hand the drawn tokens to their requests and tell who got one, or failed."""
        for request, said in zip(plan.samplers, tokens, strict=True):
            request.first_scheduled_time = request.first_scheduled_time or start
            if said[-1] < 0 and not request.finished:
                request.finish_reason, request.error = "error", NO_DISTRIBUTION
            if request not in plan.scheduled and request.request_id in self.requests:
                self.requests[request.request_id].append(request)  # it was spawned in this step
        for request in plan.scheduled:
            request.first_scheduled_time = request.first_scheduled_time or start
        taken = dict(self.scheduler.commit(plan, tokens))
        failed = [request for request in plan.samplers if request.finish_reason == "error"]
        return [self._event(request, taken.get(request, []), ran) for request in [*taken, *failed]]

    def _event(self, request: Request, tokens: list[int], now: float) -> TokenEvent:
        """Tell what a request got; one that is finished is let go of."""
        if request.finished:
            self._forget(request)
        return TokenEvent(request, tokens, now, request.finish_reason)

    @exclusive
    def finish(
        self, request_id: str, index: int, reason: FinishReason = "stop", stop_reason: str | None = None
    ) -> None:
        """End one completion from outside, for instance because its text contains a stop string.

        A completion that has ended already is left as it is.
        """
        chosen = [r for r in self.requests.get(request_id, []) if r.index == index and not r.finished]
        self._end(chosen, reason, stop_reason)

    @exclusive
    def abort(self, request_id: str) -> None:
        """End all completions of a request, at any moment, and free what they hold. Unknown or ended: nothing to do."""
        self._end(list(self.requests.get(request_id, [])), "abort")

    def _end(self, requests: list[Request], reason: FinishReason, stop_reason: str | None = None) -> None:
        """Let go of completions. The registry first: should the scheduler fail, all is made anew without them.

        One may have ended already, in a step that failed before it could tell.
        """
        ended = [request for request in requests if not request.finished]
        for request in requests:
            self._forget(request)
        for request in ended:
            request.finish_reason, request.stop_reason = reason, stop_reason
        for request in ended:
            self.scheduler.finish(request)

    def _forget(self, request: Request) -> None:
        """Take a request that has ended out of the registry."""
        if self.config.trace_bytes:
            self._ended.append((request.request_id, request.index))
        if self.proposer:
            self.proposer.forget(request)
        completions = self.requests[request.request_id]
        completions.remove(request)
        if not completions:
            del self.requests[request.request_id]

    def _start_over(self) -> None:
        """Make everything anew from the registry: what was being changed when the error came cannot be trusted.

        Requests keep their tokens. Completions that were spawned in the step go: the first will spawn them again.
        What the prefix cache knew is lost.
        """
        self.requests = {name: completions for name, completions in self.requests.items() if completions}
        for completions in self.requests.values():
            if completions[0].num_forks:
                del completions[1:]
        left = sorted((r for completions in self.requests.values() for r in completions), key=lambda r: r.order)
        self._late = [request for request in left if request.finished]
        self.scheduler.reset(request for request in left if not request.finished)
        if self.proposer:
            self.proposer.reset()

    def _check_invariants(self) -> None:
        if self.config.debug:
            self.scheduler.check()

    def _record(self, plan: StepPlan, parts: tuple[RequestStep, ...], **times: float) -> None:
        """Write down the step. `times`: the fields of `StepRecord` that are times."""
        if not self.config.trace_bytes:
            return
        spawned_in_vain = [(r.request_id, r.index) for r in plan.samplers if r.finished]  # its request was aborted
        ended, self._ended = dict.fromkeys([*self._ended, *spawned_in_vain]), []
        self.trace.append(
            StepRecord(
                step=next(self._steps),
                requests=parts,
                admitted=tuple(request.request_id for request in plan.admitted),
                preempted=tuple(request.request_id for request in plan.preempted),
                finished=tuple(ended),
                num_copies=len(plan.copies),
                num_running=len(self.scheduler.running),
                num_waiting=len(self.scheduler.waiting),
                num_free_blocks=self.pool.num_free,
                num_cached_blocks=len(self.pool.cached),
                **times,
            )
        )


def _parts(plan: StepPlan, tokens: list[list[int]]) -> tuple[RequestStep, ...]:
    """What each request does in the step, before it is committed."""
    accepted = {request: len(said) - 1 for request, said in zip(plan.samplers, tokens, strict=True)}
    return tuple(RequestStep.of(part, accepted.get(part.request, 0)) for part in plan.scheduled.values())
