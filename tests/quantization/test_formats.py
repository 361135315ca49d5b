"""Codes and ranges: what comes back, how far it is off, what it weighs, and what it does to attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from minillm.attention.reference import naive_attention
from minillm.quantization import formats
from minillm.quantization.formats import FORMATS, Codec, Int4
from tests.attention.cases import mutant

CODECS = {"int8": FORMATS["int8"], "int4": FORMATS["int4"], "int4 per token": Int4(10**6), "int4 by 5": Int4(5)}
WIDTHS = [64, 16, 80, 34]  # head sizes: a multiple of a group, less than one, and no multiple


def numbers(seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`[2, 5, 8, d]`: tokens and channels of very different sizes, some far from 0; all of it exact in `dtype`."""
    generator, d = torch.Generator().manual_seed(seed), WIDTHS[seed % 4]
    x = torch.randn(2, 5, 8, d, generator=generator)
    x = x * torch.randn(5, 8, 1, generator=generator).mul(2).exp() * torch.randn(d, generator=generator).exp()
    return (x + 3 * torch.randn(d, generator=generator) * (seed // 4 % 2)).to(dtype)


def levels_of(codes: Tensor) -> Tensor:
    """Codes as numbers in float64; those of 4 bits one by one, as the docstring of the module lays them out."""
    if codes.dtype != torch.uint8:
        return codes.double()
    half = codes.shape[-1]
    return torch.stack([codes[..., c % half] >> 4 * (c >= half) & 15 for c in range(2 * half)], dim=-1).double()


def groups_of(d: int, largest: int) -> list[list[int]]:
    """The channels that share a range, by definition: as few groups as can be, of about the same size."""
    count = next(n for n in range(1, d + 1) if n * largest >= d)
    size = next(n for n in range(1, d + 1) if n * count >= d)
    return [list(range(start, min(start + size, d))) for start in range(0, d, size)]


def test_how_channels_are_grouped() -> None:
    for d, sizes in ((64, [32, 32]), (128, [32] * 4), (80, [27, 27, 26]), (16, [16]), (34, [17, 17]), (33, [17, 16])):
        assert [len(group) for group in groups_of(d, 32)] == sizes
        assert Int4().encode(torch.zeros(1, 2 * (d // 2)))[1].shape == (1, len(groups_of(2 * (d // 2), 32)))


def ends_of(x: Tensor, ranges: tuple[Tensor, ...], largest: int) -> tuple[Tensor, Tensor, int]:
    """What code 0 stands for, how far the last code is from there, and its number; float64, for each number of x."""
    if len(ranges) == 1:
        scale = ranges[0].double()[..., None].expand(x.shape)
        return torch.zeros_like(scale), scale, 127
    ends = torch.zeros(2, *x.shape, dtype=torch.float64)
    assert ranges[0].shape[-1] == len(groups_of(x.shape[-1], largest)), "one range per group"
    for index, channels in enumerate(groups_of(x.shape[-1], largest)):
        for end, stored in zip(ends, ranges, strict=True):
            end[..., channels] = stored.double()[..., index, None]
    return ends[0], ends[1] - ends[0], 15


def check_round_trip(codec: Codec, seed: int, dtype: torch.dtype, largest: int = 32) -> None:
    """|x - x̂| <= s / 2, for x̂ = zero + code · s and s = width / last: in float64, and without a division, exactly.

    Of bfloat16 nothing is rounded on the way to the code but the quotient. float32's products are rounded, too.
    `largest`: channels that share a range at most, where each token has more than one.
    """
    x = numbers(seed, dtype)
    codes, *ranges = codec.encode(x)
    zero, width, last = ends_of(x, tuple(ranges), largest)
    low = zero if last == 15 else -width
    assert ((low <= x) & (x <= zero + width)).all(), "nothing lies outside of its range"
    if last == 15:
        tight = torch.zeros(x.shape, dtype=torch.float64)
        for channels in groups_of(x.shape[-1], largest):
            tight[..., channels] = (x[..., channels].double().amax(-1) - x[..., channels].double().amin(-1))[..., None]
        assert (width <= tight + 2**-7 * (zero.abs() + (zero + width).abs())).all(), "ranges are no wider than need be"
    error = ((x.double() - zero) * last - levels_of(codes) * width).abs()
    slack = 0.0 if dtype == torch.bfloat16 else last * 2**-22
    assert (2 * error <= width * (1 + slack)).all(), f"seed {seed}, {dtype}"
    stored = zero + levels_of(codes) * width / last
    off = (codec.decode(codes, *ranges).double() - stored).abs()
    assert (off <= 2**-22 * (zero.abs() + width)).all(), f"seed {seed}, {dtype}: decoded to something else"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_a_round_trip_is_off_by_half_a_step_at_most(codec: Codec, dtype: torch.dtype) -> None:
    for seed in range(40):
        check_round_trip(codec, seed, dtype, largest=getattr(codec, "group", 32))


def check_float8(codec: Codec, seed: int) -> None:
    """3 binary digits behind the leading one: off by 1/16 of itself, or by 2^-10 below the smallest normal number."""
    x = numbers(seed)
    codes, scale = codec.encode(x)
    error = (codec.decode(codes, scale) - x.float()).abs()
    bound = torch.maximum(x.float().abs() / 16, scale.float()[..., None] / 448 * 2**-10)
    assert (error <= bound * (1 + 1e-6)).all(), f"seed {seed}"
    assert (codes.float().abs().amax(-1) == 448).all(), "the largest number gets the largest code"


def test_float8_is_off_by_a_sixteenth_at_most() -> None:
    for seed in range(40):
        check_float8(FORMATS["fp8"], seed)


def check_exact(codec: Codec) -> None:
    """What the docstring promises to come back as it was, in bfloat16; and nothing is NaN."""
    for seed in range(8):
        x = numbers(seed)
        x[0, 1] = 0.0
        x[1, 2] = 0.7109375
        x[1, 3] = -12.25
        x[1, 4] = 1e-30
        back = codec.decode(*codec.encode(x))
        assert back.isfinite().all()
        for index in [(0, 1), (1, 2), (1, 3), (1, 4)]:
            assert torch.equal(back[index], x[index].float()), "zeros and constants are exact"
        largest = x.abs().argmax(-1, keepdim=True)
        assert torch.equal(back.gather(-1, largest), x.gather(-1, largest).float()), "the largest number is exact"


def check_groups(codec: Codec) -> None:
    """Numbers so large that they take all codes do so in their own group alone: 32 channels, the others are exact."""
    x = torch.arange(64).expand(3, 64) % 16 / 4.0
    x = torch.stack([x[0], x[1] + 1000 * (torch.arange(64) == 5), x[2] - 1000 * (torch.arange(64) == 40)])
    right = codec.decode(*codec.encode(x)) == x
    assert right[0].all() and right[1, 32:].all() and right[2, :32].all(), "another group, or none, is disturbed"
    assert not right[1, :32].all() and not right[2, 32:].all()


def test_a_large_channel_spoils_its_own_group_alone() -> None:
    check_groups(FORMATS["int4"])
    with pytest.raises(AssertionError):
        check_groups(Int4(64))


@pytest.mark.parametrize("codec", FORMATS.values(), ids=FORMATS)
def test_zeros_constants_and_ends_are_exact(codec: Codec) -> None:
    check_exact(codec)


@pytest.mark.parametrize("codec", FORMATS.values(), ids=FORMATS)
def test_constants_of_more_digits_are_off_by_half_a_step(codec: Codec) -> None:
    """float32 has more digits than the ends of a range: then a constant is as exact as any other number."""
    x = torch.full((1, 4, 8), 0.1)
    ends = codec.encode(x)[1:]
    assert (ends[-1].float() != x.flatten()[0]).all()
    torch.testing.assert_close(codec.decode(*codec.encode(x)), x, rtol=2**-8, atol=0)


def test_int8_is_symmetric() -> None:
    """No code is -128, and the codes of -x are those of x, negated."""
    codec = FORMATS["int8"]
    for seed in range(20):
        for dtype in (torch.bfloat16, torch.float32):
            codes, scale = codec.encode(numbers(seed, dtype))
            mirrored, same = codec.encode(-numbers(seed, dtype))
            assert codes.min() >= -127 and torch.equal(mirrored, -codes) and torch.equal(scale, same)


def test_ranges_are_rounded_outwards() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 100
    up = formats.round_up(x)
    assert up.dtype == torch.bfloat16 and (up.float() >= x).all() and (up.float() - x <= 2**-7 * x.abs()).all()
    assert torch.equal(formats.round_up(up.float()), up), "what is exact stays"


def check_packing(module: ModuleType) -> None:
    """Every pair of codes, bit by bit: channel c in the low half of byte c, channel c + d / 2 in its high half."""
    low, high = torch.arange(256) % 16, torch.arange(256) // 16
    levels = torch.cat([low, high]).to(torch.uint8)
    assert torch.equal(module.pack(levels), torch.arange(256, dtype=torch.uint8))
    assert torch.equal(module.unpack(torch.arange(256, dtype=torch.uint8)), levels)


def test_packing() -> None:
    check_packing(formats)


def test_the_tensors_say_what_they_are() -> None:
    """Type and shape are all that decoding needs, whatever the size of the groups."""
    for codec in (*FORMATS.values(), Int4(7), Int4(500)):
        for seed in range(4):
            parts = codec.encode(numbers(seed))
            assert torch.equal(formats.decode(*parts), codec.decode(*parts))


# What it does to attention: how far the output is off, in norm, as `claims.md` has measured it with d = 128 and 2,048
# Gaussian keys, and with four channels of the keys far from zero, as trained models have them.

Store = Callable[[Tensor], Tensor]


def stored(codec: Codec) -> Store:
    return lambda x: codec.decode(*codec.encode(x))


def by_channel(codec: Codec, block: int = 32) -> Store:
    """A range per channel of each block of tokens, as KIVI has it: the same codec on blocks that lie on their side."""
    return lambda x: stored(codec)(x.unflatten(1, (-1, block)).mT).mT.flatten(1, 2)


def output_error(keys: Store, values: Store, *, offset: float) -> float:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(64, 4, 128, generator=generator)
    k, v = torch.randn(2, 4, 2048 + 64, 128, generator=generator)[:, :, :2048]
    k[..., :4] += offset
    attend = partial(naive_attention, scale=128**-0.5)
    exact = attend(q, k, v)
    return float((attend(q, keys(k), values(v)) - exact).norm() / exact.norm())


INT8, INT4, PER_TOKEN = stored(FORMATS["int8"]), stored(FORMATS["int4"]), stored(Int4(128))
ERRORS: dict[str, tuple[Store, Store, float, float]] = {
    "fp8": (stored(FORMATS["fp8"]), stored(FORMATS["fp8"]), 0.0, 0.037),
    "int8": (INT8, INT8, 0.0, 0.009),
    "int4 per token": (PER_TOKEN, PER_TOKEN, 0.0, 0.142),
    "int4": (INT4, INT4, 0.0, 0.109),
    "outliers, int8": (INT8, INT8, 12.0, 0.034),
    "outliers, int8, keys by channel": (by_channel(FORMATS["int8"], 2048), INT8, 12.0, 0.013),
    "outliers, int4 per token": (PER_TOKEN, PER_TOKEN, 12.0, 0.286),
    "outliers, keys by channel": (by_channel(Int4()), PER_TOKEN, 12.0, 0.112),
}


@pytest.mark.parametrize("name", ERRORS)
def test_the_error_table(name: str) -> None:
    keys, values, offset, expected = ERRORS[name]
    assert output_error(keys, values, offset=offset) == pytest.approx(expected, rel=0.2)


def test_groups_lie_between_a_token_and_a_channel() -> None:
    """Where a few channels are loud: groups of 32 lose less than a range per token, and more than one per channel."""
    token, group, channel = (output_error(k, INT4, offset=12.0) for k in (PER_TOKEN, INT4, by_channel(Int4())))
    assert channel < 0.8 * group < 0.8 * 0.8 * token, (channel, group, token)


# Wrong versions
def check_module(module: ModuleType) -> None:
    """Everything that is promised of the formats, of any version of the module."""
    check_packing(module)
    for name, codec in module.FORMATS.items():
        check_exact(codec)
        for seed in range(10):
            if name == "fp8":
                check_float8(codec, seed)
            else:
                check_round_trip(codec, seed, torch.bfloat16)
                check_round_trip(codec, seed, torch.float32)
    check_groups(module.FORMATS["int4"])


def test_the_formats_pass() -> None:
    check_module(formats)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("GROUP = 32 ", "GROUP = 64 "),  # a range per token: a large channel takes up all codes
        ("GROUP = 32 ", "GROUP = 16 "),  # better, and not what the formula pays for
        ("scale = round_up(x.abs().amax(-1))", "scale = round_up(x.abs().amax()).expand(x.shape[:-1])"),
        ("return low | high << 4", "return high | low << 4"),
        ("levels.chunk(2, dim=-1)", "levels[..., ::2], levels[..., 1::2]"),
        ("[codes & 15, codes >> 4]", "[codes >> 4, codes & 15]"),
        ("PerToken8(torch.int8, 127.0)", "PerToken8(torch.int8, 128.0)"),  # and 128 is -128
        ("scale = round_up(x.abs().amax(-1))", "scale = torch.ones_like(x[..., 0], dtype=RANGE)"),
        ("scale = round_up(x.abs().amax(-1))", "scale = round_up(x.amax(-1))"),
        ("torch.where(near < x, torch.nextafter(near, torch.full_like(near, torch.inf)), near)", "near"),
        ("width.float().where(width > 0, 1.0)", "width.float()"),
        ("else levels.round()).to(", "else levels).to("),
        ("pack(levels.round().to(torch.uint8))", "pack(levels.to(torch.uint8))"),
        (
            "codes.float() * scale.float()[..., None] / self.largest",
            "codes.float() * (scale.float() / self.largest)[..., None]",
        ),
        ("low + unpack(codes).float() * (high - low) / 15", "low + unpack(codes).float() * ((high - low) / 15)"),
        ("(x - bottom) * 15 /", "(x - bottom) * 16 /"),
        ("low = -round_up(torch.stack([-part.amin(-1)", "low = round_up(torch.stack([part.amin(-1)"),
        ("repeat_interleave(-(-d // ends.shape[-1]), dim=-1)[..., :d]", "repeat(*[1] * (ends.dim() - 1), d)[..., :d]"),
    ],
)
def test_wrong_formats_are_rejected(old: str, new: str, tmp_path: Path) -> None:
    wrong = mutant(formats, old, new, tmp_path)
    with pytest.raises(AssertionError):
        check_module(wrong)
