"""`minillm bench serve`: a load on an engine, and how long each of its requests took.

One process and one thread: between two steps the client sends the requests that are due. The clock of a request starts
when it is *due*, not when the client had time to send it: counting from the sending would hide the queue in front of an
overloaded engine (coordinated omission).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from minillm.engine.engine import Engine, TokenEvent
from minillm.engine.trace import StepRecord
from minillm.errors import ConfigError, RequestError
from minillm.measure.workloads import SampleRequest
from minillm.outputs import RequestMetrics


@dataclass
class Served:
    """One request of a load and what became of it. Times are `time.perf_counter` seconds."""

    request: SampleRequest
    due: float  # when the load wanted it to start
    metrics: RequestMetrics  # `arrival_time` is when it started: `due`, or later if `max_concurrency` held it back
    num_cached: int = 0  # prompt tokens that the prefix cache saved
    num_preemptions: int = 0
    error: str = ""  # why the engine refused it

    @property
    def token_times(self) -> list[float]:
        return self.metrics.token_times[0]

    @property
    def completed(self) -> bool:
        return len(self.token_times) == self.request.max_tokens


class StepCost(NamedTuple):
    """Where the wall time of one step went, seconds, and what the step was."""

    wall: float
    schedule: float
    pack: float
    run: float  # the model and sampling
    commit: float
    num_sequences: int
    num_decodes: int  # requests that continued after their prompt, guesses included
    num_tokens: int
    num_recomputed: int

    @classmethod
    def of(cls, record: StepRecord, wall: float) -> StepCost:
        return cls(
            wall,
            record.schedule_time,
            record.pack_time,
            record.run_time,
            record.commit_time,
            len(record.requests),
            sum(part.phase in ("decode", "verify") for part in record.requests),
            record.num_tokens,
            sum(part.num_recomputed for part in record.requests),
        )

    @property
    def overhead(self) -> float:
        """Share of the wall time that was not the model: scheduling, packing, committing, keeping records."""
        return 1 - self.run / self.wall


@dataclass
class ServeRun:
    """A load that has been served."""

    served: list[Served]  # in the order of the requests
    start: float
    end: float
    steps: list[StepCost] = field(default_factory=list)

    @property
    def duration(self) -> float:
        """Seconds from the start of the load to its last token."""
        return self.end - self.start


class Client:
    """Sends requests to an engine when they are due, and notes when their tokens come.

    A slot is the right to have a request in the engine; `slots` holds the time since when each slot has been free.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[SampleRequest],
        due: Sequence[float],
        slots: int,
        cache_salt: str | None,
    ) -> None:
        start = time.perf_counter()
        times = [start + seconds for seconds in due]
        served = [Served(r, time, RequestMetrics(time, [[]])) for r, time in zip(requests, times, strict=True)]
        self.engine, self.cache_salt = engine, cache_salt
        self.run = ServeRun(served, start, start)
        self.queue = deque(sorted(served, key=lambda one: one.due))
        self.live: dict[str, Served] = {}
        self.slots = deque([start] * slots)

    def send_due(self) -> None:
        """Hand over every request whose time has come and for which there is a slot."""
        now = time.perf_counter()
        while self.queue and self.slots and self.queue[0].due <= now:
            self._send(self.queue.popleft())

    def _send(self, served: Served) -> None:
        prompt, params = served.request.prompt, served.request.params
        served.metrics.arrival_time = max(served.due, self.slots[0])
        try:
            request_id = self.engine.add(prompt, params, cache_salt=self.cache_salt)
        except RequestError as error:
            served.error = str(error)
        else:
            self.live[request_id] = served
            self.slots.popleft()

    def wait(self) -> None:
        """Sleep until the next request is due: nobody has anything to do."""
        time.sleep(max(0.0, self.queue[0].due - time.perf_counter()))

    def step(self) -> None:
        """One step of the engine, its cost, and its tokens."""
        start = time.perf_counter()
        events = self.engine.step()
        self.run.end = time.perf_counter()
        if not self.engine.trace:
            raise ConfigError(f"trace_bytes={self.engine.trace.max_bytes} hold no record of this step. Choose more.")
        self.run.steps.append(StepCost.of(self.engine.trace[-1], self.run.end - start))
        for event in events:
            self._take(event)

    def _take(self, event: TokenEvent) -> None:
        served = self.live[event.request.request_id]
        served.token_times.extend([event.time] * len(event.token_ids))
        if event.finish_reason is None:
            return
        served.metrics.first_scheduled_time = event.request.first_scheduled_time
        served.num_cached = event.request.num_cached
        served.num_preemptions = event.request.num_preemptions
        del self.live[event.request.request_id]
        self.slots.append(event.time)


def serve(
    engine: Engine,
    requests: Sequence[SampleRequest],
    due: Sequence[float] | None = None,
    *,
    max_concurrency: int | None = None,
    cache_salt: str | None = None,
    progress: Callable[[int], object] = lambda finished: None,
) -> ServeRun:
    """Serve a load to its end. `due`: seconds after the start at which each request comes; None is all at once.

    max_concurrency: how many are in the engine at most. The next one starts when it is due *and* another has ended (a
    closed loop, if all are due at once). A request that the engine refuses is noted as failed. Loads with different
    `cache_salt` share no KV: repeat a load with another one, or the prefix cache answers it. `progress` is called after
    each step with the number of requests that are finished.
    Raises `ConfigError` if the two lists differ in length, `max_concurrency` is below 1, or the engine's trace does not
    hold one step.
    """
    due = [0.0] * len(requests) if due is None else due
    if len(requests) != len(due):
        raise ConfigError(f"{len(requests)} requests, but {len(due)} times. Give one time for each request.")
    if max_concurrency is not None and max_concurrency < 1:
        raise ConfigError(f"max_concurrency={max_concurrency}: at least 1, or None for no limit.")
    client = Client(engine, requests, due, max_concurrency or len(requests), cache_salt)
    while client.queue or client.live:
        client.send_due()
        if client.live:
            client.step()
        elif client.queue:
            client.wait()
        progress(len(requests) - len(client.queue) - len(client.live))
    return client.run


def warm_up(engine: Engine, requests: Sequence[SampleRequest], count: int = 2) -> None:
    """Serve short beginnings of the first requests, because first calls compile, capture and allocate.

    No later request can reuse their KV: they have a `cache_salt` of their own.
    """
    for request in requests[:count]:
        engine.add(request.prompt[:64], SampleRequest([], min(8, request.max_tokens)).params, cache_salt="warm-up")
    for _ in engine.run():
        pass
    engine.trace.clear()
