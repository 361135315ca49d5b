"""Rotary embeddings by their defining properties, up to the last position of a long context."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minillm.config import ModelConfig, RopeScaling
from minillm.model.hf import model_config
from minillm.model.rope import Rotation, inverse_frequencies, rotate, rotation
from tests.families import FAMILIES

CONFIG = replace(model_config(FAMILIES["qwen3"]), head_dim=64, rope_theta=1e6)


def turned(x: torch.Tensor, position: int, config: ModelConfig = CONFIG) -> torch.Tensor:
    return rotate(x, rotation(torch.tensor([position]), config))


def vectors(seed: int) -> torch.Tensor:
    return torch.randn(2, 1, 3, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("position", [0, 1, 257, 40_000])
def test_rotation_keeps_lengths_and_position_zero_is_no_turn(position: int) -> None:
    x = vectors(0)[0]
    torch.testing.assert_close(turned(x, position).norm(dim=-1), x.norm(dim=-1))
    if position == 0:
        assert torch.equal(turned(x, 0), x)


@pytest.mark.parametrize("shift", [1, 63, 1000, 30_000])
def test_products_depend_on_the_distance_alone(shift: int) -> None:
    """The reason why keys can be cached rotated: <q at a, k at b> = <q at a + s, k at b + s>."""
    q, k = vectors(1)
    near = (turned(q, 17) * turned(k, 5)).sum(-1)
    far = (turned(q, 17 + shift) * turned(k, 5 + shift)).sum(-1)
    torch.testing.assert_close(near, far, atol=2e-2, rtol=0)
    moved = (turned(q, 18 + shift) * turned(k, 5 + shift)).sum(-1)
    assert (moved - near).abs().max() > 0.5


def test_a_head_is_complex_numbers_turned() -> None:
    """The definition: pair i, made of elements i and i + d/2, times exp(i * position * frequency)."""
    x = vectors(2)[0]
    angles = 12345 * inverse_frequencies(CONFIG).double()
    spun = torch.complex(x[..., :32].double(), x[..., 32:].double()) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat([spun.real, spun.imag], dim=-1)
    torch.testing.assert_close(turned(x, 12345).double(), expected, atol=5e-3, rtol=0)


def test_a_bfloat16_table_is_caught() -> None:
    """The mutant that two libraries shipped: bfloat16 has 8 bits, so positions 256 and 257 become the same."""
    x = vectors(3)[0]

    def mutant(position: int) -> torch.Tensor:
        angles = torch.tensor([position]).bfloat16()[:, None, None] * inverse_frequencies(CONFIG).bfloat16()
        cos, sin = angles.cos(), angles.sin()
        return rotate(x, Rotation(torch.cat([cos, cos], -1).float(), torch.cat([-sin, sin], -1).float()))

    assert torch.equal(mutant(256), mutant(257))
    assert (turned(x, 257) - turned(x, 256)).abs().max() > 0.1


def test_llama3_stretches_long_waves_and_keeps_short_ones() -> None:
    plain = replace(CONFIG, head_dim=128, rope_theta=5e5)
    scaling = RopeScaling(8.0, 1.0, 4.0, 8192)
    before = inverse_frequencies(plain)
    after = inverse_frequencies(replace(plain, rope_scaling=scaling))
    waves = 2 * torch.pi / before
    assert torch.equal(after[waves < 8192 / 4], before[waves < 8192 / 4])
    torch.testing.assert_close(after[waves > 8192], before[waves > 8192] / 8)
    middle = (waves > 8192 / 4) & (waves < 8192)
    assert middle.any() and ((after < before) & (after > before / 8))[middle].all()
