"""Exercise 12 · KV quantisation: how few bits does a memory need?

Long contexts are limited by the bytes of the KV cache. You store them in 8 and in 4 bits: codes, and the ranges that
give the codes their meaning. The error is known before you start: half a step between two codes.

Lesson: 12_kv_quantization · 50 minutes · difficulty ●●●○○
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """8 bits, one scale per token: x `[..., d]` -> codes int8 `[..., d]`, scale float32 `[...]`.

    The scale is the largest magnitude of the token's d numbers, and code = round(x · 127 / scale), from -127 to 127:
    -128 would have no positive counterpart. A token of zeros has scale 0 and codes 0, not NaN.

    >>> quantize_int8(torch.tensor([[1.0, -2.0, 0.01], [0.0, 0.0, 0.0]]))
    (tensor([[  64, -127,    1],
            [   0,    0,    0]], dtype=torch.int8), tensor([2., 0.]))
    """
    raise NotImplementedError("quantize_int8 is yours to write")


def dequantize_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """What the codes stand for: float32 `[..., d]` from codes `[..., d]` and scale `[...]`. |x - x̂| ≤ scale / 254.

    >>> dequantize_int8(torch.tensor([[127, -127, 0]], dtype=torch.int8), torch.tensor([2.0]))
    tensor([[ 2., -2.,  0.]])
    """
    raise NotImplementedError("dequantize_int8 is yours to write")


def pack_int4(levels: Tensor) -> Tensor:
    """Two levels 0 … 15 in a byte: uint8 `[..., d]` -> uint8 `[..., d / 2]`.

    Channel c goes into the low half of byte c, channel c + d / 2 into its high half.

    >>> pack_int4(torch.tensor([1, 2, 3, 15], dtype=torch.uint8))  # 1 + 3·16, 2 + 15·16
    tensor([ 49, 242], dtype=torch.uint8)
    """
    raise NotImplementedError("pack_int4 is yours to write")


def unpack_int4(packed: Tensor) -> Tensor:
    """What `pack_int4` packed: uint8 `[..., d / 2]` -> uint8 `[..., d]`.

    >>> unpack_int4(torch.tensor([49, 242], dtype=torch.uint8))
    tensor([ 1,  2,  3, 15], dtype=torch.uint8)
    """
    raise NotImplementedError("unpack_int4 is yours to write")


def quantize_int4(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """4 bits, one range per group: x `[..., tokens, d]` -> levels uint8 like x, low and high without dimension `dim`.

    A group is a line along `dim`: -1 makes a range per token, as values have it; -2 a range per channel, as keys need
    it, because a few of their channels are far larger than the others (KIVI, 2024). low and high are the group's
    smallest and largest number, and level = round((x - low) · 15 / (high - low)), from 0 to 15. A group of equal
    numbers has level 0 throughout.

    >>> x = torch.tensor([[0.0, 100.0], [1.0, 400.0]])
    >>> levels, low, high = quantize_int4(x, dim=-2)
    >>> levels, low, high
    (tensor([[ 0,  0],
            [15, 15]], dtype=torch.uint8), tensor([  0., 100.]), tensor([  1., 400.]))
    >>> quantize_int4(x, dim=-1)[0]
    tensor([[ 0, 15],
            [ 0, 15]], dtype=torch.uint8)
    """
    raise NotImplementedError("quantize_int4 is yours to write")


def dequantize_int4(levels: Tensor, low: Tensor, high: Tensor, dim: int) -> Tensor:
    """What the levels stand for, float32. Given: |x - x̂| ≤ (high - low) / 30."""
    low, high = low.unsqueeze(dim), high.unsqueeze(dim)
    return low + levels.float() * (high - low) / 15


def round_fp8(x: Tensor) -> Tensor:
    """The nearest number that 8 bits in the format E4M3 can hold, as float32. Without `torch.float8_e4m3fn`.

    E4M3 has a sign, 4 bits of exponent and 3 of mantissa: between 2^e and 2^(e + 1) its numbers are 2^(e - 3) apart,
    for e from -6 to 8. Below 2^-6 they stay 2^-9 apart, down to 0. The largest is 448: what is larger becomes 448. A
    number halfway between two goes to the even one, as `torch.round` does. Steps grow with the number, so the
    *relative* error is at most 1/16: unlike int8, small numbers beside large ones keep their digits.

    >>> round_fp8(torch.tensor([1.0, 1.06, 1.07, 17.5, -500.0]))
    tensor([   1.0000,    1.0000,    1.1250,   18.0000, -448.0000])
    """
    raise NotImplementedError("round_fp8 is yours to write")
