"""Exercise 07 · GPU kernels: how does the tile loop become a kernel?

You write three Triton kernels: a softmax, the tiled attention of exercise 06, and its decode version, which shares the
keys of one query among several programs. A kernel is the body of a loop: the grid starts one *program* per iteration,
and all of them run at the same time. Without a GPU they run in Triton's interpreter (set TRITON_INTERPRET=1 before
Python starts), slowly, but number for number.

What you need of Triton: `tl.program_id(axis)` is the loop variable; `tl.arange(0, N)` a tile of indices, N a power of
two; `tl.load(pointers, mask, other)` and `tl.store(pointers, values, mask)` read and write memory at a whole tile of
addresses; `tl.dot`, `tl.max`, `tl.sum`, `tl.exp`, `tl.where` compute. All tensors are contiguous, so element (i, j) of
a `[.., n]` matrix lies at `pointer + i * n + j`.

Lesson: 07_gpu_kernels · 75 minutes · difficulty ●●●●○
"""

# ruff: noqa: E741
# mypy: disable-error-code="no-untyped-def,arg-type,var-annotated"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def softmax_kernel(x_ptr, out_ptr, num_columns, COLUMNS: tl.constexpr):
    """One program per row: out = softmax(x), x and out `[rows, num_columns]` float32.

    COLUMNS is `num_columns` rounded up to a power of two. Mask the columns that do not exist, and read them as -inf,
    so that they weigh nothing. Take the row's maximum off before exp.
    """
    raise NotImplementedError("softmax_kernel is yours to write")


def softmax(x: Tensor) -> Tensor:
    """Softmax of each row of x `[rows, columns]` float32. Given: it starts your kernel, one program per row.

    softmax(torch.tensor([[0.0, 0.0]])) is [[0.5, 0.5]].
    """
    rows, columns = x.shape
    x, out = x.contiguous(), torch.empty_like(x)
    softmax_kernel[(rows,)](x, out, columns, COLUMNS=triton.next_power_of_2(columns))
    return out


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, q_len, kv_len, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (i, h): queries i·TILE … i·TILE + TILE - 1 of query head h, over all keys that they see.

    q and out `[q_len, HEADS, D]`, k and v `[kv_heads, kv_len, D]`, float32; head h reads key/value head h // GROUP. D
    and TILE are powers of two of at least 16. Query i stands at position `kv_len - q_len + i`.

    Keep m `[TILE]` (begin with -inf), l `[TILE]` and out `[TILE, D]` (begin with 0) and fold in one tile of keys after
    the other, as `online_step` does. Stop behind the last key that a query of this tile sees. In `tl.dot`, say
    `input_precision="ieee"`: a GPU would otherwise round the inputs. kv_len is at least q_len: each query sees a key.
    """
    raise NotImplementedError("attention_kernel is yours to write")


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, tile: int = 16) -> Tensor:
    """Causal attention: q `[q_len, heads, d]`, k and v `[kv_heads, kv_len, d]` -> like q. Given: starts your kernel.

    One program per tile of queries and query head. d is a power of two of at least 16.
    """
    q_len, heads, d = q.shape
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(q_len, tile), heads)
    attention_kernel[grid](
        q.float().contiguous(), k.float().contiguous(), v.float().contiguous(), out, q_len, k.shape[1], scale,
        HEADS=heads, GROUP=heads // k.shape[0], D=d, TILE=tile,
    )  # fmt: skip
    return out.to(q.dtype)


@triton.jit
def split_kernel(
    q_ptr, k_ptr, v_ptr, outs_ptr, lses_ptr, kv_len, split_len, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (s, h): one query of head h over the keys s·split_len … (s + 1)·split_len - 1 only.

    A decode step has one query per sequence: one program for each head would leave most of a GPU idle, so the keys are
    split and each part gets a program of its own (Flash-Decoding). Writes the part's output to outs
    `[splits, HEADS, D]` and its log-sum-exp m + log l to lses `[splits, HEADS]`; merging them is done for you.

    q `[HEADS, D]`, k and v `[kv_heads, kv_len, D]`, float32. The query sees all kv_len keys, so there is no causal
    rule: only the split's end and kv_len bound the keys. Each split has at least one key. With one query there is no
    matrix: the scores of a tile are `tl.sum(q[None, :] * k, axis=1)`, and m and l are single numbers.
    """
    raise NotImplementedError("split_kernel is yours to write")


def split_decode(
    q: Tensor, k: Tensor, v: Tensor, scale: float, splits: int, tile: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    """One query: q `[heads, d]`, k and v `[kv_heads, kv_len, d]` -> outs `[splits, heads, d]`, lses, merged out.

    Given: it starts your kernel, one program per split and head, and joins the parts by their log-sum-exp. There may
    be fewer splits than asked for: each gets at least one key.
    """
    heads, d = q.shape
    kv_len = k.shape[1]
    split_len = triton.cdiv(kv_len, splits)
    splits = triton.cdiv(kv_len, split_len)
    outs, lses = q.new_empty(splits, heads, d, dtype=torch.float32), q.new_empty(splits, heads, dtype=torch.float32)
    split_kernel[(splits, heads)](
        q.float().contiguous(), k.float().contiguous(), v.float().contiguous(), outs, lses, kv_len, split_len, scale,
        HEADS=heads, GROUP=heads // k.shape[0], D=d, TILE=tile,
    )  # fmt: skip
    return outs, lses, (lses.softmax(dim=0)[..., None] * outs).sum(dim=0)
