"""How keys and values are stored in fewer bits: codes, and the ranges that give the codes their meaning.

A group of numbers shares one range. What is stored are the *ends* of the range, in bfloat16 and rounded outwards, not
the step between two codes: so no number lies outside, nothing is clipped, and the ends themselves come back exactly
where the model's dtype has no more than bfloat16's digits. Zeros come back as zeros, constants as constants.

| format | keys | values |
|---|---|---|
| int8 | -127 … 127 times scale / 127, a scale per token and head | the same |
| fp8 | float8_e4m3fn times scale / 448, a scale per token and head | the same |
| int4 | low + 0 … 15 times (high - low) / 15, per channel of a block | the same, per token and head |

`scale` is the largest magnitude of its group: a unit scale would clip what exceeds 448 and lose what is small.
Keys of trained models have a few channels that are much larger than all others. With a range per token they would eat
up the codes of all other channels; with a range per channel they cost nobody anything (KIVI, arXiv:2402.02750). But
then a block must be complete before it can be quantised: see `minillm.quantization.tails` for what happens until then.

Shapes of a pool, `[kv_heads, num_blocks, ...]` all of them, so that whatever a block consists of is copied alike:

    int8, fp8         codes [.., block_size, d] int8 or float8_e4m3fn, scale [.., block_size]
    int4, values      codes [.., block_size, d / 2] uint8, low and high [.., block_size]
    int4, keys        codes [.., block_size, d / 2] uint8, low and high [.., d]

Two codes of 4 bits share a byte: channel c in the low half, channel c + d / 2 in the high half, so that unpacking
gives two contiguous pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from minillm.errors import ConfigError

RANGE = torch.bfloat16  # of the ends of a range: 16 bits, and it overflows where float32 does


class Codec(Protocol):
    """Turns numbers `[..., tokens, d]` into codes and the ends of their ranges, and back into float32."""

    @property
    def by_block(self) -> bool:
        """Whether a group is a channel of a block, so that only complete blocks can be encoded."""
        ...

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Codes `[..., tokens, d or d / 2]` and ranges, `[..., tokens]` or `[..., d]` each."""
        ...

    def decode(self, codes: Tensor, *ranges: Tensor) -> Tensor:
        """What the codes stand for, `[..., tokens, d]` in float32."""
        ...


@dataclass(frozen=True)
class PerToken8:
    """8 bits, symmetric: code · scale / largest. One scale per token, the largest magnitude of its d numbers.

    int8 leaves out -128, which has no positive counterpart: |x - x̂| ≤ scale / 254.
    """

    dtype: torch.dtype
    largest: float  # code
    by_block = False

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

    dim -1: a range per token. dim -2: a range per channel of a block.
    """

    dim: int

    @property
    def by_block(self) -> bool:
        return self.dim == -2

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[..., tokens, d]` -> codes `[..., tokens, d / 2]`, low and high without dimension `dim`."""
        x = x.float()
        low, high = -round_up(-x.amin(self.dim)), round_up(x.amax(self.dim))
        width = _divisor(high.float() - low.float()).unsqueeze(self.dim)
        levels = (x - low.float().unsqueeze(self.dim)) * 15 / width
        return pack(levels.round().to(torch.uint8)), low, high

    def decode(self, codes: Tensor, *ranges: Tensor) -> Tensor:
        """Multiplies before it divides: then code 15 gives back exactly `high`."""
        low, high = (end.float().unsqueeze(self.dim) for end in ranges)
        return low + unpack(codes).float() * (high - low) / 15


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


@dataclass(frozen=True)
class Format:
    """A format of the KV cache: how its keys are coded, and how its values."""

    name: str
    keys: Codec
    values: Codec

    @property
    def needs_tails(self) -> bool:
        """Whether keys must be kept until their block is complete."""
        return self.keys.by_block

    def block_bytes(self, kv_heads: int, block_size: int, d: int) -> int:
        """Bytes of the codes and ranges of one block in one layer."""
        block = torch.zeros(kv_heads, block_size, d, device="meta")
        return sum(part.nbytes for codec in (self.keys, self.values) for part in codec.encode(block))


FORMATS: Mapping[str, Format] = {
    "fp8": Format("fp8", *[PerToken8(torch.float8_e4m3fn, 448.0)] * 2),
    "int8": Format("int8", *[PerToken8(torch.int8, 127.0)] * 2),
    "int4": Format("int4", keys=Int4(dim=-2), values=Int4(dim=-1)),
}


def get_format(name: str) -> Format | None:
    """The format of this name; None for "auto", the model's own dtype. Raises `ConfigError` for an unknown one."""
    if name not in ("auto", *FORMATS):
        raise ConfigError(f"kv_format={name!r} is unknown. Choose one of: auto, {', '.join(FORMATS)}.")
    return FORMATS.get(name)


class QuantizedPool:
    """The keys or the values of one layer, as a codec stores them: `tensors`, each `[kv_heads, num_blocks, ...]`."""

    def __init__(self, codec: Codec, shape: tuple[int, int, int, int], device: torch.device) -> None:
        self.codec = codec
        kv_heads, num_blocks, block_size, d = shape
        parts = codec.encode(torch.zeros(1, 1, block_size, d, device=device))
        self.tensors = tuple(part.new_zeros(kv_heads, num_blocks, *part.shape[2:]) for part in parts)

    def write(self, x: Tensor, slots: Tensor) -> None:
        """Encode tokens `[num_tokens, kv_heads, d]` into their slots. Not for codecs that go by block."""
        for pool, part in zip(self.tensors, self.codec.encode(x.transpose(0, 1)), strict=True):
            as_bytes(pool).flatten(1, 2).index_copy_(1, slots, as_bytes(part))

    def write_blocks(self, x: Tensor, blocks: Tensor) -> None:
        """Encode whole blocks `[kv_heads, n, block_size, d]`."""
        for pool, part in zip(self.tensors, self.codec.encode(x), strict=True):
            as_bytes(pool).index_copy_(1, blocks, as_bytes(part))

    def read(self, blocks: Tensor) -> Tensor:
        """Decode these blocks `[n]`: `[kv_heads, n, block_size, d]` in float32."""
        parts = (as_bytes(pool).index_select(1, blocks.to(pool.device)).view(pool.dtype) for pool in self.tensors)
        return self.codec.decode(*parts)


def as_bytes(x: Tensor) -> Tensor:
    """Codes as plain bytes: many operators do not know float8."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x
