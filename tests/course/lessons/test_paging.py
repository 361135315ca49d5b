"""What blocks waste: the allocator's count against plain arithmetic, and the formula where it applies."""

from __future__ import annotations

import random
from statistics import fmean

import pytest

from minillm.cache.blocks import BlockPool
from minillm.course.lessons.paging import measure_paging
from minillm.errors import ConfigError


def check(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 200) for _ in range(rng.randint(1, 60))]
    block, places = rng.choice([1, 3, 16, 64, 256]), rng.randint(300, 3000)
    found = measure_paging(lengths, block, places)
    blocks = [(length + block - 1) // block for length in lengths]
    assert found.num_blocks == sum(blocks), f"{seed=}"
    assert found.waste == pytest.approx(fmean(block * n - length for n, length in zip(blocks, lengths, strict=True)))
    assert found.waste_share == pytest.approx(1 - sum(lengths) / (block * sum(blocks))), f"{seed=}"
    left, fit = places // block, 0
    while left >= blocks[fit % len(blocks)]:
        left -= blocks[fit % len(blocks)]
        fit += 1
    assert found.num_fit == fit, f"{seed=}"


def test_counts_are_plain_arithmetic() -> None:
    start = random.randrange(2**32)
    for seed in range(start, start + 30):
        check(seed)


def test_half_a_block_is_wasted_where_lengths_end_anywhere() -> None:
    lengths = list(range(1, 16 * 64 + 1))
    found = measure_paging(lengths, 16, 10_000)
    assert found.waste == found.waste_predicted == 7.5
    assert found.fit_predicted == 10_000 / (fmean(lengths) + 7.5)


def test_one_block_each_wastes_what_the_longest_could_have_used() -> None:
    found = measure_paging([10, 30, 50], 100, 1000)
    assert found.waste == found.waste_predicted == 70
    assert found.num_fit == found.fit_predicted == 10


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_no_lengths_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ConfigError, match="length"):
        measure_paging(lengths, 16, 1000)


def test_the_check_notices_an_allocator_that_always_adds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockPool, "blocks_for", lambda self, n: n // self.block_size + 1)
    with pytest.raises(AssertionError):
        for seed in range(10):
            check(seed)
