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
from minillm.costs.formulas import format_element_bytes
from minillm.errors import ConfigError
from minillm.quantization import formats
from minillm.quantization.formats import FORMATS, Codec, QuantizedPool, get_format
from tests.attention.cases import mutant, rejected

CODECS = {"int8": FORMATS["int8"].keys, "int4 by token": FORMATS["int4"].values, "int4 by block": FORMATS["int4"].keys}
CPU = torch.device("cpu")


def numbers(seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`[2, 5, 8, 16]`: tokens and channels of very different sizes, some far from 0; all of it exact in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, 8, 16, generator=generator)
    x = x * torch.randn(5, 8, 1, generator=generator).mul(2).exp() * torch.randn(16, generator=generator).exp()
    return (x + 3 * torch.randn(16, generator=generator) * (seed % 2)).to(dtype)


def levels_of(codes: Tensor) -> Tensor:
    """Codes as numbers in float64; those of 4 bits one by one, as the docstring of the module lays them out."""
    if codes.dtype != torch.uint8:
        return codes.double()
    half = codes.shape[-1]
    return torch.stack([codes[..., c % half] >> 4 * (c >= half) & 15 for c in range(2 * half)], dim=-1).double()


def ends_of(codec: Codec, ranges: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, int]:
    """What code 0 stands for, how far the last code is from there, and its number; float64, for each number."""
    ends = [end.double().unsqueeze(-2 if codec.by_block else -1) for end in ranges]
    return (torch.zeros_like(ends[0]), ends[0], 127) if len(ends) == 1 else (ends[0], ends[1] - ends[0], 15)


def check_round_trip(codec: Codec, seed: int, dtype: torch.dtype) -> None:
    """|x - x̂| <= s / 2, for x̂ = zero + code · s and s = width / last: in float64, and without a division, exactly.

    Of bfloat16 nothing is rounded on the way to the code but the quotient. float32's products are rounded, too.
    """
    x = numbers(seed, dtype)
    codes, *ranges = codec.encode(x)
    zero, width, last = ends_of(codec, tuple(ranges))
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
        check_round_trip(codec, seed, dtype)


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
        check_float8(FORMATS["fp8"].keys, seed)


def check_exact(codec: Codec) -> None:
    """What the docstring promises to come back as it was, in bfloat16; and nothing is NaN."""
    x = numbers(3)
    x[0, 1] = 0.0
    x[1, 2] = 0.7109375
    x[1, 3] = -12.25
    x[1, 4] = 1e-30
    dim = -2 if codec.by_block else -1
    back = codec.decode(*codec.encode(x))
    assert back.isfinite().all()
    for index in [(0, 1), (1, 2), (1, 3), (1, 4)]:
        assert torch.equal(back[index], x[index].float()), "zeros and constants are exact"
    largest = x.abs().argmax(dim, keepdim=True)
    assert torch.equal(back.gather(dim, largest), x.gather(dim, largest).float()), "the largest number is exact"


EVERY = {f"{name} {part}": getattr(f, part) for name, f in FORMATS.items() for part in ("keys", "values")}


@pytest.mark.parametrize("codec", EVERY.values(), ids=EVERY)
def test_zeros_constants_and_ends_are_exact(codec: Codec) -> None:
    check_exact(codec)


@pytest.mark.parametrize("codec", EVERY.values(), ids=EVERY)
def test_constants_of_more_digits_are_off_by_half_a_step(codec: Codec) -> None:
    """float32 has more digits than the ends of a range: then a constant is as exact as any other number."""
    x = torch.full((1, 4, 8), 0.1)
    ends = codec.encode(x)[1:]
    assert all((end.float() != x.flatten()[0]).all() for end in ends[-1:])
    torch.testing.assert_close(codec.decode(*codec.encode(x)), x, rtol=2**-8, atol=0)


def test_int8_is_symmetric() -> None:
    """No code is -128, and the codes of -x are those of x, negated."""
    codec = FORMATS["int8"].keys
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


# What it weighs


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_equal_the_formula(name: str) -> None:
    for kv_heads, block_size, d in [(2, 32, 64), (3, 16, 128), (1, 64, 80)]:
        elements = 2 * kv_heads * block_size * d
        size = FORMATS[name].block_bytes(kv_heads, block_size, d)
        assert size == elements * format_element_bytes(name, head_dim=d, block_size=block_size)
        pools = [
            QuantizedPool(c, (kv_heads, 7, block_size, d), CPU) for c in (FORMATS[name].keys, FORMATS[name].values)
        ]
        assert sum(tensor.nbytes for pool in pools for tensor in pool.tensors) == 7 * size


def test_promised_sizes() -> None:
    """Of bfloat16 at d = 64, ranges included."""
    shares = {name: FORMATS[name].block_bytes(1, 32, 64) / (2 * 2 * 32 * 64) for name in FORMATS}
    assert shares == {"fp8": 0.515625, "int8": 0.515625, "int4": 0.296875}
    assert shares["int8"] <= 0.53 and shares["int4"] <= 0.32


