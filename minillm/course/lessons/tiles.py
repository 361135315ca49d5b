"""What tiles of queries cost in attention: pairs that are computed, keys that are read. Chapter 6 chooses between them.

`minillm.costs.formulas.visible_pairs` and `keys_seen` are the two ends: what must be computed, and read, at least.
"""

from __future__ import annotations

from collections.abc import Iterator

from minillm.costs.formulas import keys_seen


def tiled_pairs(q_len: int, kv_len: int, window: int | None = None, q_tile: int = 1) -> int:
    """Pairs that attention computes if `q_tile` queries share the keys that at least one of them sees.

    Tiles of one query compute what is visible; one tile of all queries computes the whole rectangle.
    """
    return sum(rows * keys for rows, keys in _tiles(q_len, kv_len, window, q_tile))


def tiled_keys(q_len: int, kv_len: int, window: int | None = None, q_tile: int = 1) -> int:
    """Keys that the same tiles read: what high tiles compute in vain, they save in traffic."""
    return sum(keys for _, keys in _tiles(q_len, kv_len, window, q_tile))


def _tiles(q_len: int, kv_len: int, window: int | None, q_tile: int) -> Iterator[tuple[int, int]]:
    """Queries of each tile, and keys that at least one of them sees."""
    for start in range(0, q_len, q_tile):
        rows = min(q_tile, q_len - start)
        yield rows, keys_seen(rows, kv_len - q_len + start + rows, window)
