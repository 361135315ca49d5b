"""Who computes how many tokens in the next step.

There is no prefill phase and no decode phase. Each sequence has `num_tokens` tokens, `num_computed` of them have their
KV in the cache, and a step moves the second number towards the first within a budget of tokens (vLLM v1's idea). A
sequence whose last token gets computed samples the next one. Everything else is order:

* `mixed`: sequences that are level (one token to go) first, then those that are behind, then new ones: chunks of
  prompts fill what the decodes leave of the budget, so nobody stalls.
* `prefill_first`: whoever is behind goes first, new ones join, and the others decode only in steps without either.
* `static`: as before, but nobody joins a batch that has begun to decode: it runs until its last sequence is done.

Blocks run out now and then. The youngest sequence then gives all of its blocks back and waits, keeping its tokens and
its random state, to be computed again later (preemption by recompute). Running and waiting sequences, one after the
other, are always sorted by arrival; so the oldest can push out all others and always gets on, nobody overtakes, and
nobody starves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

from minillm.cache.blocks import BlockPool, ensure
from minillm.config import EngineConfig
from minillm.engine.proposer import Draft
from minillm.engine.request import Request
from minillm.outputs import FinishReason


@dataclass(frozen=True)
class Scheduled:
    """One sequence's part in a step: its next `num_tokens` tokens, and who samples from the last of them.

    `samplers` is empty if the sequence stays behind (its last token is not computed in this step, so there is nothing
    to sample from), else the sequence itself and, when its prompt just got complete, the completions it spawns. Behind
    the last token there may be a draft, to be verified in the same step.
    """

    request: Request
    num_tokens: int
    copies: list[tuple[int, int]]
    samplers: list[Request]
    draft: Draft = field(default_factory=Draft)

    @property
    def q_len(self) -> int:
        """Tokens that the step computes: the sequence's own and those guessed."""
        return self.num_tokens + len(self.draft)

    @property
    def kv_len(self) -> int:
        """Keys that the last of them sees."""
        return self.request.num_computed + self.q_len


@dataclass
class StepPlan:
    """What one step will do, in the order in which it will be packed."""

    budget: int  # tokens that may still be added
    scheduled: dict[Request, Scheduled] = field(default_factory=dict)
    admitted: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)

    @property
    def samplers(self) -> list[Request]:
        """Everybody who gets a token, in order."""
        return [sampler for part in self.scheduled.values() for sampler in part.samplers]

    @property
    def copies(self) -> list[tuple[int, int]]:
        """Blocks to copy, (source, target), before anything is written."""
        return [copy for part in self.scheduled.values() for copy in part.copies]

    def add(self, sequence: Request, num_tokens: int, copies: list[tuple[int, int]]) -> None:
        """Spend budget on the next tokens of a sequence."""
        samplers = [sequence, *sequence.spawn()] if num_tokens == sequence.num_remaining else []
        self.scheduled[sequence] = Scheduled(sequence, num_tokens, copies, samplers)
        self.budget -= num_tokens

    def add_draft(self, sequence: Request, draft: Draft, copies: list[tuple[int, int]]) -> None:
        """Spend budget on guesses behind the tokens of a sequence that is in the plan."""
        part = self.scheduled[sequence]
        self.scheduled[sequence] = replace(part, draft=draft, copies=part.copies + copies)
        self.budget -= len(draft)


