"""Checks of exercise 12. The oracle takes numbers one by one, in float64; for E4M3 it knows all 256 of them."""

from __future__ import annotations

import torch

from minillm.course.lab.checks import Case, check
from minillm.course.lab.exercises import Exercise, Task

EXERCISE = Exercise(
    slug="kv_quantization",
    tasks=(
        Task(
            "int8",
            "Eight bits, a scale per token",
            hints=(
                "Which number of a token becomes code 127 or -127? What becomes of a token of zeros?",
                "scale = largest magnitude along the last dimension; code = round(x · 127 / scale). Divide by 1 where "
                "the scale is 0. Going back is code · scale / 127.",
                "scale = x.abs().amax(-1); divisor = scale.where(scale > 0, 1.0)[..., None]; codes = (x * 127 / "
                "divisor).round().to(torch.int8); back: codes.float() * scale[..., None] / 127",
            ),
        ),
        Task(
            "pack",
            "Two numbers in a byte",
            hints=(
                "A number below 16 needs four bits. How does it get into the upper four?",
                "low, high = levels.chunk(2, dim=-1). Shifting left by 4 is times 16; & 15 keeps the lower four bits.",
                "pack: low | high << 4. unpack: torch.cat([packed & 15, packed >> 4], dim=-1)",
            ),
        ),
        Task(
            "int4",
            "Four bits, a range per group",
            hints=(
                "What is the smallest number of a group stored as, and what the largest? Which numbers form a group?",
                "low = amin along dim, high = amax along dim; level = round((x - low) · 15 / (high - low)). unsqueeze "
                "brings the dimension back. Where all are equal, divide by 1.",
                "width = (high - low).where(high > low, 1.0).unsqueeze(dim); levels = ((x - low.unsqueeze(dim)) * 15 / "
                "width).round().to(torch.uint8); return levels, low, high",
            ),
        ),
        Task(
            "fp8",
            "Rounding as floating point does",
            hints=(
                "How far apart are the numbers around x? It depends on the power of two below x alone.",
                "torch.frexp gives the exponent of a mantissa in [0.5, 1): one more than E4M3's. The step is "
                "2^(e - 3), with e at least -6. Clamp to ±448 first.",
                "x = x.float().clamp(-448.0, 448.0); e = torch.frexp(x).exponent - 1; step = torch.exp2((e.clamp("
                "min=-6) - 3).float()); return (x / step).round() * step",
            ),
        ),
    ),
    banned_operations=("quantize_per_tensor", "quantize_per_channel", "float8_e4m3fn", "float8_e5m2", "fake_quantize"),
)


def codes_like(levels: torch.Tensor, dtype: torch.dtype):
    """Accepts codes that are the nearest whole numbers; where a number lies halfway, either of its neighbours."""

    def accepts(got: object) -> str | None:
        if not isinstance(got, torch.Tensor) or got.dtype != dtype or got.shape != levels.shape:
            what = f"{got.dtype} {list(got.shape)}" if isinstance(got, torch.Tensor) else type(got).__name__
            return f"expected {dtype} {list(levels.shape)}, got {what}"
        off = (got.double() - levels).abs() > 0.5 + 1e-3
        if not off.any():
            return None
        first = tuple(int(i) for i in off.nonzero()[0])
        return f"first at {list(first)}: expected the code nearest to {levels[first]:.4g}, got {got[first]}"

    return accepts


def tokens_of(case: Case) -> torch.Tensor:
    """Keys of some heads and tokens: `[heads, tokens, d]`, tokens of very different size."""
    x = case.randn(case.integer(2, 3), case.integer(4, 6), 2 * case.integer(3, 5))
    return x * torch.logspace(-2, 2, x.shape[1])[:, None]


def e4m3() -> torch.Tensor:
    """All numbers of the format, from its definition: sign, 4 bits of exponent, 3 of mantissa; the last is NaN."""
    positive = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    positive += [(1 + mantissa / 8) * 2.0 ** (bits - 7) for bits in range(1, 16) for mantissa in range(8)]
    return torch.tensor(sorted({-x for x in positive[:-1]} | set(positive[:-1])), dtype=torch.float64)


def nearest_e4m3(x: torch.Tensor) -> torch.Tensor:
    """The oracle: the nearest of them, one number at a time."""
    numbers = e4m3()
    return torch.stack([numbers[(numbers - value).abs().argmin()] for value in x.double()]).float()


@check("int8", points=3)
def codes_and_scales(case: Case) -> None:
    """Codes from -127 to 127, and what they are to be multiplied with"""
    x = tokens_of(case)
    scale = torch.stack([row.abs().max() for row in x.flatten(0, 1)]).view(x.shape[:2])
    got = case.learner.quantize_int8(x)
    case.expect(got[1], scale, "the largest magnitude of each token")
    levels = x.double() * 127 / scale.double()[..., None]
    case.require(got[0], codes_like(levels, torch.int8), "x · 127 / scale, rounded to the nearest")


