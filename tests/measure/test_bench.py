"""The stopwatch: known answers for its arithmetic, a fake clock for its order of events. No test asserts a time."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from minillm.errors import ConfigError
from minillm.measure import bench
from minillm.measure.bench import Timing, interleaved, pair_ratio, quartiles


class FakeClock:
    """A clock that only moves when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def worker(self, *durations: float) -> Callable[[], None]:
        """A candidate that takes the given seconds, one after the other."""
        left = list(durations)

        def work() -> None:
            self.now += left.pop(0)

        return work


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(bench, "perf_counter", fake)
    return fake


def test_quartiles_are_those_of_numpy() -> None:
    seed = random.randrange(2**32)
    values = [random.Random(seed + i).expovariate(1) for i in range(17)]
    for count in range(1, 18):
        expected = np.percentile(values[:count], [25, 50, 75])
        assert np.allclose(quartiles(values[:count]), expected), f"seed={seed}, count={count}"


def test_warmup_is_run_but_not_counted(clock: FakeClock) -> None:
    timing = interleaved({"a": clock.worker(100, 1, 2, 4)}, repeats=3, warmup=1)["a"]
    assert timing.times == (1, 2, 4)
    assert (timing.low, timing.median, timing.high, timing.best) == (1.5, 2, 3, 1)


def test_candidates_take_turns() -> None:
    order: list[str] = []
    interleaved({name: lambda name=name: order.append(name) for name in "abc"}, repeats=2, warmup=1)
    assert order == list("abcabcabc")


def test_sync_runs_before_both_readings_of_the_clock(clock: FakeClock) -> None:
    """Work that the previous candidate left behind is paid before the start, this one's own before the stop."""
    owed = [5.0]

    def sync() -> None:
        clock.now += owed.pop() if owed else 0

    def launch() -> None:
        clock.now += 1
        owed.append(7.0)

    assert interleaved({"a": launch}, repeats=1, warmup=0, sync=sync)["a"].times == (8,)


def test_per_divides_each_repeat() -> None:
    assert Timing((8.0, 4.0)).per(4).times == (2.0, 1.0)


def test_pair_ratio_cancels_what_drifts() -> None:
    """The machine becomes ten times slower half-way: twice as long stays twice as long."""
    slower, faster = Timing((2, 2, 20, 20)), Timing((1, 1, 10, 10))
    assert pair_ratio(slower, faster) == (2, 2, 2)


def test_turns_cancel_what_one_after_the_other_does_not(clock: FakeClock) -> None:
    """A machine that slows down while it works. The mutant measures all of a, then all of b, and blames b."""

    def drifting(cost: float) -> Callable[[], None]:
        def work() -> None:
            clock.now += cost * 1.05 ** len(calls)
            calls.append(cost)

        return work

    calls: list[float] = []
    turns = interleaved({"a": drifting(2), "b": drifting(1)}, repeats=20, warmup=0)
    assert pair_ratio(turns["a"], turns["b"]).median == pytest.approx(2 / 1.05)
    calls.clear()
    mutant = {
        name: interleaved({name: drifting(cost)}, repeats=20, warmup=0)[name] for name, cost in (("a", 2), ("b", 1))
    }
    assert pair_ratio(mutant["a"], mutant["b"]).median < 1, "so far off that the slower one looks faster"


def test_pair_ratio_is_no_ratio_of_medians() -> None:
    slower, faster = Timing((1, 10, 4)), Timing((1, 2, 4))
    assert pair_ratio(slower, faster).median == 1  # the mutant median/median would say 4 / 2
    assert slower.median / faster.median == 2


@pytest.mark.parametrize("repeats, warmup", [(0, 1), (-1, 0), (1, -1)])
def test_impossible_counts_are_refused(repeats: int, warmup: int) -> None:
    with pytest.raises(ConfigError, match=f"repeats={repeats}, warmup={warmup}"):
        interleaved({}, repeats=repeats, warmup=warmup)


def test_nothing_to_summarise_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        quartiles([])


def test_ratios_of_different_runs_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 times cannot be paired with 1"):
        pair_ratio(Timing((1, 2)), Timing((1,)))
