"""The stall: its arithmetic on known times, what the policies really do, and what is refused."""

from __future__ import annotations

import json
import math
import random

import pytest

from minillm.costs.formulas import step_flops
from minillm.engine.scheduler import Scheduler
from minillm.errors import ConfigError
from minillm.measure.bench_stall import QUIET_STEPS, TAIL_STEPS, Arrival, StallBench, StallRow
from minillm.measure.roof import Roof
from minillm.model.decoder import Decoder
from tests.families import random_model

#                 quiet: 0.1, 0.1, 0.2     stalled 0.9       after the first token
KNOWN = Arrival(1.0, ((-0.35, -0.25, -0.05, 0.85, 1.15, 9.0), (-0.1, 0.0, 0.3, 1.3, 1.4)))


def test_the_gaps_of_a_known_arrival() -> None:
    """Before: 0.1, 0.2 and 0.1 s. Met by the prefill: 0.9, 0.3, 0.3, 1.0. What comes after does not count."""
    assert KNOWN.quiet_itl == pytest.approx(0.1)
    assert KNOWN.worst_itl == pytest.approx(1.0)
    assert KNOWN.ratio == pytest.approx(10)


def test_mutants_of_the_worst_gap() -> None:
    gaps = [(end - start, start, end) for start, end in KNOWN.gaps]
    everything = max(length for length, _, _ in gaps)
    ended_by_then = max(length for length, _, end in gaps if 0 < end <= KNOWN.ttft)
    began_after = max(length for length, start, _ in gaps if 0 <= start < KNOWN.ttft)
    assert everything == pytest.approx(7.85) and ended_by_then == pytest.approx(0.9)
    assert began_after == pytest.approx(1.0), "right here, but blind to a stall of everybody at once"
    together = Arrival(1.0, ((-0.2, -0.1, 1.1), (-0.2, -0.1, 1.1)))
    assert together.worst_itl == pytest.approx(1.2)
    assert not [start for start, _ in together.gaps if 0 <= start < together.ttft]


def test_a_row_gives_medians_over_arrivals() -> None:
    row = StallRow("mixed", 64, [Arrival(t, ((-0.2, -0.1, 0.1 + t),)) for t in (1.0, 3.0, 2.0)])
    assert row.spread("ttft").median == 2.0
    assert row.spread("worst_itl").median == pytest.approx(2.2)
    assert row.spread("ratio").median == pytest.approx(22)
    data = json.loads(json.dumps(row.to_json()))
    assert data["max_num_batched_tokens"] == 64 and data["ttft_ms"][1] == 2000 and data["ratio"][1] == pytest.approx(22)
    assert "arrivals" not in data
    arrivals = json.loads(json.dumps(row.to_json(detailed=True)))["arrivals"]
    assert [arrival["ttft"] for arrival in arrivals] == [1, 3, 2] and arrivals[0]["others"] == [[-0.2, -0.1, 1.1]]


@pytest.fixture(scope="module")
def model() -> Decoder:
    return random_model()


def tokens_while_waiting(arrival: Arrival) -> int:
    """Tokens that the others got between the arrival and the newcomer's first, without those of that same step."""
    return sum(0 < at < arrival.ttft - 1e-9 for at in arrival.others[0])


def test_policies_do_what_they_say(model: Decoder) -> None:
    """A prompt of 96 tokens arrives at three decodes. `mixed` with a budget of 19 computes 16 of them in a step, so it
    takes 6 steps, and the others get a token in each of the 5 before the last. `prefill_first` gives them none."""
    bench = StallBench(
        model, [("mixed", 19), ("mixed", 99), ("prefill_first", 32)], num_running=3, context=8, prompt=96
    )
    rows = bench.run(repeats=2)
    assert [(row.policy, row.budget, len(row.arrivals)) for row in rows] == [
        *(("mixed", 19, 2), ("mixed", 99, 2), ("prefill_first", 32, 2)),
    ]
    waiting = {(row.policy, row.budget): [tokens_while_waiting(a) for a in row.arrivals] for row in rows}
    assert waiting == {("mixed", 19): [5, 5], ("mixed", 99): [0, 0], ("prefill_first", 32): [0, 0]}
    for arrival in (arrival for row in rows for arrival in row.arrivals):
        assert len(arrival.others) == 3 and arrival.ttft > 0
        quiet = [sum(at <= 0 for at in times) for times in arrival.others]
        assert quiet == [QUIET_STEPS] * 3, "everybody decoded together before the arrival"
        after = [sum(at > arrival.ttft for at in times) for times in arrival.others]
        assert min(after) >= TAIL_STEPS


def test_bounds_are_those_of_the_steps(model: Decoder) -> None:
    """`mixed` pays the decodes in each of 6 steps of 16 tokens; `prefill_first` makes them wait for the whole prompt.

    A roof of infinite bandwidth and 1 FLOP/s turns seconds into FLOPs. The mutant forgets the decodes.
    """
    bench = StallBench(model, [("mixed", 19), ("prefill_first", 32)], num_running=3, context=8, prompt=96)
    mixed, first = (bench.bound(row, Roof(1.0, math.inf)) for row in bench.rows)
    decodes = step_flops(model.config, [(1, 8 + QUIET_STEPS)] * 3).total
    chunks = [step_flops(model.config, [(16, end)]).total for end in range(16, 97, 16)]
    assert mixed == (sum(chunks) + 6 * decodes, chunks[-1] + decodes)
    assert mixed != (sum(chunks), chunks[-1])
    whole = sum(step_flops(model.config, [(32, end)]).total for end in (32, 64, 96))
    assert first == (whole, whole + decodes)


def test_nothing_stays_behind(model: Decoder) -> None:
    bench = StallBench(model, [("mixed", 16)], num_running=2, context=8, prompt=40)
    bench.run(repeats=1)
    (engine,) = bench.engines
    assert not engine.has_unfinished and engine.pool.num_free == engine.pool.num_usable
    engine.scheduler.check()


def test_turns_are_taken(model: Decoder) -> None:
    turns: list[str] = []
    bench = StallBench(model, [("mixed", 16), ("prefill_first", 16)], num_running=2, context=4, prompt=20)
    bench.run(1, turns.append)
    assert turns == [
        *("mixed 16, warm-up", "prefill_first 16, warm-up"),
        *("mixed 16, round 1 of 1", "prefill_first 16, round 1 of 1"),
    ]


def test_nobody_is_preempted_whatever_the_sizes(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pools are large enough: a preemption would be another kind of stall."""
    preempted: list[object] = []
    original = Scheduler._preempt_youngest
    monkeypatch.setattr(Scheduler, "_preempt_youngest", lambda *both: (preempted.append(both), original(*both)))
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for _ in range(3):
        running = rng.randint(1, 4)
        budgets = [("mixed", running + rng.randint(1, 40)), ("prefill_first", running + rng.randint(1, 40))]
        bench = StallBench(model, budgets, num_running=running, context=rng.randint(1, 20), prompt=rng.randint(1, 90))
        bench.run(1)
    assert preempted == [], f"{seed=}"


@pytest.mark.parametrize("budget, prompt, words", [(3, 20, "used up by 3 decodes"), (4, 600, "512 positions")])
def test_what_cannot_be_measured_is_refused(model: Decoder, budget: int, prompt: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        StallBench(model, [("mixed", 64), ("mixed", budget)], num_running=3, context=8, prompt=prompt)
