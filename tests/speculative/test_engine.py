"""Speculation inside the engine: whoever guesses, the tokens are those of running alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.config import POLICIES, EngineConfig
from minillm.engine.batch import Batch
from minillm.engine.engine import Engine
from minillm.engine.request import Request
from minillm.engine.scheduler import Scheduled, Scheduler, StepPlan
from minillm.engine.trace import StepRecord
from minillm.engine.verify import Draft, Proposer, accept
from minillm.generate import generate
from minillm.model.decoder import Decoder
from minillm.sampling import SamplingParams
from minillm.speculative.draft import DraftModelProposer
from minillm.speculative.ngram import NgramProposer
from tests.engine import scripted, test_fuzz
from tests.engine.scripted import scripted_engine
from tests.engine.test_fuzz import tiny_model
from tests.engine.workloads import VOCAB, Completions, Workload, compare, play, random_workload
from tests.families import random_model
from tests.speculative.guessers import Guesser

NUM_SEEDS = 30


def ngram(workload: Workload, truth: Completions) -> Proposer:
    return NgramProposer(min_match=1)


def garbage(workload: Workload, truth: Completions) -> Proposer:
    return Guesser(truth, right=0.0)


def half_right(workload: Workload, truth: Completions) -> Proposer:
    return Guesser(truth, right=0.7, silent=0.2)


def always_right(workload: Workload, truth: Completions) -> Proposer:
    return Guesser(truth, right=1.0)


def target_itself(workload: Workload, truth: Completions) -> Proposer:
    return DraftModelProposer(tiny_model(), workload.config)


def smaller_model(workload: Workload, truth: Completions) -> Proposer:
    return DraftModelProposer(draft_model(), workload.config)


@cache
def draft_model() -> Decoder:
    return random_model("qwen2", seed=1, vocab_size=VOCAB, num_hidden_layers=1, eos_token_id=3)


GUESSERS = (garbage, half_right, always_right, ngram)
MODELS = (target_itself, smaller_model)
Maker = Callable[[Workload, Completions], Proposer]
Server = Callable[[Workload, Proposer], Engine]


def with_a_model(workload: Workload, proposer: Proposer) -> Engine:
    return Engine(tiny_model(), workload.config, proposer)


def with_a_script(workload: Workload, proposer: Proposer) -> Engine:
    return scripted_engine(workload.config, proposer)


def speculating(seed: int, policy: str) -> Workload:
    """The engine's own workloads, under any limit of drafts."""
    rng = random.Random(seed)
    workload = random_workload(seed, policy)
    changes: dict[str, Any] = {
        "num_speculative_tokens": rng.choice([1, 2, 4, 7]),
        "adaptive_drafts": rng.random() < 0.5,
    }
    return replace(workload, config=replace(workload.config, **changes))


def greedy(workload: Workload) -> Workload:
    requests = (replace(r, params=replace(r.params, temperature=0)) for r in workload.requests)
    return replace(workload, requests=tuple(requests))


def fuzz(
    serve: Server,
    make: Maker,
    alone_all: Callable[[Workload], Completions],
    *,
    only_greedy: bool = False,
    num_seeds: int = NUM_SEEDS,
) -> Counter[str]:
    """Play workloads of all policies against running alone; counts of what happened."""
    seen: Counter[str] = Counter()
    for seed in range(num_seeds):
        for policy in POLICIES:
            workload = speculating(seed, policy)
            workload = greedy(workload) if only_greedy else workload
            truth = alone_all(workload)
            proposer = make(workload, truth)
            try:
                engine = serve(workload, proposer)
                compare(play(engine, workload), truth, workload)
                check_draft_pool(proposer)
            except Exception as error:
                raise AssertionError(f"seed {seed}, policy {policy}: {error}\n{workload}") from error
            seen += count(engine.trace)
    return seen


