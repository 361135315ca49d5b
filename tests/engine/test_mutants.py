"""Wrong engines that the fuzz must tell from the right one: each carries a bug that a serving engine has had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.cache.blocks import BlockPool, BlockTable, Prefix
from minillm.cache.paged import PagedCache
from minillm.config import POLICIES
from minillm.engine import sampler
from minillm.engine.batch import Batch
from minillm.engine.engine import Engine
from minillm.engine.request import Request
from minillm.engine.sampler import Row
from minillm.engine.scheduler import Scheduled, Scheduler, StepPlan
from tests.engine import scripted, test_fuzz
from tests.engine.workloads import compare, play, random_workload

NUM_SEEDS = 150


def _always_samples(
    self: StepPlan, request: Request, num_tokens: int, copies: list[tuple[int, int]], num_known: int
) -> None:
    self.scheduled[request] = Scheduled(request, num_tokens, copies, [request, *request.spawn()], num_known)
    self.budget -= num_tokens


def _preempt(wrong: Callable[[Request], object]) -> Callable[..., None]:
    """Preemption that does something wrong to its victim."""
    right = Scheduler._preempt_youngest

    def preempt(self: Scheduler, plan: StepPlan) -> None:
        victim = self.running[-1]
        right(self, plan)
        wrong(victim)

    return preempt


def _preempt_oldest(self: Scheduler, plan: StepPlan) -> None:
    self.running.append(self.running.pop(0))
    _right_preempt(self, plan)


_right_preempt = Scheduler._preempt_youngest


def _admit_any_number(self: Scheduler, plan: StepPlan) -> None:
    while self.waiting and self._joinable and plan.budget and not plan.preempted:
        request = next(iter(self.waiting.values()))
        if len(plan.scheduled) >= self.config.max_num_seqs or not self._start(plan, request):
            return
        del self.waiting[request.order]
        self.running.append(request)
        plan.admitted.append(request)


def _named_when_scheduled(self: Scheduler) -> StepPlan:
    plan = _right_schedule(self)
    for request, part in plan.scheduled.items():
        self.pool.commit(request.table, request.tokens, request.num_computed + part.num_tokens)
    return plan


_right_schedule = Scheduler.schedule


def _budget_before_the_hit(self: Scheduler, plan: StepPlan, request: Request) -> bool:
    num_tokens = min(request.num_remaining, plan.budget)
    hits = self.pool.lookup(request.tokens, request.cache_salt)
    if not self.pool.fits(hits, request.num_tokens, 0):
        return False
    request.table, request.num_computed = self.pool.open(request.tokens, hits, request.cache_salt)
    copies = self.pool.prepare(request.table, request.num_computed, request.num_tokens) or []
    plan.add(request, num_tokens, copies, 0)
    return True


def _no_truncation(
    self: BlockPool, tokens: list[int], hits: list[Prefix], cache_salt: str | None = None
) -> tuple[BlockTable, int]:
    table, _ = _right_open(self, tokens, hits, cache_salt)
    return table, min(len(table.blocks) * self.block_size, len(tokens))


_right_open = BlockPool.open


def _packed(wrong: Callable[[Batch], Batch]) -> Any:
    """Packing that gets one thing wrong."""
    right = Batch.pack
    return classmethod(lambda cls, *args: wrong(right(*args)))


def _positions_from_zero(batch: Batch) -> Batch:
    q_lens = batch.metadata.q_lens
    return replace(batch, positions=torch.cat([torch.arange(q_len) for q_len in q_lens]))


def _first_rows(batch: Batch) -> Batch:
    return replace(batch, logit_indices=(batch.logit_indices - 1).clamp_min(0))


TOKENS = r"request \d+, completion \d+"  # what `compare` says: others than those of running alone
SCHEDULING: dict[str, tuple[type, str, Any, str]] = {
    "trap 1: a full hit leaves no query": (BlockPool, "open", _no_truncation, "computes tokens that it has"),
    "trap 6: blocks are named before they are computed": (
        Scheduler,
        "schedule",
        _named_when_scheduled,
        "names only blocks that it has computed",
    ),
    "trap 11: blocks are not copied": (StepPlan, "copies", property(lambda self: []), TOKENS),
    "trap 13: what can never fit is admitted": (
        Engine,
        "check",
        lambda self, *args: None,
        "at least one request advances",
    ),
    "trap 16: the cap counts this step only": (Scheduler, "_admit", _admit_any_number, "at most max_num_seqs run"),
    "trap 17: the budget ignores the hit": (
        Scheduler,
        "_start",
        _budget_before_the_hit,
        "computes tokens that it has",
    ),
    "trap 18: chunks are sampled from": (StepPlan, "add", _always_samples, TOKENS),
    "trap 19: whoever has output decodes": (
        Request,
        "num_remaining",
        property(lambda self: 1 if self.num_generated else len(self.tokens) - self.num_computed),
        TOKENS,
    ),
    "trap 20: preemption drops generated tokens": (
        Scheduler,
        "_preempt_youngest",
        _preempt(lambda victim: victim.tokens.__delitem__(slice(victim.num_prompt, None))),
        TOKENS,
    ),
    "trap 21: an aborted step's blocks are freed at once": (
        Scheduler,
        "finish",
        lambda self, request: self._retire(request),
        "has blocks for what it computes",
    ),
    "trap 28: positions start at the chunk": (Batch, "pack", _packed(_positions_from_zero), TOKENS),
    "the oldest is preempted": (
        Scheduler,
        "_preempt_youngest",
        _preempt_oldest,
        "requests are sorted by arrival|the preempted are not scheduled",
    ),
    "the wrong row is sampled from": (Batch, "pack", _packed(_first_rows), TOKENS),
    "a fork gets its parent's own table": (BlockPool, "fork", lambda self, table: table, "counts the tables"),
}


@pytest.mark.parametrize("mutant", SCHEDULING)
def test_the_scripted_fuzz_kills(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong, found = SCHEDULING[mutant]
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError, match=found):
        for seed in range(NUM_SEEDS):
            for policy in POLICIES:
                workload = random_workload(seed, policy)
                if mutant.startswith("trap 13"):
                    workload = replace(workload, config=replace(workload.config, num_blocks=2))
                compare(
                    play(scripted.scripted_engine(workload.config), workload), scripted.alone_all(workload), workload
                )


def _streams(number: Callable[[Request, int], float]) -> Callable[..., Tensor | None]:
    """Numbers to draw with that are chosen by `number(request, output position)`."""

    def stream_numbers(rows: Sequence[Row], seed: int, device: torch.device) -> Tensor | None:
        if all(request.params.greedy for request, _ in rows):
            return None
        chosen = [number(request, request.num_generated + len(drafts)) for request, drafts in rows]
        return torch.tensor(chosen, dtype=torch.float64, device=device)

    return stream_numbers


def _copy_the_keys_only(self: PagedCache, copies: Tensor) -> None:
    for source, target in copies.tolist():
        for pool in self.keys:
            pool[:, target] = pool[:, source]


_drawn = count()
ARITHMETIC: dict[str, tuple[object, str, Any]] = {
    "trap 20: preemption restarts the random stream": (
        sampler,
        "stream_numbers",
        _streams(lambda r, position: r.params.random(r.index, 0 if r.num_preemptions else position)),
    ),
    "requests share a random stream": (
        sampler,
        "stream_numbers",
        _streams(lambda r, position: r.params.random(r.index, next(_drawn))),
    ),
    "trap 36: all completions draw the same": (
        sampler,
        "stream_numbers",
        _streams(lambda r, position: r.params.random(0, position)),
    ),
    "values are not copied": (PagedCache, "copy", _copy_the_keys_only),
    "trap 28: positions start at the chunk": (Batch, "pack", _packed(_positions_from_zero)),
}


@pytest.mark.parametrize("mutant", ARITHMETIC)
def test_the_fuzz_with_a_model_kills(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong = ARITHMETIC[mutant]
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError, match=TOKENS):
        for seed in range(NUM_SEEDS):
            for policy in POLICIES:
                workload = random_workload(seed, policy)
                engine = Engine(test_fuzz.tiny_model(), workload.config)
                compare(play(engine, workload), test_fuzz.alone_all(workload), workload)


def test_random_numbers_that_are_put_in_place_of_the_right_ones_can_be_right() -> None:
    """The mutants above die of what is wrong in them: with the right position and index nothing is found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "stream_numbers", _streams(lambda r, position: r.params.random(r.index, position)))
        for seed in range(10):
            workload = random_workload(seed, "mixed")
            engine = Engine(test_fuzz.tiny_model(), workload.config)
            compare(play(engine, workload), test_fuzz.alone_all(workload), workload)