@check("int8", points=2)
def int8_comes_back(case: Case) -> None:
    """Codes become numbers again"""
    codes, scale = case.randint(-127, 128, 3, 5, 8).to(torch.int8), case.randn(3, 5).abs()
    expected = torch.stack(
        [c.double() * s.double() / 127 for c, s in zip(codes.flatten(0, 1), scale.flatten(), strict=True)]
    )
    case.expect(case.learner.dequantize_int8(codes, scale), expected.view(3, 5, 8).float(), "code · scale / 127")


@check("int8", points=1, hidden=True)
def tokens_of_zeros(case: Case) -> None:
    """Zeros stay zeros, beside other tokens"""
    x = case.randn(3, 6)
    x[1] = 0
    got = case.learner.quantize_int8(x)
    case.expect(got[0][1], torch.zeros(6, dtype=torch.int8), "codes of a token of zeros")
    case.expect(got[1][1], torch.tensor(0.0), "its scale")
    case.expect(case.learner.dequantize_int8(got[0], got[1])[1], torch.zeros(6), "and back")


@check("pack", points=2)
def packed_halves(case: Case) -> None:
    """Channel c in the lower half of a byte, channel c + d / 2 in its upper half"""
    half = case.integer(3, 5)
    levels = case.randint(0, 16, 3, 2 * half).to(torch.uint8)
    expected = torch.tensor([[int(row[c]) + 16 * int(row[c + half]) for c in range(half)] for row in levels])
    case.expect(case.learner.pack_int4(levels), expected.to(torch.uint8), "lower + 16 · upper")


@check("pack", points=2)
def unpacked(case: Case) -> None:
    """Bytes become levels again"""
    packed = case.randint(0, 256, 3, case.integer(3, 5)).to(torch.uint8)
    expected = torch.tensor([[int(b) % 16 for b in row] + [int(b) // 16 for b in row] for row in packed])
    case.expect(case.learner.unpack_int4(packed), expected.to(torch.uint8), "the lower halves, then the upper ones")


@check("int4", points=3)
def ranges_of_tokens_and_channels(case: Case) -> None:
    """A range per token, or per channel"""
    x = tokens_of(case)
    x[..., 1] *= 30  # a channel that is larger than all others, as keys have it
    for dim, group in ((-1, "token"), (-2, "channel")):
        low, high = x.double().amin(dim), x.double().amax(dim)
        got = case.learner.quantize_int4(x, dim)
        case.expect(got[1], low.float(), f"the smallest number of each {group}")
        case.expect(got[2], high.float(), f"the largest number of each {group}")
        levels = (x.double() - low.unsqueeze(dim)) * 15 / (high - low).unsqueeze(dim)
        case.require(got[0], codes_like(levels, torch.uint8), f"(x - low) · 15 / (high - low) within its {group}")


@check("int4", points=2, hidden=True)
def equal_numbers(case: Case) -> None:
    """A group of equal numbers, and numbers that are all negative"""
    x = -1 - case.randn(4, 6).abs()
    x[2] = -2.5
    got = case.learner.quantize_int4(x, dim=-1)
    case.expect(got[0][2], torch.zeros(6, dtype=torch.uint8), "no width, so nothing to tell apart")
    case.expect(got[1], x.amin(-1), "the smallest, also below zero")
    case.expect(got[2], x.amax(-1), "the largest, also below zero")


@check("fp8", points=3)
def rounded_to_e4m3(case: Case) -> None:
    """The nearest of the format's numbers"""
    x = case.randn(40) * torch.logspace(-2, 2, 40)
    case.expect(
        case.learner.round_fp8(x), nearest_e4m3(x), "3 bits of mantissa behind the leading one", atol=0, rtol=1e-6
    )


@check("fp8", points=1)
def too_large(case: Case) -> None:
    """What is larger than 448 becomes 448"""
    x = torch.tensor([448.0, 449.0, 465.0, 1e4, -447.0, -1e6])
    expected = torch.tensor([448.0, 448.0, 448.0, 448.0, -448.0, -448.0])
    case.expect(case.learner.round_fp8(x), expected, "the largest number of the format")


@check("fp8", points=2, hidden=True)
def near_zero(case: Case) -> None:
    """Below 2^-6 the numbers stay 2^-9 apart, down to 0"""
    x = torch.cat([case.randn(30) * 2.0**-7, torch.tensor([0.0, 2.0**-9, 2.0**-11, 5 * 2.0**-10])])
    keep = (nearest_e4m3(x) - x).abs() < 0.49 * 2.0**-9  # halfway cases go to the even one: another check
    case.expect(case.learner.round_fp8(x[keep]), nearest_e4m3(x[keep]), "subnormal numbers", atol=0, rtol=1e-6)
    halves = torch.tensor([1.0625, 1.1875, 17.0, 19.0, -2.625])
    expected = torch.tensor([1.0, 1.25, 16.0, 20.0, -2.5])
    case.expect(case.learner.round_fp8(halves), expected, "a number halfway between two goes to the even one", atol=0)