def check_draft_pool(proposer: Proposer) -> None:
    """All blocks of the draft's own cache are free again, and no request is remembered."""
    if isinstance(proposer, DraftModelProposer):
        proposer.pool.check([])
        assert proposer.pool.num_free == proposer.pool.num_usable and not proposer._twins
    if isinstance(proposer, NgramProposer):
        assert not proposer._indices


def count(records: Iterable[StepRecord]) -> Counter[str]:
    parts = [part for record in records for part in record.requests]
    return Counter(
        drafts=sum(part.num_drafts for part in parts),
        accepted=sum(part.num_accepted for part in parts),
        rejected=sum(part.num_accepted < part.num_drafts for part in parts),
        preempted=sum(len(record.preempted) for record in records),
    )


@pytest.mark.parametrize("make", GUESSERS)
def test_guesses_change_no_token(make: Maker) -> None:
    """Greedy or sampled: even the random draws are those of running alone."""
    seen = fuzz(with_a_model, make, test_fuzz.alone_all)
    assert seen["drafts"] > 100 and seen["preempted"] > 20
    assert seen["accepted"] > 0 or make is garbage
    assert seen["rejected"] > 0 or make is always_right


@pytest.mark.parametrize("make", GUESSERS)
def test_blocks_and_packing_against_a_scripted_model(make: Maker) -> None:
    seen = fuzz(with_a_script, make, scripted.alone_all)
    assert seen["drafts"] > 50 and seen["preempted"] > 20


@pytest.mark.parametrize("make", MODELS)
def test_drafts_of_a_model_change_no_greedy_token(make: Maker) -> None:
    seen = fuzz(with_a_model, make, test_fuzz.alone_all, only_greedy=True)
    assert seen["drafts"] > 100 and seen["preempted"] > 20
    if make is target_itself:
        assert seen["accepted"] == seen["drafts"], "the target agrees with itself"
    else:
        assert seen["rejected"] > 0


# --- wrong engines ---------------------------------------------------------------------------------------------------


def _counts_rejected_drafts(self: Scheduler, request: Request, part: Scheduled | None, said: list[int]) -> list[int]:
    taken = _right_take(self, request, part, said)
    if part:
        request.num_computed += len(part.draft) - len(said) + 1
    return taken


def _names_rejected_kv(self: Scheduler, request: Request, part: Scheduled | None, said: list[int]) -> list[int]:
    taken = _right_take(self, request, part, said)
    if part and part.draft:
        held = len(request.table.blocks) * self.pool.block_size
        self.pool.commit(request.table, request.tokens, min(request.num_tokens, held))
    return taken


_right_take = Scheduler._take


def _stops_at_the_end_only(self: Request, tokens: list[int], end_ids: tuple[int, ...]) -> list[int]:
    self.tokens += tokens[:-1]
    return tokens[:-1] + _right_extend(self, tokens[-1:], end_ids)


_right_extend = Request.extend


def _last_row_for_all(cls: type[Batch], plan: StepPlan, *how: Any) -> Batch:
    batch = _right_pack(plan, *how)
    rows, ends = batch.logit_indices, list[Tensor]()
    for draft in plan.drafts:
        mine, rows = rows.split([1 + len(draft), len(rows) - 1 - len(draft)])
        ends.append(mine[-1:].expand(len(mine)))
    return replace(batch, logit_indices=torch.cat([*ends, rows]))


_right_pack = Batch.pack


def _all_accepted(drafts: Sequence[Draft], drawn: list[int]) -> list[list[int]]:
    return accept(drafts, drawn, lambda guessed, said: len(guessed))


def _free_of_charge(self: Scheduler, plan: StepPlan, drafts: Mapping[Request, Draft]) -> None:
    budget = plan.budget
    _right_add_drafts(self, plan, drafts)
    plan.budget = budget


_right_add_drafts = Scheduler.add_drafts


