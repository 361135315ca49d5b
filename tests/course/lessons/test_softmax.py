"""What an observer of the tiles sees; parts of the keys that are joined; and wrong ways to join them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from minillm.attention.tiled import tiled_attention
from minillm.course.lessons import softmax
from minillm.course.lessons.softmax import TileStep, TileSteps, merge
from tests.attention.cases import Case, check, exact_attention, expected, mutant


def parts_of(case: Case, cuts: list[int]) -> tuple[Tensor, Tensor]:
    """The last queries of `case` over disjoint parts of its keys, which all of them see."""
    q, k, v = case.tensors(torch.float64)
    outs, lses = [], []
    for start, stop in zip([0, *cuts], [*cuts, case.kv_len], strict=True):
        part = Case(1, stop - start, case.heads, case.kv_heads, case.d)
        out, lse = exact_attention(q, k[:, start:stop], v[:, start:stop], part)
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)


def run_merge(module: ModuleType, spread: float, cuts: list[int]) -> None:
    case = Case(1, 90, heads=6, kv_heads=2, spread=spread)
    wanted, wanted_lse = expected(case, torch.float64)
    out, lse = module.merge(*parts_of(case, cuts))
    check(out, wanted, case, torch.float64)
    check(lse, wanted_lse, case, torch.float64, "log-sum-exp")


@pytest.mark.parametrize("spread", [1.0, 3e3])
@pytest.mark.parametrize("cuts", [[], [45], [0, 1, 2], [30, 30, 60, 90], [90]])
def test_parts_merge_to_the_whole(cuts: list[int], spread: float) -> None:
    """Any split, empty parts among them."""
    run_merge(softmax, spread, cuts)


def test_merging_nothing_with_nothing_is_nothing() -> None:
    out, lse = merge(torch.zeros(3, 2, 4), torch.full((3, 2), float("-inf")))
    assert (out == 0).all() and (lse == float("-inf")).all()


def test_the_observer_sees_every_tile_and_every_running_value() -> None:
    case = Case(40, 70, heads=6, kv_heads=2)
    q, k, v = case.tensors(torch.float64)
    steps = TileSteps()
    tiled_attention(q, k, v, scale=case.scale, q_tile=16, kv_tile=32, observer=steps)
    keys = [(step.queries.start, step.keys) for step in steps]
    assert keys == [
        (0, range(0, 32)), (0, range(32, 46)),
        (16, range(0, 32)), (16, range(32, 62)),
        (32, range(0, 32)), (32, range(32, 64)), (32, range(64, 70)),
    ]  # fmt: skip
    for step in steps:
        seen = naive_scores(case, step)
        m = seen.amax(-1)
        weights = (seen - m[..., None]).exp()
        torch.testing.assert_close(step.m, m)
        torch.testing.assert_close(step.l, weights.sum(-1))
        torch.testing.assert_close(step.out, weights @ v.repeat_interleave(3, 0)[:, : step.keys.stop])


def naive_scores(case: Case, step: TileStep) -> Tensor:
    """Scaled scores `[heads, queries, keys]` of all keys that the running values cover so far."""
    q, k, _ = case.tensors(torch.float64)
    rows = q[step.queries.start : step.queries.stop].transpose(0, 1)
    scores = rows @ k.repeat_interleave(case.heads // case.kv_heads, 0).transpose(1, 2) * case.scale
    position = torch.tensor(step.queries)[:, None] + case.kv_len - case.q_len
    return scores.masked_fill(torch.arange(case.kv_len) > position, float("-inf"))[..., : step.keys.stop]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("largest = lses.amax(0)", "largest = torch.zeros_like(lses[0])"),
        ("total.where(total > 0, 1.0)", "len(lses)"),
        ("lses - torch.where(largest.isfinite(), largest, 0.0)", "lses - largest"),
    ],
)
def test_merging_is_checked_too(old: str, new: str, tmp_path: Path) -> None:
    wrong = mutant(softmax, old, new, tmp_path)

    def run() -> None:
        for spread in (1.0, 3e3):
            run_merge(wrong, spread, [0, 30, 30])
        assert wrong.merge(torch.zeros(2, 1, 4), torch.full((2, 1), float("-inf")))[0].isfinite().all()

    with pytest.raises(AssertionError):
        run()