def test_unknown_formats_are_refused_by_name() -> None:
    assert get_format("auto") is None and get_format("int4") is FORMATS["int4"]
    with pytest.raises(ConfigError, match=r"kv_format='int2' is unknown\. Choose one of: auto, fp8, int8, int4"):
        get_format("int2")


# Pools


@pytest.mark.parametrize("name", FORMATS)
def test_a_pool_gives_back_what_was_written(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, 6 * 4, 8, generator=generator)
    blocks = torch.tensor([5, 1, 6, 3, 2, 8])
    for codec in (FORMATS[name].keys, FORMATS[name].values):
        pool = QuantizedPool(codec, (3, 9, 4, 8), CPU)
        if codec.by_block:
            pool.write_blocks(x.unflatten(1, (6, 4)), blocks)
        else:
            shuffled = torch.randperm(24, generator=generator)
            slots = (blocks[:, None] * 4 + torch.arange(4)).flatten()
            pool.write(x.transpose(0, 1)[shuffled], slots[shuffled])
        expected = codec.decode(*codec.encode(x.unflatten(1, (6, 4))))
        assert torch.equal(pool.read(blocks), expected)
        assert torch.equal(pool.read(blocks[[4, 0]]), expected[:, [4, 0]])
        assert (pool.read(torch.tensor([0, 4, 7])) == 0).all(), "nobody else's block was touched"


# What it does to attention: how far the output is off, in norm, as `claims.md` has measured it with d = 128 and 2,048
# Gaussian keys, and with four channels of the keys far from zero, as trained models have them.

Store = Callable[[Tensor], Tensor]


def through(codec: Codec, x: Tensor) -> Tensor:
    """x `[kv_heads, n, d]` as it comes back from blocks of 32."""
    return codec.decode(*codec.encode(x.unflatten(1, (-1, 32)))).flatten(1, 2)


def by_channel(codec: Codec, x: Tensor) -> Tensor:
    return codec.decode(*codec.encode(x.mT)).mT


def output_error(keys: Store, values: Store, *, offset: float) -> float:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(64, 4, 128, generator=generator)
    k, v = torch.randn(2, 4, 2048 + 64, 128, generator=generator)[:, :, :2048]
    k[..., :4] += offset
    attend = partial(naive_attention, scale=128**-0.5)
    exact = attend(q, k, v)
    return float((attend(q, keys(k), values(v)) - exact).norm() / exact.norm())


def stored(name: str, part: str) -> Store:
    return partial(through, getattr(FORMATS[name], part))


INT4_BY_TOKEN = stored("int4", "values")
ERRORS: dict[str, tuple[Store, Store, float, float]] = {
    "fp8": (stored("fp8", "keys"), stored("fp8", "values"), 0.0, 0.037),
    "int8": (stored("int8", "keys"), stored("int8", "values"), 0.0, 0.009),
    "int4, keys by token": (INT4_BY_TOKEN, INT4_BY_TOKEN, 0.0, 0.142),
    "outliers, int8": (stored("int8", "keys"), stored("int8", "values"), 12.0, 0.034),
    "outliers, int8, keys by channel": (partial(by_channel, CODECS["int8"]), stored("int8", "values"), 12.0, 0.013),
    "outliers, int4, keys by token": (INT4_BY_TOKEN, INT4_BY_TOKEN, 12.0, 0.286),
    "outliers, int4": (stored("int4", "keys"), INT4_BY_TOKEN, 12.0, 0.112),
}


@pytest.mark.parametrize("name", ERRORS)
def test_the_error_table(name: str) -> None:
    keys, values, offset, expected = ERRORS[name]
    assert output_error(keys, values, offset=offset) == pytest.approx(expected, rel=0.2)


# Wrong versions
def check_module(module: ModuleType) -> None:
    """Everything that is promised of the formats, of any version of the module."""
    check_packing(module)
    for name, both in module.FORMATS.items():
        for codec in (both.keys, both.values):
            check_exact(codec)
            for seed in range(10):
                if name == "fp8":
                    check_float8(codec, seed)
                else:
                    check_round_trip(codec, seed, torch.bfloat16)
                    check_round_trip(codec, seed, torch.float32)
    keys, values = (partial(through, getattr(module.FORMATS["int4"], part)) for part in ("keys", "values"))
    assert output_error(keys, values, offset=12.0) == pytest.approx(0.112, rel=0.2)


def test_the_formats_pass() -> None:
    check_module(formats)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("keys=Int4(dim=-2)", "keys=Int4(dim=-1)"),  # a range per token, for keys too: outliers take up all codes
        ("scale = round_up(x.abs().amax(-1))", "scale = round_up(x.abs().amax((0, 1, 2))).expand(x.shape[:-1])"),
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
        ("low.float().unsqueeze(self.dim)) * 15 / width", "low.float().unsqueeze(self.dim)) * 16 / width"),
        ("-round_up(-x.amin(self.dim))", "round_up(x.amin(self.dim))"),
    ],
)
def test_wrong_formats_are_rejected(old: str, new: str, tmp_path: Path) -> None:
    wrong = mutant(formats, old, new, tmp_path)
    assert rejected(partial(check_module, wrong))
