"""What really happened, step by step: the one record that figures, benchmarks, claims and tests read."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from minillm.engine.scheduler import Scheduled


@dataclass(frozen=True)
class RequestStep:
    """One request's part in a step, as it stood before the step ran.

    `blocks` are those at the places `first_block`, `first_block` + 1, … of its table that the step found there or wrote
    to: a decode names one block, an admission the whole table. So a record does not grow with the context, and
    tables follow from the records since the admission (`minillm.measure.snapshot`).
    """

    request_id: str
    index: int
    num_prompt: int
    num_computed: int  # tokens in the cache before
    num_scheduled: int  # tokens computed now: the query length
    num_recomputed: int  # of these, how many had been computed before a preemption threw them away
    num_samples: int  # completions that draw a token: 0 while it stays behind
    num_drafts: int  # tokens that were guessed after its last one and verified: part of num_scheduled
    num_accepted: int  # of these, how many the model agreed with; it then adds one of its own
    first_block: int
    blocks: tuple[int, ...]

    @property
    def kv_len(self) -> int:
        """Keys that its last query sees."""
        return self.num_computed + self.num_scheduled

    @property
    def phase(self) -> str:
        """A name for display, derived from what happened; the engine never asks."""
        if self.num_recomputed:
            return "recompute"
        if self.num_computed < self.num_prompt:
            return "prefill"
        return "verify" if self.num_drafts else "decode"

    @classmethod
    def of(cls, part: Scheduled, num_accepted: int) -> RequestStep:
        request = part.request
        again = min(request.num_written, request.num_computed + part.num_tokens) - request.num_computed
        return cls(
            request_id=request.request_id,
            index=request.index,
            num_prompt=request.num_prompt,
            num_computed=request.num_computed,
            num_scheduled=part.q_len,
            num_recomputed=max(0, again),
            num_samples=len(part.samplers),
            num_drafts=len(part.draft),
            num_accepted=num_accepted,
            first_block=part.num_known,
            blocks=tuple(request.table.blocks[part.num_known :]),
        )


@dataclass(frozen=True)
class StepRecord:
    """One step: who took part, what the pool looked like, where the time went (seconds, one monotonic clock)."""

    step: int
    start: float
    schedule_time: float
    propose_time: float  # guessing; 0 without a proposer
    pack_time: float
    run_time: float  # model and sampling, until the tokens are on the host
    commit_time: float
    requests: tuple[RequestStep, ...]
    admitted: tuple[str, ...]
    preempted: tuple[str, ...]
    finished: tuple[tuple[str, int], ...]  # (request, completion): those that ended since the record before
    num_copies: int
    num_running: int
    num_waiting: int
    num_free_blocks: int

    @property
    def num_tokens(self) -> int:
        """Tokens computed: the rows of every matrix product of the step."""
        return sum(part.num_scheduled for part in self.requests)

    @property
    def shape(self) -> list[tuple[int, int]]:
        """(q_len, kv_len) of each request: what `minillm.costs` puts a price on."""
        return [(part.num_scheduled, part.kv_len) for part in self.requests]

    @property
    def num_bytes(self) -> int:
        """What keeping this record takes at most, about: 600 bytes, and for each request 400 and 40 a block."""
        return 600 + sum(400 + 40 * len(part.blocks) for part in self.requests)


class Trace(deque[StepRecord]):
    """The latest step records, oldest first: as many as `max_bytes` hold."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self.max_bytes = max_bytes
        self._num_bytes = 0

    def append(self, record: StepRecord) -> None:
        """Add a record, and drop the oldest ones that there is no room for any more; the latest always stays."""
        super().append(record)
        self._num_bytes += record.num_bytes
        while len(self) > 1 and self._num_bytes > self.max_bytes:
            self._num_bytes -= self.popleft().num_bytes

    def clear(self) -> None:
        """Drop all records."""
        super().clear()
        self._num_bytes = 0
