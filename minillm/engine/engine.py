"""The engine: requests in, tokens out, one step at a time.

    engine = Engine(model, EngineConfig(policy="mixed"))
    request_id = engine.add(prompt_token_ids, SamplingParams(max_tokens=64))
    while engine.has_unfinished:
        for event in engine.step():
            event.request.request_id, event.request.index    # which completion of which request
            event.token_ids, event.logprobs                    # its new tokens (one, or several with a proposer)
            event.time, event.finish_reason                    # when they were on the host; why it ended, if it did

The engine knows token ids and no text. Whoever does (`minillm.llm`) may end a completion early, for instance at a stop
string, with `finish(request_id, index, "stop", stop_reason=...)`. Everything about a completion can be read from
`event.request`: `arrival_time`, `first_scheduled_time`, `num_cached`, `num_preemptions`. All times are
`time.perf_counter` seconds.

Several engines live in one process without knowing of each other: nothing is global.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

from minillm.cache.blocks import BlockPool
from minillm.config import EngineConfig, check_prompt
from minillm.engine.batch import Batch
from minillm.engine.proposer import Proposer
from minillm.engine.request import Request
from minillm.engine.runner import Drawn, ModelRunner
from minillm.engine.scheduler import Scheduler, StepPlan
from minillm.engine.speculation import add_drafts
from minillm.engine.trace import RequestStep, StepRecord, Trace
from minillm.errors import RequestError
from minillm.model.decoder import Decoder
from minillm.outputs import FinishReason, Logprob
from minillm.sampling import SamplingParams


@dataclass(frozen=True)
class TokenEvent:
    """New tokens of one completion: what a step brought it."""

    request: Request  # to be read, not changed
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None  # one entry per token, if its parameters ask for them
    time: float
    finish_reason: FinishReason | None  # "stop" or "length" if these tokens are its last


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
        self.trace = Trace(maxlen=self.config.trace_steps)
        self._live: dict[str, list[Request]] = {}  # unfinished completions by request
        self._num_added = 0
        self._steps = count()

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.num_unfinished > 0

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        salt: Hashable = None,
        arrival_time: float | None = None,
        num_speculative_tokens: int | None = None,
    ) -> str:
        """Queue a request and return its id. Requests with different `salt` never share KV.

        `num_speculative_tokens` overrides the engine's setting for this request; 0: guess nothing.

        Raises `RequestError` at once for a request that could never be served: see `_refuse`. Others are not affected.
        """
        params = params or SamplingParams()
        arrival = self._num_added
        request_id = str(arrival) if request_id is None else request_id
        self._refuse(prompt, params, request_id)
        self._num_added += 1
        drafts = self.config.num_speculative_tokens if num_speculative_tokens is None else num_speculative_tokens
        sequence = Request(
            request_id=request_id,
            order=(arrival, 0),
            tokens=list(prompt),
            num_prompt=len(prompt),
            params=params,
            seed=self.config.seed + arrival,
            arrival_time=time.perf_counter() if arrival_time is None else arrival_time,
            salt=salt,
            num_forks=params.n - 1,
            max_drafts=drafts,
            num_drafts=drafts,
        )
        self._live[request_id] = [sequence]
        self.scheduler.add(sequence)
        return request_id

    def _refuse(self, prompt: Sequence[int], params: SamplingParams, request_id: str) -> None:
        """Raise `RequestError` for a prompt the model cannot read or a request that no empty engine could hold.

        What must fit is everything but the last token: that one is handed out and never computed.
        """
        check_prompt(prompt, self.model.config)
        positions = self.model.config.max_position_embeddings
        needed = len(prompt) + params.max_tokens - 1
        room = self.pool.num_usable * self.pool.block_size
        if needed > positions:
            raise RequestError(
                f"A prompt of {len(prompt)} tokens and max_tokens={params.max_tokens} need {needed} positions; the "
                f"model has {positions}. Shorten the prompt or lower max_tokens."
            )
        if needed > room:
            raise RequestError(
                f"A prompt of {len(prompt)} tokens and max_tokens={params.max_tokens} fill {needed} tokens of cache; "
                f"it has {room}. Shorten the prompt, lower max_tokens, or raise num_blocks or cache_bytes."
            )
        if params.n > self.config.max_num_seqs:
            raise RequestError(
                f"n={params.n} completions at once, but at most max_num_seqs={self.config.max_num_seqs} sequences run. "
                "Lower n or raise max_num_seqs."
            )
        if request_id in self._live:
            raise RequestError(f"request_id={request_id!r} is still being served. Choose another, or leave it out.")

    def step(self) -> list[TokenEvent]:
        """Run one step and return what it brought to whom; nothing if nobody waits.

        If the step fails or is interrupted, its sequences go back to the queue and the error goes on to the caller:
        the next call starts them over.
        """
        if not self.has_unfinished:
            return []
        clock = [time.perf_counter()]
        plan = self.scheduler.schedule()
        clock.append(time.perf_counter())
        try:
            if self.proposer:
                add_drafts(plan, self.proposer, self.pool, self.scheduler.running)
            clock.append(time.perf_counter() if self.proposer else clock[-1])
            self._check()
            batch = Batch.pack(plan, self.pool.block_size, self.model.device)
            clock.append(time.perf_counter())
            drawn = self.runner.run(batch)
        except BaseException:
            self.scheduler.abandon(plan)
            raise
        clock.append(time.perf_counter())
        accepted = {sequence: len(said) - 1 for sequence, said in zip(plan.samplers, drawn.tokens, strict=True)}
        sequences = tuple(RequestStep.of(part, accepted.get(part.request, 0)) for part in plan.scheduled.values())
        events = self._commit(plan, drawn, clock)
        clock.append(time.perf_counter())
        self.trace.append(self._record(plan, sequences, clock))
        self._check()
        return events

    def _check(self) -> None:
        if self.config.debug:
            self.scheduler.check()

    def _commit(self, plan: StepPlan, drawn: Drawn, clock: list[float]) -> list[TokenEvent]:
        """Hand the drawn tokens to their sequences and tell who got one."""
        for sequence in [*plan.scheduled, *plan.samplers]:
            sequence.first_scheduled_time = sequence.first_scheduled_time or clock[0]
        logprobs = dict(zip(plan.samplers, drawn.logprobs, strict=True))
        events = []
        for sequence, tokens in self.scheduler.commit(plan, drawn.tokens):
            if sequence not in plan.scheduled:  # it was spawned in this step
                self._live.setdefault(sequence.request_id, []).append(sequence)
            extra = logprobs[sequence]
            extra = None if extra is None else extra[: len(tokens)]
            events.append(TokenEvent(sequence, tokens, extra, clock[-1], sequence.finish_reason))
            self._forget_if_finished(sequence)
        return events

    def finish(
        self, request_id: str, index: int, reason: FinishReason = "stop", stop_reason: str | None = None
    ) -> None:
        """End one completion from outside, for instance because its text contains a stop string.

        A completion that has ended already is left as it is.
        """
        for sequence in [s for s in self._live.get(request_id, []) if s.index == index]:
            self.scheduler.finish(sequence, reason, stop_reason)
            self._forget_if_finished(sequence)

    def abort(self, request_id: str) -> None:
        """End all completions of a request, at any moment, and free what they hold. Unknown or ended: nothing to do."""
        for sequence in list(self._live.get(request_id, [])):
            self.finish(request_id, sequence.index, "abort")

    def _forget_if_finished(self, sequence: Request) -> None:
        if sequence.finished:
            if self.proposer:
                self.proposer.forget(sequence)
            completions = self._live[sequence.request_id]
            completions.remove(sequence)
            if not completions:
                del self._live[sequence.request_id]

    def _record(self, plan: StepPlan, sequences: tuple[RequestStep, ...], clock: list[float]) -> StepRecord:
        """Write down the step. `clock` holds its start and the ends of schedule, propose, pack, run and commit."""
        schedule_time, propose_time, pack_time, run_time, commit_time = (b - a for a, b in pairwise(clock))
        cache = self.runner.cache
        return StepRecord(
            step=next(self._steps),
            start=clock[0],
            schedule_time=schedule_time,
            propose_time=propose_time,
            pack_time=pack_time,
            run_time=run_time,
            commit_time=commit_time,
            sequences=sequences,
            admitted=tuple(sequence.request_id for sequence in plan.admitted),
            preempted=tuple(sequence.request_id for sequence in plan.preempted),
            num_copies=len(plan.copies),
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_free_blocks=self.pool.num_free,
            num_cached_blocks=self.pool.num_cached,
            kv_bytes_written=cache.bytes_per_token * sum(part.num_scheduled for part in sequences),
            kv_bytes_read=sum(cache.bytes_read(part.num_scheduled, part.kv_len) for part in sequences),
        )
