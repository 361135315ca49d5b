"""Wrong quantisation that people really write. Each explanation completes "This is what comes out when …"."""

from __future__ import annotations

from minillm.course.lab.exercises import Mutant

MUTANTS = (
    Mutant(
        "one_scale_for_all",
        "one scale serves all tokens: the small ones lose all of their digits",
        {"scale = x.abs().amax(dim=-1)": "scale = x.abs().max().expand(x.shape[:-1]).contiguous()"},
    ),
    Mutant(
        "scale_per_channel",
        "the largest magnitude is taken along the tokens, not along the d numbers of one",
        {
            "scale = x.abs().amax(dim=-1)\n    divisor = scale.where(scale > 0, 1.0)[..., None]": "scale = x.abs()."
            "amax(dim=-2)\n    divisor = scale.where(scale > 0, 1.0)[..., None, :]"
        },
    ),
    Mutant(
        "scale_without_sign",
        "the largest number is taken, not the largest magnitude: large negative numbers overflow",
        {"x.abs().amax(dim=-1)": "x.amax(dim=-1).clamp(min=1e-3)"},
    ),
    Mutant(
        "scaled_to_128",
        "the largest number becomes 128, which int8 does not have: it turns into -128",
        {"(x * 127 / divisor)": "(x * 128 / divisor)"},
    ),
    Mutant(
        "cut_not_rounded",
        "codes are cut off towards 0, not rounded: the error is twice as large",
        {"(x * 127 / divisor).round()": "(x * 127 / divisor).trunc()"},
    ),
    Mutant(
        "scale_is_the_step",
        "the scale is taken as the step between two codes on the way back, not as the largest number",
        {"codes.float() * scale[..., None] / 127": "codes.float() * scale[..., None]"},
    ),
    Mutant(
        "neighbours_packed",
        "neighbouring channels share a byte: even ones below, odd ones above",
        {
            "low, high = levels.chunk(2, dim=-1)": "low, high = levels[..., ::2], levels[..., 1::2]",
            "torch.cat([packed & 15, packed >> 4], dim=-1)": "torch.stack("
            "[packed & 15, packed >> 4], dim=-1).flatten(-2)",
        },
    ),
    Mutant(
        "halves_exchanged_when_packing",
        "the first half of the channels goes into the upper half of the bytes",
        {"return low | high << 4": "return high | low << 4"},
    ),
    Mutant(
        "halves_exchanged_when_unpacking",
        "the upper halves come first",
        {"[packed & 15, packed >> 4]": "[packed >> 4, packed & 15]"},
    ),
    Mutant(
        "upper_half_not_masked",
        "the lower level still carries the upper one",
        {"[packed & 15, packed >> 4]": "[packed, packed >> 4]"},
    ),
    Mutant(
        "always_per_token",
        "`dim` is not looked at: keys get a range per token, and one large channel takes all levels",
        {
            "low, high = x.amin(dim=dim), x.amax(dim=dim)": "axis, dim = dim, -1\n"
            "    low, high = x.amin(dim=dim), x.amax(dim=dim)"
        },
    ),
    Mutant(
        "sixteen_steps",
        "the range is divided into 16 steps, but 16 levels have 15 between them: the largest becomes 16",
        {") * 15 / width)": ") * 16 / width)"},
    ),
    Mutant(
        "symmetric_range",
        "the range is symmetric around 0: half of the levels are never used",
        {"low, high = x.amin(dim=dim), x.amax(dim=dim)": "high = x.abs().amax(dim=dim)\n    low = -high"},
    ),
    Mutant(
        "levels_cut",
        "levels are cut off, not rounded",
        {".round().to(torch.uint8)": ".to(torch.uint8)"},
    ),
    Mutant(
        "no_clamp",
        "numbers above 448 are rounded as if the format had more exponents",
        {".clamp(-448.0, 448.0)": ""},
    ),
    Mutant(
        "two_bits_of_mantissa",
        "the steps are twice as wide: that is the format E5M2's mantissa",
        {"(exponent.clamp(min=-6) - 3)": "(exponent.clamp(min=-6) - 2)"},
    ),
    Mutant(
        "frexp_off_by_one",
        "frexp's exponent is taken as it is; its mantissa lies between 0.5 and 1, so it is one too large",
        {"torch.frexp(x).exponent - 1 ": "torch.frexp(x).exponent "},
    ),
    Mutant(
        "no_subnormals",
        "below 2^-6 the steps go on getting smaller, which the format cannot do",
        {"exponent.clamp(min=-6) - 3": "exponent.clamp(min=-60) - 3"},
    ),
    Mutant(
        "mantissa_cut",
        "digits are cut off, not rounded",
        {"(x / step).round() * step": "(x / step).trunc() * step"},
    ),
    Mutant(
        "same_step_everywhere",
        "all numbers are rounded to the same step, as integers are",
        {"step = torch.exp2((exponent.clamp(min=-6) - 3).float())": "step = torch.full_like(x, 448 / 127)"},
    ),
)
