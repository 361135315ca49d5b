"""The steps of whole requests, and of many that share a number of slots: what chapters 3 and 8 compare."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heapreplace

from minillm.costs.steps import Step, decode_step, prefill_step
from minillm.errors import ConfigError


def request_steps(prompt: int, new_tokens: int) -> list[Step]:
    """A request with a KV cache: the first new token comes out of prefill, the other M - 1 cost a step each."""
    return [prefill_step(prompt), *(decode_step(prompt + i) for i in range(1, new_tokens))]


def recompute_steps(prompt: int, new_tokens: int) -> list[Step]:
    """The same request without a cache: every new token is a prefill of everything before it."""
    return [prefill_step(prompt + i) for i in range(new_tokens)]


def static_batch_steps(lengths: Sequence[int], slots: int) -> int:
    """Decode steps if `slots` requests start together and the next ones wait for the slowest of them.

    `lengths` are decode steps per request, in order of arrival. Raises `ConfigError` for less than one slot.
    """
    _check_slots(slots)
    return sum(max(lengths[start : start + slots]) for start in range(0, len(lengths), slots))


def continuous_batch_steps(lengths: Sequence[int], slots: int) -> int:
    """Decode steps if every free slot takes the next request at once (Orca, Yu et al. 2022).

    Never fewer than the longest request, nor than all work spread evenly over the slots.
    """
    _check_slots(slots)
    free_at = [0] * slots
    heapify(free_at)
    for length in lengths:
        heapreplace(free_at, free_at[0] + length)
    return max(free_at)


def _check_slots(slots: int) -> None:
    if slots < 1:
        raise ConfigError(f"slots={slots!r} is not possible: it must be at least 1.")
