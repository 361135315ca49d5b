"""Who computes how many tokens in the next step.

There is no prefill phase and no decode phase. Each request has `num_tokens` tokens, `num_computed` of them have their
KV in the cache, and a step moves the second number towards the first within a budget of tokens (vLLM v1's idea). A
request whose last token gets computed samples the next one. Everything else is order:

* `mixed`: requests that are level (one token to go) first, then those that are behind, then new ones: chunks of
  prompts fill what the decodes leave of the budget, so no decode stalls.
* `prefill_first`: requests that are behind go first, new ones join, and the others decode only in steps without either.
* `static`: as before, but no request joins a batch that has begun to decode: it runs until its last request is done.

Blocks run out now and then. The youngest request is then preempted: it gives all of its blocks back and waits, keeping
its tokens, to be computed again later. Running and waiting requests, one after the other, are always sorted by arrival;
so the oldest can preempt all others and always advances, nobody overtakes, and nobody starves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from minillm.cache.blocks import BlockPool, ensure
from minillm.config import EngineConfig
from minillm.engine.request import Request
from minillm.engine.verify import Draft


@dataclass
class Scheduled:
    """One request's part in a step: its next `num_tokens` tokens, and who samples from the last of them.

    `samplers` is empty if the request stays behind (its last token is not computed in this step, so there is nothing
    to sample from), else the request itself and, when its prompt just got complete, the completions it spawns. After
    the last token there may be a draft, to be verified in the same step. `num_known`: blocks at the beginning of its
    table that the step found there and does not write to.
    """

    request: Request
    num_tokens: int
    copies: list[tuple[int, int]]
    samplers: list[Request]
    num_known: int
    draft: Draft = field(default_factory=Draft)

    @property
    def q_len(self) -> int:
        """Tokens that the step computes: the request's own and those guessed."""
        return self.num_tokens + len(self.draft)

    @property
    def kv_len(self) -> int:
        """Keys that the last of them sees."""
        return self.request.num_computed + self.q_len

    @property
    def prompt_rows(self) -> range:
        """Positions of the chunk after which a prompt token's log-probability is asked for and not known yet."""
        request, start = self.request, self.request.num_computed
        if request.params.prompt_logprobs is None:
            return range(0)
        return range(max(start, len(request.prompt_logprobs)), min(start + self.num_tokens, request.num_prompt - 1))


@dataclass
class StepPlan:
    """What one step will do, in the order in which it will be packed."""

    budget: int  # tokens that may still be added
    scheduled: dict[Request, Scheduled] = field(default_factory=dict)
    admitted: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)

    @property
    def samplers(self) -> list[Request]:
        """Every request that gets a token, in order."""
        return [sampler for part in self.scheduled.values() for sampler in part.samplers]

    @property
    def drafts(self) -> list[Draft]:
        """What was guessed for each of the samplers."""
        return [part.draft for part in self.scheduled.values() for _ in part.samplers]

    @property
    def copies(self) -> list[tuple[int, int]]:
        """Blocks to copy, (source, target), before anything is written."""
        return [copy for part in self.scheduled.values() for copy in part.copies]

    def add(self, request: Request, num_tokens: int, copies: list[tuple[int, int]], num_known: int) -> None:
        """Spend budget on the next tokens of a request."""
        samplers = [request, *request.spawn()] if num_tokens == request.num_remaining else []
        self.scheduled[request] = Scheduled(request, num_tokens, copies, samplers, num_known)
        self.budget -= num_tokens


