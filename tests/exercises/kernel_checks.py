"""What the kernels of exercise 07 compute, in Triton's interpreter: see `test_solutions_agree`."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from minillm.attention.tiled import tiled_attention
from minillm.course.lessons.softmax import merge
from tests.exercises.solutions import solution


def heads(q_len: int, kv_len: int, d: int = 16, group: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(q_len * kv_len)
    q = torch.randn(q_len, 2 * group, d, generator=generator)
    return q, *torch.randn(2, 2, kv_len, d, generator=generator)


@pytest.mark.parametrize("columns", [1, 7, 64])
def test_softmax(columns: int) -> None:
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(columns)) * 50
    assert_close(solution("ex07").softmax(x), x.softmax(-1))


@pytest.mark.parametrize("q_len, kv_len, group", [(1, 1, 1), (17, 17, 2), (5, 40, 3), (33, 50, 1)])
def test_attention(q_len: int, kv_len: int, group: int) -> None:
    q, k, v = heads(q_len, kv_len, group=group)
    assert_close(solution("ex07").attention(q, k, v, 0.3), tiled_attention(q, k, v, scale=0.3)[0])


@pytest.mark.parametrize("kv_len, splits", [(1, 1), (40, 1), (40, 3), (5, 9)])
def test_split_decode(kv_len: int, splits: int) -> None:
    q, k, v = heads(1, kv_len, d=32)
    outs, lses, merged = solution("ex07").split_decode(q[0], k, v, 0.3, splits)
    want, lse = tiled_attention(q, k, v, scale=0.3)
    assert_close(merged, want[0])
    assert_close(merge(outs, lses), (want[0], lse[0]))
