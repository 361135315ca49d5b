"""A fair stopwatch: candidates take turns, and what is reported is a median with its spread.

The speed of a machine drifts: it heats up, it throttles, another program uses its memory. Two things that are measured
one after the other are measured at different speeds. Two things that take turns see the same speed, and in the ratio of
each *pair* of turns the drift cancels. So every comparison of this project is measured by `interleaved` and quoted as
`pair_ratio`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles
from time import perf_counter
from typing import NamedTuple

from minillm.errors import ConfigError


class Quartiles(NamedTuple):
    """The middle half of some numbers: a quarter is below `low`, half is below `median`, a quarter is above `high`."""

    low: float
    median: float
    high: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """Quartiles with linear interpolation between neighbours (numpy's default); one value is all three.

    Raises `ConfigError` if `values` is empty.
    """
    if not values:
        raise ConfigError("No values to summarise: a median needs at least one. Measure with repeats >= 1.")
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Timing:
    """What the repeats of one candidate took, in seconds, in the order in which they ran."""

    times: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the repeats were faster."""
        return quartiles(self.times).median

    @property
    def low(self) -> float:
        """Lower quartile: a quarter of the repeats were faster."""
        return quartiles(self.times).low

    @property
    def high(self) -> float:
        """Upper quartile: a quarter of the repeats were slower."""
        return quartiles(self.times).high

    @property
    def best(self) -> float:
        """The fastest repeat: the one to quote for a ceiling, because noise only adds time."""
        return min(self.times)

    def per(self, count: int) -> Timing:
        """The time of one item, where each repeat handled `count` of them."""
        return Timing(tuple(seconds / count for seconds in self.times))


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    sync: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time the candidates turn by turn: A B C, A B C, … `repeats` rounds after `warmup` rounds that do not count.

    `sync` waits for work that a call only started (`torch.cuda.synchronize`); it runs before each start and stop of
    the clock. Returns a `Timing` per candidate; the i-th times of all candidates come from the same round.
    Raises `ConfigError` if `repeats` is below 1 or `warmup` below 0.
    """
    if repeats < 1 or warmup < 0:
        raise ConfigError(f"repeats={repeats}, warmup={warmup}: choose at least 1 repeat and 0 or more warm-up rounds.")
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(warmup + repeats):
        for name, call in candidates.items():
            times[name].append(_seconds(call, sync))
    return {name: Timing(tuple(rounds[warmup:])) for name, rounds in times.items()}


def _seconds(call: Callable[[], object], sync: Callable[[], object] | None) -> float:
    if sync:
        sync()
    start = perf_counter()
    call()
    if sync:
        sync()
    return perf_counter() - start


def pair_ratio(slower: Timing, faster: Timing) -> Quartiles:
    """How many times as long `slower` takes, round by round: the quartiles of slower[i] / faster[i].

    The median of ratios, not the ratio of medians: both times of a pair saw the same state of the machine.
    Raises `ConfigError` if the two were not measured in the same rounds.
    """
    if len(slower.times) != len(faster.times):
        raise ConfigError(
            f"{len(slower.times)} times cannot be paired with {len(faster.times)}: measure both in one call of "
            "interleaved()."
        )
    return quartiles([a / b for a, b in zip(slower.times, faster.times, strict=True)])
