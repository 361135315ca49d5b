"""Pairs and keys of tiles, against the mask itself."""

from __future__ import annotations

from minillm.attention.reference import visible
from minillm.costs.formulas import visible_pairs
from minillm.course.lessons.tiles import tiled_keys, tiled_pairs


def test_tiles_are_those_of_the_mask() -> None:
    """A tile of queries computes, and reads, the columns in which its part of the mask is not empty."""
    for q_len, kv_len, window in ((7, 7, None), (5, 12, None), (12, 12, 4), (6, 15, 5)):
        for q_tile in (1, 2, 3, 5, 100):
            parts = visible(q_len, kv_len, window).split(q_tile)
            keys = [int(part.any(0).sum()) for part in parts]
            assert tiled_keys(q_len, kv_len, window, q_tile) == sum(keys)
            pairs = sum(len(part) * n for part, n in zip(parts, keys, strict=True))
            assert tiled_pairs(q_len, kv_len, window, q_tile) == pairs


def test_high_tiles_trade_flops_for_bytes() -> None:
    """One query per tile: no pair in vain, all keys again and again. All queries in one: the other way round."""
    n = 512
    assert tiled_pairs(n, n, None, 1) == visible_pairs(n, n) == n * (n + 1) // 2
    assert tiled_keys(n, n, None, 1) == n * (n + 1) // 2
    assert (tiled_pairs(n, n, None, n), tiled_keys(n, n, None, n)) == (n * n, n)
