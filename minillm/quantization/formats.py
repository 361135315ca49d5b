"""How keys and values are stored in fewer bits: codes, and the ranges that give the codes their meaning.

A group of numbers shares one range. What is stored are the *ends* of the range, in bfloat16 and rounded outwards, not
the step between two codes: so no number lies outside, nothing is clipped, and the ends themselves come back exactly
where the model's dtype has no more than bfloat16's digits. Zeros come back as zeros, constants as constants.

| format | keys and values alike |
|---|---|
| int8 | -127 … 127 times scale / 127, a scale per token and head |
| fp8 | float8_e4m3fn times scale / 448, a scale per token and head |
| int4 | low + 0 … 15 times (high - low) / 15, per token, head and group of 32 channels |

`scale` is the largest magnitude of its group: a unit scale would clip what exceeds 448 and lose what is small.

Keys of trained models have a few channels that are much larger than all others. With one range for a whole token they
take up the codes of all other channels. A range per channel costs nobody anything (KIVI, arXiv:2402.02750), but it is
known only when a whole block of tokens is there, so the newest keys must be kept exactly somewhere, and everything
that takes tokens back or goes on from the middle of a block has to know of it. Groups of channels are the middle way:
a large channel spoils the codes of 31 others instead of all, and a token is stored by itself, at once.

Shapes in a cache, with `[kv_heads, num_blocks, block_size]` in front:

    int8, fp8    codes [.., d] int8 or float8_e4m3fn, scale [..]
    int4         codes [.., d / 2] uint8, low and high [.., groups]

Two codes of 4 bits share a byte: channel c in the low half, channel c + d / 2 in the high half, so that unpacking
gives two contiguous pieces. These tensors are all that reading needs: the type of the codes tells the format, and the
number of ranges the size of the groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

RANGE = torch.bfloat16  # of the ends of a range: 16 bits, and it overflows where float32 does
GROUP = 32  # channels of int4 that share a range, at most


class Codec(Protocol):
    """Turns numbers `[..., d]` into codes and the ends of their ranges, and back into float32; token by token."""

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Codes `[..., d or d / 2]` and ranges: `[...]` or `[..., groups]` each."""
        ...

    def decode(self, codes: Tensor, *ranges: Tensor) -> Tensor:
        """What the codes stand for, `[..., d]` in float32."""
        ...


@dataclass(frozen=True)
class PerToken8:
    """8 bits, symmetric: code · scale / largest. One scale per token, the largest magnitude of its d numbers.

    int8 leaves out -128, which has no positive counterpart: |x - x̂| ≤ scale / 254.
    """

    dtype: torch.dtype
    largest: float  # code

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[..., d]` -> codes `[..., d]`, scale `[...]`."""
        x = x.float()
        scale = round_up(x.abs().amax(-1))
        levels = x * self.largest / _divisor(scale)[..., None]
        return (levels if self.dtype.is_floating_point else levels.round()).to(self.dtype), scale

    def decode(self, codes: Tensor, *ranges: Tensor) -> Tensor:
        """Multiplies before it divides: then the largest code gives back exactly the scale."""
        (scale,) = ranges
        return codes.float() * scale.float()[..., None] / self.largest


@dataclass(frozen=True)
class Int4:
    """4 bits, asymmetric: low + code · (high - low) / 15, so |x - x̂| ≤ (high - low) / 30.

    Channels that follow each other share a range: as few groups as hold at most `group` channels each, all of the same
    size but for the last one, which may be smaller.
    """

    group: int = GROUP

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[..., d]` -> codes `[..., d / 2]`, low and high `[..., groups]`."""
        x = x.float()
        parts = x.split(group_size(x.shape[-1], self.group), dim=-1)
        low = -round_up(torch.stack([-part.amin(-1) for part in parts], dim=-1))
        high = round_up(torch.stack([part.amax(-1) for part in parts], dim=-1))
        bottom, top = spread(low, x.shape[-1]), spread(high, x.shape[-1])
        levels = (x - bottom) * 15 / _divisor(top - bottom)
        return pack(levels.round().to(torch.uint8)), low, high

    def decode(self, codes: Tensor, *ranges: Tensor) -> Tensor:
        """Multiplies before it divides: then code 15 gives back exactly `high`. Ranges tell the size of groups."""
        low, high = (spread(end, 2 * codes.shape[-1]) for end in ranges)
        return low + unpack(codes).float() * (high - low) / 15


def group_size(d: int, largest: int) -> int:
    """Channels per group: `largest` where that divides d, else what makes the groups about equal (80: 27, 27, 26)."""
    groups = -(-d // largest)
    return -(-d // groups)


def spread(ends: Tensor, d: int) -> Tensor:
    """Ends of ranges `[..., groups]` for each of d channels: `[..., d]` in float32."""
    return ends.float().repeat_interleave(-(-d // ends.shape[-1]), dim=-1)[..., :d]


def round_up(x: Tensor) -> Tensor:
    """float32 to the next number of type `RANGE` that is not smaller."""
    near = x.to(RANGE)
    return torch.where(near < x, torch.nextafter(near, torch.full_like(near, torch.inf)), near)


def _divisor(width: Tensor) -> Tensor:
    """A range without width belongs to numbers that are all alike: any divisor gives code 0."""
    return width.float().where(width > 0, 1.0)


def pack(levels: Tensor) -> Tensor:
    """uint8 0 … 15 `[..., d]` -> `[..., d / 2]`: channel c in the low half of a byte, c + d / 2 in its high half."""
    low, high = levels.chunk(2, dim=-1)
    return low | high << 4


def unpack(codes: Tensor) -> Tensor:
    """What `pack` packed, `[..., d / 2]` -> `[..., d]`."""
    return torch.cat([codes & 15, codes >> 4], dim=-1)


FORMATS: Mapping[str, Codec] = {
    "fp8": PerToken8(torch.float8_e4m3fn, 448.0),
    "int8": PerToken8(torch.int8, 127.0),
    "int4": Int4(),
}
_BY_TYPE = {torch.float8_e4m3fn: FORMATS["fp8"], torch.int8: FORMATS["int8"], torch.uint8: FORMATS["int4"]}


def element_bytes(name: str, head_dim: int) -> float:
    """Bytes per element of keys and values in a format, ranges included.

    In 8 bits a token's head_dim elements share a scale. In int4 at most `GROUP` of them share a range, whose ends are
    two numbers.
    """
    bits, ends = (4, 2 * -(-head_dim // GROUP)) if name == "int4" else (8, 1)
    return (bits + 8 * RANGE.itemsize * ends / head_dim) / 8


def decode(codes: Tensor, *ranges: Tensor) -> Tensor:
    """What codes of any format stand for, in float32: their type says which format it is."""
    return _BY_TYPE[codes.dtype].decode(codes, *ranges)