class Scheduler:
    """Holds every unfinished sequence, running (with blocks) or waiting (without).

    `schedule` and `commit` alternate. `eos_token_ids` end a sequence unless its parameters ignore them.
    """

    def __init__(self, config: EngineConfig, pool: BlockPool, eos_token_ids: tuple[int, ...] = ()) -> None:
        self.config = config
        self.pool = pool
        self.eos_token_ids = eos_token_ids
        self.running: list[Request] = []
        self.waiting: OrderedDict[tuple[int, int], Request] = OrderedDict()
        self._in_flight: StepPlan | None = None
        self._joinable = True  # only `static` ever closes its batch

    def add(self, sequence: Request) -> None:
        """Queue a new sequence behind all others. Its `order` must say so, too."""
        self.waiting[sequence.order] = sequence

    @property
    def num_unfinished(self) -> int:
        return len(self.running) + len(self.waiting)

    def schedule(self) -> StepPlan:
        """Plan the next step: somebody gets on whenever anybody is unfinished."""
        plan = StepPlan(self.config.max_num_batched_tokens)
        level = [sequence for sequence in self.running if sequence.num_remaining == 1]
        behind = [sequence for sequence in self.running if sequence.num_remaining > 1]
        self._joinable = self._joinable or not self.running
        if self.config.policy == "mixed":
            self._advance(plan, level)
        self._advance(plan, behind)
        self._admit(plan)
        if self.config.policy != "mixed" and not plan.scheduled:
            self._advance(plan, level)
            self._joinable = self.config.policy != "static"
        self._in_flight = plan
        return plan

    def _advance(self, plan: StepPlan, sequences: Iterable[Request]) -> None:
        """Give running sequences their next tokens, oldest first, pushing out the youngest where blocks are lacking."""
        for sequence in sequences:
            num_tokens = min(sequence.num_remaining, plan.budget)
            if num_tokens == 0:
                return
            while sequence not in plan.preempted:
                end = sequence.num_computed + num_tokens
                copies = self.pool.prepare(sequence.table, sequence.num_computed, end)
                if copies is not None:
                    plan.add(sequence, num_tokens, copies)
                    break
                self._preempt_youngest(plan)

    def _preempt_youngest(self, plan: StepPlan) -> None:
        """Move the youngest running sequence back to the head of the queue: it keeps its tokens, not its blocks.

        It is not in the plan yet: older ones come first, and those that are behind have all their blocks already.
        """
        victim = self.running.pop()
        plan.preempted.append(victim)
        self.pool.release(victim.table)
        victim.num_computed = 0
        victim.num_preemptions += 1
        self.waiting[victim.order] = victim
        self.waiting.move_to_end(victim.order, last=False)

    def _admit(self, plan: StepPlan) -> None:
        """Let waiting sequences join, strictly in order, while there is room. A step that preempts admits nobody."""
        while self.waiting and self._joinable and plan.budget and not plan.preempted:
            sequence = next(iter(self.waiting.values()))
            width = sum(running.width for running in self.running) + sequence.width
            if width > self.config.max_num_seqs or not self._start(plan, sequence):
                return
            del self.waiting[sequence.order]
            self.running.append(sequence)
            plan.admitted.append(sequence)

    def _start(self, plan: StepPlan, sequence: Request) -> bool:
        """Open a table with all blocks for the tokens that the sequence has, if there are enough.

        A block for each completion that runs or comes along must be left over: without this margin a sequence joins
        just to be preempted in the next step.
        """
        table, start = self.pool.open(sequence.tokens, sequence.salt)
        spare = len(self.running) + sequence.num_forks if self.running else 0
        copies = self.pool.prepare(table, start, sequence.num_tokens, spare=spare)
        if copies is None:
            self.pool.release(table)
            return False
        sequence.table, sequence.num_computed = table, start
        if sequence.num_preemptions == 0:
            sequence.num_cached = start
        plan.add(sequence, min(sequence.num_remaining, plan.budget), copies)
        return True

    def commit(self, plan: StepPlan, tokens: list[list[int]]) -> list[tuple[Request, list[int]]]:
        """Account for a step that was run; `tokens[i]` is what `plan.samplers[i]` drew: accepted drafts and one more.

        Returns who really got which tokens: a sequence that was finished from outside while its step ran gets none,
        and nobody gets more than fit behind its stop token or its max_tokens. The blocks of finished sequences are
        freed here, when no step uses them any more.
        """
        self._in_flight = None
        for part in plan.scheduled.values():
            self._commit(part)
        drawn = [pair for pair in zip(plan.samplers, tokens, strict=True) if not pair[0].finished]
        taken = [(sequence, self._take(sequence, plan.scheduled.get(sequence), said)) for sequence, said in drawn]
        for sequence in [sequence for sequence in self.running if sequence.finished]:
            self._retire(sequence)
        return taken

    def _take(self, sequence: Request, part: Scheduled | None, said: list[int]) -> list[int]:
        """Hand over what a sequence drew. All but the last are drafts that were computed in this step already.

        What was computed for rejected drafts needs no cleaning up: it lies behind `num_computed`, in blocks without a
        name, and is overwritten.
        """
        taken = sequence.extend(said, self.eos_token_ids)
        self._computed(sequence, len(taken) - 1)
        if part and part.draft and self.config.adaptive_drafts:
            sequence.adapt_drafts(len(part.draft), len(said) - 1)
        return taken

    def _computed(self, sequence: Request, num_tokens: int) -> None:
        """Count tokens as computed, and make the blocks that are full now known."""
        sequence.num_computed += num_tokens
        sequence.num_written = max(sequence.num_written, sequence.num_computed)
        self.pool.commit(sequence.table, sequence.tokens, sequence.num_computed)

    def _commit(self, part: Scheduled) -> None:
        """Count a sequence's own tokens as computed, and let spawned completions share its blocks."""
        sequence = part.request
        self._computed(sequence, part.num_tokens)
        for fork in part.samplers[1:]:
            fork.table = self.pool.fork(sequence.table)
            fork.num_computed = fork.num_written = sequence.num_computed
            fork.finish_reason = sequence.finish_reason
            self.running.insert(self.running.index(sequence) + fork.index, fork)
            sequence.num_forks = 0

    def abandon(self, plan: StepPlan) -> None:
        """Take back a step that never came to its end (an error, Ctrl-C): everybody starts over, nobody is lost.

        A random stream that the step had drawn from already goes on behind that draw.
        """
        self._in_flight = None
        while self.running:
            self._preempt_youngest(plan)
        for sequence in [sequence for sequence in self if sequence.finished]:
            self._retire(sequence)

    def finish(self, sequence: Request, reason: FinishReason, stop_reason: str | None = None) -> None:
        """End a sequence from outside, at any moment. Its blocks are freed at once, or when its step comes back."""
        if sequence.finished:
            return
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        if self._in_flight is None or sequence not in self._in_flight.scheduled:
            self._retire(sequence)

    def _retire(self, sequence: Request) -> None:
        if self.waiting.pop(sequence.order, None) is None:
            self.running.remove(sequence)
        self.pool.release(sequence.table)

    def __iter__(self) -> Iterator[Request]:
        """All unfinished sequences, oldest first."""
        yield from self.running
        yield from self.waiting.values()

    def check(self) -> None:
        """Recompute every invariant; raises `AssertionError` naming the broken one."""
        self.pool.check(sequence.table for sequence in self)
        ensure(all(a.order < b.order for a, b in pairwise(self)), "sequences are sorted by arrival")
        ensure(sum(s.width for s in self.running) <= self.config.max_num_seqs, "at most max_num_seqs run")
        for sequence in self.waiting.values():
            ensure(
                not sequence.table.blocks and sequence.num_computed == 0, f"{sequence.order} waits and holds no blocks"
            )
        for sequence in self.running:
            held = len(sequence.table.blocks) * self.pool.block_size
            ensure(sequence.num_computed <= held, f"{sequence.order} has blocks for what it has computed")
        if self._in_flight is None:
            for sequence in self:
                ensure(
                    not sequence.finished and sequence.num_remaining > 0, f"{sequence.order} has something to compute"
                )
        else:
            self._check_plan(self._in_flight)

    def _check_plan(self, plan: StepPlan) -> None:
        """The plan keeps to its budget and writes only blocks that one table owns and the cache does not know."""
        num_tokens = sum(part.q_len for part in plan.scheduled.values())
        ensure(num_tokens + plan.budget == self.config.max_num_batched_tokens, "the budget adds up")
        ensure(plan.budget >= 0 and bool(plan.scheduled or not self.num_unfinished), "somebody gets on")
        ensure(not any(sequence in plan.scheduled for sequence in plan.preempted), "the preempted are not scheduled")
        for sequence, part in plan.scheduled.items():
            end = sequence.num_computed + part.num_tokens
            ensure(part.num_tokens > 0 and end <= sequence.num_tokens, f"{sequence.order} computes tokens that it has")
            ensure(not part.draft or part.samplers == [sequence], f"{sequence.order} alone goes on from its draft")
            first, last = sequence.num_computed // self.pool.block_size, self.pool.blocks_for(part.kv_len)
            for block in (self.pool.blocks[index] for index in sequence.table.blocks[first:last]):
                ensure(block.ref_count == 1 and block.prefix is None, f"{block.id} is written by one owner, unnamed")
