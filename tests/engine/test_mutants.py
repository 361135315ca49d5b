"""Wrong engines that the fuzz must tell from the right one: each carries a bug that a serving engine has had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from minillm.cache.blocks import BlockPool, BlockTable
from minillm.cache.paged import PagedCache
from minillm.config import POLICIES
from minillm.engine.batch import Batch
from minillm.engine.engine import Engine
from minillm.engine.request import Request
from minillm.engine.runner import ModelRunner
from minillm.engine.scheduler import Scheduled, Scheduler, StepPlan
from tests.engine import scripted, test_fuzz
from tests.engine.workloads import compare, play, random_workload

NUM_SEEDS = 150


def _always_samples(self: StepPlan, sequence: Request, num_tokens: int, copies: list[tuple[int, int]]) -> None:
    self.scheduled[sequence] = Scheduled(sequence, num_tokens, copies, [sequence, *sequence.spawn()])
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


def _finish_at_once(self: Scheduler, sequence: Request, reason: Any, stop_reason: str | None = None) -> None:
    if not sequence.finished:
        sequence.finish_reason = reason
        self._retire(sequence)


def _admit_any_number(self: Scheduler, plan: StepPlan) -> None:
    while self.waiting and self._joinable and plan.budget and not plan.preempted:
        sequence = next(iter(self.waiting.values()))
        if len(plan.scheduled) >= self.config.max_num_seqs or not self._start(plan, sequence):
            return
        del self.waiting[sequence.order]
        self.running.append(sequence)


def _named_when_scheduled(self: Scheduler) -> StepPlan:
    plan = _right_schedule(self)
    for sequence, part in plan.scheduled.items():
        self.pool.commit(sequence.table, sequence.tokens, sequence.num_computed + part.num_tokens)
    return plan


_right_schedule = Scheduler.schedule


def _budget_before_the_hit(self: Scheduler, plan: StepPlan, sequence: Request) -> bool:
    num_tokens = min(sequence.num_remaining, plan.budget)
    table, start = self.pool.open(sequence.tokens, sequence.salt)
    copies = self.pool.prepare(table, start, sequence.num_tokens)
    if copies is None:
        self.pool.release(table)
        return False
    sequence.table, sequence.num_computed = table, start
    plan.add(sequence, num_tokens, copies)
    return True


def _no_truncation(self: BlockPool, tokens: list[int], salt: object = None) -> tuple[BlockTable, int]:
    table, _ = _right_open(self, tokens, salt)
    return table, min(len(table.blocks) * self.block_size, len(tokens))


_right_open = BlockPool.open


def _packed(wrong: Callable[[Batch], Batch]) -> Any:
    """Packing that gets one thing wrong."""
    right = Batch.pack
    return classmethod(lambda cls, *args: wrong(right(*args)))


def _positions_from_zero(batch: Batch) -> Batch:
    q_lens = batch.layout.q_lens
    return replace(batch, positions=torch.cat([torch.arange(q_len) for q_len in q_lens]))


def _first_rows(batch: Batch) -> Batch:
    return replace(batch, logit_indices=(batch.logit_indices - 1).clamp_min(0))


SCHEDULING: dict[str, tuple[type, str, Any]] = {
    "trap 1: a full hit leaves no query": (BlockPool, "open", _no_truncation),
    "trap 6: blocks are named before they are computed": (Scheduler, "schedule", _named_when_scheduled),
    "trap 11: blocks are not copied": (StepPlan, "copies", property(lambda self: [])),
    "trap 13: what can never fit is admitted": (Engine, "_refuse", lambda self, *args: None),
    "trap 16: the cap counts this step only": (Scheduler, "_admit", _admit_any_number),
    "trap 17: the budget ignores the hit": (Scheduler, "_start", _budget_before_the_hit),
    "trap 18: chunks are sampled from": (StepPlan, "add", _always_samples),
    "trap 19: whoever has output decodes": (
        Request,
        "num_remaining",
        property(lambda self: 1 if self.num_generated else len(self.tokens) - self.num_computed),
    ),
    "trap 20: preemption drops generated tokens": (
        Scheduler,
        "_preempt_youngest",
        _preempt(lambda victim: victim.tokens.__delitem__(slice(victim.num_prompt, None))),
    ),
    "trap 21: an aborted step's blocks are freed at once": (Scheduler, "finish", _finish_at_once),
    "trap 28: positions start at the chunk": (Batch, "pack", _packed(_positions_from_zero)),
    "the oldest is preempted": (Scheduler, "_preempt_youngest", _preempt_oldest),
    "the wrong row is sampled from": (Batch, "pack", _packed(_first_rows)),
    "a fork gets its parent's own table": (BlockPool, "fork", lambda self, table: table),
}


@pytest.mark.parametrize("mutant", SCHEDULING)
def test_the_scripted_fuzz_kills(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong = SCHEDULING[mutant]
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(Exception):  # noqa: B017 - a wrong engine may break in any way, but it must break
        for seed in range(NUM_SEEDS):
            for policy in POLICIES:
                workload = random_workload(seed, policy)
                if mutant.startswith("trap 13"):
                    workload = replace(workload, config=replace(workload.config, num_blocks=2))
                compare(
                    play(scripted.scripted_engine(workload.config), workload), scripted.alone_all(workload), workload
                )


def _one_stream_for_all(self: ModelRunner, sequence: Request) -> torch.Generator | None:
    if sequence.params.greedy:
        return None
    if not hasattr(self, "shared"):
        self.shared = sequence.params.generator(sequence.index, engine_seed=sequence.seed)  # type: ignore[attr-defined]
    return self.shared  # type: ignore[attr-defined,no-any-return]


def _same_stream_for_each_completion(self: ModelRunner, sequence: Request) -> torch.Generator | None:
    if not sequence.params.greedy and sequence.generator is None:
        sequence.generator = sequence.params.generator(0, engine_seed=sequence.seed)
    return sequence.generator


def _copy_the_keys_only(self: PagedCache, copies: list[tuple[int, int]]) -> None:
    for source, target in copies:
        for pool in self.keys:
            pool[:, target] = pool[:, source]


ARITHMETIC: dict[str, tuple[type, str, Any]] = {
    "trap 20: preemption restarts the random stream": (
        Scheduler,
        "_preempt_youngest",
        _preempt(lambda victim: setattr(victim, "generator", None)),
    ),
    "requests share a random stream": (ModelRunner, "_generator", _one_stream_for_all),
    "trap 36: all completions draw the same": (ModelRunner, "_generator", _same_stream_for_each_completion),
    "values are not copied": (PagedCache, "copy", _copy_the_keys_only),
    "trap 28: positions start at the chunk": (Batch, "pack", _packed(_positions_from_zero)),
}


@pytest.mark.parametrize("mutant", ARITHMETIC)
def test_the_fuzz_with_a_model_kills(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong = ARITHMETIC[mutant]
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        for seed in range(NUM_SEEDS):
            for policy in POLICIES:
                workload = random_workload(seed, policy)
                engine = Engine(test_fuzz.tiny_model(), workload.config)
                compare(play(engine, workload), test_fuzz.alone_all(workload), workload)