class Scheduler:
    """Holds every unfinished request, running (with blocks) or waiting (without).

    `schedule` and `commit` alternate. `end_ids` end a request unless its parameters ignore them.
    """

    def __init__(self, config: EngineConfig, pool: BlockPool, end_ids: tuple[int, ...] = ()) -> None:
        self.config = config
        self.pool = pool
        self.end_ids = end_ids
        self.reset(())

    def reset(self, requests: Iterable[Request]) -> None:
        """Start from these requests alone, oldest first, all of them waiting; no block is held or remembered."""
        self.pool.reset()
        self.running: list[Request] = []
        self.waiting: OrderedDict[tuple[int, int], Request] = OrderedDict()
        self._in_flight: StepPlan | None = None
        self._joinable = True  # only `static` ever closes its batch
        for request in requests:
            request.start_over()
            self.add(request)

    def add(self, request: Request) -> None:
        """Queue a new request after all others. Its `order` must say so, too."""
        self.waiting[request.order] = request

    def schedule(self) -> StepPlan:
        """Plan the next step. Where there are unfinished requests, at least one of them advances."""
        plan = self._in_flight = StepPlan(self.config.max_num_batched_tokens)
        level = [request for request in self.running if request.num_remaining == 1]
        behind = [request for request in self.running if request.num_remaining > 1]
        self._joinable = self._joinable or not self.running
        if self.config.policy == "mixed":
            self._advance(plan, level)
        self._advance(plan, behind)
        self._admit(plan)
        if self.config.policy != "mixed" and not plan.scheduled:
            self._advance(plan, level)
            self._joinable = self.config.policy != "static"
        return plan

    def _advance(self, plan: StepPlan, requests: Iterable[Request]) -> None:
        """Give running requests their next tokens, oldest first, preempting the youngest where blocks are lacking."""
        for request in requests:
            num_tokens = min(request.num_remaining, plan.budget)
            if num_tokens == 0:
                return
            while request not in plan.preempted:
                start = request.num_computed
                copies = self.pool.prepare(request.table, start, start + num_tokens)
                if copies is not None:
                    plan.add(request, num_tokens, copies, start // self.pool.block_size)
                    break
                self._preempt_youngest(plan)

    def _preempt_youngest(self, plan: StepPlan) -> None:
        """Move the youngest running request back to the head of the queue: it keeps its tokens, not its blocks.

        It is not in the plan yet: older ones come first, and those that are behind have all their blocks already.
        """
        victim = self.running.pop()
        plan.preempted.append(victim)
        self.pool.release(victim.table)
        victim.start_over()
        victim.num_preemptions += 1
        self.waiting[victim.order] = victim
        self.waiting.move_to_end(victim.order, last=False)

    def _admit(self, plan: StepPlan) -> None:
        """Let waiting requests join, strictly in order, while there is room. A step that preempts admits none."""
        while self.waiting and self._joinable and plan.budget and not plan.preempted:
            request = next(iter(self.waiting.values()))
            width = sum(1 + one.num_forks for one in [*self.running, request])
            if width > self.config.max_num_seqs or not self._start(plan, request):
                return
            del self.waiting[request.order]
            self.running.append(request)
            plan.admitted.append(request)

    def _start(self, plan: StepPlan, request: Request) -> bool:
        """Open a table with all blocks for the tokens that the request has, if there are enough.

        A block for each completion that runs or comes along must be left over: without this margin a request joins
        just to be preempted in the next step. One that wants its prompt's log-probabilities computes all of it.
        """
        if request.params.prompt_logprobs is None:
            request.hits = self.pool.lookup(request.tokens, request.cache_salt, request.hits)
        spare = len(self.running) + request.num_forks if self.running else 0
        if not self.pool.fits(request.hits, request.num_tokens, spare):
            return False
        request.table, request.num_computed = self.pool.open(request.tokens, request.hits, request.cache_salt)
        if request.num_preemptions == 0:
            request.num_cached = request.num_computed
        copies = self.pool.prepare(request.table, request.num_computed, request.num_tokens) or []
        plan.add(request, min(request.num_remaining, plan.budget), copies, 0)
        return True

    def draft_room(self, plan: StepPlan) -> dict[Request, int]:
        """How many tokens may be guessed for whom; requests without room are left out.

        Drafts take what all others leave, oldest first: budget that the step does not need, and blocks beyond one for
        each running completion, so that none is preempted for a guess. A request without a first token gets none, and
        none gets more than can be useful: a step brings one token more than it accepts, and max_tokens is the end.
        """
        room: dict[Request, int] = {}
        budget, size = plan.budget, self.pool.block_size
        spare = max(0, self.pool.num_free - sum(1 + request.num_forks for request in self.running))
        for request, part in plan.scheduled.items():
            held = len(request.table.blocks) * size - part.kv_len
            useful = min(request.num_drafts, request.params.max_tokens - request.num_generated - 1)
            count = min(useful, budget, held + spare * size)
            if part.samplers and request.num_generated > 0 and count > 0:
                room[request] = count
                budget -= count
                spare -= self.pool.blocks_for(max(0, count - held))
        return room

    def add_drafts(self, plan: StepPlan, drafts: Mapping[Request, Draft]) -> None:
        """Put the guesses into the plan, where there are blocks for them."""
        for request, draft in drafts.items():
            part = plan.scheduled[request]
            copies = self.pool.prepare(request.table, part.kv_len, part.kv_len + len(draft))
            if draft and copies is not None:
                part.draft = draft
                part.copies += copies
                plan.budget -= len(draft)

    def commit(self, plan: StepPlan, tokens: list[list[int]]) -> list[tuple[Request, list[int]]]:
        """Account for a step that was run; `tokens[i]` is what `plan.samplers[i]` drew: accepted drafts and one more.

        Returns who really got which tokens: a request that was finished from outside while its step ran gets none,
        and none gets more than fit up to its stop token or its max_tokens. The blocks of finished requests are freed
        here, when no step uses them any more.
        """
        self._in_flight = None
        for part in plan.scheduled.values():
            self._computed(part.request, part.num_tokens)
            self._fork(part)
        drawn = [pair for pair in zip(plan.samplers, tokens, strict=True) if not pair[0].finished]
        taken = [(request, self._take(request, plan.scheduled.get(request), said)) for request, said in drawn]
        for request in [request for request in self.running if request.finished]:
            self._retire(request)
        return taken

    def _take(self, request: Request, part: Scheduled | None, said: list[int]) -> list[int]:
        """Hand over what a request drew. All but the last are drafts that were computed in this step already.

        What was computed for rejected drafts needs no cleaning up: it lies after `num_computed`, in blocks without a
        name, and is overwritten.
        """
        taken = request.extend(said, self.end_ids)
        self._computed(request, max(0, len(taken) - 1))
        if part and part.draft and self.config.adaptive_drafts:
            request.adapt_drafts(len(part.draft), len(said) - 1)
        return taken

    def _computed(self, request: Request, num_tokens: int) -> None:
        """Count tokens as computed, and make the blocks that are full now known."""
        request.num_computed += num_tokens
        request.num_written = max(request.num_written, request.num_computed)
        self.pool.commit(request.table, request.tokens, request.num_computed)

    def _fork(self, part: Scheduled) -> None:
        """Let spawned completions share the blocks of their prompt and run right after their first."""
        request, forks = part.request, part.samplers[1:]
        for fork in forks:
            fork.table = self.pool.fork(request.table)
            fork.num_computed = fork.num_written = request.num_computed
            fork.finish_reason = fork.finish_reason or request.finish_reason
        if forks:
            place = self.running.index(request) + 1
            self.running[place:place] = forks

    def finish(self, request: Request) -> None:
        """Let go of a request that has its `finish_reason`: at once, or when its step comes back."""
        if self._in_flight is None or request not in self._in_flight.scheduled:
            self._retire(request)

    def _retire(self, request: Request) -> None:
        if self.waiting.pop(request.order, None) is None:
            self.running.remove(request)
        self.pool.release(request.table)

    def __iter__(self) -> Iterator[Request]:
        """All unfinished requests, oldest first."""
        yield from self.running
        yield from self.waiting.values()

    def check(self) -> None:
        """Recompute every invariant; raises `AssertionError` naming the broken one."""
        self.pool.check(request.table for request in self)
        ensure(all(a.order < b.order for a, b in pairwise(self)), "requests are sorted by arrival")
        ensure(sum(1 + r.num_forks for r in self.running) <= self.config.max_num_seqs, "at most max_num_seqs run")
        for request in self.waiting.values():
            ensure(not request.table.blocks and request.num_computed == 0, f"{request.order} waits and holds no blocks")
        for request in self.running:
            table, num_full = request.table, request.num_computed // self.pool.block_size
            needed = self.pool.blocks_for(request.num_computed)
            ensure(needed <= len(table.blocks), f"{request.order} has blocks for what it has computed")
            ensure(table.num_hashed <= num_full, f"{request.order} names only blocks that it has computed")
        if self._in_flight is not None:
            self._check_plan(self._in_flight)
        else:
            ensure(all(not r.finished and r.num_remaining > 0 for r in self), "every request has something to compute")

    def _check_plan(self, plan: StepPlan) -> None:
        """The plan keeps to its budget and writes only blocks that one table owns and the cache does not know."""
        num_tokens = sum(part.q_len for part in plan.scheduled.values())
        ensure(num_tokens + plan.budget == self.config.max_num_batched_tokens, "the budget adds up")
        ensure(plan.budget >= 0 and bool(plan.scheduled or not any(self)), "at least one request advances")
        ensure(not any(request in plan.scheduled for request in plan.preempted), "the preempted are not scheduled")
        for request, part in plan.scheduled.items():
            ensure(0 < part.num_tokens <= request.num_remaining, f"{request.order} computes tokens that it has")
            ensure(not part.draft or part.samplers == [request], f"{request.order} alone goes on from its draft")
            first, end = request.num_computed // self.pool.block_size, self.pool.blocks_for(part.kv_len)
            ensure(end <= len(request.table.blocks), f"{request.order} has blocks for what it computes")
            for block in (self.pool.blocks[index] for index in request.table.blocks[first:end]):
                ensure(block.ref_count == 1 and block.prefix is None, f"{block.id} is written by one owner, unnamed")
