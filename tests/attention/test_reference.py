"""The textbook form against its definition, and the causal rule by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minillm.attention import reference as naive
from minillm.attention.reference import masked_attention, naive_attention, visible
from tests.attention.cases import CASES, Case, check, expected, mutant


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_naive_is_the_definition(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    q, k, v = case.tensors(dtype)
    out = naive_attention(q, k, v, scale=case.scale, sliding_window=case.window)
    if dtype != torch.bfloat16 or case.spread == 1:
        check(out, expected(case, dtype)[0], case, dtype)
    assert out.dtype == dtype and out.isfinite().all()


def test_the_causal_rule_is_aligned_bottom_right() -> None:
    assert visible(2, 5).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert visible(3, 2).int().tolist() == [[0, 0], [1, 0], [1, 1]]


def test_a_window_counts_the_token_itself() -> None:
    assert visible(2, 5, 2).int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert visible(1, 3, 1).int().tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("name", CASES)
def test_rows_of_the_map_sum_to_one_or_to_zero(name: str) -> None:
    case = CASES[name]
    mask = visible(case.q_len, case.kv_len, case.window)
    _, weights = masked_attention(*case.tensors(torch.float64), mask, scale=case.scale)
    blind = max(0, case.q_len - case.kv_len)
    assert weights.shape == (case.heads, case.q_len, case.kv_len)
    assert (weights[:, :blind] == 0).all()
    torch.testing.assert_close(weights[:, blind:].sum(-1), torch.ones(case.heads, case.q_len - blind).double())


def test_what_comes_later_changes_nothing() -> None:
    case = Case(6, 6)
    q, k, v = case.tensors(torch.float32)
    before = naive_attention(q, k, v, scale=case.scale)
    k[:, 4:], v[:, 4:] = 7.0, float("nan")
    after = naive_attention(q[:4], k[:, :4], v[:, :4], scale=case.scale)
    assert torch.equal(before[:4], after)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mask = key <= position", "mask = key < position"),
        ("range(kv_len - q_len, kv_len)", "range(q_len)"),
        ("key > position - sliding_window", "key >= position - sliding_window"),
        ("* scale)", "* scale**2)"),
        ("softmax(dim=-1)", "softmax(dim=-2)"),
        ("k.repeat_interleave(group, 0)", "k.repeat(group, 1, 1)"),
    ],
)
def test_the_oracle_rejects(old: str, new: str, tmp_path: Path) -> None:
    wrong = mutant(naive, old, new, tmp_path)

    def run() -> None:
        for case in CASES.values():
            tensors = case.tensors(torch.float64)
            out = wrong.naive_attention(*tensors, scale=case.scale, sliding_window=case.window)
            check(out, expected(case, torch.float64)[0], case, torch.float64)

    with pytest.raises(AssertionError):
        run()
