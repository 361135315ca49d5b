"""Speculation inside the engine: whoever guesses, the tokens are those of running alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import pytest

from minillm.config import POLICIES
from minillm.engine.engine import Engine
from minillm.engine.proposer import Draft, Proposer
from minillm.engine.sequence import Sequence
from minillm.engine.trace import StepRecord
from minillm.speculative.draft import DraftModelProposer
from minillm.speculative.ngram import NgramProposer
from tests.engine import scripted, test_fuzz
from tests.engine.scripted import scripted_engine
from tests.engine.test_fuzz import tiny_model
from tests.engine.workloads import VOCAB, Completions, Workload, compare, play, random_workload
from tests.families import random_model

NUM_SEEDS = 40


class Guesser:
    """Guesses from a list of what will really be said, some of it spoiled; says nothing for some sequences at times."""

    def __init__(self, truth: Completions, right: float, seed: int = 0, silent: float = 0.0) -> None:
        self.truth, self.right, self.silent = truth, right, silent
        self.rng = random.Random(seed)

    def propose(self, room: Mapping[Sequence, int]) -> dict[Sequence, Draft]:
        return {s: Draft(self._guess(s, count)) for s, count in room.items() if self.rng.random() >= self.silent}

    def _guess(self, sequence: Sequence, count: int) -> list[int]:
        said = self.truth[sequence.request_id, sequence.index][sequence.num_generated :]
        guess = [*said, *[0] * count][: self.rng.randint(0, count) if self.silent else count]
        return [token if self.rng.random() < self.right else self.rng.randrange(VOCAB) for token in guess]

    def forget(self, sequence: Sequence) -> None:
        pass


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


def draft_model() -> object:
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
    changes = {"num_speculative_tokens": rng.choice([1, 2, 4, 7]), "adaptive_drafts": rng.random() < 0.5}
    return replace(workload, config=replace(workload.config, **changes))


def greedy(workload: Workload) -> Workload:
    requests = (replace(r, params=replace(r.params, temperature=0)) for r in workload.requests)
    return replace(workload, requests=tuple(requests))


def fuzz(
    serve: Server, make: Maker, alone_all: Callable[[Workload], Completions], *, only_greedy: bool
) -> Counter[str]:
    """Play workloads of all policies against running alone; counts of what happened."""
    seen: Counter[str] = Counter()
    for seed in range(NUM_SEEDS):
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
    """All blocks of the draft's own cache are free again, and no sequence is remembered."""
    if isinstance(proposer, DraftModelProposer):
        proposer.pool.check([])
        assert proposer.pool.num_free == proposer.pool.num_usable and not proposer._twins
    if isinstance(proposer, NgramProposer):
        assert not proposer._indices


def count(records: Iterable[StepRecord]) -> Counter[str]:
    parts = [part for record in records for part in record.sequences]
    return Counter(
        drafts=sum(part.num_drafts for part in parts),
        accepted=sum(part.num_accepted for part in parts),
        rejected=sum(part.num_accepted < part.num_drafts for part in parts),
        preempted=sum(len(record.preempted) for record in records),
    )


@pytest.mark.parametrize("make", GUESSERS)
def test_guesses_change_no_token(make: Maker) -> None:
    """Greedy or sampled: even the random draws are those of running alone."""
    seen = fuzz(with_a_model, make, test_fuzz.alone_all, only_greedy=False)
    assert seen["drafts"] > 100 and seen["preempted"] > 20
    assert seen["accepted"] > 0 or make is garbage
    assert seen["rejected"] > 0 or make is always_right


@pytest.mark.parametrize("make", GUESSERS)
def test_blocks_and_packing_against_a_scripted_model(make: Maker) -> None:
    seen = fuzz(with_a_script, make, scripted.alone_all, only_greedy=False)
    assert seen["drafts"] > 100 and seen["preempted"] > 20


@pytest.mark.parametrize("make", MODELS)
def test_drafts_of_a_model_change_no_greedy_token(make: Maker) -> None:
    seen = fuzz(with_a_model, make, test_fuzz.alone_all, only_greedy=True)
    assert seen["drafts"] > 100 and seen["preempted"] > 20
    if make is target_itself:
        assert seen["accepted"] == seen["drafts"], "the target agrees with itself"
    else:
        assert seen["rejected"] > 0
