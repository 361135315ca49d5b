"""The engine: requests in, tokens out, one step at a time.

    engine = Engine(model, EngineConfig(policy="mixed"))
    request_id = engine.add(prompt_token_ids, SamplingParams(max_tokens=64))
    for event in engine.run():                             # or: while engine.has_unfinished: events = engine.step()
        event.request.request_id, event.request.index      # which completion of which request
        event.token_ids                                    # its new tokens (one, or several with a proposer)
        event.time, event.finish_reason                    # when they were on the host; why it ended, if it did

The engine knows token ids and no text. Whoever does (`minillm.text`) may end a completion early, for instance at a stop
string, with `finish(request_id, index, stop_reason)`. Everything about a completion can be read from
`event.request`: `logprobs`, `num_cached`, `num_preemptions`, `first_scheduled_time`. All times are `time.perf_counter`
seconds.

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
from minillm.errors import require
from minillm.model.decoder import Decoder
from minillm.outputs import FinishReason
from minillm.sampling import SamplingParams

P = ParamSpec("P")
R = TypeVar("R")
OWN = "#"  # what the ids begin with that the engine makes


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
        cache, caching = self.runner.cache, self.config.enable_prefix_caching
        identity = (model.config, model.dtype, self.config.kv_format)
        self.pool = BlockPool(cache.num_blocks, cache.block_size, identity=identity, enable_prefix_caching=caching)
        self.scheduler = Scheduler(self.config, self.pool, model.config.eos_token_ids)
        self.sampler = Sampler(self.config.seed, model.config.eos_token_ids)
        self.requests: dict[str, list[Request]] = {}  # the registry: unfinished completions by request
        self.trace = Trace(self.config.trace_bytes)
        self._num_names = self._num_added = 0
        self._ended: list[tuple[str, int]] = []  # from outside: the next record tells of them
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
        most = self.config.num_speculative_tokens if num_speculative_tokens is None else num_speculative_tokens
        with self._lock:
            self._check_names(name, cache_salt)
            request = Request(name, (self._num_added, 0), list(prompt), len(prompt), params, cache_salt)
            request.max_drafts = request.num_drafts = most
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
        most, positions = max(0, self.room(len(prompt))), self.model.config.max_position_embeddings
        why = f"the model has {positions} positions, the cache {self.pool.num_usable * self.pool.block_size}"
        allowed = f"at most {most} after a prompt of {len(prompt)} tokens: {why}. Shorten it, or raise num_blocks"
        require(params.max_tokens <= most, "max_tokens", params.max_tokens, allowed)
        allowed = f"at most max_num_seqs={self.config.max_num_seqs}, the requests that run at once. Raise that"
        require(params.n <= self.config.max_num_seqs, "n", params.n, allowed)

    def room(self, num_prompt: int) -> int:
        """The largest max_tokens that a prompt of so many tokens can have; less than 1 if it is too long itself."""
        slots = self.pool.num_usable * self.pool.block_size
        return min(self.model.config.max_position_embeddings, slots) - num_prompt + 1

    def _check_names(self, request_id: str, cache_salt: str | None) -> None:
        for name, value in (("request_id", request_id), ("cache_salt", cache_salt)):
            require(isinstance(value, str | None), name, value, "a string. Use str() on it")
        number = request_id.removeprefix(OWN)
        given = number == request_id or (number.isdecimal() and int(number) < self._num_names)
        allowed = f"none of those still being served, and not begin with {OWN!r} like the engine's own"
        require(given and request_id not in self.requests, "request_id", request_id, allowed)

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
        if not self.requests:
            return []
        start = time.perf_counter()
        plan = self.scheduler.schedule()
        scheduled = proposed = time.perf_counter()
        if self.proposer and (room := self.scheduler.draft_room(plan)):
            self.scheduler.add_drafts(plan, self.proposer.propose(room))
            proposed = time.perf_counter()
        if self.config.debug:
            self.scheduler.check()
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
        if self.config.debug:
            self.scheduler.check()
        for event in events:
            if event.finish_reason:
                self._forget(event.request)
        return events

    def _commit(self, plan: StepPlan, tokens: list[list[int]], start: float, ran: float) -> list[TokenEvent]:
        """Hand the drawn tokens to their requests and tell who got some, or failed."""
        for request in [*plan.scheduled, *plan.samplers]:
            request.first_scheduled_time = request.first_scheduled_time or start
            if request not in plan.scheduled and request.request_id in self.requests:
                self.requests[request.request_id].append(request)  # it was spawned in this step
        taken = self.scheduler.commit(plan, tokens)
        return [TokenEvent(request, said, ran, request.finish_reason) for request, said in taken]

    @exclusive
    def finish(self, request_id: str, index: int, stop_reason: str | None = None) -> None:
        """Stop one completion from outside, for instance because its text contains the stop string `stop_reason`.

        A completion that has ended already is left as it is.
        """
        self._end([r for r in self.requests.get(request_id, []) if r.index == index], "stop", stop_reason)

    @exclusive
    def abort(self, request_id: str) -> None:
        """End all completions of a request, at any moment, and free what they hold. Unknown or ended: nothing to do."""
        self._end(list(self.requests.get(request_id, [])), "abort")

    def _end(self, requests: list[Request], reason: FinishReason, stop_reason: str | None = None) -> None:
        """Let go of completions. The registry first: should the scheduler fail, all is made anew without them."""
        for request in requests:
            self._forget(request)
            self._ended.append((request.request_id, request.index))
            request.finish_reason, request.stop_reason = reason, stop_reason
        for request in requests:
            self.scheduler.finish(request)

    def _forget(self, request: Request) -> None:
        """Take a completion that has ended out of the registry."""
        if self.proposer:
            self.proposer.forget(request)
        completions = self.requests[request.request_id]
        completions.remove(request)
        if not completions:
            del self.requests[request.request_id]

    def _start_over(self) -> None:
        """Make everything anew from the registry: what was being changed when the error came cannot be trusted.

        Requests keep their tokens, but for one that would end them: nobody has been told. Completions that were spawned
        in the step go: the first will spawn them again. What the prefix cache knew is lost.
        """
        self.requests = {name: completions for name, completions in self.requests.items() if completions}
        for completions in self.requests.values():
            for request in completions:
                request.reopen(self.scheduler.end_ids)
            if completions[0].num_forks:
                del completions[1:]
        self.scheduler.reset(request for completions in self.requests.values() for request in completions)
        if self.proposer:
            self.proposer.reset()

    def _record(self, plan: StepPlan, parts: tuple[RequestStep, ...], **times: float) -> None:
        """Write down the step. `times`: the fields of `StepRecord` that are times."""
        ended = [*self._ended, *((r.request_id, r.index) for r in plan.samplers if r.finished)]
        self._ended.clear()
        if not self.config.trace_bytes:
            return
        self.trace.append(
            StepRecord(
                step=next(self._steps),
                requests=parts,
                admitted=tuple(request.request_id for request in plan.admitted),
                preempted=tuple(request.request_id for request in plan.preempted),
                finished=tuple(dict.fromkeys(ended)),  # an abort while the step runs is both
                num_copies=len(plan.copies),
                num_running=len(self.scheduler.running),
                num_waiting=len(self.scheduler.waiting),
                num_free_blocks=self.pool.num_free,
                **times,
            )
        )


def _parts(plan: StepPlan, tokens: list[list[int]]) -> tuple[RequestStep, ...]:
    """What each request does in the step, before it is committed."""
    accepted = {request: len(said) - 1 for request, said in zip(plan.samplers, tokens, strict=True)}
    return tuple(RequestStep.of(part, accepted.get(part.request, 0)) for part in plan.scheduled.values())
