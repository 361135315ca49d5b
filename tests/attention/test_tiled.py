"""Tiles of any size against the definition; the log-sum-exp; which tiles are computed; and wrong versions."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.attention import reference, tiled
from minillm.attention.reference import naive_attention
from minillm.attention.tiled import tiled_attention
from tests.attention.cases import CASES, Case, check, expected, mutant

TILES = [(256, 256), (16, 32), (7, 5)]


def run_tiled(module: ModuleType, case: Case, dtype: torch.dtype, q_tile: int, kv_tile: int) -> None:
    tensors = case.tensors(dtype)
    out, lse = module.tiled_attention(
        *tensors, scale=case.scale, sliding_window=case.window, q_tile=q_tile, kv_tile=kv_tile
    )
    wanted, wanted_lse = expected(case, dtype)
    check(out, wanted, case, dtype)
    check(lse, wanted_lse, case, dtype, "log-sum-exp")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("q_tile", "kv_tile"), TILES)
@pytest.mark.parametrize("name", CASES)
def test_tiled_is_the_definition(name: str, q_tile: int, kv_tile: int, dtype: torch.dtype) -> None:
    run_tiled(tiled, CASES[name], dtype, q_tile, kv_tile)


@pytest.mark.parametrize("name", ["one query", "square", "fully masked rows", "window of one"])
def test_tiles_of_one(name: str) -> None:
    run_tiled(tiled, CASES[name], torch.float64, 1, 1)


@settings(max_examples=100, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    q_len=st.integers(0, 40),
    kv_len=st.integers(0, 60),
    d=st.integers(1, 70),
    window=st.none() | st.integers(1, 70),
    tiles=st.tuples(st.integers(1, 50), st.integers(1, 70)),
    spread=st.sampled_from([0.0, 1.0, 1e4]),
    seed=st.integers(0, 2**20),
)
def test_any_shape(
    kv_heads: int,
    group: int,
    q_len: int,
    kv_len: int,
    d: int,
    window: int | None,
    tiles: tuple[int, int],
    spread: float,
    seed: int,
) -> None:
    run_tiled(tiled, Case(q_len, kv_len, kv_heads * group, kv_heads, d, window, spread, seed), torch.float64, *tiles)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.spread == 1])
def test_bfloat16_errs_no_more_than_twice_the_textbook_form(name: str) -> None:
    case = CASES[name]
    q, k, v = case.tensors(torch.bfloat16)
    wanted, _ = expected(case, torch.bfloat16)
    out, _ = tiled_attention(q, k, v, scale=case.scale, sliding_window=case.window)
    check(out, wanted, case, torch.bfloat16)
    textbook = naive_attention(q, k, v, scale=case.scale, sliding_window=case.window)
    error, allowed = ((x - wanted).square().sum().sqrt().item() for x in (out, textbook))
    assert error <= 2 * allowed, case


def test_strided_keys_and_queries_give_the_same() -> None:
    case = Case(30, 50, heads=6, kv_heads=2)
    q, k, v = case.tensors(torch.float32)
    fused = torch.cat([q, torch.zeros(30, 4, 64)], dim=1)[:, :6]
    k_wide, v_wide = (torch.cat([x, x], dim=1)[:, :50] for x in (k, v))
    plain, _ = tiled_attention(q, k, v, scale=case.scale)
    strided, _ = tiled_attention(fused, k_wide, v_wide, scale=case.scale)
    assert torch.equal(plain, strided)


def _note(tiles: list[object], *seen: object) -> None:
    tiles.append(seen)


def test_tiles_that_the_rule_hides_are_never_computed() -> None:
    """A causal square of 8 x 8 tiles computes 36 of them; a window of 16 keys leaves at most 3 per row."""
    case = Case(128, 128)
    q, k, v = case.tensors(torch.float32)
    for window, allowed in ((None, 36), (16, 2 * 8)):
        tiles: list[object] = []
        observe = partial(_note, tiles)
        tiled_attention(q, k, v, scale=1.0, sliding_window=window, q_tile=16, kv_tile=16, observer=observe)
        assert 0 < len(tiles) <= allowed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.out.mul_(rescale).add_(weighted)", "self.out.add_(weighted)"),
        ("self.l.mul_(rescale).add_(", "self.l.add_("),
        ("1), NEG_INF, dtype=self.accumulator)", "1), 0.0, dtype=self.accumulator)"),
        ("offset = kv_len - q_len", "offset = 0"),
        ("min(start + kv_tile, positions.stop))", "max(start + 1, min(start + kv_tile, positions.stop - 1)))"),
        ("base = m.where(m > NEG_INF, 0.0)", "base = m"),
        ("self.l.where(self.l > 0, 1.0)", "self.l"),
        ("(self.m + self.l.log2()) * LN2", "self.m + self.l.log2()"),
        ("keys.stop <= positions.start + 1 and", "keys.stop <= positions.stop and"),
    ],
)
def test_the_oracle_rejects(old: str, new: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        run_all(mutant(tiled, old, new, tmp_path))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("tile_mask", "key <= position", "key < position"),
        ("tile_mask", "key > position - sliding_window", "key >= position - sliding_window"),
        ("oldest_key", "q_len - sliding_window + 1", "q_len - sliding_window + 2"),
    ],
)
def test_a_wrong_rule_is_found(name: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, name, getattr(mutant(reference, old, new, tmp_path), name))
    with pytest.raises(AssertionError):
        run_all(tiled)


def run_all(module: ModuleType) -> None:
    for case in sorted(CASES.values(), key=lambda case: case.q_len > case.kv_len):
        run_tiled(module, case, torch.float64, 16, 32)