TOKENS = r"request \d+, completion \d+"  # what `compare` says: others than those of running alone
MUTANTS: dict[str, tuple[object, str, object, str]] = {
    "trap 43: rejected drafts count as computed": (
        Scheduler,
        "_take",
        _counts_rejected_drafts,
        "every request has something to compute",
    ),
    "trap 44: a block with a rejected draft is named": (
        Scheduler,
        "_take",
        _names_rejected_kv,
        "names only blocks that it has computed",
    ),
    "trap 45: a stop token inside an accepted run is overlooked": (Request, "extend", _stops_at_the_end_only, TOKENS),
    "all rows of a verify are the last one": (Batch, "pack", classmethod(_last_row_for_all), TOKENS),
    "whatever is guessed is accepted": (scripted, "accept", _all_accepted, TOKENS),
    "the budget is no limit": (Scheduler, "add_drafts", _free_of_charge, "the budget adds up"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_fuzz_kills(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong, found = MUTANTS[mutant]
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError, match=found):
        fuzz(with_a_script, half_right, scripted.alone_all, num_seeds=150)


# --- one thing at a time ---------------------------------------------------------------------------------------------


def certain(length: int, prompt: tuple[int, ...] = (5, 6, 7), **changes: Any) -> tuple[Engine, list[int]]:
    """A scripted engine whose proposer is always right, one request of `length` tokens in it; and what it will say."""
    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    truth = {("#0", 0): scripted.alone(prompt, params, 0)}
    engine = scripted_engine(proposer=Guesser(truth, right=1.0), **({"num_blocks": 100} | changes))
    engine.add(prompt, params)
    return engine, truth["#0", 0]


def steps(engine: Engine) -> list[int]:
    """Tokens that each step brings."""
    brought = []
    while engine.has_unfinished:
        brought.append(sum(len(event.token_ids) for event in engine.step()))
    return brought


def test_a_round_brings_all_drafts_and_one_more() -> None:
    engine, _ = certain(16, num_speculative_tokens=4)
    assert steps(engine) == [1, 5, 5, 5]
    assert [part.num_scheduled for record in engine.trace for part in record.requests] == [3, 5, 5, 5]


def test_max_tokens_is_met_exactly() -> None:
    """No guess is checked that would not be used; so no position is computed that the request did not ask for."""
    for length in range(1, 12):
        engine, said = certain(length, num_speculative_tokens=4)
        assert sum(steps(engine)) == length == len(said)
        assert max(part.kv_len for record in engine.trace for part in record.requests) <= 3 + length - 1


def test_drafts_leave_budget_to_everybody_else() -> None:
    engine, _ = certain(30, num_speculative_tokens=4, max_num_batched_tokens=8)
    engine.step()
    engine.add([9] * 16, SamplingParams(temperature=0, max_tokens=1))
    engine.step()
    engine.step()
    drafts = [[part.num_drafts for part in record.requests] for record in engine.trace]
    assert drafts == [[0], [0, 0], [0, 0]], "a prompt fills the budget: nothing is guessed"
    assert all(record.num_tokens <= 8 for record in engine.trace)
    engine.step()
    assert [(part.num_scheduled, part.num_drafts) for part in engine.trace[-1].requests] == [(5, 4), (2, 0)]


def test_nobody_is_preempted_for_a_guess() -> None:
    """Four blocks: drafts take two and leave one for the next token; then they fill the blocks that are held."""
    engine, _ = certain(13, block_size=4, num_blocks=5, num_speculative_tokens=7)
    assert steps(engine) == [1, 8, 1, 3]
    assert [record.num_free_blocks for record in engine.trace] == [3, 1, 1, 4]
    assert not any(record.preempted for record in engine.trace)


def _room_for_all(self: Scheduler, plan: StepPlan) -> dict[Request, int]:
    """Blocks that running requests need for their next token are given to guesses as well."""
    parts = [part for part in plan.scheduled.values() if part.samplers and part.request.num_generated]
    counts = {part.request: min(part.request.num_drafts, plan.budget // len(parts)) for part in parts}
    return {request: count for request, count in counts.items() if count}


def test_guesses_that_take_too_much_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """They change no token, so no fuzz can see them."""
    monkeypatch.setattr(Scheduler, "draft_room", _room_for_all)
    for test in (test_max_tokens_is_met_exactly, test_nobody_is_preempted_for_a_guess):
        with pytest.raises(AssertionError):
            test()


def test_a_stop_token_inside_an_accepted_run_ends_it() -> None:
    engine, said = certain(16, num_speculative_tokens=7)
    engine.abort("#0")
    stop = said[3]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, stop_token_ids=[stop])
    engine.proposer.truth["#1", 0] = said  # type: ignore[union-attr]
    engine.add((5, 6, 7), params)
    events = [event for _ in range(2) for event in engine.step()]
    assert [token for event in events for token in event.token_ids] == said[: said.index(stop) + 1]
    assert events[-1].finish_reason == "stop" and events[-1].request.stop_reason == stop
    assert not engine.has_unfinished and engine.pool.num_free == engine.pool.num_usable


def test_a_request_may_decline() -> None:
    engine, said = certain(9)
    engine.proposer.truth["#1", 0] = said  # type: ignore[union-attr]
    engine.add((5, 6, 7), SamplingParams(temperature=0, max_tokens=9, ignore_eos=True), num_speculative_tokens=0)
    steps(engine)
    parts = [part for record in engine.trace for part in record.requests]
    assert sum(part.num_drafts for part in parts if part.request_id == "#0") > 0
    assert sum(part.num_drafts for part in parts if part.request_id == "#1") == 0


def test_the_number_of_guesses_follows_what_was_accepted() -> None:
    one = Request("0", (0, 0), [1], 1, SamplingParams(), max_drafts=8, num_drafts=8)
    seen = []
    for proposed, accepted in [(8, 3), (4, 0), (1, 0), (1, 1), (2, 2), (4, 4), (8, 8), (3, 3)]:
        one.adapt_drafts(proposed, accepted)
        seen.append(one.num_drafts)
    assert seen == [4, 1, 1, 2, 4, 8, 8, 6]


def test_the_switch_keeps_the_number_of_guesses() -> None:
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    for adaptive, want in ((False, 4), (True, 1)):
        truth = {("#0", 0): scripted.alone((5, 6), params, 0)}
        engine = scripted_engine(proposer=Guesser(truth, right=0.0), num_blocks=50, adaptive_drafts=adaptive)
        engine.add((5, 6), params)
        steps(engine)
        parts = [part for record in engine.trace for part in record.requests]
        typical = Counter(part.num_drafts for part in parts[1:20]).most_common(1)[0][0]
        assert typical == want


def test_log_probabilities_of_an_accepted_run() -> None:
    """One entry per token, the same as without speculation."""
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)
    reported = []
    for proposer in (None, DraftModelProposer(tiny_model(), EngineConfig(num_blocks=20))):
        engine = Engine(tiny_model(), EngineConfig(num_blocks=20), proposer)
        engine.add([5, 6, 7], params)
        events = list(engine.run())
        assert len(events[-1].request.logprobs) == sum(len(event.token_ids) for event in events) == 12
        reported.append(events[-1].request.logprobs)
    for plain, speculative in zip(*reported, strict=True):
        assert {token: x.rank for token, x in plain.items()} == {token: x.rank for token, x in speculative.items()}
        for token, entry in plain.items():
            assert abs(entry.logprob - speculative[token].logprob) < 1e-4


def test_the_repetition_penalty_counts_drafts_as_said() -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, repetition_penalty=1.5)
    want = list(generate(tiny_model(), [5, 6, 7], params))
    for right in (0.5, 1.0):
        engine = Engine(tiny_model(), EngineConfig(num_blocks=20), Guesser({("#0", 0): want}, right))
        engine.add([5, 6, 7], params)
        assert [token for event in engine.run() for token in event.token_ids] == want


def test_a_proposer_that_fails_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is taken back, and the next one starts over."""
    engine, _ = certain(9)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.proposer, "propose", lambda room: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert sum(steps(engine)) == 8
