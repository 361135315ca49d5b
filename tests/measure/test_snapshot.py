"""A snapshot is what the pool's own books say at that moment, and it stays that way when the pool goes on."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from minillm.cache.blocks import BlockPool, BlockTable
from minillm.engine.engine import Engine
from minillm.engine.trace import StepRecord
from minillm.measure import snapshot as module
from minillm.measure.snapshot import ROOT, PoolSnapshot, Tables, tables
from minillm.sampling import SamplingParams
from minillm.speculative.ngram import NgramProposer
from tests.engine.scripted import scripted_engine
from tests.engine.workloads import play, random_workload

BLOCK = 4
Holders = dict[str, tuple[BlockTable, list[int]]]


def churn(seed: int, steps: int = 40) -> tuple[BlockPool, Holders]:
    """A pool after some time: sequences with common beginnings came, grew, forked and left."""
    rng, pool, holders = random.Random(seed), BlockPool(24, BLOCK), Holders()
    for step in range(steps):
        name = rng.choice(list(holders) or [""])
        action = rng.choice(["open", "grow", "fork", "close"] if name else ["open"])
        if action == "open":
            tokens = [rng.randrange(2) for _ in range(rng.randint(1, 14))]
            table, start = pool.open(tokens, pool.lookup(tokens))
            _compute(pool, holders, f"s{step}", table, start, tokens)
        elif action == "grow":
            table, tokens = holders[name]
            _compute(pool, holders, name, table, len(tokens), tokens + [rng.randrange(2) for _ in range(3)])
        elif action == "fork":
            holders[f"s{step}"] = pool.fork(holders[name][0]), list(holders[name][1])
        else:
            pool.release(holders.pop(name)[0])
    pool.check(table for table, _ in holders.values())
    return pool, holders


def _compute(pool: BlockPool, holders: Holders, name: str, table: BlockTable, start: int, tokens: list[int]) -> None:
    if pool.prepare(table, start, len(tokens)) is None:
        pool.release(table)
        holders.pop(name, None)
        return
    pool.commit(table, tokens, len(tokens))
    holders[name] = table, tokens


def check(seed: int) -> None:
    """Recompute everything from the tables, the slow way."""
    pool, holders = churn(seed)
    shot = PoolSnapshot.take(pool, holders)
    positions = [
        (table.blocks[i // BLOCK], i % BLOCK) for table, tokens in holders.values() for i in range(len(tokens))
    ]
    held = {block for table, _ in holders.values() for block in table.blocks}
    assert shot.num_held == len(held), f"{seed=}"
    assert shot.waste == len(held) * BLOCK - len(set(positions)), f"{seed=}"
    for block in pool.blocks:
        assert shot.ref_counts[block.id] == len(list(shot.places(block.id))), f"{seed=}"
    for name, (_, tokens) in holders.items():
        assert sum(shot.filled(name, logical) for logical in range(len(shot.tables[name]))) == len(tokens), f"{seed=}"
    assert len(shot.known) == len(pool.cached), f"{seed=}"
    for block, (parent, tokens) in shot.known.items():
        name = pool.blocks[block].prefix
        assert name is not None and name.tokens == tokens, f"{seed=}"
        assert parent == ROOT or pool.blocks[parent].prefix == name.parent, f"{seed=}"


def test_a_snapshot_is_what_the_books_say() -> None:
    start = random.randrange(2**32)
    for seed in range(start, start + 40):
        check(seed)


def test_a_snapshot_stays() -> None:
    pool, holders = churn(7)
    shot = PoolSnapshot.take(pool, holders)
    counts, tables, known = shot.ref_counts, dict(shot.tables), dict(shot.known)
    for table, _ in holders.values():
        pool.release(table)
    pool.prepare(BlockTable(), 0, 23 * BLOCK)
    assert (shot.ref_counts, shot.tables, shot.known) == (counts, tables, known)


def _shared_places_count_twice(self: PoolSnapshot) -> int:
    return self.num_held * self.block_size - sum(map(len, self.tokens.values()))


def _last_block_is_full(self: PoolSnapshot, name: str, logical: int) -> int:
    return self.block_size


def _remembered_blocks_are_held(self: PoolSnapshot) -> int:
    return len({*self.known, *(block for blocks in self.tables.values() for block in blocks)})


MUTANTS: dict[str, tuple[str, Callable[..., int] | property]] = {
    "a place that two share is empty twice": ("waste", property(_shared_places_count_twice)),
    "every block is full": ("filled", _last_block_is_full),
    "what is remembered is held": ("num_held", property(_remembered_blocks_are_held)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_check_notices(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong = MUTANTS[mutant]
    monkeypatch.setattr(module.PoolSnapshot, name, wrong)
    with pytest.raises(AssertionError):
        for seed in range(40):
            check(seed)


# Tables from the trace


def watch(engine: Engine) -> list[Tables]:
    """The real tables after each step of the engine, as they will be."""
    seen: list[Tables] = []
    step = engine.step

    def watched() -> list:
        before = len(engine.trace)
        events = step()
        if len(engine.trace) > before:
            seen.append({(r.request_id, r.index): tuple(r.table.blocks) for r in engine.scheduler.running})
        return events

    engine.step = watched  # type: ignore[method-assign]
    return seen


def check_tables(seed: int, policy: str, proposer: NgramProposer | None = None) -> list[StepRecord]:
    """Random requests that fork, share prefixes, are preempted, aborted and verified."""
    workload = random_workload(seed, policy)
    engine = scripted_engine(workload.config, proposer)
    seen = watch(engine)
    play(engine, workload)
    for number, (got, want) in enumerate(zip(tables(engine.trace), seen, strict=True)):
        assert got == want, f"{seed=} {policy=} step {number}"
    return list(engine.trace)


@pytest.mark.parametrize("policy", ["mixed", "prefill_first", "static"])
def test_tables_follow_from_the_trace(policy: str) -> None:
    start = random.randrange(2**32)
    records = [record for seed in range(start, start + 120) for record in check_tables(seed, policy)]
    records += [record for seed in range(start, start + 40) for record in check_tables(seed, policy, NgramProposer(1))]
    parts = [part for record in records for part in record.requests]
    assert any(record.preempted for record in records) and any(record.num_copies for record in records)
    assert any(part.num_samples > 1 for part in parts) and any(part.num_drafts for part in parts)
    assert any(
        part.num_computed for record in records for part in record.requests if part.request_id in record.admitted
    )


def _served(engine: Engine, count: int = 3) -> None:
    for _ in range(count):
        engine.add([5] * 9, SamplingParams(temperature=0, n=2, max_tokens=12, ignore_eos=True))


def test_tables_after_an_end_from_outside_and_a_step_that_failed() -> None:
    engine = scripted_engine(block_size=2, num_blocks=40, max_num_batched_tokens=12)
    seen = watch(engine)
    _served(engine)
    for _ in range(4):
        engine.step()
    engine.finish("#0", 1, "text")
    engine.step()
    run, engine.runner.run = engine.runner.run, None  # type: ignore[method-assign, assignment]
    with pytest.raises(TypeError):
        engine.step()
    engine.runner.run = run  # type: ignore[method-assign]
    list(engine.run())
    assert ("#0", 1) in seen[3] and ("#0", 1) not in seen[4]
    assert list(tables(engine.trace)) == seen


def test_tables_of_a_trace_that_begins_late() -> None:
    """Who was admitted before is left out; all that is told is true."""
    engine = scripted_engine(block_size=2, num_blocks=40, max_num_batched_tokens=12)
    seen = watch(engine)
    _served(engine)
    list(engine.run())
    for first in range(len(seen)):
        late = list(tables(list(engine.trace)[first:]))
        assert all(got.items() <= want.items() for got, want in zip(late, seen[first:], strict=True))
    assert any(tables(list(engine.trace)[2:]))


def _forks_are_forgotten(part: module.RequestStep, before: tuple[int, ...]) -> list:
    return [((part.request_id, part.index), before[: part.first_block] + part.blocks)]


def _blocks_are_appended(part: module.RequestStep, before: tuple[int, ...]) -> list:
    return [((part.request_id, part.index + i), before + part.blocks) for i in range(max(1, part.num_samples))]


@pytest.mark.parametrize("wrong", [_forks_are_forgotten, _blocks_are_appended])
def test_the_check_of_tables_notices(wrong: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_table", wrong)
    with pytest.raises(AssertionError):
        for seed in range(40):
            check_tables(seed, "mixed")
